"""Faults in whole runs: bad steps, signals, a full disk; and what a run may begin with and change."""

import json
import shutil
import signal

import psutil
import pytest

from tests import warm
from tests.conftest import module
from tests.integration.runs import Process, command, read_metrics, run_to_end, series, train
from unfold.pretrain.checkpoint.resume import only_writer
from unfold.pretrain.errors import UserError

EXACT = ("step", "loss", "grad_norm", "sample_range", "samples", "skipped")
NAN = (9, *range(24, 32))  # one sample of step 3; all of steps 7 and 8
SPIKE = 48  # in step 11 once 24..31 are left out


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(tmp_path_factory.mktemp("config") / "tiny.yaml", data={"valid": []})


def faulty(config, run_dir, *overrides, check=True):
    """A run in which some samples are poisoned."""
    injection = [f"nan={','.join(map(str, NAN))}", f"spike={SPIKE}"]
    module = ("tests.integration.faulty", *injection)
    return run_to_end(config, run_dir, 1, "faults.max_skips=2", "faults.spike_window=8", *overrides, check=check, module=module)


@pytest.fixture(scope="module")
def rolled_back(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("faults") / "run"
    return run_dir, faulty(config, run_dir).stderr


def test_bad_steps_are_skipped_and_rolled_back(rolled_back):
    run_dir, log = rolled_back
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert "step 3: loss nan or its gradient is not finite; skipped samples 8..11" in log
    assert (metrics[2]["loss"], metrics[2]["grad_norm"], metrics[2]["skipped"]) == (None, None, True)
    assert "rolled back to step 6; samples 24..31 are left out" in log
    assert "rolled back to step 9; samples 48..51 are left out" in log
    assert [m["sample_range"] for m in metrics] == [
        *("0-4", "4-8", "8-12", "12-16", "16-20", "20-24"),
        *("32-36", "36-40", "40-44", "44-48", "52-56", "56-60"),
    ]
    assert all(m["loss"] for m in metrics if m["step"] != 3) and metrics[-1]["loss"] < metrics[0]["loss"]
    listed = json.loads((run_dir / "quarantine.json").read_text())["rollbacks"]
    assert [(r["first"], r["stop"]) for r in listed] == [(24, 32), (48, 52)]


def test_the_run_is_a_function_of_its_recorded_state(config, rolled_back, tmp_path):
    """From the quarantine list alone, with no checkpoint, the same numbers come again."""
    again = tmp_path / "again"
    shutil.copytree(rolled_back[0], again, ignore=shutil.ignore_patterns("checkpoints"))
    assert "rolled back" not in faulty(config, again).stderr
    assert series(read_metrics(again / "metrics.jsonl"), *EXACT) == series(read_metrics(rolled_back[0] / "metrics.jsonl"), *EXACT)


def test_a_checkpoint_from_before_the_quarantine_is_not_resumed(config, rolled_back, tmp_path):
    """As if the process had been killed right after a rollback was decided."""
    run_dir = tmp_path / "run"
    shutil.copytree(rolled_back[0], run_dir)
    listed = json.loads((run_dir / "quarantine.json").read_text())
    listed["rollbacks"].append({"step": 12, "reason": "by hand", "first": 44, "stop": 45})
    (run_dir / "quarantine.json").write_text(json.dumps(listed))
    log = faulty(config, run_dir).stderr
    assert "step-00000012: learned from samples that quarantine.json takes out" in log and "resumed at step 9" in log
    assert read_metrics(run_dir / "metrics.jsonl")[9]["sample_range"] == "45-53"


def test_too_many_rollbacks_end_the_run(config, tmp_path):
    done = faulty(config, tmp_path / "run", "faults.max_rollbacks=0", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: step 8: steps in a row without a finite loss and gradient (loss nan) after 0 rollbacks" in done.stderr


def test_requests_signals_and_time_limit(config, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("train.steps=5000", "checkpoint.every=5000")
    process = Process(command(config, run_dir, 1, *settings), run_dir)
    process.wait_for(lambda: process.steps_done() >= 2)
    (run_dir / "SAVE").touch()
    process.wait_for(lambda: list(run_dir.glob("checkpoints/step-*/manifest.json")))
    assert not (run_dir / "SAVE").exists() and process.running()
    process.ranks()[0].send_signal(signal.SIGUSR1)
    assert process.end() == 0 and "stopped by SIGUSR1; the state is saved" in process.text()
    done = read_metrics(run_dir / "metrics.jsonl")
    assert (run_dir / f"checkpoints/step-{done[-1]['step']:08d}").is_dir()
    assert [m["step"] for m in done if "checkpoint_pause_s" in m][-1] == done[-1]["step"]
    limited = run_to_end(config, run_dir, 1, *settings, "checkpoint.stop_after_minutes=0.01")
    assert f"resumed at step {done[-1]['step']}" in limited.stderr and "stopped by the time limit" in limited.stderr
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == done[-1]["step"] + 1


def test_a_full_disk_fails_saves_and_nothing_else(config, tmp_path):
    run_dir = tmp_path / "run"
    train(config, run_dir, 1, "train.steps=12", "checkpoint.stop_after_minutes=0.01")  # one step, one checkpoint
    process = Process(command(config, run_dir), run_dir, file_limit=200_000)
    assert process.end() == 1
    text = process.text()
    assert "checkpoint of step 3 FAILED: rank 0: " in text and "File too large" in text
    assert "error: the last checkpoint could not be written" in text and "Traceback" not in text
    assert [m["step"] for m in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 13)), "training went on"
    assert any("File too large" in m.get("checkpoint_error", "") for m in read_metrics(run_dir / "metrics.jsonl"))
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert "resumed at step 1\n" in run_to_end(config, run_dir).stderr


def test_a_killed_launcher_leaves_no_rank_and_no_second_writer_behind(config, tmp_path):
    run_dir = tmp_path / "run"
    process = Process(command(config, run_dir, 2, "train.steps=5000"), run_dir)
    process.wait_for(lambda: process.steps_done() >= 2)
    with pytest.raises(UserError, match=r"another process trains there \(host .*, pid \d+\)"), only_writer(run_dir):
        pass
    ranks = process.kill_launcher()
    assert len(ranks) == 2
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    with only_writer(run_dir):
        pass


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("source") / "run"
    return run_dir, train(config, run_dir, 1, "train.steps=6")


def test_warm_start(config, source, tmp_path):
    run_dir, metrics = source
    start = f"train.init_from={run_dir}"
    begun = train(config, tmp_path / "warm", 2, start, "parallel.tensor=2", "train.steps=1")
    assert begun[0]["loss"] < metrics[0]["loss"] - 0.1 and begun[0]["samples"] == 4
    for place, message in ((run_dir / "tokenizer", "is no whole checkpoint"), (tmp_path, "is no whole checkpoint")):
        done = run_to_end(config, tmp_path / "bad", 1, f"train.init_from={place}", check=False)
        assert done.returncode == 1 and f"error: train.init_from: {place} {message}" in done.stderr
    done = run_to_end(config, tmp_path / "worse", 1, start, "model.ffn_size=128", check=False)
    assert done.returncode == 1 and "this model needs [128, 64]" in done.stderr and "Traceback" not in done.stderr
    shape = ("model.heads=2", "model.kv_heads=2", "model.head_dim=32")
    done = run_to_end(config, tmp_path / "other", 1, start, *shape, check=False)
    assert done.returncode == 1 and "is of another model (model.heads: 4 there, 2 given; " in done.stderr
    longer = run_to_end(config, tmp_path / "longer", 1, start, "train.steps=1", "model.rope_theta=5e5")
    assert "with other rotary positions: model.rope_theta: 10000.0 there, 500000.0 given" in longer.stderr


def test_allowed_changes(config, source, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(source[0], run_dir)
    change = ("train.steps=8", "optimizer.lr=1e-4")
    refused = run_to_end(config, run_dir, 1, *change, "train.allow_changes=[optimizer]", check=False)
    assert refused.returncode == 1 and "train.steps: 6 in the run, 8 given" in refused.stderr
    assert "optimizer.lr" not in refused.stderr
    done = run_to_end(config, run_dir, 1, *change, "train.allow_changes=[optimizer.lr, train.steps]")
    assert "changed by train.allow_changes: optimizer.lr: 0.001 in the run, 0.0001 given" in done.stderr
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == 8
    change = ("train.steps=7", "train.allow_changes=[optimizer.lr, train.steps]")
    assert "train.steps: all 7 are done; to go on, raise it" in run_to_end(config, run_dir, 1, *change).stderr
    other = (*change[:1], "optimizer.kind=muon", "precision=bf16", "train.allow_changes=[optimizer, train.steps, precision]")
    told = run_to_end(config, run_dir, 1, *other, check=False).stderr
    assert "no tensor momentum_buffer.layers.0.attention.qkv.weight; it is of a run with another optimizer.kind" in told


def test_checkpoints_command(source, tmp_path):
    from safetensors.torch import load_file

    run_dir = tmp_path / "run"
    shutil.copytree(source[0], run_dir)
    tool = lambda *arguments, check=True: warm.command("pretrain", "checkpoints", run_dir, *arguments, check=check)
    listed = module("pretrain", "checkpoints", run_dir).stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["3", "6"] and "whole" in listed[1]
    assert "step-00000003: whole" in tool("--verify").stdout
    shown = tool("--show", "--step", 3).stdout
    assert "samples: 12" in shown and "model.layers.1.mlp.gate_up.weight.1 [96, 64] float32" in shown.replace("down", "gate_up")
    converted = tool("--convert", tmp_path / "one.safetensors", "--step", 6).stdout
    assert "tensors of step 6" in converted
    weights = load_file(tmp_path / "one.safetensors")
    assert weights["model.embedding.weight"].shape[1] == 64 and not any(n.startswith("exp_avg") for n in weights)
    with open(run_dir / "checkpoints/step-00000006/shard-00001-model-00001-of-00003.safetensors", "r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 1]))
    verified = tool("--verify", check=False)
    assert verified.returncode == 1 and "00001-of-00003.safetensors: its content differs" in verified.stdout
    assert "error: 1 of 2 checkpoints are damaged" in verified.stderr
    assert "left alone, damaged" in tool("--prune").stdout and (run_dir / "checkpoints/step-00000003").is_dir()
    assert "exists; name a new file" in tool("--convert", tmp_path / "one.safetensors", check=False).stderr
    under_file = tool("--convert", tmp_path / "one.safetensors" / "x", check=False).stderr
    assert under_file.startswith("error: --convert") and "cannot be written (" in under_file
    assert "--keep: says nothing without --prune" in tool("--keep", 2, check=False).stderr
    assert "--optimizer: says nothing without --convert" in tool("--optimizer", check=False).stderr
    assert "--step 3: --prune goes by --keep" in tool("--prune", "--step", 3, check=False).stderr
