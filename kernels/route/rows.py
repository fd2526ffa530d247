"""The rows that routing reads of a sample, or of the part of it that one rank holds, in blocks of queries.

Within a segment rows are counted from the first one there is here. A group whose gist comes after the part that a rank
holds has a *slot* all the same, behind the gists of its level that are here: what of it is here is summed there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.route.queries import Routed
from unfold.kernels.tree import GistTree


@dataclass(frozen=True)
class Bag:
    """Groups as lists of their members, for :func:`sum_bags`: members [n] int64, ends [groups + 1] int64."""

    members: Tensor
    ends: Tensor

    @classmethod
    def of(cls, lo: Tensor, hi: Tensor) -> Bag:
        """The groups of rows ``[lo, hi)``, both [groups] int."""
        counts = (hi - lo).clamp(min=0).long()
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        group = torch.arange(len(counts), device=lo.device).repeat_interleave(counts)
        within = torch.arange(len(group), device=lo.device) - ends[group]
        return cls(lo.long()[group] + within, ends)

    def part(self, first: int, last: int, origin: int) -> Bag:
        """The groups ``first .. last``, their members counted from ``origin``."""
        ends = self.ends[first : last + 1]
        begin, end = int(ends[0]), int(ends[-1])
        return Bag(self.members[begin:end] - origin, ends - begin)


def sum_bags(x: Tensor, bag: Bag) -> Tensor:
    """x [n, columns] -> [groups, columns], the sum of each group's rows, always in the same order."""
    if len(bag.members) == 0:
        return x.new_zeros(len(bag.ends) - 1, x.shape[1])
    return torch.nn.functional.embedding_bag(bag.members, x, bag.ends, mode="sum", include_last_offset=True)


@dataclass(frozen=True)
class RawRows:
    """Neighbouring raw rows ``first .. last`` and the chunks that lie in them, none of which lies in others too.

    Attributes:
        first, last: the rows.
        chunks: level-0 slots ``[first, last)``.
        bag: their rows, counted from ``first``.
    """

    first: int
    last: int
    chunks: tuple[int, int]
    bag: Bag

    def within(self, first: int, last: int) -> RawRows:
        """With the chunks of the slots ``first .. last`` alone, counted from ``first``."""
        begin, end = self.chunks
        a, b = max(begin, first), min(end, last)
        if a >= b:
            a = b = begin  # none of them
        bag = self.bag if (a, b) == self.chunks else self.bag.part(a - begin, b - begin, 0)
        return RawRows(self.first, self.last, (a - first, b - first) if b > a else (0, 0), bag)


@dataclass(frozen=True)
class RoutedBlock:
    """Neighbouring queries of one sample; n of them.

    Attributes:
        queries: which of all M.
        spans: per gist segment the slots ``[first, last)`` that any of the queries has.
        lo, hi: [L + 1, n] int64: per gist segment each query's slots, counted from the span's first; last its raw rows.
        far: [n] int64, the level-0 slots before it, so counted, are of chunks outside the query's raw window.
        raw: the raw rows that any has, chunks counted from the span's first, and whether all have all of them.
        upper: per gist segment above level 0 the members of each slot of the span, counted from the first of the span below.
    """

    queries: slice
    spans: tuple[tuple[int, int], ...]
    lo: Tensor
    hi: Tensor
    far: Tensor
    raw: tuple[tuple[RawRows, bool], ...]
    upper: tuple[Bag, ...]


@dataclass(frozen=True)
class SampleRows:
    """What is here of one sample.

    Attributes:
        sample: its number.
        rows: per segment (gists from the top, then raw tokens) the rows ``[first, last)`` of the level-sorted order.
        slots: per gist segment how many there are: the gists, and one where a later gist of that level closes what is open.
        blocks: of the sample's queries.
    """

    sample: int
    rows: tuple[tuple[int, int], ...]
    slots: tuple[int, ...]
    blocks: tuple[RoutedBlock, ...]


def sample_rows(routed: Routed, queries: int, raw_rows: int, part: tuple[int, int] | None = None) -> list[SampleRows]:
    """The (memoised) rows of every sample: blocks of at most ``queries`` queries, raw rows by about ``raw_rows``.

    part: the tokens of every sample that are here; all of them when None.
    """
    make = lambda whole: [_sample(whole, b, queries, raw_rows, part) for b in range(whole.tree.others.batch)]
    return routed.planned(("rows of routing", queries, raw_rows, part), make)


def _sample(routed: Routed, sample: int, queries: int, raw_rows: int, part: tuple[int, int] | None) -> SampleRows:
    tree, levels = routed.tree, routed.tree.levels
    rows, slots = rows_here(tree, sample, part)
    bases = [first for first, _ in rows]
    bags, child_lo = [], None
    for s in range(levels):
        below, count = bases[s + 1], slots[s + 1] if s < levels - 1 else rows[levels][1] - rows[levels][0]
        gists = slice(bases[s], bases[s] + slots[s])
        child_lo, child_hi = ((x[sample, gists].long() - below).clamp(0, count) for x in (tree.child_lo, tree.child_hi))
        bags.append(Bag.of(child_lo, child_hi))
    raw = _raw_rows(child_lo, bags[-1], rows[levels][1] - rows[levels][0], raw_rows)

    at = slice(*tree.splits[sample : sample + 2])
    lo = torch.cat([tree.lo[:levels, at], routed.first[None, at]]).long()
    most = torch.tensor([*slots, rows[levels][1] - rows[levels][0]], device=lo.device)[:, None]
    offset = torch.tensor(bases, device=lo.device)[:, None]
    lo, hi = ((x - offset).clamp(min=0).minimum(most) for x in (lo, tree.hi[: levels + 1, at].long()))
    chunk_ends = tree.child_hi[sample, gists].contiguous()
    far = torch.searchsorted(chunk_ends, tree.lo[levels, at].contiguous(), right=True)
    blocks = []
    for i in range(0, lo.shape[1], queries):
        j = slice(i, min(i + queries, lo.shape[1]))
        where = slice(at.start + j.start, at.start + j.stop)
        blocks.append(_block(where, lo[:, j], hi[:, j], far[j], raw, bags))
    return SampleRows(sample, rows, slots, tuple(blocks))


def rows_here(tree: GistTree, sample: int, part: tuple[int, int] | None) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """``rows`` and ``slots`` of :class:`SampleRows`: within a segment rows stand in the order of their tokens."""
    edges = tree.others.segment_start[sample, : tree.levels + 2].tolist()
    rows, slots = [], []
    for s in range(tree.levels + 1):
        first, last = edges[s], edges[s + 1]
        if part is not None:
            border = torch.tensor(part, device=tree.others.rows.device)
            first, last = (torch.searchsorted(tree.others.rows[sample, first:last].contiguous(), border) + first).tolist()
        rows.append((first, last))
        slots.append(last - first + (last < edges[s + 1]))
    return tuple(rows), tuple(slots[:-1])


def _raw_rows(child_lo: Tensor, chunks: Bag, count: int, step: int) -> list[RawRows]:
    """All raw rows in pieces of about ``step`` that cut no chunk. child_lo: [chunks], where each begins."""
    starts = child_lo.tolist()
    ends = (child_lo + chunks.ends.diff()).tolist()
    pieces, first, chunk = [], 0, 0
    while first < count:
        last, to = min(first + step, count), chunk
        while to < len(starts) and ends[to] <= last:
            to += 1
        if to < len(starts) and starts[to] < last:  # a chunk that is cut goes to the next piece, unless it is all of this one
            last, to = (starts[to], to) if starts[to] > first else (ends[to], to + 1)
        pieces.append(RawRows(first, last, (chunk, to), chunks.part(chunk, to, first)))
        first, chunk = last, to
    return pieces


def _block(queries: slice, lo: Tensor, hi: Tensor, far: Tensor, raw: list[RawRows], bags: list[Bag]) -> RoutedBlock:
    """lo, hi: [L + 1, n] and far: [n] counted from the first row here; bags: per gist segment."""
    some = hi > lo
    starts = lo.masked_fill(~some, torch.iinfo(lo.dtype).max).amin(1).tolist()
    ends = hi.masked_fill(~some, 0).amax(1).tolist()
    spans = [(a, b) if b > a else (0, 0) for a, b in zip(starts, ends)]
    (first, last), latest, earliest = spans[-1], int(lo[-1].max()), int(hi[-1].min())
    raw = [r.within(*spans[-2]) for r in raw if r.first < last and r.last > first]
    pieces = [(r, latest <= r.first and r.last <= earliest) for r in raw]
    levels = len(bags)
    upper = [bags[s].part(*spans[s], spans[s + 1][0]) for s in range(levels - 1)]
    base = torch.tensor([a for a, _ in spans[:-1]] + [0], device=lo.device)[:, None]
    # An empty range may lie anywhere: it stays empty wherever it is moved.
    lo, hi = (lo - base).clamp(min=0), (hi - base).clamp(min=0)
    return RoutedBlock(queries, tuple(spans[:-1]), lo, hi, far - base[-2], tuple(pieces), tuple(upper))
