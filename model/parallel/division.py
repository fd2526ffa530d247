"""How the samples of a micro-batch are divided over ranks: which of their tokens each of them holds.

Later tokens of a document see more gists than earlier ones, so equal parts one after another are unequal work: twice the mean
for the last of many ranks in one long document. Here ranks hold equally many tokens that see equally many keys, in few slices.
Of n neighbouring stretches of 1 / n of the tokens one sees at least 1 / n of the keys and one at most so many; a stretch that
moves from the one to the other, token by token, sees hardly more or less each time, and so passes one that sees 1 / n of them.
A rank takes that; what remains closes ranks, and the next one looks for the like there. A stretch across a gap is several slices.
All ranks know the layout, so all find the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals

Span = tuple[int, int]  # tokens [start, stop) of a sample


@dataclass(frozen=True)
class Division:
    """Every sample's T tokens over n ranks; a rank holds its tokens in their order.

    Attributes:
        tokens: T, a multiple of n.
        spans: of each rank its slices, ascending; T / n tokens together.
    """

    tokens: int
    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def whole(cls, tokens: int) -> Division:
        """One rank has all."""
        return cls(tokens, (((0, tokens),),))

    @classmethod
    def even(cls, layers: Sequence[Intervals], ranks: int) -> Division:
        """All have the same work while forgetting, as far as whole tokens can.

        layers: what their tokens see, in a part of the layers that stands for them all.
        """
        tokens = layers[0].tokens
        work = sum(map(seen_by_tokens, layers)).cpu().numpy()
        rest, spans = [(0, tokens)], []
        for left in range(ranks, 1, -1):
            start = _even_stretch(np.concatenate([work[slice(*span)] for span in rest]), left)
            own, rest = _taken(rest, start, start + tokens // ranks)
            spans.append(tuple(own))
        return cls(tokens, (*spans, tuple(rest)))

    def __post_init__(self):
        sums = {sum(stop - start for start, stop in own) for own in self.spans}
        assert sums == {self.held} and self.held * self.ranks == self.tokens, f"{self} leaves tokens over"

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @property
    def slices(self) -> int:
        """Of the rank that has most."""
        return max(map(len, self.spans))

    @property
    def held(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.ranks

    def part(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """What a rank holds of a tensor that covers whole samples along ``dim``."""
        assert x.shape[dim] == self.tokens, f"{x.shape[dim]} tokens, divided were {self.tokens}"
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.spans[rank]], dim)

    def joined(self, parts: list[Tensor], dim: int) -> Tensor:
        """Whole samples from the parts of all ranks: the inverse of :meth:`part`."""
        pieces = {}
        for own, part in zip(self.spans, parts):
            pieces |= zip(own, part.split([stop - start for start, stop in own], dim))
        return torch.cat([pieces[span] for span in sorted(pieces)], dim)

    def homes(self, device: torch.device | str = "cpu") -> Homes:
        """Where each token is held."""
        index = torch.arange(self.tokens, device=device)
        order = torch.cat([self.part(index, 0, rank) for rank in range(self.ranks)])
        at = torch.empty_like(order)
        at[order] = index
        return Homes(at // self.held, at % self.held, order, at, self.ranks, self.held)


@dataclass(frozen=True)
class Homes:
    """Where each of T tokens is held.

    Attributes:
        rank: [T] int64.
        place: [T] int64, its place among that rank's tokens.
        order: [T] int64, the tokens of rank 0, of rank 1, ..
        at: [T] int64, where a token stands in that order.
        ranks, held: how many, and tokens of each.
    """

    rank: Tensor
    place: Tensor
    order: Tensor
    at: Tensor
    ranks: int
    held: int

    def by_rank(self, x: Tensor) -> Tensor:
        """[.., T] -> [.., n, T / n]"""
        return x.index_select(-1, self.order).unflatten(-1, (self.ranks, self.held))

    def by_token(self, x: Tensor) -> Tensor:
        """[.., n, T / n] -> [.., T]"""
        return x.flatten(-2).index_select(-1, self.at)

    def tokens_of(self, rank: int) -> Tensor:
        """[T / n] int64, those of a rank, ascending."""
        return self.order[rank * self.held : (rank + 1) * self.held]


def _even_stretch(work: np.ndarray, ranks: int) -> int:
    """Where the stretch of 1 / ``ranks`` of the tokens begins whose work is closest to that part of all. work: int64 [tokens]."""
    before = np.concatenate([[0], np.cumsum(work)])
    length = len(work) // ranks
    return int(np.abs((before[length:] - before[: len(before) - length]) * ranks - before[-1]).argmin())


def _taken(spans: list[Span], first: int, last: int) -> tuple[list[Span], list[Span]]:
    """(tokens ``first .. last``, counted through the spans; the rest), both as spans."""
    taken, rest, before = [], [], 0
    for start, stop in spans:
        a, b = (min(max(start + x - before, start), stop) for x in (first, last))
        taken += [(a, b)] if a < b else []
        # A span that lies wholly after or before the stretch stays one.
        rest += [span for span in ((start, a), (b, stop)) if span[0] < span[1]] if a < b else [(start, stop)]
        before += stop - start
    return taken, rest


def seen_by_tokens(intervals: Intervals) -> Tensor:
    """int64 [T], keys that a token sees while forgetting, summed over the samples."""
    return (intervals.hi - intervals.lo).sum((0, 1), dtype=torch.int64)


def visible_pairs(intervals: Intervals, division: Division) -> list[int]:
    """(query, key) pairs that one layer's attention computes on every rank while forgetting, in all samples."""
    return sum_by_rank(seen_by_tokens(intervals), division)


def sum_by_rank(numbers: Tensor, division: Division) -> list[int]:
    """Sums over the tokens of every rank. numbers: int64 [T]."""
    return [int(division.part(numbers, 0, rank).sum()) for rank in range(division.ranks)]


def imbalance(pairs: list[int]) -> float:
    """The most of any rank over the mean: how much longer all wait than they would with equal shares."""
    return max(pairs) * len(pairs) / max(1, sum(pairs))
