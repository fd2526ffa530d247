"""A run with stages of other lengths, batches, rates and rotary positions: the losses of one process under every kind of layout,
and when it is killed at a border and goes on under another one."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.integration.runs import read_metrics, run_to_end, train, train_until_killed
from unfold.model.hf.keys import hf_config
from unfold.model.visibility import IGNORED
from unfold.pretrain.checkpoint.load import find_run, load_run
from unfold.pretrain.config import load_config
from unfold.pretrain.data.blend import Stretch
from unfold.pretrain.hf.files import write_model_card
from unfold.pretrain.train.engine import learning_rate
from unfold.pretrain.train.inputs import open_inputs

# 8 x 64 tokens with a rise of the rate, 4 x 128 with other positions, then 2 x 256 from a lower peak.
STAGES = [
    {"until": 3, "raw_tokens": 64, "global_batch": 8, "micro_batch": 2, "name": "short"},
    {"until": 6, "raw_tokens": 128, "rope_theta": 50000.0, "lr": 5e-4, "warmup": 2, "recall": "all"},
    {"until": 9, "raw_tokens": 256, "global_batch": 2, "rope_theta": 90000.0, "rope_scaling": {"kind": "yarn", "factor": 4.0}},
]
LAYOUTS = {
    "dp2 zero2 offload": (2, ["parallel.zero=2", "parallel.offload=optimizer"]),
    "cp2": (2, ["parallel.context=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "dp2 zero3": (2, ["parallel.zero=3"]),
}


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    train = {"steps": 9, "global_batch": 4, "valid_every": 3, "valid_samples": 3, "stages": STAGES}
    return tiny.config(tmp_path_factory.mktemp("staged") / "c.yaml", train=train, checkpoint={"every": 1, "keep": 0})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return train(config, run_dir, 1), run_dir


def same(metrics, wanted):
    for got, want in zip(metrics, wanted, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * max(1, want["loss"])
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        names = ("step", "lr", "samples", "raw_tokens", "loss_tokens", "sample_range", "stage")
        assert [got[n] for n in names] == [want[n] for n in names]


def test_metrics_and_checkpoints_tell_the_stage(config, alone):
    metrics, run_dir = alone
    assert [m["stage"] for m in metrics] == [1] * 3 + [2] * 3 + [3] * 3
    assert [m.get("stage_name") for m in metrics] == ["short"] * 3 + [None] * 6
    assert [m["samples"] for m in metrics] == [8, 16, 24, 28, 32, 36, 38, 40, 42]
    assert [m["raw_tokens"] for m in metrics] == [512 * step for step in range(1, 10)]
    schedule = load_config(config).schedule
    peaks, rise = [1e-3] * 3 + [5e-4] * 3 + [1e-3] * 3, [1.0] * 3 + [0.5] + [1.0] * 5
    assert [m["lr"] for m in metrics] == [learning_rate(i, 9, peak, schedule) * r for i, (peak, r) in enumerate(zip(peaks, rise))]
    for step, theta in ((3, 10000.0), (6, 50000.0), (9, 90000.0)):
        manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
        assert manifest["stage"]["model"]["rope_theta"] == theta and manifest["samples"] == metrics[step - 1]["samples"]


def test_an_export_says_how_it_was_trained(alone, tmp_path):
    write_model_card(find_run(alone[1], 6), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "3,072 in 6 steps, 36 samples, in stage 2 of 128" in card


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_checkpoint_is_read_with_the_positions_of_its_stage(config, alone, step):
    """What generation, evaluation and export load has the validation loss that the run had."""
    metrics, run_dir = alone
    loaded = load_run(run_dir, step)
    valid = open_inputs(load_config(config)).valid.along([Stretch(0, None, loaded.config.data.raw_tokens)])
    batches = [valid.build([n]) for n in range(3)]
    total, tokens = (sum(x.item() for x in xs) for xs in zip(*((loaded.model(b), (b.labels != IGNORED).sum()) for b in batches)))
    assert total / tokens == pytest.approx(metrics[step - 1]["valid_loss"], abs=1e-5)
    exported = hf_config(loaded.config.model, "float32", 1, 2, 0)
    assert exported["rope_theta"] == (metrics[step - 1]["stage"] * 40000.0 - 30000.0)
    assert exported["rope_parameters"]["rope_type"] == ("yarn" if step == 9 else "default")


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    same(train(config, tmp_path / "run", ranks, *settings), alone[0])


@pytest.mark.parametrize("step,name", [(3, "cp2"), (6, "pp2")])
def test_a_run_goes_on_from_a_border_under_another_layout(step, name, config, alone, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(alone[1], run_dir)
    for directory in (run_dir / "checkpoints").iterdir():
        if int(directory.name.removeprefix("step-")) > step:
            shutil.rmtree(directory)
    ranks, settings = LAYOUTS[name]
    same(train(config, run_dir, ranks, *settings), alone[0])
    assert (
        f"resumed at step {step}\nstage {alone[0][step]['stage']}: steps {step + 1} to" in run_dir.with_suffix(".log").read_text()
    )


@pytest.mark.long
def test_a_run_is_killed_at_borders_and_goes_on_under_other_layouts(config, alone, tmp_path):
    run_dir = tmp_path / "moved"
    for step, name in ((3, "cp2"), (6, "pp2")):
        ranks, settings = LAYOUTS[name]
        train_until_killed(config, run_dir, ranks, step, *settings)
    ranks, settings = LAYOUTS["dp2 zero2 offload"]
    same(train(config, run_dir, ranks, *settings), alone[0])


@pytest.mark.long
def test_samples_that_are_left_out_move_the_borders(config, tmp_path):
    """Two bad steps of the first stage: it takes as many samples more, and the next ones begin later."""
    run_to_end(config, tmp_path / "run", 1, "faults.max_skips=1", module=("tests.integration.faulty", "nan=10,25"))
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    ranges = ["0-8", "16-24", "32-40", "40-44", "44-48", "48-52", "52-54", "54-56", "56-58"]
    assert [m["sample_range"] for m in metrics] == ranges and [m["stage"] for m in metrics] == [1] * 3 + [2] * 3 + [3] * 3


ARRANGED = [
    {"until": 2, "raw_tokens": 64, "packing": "best_fit"},
    {"until": 4, "recall": "all", "length_weights": [[3000, 2]]},
    {"until": 5, "packing": "best_fit"},
]
CHOICES = [{"chunk_sizes": [4, 2]}, {"chunk_sizes": [8]}, {"chunk_sizes": [4, 2, 2], "weight": 2}]


@pytest.fixture(scope="module")
def drawing(tiny, tmp_path_factory):
    """A run whose samples draw chunk sizes, and whose stages arrange documents in three ways; and its metrics in one process."""
    folder = tmp_path_factory.mktemp("drawing")
    steps = {"steps": 6, "global_batch": 4, "micro_batch": 2, "valid_every": 0, "valid_samples": 2, "stages": ARRANGED}
    gist = {"chunk_sizes": [4, 2], "choices": CHOICES}
    config = tiny.config(folder / "c.yaml", train=steps, gist=gist, checkpoint={"every": 1, "keep": 0})
    return config, folder / "run", train(config, folder / "run", 1)


BORDERS = [(2, "dp2 zero3"), *(pytest.param(*case, marks=pytest.mark.long) for case in ((4, "cp2"), (5, "pp2"), (4, "tp2")))]


@pytest.mark.parametrize("step,name", BORDERS)
def test_choices_and_packing_go_on_from_a_border_under_another_layout(step, name, drawing, tmp_path):
    config, run_dir, metrics = drawing
    told = re.findall(r"raw tokens an epoch \((\w+)\)", run_dir.with_suffix(".log").read_text())
    assert told == ["best_fit", "windows", "best_fit", "windows"]
    shutil.copytree(run_dir, tmp_path / "run")
    for directory in (tmp_path / "run" / "checkpoints").iterdir():
        if int(directory.name.removeprefix("step-")) > step:
            shutil.rmtree(directory)
    ranks, settings = LAYOUTS[name]
    moved = train(config, tmp_path / "run", ranks, *settings)
    same(moved, metrics)
    for got, want in zip(moved, metrics, strict=True):
        drawn = {key for key in want if key.startswith("loss.")}
        assert drawn == {key for key in got if key.startswith("loss.")} and drawn
        assert all(got[key] == pytest.approx(want[key], rel=1e-5) for key in drawn)
