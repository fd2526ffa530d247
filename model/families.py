"""The model families of Hugging Face that a model of ours can be: which optional parts each one has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

# Settings of a model that say which optional parts it has.
PARTS = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "nope_layers")


class HasParts(Protocol):
    """What is asked of a model's configuration here."""

    family: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    nope_layers: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: its ``model_type``.
        architecture: its causal language model's class.
        fixed: optional parts that every model of it has (True) or lacks (False); the others are free.
        one_attention_bias: whether one key says of all four attention projections that they have a bias.
    """

    name: str
    architecture: str
    fixed: Mapping[str, bool] = field(default_factory=dict)
    one_attention_bias: bool = True

    def objections(self, config: HasParts) -> list[str]:
        """What of a model this family cannot hold, as readable parts of a sentence."""
        found = [
            f"{part}: {getattr(config, part)!r}, but {self.name} always has {'one' if must else 'none'}"
            for part, must in self.fixed.items()
            if bool(getattr(config, part)) != must
        ]
        if self.one_attention_bias and config.qkv_bias != config.output_bias:
            found.append(f"output_bias: {config.output_bias}, but {self.name} has it where it has qkv_bias ({config.qkv_bias})")
        return found


def _only(*parts: str) -> dict[str, bool]:
    return {part: part in parts for part in PARTS}


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", {"qk_norm": False, "nope_layers": False}),
        Family("qwen2", "Qwen2ForCausalLM", _only("qkv_bias"), one_attention_bias=False),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True, "mlp_bias": False, "nope_layers": False}),
        Family("mistral", "MistralForCausalLM", _only()),
        Family("smollm3", "SmolLM3ForCausalLM", {"qk_norm": False}),
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
    parts = ", ".join(part for part in PARTS if getattr(config, part))
    return None, [f"family: none of {', '.join(FAMILIES)} has just {parts}; such a model could not be exported"]
