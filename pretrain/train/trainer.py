"""``python -m pretrain train``: reads from top to bottom."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch.distributed as dist

from unfold.model.visibility import MicroBatch
from unfold.pretrain import parallel as parallel_groups
from unfold.pretrain.checkpoint.manifest import Manifest
from unfold.pretrain.checkpoint.resume import (
    check_run_dir,
    load_newest,
    merged_quarantine,
    only_writer,
    prepare_run_dir,
    warm_start,
)
from unfold.pretrain.checkpoint.save import Saver, SaveResult
from unfold.pretrain.config import RunConfig, accumulation_steps, with_vocab_size
from unfold.pretrain.data.samples import BatchBuilder, TokenSource, step_samples
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.monitor.attention_mass import AttentionMass
from unfold.pretrain.monitor.metrics import Outputs, print_line
from unfold.pretrain.monitor.profiler import StepProfiler
from unfold.pretrain.monitor.throughput import RankUsage, Usage
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.faults import FAULTS, FaultGuard, Rollback, finite_or_none, read_quarantine, write_quarantine
from unfold.pretrain.safety.signals import Boundary, Signals, agree, process_seconds, take_request, time_is_up
from unfold.pretrain.safety.watchdog import Stragglers, Watchdog, limit_groups
from unfold.pretrain.train.engine import build_engine, learning_rate, set_learning_rate
from unfold.pretrain.train.prefetch import prefetch
from unfold.pretrain.train.step import StepResult, train_step, validation_loss

TIME_LIMIT = 3  # index into signals.STOPS


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked before anything heavy starts."""

    config: RunConfig
    tokenizer: RunTokenizer
    train: BatchBuilder
    valid: BatchBuilder | None


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and shards. Raises UserError for what is missing, damaged or does not belong together."""
    gist = config.folding
    tokenizer = load_tokenizer(config.data.tokenizer, gist.levels if gist else 0)
    config = with_vocab_size(config, tokenizer.vocab_size)

    # Every rank that shares a sequence holds an equal part of it.
    length_multiple = config.parallel.context * (config.parallel.tensor if config.parallel.sequence else 1)

    def builder(prefixes: tuple[str, ...], setting: str) -> BatchBuilder:
        source = TokenSource(prefixes, config.data.raw_tokens, config.train.seed, tokenizer, setting, config.data.cache)
        return BatchBuilder(source, gist, tokenizer, length_multiple)

    train = builder(config.data.train, "data.train")
    if gist and gist.recall == "suffix" and not train.source.supervised:
        raise UserError(
            "gist.recall: suffix, but no shard of data.train says where a suffix begins; make shards with "
            "`python -m data_prep tokenize-supervised`, or set recall to all or none"
        )
    valid = builder(config.data.valid, "data.valid") if config.data.valid else None
    return Inputs(config, tokenizer, train, valid)


def train(config: RunConfig, run_dir: Path) -> None:
    """Train, or go on training, in ``run_dir``. Every rank calls it."""
    inputs = open_inputs(config)
    config = inputs.config
    allowed = check_run_dir(run_dir, config)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    with Signals() as signals:
        parallel = parallel_groups.initialize(config.parallel)
        try:
            accumulation_steps(config, parallel.data_size)  # refuses before the model is built
            say = print_line if parallel.is_main else _silent
            for line in allowed:
                say(f"changed by train.allow_changes: {line}")
            with _locked(run_dir, parallel), Watchdog(run_dir, parallel, 60 * config.faults.hang_minutes) as watchdog:
                _Run(inputs, run_dir, parallel, signals, watchdog, say).to_the_end()
        finally:
            parallel_groups.shutdown()


@contextlib.contextmanager
def _locked(run_dir: Path, parallel: Parallel) -> Iterator[None]:
    """The main rank holds the run directory's lock; all ranks hear when it cannot."""
    with contextlib.ExitStack() as held:
        refusal = [""]
        if parallel.is_main:
            try:
                held.enter_context(only_writer(run_dir))
            except UserError as error:
                refusal = [str(error)]
            except OSError as error:
                refusal = [f"--run-dir {run_dir}: cannot be written ({error.strerror})"]
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0]:
            raise UserError(refusal[0])
        yield


class _RollBack(Exception):
    """Leave the steps, go back to the last good checkpoint."""

    def __init__(self, fault: int, step: int, loss: float):
        super().__init__(fault, step, loss)
        self.fault, self.step, self.loss = fault, step, loss


class _Run:
    """One rank's part of a run, from start to end or to a stop."""

    def __init__(
        self,
        inputs: Inputs,
        run_dir: Path,
        parallel: Parallel,
        signals: Signals,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ):
        self.inputs, self.config, self.run_dir, self.parallel = inputs, inputs.config, run_dir, parallel
        self.signals, self.watchdog, self.say = signals, watchdog, say
        self.quarantine = read_quarantine(run_dir)
        self.guard = FaultGuard(self.config.faults)
        self.stragglers = Stragglers(self.config.faults.straggler_factor)
        if parallel.is_main:
            prepare_run_dir(run_dir, self.config, inputs.tokenizer)
        self.engine = build_engine(self.config, parallel)
        limit_groups(60 * self.config.parallel.timeout_minutes)
        self.outputs: Outputs | None = None
        self.saver = Saver(run_dir, self.engine, parallel, self.config.checkpoint, self._objection)
        self.failed_save = ""
        self.usage = Usage(self.config, parallel, say)

    def to_the_end(self) -> None:
        """Train until the last step or until something stops the run; the state is then saved."""
        done = self._begin()
        while True:
            self._open_outputs(done)
            try:
                stop = self._steps(done)
                break
            except _RollBack as fault:
                done = self._roll_back(fault)
        self._finish(stop)

    def _begin(self) -> int:
        """Bring the engine to where the run is; returns the steps done."""
        done = self._resume()
        if done is not None:
            self.say(f"resumed at step {done}")
            return done
        if self.config.train.init_from:
            path, model = Path(self.config.train.init_from), self.config.model
            source, note = warm_start(path, self.inputs.tokenizer, model, self.engine, self.parallel)
            self.say(f"weights from {source}{f', with other rotary positions: {note}' if note else ''}")
        return 0

    def _resume(self) -> int | None:
        manifest = load_newest(self.run_dir, self._inputs_until, self.quarantine, self.engine, self.parallel, self.say)
        if manifest is None:
            return None
        self.quarantine = merged_quarantine(manifest, self.quarantine)
        self.guard.restore(manifest.skipped, manifest.recent_losses)
        return manifest.step

    def _steps(self, done: int) -> str:
        """Train from step ``done`` on; returns why the run is to stop, '' at its end."""
        config, waited = self.config, time.monotonic()
        batches = prefetch(self._batches(done))
        profiler = StepProfiler(config.monitor.profile_steps, done, self.run_dir, self.parallel, self.say)
        try:
            for step in range(done, config.train.steps):
                self.watchdog.beat(step + 1, "training")
                profiler.begin(step + 1)
                micro_batches = next(batches)
                data_wait = time.monotonic() - waited
                rate = learning_rate(step, config.train.steps, config.optimizer.lr, config.schedule)
                set_learning_rate(self.engine, rate)
                result = train_step(self.engine, micro_batches, self.parallel)
                agreed = self._agree(step + 1, result, data_wait, self.usage.of_step(micro_batches, result))
                seconds = time.monotonic() - waited
                metrics = self._metrics(step, result, rate, data_wait, seconds)
                metrics |= self.usage.metrics([RankUsage(*u) for u in agreed.usage], seconds)
                profiler.end(step + 1)
                if stragglers := self.stragglers.add(agreed.busy):
                    metrics["stragglers"] = stragglers
                if step == done:
                    metrics["startup_s"] = process_seconds()
                waited = time.monotonic()
                last = step + 1 == config.train.steps
                if self._validation_due(step + 1, last):
                    metrics |= self._validate(step + 1)
                    waited = time.monotonic()
                if last or agreed.stop or agreed.save or (step + 1) % config.checkpoint.every == 0:
                    self._save(step + 1, metrics)
                    waited = time.monotonic()
                else:
                    self._write(metrics)
                if agreed.stop and not last:
                    return agreed.stop
            return ""
        finally:
            profiler.close()
            batches.close()

    def _agree(self, step: int, result: StepResult, data_wait: float, usage: RankUsage) -> Boundary:
        """Exchange wishes and faults with the other ranks; raises _RollBack when a fault calls for it."""
        if result.skipped:
            first, stop = self._sample_range(step, step)
            self.say(f"step {step}: loss {result.loss} or its gradient is not finite; skipped samples {first}..{stop - 1}")
        fault = self.guard.judge(step, result.loss, result.skipped)
        stop = self.signals.received
        main = self.parallel.is_main
        if main and time_is_up(self.config.checkpoint.stop_after_minutes):
            stop = max(stop, TIME_LIMIT)
        request = main and take_request(self.run_dir)
        agreed = agree(self.parallel, stop, request, fault, data_wait + result.busy_s, usage)
        if agreed.fault:
            raise _RollBack(agreed.fault, step, result.loss)
        return agreed

    def _roll_back(self, fault: _RollBack) -> int:
        """Take the guilty samples out and load the last checkpoint before them; returns the steps done there."""
        first_step, last_step = self.guard.guilty_steps(fault.fault, fault.step)
        first, stop = self._sample_range(first_step, last_step)
        what = f"step {fault.step}: {FAULTS[fault.fault]} (loss {fault.loss:.4f})"
        limit = self.config.faults.max_rollbacks
        if len(self.quarantine.rollbacks) >= limit:
            raise UserError(
                f"{what} after {limit} rollbacks (faults.max_rollbacks); the newest checkpoints are untouched. Lower "
                f"optimizer.lr or look at samples {first}..{stop - 1}"
            )
        self.saver.wait()
        self._tell_saves()
        self.watchdog.beat(fault.step, "rollback")
        self.quarantine = self.quarantine.extended(Rollback(fault.step, FAULTS[fault.fault], first, stop))
        done = self._resume()
        if done is None:
            raise UserError(
                f"{what}, and there is no checkpoint before step {first_step} to roll back to. Lower optimizer.lr, save more "
                f"often (checkpoint.every) or look at samples {first}..{stop - 1}"
            )
        if self.parallel.is_main:
            write_quarantine(self.run_dir, self.quarantine)
        self.say(f"{what}: rolled back to step {done}; samples {first}..{stop - 1} are left out from now on")
        return done

    def _finish(self, stop: str) -> None:
        """Wait for the last save on all ranks; say how the run ended."""
        self.saver.wait()
        self._tell_saves()
        failed = [self.failed_save]
        dist.broadcast_object_list(failed, src=0)  # also the barrier: no rank leaves while another still writes
        if self.outputs:
            self.outputs.close()
        if failed[0]:
            raise UserError(f"the last checkpoint could not be written ({failed[0]}); the older ones are untouched")
        if stop:
            self.say(f"stopped by {stop}; the state is saved, the same command goes on from there")

    def _save(self, step: int, metrics: dict) -> None:
        self.watchdog.beat(step, "saving")
        # The line is written before the checkpoint can be whole: a resume must find it.
        metrics["checkpoint_pause_s"] = self.saver.copy(self._manifest(step))
        self._write(metrics)
        self.saver.start()

    def _write(self, metrics: dict) -> None:
        for result in self._tell_saves():
            metrics["checkpoint_s"] = result.seconds
            if result.error:
                metrics["checkpoint_error"] = result.error
        if self.outputs:
            self.outputs.write(metrics)

    def _tell_saves(self) -> list[SaveResult]:
        results = self.saver.poll()
        for result in results:
            self.failed_save = result.error
            if result.error:
                what = f"checkpoint of step {result.step} FAILED: {result.error}"
                self.say(f"error: {what}. Training goes on; older checkpoints are untouched")
        return results

    def _objection(self) -> str:
        """A checkpoint must not be newer than the metrics on disk: a resume would leave a gap in them."""
        return self.outputs.metrics.trouble if self.outputs else ""

    def _open_outputs(self, done: int) -> None:
        if not self.parallel.is_main:
            return
        if self.outputs:
            self.outputs.reopen(done)
        else:
            self.outputs = Outputs(self.config, self.run_dir, done)
        self.say = self.outputs.progress.say

    def _validation_due(self, step: int, last: bool) -> bool:
        every = self.config.train.valid_every
        return bool(self.inputs.valid) and (last or bool(every) and step % every == 0)

    def _validate(self, step: int) -> dict:
        self.watchdog.beat(step, "validation")
        mass = AttentionMass(self.config.gist.levels)
        measures = self.config.monitor.attention_mass and self.config.model.attention == "gist"
        with mass.hooked(self.engine.module) if measures else contextlib.nullcontext():
            loss = validation_loss(self.engine, self._valid_batches(), self.parallel)
        self.say(f"step {step}: validation loss {loss:.4f}")
        shares = mass.shares(self.parallel) if measures else None
        return {"valid_loss": loss} | ({"attention_mass": shares} if shares else {})

    def _batches(self, done: int) -> Iterator[list[MicroBatch]]:
        train, parallel = self.config.train, self.parallel
        for step in range(done, train.steps):
            indices = step_samples(step, train.global_batch, train.micro_batch, parallel.data_rank, parallel.data_size)
            numbers = [[self.quarantine.number(i) for i in micro_batch] for micro_batch in indices]
            yield [self.inputs.train.build(n, recall=step >= train.recall_after) for n in numbers]

    def _valid_batches(self) -> list[MicroBatch]:
        """The same samples at every validation; ranks take turns, and a rank without one repeats none."""
        valid, parallel = self.inputs.valid, self.parallel
        numbers = range(min(self.config.train.valid_samples, valid.source.samples_per_epoch))
        rounds = -(-len(numbers) // parallel.data_size)
        mine = [i * parallel.data_size + parallel.data_rank for i in range(rounds)]
        return [valid.build([n]) if n in numbers else valid.empty() for n in mine]

    def _sample_range(self, first_step: int, last_step: int) -> tuple[int, int]:
        """Global sample numbers from the first of one step to past the last of another (steps counted from 1)."""
        batch = self.config.train.global_batch
        return self.quarantine.number((first_step - 1) * batch), self.quarantine.number(last_step * batch - 1) + 1

    def _metrics(self, step: int, result: StepResult, rate: float, data_wait: float, seconds: float) -> dict:
        config = self.config
        samples, raw = (step + 1) * config.train.global_batch, config.train.global_batch * config.data.raw_tokens
        metrics = {
            "step": step + 1,
            "loss": finite_or_none(result.loss),
            "grad_norm": finite_or_none(result.grad_norm),
            "lr": rate,
            "raw_tokens": samples * config.data.raw_tokens,
            "samples": samples,
            "sample_range": "{}-{}".format(*self._sample_range(step + 1, step + 1)),
            "loss_tokens": result.loss_tokens,
            "raw_tokens_per_s": raw / seconds,
            "seconds": seconds,
            "data_wait_s": data_wait,
        }
        by_source = self.inputs.train.source.counters(self._sample_range(step + 1, step + 1)[1])
        if len(by_source) > 1:
            metrics["source_samples"] = by_source
        if result.unfolded is not None:
            metrics |= {"unfolded_tokens": result.unfolded, "selected_gists": result.selected}
        if result.context is not None:
            sent, whole = result.context
            metrics |= {"context_bytes": sent, "context_bytes_dense": whole, "context_ratio": whole / sent}
        if result.skipped:
            metrics["skipped"] = True
        return metrics

    def _inputs_until(self, sample: int) -> dict:
        """What decided the samples before a global number: a source that joins the blend later changes nothing of it."""
        source = self.inputs.train.source
        return {"tokenizer_hash": self.inputs.tokenizer.hash, "data": source.fingerprint_until(sample)}

    def _manifest(self, step: int) -> Manifest:
        config, samples = self.config, step * self.config.train.global_batch
        names = ("torch", "deepspeed", "megatron-core", "numpy", "safetensors")
        return Manifest(
            step=step,
            samples=samples,
            next_sample=self.quarantine.number(samples),
            raw_tokens=samples * config.data.raw_tokens,
            config=config.to_dict(),
            **self._inputs_until(self.quarantine.number(samples)),
            versions={name: importlib.metadata.version(name) for name in names},
            world=self.parallel.world,
            skipped=list(self.guard.skipped),
            recent_losses=list(self.guard.recent),
            quarantine=self.quarantine.to_list(),
        )


def _silent(text: str) -> None:
    pass
