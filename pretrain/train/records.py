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

    def close(self, stopped: bool) -> None:
        """The end, on all ranks; stopped: before the last step. Raises UserError where the last checkpoint is not written."""
        self.settle()
        if self.beside:
            for step, found in self.beside.close(wait=not stopped and not self._failed):
                if self._outputs:
                    self._outputs.write_beside(step, found)
        failed = [self._failed]
        dist.broadcast_object_list(failed, src=0)  # also the barrier: no rank leaves while another still writes
        if self._outputs:
            self._outputs.close()
        if failed[0]:
            raise UserError(f"the last checkpoint could not be written ({failed[0]}); the older ones are untouched")

    def _tell(self) -> list[SaveResult]:
        results = self._saver.poll()
        for result in results:
            self._failed = result.error
            if result.error:
                what = f"checkpoint of step {result.step} FAILED: {result.error}"
                self.say(f"error: {what}. Training goes on; older checkpoints are untouched")
        return results

    def _objection(self) -> str:
        """A checkpoint must not be newer than the metrics on disk: a resume would leave a gap in them."""
        return self._outputs.metrics.trouble if self._outputs else ""
