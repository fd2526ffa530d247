"""Memory of one GPU in a plan: what stays, what a step needs at its peak.

What DeepSpeed keeps follows its optimizers as :mod:`unfold.pretrain.train.engine` configures them: BF16_Optimizer (bf16, ZeRO-1),
DeepSpeedZeroOptimizer (ZeRO-2, and ZeRO-1 in fp32), DeepSpeedZeroOptimizer_Stage3. A test compares with their buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from unfold.pretrain.config import RunConfig
from unfold.pretrain.plan.activations import FP32, Activations, element_size
from unfold.pretrain.plan.trained import Trained, count_trained
from unfold.pretrain.plan.work import SampleSize
from unfold.pretrain.train.compact import bytes_per_element

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
        optimizer: fp32 master weights of what is trained and Adam's two moments, in what `optimizer.state` says (one momentum
            where Muon updates), and the average of weights where one is kept.
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
    """Bytes of a rank that weights, gradients and optimizer take on its GPU and in host memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float


def model_states(config: RunConfig, trained: Trained, replicas: int) -> States:
    """What ZeRO over ``replicas`` ranks keeps. What is frozen has its weights alone, in the compute precision."""
    zero, offload, element = config.parallel.zero, config.parallel.offload, element_size(config)
    weights = element * trained.held / (replicas if zero == 3 else 1)
    optimizer = (FP32 + bytes_per_element(config.optimizer.state)) * trained.learning / replicas
    if config.optimizer.kind == "muon":  # one number of a layer's matrix element where Adam keeps two
        optimizer -= FP32 * trained.matrices / replicas
    if config.checkpoint.average_decay:  # beside the master weights
        optimizer += FP32 * trained.learning / replicas
    gradients = FP32 * trained.learning / replicas
    if zero == 1:
        # Summed whole; in bf16 those of the last micro-batch stay beside the fp32 sum until the update, but for a pipeline, which
        # adds each to the sum as it arises.
        each = FP32 + element if element < FP32 and config.parallel.pipeline == 1 else FP32
        gradients = each * trained.learning
    host = 0.0
    if offload != "none":
        host, optimizer, gradients = optimizer + gradients, 0.0, 0.0
    if offload == "all":
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, host)


def stage_memory(config: RunConfig, sample: SampleSize, stage: int, replicas: int, micro_batches: int) -> Memory:
    """Peak memory of a rank of one pipeline stage. replicas: data x context ranks; micro_batches: of a step and rank."""
    parallel = config.parallel
    stages = parallel.pipeline
    trained = count_trained(config, stage)
    states = model_states(config, trained, replicas)
    kept = Activations.of(config, sample.of_stage(stage, stages))
    in_flight = min(stages - stage, micro_batches)  # 1F1B
    is_last = stage == stages - 1
    layers = config.model.layers // stages
    activations, working, offloaded = layers_peak(config, kept, round(in_flight * layers * trained.reached))
    activations += in_flight * (kept.shared() + kept.layout())
    loss = kept.loss_peak(config.distill.logits > 0) if is_last else 0
    if config.distill.active:  # the teacher's stream, and of every layer the slope of its distance
        activations += kept.residual() + (layers * kept.residual() if config.distill.hidden else 0)
    return Memory(
        weights=round(states.weights),
        gradients=round(states.gradients),
        optimizer=round(states.optimizer),
        activations=activations,
        working=max(working, loss),
        buffers=_buffers(config, kept, trained, replicas, stage, micro_batches),
        host=round(states.host) + offloaded,
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
    # What a layer keeps comes back while the one after it goes backward. The input of one that is computed again is let go of: in
    # 16 bits its norm has a copy.
    held = 0 if checkpointing == "full" and kept.element < FP32 else 1
    return min(layers, held + (layers > 1)) * each, working, layers * each


def offloaded(config: RunConfig, sample: SampleSize) -> int:
    """Bytes that the layers of a stage keep in host memory, of one micro-batch."""
    layers = round(config.model.layers // config.parallel.pipeline * count_trained(config).reached)
    return layers_peak(config, Activations.of(config, sample), layers)[2]


def _buffers(config: RunConfig, kept: Activations, trained: Trained, replicas: int, stage: int, micro_batches: int) -> int:
    """Bytes that exist only to be sent or received."""
    parallel, element = config.parallel, element_size(config)
    if parallel.zero == 1 and element < FP32:
        total = (FP32 + element) * min(BUCKET, trained.learning)  # a bucket of the fp32 sum, flat, and what is sent of it
    else:
        total = element * BUCKET  # DeepSpeed makes the whole bucket, however small the model
    if parallel.zero == 2 and element < FP32:
        total += element * trained.learning // replicas  # this micro-batch's share of the gradients, before it is added
    if parallel.zero == 3:
        total += element * min(LIVE_PARAMETERS, trained.held)
    if parallel.pipeline > 1:
        slots = max(2, min(parallel.pipeline - stage, micro_batches))
        total += 2 * slots * kept.residual()
    if kept.exchange:
        width = 2 * config.model.kv_heads // parallel.tensor * config.model.head_dim * element
        sizes = [size for _, _, size in kept.sample.by_kind(config.model.attention)]
        sent, fetched = max(s.sent for s in sizes), max(s.recall.fetched if s.recalls else 0 for s in sizes)
        received = kept.samples * (sent * parallel.gists_ranks + fetched + kept.tokens // kept.samples)
        total += 2 * received * width  # keys and values of all ranks, and their gradients
    return total


def plan_memory(config: RunConfig, sample: SampleSize, replicas: int, micro_batches: int) -> list[Memory]:
    """Peak memory of a rank of every pipeline stage."""
    return [stage_memory(config, sample, s, replicas, micro_batches) for s in range(config.parallel.pipeline)]
