"""A real SLURM cluster on this machine, and jobs on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT
from unfold.pretrain.monitor.metrics import read_metrics

SCRIPT = ROOT.parent / "shared" / "slurm-cluster"  # not part of the project: a cluster is a matter of the machine
NODES = 9


def why_not() -> str:
    """Why no cluster can be had here, '' when it can."""
    if not SCRIPT.exists():
        return f"{SCRIPT} is not there: no SLURM cluster to test on"
    if os.geteuid() != 0:
        return "not root: a SLURM cluster on one machine needs network namespaces"
    return ""


class Cluster:
    """Brings nodes up and down, and asks SLURM."""

    def __init__(self, directory: Path):
        self.environment = {**os.environ, "SLURM_TEST_DIR": str(directory), "SLURM_CONF": str(directory / "slurm.conf")}

    def up(self) -> str:
        """Start the cluster, or revive dead nodes; says what went wrong, '' for nothing."""
        done = subprocess.run([SCRIPT, "up", str(NODES)], env=self.environment, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    def down(self) -> None:
        subprocess.run([SCRIPT, "down"], env=self.environment, capture_output=True)

    def kill(self, node: str) -> None:
        """The node dies with all it runs."""
        subprocess.run([SCRIPT, "kill", node], env=self.environment, check=True, capture_output=True)

    def ask(self, *command: str) -> str:
        """What a SLURM command prints."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def launch(self, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        """``python -m launch ..`` on the login node."""
        line = [sys.executable, "-m", "launch", *map(str, arguments)]
        done = subprocess.run(line, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    def train(self, config: Path, run_dir: Path, nodes: int, *options) -> Job:
        """Submit training on CPUs."""
        common = ("--config", config, "--run-dir", run_dir, "--nodes", nodes, "--gpus-per-node", 0)
        return Job(self, int(re.match(r"job (\d+):", self.launch("slurm", *common, *options).stdout)[1]), run_dir)


class Job:
    """A submitted training job."""

    def __init__(self, cluster: Cluster, number: int, run_dir: Path):
        self.cluster, self.number, self.run_dir = cluster, number, run_dir
        self.conf = cluster.environment["SLURM_CONF"]

    def show(self, field: str) -> str:
        """A field of ``scontrol show job``."""
        return re.search(rf"\b{field}=(\S*)", self.cluster.ask("scontrol", "show", "job", str(self.number)))[1]

    def log(self) -> str:
        """What the batch script said."""
        return "".join(path.read_text() for path in self.run_dir.glob(f"launch/*-{self.number}.log"))

    def ranks_log(self, restart: int) -> str:
        return "".join(path.read_text() for path in self.run_dir.glob(f"launch/*-{self.number}-r{restart}.log"))

    def steps_done(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return max((m["step"] for m in read_metrics(path)), default=0) if path.exists() else 0

    def checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.run_dir.glob("checkpoints/step-*/manifest.json"))

    def wait_for(self, condition, what: str, seconds: float = 600) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            state = self.show("JobState")
            told = f"waited for {what}; job {self.number} is {state}\n{self.log()}\n{self.ranks_log(0)[-3000:]}"
            assert state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "BOOT_FAIL") or condition(), told
            assert time.monotonic() < deadline, told
            time.sleep(0.2)

    def started(self, restart: int) -> bool:
        """Whether the ranks of this start have done a step: the metrics are those of this start."""
        log = self.ranks_log(restart)
        return "raw tokens/s" in log

    def end(self, seconds: float = 600) -> str:
        """Wait for the end; returns SLURM's word for it."""
        deadline = time.monotonic() + seconds
        while (state := self.show("JobState")) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {self.number} is {state}\n{self.log()}\n{self.ranks_log(0)[-3000:]}"
            time.sleep(0.2)
        return state
