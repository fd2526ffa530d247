"""Snapshots of CUDA memory: what lies where, and which line allocated it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unfold.pretrain.parallel import Parallel

MEMORY = "memory"  # directory of snapshots in the run directory
MOST_EVENTS = 100_000  # allocations that a snapshot tells of


class MemorySnapshots:
    """Snapshots of CUDA memory, for https://pytorch.org/memory_viz: after chosen steps, and when an allocation fails."""

    def __init__(self, steps: Sequence[int], when_out: bool, run_dir: Path, parallel: Parallel, say: Callable[[str], None]):
        """steps: counted from 1. when_out: write one before "out of memory" is raised."""
        self._steps, self._run_dir, self._parallel, self._say = frozenset(steps), run_dir, parallel, say
        if not steps and not when_out:
            return
        if parallel.device.type != "cuda":
            say("monitor.memory_snapshot: there is no GPU whose memory could be looked at; no snapshot is written")
            self._steps = frozenset()
            return
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        if when_out:
            torch._C._cuda_attach_out_of_memory_observer(lambda *_: self._write("out-of-memory"))

    def end(self, step: int) -> None:
        """A step is over."""
        if step in self._steps and (path := self._write(f"step-{step}")):
            self._say(f"snapshot of memory after step {step}: {path.parent}, a file per rank")

    def _write(self, what: str) -> Path | None:
        path = self._run_dir / MEMORY / f"{what}-rank-{self._parallel.rank:05d}.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:  # a snapshot is not worth a run
            self._say(f"error: {path}: cannot be written ({error.strerror})")
            return None
        return path
