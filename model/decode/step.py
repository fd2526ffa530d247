"""Attention of new tokens over the caches of their sequences: keeps their keys and values, then one call of the op for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.decode import Step, decode_attention
from unfold.kernels.select import SelectRule
from unfold.model.decode.cache import SequenceCache
from unfold.model.gist.growing import Sight, recalls_in


@dataclass(frozen=True)
class NewTokens:
    """A few tokens that one sequence is about to read; its outline holds them already, its layers not yet.

    Attributes:
        cache: the sequence's.
        sight: of the n tokens.
    """

    cache: SequenceCache
    sight: Sight

    @property
    def last_raw(self) -> int:
        """Which of the tokens is the last raw one, after which the next token is chosen; gists may follow it."""
        segment = self.sight.segment.tolist()
        return len(segment) - 1 - segment[::-1].index(len(self.sight.lo) - 1)


def step_of(caches: Sequence[SequenceCache], sights: Sequence[Sight]) -> Step:
    """The new tokens of some sequences, one after another, in layers of one kind. sights: of each sequence's tokens there."""
    join = lambda name: torch.cat([getattr(sight, name) for sight in sights], -1)
    ranges = (join(name) for name in ("lo", "hi", "sinks", "hi", "tail", "span", "recalls"))
    return Step([cache.outline for cache, sight in zip(caches, sights) for _ in sight.recalls], *ranges)


class StepAttention:
    """Every new token of a batch of sequences attends to its own cache; an :data:`unfold.model.visibility.Attend` of one row.

    Args:
        batch: the sequences; their tokens stand one after another in the row.
        rule: how gists are selected; None where nothing recalls.
        first: the first layer that recalls.
    """

    def __init__(self, batch: Sequence[NewTokens], rule: SelectRule | None, first: int):
        self.batch, self.rule, self.first = batch, rule, first
        self.caches = [new.cache for new in batch for _ in new.sight.recalls]
        views, caches = [new.cache.views(new.sight) for new in batch], [new.cache for new in batch]
        self.steps = {kind: step_of(caches, [view[kind] for view in views]) for kind in views[0]}

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, T, H, D], k, v [1, T, Hkv, D] -> [1, T, H, D]"""
        at = 0
        for new in self.batch:
            after = at + len(new.sight.recalls)
            new.cache.append(index, new.sight.segment, k[0, at:after], v[0, at:after])
            at = after
        kind = self.caches[0].kinds[index]
        step = self.steps[kind] if recalls_in(index, self.first, kind) else self.steps[kind].forgetting()
        return decode_attention(q[0], [cache.layers[index] for cache in self.caches], step, self.rule)[None]
