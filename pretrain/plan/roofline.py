"""The time of a step, part by part: matrix products, attention, work bound by memory, communication, waiting.

Each part is what has to be done over the rate at which it was measured (:mod:`unfold.pretrain.plan.rates`). Parts follow one
another on a GPU, but for the communication that goes on beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import Activations
from unfold.pretrain.plan.hardware import Cluster
from unfold.pretrain.plan.pointwise import Pointwise, loss_bytes, update_bytes
from unfold.pretrain.plan.ranks import Division
from unfold.pretrain.plan.rates import DENSE_BACKWARD, DENSE_FORWARD, GIST_BACKWARD, GIST_FORWARD, LINK, RECALL, Rates
from unfold.pretrain.plan.traffic import Traffic, context_exchange
from unfold.pretrain.plan.trained import count_trained
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
        recall: selecting, unfolding and the routing loss: a part of attention.
        memory: norms, rotary positions, activations of the feed-forward layer, additions, loss, update, packing.
        exposed: communication during which nothing is computed, that with host memory included.
        idle: waiting for other pipeline stages.
        hidden: communication beside computation; no part of the whole.
    """

    products: Twice
    attention: Twice
    recall: Twice
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
    stages = (sample.of_stage(stage, division.pipeline) for stage in range(division.pipeline))
    attended = (_attention(config, stage, layers * micro * rates.attention) for stage in stages)
    attention, recall = max(attended, key=lambda found: found[0].seconds)  # of the stage that takes longest
    memory = _memory(config, kept, division, layers, rates.memory)
    if config.distill.active:
        more = _teacher(config, kept, layers, rates)
        products, attention, memory = (
            replace(kind, seconds=kind.seconds + micro * seconds) for kind, seconds in zip((products, attention, memory), more)
        )
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
    return StepTime(products, attention, recall, memory, exposed, idle, hidden)


def product_flops(config: RunConfig, kept: Activations, layers: int) -> tuple[int, int]:
    """FLOPs of a micro-batch's matrix products on a rank with so many layers and the head; and of these, what is recomputed.

    Two for each element and token forward; as many for the gradient of the input where backward goes through, and for that of the
    weight where it is trained.
    """
    model, train, trained = config.model, config.train, kept.trained
    each = (count_parameters(model, kept.tensor).layers // model.layers + trained.adapters / trained.layers) * layers
    learning = trained.matrices / trained.layers * layers
    feed_forward = 3 * model.hidden_size * model.ffn_size // kept.tensor * layers
    again = 0.0
    if train.activation_checkpointing != "none":
        again = 2 * each * kept.tokens * trained.reached
    elif train.mlp_tiles > 1:
        again = 2 * feed_forward * kept.tokens * trained.reached
    head = model.padded_vocab_size // kept.tensor * model.hidden_size * kept.targets
    of_head = 4 + 2 * trained.head + 2 * (config.distill.logits > 0) / config.distill.every
    once = 2 * (each + each * trained.reached + learning) * kept.tokens
    return round(once + again + of_head * head), round(again)


def _attention(config: RunConfig, sample: SampleSize, longer: float) -> tuple[Twice, Twice]:
    """Of the layers of ``sample``: all of it, and what recall takes of that.

    longer: layers and micro-batches, times what this GPU takes longer than the one that was measured.
    """
    kept, found = Activations.of(config, sample), []
    width = config.model.heads // kept.tensor * config.model.head_dim
    for part, kind, size in sample.by_kind(config.model.attention):
        # Where keys are exchanged a dense layer attends over ranges, as the others do.
        flash = kind == "dense" and not kept.exchange
        forward, backward = (DENSE_FORWARD, DENSE_BACKWARD) if flash else (GIST_FORWARD, GIST_BACKWARD)
        each, pairs = part * longer * kept.samples, size.keys * size.imbalance / kept.context
        seconds = forward.seconds(size.near, pairs, width, 4), backward.seconds(size.near, pairs, width, 8)
        found.append([each * s for s in (*seconds, *_recall(size, width))])
    there, back, recall_there, recall_back = (sum(s) for s in zip(*found))
    back, recall_back = back * kept.trained.reached, recall_back * kept.trained.reached
    again = kept.trained.reached * (config.train.activation_checkpointing == "full")

    def twice(there: float, back: float) -> Twice:
        return Twice(there + back + again * there, again * there)

    return twice(there + recall_there, back + recall_back), twice(recall_there, recall_back)


def _recall(size: SampleSize, width: int) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass that recall and the routing loss add to a layer of one sample."""
    recall = size.recall
    if recall is None:
        return 0.0, 0.0
    both = recall.part * RECALL.seconds(size.near, recall.queries, recall.scored + recall.read, width)
    # The teacher of the routing loss multiplies queries with keys twice: taken for a pass of attention over these pairs.
    routing = GIST_FORWARD.seconds(0, recall.routed, width, 4)
    return both * RECALL.forward + routing, both * (1 - RECALL.forward)


def _teacher(config: RunConfig, kept: Activations, layers: int, rates: Rates) -> tuple[float, float, float]:
    """Seconds of a micro-batch's products, attention and work bound by memory in the forward pass under dense attention, beside
    that of the student, for the part of the samples that learns from it."""
    part, raw = layers / config.distill.every, kept.sample.raw
    plain = replace(config, train=replace(config.train, activation_checkpointing="none", offload_activations=False, mlp_tiles=1))
    each = count_parameters(config.model, kept.tensor).layers // config.model.layers + kept.trained.adapters / kept.trained.layers
    width = config.model.heads // kept.tensor * config.model.head_dim
    # Over ranges of keys, as gist layers attend.
    attention = GIST_FORWARD.seconds(kept.sample.near, raw * (raw + 1) / 2 / kept.context, width, 4)
    return (
        part * 2 * each * kept.tokens / rates.products,
        part * kept.samples * attention * rates.attention,
        part * Pointwise.of(plain, kept, backward=False).bytes / rates.memory,
    )


def _memory(config: RunConfig, kept: Activations, division: Division, layers: int, rate: float) -> Twice:
    """rate: bytes/s."""
    train, micro = config.train, division.micro_batches
    work = Pointwise.of(config, kept).bytes
    plain = replace(train, activation_checkpointing="none", offload_activations=False, mlp_tiles=1)
    once = Pointwise.of(replace(config, train=plain), kept).bytes
    passes = 3 if train.activation_checkpointing == "full" else 2
    packed = PACKED * passes * sum(context_exchange(config, kept)) if division.context > 1 else 0
    of_step = update_bytes(config, count_trained(config, division.pipeline - 1), division.replicas)
    moved = micro * (layers * (work + packed) + loss_bytes(config, kept)) + of_step
    return Twice(moved / rate, micro * layers * (work - once) / rate)
