"""Memory of one GPU in a plan: what stays, what a step needs at its peak.

What DeepSpeed keeps follows its optimizers as :mod:`unfold.pretrain.train.engine` configures them: BF16_Optimizer (bf16, ZeRO-1),
DeepSpeedZeroOptimizer (ZeRO-2, and ZeRO-1 in fp32), DeepSpeedZeroOptimizer_Stage3. A test compares with their buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import FP32, Activations, element_size
from unfold.pretrain.plan.work import Parameters, SampleSize, count_parameters

# DeepSpeed's defaults, in elements: zero_optimization.reduce_bucket_size, stage3_max_live_parameters.
BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
# Part of a GPU's memory that is left to the CUDA context, NCCL's channels and what the allocator cannot use in between.
RESERVED = 0.08


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; ``host`` is what offloading keeps in the node's memory instead, per GPU.

    Attributes:
        weights: in the compute precision.
        gradients: as they are accumulated over micro-batches.
        optimizer: fp32 master weights and Adam's two moments (one momentum where Muon updates).
        activations: kept for backward by all micro-batches in flight, with their layouts.
        working: what comes on top at most: a layer that goes backward, and is computed again for it; or, on the last stage, the
            loss: a chunk of logits, and the gradients that it leaves for backward; or the final norm.
        buffers: communication: buckets, gathered parameters, received activations and keys.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


@dataclass(frozen=True)
class States:
    """Bytes per parameter of a rank that weights, gradients and optimizer take on its GPU and in host memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float


def model_states(config: RunConfig, replicas: int) -> States:
    """What ZeRO over ``replicas`` ranks keeps per parameter."""
    zero, offload = config.parallel.zero, config.parallel.offload
    element = element_size(config)
    weights = element / replicas if zero == 3 else element
    optimizer = 3 * FP32 / replicas
    gradients = FP32 / replicas
    if zero == 1:
        # Summed whole; in bf16 those of the last micro-batch stay beside the fp32 sum until the update, but for a pipeline, which
        # adds each to the sum as it arises.
        gradients = FP32 + element if element < FP32 and config.parallel.pipeline == 1 else FP32
    host = 0.0
    if offload != "none":
        host, optimizer, gradients = optimizer + gradients, 0.0, 0.0
    if offload == "all":
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, host)


def spared_by_muon(config: RunConfig, counts: Parameters, replicas: int) -> float:
    """Bytes of optimizer state that Muon does without: it keeps one number of a layer's matrix element where Adam keeps two."""
    return FP32 * counts.layers / replicas if config.optimizer.kind == "muon" else 0.0


def stage_memory(config: RunConfig, sample: SampleSize, stage: int, replicas: int, micro_batches: int) -> Memory:
    """Peak memory of a rank of one pipeline stage. replicas: data x context ranks; micro_batches: of a step and rank."""
    parallel = config.parallel
    stages = parallel.pipeline
    counts = count_parameters(config.model, parallel.tensor, stage, stages)
    parameters, states = counts.total, model_states(config, replicas)
    kept = Activations.of(config, sample)
    in_flight = min(stages - stage, micro_batches)  # 1F1B
    is_last = stage == stages - 1
    layers = config.model.layers // stages
    activations, working, offloaded = layers_peak(config, kept, in_flight * layers)
    activations += in_flight * (kept.shared() + kept.layout())
    loss = kept.loss_peak(config.distill.logits > 0) if is_last else 0
    if config.distill.active:  # the teacher's stream, and of every layer the slope of its distance
        activations += kept.residual() + (layers * kept.residual() if config.distill.hidden else 0)
    return Memory(
        weights=round(states.weights * parameters),
        gradients=round(states.gradients * parameters),
        optimizer=round(states.optimizer * parameters - spared_by_muon(config, counts, replicas)),
        activations=activations,
        working=max(working, loss),
        buffers=_buffers(config, kept, parameters, replicas, stage, micro_batches),
        host=round(states.host * parameters) + offloaded,
    )


def layers_peak(config: RunConfig, kept: Activations, layers: int) -> tuple[int, int, int]:
    """Bytes that the layers of all micro-batches in flight keep on the GPU, that one of them needs in backward beyond what it
    keeps, computed again or not, and that they keep in host memory."""
    checkpointing = config.train.activation_checkpointing
    if checkpointing == "none":
        return layers * kept.layer(), kept.working(), 0
    # One layer at a time is computed again, or the larger of its two parts.
    each, again = kept.residual(), kept.layer()
    if kept.element == FP32:
        again -= kept.residual()  # its norm's input in fp32 is the input that was kept
    if checkpointing == "selective":
        each, again = kept.selective(), max(kept.before_attention(), kept.feed_forward())
    working = again + kept.working()
    if not config.train.offload_activations:
        return layers * each, working, 0
    return min(layers, 2) * each, working, layers * each  # what a layer keeps comes back while the one after it goes backward


def offloaded(config: RunConfig, sample: SampleSize) -> int:
    """Bytes that the layers of a stage keep in host memory, of one micro-batch."""
    return layers_peak(config, Activations.of(config, sample), config.model.layers // config.parallel.pipeline)[2]


def _buffers(config: RunConfig, kept: Activations, parameters: int, replicas: int, stage: int, micro_batches: int) -> int:
    """Bytes that exist only to be sent or received."""
    parallel, element = config.parallel, element_size(config)
    if parallel.zero == 1 and element < FP32:
        total = (FP32 + element) * min(BUCKET, parameters)  # a bucket of the fp32 sum, flat, and what is sent of it
    else:
        total = element * BUCKET  # DeepSpeed makes the whole bucket, however small the model
    if parallel.zero == 2 and element < FP32:
        total += element * parameters // replicas  # this micro-batch's share of the gradients, before it is added
    if parallel.zero == 3:
        total += element * min(LIVE_PARAMETERS, parameters)
    if parallel.pipeline > 1:
        slots = max(2, min(parallel.pipeline - stage, micro_batches))
        total += 2 * slots * kept.residual()
    if kept.exchange:
        width = 2 * config.model.kv_heads // parallel.tensor * config.model.head_dim * element
        sent = max(size.sent for _, _, size in kept.sample.by_kind(config.model.attention))
        received = kept.samples * (sent * parallel.gists_ranks + kept.tokens // kept.samples)
        total += 2 * received * width  # keys and values of all ranks, and their gradients
    return total


def plan_memory(config: RunConfig, sample: SampleSize, replicas: int, micro_batches: int) -> list[Memory]:
    """Peak memory of a rank of every pipeline stage."""
    return [stage_memory(config, sample, s, replicas, micro_batches) for s in range(config.parallel.pipeline)]
