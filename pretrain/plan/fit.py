"""Which setting to change when a layout does not fit into the GPUs' memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError

MOST_CHANGES = 5
WORTH = 0.8  # a change that leaves more of the memory in use is not worth its cost while others save more


@dataclass(frozen=True)
class Change:
    """A setting's new value, and the configuration with it."""

    text: str
    config: RunConfig


def with_setting(config: RunConfig, section: str, **values) -> RunConfig:
    """The configuration with some values of a section replaced. Raises ValueError where it contradicts itself."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _settings(config: RunConfig, gpus_per_node: int) -> Iterator[tuple[str, str, object]]:
    """(section, setting, value) of single changes that save memory, the cheapest in time first."""
    train, parallel = config.train, config.parallel
    smaller = train.micro_batch // 2
    while smaller:
        yield "train", "micro_batch", smaller
        smaller //= 2
    if parallel.tensor > 1 and not parallel.sequence:
        yield "parallel", "sequence", True
    if train.mlp_tiles == 1:
        yield "train", "mlp_tiles", 8
    if train.activation_checkpointing == "none":
        yield "train", "activation_checkpointing", "selective"
    if train.activation_checkpointing != "full":
        yield "train", "activation_checkpointing", "full"
    for zero in range(parallel.zero + 1, 4):
        yield "parallel", "zero", zero
    for name, most in (("tensor", gpus_per_node), ("pipeline", config.model.layers), ("context", gpus_per_node)):
        value = 2 * getattr(parallel, name)
        while value <= most:
            yield "parallel", name, value
            value *= 2
    if not train.offload_activations:
        yield "train", "offload_activations", True
    if parallel.offload == "none":
        yield "parallel", "offload", "optimizer"
    if parallel.offload != "all":
        yield "parallel", "offload", "all"


def _changes(config: RunConfig, gpus_per_node: int) -> Iterator[Change]:
    for section, name, value in _settings(config, gpus_per_node):
        try:
            changed = with_setting(config, section, **{name: value})
        except ValueError:
            continue  # the configuration refuses it: not a way out
        shown = str(value).lower() if isinstance(value, bool) else value
        yield Change(f"{section}.{name}={shown}", changed)


def suggest(config: RunConfig, gpus_per_node: int, usable: float, peak: Callable[[RunConfig], float]) -> list[str]:
    """Changes with which ``peak`` (bytes; raises UserError for layouts the ranks cannot be divided into) is at most
    ``usable``: the first single one that does, else the first that saves a good part and one more, and so on.

    Returns:
        ``section.setting=value`` each; empty when nothing helps.
    """
    made: list[str] = []
    before = peak(config)
    for _ in range(MOST_CHANGES):
        tried: list[tuple[float, Change]] = []
        for change in _changes(config, gpus_per_node):
            try:
                size = peak(change.config)
            except UserError:
                continue
            if size <= usable:
                return [*made, change.text]
            tried.append((size, change))
        if not tried:
            return []
        worth = [item for item in tried if item[0] <= WORTH * before]
        before, change = worth[0] if worth else min(tried, key=lambda item: item[0])
        made, config = [*made, change.text], change.config
    return []
