"""Every small state file of a run directory may be empty, torn or of another version: the run names it, mends it and goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from tests.integration.runs import run_to_end, train
from unfold.pretrain.command import main
from unfold.pretrain.config import load_config, saved_settings
from unfold.pretrain.monitor.metrics import read_metrics
from unfold.pretrain.safety.alive import HEARTBEATS

EXACT = ("loss", "grad_norm", "samples")
# What lies there besides checkpoints, whose damage tests/integration/test_train.py is about.
SMALL = (
    "config.yaml",
    "metrics.jsonl",
    "quarantine.json",
    f"{HEARTBEATS}/rank-00000.json",
    ".lock",
    "tokenizer/tokenizer_info.json",
    "tokenizer/word_starts.npy",
)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(tmp_path_factory.mktemp("state") / "c.yaml", train={"steps": 6, "valid_every": 0})


@pytest.fixture(scope="module")
def whole(config):
    """A run of six steps, and its metrics."""
    run_dir = config.parent / "whole"
    return run_dir, train(config, run_dir)


def half(whole, target):
    """The run as it was after three steps."""
    shutil.copytree(whole[0], target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    (target / "quarantine.json").write_text('{"rollbacks": []}')
    (target / HEARTBEATS).mkdir(exist_ok=True)
    (target / HEARTBEATS / "rank-00000.json").write_text('{"rank": 0, "step": 3}')
    return target


def empty(path):
    path.write_bytes(b"")


def torn(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3 + 1] + b"\0\0\0\xff")


def of_another_version(path):
    if path.suffix == ".json":
        path.write_text(json.dumps({"version": 99, "rollbacks": {"a": 1}}))
    elif path.suffix == ".yaml":
        tree = yaml.safe_load(path.read_text())
        tree["train"]["setting_of_tomorrow"] = 3
        path.write_text(yaml.safe_dump(tree))
    elif path.suffix == ".jsonl":
        path.write_text('{"number_of_step": 1}\n3\n' + path.read_text())
    else:
        path.write_bytes(b"\x93FUTURE")


@pytest.mark.parametrize("damage", [empty, torn, of_another_version])
def test_the_run_goes_on(damage, config, whole, tmp_path):
    run_dir = half(whole, tmp_path / "run")
    for name in SMALL:
        assert (run_dir / name).exists(), name
        damage(run_dir / name)
    done = run_to_end(config, run_dir)
    assert "Traceback" not in done.stderr and "resumed at step 3" in done.stderr
    for name in ("config.yaml", "quarantine.json"):
        assert f"{run_dir / name}: " in done.stderr, "named"
    if damage is not empty:
        assert f"{run_dir / 'metrics.jsonl'}: " in done.stderr
    later = {m["step"]: {k: m[k] for k in EXACT} for m in read_metrics(run_dir / "metrics.jsonl")}
    for line in whole[1][3:]:
        assert later[line["step"]] == {k: line[k] for k in EXACT}, "the same as if nothing had happened"
    assert load_config(run_dir / "config.yaml").train.steps == 6
    assert main(["generate", "--run-dir", str(run_dir), "--prompt", "The", "--max-new-tokens", "1"]) == 0, "mended"


def test_other_settings_are_still_refused(config, whole, tmp_path):
    """A lost config.yaml is no way to change what the run learns."""
    run_dir = half(whole, tmp_path / "run")
    empty(run_dir / "config.yaml")
    done = run_to_end(config, run_dir, 1, "optimizer.lr=1e-4", check=False)
    assert done.returncode == 1 and "optimizer.lr: 0.001 in the run, 0.0001 given" in done.stderr
    old, notes = saved_settings(run_dir)
    assert old["optimizer"]["lr"] == 1e-3 and len(notes) == 1 and "config.yaml: is damaged" in notes[0]
    for path in (run_dir / "checkpoints").glob("*/manifest.json"):
        empty(path)
    done = run_to_end(config, run_dir, check=False)
    assert done.returncode == 1 and "no checkpoint tells the run's settings" in done.stderr
