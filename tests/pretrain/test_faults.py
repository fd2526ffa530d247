"""Quarantine, fault judgement, watchdog, stragglers, metrics on a full disk."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from unfold.pretrain.checkpoint.manifest import FORMAT
from unfold.pretrain.config import FaultConfig
from unfold.pretrain.monitor.metrics import MetricsFile, read_metrics
from unfold.pretrain.safety.faults import (
    SPIKE,
    TOO_MANY_SKIPS,
    FaultGuard,
    Quarantine,
    Rollback,
    read_quarantine,
    robust_z,
    write_quarantine,
)
from unfold.pretrain.safety.signals import REQUEST, STOPS, Signals, take_request
from unfold.pretrain.safety.watchdog import EXIT_CODE, STRAGGLER_STEPS, Stragglers


def quarantine(*ranges) -> Quarantine:
    return Quarantine([Rollback(1, "test", first, stop) for first, stop in ranges])


@pytest.mark.parametrize("ranges", [[], [(0, 3)], [(4, 6), (5, 9), (20, 21)], [(8, 12), (2, 4), (4, 8)]])
def test_quarantine_leaves_out_its_numbers_and_no_other(ranges):
    listed = quarantine(*ranges)
    want = [n for n in range(100) if not any(a <= n < b for a, b in ranges)]
    assert [listed.number(i) for i in range(60)] == want[:60]


def test_quarantine_file(tmp_path):
    assert not read_quarantine(tmp_path).rollbacks
    write_quarantine(tmp_path, quarantine((4, 8)))
    assert read_quarantine(tmp_path).ranges == [(4, 8)]


DAMAGED = ["", '{"rollbacks": [{"step"', "[]", '{"rollbacks": [{"step": 1, "first": 9, "stop": 3, "reason": ""}]}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_quarantine_is_told_and_taken_from_a_checkpoint(tmp_path, capsys, content):
    (tmp_path / "quarantine.json").write_text(content)
    assert not read_quarantine(tmp_path).rollbacks
    assert "quarantine.json: is damaged" in capsys.readouterr().err
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    held = dict(step=4, samples=16, next_sample=20, raw_tokens=1, config={}, tokenizer_hash="", data=[], versions={}, world=1)
    held |= dict(skipped=[], recent_losses=[], quarantine=quarantine((4, 8)).to_list(), files={}, format=FORMAT)
    (checkpoint / "manifest.json").write_text(json.dumps(held))
    assert read_quarantine(tmp_path).ranges == [(4, 8)]
    assert "taken from step-00000004: 1 rollback(s); later ones are lost" in capsys.readouterr().err


def test_checkpoints_that_learned_from_quarantined_samples_do_not_fit():
    made_with = lambda samples, *ranges: SimpleNamespace(samples=samples, quarantine=quarantine(*ranges).to_list())
    now = quarantine((8, 12))
    assert not now.objection(made_with(8)), "reached up to the quarantine"
    assert now.objection(made_with(12))
    assert not now.objection(made_with(12, (8, 12))), "left them out already"
    assert quarantine((8, 12), (2, 3)).objection(made_with(12, (8, 12)))


def test_skips_in_a_row_are_a_fault_and_single_ones_are_not():
    guard = FaultGuard(FaultConfig(max_skips=2))
    verdicts = [guard.judge(step, math.nan, skipped) for step, skipped in enumerate([True, False, True, True], 1)]
    assert verdicts == [0, 0, 0, TOO_MANY_SKIPS]
    assert guard.skipped == [1, 3, 4] and guard.guilty_steps(TOO_MANY_SKIPS, 4) == (3, 4)


def test_spikes():
    draw = random.Random(0)
    guard = FaultGuard(FaultConfig(spike_window=32, spike_z=12, spike_steps=2))
    falling = [6 - step / 50 + draw.gauss(0, 0.1) for step in range(200)]
    assert not any(guard.judge(step, loss, False) for step, loss in enumerate(falling, 1))
    assert guard.judge(201, 9.0, False) == SPIKE and guard.guilty_steps(SPIKE, 201) == (200, 201)
    assert guard.judge(202, 2.0, False) == 0, "better than usual is no fault"
    again = FaultGuard(FaultConfig(spike_window=32, spike_z=12))
    again.restore([], list(guard.recent))
    assert again.judge(203, 9.0, False) == SPIKE, "a resumed run knows the losses before"
    assert not FaultGuard(FaultConfig(spike_z=0)).judge(1, 1e9, False)
    assert robust_z(1.0, [1.0] * 9) == 0


def test_stragglers_are_named():
    stragglers = Stragglers(1.5)
    for _ in range(STRAGGLER_STEPS - 1):
        assert stragglers.add([1.0, 1.1, 2.0, 0.9]) == []
    assert stragglers.add([1.0, 1.1, 2.0, 0.9]) == [2]
    assert Stragglers(1.5).add([1.0]) == []


def test_metrics_that_cannot_be_written_are_kept(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: a line is cut in the middle, and finished when there is room again."""
    code = f"""
import resource
from pathlib import Path
from unfold.pretrain.monitor.metrics import MetricsFile
metrics = MetricsFile(Path({str(tmp_path / "metrics.jsonl")!r}), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
troubles = [metrics.write({{"step": step, "loss": 1.25}}) for step in range(1, 6)]
assert [bool(t) for t in troubles] == [False, True, False, False, False], troubles
assert "metrics.jsonl: cannot be written (File too large)" in metrics.trouble
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
metrics.write({{"step": 6, "loss": 1.25}})
assert not metrics.trouble
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    MetricsFile(tmp_path / "metrics.jsonl", 4).close()
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_signals_and_requests(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert STOPS[signals.received] == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before
    assert not take_request(tmp_path)
    (tmp_path / REQUEST).touch()
    assert take_request(tmp_path) and not take_request(tmp_path)


def test_watchdog_ends_a_hanging_process_with_all_stacks(tmp_path):
    code = f"""
import time
from pathlib import Path
from types import SimpleNamespace
from unfold.pretrain.safety.watchdog import Watchdog
def hang_here():
    time.sleep(60)
with Watchdog(Path({str(tmp_path)!r}), SimpleNamespace(rank=0, world=1), 1.0) as watchdog:
    watchdog.beat(7, "training")
    hang_here()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == EXIT_CODE and time.monotonic() - began < 55
    assert "in step 7 (training)" in done.stderr and "hang_here" in done.stderr
    assert "hang_here" in (tmp_path / "stacks/rank-00000.txt").read_text()
    assert '"step": 7' in (tmp_path / "heartbeat/rank-00000.json").read_text()
