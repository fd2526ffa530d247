"""One optimizer step, and one validation: what is summed over which ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deepspeed
import torch
from torch import Tensor

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Recall, recalls_in
from unfold.model.parallel.context import ContextTraffic
from unfold.model.parallel.pipeline import stage_inputs
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.train.added import NOTHING_ADDED, Added


@dataclass(frozen=True)
class StepResult:
    """Figures of a step; but for ``busy_s`` the same on every rank.

    Attributes:
        loss: mean cross-entropy in nats over all loss tokens of the global batch.
        grad_norm: norm of the whole gradient before clipping; infinite when the step was skipped.
        loss_tokens: tokens with a target in the global batch.
        unfolded: raw tokens that a recalling query unfolded, a mean over them and the layers that recall; None without recall.
        selected: gists of all levels that it selected, a mean alike.
        route_loss: routing loss in nats, a mean over sampled queries, heads and layers; None where no query was sampled.
        added: what else was learned, as :mod:`unfold.pretrain.train.added` names it.
        context: bytes that a rank sent to those it shares sequences with, and would have sent for gathering all keys and
            values: means over ranks, layers (in a pipeline of the first stage) and micro-batches; None without such ranks.
        heads: bytes that a rank sent to trade the sequence for heads, a mean alike; None without ranks that do.
        skipped: loss or gradient were not finite, and neither weights nor optimizer were touched.
        busy_s: seconds that this rank worked before it first waited for the others' losses.
    """

    loss: float
    grad_norm: float
    loss_tokens: int
    unfolded: float | None
    selected: float | None
    route_loss: float | None
    added: dict[str, float]
    context: tuple[float, float] | None
    heads: float | None
    skipped: bool
    busy_s: float


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: Sequence[MicroBatch],
    parallel: Parallel,
    model: ModelConfig,
    gist: GistConfig | None,
    added: Added = NOTHING_ADDED,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then the update.

    Every loss token of the global batch weighs the same, however they are spread over ranks and micro-batches: DeepSpeed
    averages over both, so each micro-batch's sum is scaled by (ranks x micro-batches / tokens of the global batch). So does
    every sampled query of the routing loss.

    A GPU is never waited for before all its work of the step is queued: losses and statistics stay there until the end.

    gist: how the model recalls in this step; None where it is dense. added: what it learns beside the next token.
    """
    tokens = parallel.sum_over_data(sum(int((b.labels != IGNORED).sum()) for b in batches))
    terms = _routing_terms(batches, parallel, model, gist)
    # It does not pass through DeepSpeed's mean over micro-batches.
    scale = gist.route_loss * parallel.replica_group.size() / terms if terms else 0.0
    batches, divisors = added.to_step(batches, engine, parallel, model, tokens)
    tally, work = Tally(), Stopwatch(parallel.device)
    run = _pipeline if parallel.stages > 1 else _micro_batches
    loss = run(engine, batches, parallel, tokens, scale, tally, work)
    shares, traffic = tally.shares | added.shares(batches, divisors), _context_traffic(engine)
    if traffic.exchanges:  # in a pipeline that of the first stage
        sent = traffic.sent / traffic.exchanges / parallel.replica_group.size()
        shares["sent"] = 0.0 if parallel.stage else sent
    # One sum over all ranks and one wait, for all figures together.
    totals = parallel.sum_over_parts(list(shares.values()))
    skipped, norm = bool(engine.optimizer.overflow), engine.get_global_grad_norm()
    loss, norm, *totals = torch.cat([parallel.vector([loss, norm]), totals]).tolist()
    # All but the routing losses are alike on the ranks that share a layer.
    means = {name: total / parallel.tensor_group.size() for name, total in zip(shares, totals)}
    queries, unfolded, selected, route = (means.pop(name) for name in Tally.NAMES)
    return StepResult(
        loss=loss,
        grad_norm=norm,
        loss_tokens=int(tokens),
        unfolded=unfolded / queries if queries else None,
        selected=selected / queries if queries else None,
        route_loss=route * parallel.tensor_group.size() / terms if terms else None,
        context=(means.pop("sent"), traffic.whole / traffic.exchanges) if traffic.exchanges else None,
        heads=traffic.traded / traffic.trades if traffic.trades else None,
        added=added.metrics(means),
        skipped=skipped,
        busy_s=work.seconds(),
    )


class Tally:
    """What a rank's micro-batches add to a step's figures; numbers stay where they were computed."""

    NAMES = ("queries", "unfolded", "selected", "route")

    def __init__(self):
        self.shares: dict[str, float | Tensor] = dict.fromkeys(self.NAMES, 0.0)

    def add(self, recall: Recall | None) -> None:
        """A micro-batch has passed all layers. Recalling queries count once per layer, and what they read in each."""
        if recall is None:
            return
        read, losses = recall.read(), list(recall.routing.losses.values()) if recall.routing else []
        if read is not None:
            found = recall.queries * len(recall.stats), *read, torch.stack(losses).double().sum() if losses else 0.0
            self.shares = {name: self.shares[name] + more for name, more in zip(self.NAMES, found)}


class Stopwatch:
    """Seconds from here to a mark that a rank worked; on a GPU its own time, which is read when nothing is left to wait for."""

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times: list[float] = []
        self.mark()

    def mark(self) -> None:
        """The beginning, then the end."""
        if self._events:
            self._events[len(self._times)].record()
        self._times.append(time.monotonic())

    def seconds(self) -> float:
        """Between the two."""
        begin, end = self._times
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else end - begin


def _micro_batches(
    engine: deepspeed.DeepSpeedEngine,
    batches: Sequence[MicroBatch],
    parallel: Parallel,
    tokens: float,
    scale: float,
    tally: Tally,
    work: Stopwatch,
) -> Tensor:
    """Forward, backward and the update; the mean loss over all loss tokens, on the device."""
    summed = 0.0
    factor = parallel.replica_group.size() * len(batches) / tokens
    for index, batch in enumerate(batches):
        batch = batch.to(parallel.device)
        if batch.recall:
            batch = replace(batch, recall=batch.recall.weighing(scale))
        loss = engine(batch)
        summed = summed + loss.detach().double()
        if index + 1 == len(batches):
            work.mark()
            mean = parallel.sum_over_replicas([summed])[0] / tokens
            # DeepSpeed skips a step whose gradient is not finite. This makes it so wherever the bad loss arose.
            factor = torch.full_like(loss, factor).masked_fill(~mean.isfinite(), math.nan)
        engine.backward(loss * factor)
        engine.step()
        tally.add(batch.recall)
    return mean


def _pipeline(
    engine: deepspeed.PipelineEngine,
    batches: Sequence[MicroBatch],
    parallel: Parallel,
    tokens: float,
    scale: float,
    tally: Tally,
    work: Stopwatch,
) -> Tensor:
    """The same through DeepSpeed's pipeline, which averages the scaled losses over micro-batches and ranks itself."""
    factor = parallel.replica_group.size() * len(batches) / tokens
    weighed = [replace(b, recall=b.recall and b.recall.weighing(scale)) for b in batches]
    with engine.module.stage_attention.passing(weighed, parallel.device, lambda batch: tally.add(batch.recall)):
        loss = engine.train_batch(iter([stage_inputs(batch, factor, engine.module.context_parallel) for batch in batches]))
    work.mark()
    return loss.detach()


def _routing_terms(batches: Sequence[MicroBatch], parallel: Parallel, model: ModelConfig, gist: GistConfig | None) -> float:
    """Sampled queries of the global batch x heads x layers that recall: what the routing loss is a mean over; 0 without it."""
    if gist is None or gist.route_loss == 0:
        return 0.0
    sampled = [b.recall.routing.routed.tree.queries for b in batches if b.recall and b.recall.routing]
    layers = sum(recalls_in(layer, gist.recall_from, kind) for layer, kind in enumerate(model.layer_kinds))
    return parallel.sum_over_data(sum(sampled)) * model.heads * layers


def _context_traffic(engine: deepspeed.DeepSpeedEngine) -> ContextTraffic:
    """What ``context`` and ``heads`` of a step's result are made of; a validation's goes with the step after it."""
    context = engine.module.context_parallel
    return ContextTraffic() if context is None else context.traffic.take()


@torch.no_grad()
def validation_loss(engine: deepspeed.DeepSpeedEngine, batches: Sequence[MicroBatch], parallel: Parallel) -> float:
    """Mean cross-entropy in nats over all loss tokens of the ranks' batches."""
    engine.eval()
    tokens = parallel.sum_over_data(sum(int((b.labels != IGNORED).sum()) for b in batches))
    if parallel.stages > 1:
        factor = parallel.replica_group.size() * len(batches) / tokens
        inputs = iter([stage_inputs(batch, factor, engine.module.context_parallel) for batch in batches])
        engine.reset_activation_shape()  # a validation batch is one sample, whatever train.micro_batch is
        with engine.module.stage_attention.passing(batches, parallel.device):
            mean = engine.eval_batch(inputs, num_micro_batches=len(batches)).item()
        engine.reset_activation_shape()
    else:
        total = sum(engine(batch.to(parallel.device)).double() for batch in batches)
        mean = parallel.sum_over_replicas([total]).item() / tokens
    engine.train()
    return mean
