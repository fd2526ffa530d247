"""``launch local`` as a user calls it."""

import signal
import sys

import psutil

from tests.integration.runs import Process
from unfold.pretrain.monitor.metrics import read_metrics


def test_two_ranks_that_are_told_to_stop(tiny, tmp_path):
    """SIGTERM to the launcher saves and ends without an error."""
    config = tiny.config(tmp_path / "tiny.yaml", train={"steps": 100000, "valid_every": 0}, checkpoint={"every": 100000})
    run_dir = tmp_path / "my run"
    line = [sys.executable, "-m", "launch", "local", "--config", str(config), "--run-dir", str(run_dir), "--ranks", "2"]
    process = Process(line, run_dir)
    process.wait_for(lambda: process.steps_done() >= 2)
    assert process.running(), process.text()
    next(p for p in psutil.Process().children() if str(run_dir) in p.cmdline()).send_signal(signal.SIGTERM)
    assert process.end() == 0, process.text()
    assert "stopped by SIGTERM; the state is saved" in process.text() and "Traceback" not in process.text()
    step = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert (run_dir / f"checkpoints/step-{step:08d}/manifest.json").is_file()
