"""Models of Llama shape: names and shapes of Hugging Face's ``LlamaForCausalLM`` and ``Qwen2ForCausalLM``, and of ours.

The two differ in one thing that we have: Qwen2's query, key and value projections have a bias (``model.qkv_bias``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import ModelConfig

Split = Callable[[Tensor, ModelConfig], list[Tensor]]
Join = Callable[[Sequence[Tensor], ModelConfig], Tensor]
Condition = Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, the Hugging Face parameters that hold it, and which models have it. ``{i}`` stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    split: Split = lambda x, config: [x]
    join: Join = lambda parts, config: parts[0]
    present: Condition = lambda config: True


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


NAMES = (
    Entry("embedding.weight", ("model.embed_tokens.weight",), _cut_vocabulary, _pad_vocabulary),
    Entry("layers.{i}.attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",)),
    Entry(
        "layers.{i}.attention.qkv.weight",
        tuple(f"model.layers.{{i}}.self_attn.{name}_proj.weight" for name in "qkv"),
        _split_qkv,
        _join_qkv,
    ),
    Entry(
        "layers.{i}.attention.qkv.bias",
        tuple(f"model.layers.{{i}}.self_attn.{name}_proj.bias" for name in "qkv"),
        _split_qkv,
        _join_qkv,
        lambda config: config.qkv_bias,
    ),
    Entry("layers.{i}.attention.output.weight", ("model.layers.{i}.self_attn.o_proj.weight",)),
    Entry("layers.{i}.mlp_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
    Entry(
        "layers.{i}.mlp.gate_up.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        lambda x, config: list(x.chunk(2)),
        lambda parts, config: torch.cat(tuple(parts)),
    ),
    Entry("layers.{i}.mlp.down.weight", ("model.layers.{i}.mlp.down_proj.weight",)),
    Entry("final_norm.weight", ("model.norm.weight",)),
    Entry("head.weight", ("lm_head.weight",), _cut_vocabulary, _pad_vocabulary, lambda config: not config.tied_embeddings),
)


def entries(config: ModelConfig) -> list[Entry]:
    """The map of one model, written out for every layer."""
    result = []
    for entry in NAMES:
        if not entry.present(config):
            continue
        layers = range(config.layers) if "{i}" in entry.ours else [0]
        for i in layers:
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


def _rope_parameters(config: ModelConfig) -> dict:
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": scaling.kind,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _family(config: ModelConfig) -> dict:
    """The keys in which the two families differ."""
    if config.qkv_bias:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}


def hf_config(config: ModelConfig, dtype: str, bos: int | None, eos: int | None, pad: int | None) -> dict:
    """``config.json``. Keys of both generations are written (rope_parameters / rope_theta, dtype / torch_dtype): a reader
    that misses its own would silently fall back to defaults."""
    rope = _rope_parameters(config)
    is_scaled = rope["rope_type"] != "default"
    return _family(config) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if is_scaled else None,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
