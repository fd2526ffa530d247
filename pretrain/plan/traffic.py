"""Bytes that one GPU sends per step, by kind. Collectives are counted as rings: each of n ranks sends (n - 1) / n of what an
all-gather or reduce-scatter moves, and twice that for an all-reduce."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unfold.model.lora import fused_layers
from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import FP32, Activations, element_size
from unfold.pretrain.plan.hardware import Cluster
from unfold.pretrain.plan.rates import LINK
from unfold.pretrain.plan.trained import COLUMN_LAYERS, count_trained
from unfold.pretrain.plan.work import SampleSize, count_parameters


@dataclass(frozen=True)
class Traffic:
    """One kind of communication.

    Attributes:
        kind: what is sent.
        sent: bytes per step of the GPU that sends most.
        span: consecutive ranks within which the group lies: it stays in a node that holds as many GPUs.
        ranks: of the group.
        beside: whether it goes on beside computation, as far as that lasts.
    """

    kind: str
    sent: int
    span: int
    ranks: int
    beside: bool = False

    def rate(self, cluster: Cluster) -> float:
        """Bytes/s at which a GPU sends: over the links of its node, or, as a ring across nodes, over the ports of the group's
        GPUs in a node, which all carry a part of each one's bytes."""
        link, node = cluster.gpu.node_link, cluster.gpus_per_node
        if self.span > node:
            link = min(link, cluster.network * max(1, self.ranks * node // self.span))
        return link * LINK


def plan_traffic(config: RunConfig, sample: SampleSize, replicas: int, micro_batches: int, ranks: int) -> list[Traffic]:
    """All kinds that occur. replicas: data x context ranks; micro_batches: of a step and rank."""
    parallel = config.parallel
    kept = Activations.of(config, sample)
    # Forward passes per backward: of what is sent around attention and feed-forward, and within attention.
    train = config.train
    again = train.activation_checkpointing != "none"
    passes = (2 if again else 1) + (2 if again or train.mlp_tiles > 1 else 1)
    attended = 2 if train.activation_checkpointing == "full" else 1
    taught = 1 / config.distill.every if config.distill.active else 0  # dense attention's forward pass through the layers
    layers = config.model.layers // parallel.pipeline * micro_batches
    model_span = parallel.tensor * parallel.context
    found = _replica_traffic(config, replicas, micro_batches, replicas * parallel.tensor)
    if parallel.tensor > 1:
        kind = "sequence (gather, scatter)" if parallel.sequence else "tensor (all-reduce)"
        # Two all-reduces (or gathers and scatters) per layer and direction, one more at embedding and head.
        trained = count_trained(config)
        times = layers * (passes + 2 * trained.reached + 2 * taught) + 2 * micro_batches
        if not trained.into_first:  # nobody asks for the gradient of the first layer's input
            times -= micro_batches
        sent = 2 * _ring(parallel.tensor) * (times * _hidden(config, kept) + layers * _narrow(config, kept, passes / 2))
        found.append(Traffic(kind, round(sent), parallel.tensor, parallel.tensor))
    if parallel.context > 1:
        times, among = layers * (attended + 1), context_exchange(config, kept)
        if parallel.gists_ranks > 1:
            sent = times * among[0]
            if taught:
                whole = replace(sample, sent=-(-sample.raw // parallel.context), recall=None, layers=())
                sent += taught * layers * context_exchange(config, Activations.of(config, whole))[0]
            found.append(Traffic("context (gists)", round(sent), model_span, parallel.gists_ranks))
        if parallel.heads_ranks > 1:
            sent, neighbours = (times + taught * layers) * among[1], parallel.tensor * parallel.heads_ranks
            found.append(Traffic("context (heads)", round(sent), neighbours, parallel.heads_ranks))
    if parallel.pipeline > 1:
        # A stage between two others sends on the residual stream, and back its gradient; with two stages each does one of both.
        directions = 2 if parallel.pipeline > 2 else 1
        found.append(Traffic("pipeline", micro_batches * directions * kept.residual(), ranks, parallel.pipeline))
        if config.model.tied_embeddings and count_trained(config).head:
            size = FP32 * count_parameters(config.model, parallel.tensor).embedding
            found.append(Traffic("tied embedding", size, ranks, 2))  # an all-reduce between two
    return found


def _ring(ranks: int) -> float:
    """Part of a tensor that each rank of a ring sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def _hidden(config: RunConfig, kept: Activations) -> int:
    """Bytes of the hidden states of all tokens of a rank's part of the sequence."""
    return kept.element * config.model.hidden_size * kept.tokens


def _narrow(config: RunConfig, kept: Activations, passes: float) -> float:
    """Bytes that adapters of a layer send: beside column layers their gradients, beside row layers a sum in each forward pass."""
    chosen = {name: len(fused.targeted(config.lora.targets)) for name, fused in fused_layers(config.model).items()}
    width = sum(n if name in COLUMN_LAYERS else n * passes for name, n in chosen.items())
    return kept.element * kept.tokens * width * config.lora.rank


def _replica_traffic(config: RunConfig, replicas: int, micro_batches: int, span: int) -> list[Traffic]:
    """Gradients and parameters among the ranks that hold the same part of the model."""
    if replicas == 1:
        return []
    parallel, element = config.parallel, element_size(config)
    stages = parallel.pipeline
    reduced = {"precision": element, "fp32": FP32, "bf16": FP32 // 2}[parallel.reduce]
    counts = [count_trained(config, stage) for stage in range(stages)]
    learning, held = max(c.learning for c in counts), max(c.held for c in counts)
    once, gradient, gathered = (_ring(replicas) * n for n in (learning * element, learning * reduced, 2 * held * element))
    if parallel.zero == 3:
        return [
            Traffic("gradients (reduce-scatter)", round(gradient * micro_batches), span, replicas, beside=True),
            Traffic(
                "ZeRO-3 parameters (all-gather)",
                round(gathered * micro_batches),
                span,
                replicas,
                beside=True,
            ),
        ]
    # DeepSpeed all-reduces buckets of gradients also where a rank keeps a part alone (use_multi_rank_bucket_allreduce).
    times = micro_batches if parallel.zero == 2 else 1
    gradients = Traffic("gradients (all-reduce)", round(2 * gradient * times), span, replicas, beside=parallel.zero == 2)
    return [gradients, Traffic("updated parameters (all-gather)", round(once), span, replicas)]


def context_exchange(config: RunConfig, kept: Activations) -> tuple[int, int]:
    """Bytes a rank sends in one layer and direction: of gists, and to trade heads."""
    model, parallel = config.model, config.parallel
    key_width = model.kv_heads // parallel.tensor * model.head_dim
    gists = 0
    if kept.exchange:
        # A rank sends as many chunks as it fetches, in the mean.
        recalling = ((part, size.recall) for part, _, size in kept.sample.by_kind(model.attention) if size.recall)
        fetched = sum(part * recall.part * recall.fetched for part, recall in recalling)
        sent = (parallel.gists_ranks - 1) * kept.sample.sent + fetched
        gists = round(kept.samples * sent * 2 * key_width * kept.element)
    query_width = model.heads // parallel.tensor * model.head_dim
    moved = (2 * query_width + 2 * key_width) * kept.tokens * kept.element  # q, k, v, and the output back
    return gists, moved * (parallel.heads_ranks - 1) // parallel.heads_ranks
