"""The time of a step, part by part: matrix products, attention, work bound by memory, communication, waiting.

Each part is what has to be done over the rate at which it was measured (:mod:`unfold.pretrain.plan.rates`). Parts follow one
another on a GPU, but for the communication that goes on beside them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import Cluster
from unfold.pretrain.plan.pointwise import Pointwise, loss_bytes, update_bytes
from unfold.pretrain.plan.ranks import Division
from unfold.pretrain.plan.rates import DENSE_BACKWARD, DENSE_FORWARD, GIST_BACKWARD, GIST_FORWARD, LINK, Rates
from unfold.pretrain.plan.traffic import Traffic, context_exchange
from unfold.pretrain.plan.work import SampleSize, count_parameters

PACKED = 4  # bytes moved in memory for each that context ranks exchange: packed and unpacked, read and written


@dataclass(frozen=True)
class Twice:
    """Seconds of a kind of work in a step, and which of them compute something a second time."""

    seconds: float
    again: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the busiest rank.

    Attributes:
        products: matrix products of layers and head.
        attention: of the layers.
        memory: norms, rotary positions, activations of the feed-forward layer, additions, loss, update, packing.
        exposed: communication during which nothing is computed, that with host memory included.
        idle: waiting for other pipeline stages.
        hidden: communication beside computation; no part of the whole.
    """

    products: Twice
    attention: Twice
    memory: Twice
    exposed: float
    idle: float
    hidden: float

    @property
    def computing(self) -> float:
        return self.products.seconds + self.attention.seconds + self.memory.seconds

    @property
    def again(self) -> float:
        return self.products.again + self.attention.again + self.memory.again

    @property
    def total(self) -> float:
        return self.computing + self.exposed + self.idle


def step_time(
    config: RunConfig, cluster: Cluster, division: Division, sample: SampleSize, traffic: list[Traffic], to_host: int
) -> StepTime:
    """For a GPU whose peak is known. to_host: bytes that a rank sends to host memory in a micro-batch, and fetches again."""
    rates = Rates.of(cluster.gpu, config.precision)
    kept = Activations.of(config, sample)
    micro, layers = division.micro_batches, config.model.layers // division.pipeline
    flops, flops_again = product_flops(config, kept, layers)
    products = Twice(micro * flops / rates.products, micro * flops_again / rates.products)
    attention = _attention(config, kept, layers, micro * rates.attention)
    memory = _memory(config, kept, division, layers, rates.memory)
    computing = products.seconds + attention.seconds + memory.seconds
    alone, beside = (sum(t.sent / t.rate(cluster) for t in traffic if t.beside is way) for way in (False, True))
    # Gradients and parameters of ZeRO go beside the backward pass.
    hidden = min(beside, computing * 2 / 3)
    exposed = alone + beside - hidden
    if to_host:
        # Beside the forward pass there, beside the backward pass back.
        way = micro * to_host / (cluster.gpu.host_link * LINK)
        forward = (computing - products.again - attention.again - memory.again) / 3
        there, back = min(way, forward), min(way, computing - forward)
        hidden, exposed = hidden + there + back, exposed + 2 * way - there - back
    idle = computing * (division.pipeline - 1) / micro
    return StepTime(products, attention, memory, exposed, idle, hidden)


def product_flops(config: RunConfig, kept: Activations, layers: int) -> tuple[int, int]:
    """FLOPs of a micro-batch's matrix products on a rank with so many layers and the head; and of these, what is recomputed."""
    model, train = config.model, config.train
    each = count_parameters(model, kept.tensor).layers // model.layers
    feed_forward = 3 * model.hidden_size * model.ffn_size // kept.tensor
    again = 0
    if train.activation_checkpointing != "none":
        again = 2 * each * kept.tokens * layers
    elif train.mlp_tiles > 1:
        again = 2 * feed_forward * kept.tokens * layers
    head = model.padded_vocab_size // kept.tensor * model.hidden_size * kept.targets
    return 6 * each * kept.tokens * layers + again + (8 if config.distill.logits else 6) * head, again


def _attention(config: RunConfig, kept: Activations, layers: int, longer: float) -> Twice:
    """longer: micro-batches, times what this GPU takes longer than the one that was measured."""
    sample, width = kept.sample, config.model.heads // kept.tensor * config.model.head_dim
    there = back = 0.0
    for part, kind, size in sample.by_kind(config.model.attention):
        # Where keys are exchanged a dense layer attends over ranges, as the others do.
        flash = kind == "dense" and not kept.exchange
        forward, backward = (DENSE_FORWARD, DENSE_BACKWARD) if flash else (GIST_FORWARD, GIST_BACKWARD)
        each, pairs = part * layers * kept.samples * longer, size.keys * size.imbalance / kept.context
        there += each * forward.seconds(size.near, pairs, width, 4)
        back += each * backward.seconds(size.near, pairs, width, 8)
    again = there if config.train.activation_checkpointing == "full" else 0.0
    return Twice(there + back + again, again)


def _memory(config: RunConfig, kept: Activations, division: Division, layers: int, rate: float) -> Twice:
    """rate: bytes/s."""
    train, micro = config.train, division.micro_batches
    work = Pointwise.of(config, kept).bytes
    plain = dataclasses.replace(train, activation_checkpointing="none", offload_activations=False, mlp_tiles=1)
    once = Pointwise.of(dataclasses.replace(config, train=plain), kept).bytes
    passes = 3 if train.activation_checkpointing == "full" else 2
    packed = PACKED * passes * sum(context_exchange(config, kept)) if division.context > 1 else 0
    counts = count_parameters(config.model, division.tensor, division.pipeline - 1, division.pipeline)
    of_step = update_bytes(config, counts, division.replicas)
    moved = micro * (layers * (work + packed) + loss_bytes(config, kept)) + of_step
    return Twice(moved / rate, micro * layers * (work - once) / rate)
