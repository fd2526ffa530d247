"""How the samples of a micro-batch are divided over ranks: which of their tokens each of them holds.

Later tokens of a document see more gists than earlier ones, so equal parts one after another are unequal work: twice the mean
for the last of many ranks in one long document. Here a rank holds several short slices instead, and which ones follows from what
their tokens see: the slice with most work goes to the rank with least, until all have equally many. All ranks know the layout,
so all find the same. Where every rank attends to whole sequences (Ulysses) a rank holds one slice, and ranks follow one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals
from unfold.model.config import CONTEXT_SLICES


@dataclass(frozen=True)
class Division:
    """Every sample's T tokens over n ranks; a rank holds its tokens in their order.

    Attributes:
        tokens: T, a multiple of n x slices of a rank.
        numbers: of each rank which slices, counted from the first token, it holds; ascending, equally many.
    """

    tokens: int
    numbers: tuple[tuple[int, ...], ...]

    @classmethod
    def in_a_row(cls, tokens: int, ranks: int) -> Division:
        """One slice per rank, in the order of the ranks."""
        return cls(tokens, tuple((rank,) for rank in range(ranks)))

    @classmethod
    def even(cls, layers: Sequence[Intervals], ranks: int) -> Division:
        """CONTEXT_SLICES per rank, so that all have the same work while forgetting, as far as whole slices can.

        layers: what their tokens see, in a part of the layers that stands for them all.
        """
        count = ranks * CONTEXT_SLICES
        work = sum(map(seen_by_tokens, layers)).unflatten(0, (count, -1)).sum(1).tolist()
        numbers: list[list[int]] = [[] for _ in range(ranks)]
        open_ranks = [(0, rank) for rank in range(ranks)]
        for number in sorted(range(count), key=lambda n: (-work[n], n)):
            done, rank = heapq.heappop(open_ranks)
            numbers[rank].append(number)
            if len(numbers[rank]) < CONTEXT_SLICES:
                heapq.heappush(open_ranks, (done + work[number], rank))
        return cls(layers[0].tokens, tuple(tuple(sorted(own)) for own in numbers))

    def __post_init__(self):
        assert self.tokens % (self.ranks * self.slices) == 0, f"{self} leaves tokens over"

    @property
    def ranks(self) -> int:
        return len(self.numbers)

    @property
    def slices(self) -> int:
        """Of a rank."""
        return len(self.numbers[0])

    @property
    def held(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.ranks

    @property
    def length(self) -> int:
        """Tokens of a slice."""
        return self.held // self.slices

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The tokens ``[start, stop)`` of a rank's slices."""
        return [(n * self.length, (n + 1) * self.length) for n in self.numbers[rank]]

    def part(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """What a rank holds of a tensor that covers whole samples along ``dim``."""
        assert x.shape[dim] == self.tokens, f"{x.shape[dim]} tokens, divided were {self.tokens}"
        return torch.cat([x.narrow(dim, start, self.length) for start, _ in self.spans(rank)], dim)

    def joined(self, parts: list[Tensor], dim: int) -> Tensor:
        """Whole samples from the parts of all ranks: the inverse of :meth:`part`."""
        pieces = {}
        for own, part in zip(self.numbers, parts):
            pieces |= zip(own, part.chunk(self.slices, dim))
        return torch.cat([pieces[number] for number in sorted(pieces)], dim)

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
