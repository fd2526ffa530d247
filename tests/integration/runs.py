"""Starting training runs as a user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pretrain.monitor import read_metrics
from tests.conftest import ROOT, run


def command(config: Path, run_dir: Path, ranks: int = 1, *overrides: str) -> list[str]:
    """The command line of a training run."""
    start = [sys.executable, "-m", "pretrain"]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, "--nproc-per-node", str(ranks), "-m", "pretrain"]
    settings = [part for override in overrides for part in ("--set", override)]
    return [*start, "train", "--config", str(config), "--run-dir", str(run_dir), *settings]


def train(config: Path, run_dir: Path, ranks: int = 1, *overrides: str) -> list[dict]:
    """Train to the end; returns the metrics."""
    run(*command(config, run_dir, ranks, *overrides), timeout=300)
    return read_metrics(run_dir / "metrics.jsonl")


def train_until_killed(config: Path, run_dir: Path, ranks: int, step: int, *overrides: str) -> None:
    """Start a run and kill all its processes with SIGKILL once a step's metrics are written."""
    log = run_dir.with_suffix(".log")
    with open(log, "w") as out:
        process = subprocess.Popen(
            command(config, run_dir, ranks, *overrides), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and any(m["step"] >= step for m in read_metrics(metrics))):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def series(metrics: list[dict], *names: str) -> list[tuple]:
    """The named figures of every step."""
    return [tuple(m.get(name) for name in names) for m in metrics]
