"""``python -m pretrain evaluate`` on a tiny run and its export: what the figures say is what the model does."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from tests import warm
from tests.pretrain.test_evaluate_scores import LONGBENCH, RAG, RULER, write
from unfold.model.decode.generation import Decoder
from unfold.pretrain.command import main
from unfold.pretrain.evaluate import output, passkey, perplexity, tasks
from unfold.pretrain.evaluate.answering import Reader
from unfold.pretrain.evaluate.subject import load_subject


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A run of two steps with weights large enough for gists to matter."""
    directory = tmp_path_factory.mktemp("evaluate")
    sections = {"model": {"max_position": 256, "init_std": 0.2}, "train": {"steps": 2, "valid_every": 0}}
    config = tiny.config(directory / "c.yaml", **sections, checkpoint={"every": 2})
    warm.command("pretrain", "train", "--config", config, "--run-dir", directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def exported(run_dir):
    assert main(["export", "--run-dir", str(run_dir), "--output", str(run_dir.parent / "exported")]) == 0
    return run_dir.parent / "exported"


def arguments(kind, *flags):
    from unfold.pretrain.command import build_parser

    return build_parser().parse_args(["evaluate", kind, *map(str, flags)])


def subject_of(run_dir, *flags):
    return load_subject(arguments("perplexity", "--run-dir", run_dir, "--data", "x", "--output", "x", *flags))


def check_cost(results, out, written):
    """Every variant tells what it cost, in the JSON file and in a table."""
    for result in results:
        cost = result["cost"]
        assert cost["peak_memory_bytes"] > 50 << 20
        assert all((cost[name] is not None and cost[name] > 0) == written for name in ("first_token_s", "token_s"))
    assert "| seconds to first token | seconds per token | peak memory, GiB |" in out


def evaluate(capsys, kind, *flags):
    """(exit status, stdout, stderr)"""
    status = main(["evaluate", kind, *map(str, flags)])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def subject(run_dir):
    return subject_of(run_dir, "--chunk-sizes", "4,2", "6")


def test_variants(subject):
    names = [variant.name for variant in subject.variants]
    assert names == ["dense", "forget 4,2", "forget 6", "recall 4,2", "recall 6"]
    assert [variant.ratio for variant in subject.variants] == [1, 8, 6, 8, 6]


@pytest.mark.parametrize("number", range(5))
def test_losses_equal_those_of_cached_decoding(subject, number):
    """Token by token through the cache, with gists that come as the text grows: another path through all of the model."""
    variant = subject.variants[number]
    # Where words run on, a gist's place is known some tokens later than it stands: then the cache reads them again.
    starts = np.ones(subject.tokenizer.vocab_size, bool)
    subject = dataclasses.replace(subject, tokenizer=dataclasses.replace(subject.tokenizer, word_starts=starts))
    draw = np.random.default_rng(0)
    windows = [draw.integers(5, 400, n) for n in (70, 2, 33)]
    losses = perplexity.measure(subject, variant, windows, 80)
    expected = np.zeros(80)
    tokenizer = subject.tokenizer
    for window in windows:
        decoder = Decoder(subject.model, variant.recalling("all"), tokenizer.gist_ids, tokenizer.word_starts, grow=True)
        sequence = decoder.start()
        decoder.read_context(sequence, window[:1].tolist(), close=False)
        for place, token in enumerate(window[1:].tolist(), 1):
            expected[place] -= float(sequence.logits.log_softmax(-1)[token])
            sequence.pending = [token]
            decoder.step([sequence])
    assert np.abs(losses.nats - expected).max() < 1e-3
    assert (losses.unfolded > 0) == (variant.mode == "recall")


def test_every_variant_sees_the_same_tokens(subject):
    windows = list(perplexity.take_windows([np.arange(25), np.arange(1), np.arange(11), np.arange(40)], 10, 48))
    assert [len(window) for window in windows] == [10, 10, 5, 10, 10, 3]  # a window of one token predicts nothing
    counts = perplexity.positions(windows, 10)
    assert counts.tolist() == [0, 6, 6, 5, 5, 4, 4, 4, 4, 4] and counts.sum() == sum(len(w) - 1 for w in windows)
    assert perplexity.bucket_edges(300) == [1, 64, 128, 256, 300] and perplexity.bucket_edges(64) == [1, 64]


def test_modes_differ_where_they_must(subject):
    """Before the first chunk closes all see the same; later what is folded shows, and what is unfolded again."""
    window = np.random.default_rng(1).integers(5, 400, 200)
    lost = {v.name: perplexity.measure(subject, v, [window], 200).nats for v in subject.variants}
    start = lambda name: lost[name][1:4]
    assert all(np.abs(start(name) - start("dense")).max() < 1e-4 for name in lost)
    assert np.abs(lost["forget 4,2"] - lost["dense"])[50:].max() > 1e-2
    assert np.abs(lost["forget 4,2"] - lost["forget 6"])[50:].max() > 1e-2
    assert np.abs(lost["recall 4,2"] - lost["forget 4,2"])[50:].max() > 1e-3


def test_perplexity_command(run_dir, exported, tiny, tmp_path, capsys):
    """The run and its export, through the import of Hugging Face models, give the same figures."""
    text = write(tmp_path / "d.jsonl", *({"text": "My fellow citizens, " * n} for n in (3, 20)))
    data = ["--data", tiny.valid, text, "--length", 100, "--max-tokens", 600, "--chunk-sizes", "4,2", "8"]
    status, out, _ = evaluate(capsys, "perplexity", "--run-dir", run_dir, *data, "--topk", 2, "--output", tmp_path / "a")
    assert status == 0 and "recall 8" in out
    results = json.loads((tmp_path / "a" / "perplexity.json").read_text())["results"]
    assert [r["name"] for r in results] == ["dense", "forget 4,2", "forget 8", "recall 4,2", "recall 8"]
    for result in results:
        assert result["tokens"] == results[0]["tokens"] == sum(bucket["tokens"] for bucket in result["buckets"])
        total = sum(bucket["nats"] * bucket["tokens"] for bucket in result["buckets"])
        assert result["nats"] == pytest.approx(total / result["tokens"]) and f"{result['nats']:.4f}" in out
        assert result["perplexity"] == pytest.approx(math.exp(result["nats"]))
    assert (tmp_path / "a" / "perplexity.png").stat().st_size > 10_000
    check_cost(results, out, written=False)
    model = ["--model", exported, "--tokenizer", tiny.tokenizer]
    status, _, _ = evaluate(capsys, "perplexity", *model, *data, "--topk", 2, "--output", tmp_path / "b")
    again = json.loads((tmp_path / "b" / "perplexity.json").read_text())["results"]
    assert status == 0 and [r["name"] for r in again] == [r["name"] for r in results]
    assert all(abs(ours["nats"] - theirs["nats"]) < 1e-5 for ours, theirs in zip(results, again))


def test_trials_have_their_length_and_key(subject):
    args = arguments("passkey", "--run-dir", "x", "--output", "x")
    hay = subject.encode("The sky is blue. " * 9)
    for depth in (0, 0.3, 1):
        trial = passkey.make_trial(subject, hay, 200, depth, args, 0)
        longest = max(map(len, trial.candidates))
        assert len(trial.context) + len(trial.question) + longest + passkey.SPARE == 200
        text = subject.decode(trial.context)
        assert text.count(trial.key) == 2
        room = 200 - len(subject.encode(passkey.INTRODUCTION)) - longest - len(trial.question)
        assert abs(text.index(trial.key) / len(text) - depth) < 1 - room / 200 + 0.25
        keys = [subject.decode(candidate).strip() for candidate in trial.candidates]
        assert keys[0] == trial.key and len(set(keys)) == 10 and all(len(key) == 5 for key in keys)
    assert passkey.make_trial(subject, hay, 200, 0.3, args, 1).key != passkey.make_trial(subject, hay, 200, 0.3, args, 0).key


@pytest.mark.parametrize("number", [0, 1, 3])
def test_likelihoods_equal_those_of_reading_each_candidate(subject, number):
    reader = Reader(subject, subject.variants[number])
    draw = np.random.default_rng(2)
    context, question = draw.integers(5, 400, 60).tolist(), draw.integers(5, 400, 4).tolist()
    sequence = reader.read(context, question)
    candidates = [[7, 8, 9], [7, 30], [40]]
    weighed = reader.weigh(sequence, candidates)
    for candidate, got in zip(candidates, weighed):
        expected = 0.0
        for place, token in enumerate(candidate):
            logits = reader.read(context, [*question, *candidate[:place]]).logits
            expected += float(logits.log_softmax(-1)[token])
        assert got == pytest.approx(expected, abs=1e-4)
    assert reader.weigh(sequence, candidates) == weighed  # the sequence is as it was
    assert reader.write(sequence, 5) == reader.write(sequence, 5)


def test_eager_evaluation_captures_no_graphs(run_dir, monkeypatch):
    from unfold.model.decode import generation

    asked = []
    monkeypatch.setattr(generation, "frames_of", lambda decoder, capture: asked.append(capture))
    for flags in ([], ["--eager"]):
        flags = ["--run-dir", run_dir, "--lengths", 64, "--haystack", "x", "--output", "x", *flags]
        loaded = load_subject(arguments("passkey", *flags))
        loaded.decoder(loaded.variants[0])
    assert asked == [True, False]


@pytest.mark.parametrize("number", [0, 3])
def test_raw_rows_on_the_host_change_no_answer(subject, number):
    variant, draw = subject.variants[number], np.random.default_rng(3)
    context, question = draw.integers(5, 400, 90).tolist(), draw.integers(5, 400, 4).tolist()
    found = []
    for raw_cache in ("device", "host"):
        reader = Reader(dataclasses.replace(subject, raw_cache=raw_cache), variant)
        assert reader.decoder.raw_on_host == (raw_cache == "host" and variant.mode != "dense")
        sequence = reader.read(context, question)
        found.append((reader.write(sequence, 6), reader.weigh(sequence, [[7, 8], [9]])))
    assert found[0] == found[1]


def test_passkey_command(run_dir, tmp_path, capsys):
    flags = [
        "--mode",
        "forget",
        "recall",
        "--lengths",
        140,
        160,
        "--depths",
        0,
        1,
        "--trials",
        2,
        "--digits",
        2,
        "--candidates",
        3,
    ]
    hay = tmp_path / "hay.txt"
    hay.write_text("Fellow citizens of the Senate and of the House of Representatives. " * 3)
    status, out, _ = evaluate(capsys, "passkey", "--run-dir", run_dir, *flags, "--haystack", hay, "--output", tmp_path / "a")
    assert status == 0 and "recall 4,2" in out
    result = json.loads((tmp_path / "a" / "passkey.json").read_text())
    for variant in result["results"]:
        assert [(c["length"], c["depth"]) for c in variant["cells"]] == [(l, d) for l in (140, 160) for d in (0, 1)]
        assert all(1 <= cell["mean_rank"] <= 3 and 0 <= cell["first"] <= 1 for cell in variant["cells"])
        mean = sum(cell["first_token_s"] for cell in variant["cells"]) / 4
        assert mean == pytest.approx(variant["cost"]["first_token_s"])
    check_cost(result["results"], out, written=True)
    assert all((tmp_path / "a" / f"passkey_{name}.png").stat().st_size > 5000 for name in ("exact", "first"))


def test_tasks_command(run_dir, tmp_path, capsys):
    long = {**LONGBENCH, "context": "Ann came home. " * 200, "dataset": "samsum"}
    files = [
        write(tmp_path / "bench.jsonl", LONGBENCH, long),
        write(tmp_path / "niah_1.jsonl", RULER),
        write(tmp_path / "nq.jsonl", RAG),
    ]
    lengths = write(tmp_path / "lengths.json", {"hotpotqa": 3, "samsum": 3, "niah_1": 3, "nq": 3})
    flags = ["--run-dir", run_dir, "--answer-lengths", lengths, "--mode", "dense", "recall", "--output", tmp_path / "a"]
    status, out, _ = evaluate(capsys, "tasks", "--tasks", *files, *flags)
    assert status == 0 and "4 questions; 1 contexts were cut in the middle to 256" in out
    result = json.loads((tmp_path / "a" / "tasks.json").read_text())
    assert [r["name"] for r in result["results"]] == ["dense", "recall 4,2"] and result["truncated"] == 1
    assert list(result["results"][0]["datasets"]) == ["hotpotqa", "samsum", "niah_1", "nq"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    assert [line["left_out"] > 0 for line in lines] == [False, True, False, False]
    # What is said of the answers is what was written: scored again from the file.
    for variant in result["results"]:
        again = {}
        for line in lines:
            again.setdefault(line["dataset"], []).append(next(iter(list(line["written"][variant["name"]].values())[1:])))
        for name, values in again.items():
            assert variant["datasets"][name]["score"] == pytest.approx(sum(values) / len(values))
    assert (tmp_path / "a" / "tasks.png").stat().st_size > 5000
    check_cost(result["results"], out, written=True)


def test_routing_of_a_run(run_dir, tiny, tmp_path, capsys):
    flags = ("--data", tiny.valid, "--length", 200, "--max-tokens", 2000, "--chunk-sizes", "4,2", "8", "--output", tmp_path)
    status, out, _ = evaluate(capsys, "routing", "--run-dir", run_dir, *flags)
    assert status == 0 and "| recall 4,2: layer |" in out and (tmp_path / "routing.png").stat().st_size > 10_000
    two, one = json.loads((tmp_path / "routing.json").read_text())["results"]
    check_cost([two, one], out, written=False)
    assert [entry["layer"] for entry in two["layers"]] == [1] and len(two["layers"][0]["coverage"]) == 2
    for result in (one, two):
        assert all(0 < result["overall"][f"{name}_0"] <= 1 for name in ("coverage", "far_coverage"))
        assert all(0 <= d["coverage"] for d in result["distances"]) and result["distances"][-1]["to"] <= 256
    # As many gists as there are cover everything.
    flags = ("--data", tiny.valid, "--length", 200, "--max-tokens", 1000, "--topk", 1000, "--output", tmp_path / "all")
    assert evaluate(capsys, "routing", "--run-dir", run_dir, *flags)[0] == 0
    whole = json.loads((tmp_path / "all" / "routing.json").read_text())["results"][0]["overall"]
    assert whole["coverage_0"] == pytest.approx(1) and whole["hit_0"] == 1 and whole["neighbour_distance"] < 0.1


def test_tasks_fold_the_context_and_close_it(subject, tmp_path):
    from unfold.pretrain.evaluate.items import read_items

    item = next(read_items(write(tmp_path / "nq.jsonl", RAG), {}, {}, None))
    prompt = tasks.make_prompt(subject, item, 256)
    for variant in subject.variants:
        sequence = Reader(subject, variant).read(prompt.context, prompt.question)
        suffix = sequence.level[-len(prompt.question) :]
        assert set(suffix) == {-1}
        assert max(sequence.level) == len(variant.chunk_sizes) - 1
        if variant.gist:
            assert sequence.level[-len(prompt.question) - 1] == max(sequence.level)  # closed at every level
        recalling = [flag for flag in sequence.recalls if flag]
        assert len(recalling) == (len(prompt.question) if variant.mode == "recall" else 0)


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        (
            "perplexity",
            ["--data", "{valid}", "--length", 300],
            "--length 300: 300 raw tokens, but the model is meant for at most 2",
        ),
        ("perplexity", ["--data", "{valid}", "--length", 1], "--length 1: is below 2"),
        ("perplexity", ["--data", "nowhere"], "nowhere.bin does not exist"),
        ("perplexity", ["--data", "tests"], "--data tests: is a directory; name files in it, or the prefix of shards"),
        ("perplexity", ["--data", "{valid}", "--chunk-sizes", "8,x"], "--chunk-sizes 8,x: expected numbers"),
        ("perplexity", ["--data", "{valid}", "--chunk-sizes", "0"], "has a size below 1"),
        ("perplexity", ["--data", "{valid}", "--chunk-sizes", "2,2,2,2,2,2,2,2,2"], "9 levels, but"),
        ("perplexity", ["--data", "{valid}", "--mode", "dense", "--chunk-sizes", "8"], "add --mode forget"),
        ("perplexity", ["--data", "{valid}", "--mode", "forget", "--topk", 3], "--topk: sets what recall selects"),
        ("routing", ["--data", "{valid}", "--mode", "dense"], "--mode dense: only recall selects anything"),
        ("routing", ["--data", "{valid}", "--length", 4], "--length 4: in windows of so few tokens no gist stands before any"),
        ("passkey", ["--lengths", 20], "--lengths 20: key, question and answer take"),
        ("passkey", ["--lengths", 1000], "--lengths 1000: 1000 raw tokens, but"),
        ("passkey", ["--haystack", "nowhere.txt"], "--haystack nowhere.txt: cannot be read"),
        ("tasks", ["--tasks", "nowhere.jsonl"], "--tasks nowhere.jsonl: cannot be read"),
        ("perplexity", ["--data", "{valid}", "--step", 77], "77"),
        ("perplexity", ["--data", "{valid}", "--tokenizer", "x"], "--tokenizer: needs --model"),
    ],
)
def test_mistakes_end_in_one_line(run_dir, tiny, tmp_path, capsys, kind, flags, message):
    given = [str(flag).replace("{valid}", str(tiny.valid)) for flag in flags]
    status, out, err = evaluate(capsys, kind, "--run-dir", run_dir, *given, "--output", tmp_path / "x")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and out == "" and len(errors) == 1 and message in errors[0]


def test_what_was_measured_outlives_a_full_disk(run_dir, tiny, tmp_path, capsys, monkeypatch):
    """It is printed; and a directory that cannot be written to is refused before anything is measured."""

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    flags = ["--run-dir", run_dir, "--data", tiny.valid, "--mode", "dense", "--max-tokens", 100, "--output", tmp_path / "x"]
    monkeypatch.setattr(perplexity, "write_json", full)
    status, out, err = evaluate(capsys, "perplexity", *flags)
    assert status == 1 and "| dense" in out and "| cost" in out
    assert err.endswith("perplexity.json'); what was measured is printed above\n")
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    status, out, err = evaluate(capsys, "perplexity", *flags)
    assert status == 1 and not out and f"error: --output {tmp_path / 'x'}: cannot be written to" in err


def test_a_reader_that_has_gone_is_no_error(capsys, monkeypatch):
    """As of `python -m pretrain config-reference | head -1`."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["config-reference"]) == 0 and capsys.readouterr().err == ""


def test_wrong_text_lines(run_dir, tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", {"text": "a"}, {"words": "b"})
    flags = ["--run-dir", run_dir, "--data", path, "--mode", "dense", "--output", tmp_path / "x"]
    status, _, err = evaluate(capsys, "perplexity", *flags)
    assert status == 1 and f"error: {path}:2: has no text in 'text'" in err


def test_bf16(run_dir):
    variants = subject_of(run_dir, "--dtype", "bf16"), subject_of(run_dir)
    window = np.random.default_rng(1).integers(5, 400, 60)
    means = [[perplexity.measure(s, v, [window], 60).nats.sum() / 59 for v in s.variants] for s in variants]
    assert variants[0].model.head_weight.dtype == torch.bfloat16
    assert np.abs(np.subtract(*means)).max() < 0.05
