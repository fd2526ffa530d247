"""What a model is: frozen dataclasses that check themselves and report everything that is wrong at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from unfold.model.families import find_family
from unfold.model.kinds import Kinds, kind_of, objection
from unfold.model.settings import (
    Bounds,
    Count,
    Natural,
    NotNegative,
    Part,
    Positive,
    Settings,
    field_errors,
    option,
    raise_together,
)

# Settings of gists that training alone follows: a model that is trained is read the same whatever they were.
TRAINING_ONLY = ("unfold_share", "forget_share", "route_loss", "route_queries", "route_far", "choices")


def sizes_name(chunk_sizes: tuple[int, ...]) -> str:
    """Chunk sizes as metrics name them: (8, 4) is 8x4."""
    return "x".join(map(str, chunk_sizes))


def _size_errors(chunk_sizes: tuple[int, ...]) -> list[str]:
    """What is wrong with chunk sizes."""
    if not chunk_sizes:
        return ["chunk_sizes: empty; give one size per gist level, e.g. (8, 4)"]
    return [f"chunk_sizes: {list(chunk_sizes)} has a size below 1"] if any(c < 1 for c in chunk_sizes) else []


@dataclass(frozen=True)
class ChoiceConfig(Settings):
    """Chunk sizes that a sample of training may draw, in place of `gist.chunk_sizes`."""

    chunk_sizes: tuple[int, ...] = option((8, 4), "as gist.chunk_sizes; choices may differ in their number of levels")
    weight: Positive = option(1.0, "how often it is drawn, against the weights of the other choices")

    def __post_init__(self):
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        super().__post_init__()

    def misfits(self) -> list[str]:
        return _size_errors(self.chunk_sizes)


@dataclass(frozen=True)
class GistConfig(Settings):
    """How tokens are folded into gists, and how much of what was folded is recalled."""

    chunk_sizes: tuple[int, ...] = option((8, 4), "raw tokens per level-0 gist, level-0 gists per level-1 gist, ..")
    sink: Natural = option(3, "first raw tokens of a document that every later token sees")
    n_prev: Natural = option(1, "closed neighbour groups that stay visible at every level")
    word_aware: bool = option(
        True,
        "a chunk whose end falls within a word grows by up to half to where the next one starts; false: exactly c0 tokens each",
    )
    recall: Literal["none", "suffix", "all"] = option(
        "none", "which raw tokens unfold chunks: none | suffix (those after the closed context) | all"
    )
    own_group: bool = option(
        False, "of the level below it a gist sees its own group alone, and n_prev holds for raw tokens and among gists of a level"
    )
    links: Natural = option(5, "link tokens after the parts of a linked context, for each part; other data has none")
    recall_from: Count = option(1, "first layer, counted from 0, in which tokens recall; gists of n levels route from layer n on")
    unfold_all: bool = option(False, "recalling tokens unfold everything before them in their document, whatever the budget")
    topk: Count | None = option(None, "gists selected per level and query head; none: the adaptive budget, see budget_ratio")
    top_p: Annotated[float, Bounds(gt=0, lt=1)] | None = option(
        None, "instead of a number of gists: the fewest whose softmax reaches this; between 0 and 1"
    )
    budget_ratio: Count | None = option(
        None, "adaptive budget: T // (budget_ratio * query heads per KV head * c0) + 1 gists; none: the compression ratio"
    )
    share: Literal["head", "group"] = option(
        "head", "KV group of heads: head (each query head selects, all read the union) | group (one selection by summed scores)"
    )
    unfold_share: Part = option(0.0, "training: part of the samples, drawn by their numbers, that unfold everything")
    forget_share: Part = option(0.0, "training: part of the samples, drawn by their numbers, in which nothing recalls")
    route_loss: NotNegative = option(
        0.0, "training: weight of the routing loss, which teaches gists to be found by what attention looks for; 0: none"
    )
    route_queries: Count = option(256, "recalling tokens per sample, drawn by its number, for which the routing loss is taken")
    route_far: bool = option(False, "the routing loss leaves out chunks that are in a query's window anyway; for recall: all")
    choices: tuple[ChoiceConfig, ...] = option(
        (),
        "training: each sample draws chunk sizes among these, by the seed and its number, e.g. [{chunk_sizes: [8]}, "
        "{chunk_sizes: [8, 4], weight: 2}]; chunk_sizes must be one of them, and is what all else takes unasked; empty: none",
    )

    def __post_init__(self):
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        object.__setattr__(self, "choices", tuple(self.choices))
        super().__post_init__()

    def misfits(self) -> list[str]:
        errors = _size_errors(self.chunk_sizes)
        several = [choice.chunk_sizes for choice in self.choices]
        if twice := sorted({sizes for sizes in several if several.count(sizes) > 1}):
            errors.append(f"choices: chunk_sizes {list(twice[0])} stand there twice; give them once, with the sum of the weights")
        if several and self.chunk_sizes not in several:
            told = ", ".join(str(list(sizes)) for sizes in several)
            errors.append(f"chunk_sizes: {list(self.chunk_sizes)} is not among gist.choices ({told}); set it to one of them")
        budgets = [name for name in ("topk", "top_p", "budget_ratio") if getattr(self, name) is not None]
        if len(budgets) > 1:
            errors.append(f"{', '.join(budgets)}: set at most one of them, each is a budget of its own")
        if self.unfold_share + self.forget_share > 1:
            errors.append(f"unfold_share: {self.unfold_share} and forget_share ({self.forget_share}) together exceed 1")
        return errors

    @property
    def levels(self) -> int:
        """Number of gist levels."""
        return len(self.chunk_sizes)

    @property
    def ratio(self) -> int:
        """Compression ratio: raw tokens per top-level gist."""
        return math.prod(self.chunk_sizes)

    @property
    def variants(self) -> tuple[GistConfig, ...]:
        """The same for every choice of chunk sizes; this one alone where there are none."""
        return tuple(self.with_sizes(choice.chunk_sizes) for choice in self.choices) or (self,)

    @property
    def deepest(self) -> int:
        """Gist levels of the choice that has most."""
        return max(variant.levels for variant in self.variants)

    def with_sizes(self, chunk_sizes: tuple[int, ...]) -> GistConfig:
        """The same with these chunk sizes and no choices. Raises SettingsError where they cannot be."""
        return replace(self, chunk_sizes=chunk_sizes, choices=())


@dataclass(frozen=True)
class RopeScaling(Settings):
    """How rotary frequencies are stretched for sequences longer than those of the first training."""

    kind: Literal["default", "linear", "llama3", "yarn"] = option(
        "default",
        "default: not at all; linear: all by factor; llama3: slow ones by factor, as Llama 3.1 and 3.2 do; "
        "yarn: slow ones by factor, and all queries and keys by attention_factor",
    )
    factor: Annotated[float, Bounds(ge=1)] = option(8.0, "linear, llama3, yarn: what (slow) frequencies are divided by")
    low_freq_factor: Positive = option(1.0, "llama3: turns within original_max_position below which a frequency counts as slow")
    high_freq_factor: Positive = option(4.0, "llama3: turns above which a frequency stays; in between it is interpolated")
    original_max_position: Count = option(8192, "llama3, yarn: longest sequence of the first training")
    beta_fast: Positive = option(32.0, "yarn: turns above which a frequency stays")
    beta_slow: Positive = option(1.0, "yarn: turns below which a frequency is divided")
    attention_factor: Positive | None = option(None, "yarn: what queries and keys are multiplied by; none: 0.1 ln(factor) + 1")

    def misfits(self) -> list[str]:
        errors = []
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                errors.append(f"{high}: {getattr(self, high)} must be above {low} ({getattr(self, low)})")
        return errors

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adapters beside the linear layers, in PEFT's conventions. With them the weights themselves stay as they are,
    but for those that train.trainable names."""

    rank: Natural = option(0, "width of every adapter; 0: no adapters")
    alpha: Positive = option(16.0, "an adapter's part of a layer's output is multiplied by alpha / rank")
    rslora: bool = option(False, "by alpha / sqrt(rank) instead")
    targets: tuple[Projection, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "layers that have one, by PEFT's names"
    )
    init_from: str = option("", "directory of a PEFT adapter that a new run starts from; empty: adapters that do nothing yet")

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        super().__post_init__()

    def misfits(self) -> list[str]:
        errors = []
        known = get_args(Projection)
        if unknown := [name for name in self.targets if name not in known]:
            errors.append(f"targets: {', '.join(map(str, unknown))} is not one of {', '.join(known)}")
        if self.rank and not self.targets:
            errors.append(f"targets: empty, with rank: {self.rank}; name at least one layer")
        if self.init_from and not self.rank:
            errors.append(f"init_from: {self.init_from} with rank: 0; set the adapter's rank")
        return errors

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank) if self.rank else 0.0


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A decoder of Llama shape: RMSNorm, SwiGLU, grouped-query attention, rotary positions; its options make it a Qwen2,
    Qwen3, Mistral or SmolLM3 (model/families.py)."""

    vocab_size: Natural = option(0, "vocabulary size, gists included; 0 takes the tokenizer's")
    hidden_size: Count = option(256, "width of the residual stream")
    layers: Count = option(4, "number of layers")
    heads: Count = option(4, "query heads")
    kv_heads: Count = option(2, "key/value heads; divides heads")
    head_dim: Natural = option(0, "width of one head; 0 is hidden_size / heads")
    ffn_size: Count = option(704, "width of the gated feed-forward layer")
    max_position: Count = option(4096, "longest raw sequence that the model is meant for (recorded in exports)")
    rope_theta: Positive = option(10000.0, "base of the rotary frequencies")
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    nope_layers: tuple[int, ...] = option((), "layers, counted from 0, without rotary positions, as every fourth of SmolLM3")
    qkv_bias: bool = option(False, "query, key and value projections have a bias, as in Qwen2")
    output_bias: bool = option(False, "the output projection of attention has a bias")
    mlp_bias: bool = option(False, "gate, up and down projections have a bias")
    qk_norm: bool = option(False, "queries and keys are normalised per head before rotation, as in Qwen3")
    norm_eps: Positive = option(1e-5, "epsilon of RMSNorm")
    tied_embeddings: bool = option(True, "share the input embedding with the output head")
    init_std: NotNegative = option(0.02, "standard deviation of initial weights; residual outputs get it / sqrt(2 * layers)")
    family: str = option(
        "", "architecture of exports: llama, qwen2, qwen3, mistral, smollm3; empty: the first of them that has the model's parts"
    )
    attention: Literal["gist", "dense"] = option(
        "gist", "gist: hierarchical gist sparse attention; dense: causal attention over raw tokens, no gists"
    )
    layer_attention: tuple[str, ...] = option(
        (),
        "kinds of layers, a pattern that is repeated over all of them (a list of one per layer is such a pattern): gist, dense, "
        "window:N (the last N raw tokens, and the sinks where there are gists); empty: every layer as attention says",
    )

    def __post_init__(self):
        object.__setattr__(self, "nope_layers", tuple(self.nope_layers))
        object.__setattr__(self, "layer_attention", tuple(map(str, self.layer_attention)))
        errors = field_errors(self)
        if not errors and self.heads % self.kv_heads:
            errors.append(f"kv_heads: {self.kv_heads} does not divide heads ({self.heads})")
        if not errors and not self.head_dim:
            if self.hidden_size % self.heads:
                errors.append(f"hidden_size: {self.hidden_size} is not a multiple of heads ({self.heads}); set head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // self.heads)
        if not errors and (self.head_dim < 2 or self.head_dim % 2):
            errors.append(f"head_dim: {self.head_dim} must be even, for rotary positions")
        if outside := [i for i in self.nope_layers if not 0 <= i < self.layers]:
            errors.append(f"nope_layers: {outside} are not among the layers 0 to {self.layers - 1}")
        errors += self._kind_errors()
        raise_together(errors + find_family(self)[1])

    def _kind_errors(self) -> list[str]:
        """What is wrong with the kinds of layers."""
        kinds, name = self.layer_attention, f"layer_attention: {', '.join(self.layer_attention)}"
        if wrong := [text for text in map(objection, kinds) if text]:
            return [f"layer_attention: {text}" for text in dict.fromkeys(wrong)]
        if len(kinds) > self.layers:
            return [f"{name} are {len(kinds)} kinds for {self.layers} layers; give at most one per layer"]
        if kinds and self.attention == "gist" and "gist" not in kinds:
            return [f"{name}, but attention: gist; make a layer gist, or set attention: dense"]
        if "gist" in kinds and self.attention == "dense":
            return [f"{name}, but attention: dense, which has no gists; set attention: gist"]
        return []

    @property
    def kinds(self) -> Kinds:
        """Kinds of the layers, see :func:`unfold.model.kinds.kind_of`."""
        return self.layer_attention or self.attention

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of every layer."""
        return [kind_of(self.kinds, index) for index in range(self.layers)]

    def kinds_with(self, gists: bool) -> Kinds:
        """Kinds of the layers for a text with gists or without, whichever the model is for.

        A model with gists that reads a text without them is dense all over, as its export is to a reader that knows no gists.
        Where a dense model reads gists, its dense layers are gist layers.
        """
        if gists == (self.attention == "gist"):
            return self.kinds
        return tuple("gist" if kind == "dense" else kind for kind in self.layer_attention) or "gist" if gists else "dense"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary padded to a multiple of 128, whatever the tensor-parallel size."""
        return -(-self.vocab_size // 128) * 128
