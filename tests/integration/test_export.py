"""Export, reload with transformers, generation."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests import warm
from tests.conftest import module, run
from tests.integration.runs import train
from unfold.pretrain.checkpoint.load import find_run
from unfold.pretrain.command import main
from unfold.pretrain.hf import export as export_module
from unfold.pretrain.hf.directory import UNFINISHED, new_directory
from unfold.pretrain.hf.export_weights import write_weights
from unfold.pretrain.hf.files import write_configs, write_model_card

PROMPT = "Fellow-Citizens of the Senate"


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A run on two tensor-parallel ranks with untied embeddings, so that export has something to put together."""
    root = tmp_path_factory.mktemp("export")
    config = tiny.config(root / "c.yaml", model={"tied_embeddings": False})
    train(config, root / "run", 2, "parallel.tensor=2", "train.steps=6")
    return root / "run"


@pytest.fixture(scope="module")
def exported(run_dir):
    output = run_dir.parent / "hf"
    module("pretrain", "export", "--run-dir", run_dir, "--output", output)
    return output


def test_transformers_loads_it_without_a_word(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(exported)
    assert not any(info.values())
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.vocab_size == len(tokenizer) == 512
    proof = json.loads((exported / "export_proof.json").read_text())
    assert proof["largest_logit_difference"] <= 1e-4


def test_what_an_export_holds(exported):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    proof = json.loads((exported / "export_proof.json").read_text())
    gist = proof["gist"]
    assert max(gist["largest_logit_difference_prefill"], gist["largest_logit_difference_decoded"]) <= 1e-4
    assert gist["decoded_tokens"] == 16 and not proof["warnings"]
    assert proof["generate"]["prompts"] == [96, 57] and proof["generate"]["beams"] == 3
    assert proof["generate"]["largest_difference"] <= 1e-3
    for name, digest in proof["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert {p.name for p in exported.iterdir()} == {*proof["files"], "export_proof.json"}
    keys = json.loads((exported / "config.json").read_text())
    assert keys["auto_map"] == {"AutoModelForCausalLM": "modeling_gist.GistLlamaForCausalLM"}
    assert "attn_implementation" not in keys and keys["architectures"] == ["LlamaForCausalLM"]
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == 10000.0 and keys["dtype"] == keys["torch_dtype"]
    assert json.loads((exported / "generation_config.json").read_text())["suppress_tokens"] == keys["gist"]["reserved_ids"]
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-generation" and "gist" in front["tags"]
    assert "| Raw tokens | 3,072 in 6 steps of 4 samples of 128 |" in card and "chunk sizes [4, 2]" in card
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"], "transformers 4 would add token_type_ids"
    assert settings["add_bos_token"] is False, "training saw no BOS; llama.cpp would add one"
    assert settings["add_prefix_space"] is False, "nor a space before every text"
    pieces = SentencePieceProcessor(model_file=str(exported / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert pieces.encode(PROMPT) == tokenizer.encode(PROMPT, add_special_tokens=False)


def export_here(run_dir, output, *options) -> int:
    return main(["export", "--run-dir", str(run_dir), "--output", str(output), *options])


def test_shards_are_cut_at_a_size(run_dir, exported, tmp_path, capsys):
    assert export_here(run_dir, tmp_path / "hf", "--max-shard-size", "100KB", "--dtype", "fp32") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    parts = {name: load_file(tmp_path / "hf" / name) for name in set(index["weight_map"].values())}
    whole = load_file(exported / "model.safetensors")
    assert len(parts) > 2 and index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(parts[index["weight_map"][name]][name], value) for name, value in whole.items())
    for part in parts.values():  # but for a tensor that is larger by itself
        assert len(part) == 1 or sum(4 * value.numel() for value in part.values()) <= 100_000
    assert export_here(run_dir, tmp_path / "x", "--max-shard-size", "5 apples") == 1
    assert "--max-shard-size 5 apples: is not a size such as 5GB or 500MB" in capsys.readouterr().err


def _another_weight(*arguments):
    files = write_weights(*arguments)
    path = arguments[3] / "model.safetensors"
    state = load_file(path)
    state["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(state, path, metadata={"format": "pt"})
    return files


def _a_weight_less(*arguments):
    files = write_weights(*arguments)
    path = arguments[3] / "model.safetensors"
    state = {name: value for name, value in load_file(path).items() if name != "model.norm.weight"}
    save_file(state, path, metadata={"format": "pt"})
    return files


def _edited(name: str, change):
    def write(run, directory, dtype) -> None:
        write_configs(run, directory, dtype)
        tree = json.loads((directory / name).read_text())
        change(tree)
        (directory / name).write_text(json.dumps(tree))

    return write


def _a_cache_that_mixes_rows(run, directory, dtype) -> None:
    """Every forward pass is right; what only generate() asks of the cache is not."""
    write_configs(run, directory, dtype)
    path = directory / "modeling_gist.py"
    text = path.read_text()
    assert text.count("self.sequences = chosen\n") == 1
    path.write_text(text.replace("self.sequences = chosen\n", "self.sequences = chosen[::-1]\n"))


def _swap_two_ids(tree) -> None:
    vocab = tree["model"]["vocab"]
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]


SPOILED = {
    "weight": ("write_weights", _another_weight, "logits of the reloaded model differ by"),
    "missing weight": ("write_weights", _a_weight_less, "transformers reports {'missing_keys': ['model.norm.weight']}"),
    "positions": ("write_configs", _edited("config.json", lambda t: t["rope_parameters"].update(rope_theta=5e4)), "differ by"),
    "gists": ("write_configs", _edited("config.json", lambda t: t["gist"].update(chunk_sizes=[5, 2])), "with gists (prefill)"),
    "generate": ("write_configs", _a_cache_that_mixes_rows, "generate()"),
    "tokenizer": ("write_configs", _edited("tokenizer.json", _swap_two_ids), "the reloaded tokenizer gives"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_export_that_is_not_the_model_is_not_finished(case, run_dir, tmp_path, capsys, monkeypatch):
    name, spoil, message = SPOILED[case]
    monkeypatch.setattr(export_module, name, spoil)
    assert export_here(run_dir, tmp_path / "hf", "--dtype", "fp32") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not list(tmp_path.iterdir())


def test_a_killed_export_is_not_mistaken_for_a_whole_one(run_dir, tmp_path, capsys):
    code = (
        "import os, sys; from pathlib import Path; from unfold.pretrain.hf.directory import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'config.json').write_text('{}'); os._exit(9)"
    )
    assert run(sys.executable, "-c", code, tmp_path / "hf", check=False).returncode == 9
    partial = tmp_path / ".hf.partial"
    assert [p.name for p in tmp_path.iterdir()] == [partial.name] and (partial / UNFINISHED).exists()
    assert main(["import", "--input", str(partial), "--output", str(tmp_path / "run")]) == 1
    assert "was not written to its end (it holds UNFINISHED)" in capsys.readouterr().err
    with new_directory(tmp_path / "hf") as again:
        assert [p.name for p in again.iterdir()] == [UNFINISHED], "the next one starts afresh"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"] and not list((tmp_path / "hf").iterdir())


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    from unfold.pretrain.errors import UserError

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):
        with pytest.raises(UserError, match="--output .*hf: cannot be written .*No space left on device"):
            with new_directory(tmp_path / "hf"):
                raise error
        assert not list(tmp_path.iterdir())


def test_a_model_card_names_the_optimizer(run_dir, tmp_path):
    found = find_run(run_dir, None)
    for kind, said in (("adamw", "| AdamW, learning rate"), ("muon", "| Muon for the layers' matrices, learning rate 0.02; for")):
        optimizer = dataclasses.replace(found.config.optimizer, kind=kind)
        parallel = type(found.config.parallel)()  # Muon needs whole matrices
        config = dataclasses.replace(found.config, optimizer=optimizer, parallel=parallel, precision="bf16")
        write_model_card(dataclasses.replace(found, config=config), tmp_path)
        assert said in (tmp_path / "README.md").read_text()


def test_logits_equal_those_of_the_training_model(exported, run_dir):
    """Not by the export's own proof: the checkpoint is read again, here, and compared on real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unfold.model.gist import GistConfig, build_layout
    from unfold.model.transformer import Transformer
    from unfold.pretrain.checkpoint.load import load_run

    run = load_run(run_dir, None)
    ids = torch.tensor([AutoTokenizer.from_pretrained(exported).encode("The state of the Union is strong. " * 8)])
    dense = Transformer(dataclasses.replace(run.config.model, attention="dense"), run.model.build).eval()
    dense.load_state_dict(run.model.state_dict())
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported)(ids).logits
    assert (theirs - dense.logits(ids, layout)).abs().max() <= 1e-4


def test_generation_from_both(exported, run_dir):
    ours = module("pretrain", "generate", "--run-dir", run_dir, "--prompt", PROMPT, "--max-new-tokens", 12).stdout
    theirs = warm.command("pretrain", "generate", "--model", exported, "--prompt", PROMPT, "--max-new-tokens", 12).stdout
    for text in (ours, theirs):
        assert text.startswith(PROMPT) and len(text.strip()) > len(PROMPT) and "<gist" not in text
    assert ours == generated("--run-dir", run_dir, "--prompt", PROMPT, "--max-new-tokens", 12) + "\n"
    stop = theirs.removeprefix(PROMPT)[3:5]
    stopped = generated("--model", exported, "--prompt", PROMPT, "--max-new-tokens", 12, "--stop", stop)
    assert stopped == theirs[: theirs.find(stop, len(PROMPT))]


def test_documents_read_once(run_dir, tmp_path, capsys):
    """What was read of them is kept for later calls, in whatever order they stand there; where it lies changes no answer."""
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for file, sentence in zip(files, ("The Congress shall meet. ", "The President shall speak of the Union. ", "Who? ")):
        file.write_text(sentence * 9)
    question = ("--prompt", "What of it?", "--max-new-tokens", 8, "--recall", "suffix", "--stats")
    kept = ("--document-cache", tmp_path / "kept", *question)

    def answer(order, *flags):
        documents = [flag for i in order for flag in ("--document", files[i])]
        text = generated("--run-dir", run_dir, *documents, *flags)
        return text, re.search(r"(\d) of \d documents read now", capsys.readouterr().err)[1]

    first, read = answer((0, 1), *kept)
    assert read == "2" and first.startswith("What of it?") and len(list((tmp_path / "kept").iterdir())) == 2
    assert answer((0, 1), *kept) == (first, "0")
    assert answer((0, 1), *question, "--raw-cache", "host") == (first, "2")
    other, read = answer((2, 1, 0), *kept, "--prefix", "Answer by the documents.")
    assert read == "1" and other == answer((2, 1, 0), *question, "--prefix", "Answer by the documents.")[0]
    both, read = answer((1, 0), *kept, "--prompt", "Who speaks?")
    assert read == "0" and both.startswith("[1] What of it?") and "\n\n[2] Who speaks?" in both


def test_documents_that_cannot_be_joined(run_dir, tmp_path):
    from unfold.pretrain.errors import UserError

    (tmp_path / "empty").write_text("")
    (tmp_path / "long").write_text("The Congress shall meet. " * 2000)
    for name, message in (
        ("empty", "--document .*empty: has no token"),
        ("long", r"--document: 1 of them take \d+ tokens .*give fewer or shorter ones"),
    ):
        with pytest.raises(UserError, match=message):
            generated("--run-dir", run_dir, "--document", tmp_path / name, "--prompt", "a")


def test_a_document_cache_on_a_full_disk_is_told(run_dir, tmp_path, monkeypatch):
    """And leaves no part of a file."""
    from unfold.model.gist import parts
    from unfold.pretrain.errors import UserError

    def full(tensors, path, metadata):
        path.write_bytes(b"begun")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(parts, "save_file", full)
    (tmp_path / "a").write_text("The Congress shall meet.")
    with pytest.raises(UserError, match="--document-cache .*kept: part .*No space left on device.*; make room or leave it out"):
        generated("--run-dir", run_dir, "--document", tmp_path / "a", "--document-cache", tmp_path / "kept", "--prompt", "a")
    assert not list((tmp_path / "kept").iterdir())


def test_a_text_beyond_the_longest_is_noted(exported, run_dir, capsys):
    for source in ("--run-dir", run_dir), ("--model", exported):
        text = generated(*source, "--prompt", PROMPT, "--max-new-tokens", 12)
        assert "note:" not in capsys.readouterr().err
        stopped = generated(*source, "--prompt", PROMPT, "--max-new-tokens", 10**6, "--stop", text.removeprefix(PROMPT)[3:5])
        assert text.startswith(stopped)
        assert "tokens and up to 1000000 new ones, but the model is meant for" in capsys.readouterr().err


def test_an_export_is_sampled_as_a_run_is(exported, tmp_path, monkeypatch):
    """Of what transformers and a model's own settings would add, nothing: of all tokens, without penalties."""
    from transformers.generation.utils import GenerationMixin

    hf, seen = shutil.copytree(exported, tmp_path / "hf"), []
    settings = json.loads((hf / "generation_config.json").read_text())
    changed = settings | {"repetition_penalty": 1.7, "top_k": 20, "no_repeat_ngram_size": 2, "do_sample": True}
    (hf / "generation_config.json").write_text(json.dumps(changed))
    choose = GenerationMixin._get_logits_processor
    look = lambda *args, **kwargs: seen.append([type(p).__name__ for p in choose(*args, **kwargs)]) or choose(*args, **kwargs)
    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", look)
    flags = "--prompt", PROMPT, "--max-new-tokens", 12
    assert generated("--model", hf, *flags) == generated("--model", exported, *flags)
    generated("--model", hf, *flags, "--temperature", 0.7, "--top-p", 0.9)
    suppress = "SuppressTokensLogitsProcessor"
    assert seen == [[suppress], [suppress], [suppress, "TemperatureLogitsWarper", "TopPLogitsWarper"]]


def test_control_tokens_of_a_prompt_are_text(exported, run_dir, capsys):
    """As they are in shards; what a prompt may have meant by them is told."""
    for source in ("--run-dir", run_dir), ("--model", exported):
        shown = generated(*source, "--prompt", "a <gist0> b", "--show-prompt")
        assert "<gist0>" in shown and int(re.search(r"(\d+) tokens", shown)[1]) > 5
        assert "note: --prompt: <gist0> is read as text; --chat" in capsys.readouterr().err


def test_eager_generation_captures_no_graphs(run_dir, monkeypatch):
    """The text is the same; on a CPU nothing is captured anyway."""
    from unfold.model.decode import generation

    asked = []
    monkeypatch.setattr(generation, "frames_of", lambda decoder, capture: asked.append(capture))
    flags = "--run-dir", run_dir, "--prompt", PROMPT, "--max-new-tokens", 4
    assert generated(*flags) == generated(*flags, "--eager") and asked == [True, False]


def test_what_generation_cost(exported, run_dir, capsys):
    """One line on stderr, on request, for a run and for an export; the text is the same."""
    figures = r"first token after \d+\.\d{4} s, \d+\.\d{4} s for each token after it, at most \d+\.\d\d GiB of memory$"
    for source, mode in (("--run-dir", "gists 4,2, recall none"), ("--model", "dense")):
        arguments = (source, run_dir if source == "--run-dir" else exported, "--prompt", PROMPT, "--max-new-tokens", 5)
        plain = generated(*arguments)
        assert "first token" not in capsys.readouterr().err
        assert generated(*arguments, "--stats") == plain
        assert re.search(f"^{mode}: {figures}", capsys.readouterr().err, re.M)


def generated(*arguments) -> str:
    """What the command prints, in this process."""
    from unfold.pretrain.command import build_parser
    from unfold.pretrain.generate import check, generate

    args = build_parser().parse_args(["generate", *map(str, arguments)])
    check(args)
    return "".join(generate(args))


def test_questions_on_a_context(run_dir, tmp_path):
    """The context is read once; every question gets the answer that it gets alone, up to its stop text."""
    context, prompt = tmp_path / "context.txt", tmp_path / "prompt.txt"
    context.write_text("The Congress shall meet, and the President shall speak of the state of the Union. " * 12)
    common = ("--run-dir", run_dir, "--context-file", context, "--recall", "suffix", "--max-new-tokens", 10)
    questions = ("What of it?", "Who speaks?")
    alone = [generated(*common, "--prompt", question) for question in questions]
    both = generated(*common, "--prompt", questions[0], "--prompt", questions[1])
    assert both == f"[1] {alone[0]}\n\n[2] {alone[1]}"
    assert alone[0] != generated("--run-dir", run_dir, "--prompt", questions[0], "--max-new-tokens", 10), "the context counts"
    answer = alone[0].removeprefix(questions[0])
    prompt.write_text(questions[0])
    stopped = generated(*common, "--prompt-file", prompt, "--stop", answer[2:4])
    assert stopped == questions[0] + answer[: answer.find(answer[2:4])]
    assert generated(*common, "--prompt", questions[0], "--grow").startswith(questions[0])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["export", "--run-dir", "{run}", "--output", "{hf}"], "exists; name a new directory"),
        (["export", "--run-dir", "{run}", "--step", "5", "--output", "{new}"], "has no such checkpoint; it has steps 6, 3"),
        (["export", "--run-dir", "{new}", "--output", "{new}x"], "is not a run directory"),
        (["generate", "--run-dir", "{run}", "--prompt", ""], "--prompt: is empty"),
        (["generate", "--model", "{hf}", "--prompt", "a", "--recall", "all"], "--recall: needs --run-dir"),
        (["generate", "--model", "{hf}", "--prompt", "a", "--eager"], "--eager: needs --run-dir"),
        (["generate", "--model", "{new}", "--prompt", "a"], "is not an exported model"),
        (["generate", "--run-dir", "{new}", "--prompt", "a"], "is not a run directory"),
        (["generate", "--run-dir", "{run}", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: is not in (0, 1]"),
    ],
)
def test_bad_calls_end_in_one_line(exported, run_dir, tmp_path, arguments, message, capsys):
    places = {"run": run_dir, "hf": exported, "new": tmp_path / "new"}
    code = main([a.format(**places) for a in arguments])
    printed, told = capsys.readouterr()
    said = told.strip().splitlines()[-1]
    assert code == 1 and said.startswith("error: ") and message in said
    assert not printed and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--grow"], "--grow: needs --context-file"),
        (["--context-file", "{new}"], "--context-file {new}: cannot be read"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: is below 1"),
        (["--temperature", "-1"], "--temperature -1.0: is below 0"),
        (["--stop", ""], "--stop: is empty"),
        (["--document", "{new}"], "--document {new}: cannot be read"),
        (["--document-cache", "{new}"], "--document-cache: needs --document"),
        (["--prefix", "a"], "--prefix: needs --document"),
        (["--document", "{new}", "--context-file", "{new}"], "--document: does not go with --context-file"),
        (["--document", "{new}", "--document-cache-gib", "0"], "--document-cache-gib 0.0: is not above 0"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(tmp_path, arguments, message):
    from unfold.pretrain.errors import UserError

    fill = lambda text: text.format(new=tmp_path / "new")
    with pytest.raises(UserError, match=message.format(new=tmp_path / "new")):
        generated("--run-dir", tmp_path, "--prompt", "a", *map(fill, arguments))
