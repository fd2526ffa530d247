"""One optimizer step, and one validation: what is summed over which ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deepspeed
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.gist import Recall, recalls_in
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

    gist: how the model recalls in this step; None where it is dense. added: what it learns beside the next token.
    """
    tokens = parallel.sum_over_data(sum(int((b.labels != IGNORED).sum()) for b in batches))
    factor = parallel.replica_group.size() * len(batches) / tokens
    terms = _routing_terms(batches, parallel, model, gist)
    # It does not pass through DeepSpeed's mean over micro-batches.
    scale = gist.route_loss * parallel.replica_group.size() / terms if terms else 0.0
    batches, divisors = added.to_step(batches, engine, parallel, model, tokens)
    if parallel.stages > 1:
        result = _pipeline_step(engine, batches, parallel, factor, int(tokens), gist, scale, terms)
        return replace(result, added=added.means(batches, divisors, parallel))
    began, local_sum, recalls = time.monotonic(), 0.0, []
    for index, batch in enumerate(batches):
        batch = batch.to(parallel.device)
        if batch.recall:
            batch = replace(batch, recall=batch.recall.weighing(scale))
            recalls.append(batch.recall)
        loss = engine(batch)
        local_sum += loss.item()
        if index + 1 == len(batches):
            busy = time.monotonic() - began
            mean = parallel.sum_over_replicas(local_sum) / tokens
            if not math.isfinite(mean):
                # DeepSpeed skips a step whose gradient is not finite. This makes it so wherever the bad loss arose.
                factor = math.nan
        engine.backward(loss * factor)
        engine.step()
    read, more = _what_was_read(recalls, parallel, terms), added.means(batches, divisors, parallel)
    skipped, sent = bool(engine.optimizer.overflow), _context_bytes(engine, parallel)
    return StepResult(mean, float(engine.get_global_grad_norm()), int(tokens), *read, more, sent, skipped, busy)


def _pipeline_step(
    engine: deepspeed.PipelineEngine,
    batches: Sequence[MicroBatch],
    parallel: Parallel,
    factor: float,
    tokens: int,
    gist: GistConfig | None,
    scale: float,
    terms: float,
) -> StepResult:
    """The same through DeepSpeed's pipeline, which averages the scaled losses over micro-batches and ranks itself."""
    began, shared = time.monotonic(), engine.module.stage_attention
    shared.gist, shared.route_scale, shared.added = gist, scale, batches[0].added
    loss = engine.train_batch(iter([stage_inputs(batch, factor) for batch in batches])).item()
    skipped, sent = bool(engine.optimizer.overflow), _context_bytes(engine, parallel)
    norm, busy = float(engine.get_global_grad_norm()), time.monotonic() - began
    read = _what_was_read(shared.take_recalls(), parallel, terms)
    return StepResult(loss, norm, tokens, *read, {}, sent, skipped, busy)


def _routing_terms(
    batches: Sequence[MicroBatch], parallel: Parallel, model: ModelConfig, gist: GistConfig | None
) -> float:
    """Sampled queries of the global batch x heads x layers that recall: what the routing loss is a mean over; 0 without it."""
    if gist is None or gist.route_loss == 0:
        return 0.0
    sampled = [b.recall.routing.routed.tree.queries for b in batches if b.recall and b.recall.routing]
    layers = sum(recalls_in(layer, gist.recall_from) for layer in range(model.layers))
    return parallel.sum_over_data(sum(sampled)) * model.heads * layers


def _what_was_read(
    recalls: Sequence[Recall], parallel: Parallel, terms: float
) -> tuple[float | None, float | None, float | None]:
    """``unfolded``, ``selected`` and ``route_loss`` of a step's result, from what this rank's layers left behind."""
    stats, count = [0.0, 0.0], 0
    for recall in recalls:
        for read in recall.stats.values():
            stats[0] += recall.queries * float(read.unfolded)
            stats[1] += recall.queries * float(read.selected.sum())
            count += recall.queries
    # A rank without a suffix in its samples takes part all the same.
    count = parallel.sum_over_layers(count)
    means = [parallel.sum_over_layers(x) / count for x in stats] if count else [None, None]
    if not terms:
        return *means, None
    routed = [recall.routing for recall in recalls if recall.routing]
    mine = sum(float(loss) for routing in routed for loss in routing.losses.values())
    return *means, parallel.sum_over_parts(mine) / terms


def _context_bytes(engine: deepspeed.DeepSpeedEngine, parallel: Parallel) -> tuple[float, float] | None:
    """``context`` of a step's result. The counters begin anew; what a validation sent goes with the step after it."""
    context = engine.module.context_parallel
    if context is None or context.method != "gists":
        return None
    counted = context.traffic.take()
    sent = parallel.sum_over_replicas(counted.sent) / parallel.replica_group.size()
    return sent / counted.exchanges, counted.whole / counted.exchanges


@torch.no_grad()
def validation_loss(
    engine: deepspeed.DeepSpeedEngine, batches: Sequence[MicroBatch], parallel: Parallel, gist: GistConfig | None
) -> float:
    """Mean cross-entropy in nats over all loss tokens of the ranks' batches. gist: how the model recalls in them."""
    engine.eval()
    if parallel.stages > 1:
        engine.module.stage_attention.gist, engine.module.stage_attention.added = gist, None
    tokens = parallel.sum_over_data(sum(int((b.labels != IGNORED).sum()) for b in batches))
    if parallel.stages > 1:
        factor = parallel.replica_group.size() * len(batches) / tokens
        inputs = iter([stage_inputs(batch, factor) for batch in batches])
        engine.reset_activation_shape()  # a validation batch is one sample, whatever train.micro_batch is
        mean = engine.eval_batch(inputs, num_micro_batches=len(batches)).item()
        engine.reset_activation_shape()
        engine.module.stage_attention.take_recalls()  # a validation's are not a step's
    else:
        total = sum(engine(batch.to(parallel.device)).item() for batch in batches)
        mean = parallel.sum_over_replicas(total) / tokens
    engine.train()
    return mean
