"""Starting training runs as a user would."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests import warm
from tests.conftest import ROOT
from unfold.pretrain.monitor.metrics import read_metrics


def command(config: Path, run_dir: Path, ranks: int = 1, *overrides: str) -> list[str]:
    """The command line of a training run."""
    start = [sys.executable, "-m", "pretrain"]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, "--nproc-per-node", str(ranks), "-m", "pretrain"]
    return [*start, *_arguments(config, run_dir, *overrides)]


def _arguments(config: Path, run_dir: Path, *overrides: str) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return ["train", "--config", str(config), "--run-dir", str(run_dir), *settings]


def run_to_end(
    config: Path, run_dir: Path, ranks: int = 1, *overrides: str, check: bool = True, module: tuple[str, ...] = ("pretrain",)
) -> subprocess.CompletedProcess:
    """A training run in warm processes: the same command, without the seconds that its imports take.

    module: what is run, and what stands before ``train``.
    """
    return warm.command(*module, *_arguments(config, run_dir, *overrides), ranks=ranks, check=check)


def train(config: Path, run_dir: Path, ranks: int = 1, *overrides: str) -> list[dict]:
    """Train to the end; returns the metrics. What was printed goes to a log beside the run directory."""
    done = run_to_end(config, run_dir, ranks, *overrides)
    run_dir.with_suffix(".log").write_text(done.stdout + done.stderr)
    return read_metrics(run_dir / "metrics.jsonl")


class StepsDone:
    """Called, the steps in the metrics that a run has opened since this was made; it replaces the file of the run before."""

    def __init__(self, run_dir: Path):
        self._metrics = run_dir / "metrics.jsonl"
        self._before = self._inode()

    def _inode(self) -> int:
        return self._metrics.stat().st_ino if self._metrics.exists() else 0

    def __call__(self) -> int:
        if self._inode() == self._before:
            return 0
        return max((m["step"] for m in read_metrics(self._metrics)), default=0)


class Process:
    """A training run in the background, with all its ranks; what it prints goes to a log beside the run directory."""

    def __init__(self, line: list[str], run_dir: Path, file_limit: int = 0):
        """file_limit: no file may grow beyond so many bytes, as on a full disk; 0 sets no limit."""
        self.log, self.steps_done = run_dir.with_suffix(".log"), StepsDone(run_dir)
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))) if file_limit else None
        # The log goes through a pipe: the limit is not meant for it.
        self._process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit
        )
        self._copy = threading.Thread(target=self._copy_log, daemon=True)
        self._copy.start()

    def _copy_log(self) -> None:
        with open(self.log, "wb") as out:
            while data := self._process.stdout.read1():
                out.write(data)
                out.flush()

    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, condition, seconds: float = 240) -> None:
        """Wait until the condition holds or the process has ended."""
        deadline = time.monotonic() + seconds
        while self.running() and not condition():
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def kill_launcher(self) -> list[psutil.Process]:
        """SIGKILL to the launcher alone; returns the ranks, which it leaves behind."""
        ranks = self.ranks()
        os.kill(self._process.pid, signal.SIGKILL)
        return ranks

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: the launcher's children, or the process itself."""
        try:
            launcher = psutil.Process(self._process.pid)
            return [p for p in launcher.children() if "pretrain" in p.cmdline()] or [launcher]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to every process of the run; torchrun's ranks have sessions of their own."""
        try:
            launcher = psutil.Process(self._process.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()
        except psutil.NoSuchProcess:
            pass
        self.end()

    def end(self, seconds: float = 240) -> int:
        """Wait for the end; returns the exit code."""
        code = self._process.wait(seconds)
        self._copy.join(10)
        return code

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def train_until_killed(config: Path, run_dir: Path, ranks: int, step: int, *overrides: str) -> None:
    """Start a run in warm processes and kill them all with SIGKILL once a step's metrics are written."""
    steps_done, deadline = StepsDone(run_dir), time.monotonic() + 240
    with warm.started("pretrain", *_arguments(config, run_dir, *overrides), ranks=ranks) as (pids, end):
        while steps_done() < step and time.monotonic() < deadline and all(map(psutil.pid_exists, pids)):
            time.sleep(0.01)
        assert all(map(psutil.pid_exists, pids)) and steps_done() >= step, end().stderr[-3000:]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert end().returncode == -signal.SIGKILL, end().stderr[-3000:]


def series(metrics: list[dict], *names: str) -> list[tuple]:
    """The named figures of every step."""
    return [tuple(m.get(name) for name in names) for m in metrics]
