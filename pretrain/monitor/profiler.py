"""A PyTorch profiler trace of chosen steps, one file per rank, for Perfetto or chrome://tracing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from unfold.pretrain.parallel import Parallel

DIRECTORY = "profile"


class StepProfiler:
    """Traces the steps ``[first, last]`` (counted from 1) of one rank; costs a comparison per step elsewhere."""

    def __init__(self, steps: tuple[int, ...], done: int, run_dir: Path, parallel: Parallel, say: Callable[[str], None]):
        """steps: (first, last) or empty for none; done: steps done before, whose traces are not made again."""
        self._first, self._last = steps or (0, 0)
        self._run_dir, self._parallel, self._say = run_dir, parallel, say
        self._profile: profile | None = None
        if steps and done >= self._last:
            say(f"monitor.profile_steps: {list(steps)} lies before step {done}, where the run goes on; no trace is written")
        elif steps and done >= self._first:
            self._first = done + 1

    def begin(self, step: int) -> None:
        """A step begins."""
        if step == self._first and self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """A step has ended; after the last one the trace is written."""
        if self._profile is None or step != self._last:
            return
        if self._parallel.device.type == "cuda":
            torch.cuda.synchronize(self._parallel.device)  # what the last step started belongs to it
        self._profile.stop()
        path = self._run_dir / DIRECTORY / f"steps-{self._first}-{self._last}-rank-{self._parallel.rank:05d}.json.gz"
        temporary = path.with_name(f".{path.name}")  # its ending tells the profiler to compress
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
            self._say(f"profiler trace of steps {self._first} to {self._last}: {path.parent}, a file per rank")
        except OSError as error:  # a trace is not worth a run
            self._say(f"error: {path}: the profiler trace cannot be written ({error.strerror})")
        self._profile = None

    def close(self) -> None:
        """Leave the steps, also in the middle of a trace, which is then lost."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
