"""``python -m pretrain train``: reads from top to bottom."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import deepspeed

from unfold.model.config import sizes_name
from unfold.model.visibility import MicroBatch
from unfold.pretrain import parallel as parallel_groups
from unfold.pretrain.checkpoint.resume import check_run_dir, locked_on_all, prepare_run_dir, warm_start
from unfold.pretrain.checkpoint.state import RunningAverage, load_adapter
from unfold.pretrain.config import RunConfig, accumulation_steps
from unfold.pretrain.hf.adapter import read_adapter
from unfold.pretrain.monitor.attention_mass import AttentionMass
from unfold.pretrain.monitor.metrics import print_line
from unfold.pretrain.monitor.norms import NormWatch
from unfold.pretrain.monitor.probe import looking
from unfold.pretrain.monitor.routing import RoutingMeasure
from unfold.pretrain.monitor.throughput import RankUsage
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.safety.faults import finite_or_none
from unfold.pretrain.safety.flight import record_collectives
from unfold.pretrain.safety.signals import TIME_LIMIT, Boundary, Signals, agree, take_request, time_is_up
from unfold.pretrain.safety.watchdog import Watchdog, limit_groups
from unfold.pretrain.train.added import Added
from unfold.pretrain.train.engine import ahead_of, build_engine, rate_at, set_learning_rate, set_stage
from unfold.pretrain.train.history import FaultyStep, History
from unfold.pretrain.train.inputs import Inputs, open_inputs
from unfold.pretrain.train.prefetch import prefetch
from unfold.pretrain.train.records import Records
from unfold.pretrain.train.served import refuse_uncompiled, refuse_unserved
from unfold.pretrain.train.step import StepResult, train_step, validation_loss
from unfold.pretrain.train.trainable import check_trainable
from unfold.pretrain.train.watch import StepWatch


def train(config: RunConfig, run_dir: Path) -> None:
    """Train, or go on training, in ``run_dir``. Every rank calls it."""
    inputs = open_inputs(config)
    config = inputs.config
    check_trainable(config, inputs.tokenizer.reserved_ids)
    allowed = check_run_dir(run_dir, config)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    record_collectives(config.monitor.flight_recorder, run_dir)
    with Signals() as signals:
        parallel = parallel_groups.initialize(config.parallel)
        try:
            accumulation_steps(config, parallel.data_size)  # this and the next refuse before the model is built
            refuse_unserved(config, parallel.device)
            refuse_uncompiled(config, parallel.device)
            say = print_line if parallel.is_main else _silent
            for line in allowed:
                say(f"changed by train.allow_changes: {line}")
            with locked_on_all(run_dir, parallel), Watchdog(run_dir, parallel, 60 * config.faults.hang_minutes) as watchdog:
                Trainer(inputs, run_dir, parallel, signals, watchdog, say).to_the_end()
        finally:
            parallel_groups.shutdown()


class Trainer:
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
        self.signals, self.watchdog = signals, watchdog
        self.history = History(inputs, run_dir, parallel)
        if parallel.is_main:
            prepare_run_dir(run_dir, self.config, inputs.tokenizer)
        self.engine = build_engine(self.config, parallel, inputs.tokenizer.reserved_ids)
        limit_groups(60 * self.config.parallel.timeout_minutes)
        self.average = RunningAverage(self.config.checkpoint.average_decay)
        self.history.average = self.average
        self.records = Records(self.config, run_dir, self.engine, parallel, say, self.average)
        monitor = self.config.monitor
        self.norms = NormWatch(self.engine, parallel, self.config.model.layers, monitor.norms_every, self.config.train.clip)
        self.watch = StepWatch(self.config, run_dir, parallel, watchdog, say)

    def to_the_end(self) -> None:
        """Train until the last step or until something stops the run; the state is then saved."""
        done = self._begin()
        while True:
            self.records.open(done)
            try:
                stop = self._steps(done)
                break
            except FaultyStep as fault:
                self.history.condemn(fault)
                self.records.settle()
                self.watchdog.beat(fault.step, "rollback")
                done = self.history.go_back(fault, self.engine, self.records.say)
        self.records.close(lambda: not stop and self._may_wait())
        self.watch.close()
        if stop:
            self.records.say(f"stopped by {stop}; the state is saved, the same command goes on from there")

    def _may_wait(self) -> bool:
        """Whether to go on waiting for evaluations after the last step: until a signal asks to stop. The rank lives on."""
        self.watchdog.beat(self.config.train.steps, "evaluation")
        return not self.signals.received

    def _begin(self) -> int:
        """Bring the engine to where the run is; returns the steps done."""
        say = self.records.say
        done = self.history.resume(self.engine, say)
        if done is not None:
            say(f"resumed at step {done}")
            if done >= self.config.train.steps:
                say(f"train.steps: all {self.config.train.steps} are done; to go on, raise it and name it in train.allow_changes")
            return done
        if self.config.train.init_from:
            path, model = Path(self.config.train.init_from), self.config.at(1).model
            source, note = warm_start(path, self.inputs.tokenizer, model, self.engine, self.parallel)
            self.average.begin()
            say(f"weights from {source}{f', with other rotary positions: {note}' if note else ''}")
        if self.config.lora.init_from:
            adapter = Path(self.config.lora.init_from)
            load_adapter(self.engine, self.parallel, read_adapter(adapter, self.config))
            self.average.begin()
            say(f"adapters from {adapter}")
        return 0

    def _steps(self, done: int) -> str:
        """Train from step ``done`` on; returns why the run is to stop, '' at its end."""
        config, watch = self.config, self.watch
        ahead = ahead_of(self.engine, config, self.parallel)
        made = self.inputs.batches(done, self.history.quarantine.number, self.parallel, ahead)
        with (
            watch.over(done, self.records.say),
            contextlib.closing(prefetch(made)) as batches,
        ):
            for step in range(done + 1, config.train.steps + 1):  # counted from 1
                if step in (done + 1, config.stage(step).first):
                    self._enter_stage(step)
                watch.begin(step)
                micro_batches = next(batches)
                watch.have_data()
                result, rate = self._update(step, micro_batches)
                agreed = self._agree(step, result, *watch.report(micro_batches, result))
                times, found = watch.end(step, agreed)
                metrics = self._metrics(step, result, rate, times) | found
                metrics |= self.norms.metrics(result.grad_norm, result.skipped)
                last = step == config.train.steps
                if self._validation_due(step, last):
                    with watch.aside(step, "validation"):
                        metrics |= self._validate(step)
                if config.evaluation.every and step % config.evaluation.every == 0 and self.inputs.sources:
                    with watch.aside(step, "evaluation"):
                        metrics["source_loss"] = self._source_losses(step)
                if last or agreed.stop or agreed.save or saves_at(config, step):
                    with watch.aside(step, "saving"):
                        self.records.save(self.history.manifest(step), metrics)
                else:
                    self.records.write(metrics)
                if agreed.stop and not last:
                    return agreed.stop
        return ""

    def _enter_stage(self, step: int) -> None:
        """The step (counted from 1) begins a stage, or goes on in one that was left."""
        stage = self.config.stage(step)
        if self.config.train.stages:
            set_stage(self.engine, stage.config, self.parallel)
            train, raw = stage.config.train, stage.config.data.raw_tokens
            what = f"steps {stage.first} to {stage.last}, {train.global_batch} samples of {raw:,} raw tokens"
            self.records.say(f"stage {stage.title}: {what}")
        if self.parallel.is_main:
            self.records.say(self.inputs.packing_of(stage))

    def _update(self, step: int, micro_batches: list[MicroBatch]) -> tuple[StepResult, float]:
        """One step of the optimizer; and the learning rate that it took."""
        rate, config = rate_at(self.config, step), self.config.at(step)
        set_learning_rate(self.engine, rate)
        with self.norms.over(step):
            result = train_step(self.engine, micro_batches, self.parallel, config.model, config.folding, Added.of(config))
        if not result.skipped:
            self.average.update()
        return result, rate

    def _agree(self, step: int, result: StepResult, busy: float, usage: RankUsage) -> Boundary:
        """Exchange wishes and faults with the other ranks; raises FaultyStep when a fault calls for it."""
        if result.skipped:
            first, stop = self.history.samples_of(step, step)
            what = f"loss {result.loss} or its gradient is not finite; skipped samples {first}..{stop - 1}"
            self.records.say(f"step {step}: {what}")
        begins_stage = step == self.config.stage(step).first
        fault = self.history.guard.judge(step, result.loss, result.skipped, begins_stage)
        stop, main = self.signals.received, self.parallel.is_main
        if main and time_is_up(self.config.checkpoint.stop_after_minutes):
            stop = max(stop, TIME_LIMIT)
        request = main and take_request(self.run_dir)
        agreed = agree(self.parallel, stop, request, fault, busy, usage)
        if agreed.fault:
            raise FaultyStep(agreed.fault, step, result.loss)
        return agreed

    def _metrics(self, step: int, result: StepResult, rate: float, times: dict) -> dict:
        """A step's line. times: how long it took."""
        stage = self.config.stage(step)
        first, stop = self.history.samples_of(step, step)
        metrics = {
            "step": step,
            "loss": finite_or_none(result.loss),
            "grad_norm": finite_or_none(result.grad_norm),
            "lr": rate,
            "raw_tokens": stage.raw_tokens_after(step),
            "samples": stage.samples_after(step),
            "sample_range": f"{first}-{stop}",
            "loss_tokens": result.loss_tokens,
            **times,
        }
        if self.config.train.stages:
            metrics |= stage.labels()
        by_source = self.inputs.source_samples(stop, self.history.quarantine.number)
        if len(by_source) > 1:
            metrics["source_samples"] = by_source
        if result.unfolded is not None:
            metrics |= {"unfolded_tokens": result.unfolded, "selected_gists": result.selected}
        if result.route_loss is not None:
            metrics["route_loss"] = result.route_loss
        metrics |= result.added
        if result.context is not None:
            sent, whole = result.context
            metrics |= {"context_bytes": sent, "context_bytes_dense": whole, "context_ratio": whole / sent}
        if result.heads is not None:
            metrics["context_heads_bytes"] = result.heads
        if result.skipped:
            metrics["skipped"] = True
        return metrics

    def _validation_due(self, step: int, last: bool) -> bool:
        every = self.config.train.valid_every
        return bool(self.inputs.valid) and (last or bool(every) and step % every == 0)

    def _source_losses(self, step: int) -> dict[str, float]:
        """Validation losses of the held-out sources."""
        batches = self.inputs.source_batches(self.parallel, step)
        return {name: validation_loss(self.engine, those, self.parallel) for name, those in batches}

    def _validate(self, step: int) -> dict:
        gist, monitor = self.config.folding, self.config.monitor
        logits = self.config.model.layers if monitor.attention_logits else 0
        mass = AttentionMass(gist.levels, logits) if gist and (monitor.attention_mass or logits) else None
        routing = RoutingMeasure(gist, self.config.model.layers) if gist and gist.recall != "none" and monitor.routing else None
        with looking(self.engine.module, *(measure.look for measure in (mass, routing) if measure)):
            loss = validation_loss(self.engine, self.inputs.valid_batches(self.parallel, step), self.parallel)
        self.records.say(f"step {step}: validation loss {loss:.4f}")
        found = {"valid_loss": loss}
        for name, batches in self.inputs.choice_batches(self.parallel, step):
            found[f"valid_loss.{name}"] = validation_loss(self.engine, batches, self.parallel)
        if self.inputs.choices:
            found[f"valid_loss.{sizes_name(gist.chunk_sizes)}"] = loss
        if mass and (shares := mass.shares(self.parallel)) and monitor.attention_mass:
            found["attention_mass"] = shares
        if logits and mass and (figures := mass.logits(self.parallel)):
            found["attention_logits"] = figures
        if routing:
            routing.reduce(self.parallel)
            if by_layer := routing.by_layer():
                found |= {"routing": routing.overall(), "routing_by_layer": by_layer}
        return found


def saves_at(config: RunConfig, step: int) -> bool:
    """Whether a checkpoint is due after a step (counted from 1), by itself or to be evaluated or exported."""
    evaluation = config.evaluation
    evaluated = evaluation.every and evaluation.commands and step % evaluation.every == 0
    exported = evaluation.export_every and step % evaluation.export_every == 0
    return bool(step % config.checkpoint.every == 0 or evaluated or exported)


def _silent(text: str) -> None:
    pass
