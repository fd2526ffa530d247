"""What is done beside a run, on its main rank's machine, by processes of their own: evaluation and export of its checkpoints.

Training does not wait for them. They read a checkpoint that is whole, which is kept until they have ended, use the CPU at low
priority, and their results are in the metrics of the step at whose end they are found.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unfold.pretrain.checkpoint.manifest import MANIFEST, checkpoint_name
from unfold.pretrain.config import EvaluationConfig

EVALUATIONS, EXPORTS = "evaluations", "exports"  # directories in the run directory
NICE = 15
OF_RANKS = ("TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")  # what these variables say is of the run's ranks alone
MOST_PARTS = 64  # of one result, e.g. positions


@dataclass
class _Job:
    """A process, or one that waits for its checkpoint. what: 'export', or the evaluation's sub-command and number."""

    what: str
    step: int
    command: list[str]
    log: Path
    began: float = 0.0
    process: subprocess.Popen | None = None


class Beside:
    """Starts what is due, one process at a time, and finds what has ended. On the main rank only."""

    def __init__(self, config: EvaluationConfig, run_dir: Path, say: Callable[[str], None]):
        self._config, self._run_dir, self._say = config, run_dir, say
        self._jobs: list[_Job] = []

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be evaluated or exported."""
        return bool(self._commands(step)) or self._exports(step)

    @property
    def in_use(self) -> set[int]:
        """Steps whose checkpoints are still to be read."""
        return {job.step for job in self._jobs}

    def add(self, step: int) -> None:
        """A checkpoint of this step is being saved: what is due begins when it is whole."""
        for number, words in self._commands(step):
            folder = self._run_dir / EVALUATIONS / checkpoint_name(step) / f"{number}-{words[0]}"
            self._add(f"{words[0]}_{number}" if number else words[0], step, ["evaluate", *words], folder, folder / "log.txt")
        if self._exports(step):
            target = self._run_dir / EXPORTS / checkpoint_name(step)
            if not target.exists():  # a resume came by here before
                self._add("export", step, ["export"], target, target.with_name(f"{target.name}.log"))

    def poll(self) -> dict:
        """Start what can begin; returns the metrics of what has ended."""
        found: dict = {}
        if self._jobs and self._jobs[0].process is not None and self._jobs[0].process.poll() is not None:
            found = self._ended(self._jobs.pop(0))
        if self._jobs and self._jobs[0].process is None:
            self._begin(self._jobs[0])
        return found

    def drop(self, step: int) -> None:
        """The checkpoint of this step could not be written: nothing can be done with it."""
        for job in [job for job in self._jobs if job.step == step]:
            self._jobs.remove(job)
            self._say(f"{job.what} of step {step} is left out: there is no checkpoint of it")

    def wait(self, seconds: float) -> list[tuple[int, dict]]:
        """Wait for what is left, so long at most; returns (step, metrics) of what ended."""
        found, until = [], time.monotonic() + seconds
        while self._jobs and time.monotonic() < until:
            step = self._jobs[0].step
            if metrics := self.poll():
                found.append((step, metrics))
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """The run ends: so does what is left."""
        for job in self._jobs:
            if job.process is not None:
                job.process.terminate()
                job.process.wait()
            self._say(f"{job.what} of step {job.step} was not done before the run stopped")
        self._jobs.clear()

    def _commands(self, step: int) -> list[tuple[int, list[str]]]:
        every = self._config.every
        due = bool(every) and step % every == 0
        return [(i, shlex.split(text)) for i, text in enumerate(self._config.commands)] if due else []

    def _exports(self, step: int) -> bool:
        return bool(self._config.export_every) and step % self._config.export_every == 0

    def _add(self, what: str, step: int, words: list[str], output: Path, log: Path) -> None:
        place = ["--run-dir", str(self._run_dir), "--step", str(step), "--output", str(output)]
        self._jobs.append(_Job(what, step, [sys.executable, "-m", "unfold", *words, *place], log))

    def _begin(self, job: _Job) -> None:
        directory = self._run_dir / "checkpoints" / checkpoint_name(job.step)
        if not (directory / MANIFEST).exists():  # still being written, or it failed, which is told elsewhere
            return
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_RANKS)}
        threads = str(self._config.threads)
        environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.began = time.monotonic()
            with open(job.log, "wb") as log:
                job.process = subprocess.Popen(
                    job.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=lambda: os.nice(NICE),
                )  # fmt: skip
        except OSError as error:
            self._say(f"error: {job.what} of step {job.step} cannot be started ({error.strerror})")
            self._jobs.remove(job)

    def _ended(self, job: _Job) -> dict:
        seconds = time.monotonic() - job.began
        if job.process.returncode:
            reason = _last_line(job.log)
            self._say(f"error: {job.what} of step {job.step} failed: {reason}. Training goes on")
            return {f"{job.what}_error": reason}
        if job.what == "export":
            self._say(f"step {job.step} is exported: {self._run_dir / EXPORTS / checkpoint_name(job.step)}")
            return {"export_s": seconds, "export_step": job.step}
        return {"evaluation": {job.what: read_results(job.log.parent) | {"of_step": job.step, "seconds": seconds}}}


def read_results(folder: Path) -> dict:
    """The figures of an evaluation: of every variant its overall numbers, and the losses by position."""
    found: dict = {}
    for path in sorted(folder.glob("*.json")):
        for result in json.loads(path.read_text()).get("results", []):
            numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            by_place = {f"to_{b['to']}": b["nats"] for b in result.get("buckets", [])[:MOST_PARTS]}
            found[str(result["name"]).replace(".", "_")] = numbers | ({"nats_by_position": by_place} if by_place else {})
    return found


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].removeprefix("error: ")[:500] if lines else f"it wrote nothing into {log}"
