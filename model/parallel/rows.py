"""Short sequences for context parallelism: which tokens a rank has, and visible sets and gist trees over just those.

Rows keep their order when unseen ones are dropped, so a range that is kept whole stays a range: its ends are counts of kept
rows before them. Everything here is derived from whole layouts, which all ranks know; no keys or values are touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals
from unfold.kernels.tree import GistTree
from unfold.model.parallel.division import Homes


def seen_tokens(intervals: Intervals, sample: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The tokens that some ranges of rows hold: bool [B, T]. sample: int64, lo, hi: int, all [n], one of each per range."""
    batch, rows = intervals.rows.shape
    edges = torch.zeros(batch * (rows + 1), dtype=torch.int32, device=intervals.rows.device)
    one = torch.ones_like(sample, dtype=torch.int32)
    edges.index_add_(0, sample * (rows + 1) + lo, one).index_add_(0, sample * (rows + 1) + hi, -one)
    seen_rows = edges.view(batch, -1).cumsum(1)[:, :rows] > 0
    seen = torch.zeros(batch, intervals.tokens, dtype=torch.int32, device=edges.device)
    return seen.scatter_add_(1, intervals.rows, seen_rows.int()) > 0


def seen_by(intervals: Intervals, queries: Tensor) -> Tensor:
    """The tokens that some queries of every sample see: bool [B, T]. queries: [n] int64, tokens."""
    lo, hi = (x.index_select(2, queries).flatten() for x in (intervals.lo, intervals.hi))
    sample = torch.arange(intervals.batch, device=lo.device)[:, None].expand(-1, len(lo) // intervals.batch)
    return seen_tokens(intervals, sample.flatten(), lo, hi)


def padded_indices(masks: Tensor, length: int) -> Tensor:
    """bool [.., T] -> int64 [.., length], the places of True in order, filled up with the first place."""
    order = (~masks).int().argsort(dim=-1, stable=True)[..., :length]
    place = torch.arange(length, device=masks.device)
    return torch.where(place < masks.sum(-1, keepdim=True), order, order[..., :1])


@dataclass(frozen=True)
class Exports:
    """What the ranks of a group send to all others. E is the most that any of them sends.

    Attributes:
        exported: [B, E] int64, tokens of this rank's part that others see; the rest repeats one of them.
        source: [B, T] int64, where a token lies in (own part, then the n ranks' exports); means nothing for one in neither.
        sent: tokens of this rank's part that others see, of the sample with most.
    """

    exported: Tensor
    source: Tensor
    sent: int

    @classmethod
    def of(cls, seen: Tensor, homes: Homes, rank: int) -> Exports:
        """seen: bool [n, B, T], what the queries of each rank see; alike on all ranks, so nothing needs to be negotiated."""
        exports = (seen & ~_held(homes)).any(0)  # [B, T], seen by another rank than its own
        by_rank = homes.by_rank(exports)  # [B, n, T / n]
        most = max(1, int(by_rank.sum(-1).max()))
        exported = padded_indices(by_rank[:, rank], most)
        exported = torch.where(by_rank[:, rank].any(-1, keepdim=True), exported, 0)
        number = homes.by_token(by_rank.cumsum(-1) - 1)  # among what its rank exports
        source = torch.where(homes.rank == rank, homes.place, homes.held + homes.rank * most + number)
        return cls(exported, source, int(by_rank[:, rank].sum(-1).max()))


def had(seen: Tensor, homes: Homes) -> Tensor:
    """The tokens that each rank has, once exports are exchanged: bool [n, B, T]. seen: as of :meth:`Exports.of`."""
    return seen | _held(homes)


def _held(homes: Homes) -> Tensor:
    """bool [n, 1, T], the tokens that each rank holds."""
    return (homes.rank == torch.arange(homes.ranks, device=homes.rank.device)[:, None])[:, None]


@dataclass(frozen=True)
class Kept:
    """The tokens that a rank has, in their order: a short sequence of N places.

    Attributes:
        mask: bool [B, T], which tokens.
        near: [B, N] int64, the token in each place; places beyond a sample's kept tokens repeat its first one.
        place: [B, T] int64, the place of each kept token.
        tokens: [T / n] int64, this rank's own tokens of every sample, ascending.
        rows_before: [B, T + 1] int64, kept rows before a row of the whole sequence.
        target: [B, T] int64, the new row of each row outside the sink segment; N for one that is dropped.
    """

    mask: Tensor
    near: Tensor
    place: Tensor
    tokens: Tensor
    rows_before: Tensor
    target: Tensor

    @classmethod
    def of(cls, mask: Tensor, intervals: Intervals, tokens: Tensor) -> Kept:
        """mask: bool [B, T] of the tokens of ``intervals``; tokens: this rank's own."""
        length = int(mask.sum(-1).max())
        kept_rows = mask.gather(1, intervals.rows[:, : intervals.tokens])
        before = torch.nn.functional.pad(kept_rows.cumsum(1), (1, 0))
        target = torch.where(kept_rows, before[:, :-1], length)
        return cls(mask, padded_indices(mask, length), mask.cumsum(-1) - 1, tokens, before, target)

    @property
    def length(self) -> int:
        return self.near.shape[1]

    @property
    def own(self) -> Tensor:
        """[B, T / n] int64, places of this rank's tokens."""
        return self.place.index_select(1, self.tokens)

    def by_row(self, values: Tensor, empty: int) -> Tensor:
        """[B, T] by row of the whole sequence -> [B, N] by new row; ``empty`` in rows beyond a sample's kept tokens."""
        spare = values.new_full((values.shape[0], self.length + 1), empty)
        # Kernels index the tables flat: a view over the spare column would shift every sample but the first.
        return spare.scatter_(1, self.target, values)[:, : self.length].contiguous()

    def intervals(self, whole: Intervals) -> Intervals:
        """The intervals of the kept tokens, in which only this rank's queries see anything; their ranges are kept whole."""
        batch, tokens = self.mask.shape
        segments, length, device = whole.segments, self.length, self.mask.device
        # Places beyond a sample's kept tokens stand at the end of the raw segment and see nothing.
        spare = torch.arange(length + 1, device=device).repeat(batch, 1)
        rows = spare.scatter_(1, self.target, self.place.gather(1, whole.rows[:, :tokens]))[:, :length]
        sink_tokens = whole.rows[:, tokens:]
        sinks = torch.where(self.mask.gather(1, sink_tokens), self.place.gather(1, sink_tokens), 0)
        row_of = torch.empty_like(rows).scatter_(1, rows, torch.arange(length, device=device).expand(batch, -1))
        ends, own = [], self.own[:, None].expand(-1, segments, -1)
        for bound in (whole.lo, whole.hi):
            mine = bound.index_select(2, self.tokens).long()  # [B, S, T / n]
            inner = self.rows_before[:, None].expand(-1, segments - 1, -1).gather(2, mine[:, :-1])
            mapped = torch.cat([inner, mine[:, -1:] - tokens + length], 1).to(torch.int32)
            full = torch.zeros(batch, segments, length, dtype=torch.int32, device=device)
            ends.append(full.scatter_(2, own, mapped))
        start = self.rows_before.gather(1, whole.segment_start[:, : segments - 1].long())
        tail = torch.tensor([[length, length + sinks.shape[1]]], device=device).expand(batch, -1)
        return Intervals(torch.cat([rows, sinks], 1), row_of, *ends, torch.cat([start, tail], 1).to(torch.int32))

    def tree(self, whole: GistTree) -> GistTree:
        """The tree of the kept tokens, for the queries of ``whole``: :func:`queries_among` leaves this rank's.

        What stands behind a gist is right where all of it is kept.
        """
        tokens, length, sample = whole.others.tokens, self.length, whole.tokens // whole.others.tokens
        count = self.rows_before
        child_lo, child_hi = (self.by_row(count.gather(1, x.long()).int(), 0) for x in (whole.child_lo, whole.child_hi))
        above = whole.parent.clamp(min=0).long()
        has_parent = (whole.parent >= 0) & (self.target.gather(1, above) < length)
        parent = self.by_row(torch.where(has_parent, count.gather(1, above), -1).int(), -1)
        mapped = lambda x: count[sample, x.long()].int()  # [.., N] rows outside the sink segment
        lo, hi = (torch.cat([mapped(x[:-1]), x[-1:] - tokens + length]) for x in (whole.lo, whole.hi))
        at = sample * length + self.place[sample, whole.tokens % tokens]
        others = self.intervals(whole.others)
        return GistTree(others, child_lo, child_hi, parent, at, whole.splits, lo, hi, mapped(whole.tail), whole.span)


def queries_among(tree: GistTree, chosen: Tensor) -> GistTree:
    """The same tree with the recalling queries among some tokens of every sample alone: bool [T]."""
    mine = chosen[tree.tokens % tree.others.tokens].nonzero()[:, 0]
    counts = torch.bincount(tree.tokens[mine] // tree.others.tokens, minlength=tree.others.batch)
    splits = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).tolist()
    lo, hi, tail = (x.index_select(1, mine) for x in (tree.lo, tree.hi, tree.tail))
    whole = (tree.others, tree.child_lo, tree.child_hi, tree.parent)
    return GistTree(*whole, tree.tokens[mine], tuple(splits), lo, hi, tail, tree.span[mine])


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, h, D], index [B, N] -> [B, N, h, D]"""
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[batch, index]
