"""A document that grows: what :mod:`unfold.model.gist.layout` derives for whole samples, kept up token by token.

Items of each segment (0 is the top gist level, L - 1 level 0, L raw tokens) are numbered from 0 in the document's order: the
places of their keys in a cache. What a token sees in a segment is one range of these numbers, here as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals
from unfold.kernels.tree import GistTree
from unfold.model.config import GistConfig
from unfold.model.gist.buffers import Growable


@dataclass(frozen=True)
class Sight:
    """What ``n`` consecutive tokens of a growing document may read. Item numbers are per segment.

    Attributes:
        segment, number: [n] int64, which item each token is.
        lo, hi: [L + 1, n] int64, what it sees under the compressed mask; empty where equal.
        sinks: [n] int64, how many of the first raw tokens it sees beside its raw range.
        upto: [L + 1, n] int64, items up to and including the token.
        tail: [L, n] int64, the first gist whose parent is not closed yet; 0 at the top.
        span: [n] int64, interleaved tokens up to and including the token.
    """

    segment: Tensor
    number: Tensor
    lo: Tensor
    hi: Tensor
    sinks: Tensor
    upto: Tensor
    tail: Tensor
    span: Tensor

    def at(self, queries: Tensor) -> Sight:
        """That of some of the tokens."""
        return Sight(*(getattr(self, name)[..., queries] for name in self.__dataclass_fields__))


class Outline:
    """Counts and borders of one growing document, on the CPU.

    Args:
        config: chunk sizes, sink and n_prev; None where there are no gists (dense attention): every token sees all before.
    """

    def __init__(self, config: GistConfig | None):
        self.config = config
        self.levels = config.levels if config else 0
        self.counts = [0] * (self.levels + 1)  # items of each segment
        # For every gist, how many items of the segment below stand before it: the end of what it closed.
        self.ends = [Growable([0], 0, torch.int64, "cpu") for _ in range(self.levels)]

        self._mirrors: dict[torch.device, list[Growable]] = {}
        self._longest = [0] * self.levels  # most items behind a gist, as far as the mirrors know

    @property
    def sink(self) -> int:
        return self.config.sink if self.config else 0

    @property
    def length(self) -> int:
        """Interleaved tokens."""
        return sum(self.counts)

    def drop(self, tokens: int) -> None:
        """Forget the last tokens, which must be raw."""
        self.counts[-1] -= tokens
        assert not self.levels or not self.counts[self.levels - 1] or self.counts[-1] >= int(self.ends[-1].rows[-1])

    def append(self, level: Tensor) -> Sight:
        """Append tokens of these levels, [n] int64, -1 for raw ones."""
        segments = torch.arange(self.levels + 1)[:, None]
        segment = self.levels - 1 - level
        member = segment == segments  # [L+1, n]
        upto = member.cumsum(1) + torch.tensor(self.counts)[:, None]
        before = upto - member.long()
        for s, ends in enumerate(self.ends):
            ends.append(upto[s + 1][member[s]])
        number = before.gather(0, segment[None])[0]
        start, tail = torch.zeros_like(upto), torch.zeros_like(upto[:-1])
        for s in range(1, self.levels + 1):
            start[s] = self._end_of(s - 1, before[s - 1] - self.config.n_prev - 1)
            if s < self.levels:
                tail[s] = self._end_of(s - 1, before[s - 1] - 1)
        lo = torch.where(segments <= self.levels - level, start, upto)  # a token of level q sees segments 0 .. L - q
        # The sinks that the raw range does not hold: those before it, or all so far for a gist without one.
        sinks = lo[-1].clamp(max=self.config.sink if self.config else 0)
        span = torch.arange(self.length + 1, self.length + len(level) + 1)
        self.counts = upto[:, -1].tolist()
        return Sight(segment, number, lo, upto, sinks, upto, tail, span)

    def _end_of(self, segment: int, gist: Tensor) -> Tensor:
        """[n]: the end of what each gist closed; 0 for those before the first."""
        ends = self.ends[segment].rows
        if not len(ends):
            return torch.zeros_like(gist)
        return ends[gist.clamp(min=0)] * (gist >= 0)

    def children(self, segment: int, gists: Tensor) -> tuple[Tensor, Tensor]:
        """The items ``[lo, hi)`` of the segment below that gists of any shape closed; sinks are nobody's."""
        ends = self.ends[segment].rows
        lo, hi = ends[(gists - 1).clamp(min=0)] * (gists > 0), ends[gists]
        if segment == self.levels - 1:
            lo = lo.clamp(min=self.config.sink).minimum(hi)
        return lo, hi

    def ends_on(self, device: torch.device) -> tuple[list[Tensor], list[int]]:
        """``ends`` of each segment on a device, brought up to date by what came since; and the most items behind one gist."""
        mirrors = self._mirrors.setdefault(device, [Growable([0], 0, torch.int64, device) for _ in self.ends])
        for s, (mirror, ends) in enumerate(zip(mirrors, self.ends)):
            if mirror.length < ends.length:  # gists are never dropped
                fresh = ends.rows[mirror.length :]
                width = ends.rows.diff(prepend=ends.rows.new_zeros(1))[mirror.length :]
                self._longest[s] = max(self._longest[s], int(width.max()))
                mirror.append(fresh.to(device))
        return [mirror.memory for mirror in mirrors], self._longest

    def tree(self, queries: Sight) -> GistTree:
        """The whole document as the kernels see it, for some recalling tokens.

        One sample whose T tokens are in level-sorted order: the items of segment 0, of segment 1, ..
        """
        counts = torch.tensor(self.counts)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # [L+2]
        tokens, sink = self.length, self.config.sink
        child_lo, child_hi = torch.zeros(2, tokens, dtype=torch.int64)
        parent = torch.full((tokens,), -1)
        for s in range(self.levels):
            rows = slice(int(start[s]), int(start[s + 1]))
            lo, hi = self.children(s, torch.arange(self.counts[s]))
            child_lo[rows], child_hi[rows] = lo + start[s + 1], hi + start[s + 1]
            above = torch.searchsorted(self.ends[s].rows, torch.arange(self.counts[s + 1]), right=True)
            below = slice(int(start[s + 1]), int(start[s + 2]))
            parent[below] = torch.where(above < self.counts[s], above + start[s], -1)
        rows = torch.cat([torch.arange(tokens), start[-2] + torch.arange(sink).clamp(max=self.counts[-1] - 1)])
        nothing = torch.zeros(1, self.levels + 2, tokens, dtype=torch.int32)
        bounds = torch.cat([start, start[-1:] + sink])[None].int()
        others = Intervals(rows[None], torch.arange(tokens)[None], nothing, nothing, bounds)
        lo = torch.cat([torch.zeros_like(queries.tail), queries.lo[-1:], torch.zeros_like(queries.sinks)[None]])
        hi = torch.cat([queries.upto, queries.sinks[None]])
        place = start[queries.segment] + queries.number
        return GistTree(
            others,
            *(x[None].int() for x in (child_lo, child_hi, parent)),
            place,
            (0, len(place)),
            *((x + start[:, None]).int() for x in (lo, hi)),
            (queries.tail + start[: self.levels, None]).int(),
            queries.span.int(),
        )
