"""The name map between our parameters and those of Hugging Face's Llama-shaped models, used in both directions.

One table serves all families of :mod:`unfold.model.families`: they share names, and each entry says which models have it. It also
says how tensor parallelism splits a parameter and in which pieces a checkpoint holds it, so importing, exporting, checking
shapes and counting parameters follow from the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unfold.model.config import ModelConfig

Split = Callable[[Tensor, ModelConfig], list[Tensor]]
Join = Callable[[Sequence[Tensor], ModelConfig], Tensor]
Shape = Callable[[ModelConfig], tuple[int, ...]]
Condition = Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the Hugging Face parameters that hold it. ``{i}`` stands for the layer.

    Attributes:
        ours: its canonical name.
        theirs: their names.
        shape: of ours, whole.
        partition: the dimension that tensor parallelism splits; None where every rank has all of it.
        pieces: tensors that a checkpoint holds it in, equal parts of dimension 0 (each is split by itself).
        split, join: ours -> theirs and back; row blocks are views where possible.
        present: whether a model has it.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: Shape
    partition: int | None = None
    pieces: int = 1
    split: Split = lambda x, config: [x]
    join: Join = lambda parts, config: parts[0]
    present: Condition = lambda config: True

    def piece_names(self) -> list[str]:
        """Names of its checkpoint tensors, without their kind (``model.``)."""
        return [self.ours] if self.pieces == 1 else [f"{self.ours}.{i}" for i in range(self.pieces)]

    def their_shapes(self, config: ModelConfig) -> list[tuple[int, ...]]:
        """Shapes of Hugging Face's parameters."""
        return [tuple(part.shape) for part in self.split(torch.empty(self.shape(config), device="meta"), config)]

    def numel(self, config: ModelConfig) -> int:
        """Number of elements, vocabulary padding included."""
        return math.prod(self.shape(config))


def _split_qkv(x: Tensor, config: ModelConfig) -> list[Tensor]:
    group = config.heads // config.kv_heads
    rows = x.view(config.kv_heads, group + 2, config.head_dim, *x.shape[1:])
    return [part.flatten(0, 2) for part in rows.split([group, 1, 1], 1)]


def _join_qkv(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    rows = [part.view(config.kv_heads, -1, config.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(rows, 1).flatten(0, 2)


def _cut_vocabulary(x: Tensor, config: ModelConfig) -> list[Tensor]:
    return [x[: config.vocab_size]]


def _pad_vocabulary(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    (x,) = parts
    return torch.cat([x, x.new_zeros(config.padded_vocab_size - x.shape[0], x.shape[1])])


def _halves(x: Tensor, config: ModelConfig) -> list[Tensor]:
    return list(x.chunk(2))


def _stack(parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(tuple(parts))


def _vocabulary(ours: str, theirs: str, present: Condition = lambda config: True) -> Entry:
    shape = lambda c: (c.padded_vocab_size, c.hidden_size)
    return Entry(ours, (theirs,), shape, 0, split=_cut_vocabulary, join=_pad_vocabulary, present=present)


def _in_layer(ours: str, theirs: Sequence[str], shape: Shape, partition: int | None = None, **options) -> Entry:
    names = tuple(f"model.layers.{{i}}.{name}" for name in theirs)
    return Entry(f"layers.{{i}}.{ours}", names, shape, partition, **options)


_qkv_rows = lambda c: (c.heads + 2 * c.kv_heads) * c.head_dim
_qkv = lambda kind: tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")
_gate_up = lambda kind: (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
_hidden = lambda c: (c.hidden_size,)
_head_dim = lambda c: (c.head_dim,)

NAMES = (
    _vocabulary("embedding.weight", "model.embed_tokens.weight"),
    _in_layer("attention_norm.weight", ["input_layernorm.weight"], _hidden),
    _in_layer(
        "attention.qkv.weight",
        _qkv("weight"),
        lambda c: (_qkv_rows(c), c.hidden_size),
        0,
        split=_split_qkv,
        join=_join_qkv,
    ),
    _in_layer(
        "attention.qkv.bias",
        _qkv("bias"),
        lambda c: (_qkv_rows(c),),
        0,
        split=_split_qkv,
        join=_join_qkv,
        present=lambda c: c.qkv_bias,
    ),
    _in_layer("attention.q_norm.weight", ["self_attn.q_norm.weight"], _head_dim, present=lambda c: c.qk_norm),
    _in_layer("attention.k_norm.weight", ["self_attn.k_norm.weight"], _head_dim, present=lambda c: c.qk_norm),
    _in_layer("attention.output.weight", ["self_attn.o_proj.weight"], lambda c: (c.hidden_size, c.heads * c.head_dim), 1),
    _in_layer("attention.output.bias", ["self_attn.o_proj.bias"], _hidden, present=lambda c: c.output_bias),
    _in_layer("mlp_norm.weight", ["post_attention_layernorm.weight"], _hidden),
    _in_layer(
        "mlp.gate_up.weight",
        _gate_up("weight"),
        lambda c: (2 * c.ffn_size, c.hidden_size),
        0,
        pieces=2,
        split=_halves,
        join=_stack,
    ),
    _in_layer(
        "mlp.gate_up.bias",
        _gate_up("bias"),
        lambda c: (2 * c.ffn_size,),
        0,
        pieces=2,
        split=_halves,
        join=_stack,
        present=lambda c: c.mlp_bias,
    ),
    _in_layer("mlp.down.weight", ["mlp.down_proj.weight"], lambda c: (c.hidden_size, c.ffn_size), 1),
    _in_layer("mlp.down.bias", ["mlp.down_proj.bias"], _hidden, present=lambda c: c.mlp_bias),
    Entry("final_norm.weight", ("model.norm.weight",), _hidden),
    _vocabulary("head.weight", "lm_head.weight", lambda c: not c.tied_embeddings),
)


def model_entries(config: ModelConfig) -> list[Entry]:
    """The entries that a model has, ``{i}`` left standing."""
    return [entry for entry in NAMES if entry.present(config)]


def entries(config: ModelConfig) -> list[Entry]:
    """The map of one model, written out for every layer."""
    result = []
    for entry in model_entries(config):
        for i in range(config.layers if "{i}" in entry.ours else 1):
            theirs = tuple(name.format(i=i) for name in entry.theirs)
            result.append(replace(entry, ours=entry.ours.format(i=i), theirs=theirs))
    return result


def to_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters (whole, canonical names) -> Hugging Face's, vocabulary padding cut off."""
    result = {}
    for entry in entries(config):
        parts = entry.split(state[entry.ours], config)
        result.update({name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)})
    return result


def from_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of :func:`to_hugging_face`; padding rows of the vocabulary are zero."""
    return {e.ours: e.join([state[name] for name in e.theirs], config) for e in entries(config)}
