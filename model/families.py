"""The model families of Hugging Face that a model of ours can be: which optional parts each one has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from unfold.model.kinds import WINDOW

# Settings of a model that say which optional parts it has.
PARTS = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "nope_layers")
# Of a dense model the layers whose tokens see the last N raw tokens: none may; all or none, with one N; any, with one N.
NO_WINDOWS, ALL_LAYERS, ANY_LAYERS = "none", "all", "any"


class HasParts(Protocol):
    """What is asked of a model's configuration here."""

    family: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    nope_layers: tuple[int, ...]
    attention: str
    layer_attention: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: its ``model_type``.
        architecture: its causal language model's class.
        fixed: optional parts that every model of it has (True) or lacks (False); the others are free.
        one_attention_bias: whether one key says of all four attention projections that they have a bias.
        windows: which layers may have one.
    """

    name: str
    architecture: str
    fixed: Mapping[str, bool] = field(default_factory=dict)
    one_attention_bias: bool = True
    windows: str = NO_WINDOWS

    def objections(self, config: HasParts) -> list[str]:
        """What of a model this family cannot hold, as readable parts of a sentence."""
        found = [
            f"{part}: {getattr(config, part)!r}, but {self.name} always has {'one' if must else 'none'}"
            for part, must in self.fixed.items()
            if bool(getattr(config, part)) != must
        ]
        if self.one_attention_bias and config.qkv_bias != config.output_bias:
            found.append(f"output_bias: {config.output_bias}, but {self.name} has it where it has qkv_bias ({config.qkv_bias})")
        return found + self._window_objections(config)

    def _window_objections(self, config: HasParts) -> list[str]:
        """Of a dense model; what layers do with gists an export says beside what its family does."""
        kinds = config.layer_attention
        windows = {kind for kind in kinds if kind.startswith(WINDOW)}
        if config.attention != "dense" or not windows:
            return []
        has = f"layer_attention: {', '.join(kinds)}, but {self.name} has"
        if self.windows == NO_WINDOWS:
            return [f"{has} no windows"]
        if len(windows) > 1:
            return [f"{has} windows of one size"]
        if self.windows == ALL_LAYERS and len(set(kinds)) > 1:
            return [f"{has} a window in every layer or in none"]
        return []


def _only(*parts: str) -> dict[str, bool]:
    return {part: part in parts for part in PARTS}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", {"qk_norm": False, "nope_layers": False}),
        Family("qwen2", "Qwen2ForCausalLM", _only("qkv_bias"), one_attention_bias=False, windows=ANY_LAYERS),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True, "mlp_bias": False, "nope_layers": False}, windows=ANY_LAYERS),
        Family("mistral", "MistralForCausalLM", _only(), windows=ALL_LAYERS),
        Family("smollm3", "SmolLM3ForCausalLM", {"qk_norm": False}, windows=ANY_LAYERS),
    )
}


def find_family(config: HasParts) -> tuple[Family | None, list[str]]:
    """The family that a model asks for, else the first that can hold it; and what speaks against it."""
    if config.family:
        family = FAMILIES.get(config.family)
        if family is None:
            return None, [f"family: {config.family!r} is not one of {', '.join(FAMILIES)}"]
        return family, family.objections(config)
    for family in FAMILIES.values():
        if not family.objections(config):
            return family, []
    parts = ", ".join(part for part in (*PARTS, "layer_attention") if getattr(config, part))
    return None, [f"family: none of {', '.join(FAMILIES)} has just {parts}; such a model could not be exported"]
