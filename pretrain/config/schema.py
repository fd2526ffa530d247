"""What the configuration of a run consists of: frozen dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

import yaml

from unfold.model.config import GistConfig, LoraConfig, ModelConfig
from unfold.model.settings import (
    Bounds,
    Count,
    Decay,
    Natural,
    NotNegative,
    Part,
    Positive,
    Settings,
    option,
)
from unfold.pretrain.config.distill import DistillConfig
from unfold.pretrain.config.evaluation import EvaluationConfig
from unfold.pretrain.config.monitor import MonitorConfig
from unfold.pretrain.config.numbers import whole_weights
from unfold.pretrain.config.optimizer import OptimizerConfig
from unfold.pretrain.config.stages import RunStage, StageConfig, run_stages, stage_errors
from unfold.pretrain.config.trained import pattern_errors
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which tokens the run sees."""

    train: tuple[str, ...] = option(
        (),
        "shards to train on, of text or supervised: prefixes (without .bin), globs or URLs; `PREFIX weight=0.7` gives each entry "
        "its share of the samples, `PREFIX weight=0.7,12000:0.2` changes it from a sample on",
    )
    valid: tuple[str, ...] = option((), "shard prefixes to validate on; none: no validation")
    tokenizer: str = option("", "tokenizer directory that the shards were made with")
    cache: str = option("", "directory for shards fetched from URLs; empty: ~/.cache/unfold/shards")
    raw_tokens: Annotated[int, Bounds(ge=2)] = option(1024, "raw tokens per sample, whatever the chunk sizes")
    packing: Literal["windows", "best_fit"] = option(
        "windows",
        "how text to train on becomes samples: windows, cut from documents that follow one another; best_fit, whole documents "
        "packed together with padding, only those cut that are longer than a sample",
    )
    length_weights: tuple[tuple[int, float], ...] = option(
        (),
        "training: [tokens, weight] pairs by rising tokens; documents from so many tokens on are read weight times as often as "
        "those shorter than all, e.g. [[8192, 2], [32768, 4]]",
    )
    shuffle_parts: bool = option(
        False, "training: draw the order of the parts of linked contexts, by the seed and the sample's number"
    )

    def __post_init__(self):
        object.__setattr__(self, "length_weights", tuple(tuple(pair) for pair in self.length_weights))
        super().__post_init__()

    def misfits(self) -> list[str]:
        errors = []
        if not all(self.train or [""]):
            errors.append("train: no shard prefix given")
        if not all(self.valid):
            errors.append("valid: holds an empty shard prefix; leave it out for no validation")
        edges = [edge for edge, _ in self.length_weights]
        if (
            edges != sorted(set(edges))
            or any(edge < 0 for edge in edges)
            or any(not 0 < w < float("inf") for _, w in self.length_weights)
        ):
            errors.append(f"length_weights: {[list(p) for p in self.length_weights]} are not weights above 0 by rising tokens")
        elif self.length_weights:
            try:
                whole_weights(self.length_weights)
            except ValueError as error:
                errors.append(f"length_weights: {[w for _, w in self.length_weights]} {error}")
        if not self.tokenizer:
            errors.append("tokenizer: no tokenizer directory given")
        return errors


# What train.allow_changes may name: other settings decide which weights there are or which samples a step sees.
CHANGEABLE_ON_RESUME = ("optimizer", "schedule", "train.steps", "train.clip", "precision")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How long, how much at a time."""

    steps: Count = option(1000, "optimizer steps")
    seed: Natural = option(1234, "seed of the initial weights and of the order of samples")
    global_batch: Count = option(8, "samples per step, over all ranks")
    micro_batch: Count = option(1, "samples per forward pass of one rank")
    clip: NotNegative = option(1.0, "largest gradient norm; 0 clips nothing")
    z_loss: NotNegative = option(
        0.0, "weight of the mean squared log-partition of next-token distributions, which keeps logits small; 0: none"
    )
    activation_checkpointing: Literal["none", "full", "selective"] = option(
        "none",
        "compute layers again in backward instead of keeping their activations: none, full (all of a layer), or selective (all "
        "but attention, whose inputs and outputs are kept)",
    )
    offload_activations: bool = option(False, "keep what checkpointed layers keep in host memory")
    mlp_tiles: Count = option(
        1, "pieces of the sequence of which the feed-forward layer holds one at a time, and computes it again in backward"
    )
    fuse_pointwise: bool = option(
        False,
        "compile norms (with additions), rotation, and the feed-forward layer's activation into a kernel each; for GPUs",
    )
    stages: tuple[StageConfig, ...] = option(
        (), "parts of the run with settings of their own, e.g. [{until: 300, recall: none}]; see `train.stages`"
    )
    valid_every: Natural = option(100, "steps between validations; 0: only after the last step")
    valid_samples: Count = option(16, "samples of one validation")
    valid_choices: bool = option(
        False, "validate with each of gist.choices too, which takes that many times as long: `valid_loss.16`, .. in the metrics"
    )
    trainable: tuple[str, ...] = option(
        (),
        "what is trained: patterns of canonical parameter names, or `gists` for the rows of gist and link ids alone; !PATTERN "
        "takes out again; empty: everything, or with `lora.rank` the adapters alone",
    )
    init_from: str = option("", "run or checkpoint directory whose weights (nothing else) a new run starts from")
    allow_changes: tuple[str, ...] = option((), "settings or sections that may differ on resume, e.g. [optimizer.lr, schedule]")

    def misfits(self) -> list[str]:
        errors = []
        if self.micro_batch > 0 and self.global_batch % self.micro_batch:
            errors.append(f"micro_batch: {self.micro_batch} does not divide global_batch ({self.global_batch})")
        if self.offload_activations and self.activation_checkpointing == "none":
            errors.append("offload_activations: true needs activation_checkpointing: full or selective (it is none)")
        errors += [f"trainable: {text}" for text in pattern_errors(self.trainable)]
        for name in self.allow_changes:
            if not any(name == part or name.startswith(f"{part}.") for part in CHANGEABLE_ON_RESUME):
                errors.append(f"allow_changes: {name!r} is not one of {', '.join(CHANGEABLE_ON_RESUME)} or a setting in them")
        return errors


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Learning rate over the steps."""

    kind: Literal["cosine", "wsd", "constant"] = option("cosine", "cosine; wsd: warm-up, stable, linear decay; constant")
    warmup: Part = option(0.05, "part of the steps in which the rate rises linearly from 0")
    decay: Part = option(0.2, "wsd: part of the steps in which the rate falls at the end")
    floor: Part = option(0.1, "last learning rate, as a part of the peak")

    def misfits(self) -> list[str]:
        errors = []
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            errors.append(f"decay: warmup ({self.warmup}) and decay ({self.decay}) together exceed 1")
        return errors


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """How the model and the data are spread over the ranks; what remains of the ranks is data parallel."""

    tensor: Count = option(1, "ranks that share every layer")
    pipeline: Count = option(1, "pipeline stages")
    context: Count = option(1, "ranks that share every sequence")
    context_method: Literal["gists", "ulysses"] = option(
        "gists", "what context ranks exchange: gists and border chunks; ulysses: heads for sequence"
    )
    context_heads: Count = option(
        1, "gists: so many context ranks, neighbours of a node, trade heads for sequence among them; these groups exchange gists"
    )
    sequence: bool = option(False, "also split norms and residuals over the tensor-parallel ranks, along the sequence")
    zero: Literal[1, 2, 3] = option(
        1, "DeepSpeed ZeRO stage: 1 optimizer state, 2 and gradients, 3 and parameters are partitioned"
    )
    offload: Literal["none", "optimizer", "all"] = option(
        "none", "what ZeRO keeps in host memory: none, optimizer, or all (parameters too; zero: 3)"
    )
    reduce: Literal["precision", "fp32", "bf16"] = option(
        "precision", "what gradients are sent in when ranks add them up: precision (of the run), fp32 or bf16"
    )
    timeout_minutes: Positive = option(30.0, "a collective that takes longer ends the run")

    @property
    def heads_ranks(self) -> int:
        """Neighbours, of the context ranks, that trade heads for sequence."""
        return self.context if self.context_method == "ulysses" else self.context_heads

    @property
    def gists_ranks(self) -> int:
        """Context ranks, of those with the same heads, that exchange gists."""
        return self.context // self.heads_ranks

    @property
    def length_multiple(self) -> int:
        """What a sample's padded length is a multiple of: ranks that share sequences hold equally many tokens of them."""
        return self.context * (self.tensor if self.sequence else 1)

    def misfits(self) -> list[str]:
        errors = []
        if self.offload == "all" and self.zero != 3:
            errors.append(f"offload: all needs zero: 3 (it is {self.zero}); or set offload: optimizer")
        if self.offload == "optimizer" and self.zero == 1:
            errors.append("offload: optimizer needs zero: 2 or 3 (it is 1)")
        if self.pipeline > 1 and self.zero > 1:
            errors.append(f"zero: {self.zero} with pipeline: {self.pipeline}; DeepSpeed's pipeline works with zero: 1 only")
        return errors + self._context_errors()

    def _context_errors(self) -> list[str]:
        heads = self.context_heads
        if heads <= 1:  # what is below 1 is told by its bounds
            return []
        if self.context_method == "ulysses":
            return [f"context_heads: {heads}, but with context_method: ulysses all context ranks trade heads; leave it out"]
        if self.context % heads:
            would_do = _largest_divisor(self.context, min(heads, max(1, self.context // 2)))
            return [f"context_heads: {heads} does not divide context ({self.context}); {would_do} would do"]
        if self.context == heads:
            return [f"context_heads: {heads} are all ranks of context; leave it out, and set context_method: ulysses"]
        return []


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """When the run's state is saved, how much of it is kept, and when the run stops by itself."""

    every: Count = option(100, "steps between checkpoints; the last step is always saved")
    keep: Natural = option(3, "newest checkpoints that are kept; 0 keeps all")
    keep_every: Natural = option(0, "checkpoints at multiples of so many steps are kept for good; 0: none")
    background: bool = option(True, "training goes on while the copied state is written; needs host memory for one copy")
    deadline_minutes: Positive = option(30.0, "a save that takes longer has failed; the ranks that are late are named")
    average_decay: Decay = option(
        0.0, "keep an exponential average of the trained weights with this decay per step, in every checkpoint; 0: none"
    )
    stop_after_minutes: NotNegative = option(0.0, "save and stop when the process has run so long (a job's time limit); 0: never")


@dataclass(frozen=True)
class FaultConfig(Settings):
    """What happens when a step goes wrong or does not end."""

    max_skips: Count = option(3, "steps in a row without a finite loss and gradient that make the run roll back")
    spike_z: NotNegative = option(20.0, "a loss so many robust standard deviations above the recent median rolls back; 0: never")
    spike_window: Annotated[int, Bounds(ge=8)] = option(64, "recent losses that a spike is measured against")
    spike_steps: Count = option(1, "steps, up to the one with the spike, whose samples are quarantined")
    max_rollbacks: Natural = option(3, "rollbacks after which the run ends instead")
    hang_minutes: NotNegative = option(
        30.0, "without progress for so long, every rank writes its stacks and the job ends; 0: never"
    )
    straggler_factor: Annotated[float, Bounds(gt=1)] = option(
        1.5, "a rank that computes so many times longer than the median is named in the metrics"
    )


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that defines a run."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    gist: GistConfig = field(default_factory=GistConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    precision: Literal["fp32", "bf16"] = option(
        "bf16", "compute precision: bf16 or fp32; master weights and softmax are always fp32"
    )

    def misfits(self) -> list[str]:
        errors = self._layout_errors() + self.optimizer.misplaced(self.parallel, self.precision, self.lora.rank)
        errors += self.distill.misplaced(self.model.attention, self.parallel.pipeline)
        if self.data.raw_tokens > self.model.max_position:
            errors.append(f"data.raw_tokens: {self.data.raw_tokens} exceeds model.max_position ({self.model.max_position})")
        if self.train.valid_choices and not (self.folding and self.gist.choices and self.data.valid):
            lacks = "data.valid" if self.folding and self.gist.choices else "gist.choices"
            errors.append(f"train.valid_choices: true, but there are no {lacks}; give some, or set it to false")
        first, layers = self.gist.recall_from, self.model.layers
        if self.model.attention == "gist" and first >= max(2, layers):  # the default says nothing of a model of one layer
            most = max(1, layers - 1)
            errors.append(f"gist.recall_from: {first}, but model.layers is {layers}, and none recalls; at most {most} would do")
        elif self.model.layer_attention and self.gist.recall != "none" and "gist" not in self.model.layer_kinds[first:]:
            errors.append(
                f"model.layer_attention: no layer from {first} on (gist.recall_from) is gist, and none recalls; make one gist, "
                "or set gist.recall: none"
            )
        if profiled := self.monitor.profile_steps:
            if profiled[1] > self.train.steps:
                errors.append(f"monitor.profile_steps: {list(profiled)} goes beyond train.steps ({self.train.steps})")
        return errors + stage_errors(self, errors)

    def _layout_errors(self) -> list[str]:
        """Why the model cannot be spread as configured."""
        parallel, model = self.parallel, self.model
        tensor, errors = parallel.tensor, []
        for name in ("kv_heads", "ffn_size", "padded_vocab_size"):
            if getattr(model, name) % tensor:
                errors.append(
                    f"parallel.tensor: {tensor} does not divide model.{name} ({getattr(model, name)}); "
                    f"{_largest_divisor(getattr(model, name), tensor)} would do"
                )
        if model.layers % parallel.pipeline:
            errors.append(
                f"parallel.pipeline: {parallel.pipeline} does not divide model.layers ({model.layers}); "
                f"{_largest_divisor(model.layers, parallel.pipeline)} would do"
            )
        kv_heads, trading = model.kv_heads // tensor, parallel.heads_ranks
        if kv_heads % trading:
            name, way_out = ("context_heads", "") if parallel.gists_ranks > 1 else ("context", ", or context_method: gists")
            errors.append(
                f"parallel.{name}: {trading} does not divide the {kv_heads} KV heads of a rank, as ulysses needs; "
                f"{_largest_divisor(kv_heads, trading)} would do{way_out}"
            )
        if parallel.gists_ranks > 1 and model.attention == "dense":
            errors.append("parallel.context: dense attention has no gists to exchange; set context_method: ulysses")
        return errors

    @property
    def folding(self) -> GistConfig | None:
        """How the model folds tokens; None where it is dense."""
        return self.gist if self.model.attention == "gist" else None

    @cached_property
    def stages(self) -> tuple[RunStage, ...]:
        """All of the run's stages, in order; one where `train.stages` has none."""
        return tuple(run_stages(self))

    def stage(self, step: int) -> RunStage:
        """That of a step (counted from 1; what lies outside the run belongs to its first or last stage)."""
        return next((stage for stage in self.stages if step <= stage.last), self.stages[-1])

    def at(self, step: int) -> RunConfig:
        """What holds in a step (counted from 1)."""
        return self.stage(step).config

    def after(self, step: int) -> RunConfig:
        """What a checkpoint after ``step`` steps is: its model as the last step had it, to be read as the run's settings say."""
        if not self.train.stages:
            return self
        there = self.at(step)
        train = dataclasses.replace(self.train, stages=())
        return dataclasses.replace(self, model=there.model, data=there.data, train=train)

    def to_dict(self) -> dict:
        """Plain dicts and lists, as in config.yaml."""
        plain = lambda x: [plain(v) for v in x] if isinstance(x, tuple) else x
        return dataclasses.asdict(self, dict_factory=lambda items: {k: plain(v) for k, v in items})

    def to_yaml(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def accumulation_steps(config: RunConfig, data_size: int) -> int:
    """Micro-batches of one rank per step, with stages the most. Raises UserError when a global batch cannot be divided."""
    return max(_accumulation(stage, data_size, len(config.stages) > 1) for stage in config.stages)


def _accumulation(stage: RunStage, data_size: int, several: bool) -> int:
    train = stage.config.train
    samples_at_once = train.micro_batch * data_size
    if train.global_batch % samples_at_once:
        next_fit = -(-train.global_batch // samples_at_once) * samples_at_once
        raise UserError(
            f"{f'stage {stage.title}: ' if several else ''}{stage.place('train.global_batch')}: {train.global_batch} is not a "
            f"multiple of train.micro_batch x data-parallel ranks = {train.micro_batch} x {data_size}; set it to {next_fit}"
        )
    return train.global_batch // samples_at_once


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return max(d for d in range(1, most + 1) if number % d == 0)
