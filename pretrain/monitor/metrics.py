"""What a run says while it runs: metrics.jsonl, the progress line, Weights & Biases, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unfold.pretrain.checkpoint.manifest import write_atomically
from unfold.pretrain.config import MonitorConfig, RunConfig, flatten

WANDB_SECONDS = 30.0  # until W&B counts as out of reach, unless WANDB_INIT_TIMEOUT says otherwise
SECONDS_BETWEEN_LINES = 10.0  # progress lines when stderr is not a terminal


class MetricsFile:
    """``metrics.jsonl``: one JSON object per step, appended and flushed.

    Opening it at a step drops what lies after that step (work that a resume does again) and a torn last line, so the
    file always reads like that of an undisturbed run. Lines that cannot be written are kept and written with the next.

    Attributes:
        trouble: why the file is behind, '' when every line is in it.
    """

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_metrics(path, told=True) if line["step"] <= step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path, self._waiting, self.trouble = path, b"", ""
        self._file = open(path, "ab", buffering=0)

    def write(self, metrics: dict) -> str:
        """Append a line; returns what is new in ``trouble``."""
        self._waiting += (json.dumps(metrics) + "\n").encode()
        before, self.trouble = self.trouble, self._flush()
        return self.trouble if not before else ""

    def amend(self, step: int, more: dict) -> None:
        """Add metrics to the line of a step that is written already; figures of several evaluations stand side by side."""
        self._flush()
        lines = read_metrics(self.path)
        for line in lines:
            if line["step"] == step:
                both = line.get("evaluation", {}) | more.get("evaluation", {})
                line |= more | ({"evaluation": both} if both else {})
        self._file.close()
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(self.path, "ab", buffering=0)

    def _flush(self) -> str:
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]  # a disk that fills up takes a part; the rest follows on
        except OSError as error:
            return f"{self.path}: cannot be written ({error.strerror})"
        return ""

    def close(self) -> None:
        self._flush()
        self._file.close()


def read_metrics(path: Path, told: bool = False) -> list[dict]:
    """The whole lines of a metrics file; lines torn by a kill or a crash are left out, and said if ``told``."""
    lines, damaged = [], 0
    for text in path.read_bytes().split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged += 1
    if damaged and told:
        print_line(f"{path}: {damaged} damaged line(s) are left out")
    return lines


def print_line(text: str) -> None:
    """A message of its own line on stderr."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # the log's disk is full; that must not end the run
        pass


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere (logs of batch jobs)."""

    def __init__(self, steps: int, done: int):
        self._steps, self._first, self._started, self._said = steps, done, time.monotonic(), 0.0
        self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        """A message of its own line."""
        tqdm.write(text, file=sys.stderr) if self._bar else print_line(text)

    def step(self, metrics: dict) -> None:
        step = metrics["step"]
        loss = "not finite" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        figures = f"loss {loss}, {metrics['raw_tokens_per_s']:,.0f} raw tokens/s"
        if "stage" in metrics:
            figures = f"stage {metrics.get('stage_name') or metrics['stage']}, {figures}"
        if self._bar:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._said = now
            left = (now - self._started) / (step - self._first) * (self._steps - step)
            self.say(f"step {step}/{self._steps}: {figures}, {_clock(left)} left")

    def close(self) -> None:
        if self._bar:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class WandbLog:
    """Weights & Biases: online with an API key, else offline into the run directory. A resumed run continues its W&B run.

    No trouble of W&B ends a run: out of reach it is said, and logged offline; what fails later is said once, and left.

    Curves are drawn over our own ``step``, not over W&B's counter of calls: that never goes back, so W&B would drop the
    steps that a resume or a rollback does again.
    """

    def __init__(self, config: MonitorConfig, run_config: dict, run_dir: Path):
        identity = _identity(run_dir / "wandb_id")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        given = dict(project=config.project, name=config.name or run_dir.name, config=run_config, dir=str(run_dir), id=identity)
        self._run = self._begin(given, mode, run_dir)

    @staticmethod
    def _begin(given: dict, mode: str, run_dir: Path):
        """The W&B run; None where there can be none."""
        how = {"mode": mode, "resume": "allow" if mode == "online" else None}
        try:
            import wandb  # takes a second; only the rank that logs needs it
        except Exception as error:
            print_line(f"error: the package wandb cannot be loaded ({error}); the run goes on without it")
            return None
        try:
            settings = wandb.Settings(silent=True, init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or WANDB_SECONDS))
            run = wandb.init(**given, **how, settings=settings)
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:  # its own classes, requests' and the operating system's
            reason = f"Weights & Biases ({mode}) cannot be used: {str(error).splitlines()[0] if str(error) else error!r}"
            if mode != "online":
                print_line(f"error: {reason}; the run goes on without it, its figures are in {run_dir / 'metrics.jsonl'}")
                return None
            print_line(
                f"error: {reason}; the run goes on, offline: send its figures later, `wandb sync {run_dir}/wandb/offline-run-*`"
            )
        with contextlib.suppress(Exception):
            wandb.teardown()  # its process still holds the run that could not begin
        return WandbLog._begin(given, "offline", run_dir)

    def write(self, metrics: dict) -> None:
        self._guarded(lambda run: run.log(flatten(metrics)))

    def close(self) -> None:
        self._guarded(lambda run: run.finish())

    def _guarded(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # its process has died, for instance
            print_line(f"error: Weights & Biases takes no more figures ({error}); the run goes on without it")
            self._run = None


def _identity(path: Path) -> str:
    """The run's id in W&B, made once; a file without one (torn by a crash) gets a new one."""
    found = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if re.fullmatch(r"[\w-]{1,64}", found, re.ASCII):
        return found
    if path.exists():
        print_line(f"{path}: holds no W&B id ({found[:20]!r}); the run gets a new one, and a new W&B run")
    found = secrets.token_hex(4)
    write_atomically(path, found)
    return found


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class TensorBoardLog:
    """TensorBoard event files in ``tensorboard/`` of the run directory; every number of the metrics is a scalar.

    A resumed run writes a new file whose first event makes TensorBoard forget what older files hold from there on.
    """

    def __init__(self, run_dir: Path, done: int):
        """done: steps before the first one that will be written."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second; only the rank that logs needs it

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)

    def write(self, metrics: dict) -> None:
        for key, value in flatten(metrics).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
                self._writer.add_scalar(key.replace(".", "/"), value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class Outputs:
    """Where the main rank writes."""

    def __init__(self, config: RunConfig, run_dir: Path, done: int):
        self._config, self._run_dir = config, run_dir
        self.metrics = MetricsFile(run_dir / "metrics.jsonl", done)
        self._wandb = WandbLog(config.monitor, config.to_dict(), run_dir) if config.monitor.wandb else None
        self._tensorboard = TensorBoardLog(run_dir, done) if config.monitor.tensorboard else None
        self.progress = Progress(config.train.steps, done)

    def reopen(self, done: int) -> None:
        """Go on after ``done`` steps, earlier than where the outputs are."""
        self.metrics.close()
        self.metrics = MetricsFile(self._run_dir / "metrics.jsonl", done)
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = TensorBoardLog(self._run_dir, done)
        self.progress.close()
        self.progress = Progress(self._config.train.steps, done)

    def write(self, metrics: dict) -> None:
        if trouble := self.metrics.write(metrics):
            self.progress.say(f"error: {trouble}; the lines are kept and written later")
        for log in (self._wandb, self._tensorboard):
            if log:
                log.write(metrics)
        self.progress.step(metrics)

    def write_beside(self, step: int, metrics: dict) -> None:
        """What was found after the last step's line was written: added to the line of the step that it is of, and sent on."""
        self.metrics.amend(step, metrics)
        for log in (self._wandb, self._tensorboard):
            if log:
                log.write(metrics | {"step": step})

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        for log in (self._wandb, self._tensorboard):
            if log:
                log.close()
