"""Whole training runs: metrics, killed runs that go on exactly, bad input that loses nothing."""

import shutil

import pytest
import yaml

from tests.integration.runs import run_to_end, series, train, train_until_killed
from unfold.pretrain.monitor.metrics import read_metrics

EXACT = ("step", "loss", "grad_norm", "lr", "raw_tokens", "samples", "valid_loss")


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """An undisturbed run of one process; its directory and metrics."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    return run_dir, train(config, run_dir)


@pytest.fixture(scope="module")
def pair(config, tmp_path_factory):
    """An undisturbed run of two ranks, bf16, ZeRO-2."""
    run_dir = tmp_path_factory.mktemp("runs") / "pair"
    return run_dir, train(config, run_dir, 2, "precision=bf16", "parallel.zero=2")


def test_metrics_of_a_run(alone):
    run_dir, metrics = alone
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert [m["samples"] for m in metrics] == list(range(4, 49, 4))
    assert [m["raw_tokens"] for m in metrics] == [128 * m["samples"] for m in metrics]
    assert [m["step"] for m in metrics if "valid_loss" in m] == [6, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.3
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == 512, "config.yaml is resolved"


def test_a_killed_run_writes_the_same_losses(config, pair, tmp_path):
    run_dir = tmp_path / "killed"
    overrides = ("precision=bf16", "parallel.zero=2")
    for step in (2, 8):  # before the first checkpoint, and between two
        train_until_killed(config, run_dir, 2, step, *overrides)
    metrics = train(config, run_dir, 2, *overrides)
    assert series(metrics, *EXACT) == series(pair[1], *EXACT)


def test_resume_from_a_damaged_checkpoint_uses_the_older_one(config, alone, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    newest = run_dir / "checkpoints/step-00000012"
    part = newest / "shard-00001-model-00001-of-00003.safetensors"
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - 100)
    (run_dir / "checkpoints/step-00000009/manifest.json").write_text('{"step": 9')
    done = run_to_end(config, run_dir)
    assert "step-00000012/shard-00001-model-00001-of-00003.safetensors: has" in done.stderr
    assert "step-00000009/manifest.json: is damaged" in done.stderr
    assert "resumed at step 6" in done.stderr
    assert series(read_metrics(run_dir / "metrics.jsonl"), *EXACT) == series(alone[1], *EXACT)


def test_a_finished_run_does_nothing_more(config, alone):
    before = (alone[0] / "metrics.jsonl").read_text()
    done = run_to_end(config, alone[0])
    assert "resumed at step 12" in done.stderr
    assert (alone[0] / "metrics.jsonl").read_text() == before


def test_dense_attention_trains_on_the_same_tokens(config, alone, tmp_path):
    metrics = train(config, tmp_path / "dense", 1, "model.attention=dense", "train.steps=3")
    assert [m["loss_tokens"] for m in metrics] == [m["loss_tokens"] for m in alone[1][:3]]


def test_a_blend_counts_its_sources(tiny, config, tmp_path):
    """Also with a source added on resume: what was seen stays as it was."""
    run_dir = tmp_path / "run"
    train_until_killed(config, run_dir, 1, 7, f"data.train=['{tiny.train} weight=0.75', '{tiny.valid} weight=0.25']")
    later = f"data.train=['{tiny.train} weight=0.75,32:0.5', '{tiny.valid} weight=0.25,32:0.5']"
    counts = [m["source_samples"] for m in train(config, run_dir, 1, later)]
    assert counts[7] == [24, 8] and counts[11] == [32, 16]
    assert [sum(c) for c in counts] == list(range(4, 49, 4))


def test_wandb_offline(config, tmp_path):
    run_dir = tmp_path / "run"
    train(config, run_dir, 1, "monitor.wandb=true", "train.steps=2")
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def refused(config, run_dir, *overrides, ranks=1) -> str:
    """The one line that a refused run prints."""
    done = run_to_end(config, run_dir, ranks, *overrides, check=False)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "pretrain/" not in done.stderr.replace(str(run_dir), ""), done.stderr
    return errors[0]


@pytest.mark.parametrize(
    "override,message",
    [
        ("gist.chunk_sizes=[0]", "gist.chunk_sizes: [0] has a size below 1"),
        ("data.train=[nowhere]", "data.train: nowhere.bin does not exist"),
        ("data.tokenizer=nowhere", "data.tokenizer: nowhere/tokenizer_info.json does not exist"),
        ("train.global_batch=0", "train.global_batch: 0 is below 1"),
        ("model.vocab_size=100", "model.vocab_size: 100, but the tokenizer has 512 ids"),
        ("parallel.tensor=2", "parallel: tensor x pipeline x context = 2 does not divide the 1 rank(s)"),
    ],
)
def test_bad_settings_end_in_one_line(config, tmp_path, override, message):
    assert message in refused(config, tmp_path / "run", override)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_configuration_is_refused(config, alone, tmp_path):
    text = refused(config, alone[0], "optimizer.lr=1e-4", "gist.sink=1", "gist.word_aware=false")
    assert "gist.word_aware: True in the run, False given" in text
    assert "optimizer.lr: 0.001 in the run, 0.0001 given" in text and "gist.sink: 3 in the run, 1 given" in text
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in refused(config, other)
