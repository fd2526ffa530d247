"""A run's checkpoints and metrics as they are written, and what is said where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch.distributed as dist

from unfold.pretrain.checkpoint.manifest import Manifest
from unfold.pretrain.checkpoint.save import Saver, SaveResult
from unfold.pretrain.checkpoint.state import RunningAverage
from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.monitor.metrics import Outputs
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.train.beside import Beside

POLL_S = 2.0  # how long all ranks wait for evaluations before they tell that they are alive


class Records:
    """What a run leaves on disk while it goes on.

    Attributes:
        say: tells people something; on the main rank beside its progress bar.
        beside: what evaluates and exports checkpoints beside the run; on the main rank only.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: deepspeed.DeepSpeedEngine,
        parallel: Parallel,
        say: Callable[[str], None],
        average: RunningAverage,
    ):
        self._config, self._run_dir, self._parallel, self.say = config, run_dir, parallel, say
        self._outputs: Outputs | None = None
        self.beside = Beside(config.evaluation, run_dir, lambda text: self.say(text)) if parallel.is_main else None
        in_use = lambda: self.beside.in_use if self.beside else set()
        self._saver = Saver(run_dir, engine, parallel, config.checkpoint, self._objection, average, in_use)
        self._failed = ""

    def open(self, done: int) -> None:
        """Go on after ``done`` steps: the main rank's metrics and progress."""
        if not self._parallel.is_main:
            return
        if self._outputs:
            self._outputs.reopen(done)
        else:
            self._outputs = Outputs(self._config, self._run_dir, done)
        self.say = self._outputs.progress.say

    def write(self, metrics: dict) -> None:
        """A step's line."""
        for result in self._tell():
            metrics["checkpoint_s"] = result.seconds
            if result.error:
                metrics["checkpoint_error"] = result.error
        if self.beside:
            metrics |= self.beside.poll()
        if self._outputs:
            self._outputs.write(metrics)

    def save(self, manifest: Manifest, metrics: dict) -> None:
        """A checkpoint, and the line of the step before it."""
        # The line is written before the checkpoint can be whole: a resume must find it.
        metrics["checkpoint_pause_s"] = self._saver.copy(manifest)
        if self.beside:
            self.beside.add(manifest.step)
        self.write(metrics)
        self._saver.start()

    def settle(self) -> None:
        """Wait for the save that is under way."""
        self._saver.wait()
        self._tell()

    def close(self, may_wait: Callable[[], bool]) -> None:
        """The end, on all ranks. Raises UserError where the last checkpoint is not written.

        may_wait: asked again and again, on all ranks, while evaluations and exports are awaited; the main rank's answer counts.
        """
        self.settle()
        failed = self._from_main(self._failed)  # also the barrier: no rank leaves while another still writes
        # The ranks wait together: a launcher ends those that are left soon after the first one has ended.
        while self._from_main(may_wait() and not failed and self._await(POLL_S)):
            pass
        if self.beside:
            self.beside.close()
        if self._outputs:
            self._outputs.close()
        if failed:
            raise UserError(f"the last checkpoint could not be written ({failed}); the older ones are untouched")

    def _await(self, seconds: float) -> bool:
        """Wait so long for what is evaluated and exported, and write what has ended; whether something is left."""
        if self.beside is None:
            return False  # the main rank's answer counts
        for step, found in self.beside.wait(seconds):
            if self._outputs:
                self._outputs.write_beside(step, found)
        return bool(self.beside.in_use)

    def _from_main(self, value):
        """The main rank's value, on all ranks."""
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def _tell(self) -> list[SaveResult]:
        results = self._saver.poll()
        for result in results:
            self._failed = result.error
            if result.error:
                if self.beside:
                    self.beside.drop(result.step)
                what = f"checkpoint of step {result.step} FAILED: {result.error}"
                self.say(f"error: {what}. Training goes on; older checkpoints are untouched")
        return results

    def _objection(self) -> str:
        """A checkpoint must not be newer than the metrics on disk: a resume would leave a gap in them."""
        return self._outputs.metrics.trouble if self._outputs else ""
