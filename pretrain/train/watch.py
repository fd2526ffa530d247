"""What looks on while a run trains: stopwatch, heartbeat, profiler, use of the devices, stragglers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from unfold.model.visibility import MicroBatch
from unfold.pretrain.config import RunConfig
from unfold.pretrain.monitor.goodput import Goodput
from unfold.pretrain.monitor.memory import MemorySnapshots
from unfold.pretrain.monitor.profiler import StepProfiler
from unfold.pretrain.monitor.throughput import RankUsage, Usage
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.signals import Boundary, process_seconds
from unfold.pretrain.safety.watchdog import Stragglers, Watchdog
from unfold.pretrain.train.step import StepResult


class StepWatch:
    """Attached to the steps of one rank: what it learns goes into their metrics, and nothing of it into training."""

    def __init__(self, config: RunConfig, run_dir: Path, parallel: Parallel, watchdog: Watchdog, say: Callable[[str], None]):
        self._config, self._run_dir, self._parallel, self._watchdog = config, run_dir, parallel, watchdog
        self._usage = Usage(config, parallel, say)
        self._stragglers = Stragglers(config.faults.straggler_factor)
        monitor = config.monitor
        self._memory = MemorySnapshots(monitor.memory_snapshot, monitor.memory_when_out, run_dir, parallel, say)
        self._goodput = Goodput(run_dir, time.time() - process_seconds()) if parallel.is_main else None
        self._phase = "startup"

    @contextlib.contextmanager
    def over(self, done: int, say: Callable[[str], None]) -> Iterator[None]:
        """The steps after ``done`` steps."""
        self._first = done + 1
        if self._goodput:
            self._goodput.begin(done)
            self._goodput.aside(self._phase)
        self._phase = "rollback"  # what leads to the next steps, if there are some
        self._restart()
        self._profiler = StepProfiler(self._config.monitor.profile_steps, done, self._run_dir, self._parallel, say)
        try:
            yield
        finally:
            self._profiler.close()
            if self._goodput:
                self._goodput.write()

    def begin(self, step: int) -> None:
        """A step begins (counted from 1): the rank waits for its batches."""
        self._watchdog.beat(step, "training")
        self._profiler.begin(step)

    def have_data(self) -> None:
        """The batches are there."""
        self._data_wait = time.monotonic() - self._since

    def report(self, batches: Sequence[MicroBatch], result: StepResult) -> tuple[float, RankUsage]:
        """What this rank tells the others of its step: seconds that it was busy, and what it used."""
        return self._data_wait + result.busy_s, self._usage.of_step(batches, result)

    def end(self, step: int, agreed: Boundary) -> tuple[dict, dict]:
        """A step is over on all ranks: figures of time, and figures of what looks on."""
        seconds = time.monotonic() - self._since
        config = self._config.at(step)
        raw = config.train.global_batch * config.data.raw_tokens
        times = {"raw_tokens_per_s": raw / seconds, "seconds": seconds, "data_wait_s": self._data_wait}
        found = self._usage.metrics([RankUsage(*u) for u in agreed.usage], seconds)
        self._profiler.end(step)
        self._memory.end(step)
        if self._goodput:
            self._goodput.step(step, seconds, self._data_wait)
        if stragglers := self._stragglers.add(agreed.busy):
            found["stragglers"] = stragglers
        if step == self._first:
            found["startup_s"] = process_seconds()
        self._restart()
        return times, found

    @contextlib.contextmanager
    def aside(self, step: int, phase: str) -> Iterator[None]:
        """Something else than training, whose time does not count as a step's."""
        self._watchdog.beat(step, phase)
        yield
        if self._goodput:
            self._goodput.aside(phase)
        self._restart()

    def close(self) -> None:
        """The run ends: its last checkpoint has been waited for."""
        if self._goodput:
            self._goodput.aside("saving")
            self._goodput.write()

    def _restart(self) -> None:
        self._since = time.monotonic()
