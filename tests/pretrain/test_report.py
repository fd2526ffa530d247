"""The report page: its figures, curves and picture, what it says of damage, and that it needs nothing but itself."""

import json
import math
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.rules import visible
from unfold.model.config import ModelConfig
from unfold.pretrain.config import parse_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.report.command import write_report
from unfold.pretrain.report.curves import number
from unfold.pretrain.report.runs import parameters, read_runs
from unfold.pretrain.report.sample import draw_grid, read_sample

ROOT = Path(__file__).parents[2]
VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its visible text, and whether every tag is closed where it must be."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.texts, self._open, self.data = [], [], [], {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if attributes.get("id") == "data":
            self.data = json.loads(data)
        elif tag not in ("style", "script"):
            self.texts.append(data)

    def find(self, tag: str, css: str = "") -> list[dict]:
        return [a for t, a in self.elements if t == tag and set(css.split()) <= set(a.get("class", "").split())]


def metric(step: int, tokens: int = 4096) -> dict:
    loss = 3 + 5 / step**0.5
    return {
        "step": step, "loss": loss, "grad_norm": 1 + 1 / step, "lr": 1e-3 * min(step / 10, 1), "raw_tokens": step * tokens,
        "samples": step * 4, "loss_tokens": 4092, "raw_tokens_per_s": 5000.0 + step % 3, "seconds": 0.8, "data_wait_s": 1e-3,
    }  # fmt: skip


def make_run(directory: Path, rows: list[dict], **sections) -> Path:
    """A run directory with these metrics; sections: settings that replace those of the defaults."""
    directory.mkdir(parents=True)
    tree = {"data": {"train": ["nowhere/shard"], "tokenizer": "nowhere"}, "model": {"vocab_size": 4096}, "train": {"steps": 100}}
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    (directory / "config.yaml").write_text(parse_config(tree).to_yaml())
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def run(tmp_path) -> Path:
    rows = [metric(step) for step in range(1, 41)]
    rows[19]["valid_loss"], rows[29]["valid_loss"], rows[39]["valid_loss"] = 4.5, 3.25, 3.5
    return make_run(tmp_path / "first", rows)


def test_a_run_with_stages_counts_their_tokens(tmp_path):
    stages = [{"until": 10, "raw_tokens": 512}, {"until": 30, "raw_tokens": 2048, "global_batch": 2}]
    rows = [metric(step) | {"stage": 1 + (step > 10), "stage_name": "short"} for step in range(1, 21)]
    run = make_run(tmp_path / "staged", rows, train={"stages": stages})
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    page = Page(write_report([run]))
    assert "Raw tokens seen 81.92 k 2,048 per sample" in page.text
    assert f"20 {number(10 * 8 * 512 + 10 * 2 * 2048)} " in page.text and "Stage of the run" in page.text


def test_figures_of_one_run(run):
    page = Page(write_report([run]))
    assert [p.name for p in run.glob("*report*")] == ["report.html"]
    for wanted in (
        "Steps done 40 / 100 48 s left",
        "Validation loss, last 3.5000 perplexity 33.12",
        "Validation loss, best 3.2500 perplexity 25.79, step 30",
        f"Train loss, last step {3 + 5 / 40**0.5:.4f}",
        "Raw tokens seen 163.8 k",
        "Raw tokens/s, median 5001",
        "Parameters 4 M",
        "Attention gist chunk sizes 8 x 4: 32x compression",
    ):
        assert wanted in page.text, wanted


def test_every_curve_is_drawn_with_its_data(run):
    page = Page(write_report([run]))
    titles = ["Loss", "Learning rate", "Gradient norm", "Throughput", "Time of a step", "Wait for data"]
    assert [t for t in page.texts if t in titles] == titles
    curves = {c["name"] + str(i): c for i, c in enumerate(page.data["curves"])}
    train, valid = curves["train0"], curves["validation1"]
    assert train["first"] == list(range(1, 41)) and "last" not in train
    assert train["low"] == pytest.approx([metric(s)["loss"] for s in range(1, 41)], rel=1e-4)
    assert (valid["first"], valid["y"]) == ([20, 30, 40], [4.5, 3.25, 3.5])
    assert page.data["curves"][2]["y"] == pytest.approx([metric(s)["lr"] for s in range(1, 41)], rel=1e-4)
    # Each curve stands in the pictures once per x axis, with one point per value.
    paths = page.find("path", "line")
    for i, curve in enumerate(page.data["curves"]):
        drawn = [p["d"].count("L") + 1 for p in paths if p.get("data-curve") == str(i)]
        assert drawn == [len(curve["y"])] * 3
    assert {s.get("data-axis") for s in page.find("svg") if "data-axis" in s} == {"step", "tokens", "hours"}


def test_axes_place_points_where_their_values_are(run):
    page = Page(write_report([run]))
    line = next(p["d"] for p in page.find("path", "line") if p.get("data-curve") == "2")  # learning rate, 0 .. 0.001
    points = np.array([[float(v) for v in p.split()] for p in line[1:].split("L")])
    rates = np.array([metric(s)["lr"] for s in range(1, 41)])
    slope = np.polyfit(rates, points[:, 1], 1)
    assert np.abs(np.polyval(slope, rates) - points[:, 1]).max() < 0.11  # linear, up to the rounding of coordinates
    assert slope[0] < 0  # up is more
    assert np.allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], atol=0.11)


def test_unigram_entropy_is_a_reference_line(tmp_path, run):
    assert not Page(write_report([run])).find("line", "reference")
    for name, tokens, entropy in (("one", 100, 6.0), ("two", 300, 7.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens": tokens, "unigram_entropy_nats": entropy}))
    shards = [str(tmp_path / name) for name in ("one", "two")]
    single = Page(write_report([make_run(tmp_path / "single", [metric(1)], data={"train": shards[:1]})]))
    assert "unigram entropy of the training data: 6.000" in single.text and len(single.find("line", "reference")) == 3
    both = Page(write_report([make_run(tmp_path / "both", [metric(1)], data={"train": shards})]))
    assert "unigram entropy of the training data, mean over the shards: 6.750" in both.text
    (tmp_path / "two.json").write_text("{")
    assert not Page(write_report([tmp_path / "both"])).find("line", "reference")


def test_unknown_metrics_get_curves_of_their_own(tmp_path):
    rows = [metric(step) | {"speed": 0.4, "shares": [0.1, 0.9], "note": "text", "resumed": True} for step in range(1, 9)]
    rows[3]["checkpoint_pause_s"] = 2.5
    page = Page(write_report([make_run(tmp_path / "run", rows)]))
    for title in ("speed", "shares.0", "shares.1", "Pause for a checkpoint"):
        assert title in page.texts
    assert "note" not in page.texts and "resumed" not in page.texts
    assert any(c["first"] == [4] and c["y"] == [2.5] for c in page.data["curves"])


def test_attention_mass_and_use_of_the_devices(tmp_path):
    rows = [metric(step) | {"mfu": 0.4, "tflops": 395.0, "memory_gib": 60.0, "stragglers": [3]} for step in range(1, 9)]
    for row, share in ((rows[3], 0.25), (rows[7], 0.5)):
        row["attention_mass"] = {"gist_1": share, "raw": 1 - share}
        row["routing"] = {"coverage_0": share, "far_coverage_0": share / 2}
        row["routing_by_layer"] = [{"layer": 1, "coverage": [share]}]
    run = make_run(tmp_path / "run", rows)
    page = Page(write_report([run]))
    drawn = {c["name"]: (c["first"], c["y"]) for c in page.data["curves"]}
    assert drawn["gist 1"] == ([4, 8], [0.25, 0.5]) and drawn["raw"] == ([4, 8], [0.75, 0.5])
    assert drawn["far coverage 0"] == ([4, 8], [0.125, 0.25]) and not any("by_layer" in text for text in page.texts)
    titles = ("Where attention goes", "What recall finds", "MFU", "Useful FLOP/s of a device", "Memory, the most of any rank")
    for title in titles:
        assert page.texts.count(title) == 1, title
    assert "part of the peak" in page.texts and not any("stragglers" in text for text in page.texts)
    both = Page(write_report([run, make_run(tmp_path / "other", rows[:4])]))
    assert {"Attention to gist 1", "Attention to raw", "Recall: coverage 0"} <= set(both.texts)
    assert not {"Where attention goes", "What recall finds"} & set(both.texts)


def test_nothing_is_fetched(run):
    page = Page(write_report([run]))
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes)
    source = page.source.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert not [w for w in ("http:", "https:", "@import", "url(", "fetch(", "import(") if w in source]
    assert "prefers-color-scheme: dark" in page.source


def test_torn_and_damaged_lines(run):
    whole = Page(write_report([run]))
    text = (run / "metrics.jsonl").read_text() + '{"step": 41, "loss": 3.'
    (run / "metrics.jsonl").write_text(text)
    torn = Page(write_report([run]))
    assert torn.data["curves"] == whole.data["curves"] and not torn.find("p", "warning")
    lines = text.split("\n")
    lines[10:12] = ["\x00\x00\x00", "[1, 2]", '{"loss": 3.0}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    damaged = Page(write_report([run]))
    assert "3 damaged lines of metrics.jsonl were left out" in damaged.text
    assert damaged.data["curves"][0]["first"] == [s for s in range(1, 41) if s not in (11, 12)]


def test_values_that_are_not_finite(tmp_path):
    rows = [metric(step) for step in range(1, 6)]
    rows[2]["loss"], rows[3]["grad_norm"], rows[4]["loss"] = math.nan, math.inf, None
    page = Page(write_report([make_run(tmp_path / "run", rows)]))
    assert page.data["curves"][0]["first"] == [1, 2, 4]
    assert "2 steps have no finite loss" in page.text
    assert "nan" not in "".join(p.get("d", "") for p in page.find("path"))


def test_a_step_written_twice_counts_as_written_last(tmp_path):
    directory = make_run(tmp_path / "run", [metric(1), metric(2), metric(3), metric(2) | {"loss": 9.0}])
    (read,) = read_runs([directory])
    assert read.metrics["step"].tolist() == [1, 2, 3] and read.metrics["loss"][1] == 9.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.yaml").unlink(), "is not a run directory"),
        (lambda d: (d / "metrics.jsonl").unlink(), "has no metrics yet"),
        (lambda d: (d / "metrics.jsonl").write_text('{"step": 1'), "has no metrics yet"),
        (lambda d: (d / "config.yaml").write_text("a: [1"), "is damaged"),
        (lambda d: (d / "config.yaml").write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda d: (d / "config.yaml").write_text(""), "is damaged"),
        (lambda d: (d / "config.yaml").write_text("data: {train: [x], tokenizer: y}\ntrain: {stepz: 5}"), "train.stepz"),
        (lambda d: (d / "report.html").mkdir(), "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(run, damage, message):
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        write_report([run])
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_not_a_directory(tmp_path):
    (tmp_path / "file").touch()
    cases = (([], "no run directory given"), ([tmp_path / "no"], "does not exist"), ([tmp_path / "file"], "is a file"))
    for paths, message in cases:
        with pytest.raises(UserError, match=message):
            write_report(paths)


def test_several_runs(tmp_path, run):
    rows = [metric(step, 8192) | {"valid_loss": 3.0 + 1 / step} for step in range(1, 11)]
    other = make_run(tmp_path / "deep" / "second", rows, model={"attention": "dense"}, train={"steps": 10, "global_batch": 16})
    twin = make_run(tmp_path / "other" / "second", [metric(1)], gist={"chunk_sizes": [16]})
    path = write_report([other, run, twin, other])
    assert path == other / "report.html" and not (run / "report.html").exists()
    page = Page(path)
    assert "3 runs compared" in page.text
    for name in ("deep/second", "other/second", f"{run.parent.name}/first"):
        assert name in page.text
    assert "3.1000 ★" in page.text and page.text.count("★") == 2  # the best run, and what the star means
    differing = page.text.split("What differs")[1].split(" train ")[0].split("data train")[0]
    for key in ("model.attention", "gist.chunk_sizes", "train.global_batch", "train.steps"):
        assert key in differing
    assert "optimizer.lr" not in differing
    assert [c["name"] for c in page.data["curves"][:3]] == ["deep/second", f"{run.parent.name}/first", "other/second"]
    assert len(page.data["samples"]) == 3 and "Dense attention" in page.text
    assert len({c["style"].split()[1] for c in page.data["curves"]}) == 3  # told apart by dashes, not by colour alone
    # Their steps hold different numbers of tokens: tokens are the axis to compare on.
    assert [i["id"] for i in page.find("input", "pick") if "checked" in i] == ["axis-tokens"]


def test_everything_is_escaped(tmp_path):
    evil = '</script><script>alert("1")</script>&amp;'
    directory = make_run(tmp_path / "a<b>&c", [metric(1) | {evil: 1.0}], monitor={"name": evil}, data={"tokenizer": evil})
    page = Page(write_report([directory]))
    assert "Run a<b>&c" in page.text and evil in page.texts
    assert len(page.find("script")) == 2 and "alert" not in "".join(a.get("onclick", "") for _, a in page.elements)
    assert "<script>alert" not in page.source


def test_checkpoints(run):
    for step, files in ((20, {"a": 5, "b": 3}), (30, {"a": 7}), (40, {})):
        directory = run / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        for name in files:
            (directory / name).write_bytes(b"12345")
        if files:
            (directory / "manifest.json").write_text(json.dumps({"files": {n: {"bytes": b} for n, b in files.items()}}))
    (run / "checkpoints" / "step-00000020" / "b").write_bytes(b"123")
    page = Page(write_report([run]))
    assert "20 163.8 k" in page.text and "whole (sizes match the manifest)" in page.text
    assert "⚠ a is cut short or altered" in page.text and "⚠ not finished (no manifest)" in page.text


def test_configuration_by_section_with_what_was_changed(run):
    page = Page(write_report([run]))
    for word in ("data", "gist", "optimizer", "schedule", "chunk_sizes", "[8, 4]", "peak learning rate"):
        assert word in page.texts or any(word == a.get("title") for a in page.find("span", "key"))
    assert len(page.find("td", "changed")) == 4  # train shards, tokenizer, vocabulary, number of steps


def test_long_runs_stay_small_and_hide_nothing(tmp_path):
    rows = [metric(step) | {"mfu": 0.4 + 1e-3 * math.sin(step), "valid_loss": 3.0} for step in range(1, 100_001)]
    rows[77_776]["grad_norm"] = 1e4
    directory = make_run(tmp_path / "run", rows)
    started = time.process_time()
    page = Page(write_report([directory]))
    assert time.process_time() - started < 30
    assert len(page.source) < 1_500_000
    norm = next(c for c in page.data["curves"] if max(c.get("high", [0])) == 1e4)
    at = norm["high"].index(1e4)
    assert norm["first"][at] <= 77_777 <= norm["last"][at]
    assert (norm["first"][0], norm["last"][-1]) == (1, 100_000)


def test_many_runs_with_many_metrics_stay_small(tmp_path):
    rows = [metric(step) | {f"key{i}": i + step / 7 for i in range(80)} for step in range(1, 601)]
    page = Page(write_report([make_run(tmp_path / f"run{i}", rows) for i in range(6)]))
    assert len(page.source) < 3_000_000
    assert "22 more metrics are in metrics.jsonl" in page.text


def test_the_module_stays_light():
    heavy = ("torch", "deepspeed", "megatron", "wandb")
    code = f"import sys, unfold.pretrain.report.command; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_runs_whose_chunks_do_not_grow_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / str(aware), [metric(1)], gist={"word_aware": aware}) for aware in (True, False)]
    text = Page(write_report(runs)).text
    assert "About every 8 raw tokens are folded" in text and " Every 8 raw tokens are folded" in text


@pytest.mark.parametrize("sizes,own_group", [((8,), False), ((8, 4), True), ((3, 2, 2), False), ((40,), False)])
def test_made_up_sample_follows_the_rules(sizes, own_group):
    gist = {"chunk_sizes": list(sizes), "sink": 2, "n_prev": 2, "own_group": own_group}
    sample = read_sample(parse_config({"data": {"train": ["no"], "tokenizer": "no"}, "gist": gist}))
    assert "could not be read" in sample.origin and set(sample.doc) == {0, 1}
    assert (sample.mask == visible(sample.level.tolist(), sample.doc.tolist(), len(sizes), 2, 2, own_group)).all()
    assert (sample.level >= 0).any() and sample.levels == len(sizes)
    grid = draw_grid(sample, 5)
    drawn = {css: 0 for css in ("sink", "raw", "g0", "g1", "g2", "hidden-cell")}
    for css in drawn:
        for part in grid.split(f'<path class="{css}" d="')[1:]:
            drawn[css] += sum(int(run.split("h")[1].split("v")[0]) for run in part.split('"')[0].split("M")[1:])
    assert drawn["hidden-cell"] + sample.mask.sum() == np.tril(sample.doc[:, None] == sample.doc[None]).sum()
    assert sum(n for css, n in drawn.items() if css != "hidden-cell") == sample.mask.sum()


def test_dense_sample_is_plainly_causal():
    sample = read_sample(parse_config({"data": {"train": ["no"], "tokenizer": "no"}, "model": {"attention": "dense"}}))
    assert (
        (sample.mask == np.tril(sample.doc[:, None] == sample.doc[None])).all()
        and (sample.level == -1).all()
        and not sample.sink.any()
    )


def test_real_sample(tmp_path):
    words = "the people of the United States in order to form a more perfect union establish justice".split()
    text = "".join(" ".join(words[(i * 7 + j * j) % len(words)] for j in range(30)) + ".\n" for i in range(60))
    (tmp_path / "text.txt").write_text(text)
    train = "train-tokenizer --input text.txt --vocab-size 300 --gist-levels 2 --output tok"
    for command in (train, "tokenize --input text.txt --tokenizer tok --output shard --workers 1"):
        paths = [str(tmp_path / part) if part in ("text.txt", "tok", "shard") else part for part in command.split()]
        subprocess.run([sys.executable, "-m", "data_prep", *paths], cwd=ROOT, check=True)
    data = {"train": [str(tmp_path / "shard")], "tokenizer": str(tmp_path / "tok"), "raw_tokens": 256}
    directory = make_run(tmp_path / "run", [metric(1)], data=data, model={"vocab_size": 300})
    sample = read_sample(parse_config(yaml.safe_load((directory / "config.yaml").read_text())))
    assert sample.origin == "The beginning of the run's first training sample."
    shown = "".join(t for t, level in zip(sample.text, sample.level) if level < 0).replace("↵", " ").replace("␣", " ").split()
    assert sum(w.strip(".") in words for w in shown) > 0.8 * len(shown)  # real words, spaces where they belong
    assert (sample.mask == visible(sample.level.tolist(), sample.doc.tolist(), 2, 3, 1)).all()
    page = Page(write_report([directory]))
    (data,) = page.data["samples"]
    assert len(page.find("span", "token")) == len(sample.text) == len(data["sees"])
    rebuilt = np.zeros_like(sample.mask)
    for i, edges in enumerate(data["sees"]):
        for start, stop in zip(edges[::2], edges[1::2]):
            rebuilt[i, start:stop] = True
    assert (rebuilt == sample.mask).all()
    query = np.flatnonzero(sample.level < 0)[-1]
    assert f"Token {query} (" in page.text and f"sees {sample.mask[query].sum()} of" in page.text
    assert len(page.find("span", "token unseen")) == (~sample.mask[query]).sum()


def test_parameters_are_those_of_the_model(tmp_path):
    code = """
import sys, torch.distributed as dist
from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer
from unfold.pretrain.report.runs import parameters
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
biases = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
for options in ({}, {"tied_embeddings": False}, biases, {"qk_norm": True}):
    config = ModelConfig(300, 64, 2, 4, 2, 24, 96, **options)
    model = Transformer(config, BuildContext(dist.group.WORLD, 0))
    assert sum(p.numel() for p in model.parameters()) == parameters(config), options
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert parameters(ModelConfig()) is None
