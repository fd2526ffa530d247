"""What a run has behind it: which samples it learned from, which steps went wrong. It is saved with every checkpoint."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import deepspeed

from unfold.pretrain.checkpoint.manifest import Manifest
from unfold.pretrain.checkpoint.resume import load_newest, merged_quarantine
from unfold.pretrain.checkpoint.state import RunningAverage
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.faults import FAULTS, FaultGuard, Rollback, read_quarantine, write_quarantine
from unfold.pretrain.train.inputs import Inputs


class FaultyStep(Exception):
    """A step after which the run goes back to the last good checkpoint."""

    def __init__(self, fault: int, step: int, loss: float):
        super().__init__(fault, step, loss)
        self.fault, self.step, self.loss = fault, step, loss

    def __str__(self) -> str:
        return f"step {self.step}: {FAULTS[self.fault]} (loss {self.loss:.4f})"


class History:
    """A run's past, and how it goes on from it.

    Attributes:
        quarantine: the samples that are left out.
        guard: judges every step by those before it.
        average: of the weights, which a resume fills too; None until there is one.
    """

    def __init__(self, inputs: Inputs, run_dir: Path, parallel: Parallel):
        self._inputs, self._run_dir, self._parallel = inputs, run_dir, parallel
        self.quarantine = read_quarantine(run_dir)
        self.guard = FaultGuard(inputs.config.faults)
        self.average: RunningAverage | None = None

    def samples_of(self, first_step: int, last_step: int) -> tuple[int, int]:
        """Global sample numbers from the first of one step to past the last of another (steps counted from 1)."""
        config = self._inputs.config
        first, stop = config.stage(first_step).samples_after(first_step - 1), config.stage(last_step).samples_after(last_step)
        return self.quarantine.number(first), self.quarantine.number(stop - 1) + 1

    def resume(self, engine: deepspeed.DeepSpeedEngine, say: Callable[[str], None]) -> int | None:
        """Load the newest checkpoint that fits; returns the steps done there, None where there is none. A collective."""

        def until(manifest: Manifest) -> dict:
            return self._inputs.until(manifest.next_sample, merged_quarantine(manifest, self.quarantine).number)

        manifest = load_newest(self._run_dir, until, self.quarantine, engine, self._parallel, say, self.average)
        if manifest is None:
            return None
        self.quarantine = merged_quarantine(manifest, self.quarantine)
        self.guard.restore(manifest.skipped, manifest.recent_losses)
        return manifest.step

    def condemn(self, fault: FaultyStep) -> None:
        """Take the guilty samples out. Raises UserError where that was done too often."""
        most = self._inputs.config.faults.max_rollbacks
        first_step, last_step = self.guard.guilty_steps(fault.fault, fault.step)
        first, stop = self.samples_of(first_step, last_step)
        if len(self.quarantine.rollbacks) >= most:
            raise UserError(
                f"{fault} after {most} rollbacks (faults.max_rollbacks); the newest checkpoints are untouched. Lower "
                f"optimizer.lr or look at samples {first}..{stop - 1}"
            )
        self.quarantine = self.quarantine.extended(Rollback(fault.step, FAULTS[fault.fault], first, stop))

    def go_back(self, fault: FaultyStep, engine: deepspeed.DeepSpeedEngine, say: Callable[[str], None]) -> int:
        """Load the last checkpoint before the samples that were condemned last; returns the steps done there."""
        guilty = self.quarantine.rollbacks[-1]
        first, stop = guilty.first, guilty.stop
        done = self.resume(engine, say)
        if done is None:
            first_step = self.guard.guilty_steps(fault.fault, fault.step)[0]
            raise UserError(
                f"{fault}, and there is no checkpoint before step {first_step} to roll back to. Lower optimizer.lr, save more "
                f"often (checkpoint.every) or look at samples {first}..{stop - 1}"
            )
        if self._parallel.is_main:
            write_quarantine(self._run_dir, self.quarantine)
        say(f"{fault}: rolled back to step {done}; samples {first}..{stop - 1} are left out from now on")
        return done

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint after ``step`` steps says of itself."""
        config = self._inputs.config
        stage = config.stage(step)
        samples = stage.samples_after(step)
        next_sample = self.quarantine.number(samples)
        names = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors")
        return Manifest(
            step=step,
            samples=samples,
            next_sample=next_sample,
            raw_tokens=stage.raw_tokens_after(step),
            config=config.to_dict(),
            **self._inputs.until(next_sample, self.quarantine.number),
            versions={name: importlib.metadata.version(name) for name in names},
            world=self._parallel.world,
            skipped=list(self.guard.skipped),
            recent_losses=list(self.guard.recent),
            quarantine=self.quarantine.to_list(),
            stage=stage.record() if config.train.stages else {},
        )
