"""How a sequence is divided over ranks: which tokens of every sample each of them holds.

Later tokens see more gists than earlier ones. So a rank holds two slices of 2 n equal ones, one from the front and one from the
back, the i-th and the i-th last: then all have the same work, in one long document exactly. Where every rank attends to whole
sequences (Ulysses) a rank holds one slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals


@dataclass(frozen=True)
class Division:
    """Every sample's T tokens over n ranks; a rank holds its tokens in their order.

    Attributes:
        ranks: n.
        tokens: T, a multiple of n x slices.
        slices: of a rank, 1 or 2.
    """

    ranks: int
    tokens: int
    slices: int = 2

    def __post_init__(self):
        assert self.slices in (1, 2) and self.tokens % (self.ranks * self.slices) == 0, f"{self} leaves tokens over"

    @property
    def held(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.ranks

    @property
    def length(self) -> int:
        """Tokens of a slice."""
        return self.held // self.slices

    def numbers(self, rank: int) -> tuple[int, ...]:
        """Which slices of all, counted from the first token, a rank holds."""
        return (rank, 2 * self.ranks - 1 - rank)[: self.slices]

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The tokens ``[start, stop)`` of a rank's slices."""
        return [(n * self.length, (n + 1) * self.length) for n in self.numbers(rank)]

    def part(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """What a rank holds of a tensor that covers whole samples along ``dim``."""
        assert x.shape[dim] == self.tokens, f"{x.shape[dim]} tokens, divided were {self.tokens}"
        return torch.cat([x.narrow(dim, start, self.length) for start, _ in self.spans(rank)], dim)

    def joined(self, parts: list[Tensor], dim: int) -> Tensor:
        """Whole samples from the parts of all ranks: the inverse of :meth:`part`."""
        pieces = {}
        for rank, part in enumerate(parts):
            pieces |= zip(self.numbers(rank), part.chunk(self.slices, dim))
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


def visible_pairs(intervals: Intervals, division: Division) -> list[int]:
    """(query, key) pairs that one layer's attention computes on every rank while forgetting, in all samples."""
    return sum_by_rank((intervals.hi - intervals.lo).sum((0, 1), dtype=torch.int64), division)


def sum_by_rank(numbers: Tensor, division: Division) -> list[int]:
    """Sums over the tokens of every rank. numbers: int64 [T]."""
    before = torch.nn.functional.pad(numbers.cumsum(0), (1, 0)).tolist()
    return [sum(before[stop] - before[start] for start, stop in division.spans(rank)) for rank in range(division.ranks)]


def imbalance(pairs: list[int]) -> float:
    """The most of any rank over the mean: how much longer all wait than they would with equal shares."""
    return max(pairs) * len(pairs) / max(1, sum(pairs))
