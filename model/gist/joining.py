"""Texts joined of parts that were read by themselves (docs/method.md#linked-contexts): what links and suffix see of them.

One code for generation and for exported models, with which this file is shipped: it needs torch alone.

The items of a joined text are kept in another order than they were read in: of the raw tokens first those that every later token
sees, the prefix and the sinks of all parts; then what else the parts hold, part by part; then links and suffix. So links and
suffix see one range of each segment and the first so many raw tokens, as every token of a plain text does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.model.gist.growing import Folding, Outline, Sight


@dataclass(frozen=True)
class PartShape:
    """The outline of a part that was read by itself and closed.

    Attributes:
        counts: items of each segment, those of the top level first, raw tokens last.
        ends: of each segment of gists, how many items of the segment below stand before each gist: [gists] int64, on the CPU.
    """

    counts: tuple[int, ...]
    ends: tuple[Tensor, ...]

    @classmethod
    def of(cls, outline: Outline) -> PartShape:
        """Of a text as it stands."""
        return cls(tuple(outline.counts), tuple(ends.to("cpu", copy=True) for ends in outline.borders))

    @property
    def raw(self) -> int:
        """Raw tokens."""
        return self.counts[-1]

    def positions(self, segment: int) -> Tensor:
        """[items] int64, rotary positions in the part: a gist has that of the raw token before it."""
        if segment == len(self.ends):
            return torch.arange(self.raw)
        return self.positions(segment + 1)[self.ends[segment] - 1]

    @property
    def level(self) -> Tensor:
        """[tokens] int64, the levels of its tokens in their order; -1 is raw."""
        levels = len(self.ends)
        # A gist follows the raw token whose position it shares, and one of a higher level what it closed.
        own = [torch.full((count,), levels - 1 - s) for s, count in enumerate(self.counts)]
        place = [self.positions(s) * (levels + 1) + level for s, level in enumerate(own)]
        return torch.cat(own)[torch.cat(place).argsort()]


class JoinedOutline(Outline):
    """A prefix, parts and their links; a suffix may follow.

    Args:
        folding: of the parts: chunk sizes, sink and n_prev.
        prefix: raw tokens of the prefix.
        shapes: of the parts, in order.
        links: link tokens of each part.
        device: of all that is derived.
    """

    def __init__(
        self, folding: Folding, prefix: int, shapes: Sequence[PartShape], links: int, device: torch.device | str = "cpu"
    ):
        super().__init__(folding, device)
        self.prefix, self.links = prefix, links
        self.sinks = [min(folding.sink, shape.raw) for shape in shapes]  # of each part
        self.sink = prefix + sum(self.sinks)
        self.offsets: list[int] = []  # position of each part's first token
        at, raw = prefix, self.sink
        seen, upto = self.sink - sum(self.sinks), []
        for shape, sinks in zip(shapes, self.sinks):
            for s, (mine, ends) in enumerate(zip(self.ends, shape.ends)):
                bottom = s == self.levels - 1
                mine.append(((ends - sinks).clamp(min=0) + raw if bottom else ends + self.counts[s + 1]).to(device))
                self.counts[s] += shape.counts[s]
            raw += shape.raw - sinks
            self.offsets.append(at)
            at, seen = at + shape.raw, seen + sinks
            upto.append([*self.counts[:-1], seen])
        self.counts[-1] = raw
        # What a part's links see: gists of each level, and how many of the first raw tokens.
        self.upto = torch.tensor(upto, dtype=torch.int64, device=device).view(-1, self.levels + 1)
        rest = [torch.arange(sinks, shape.raw) + at for shape, sinks, at in zip(shapes, self.sinks, self.offsets)]
        self.rest = torch.cat([torch.zeros(0, dtype=torch.int64), *rest]).to(device)  # positions of what parts hold behind sinks
        # Windows do not reach into a part: of the levels below the top, links and suffix alone.
        self.floor = torch.tensor([0, *self.counts[1:]], dtype=torch.int64, device=device)

    def gather(self, shapes: Sequence[PartShape], segment: int) -> tuple[list[tuple[int, slice]], Tensor, Tensor]:
        """Which items of which part make up a segment, (part, its items) in order; their positions in the part, and here.

        Both positions are [items] int64; on the CPU, as the shapes are.
        """
        order = [(i, slice(0, shape.counts[segment])) for i, shape in enumerate(shapes)]
        if segment == self.levels:
            order = [(i, slice(0, sinks)) for i, sinks in enumerate(self.sinks)]
            order += [(i, slice(sinks, shape.raw)) for i, (shape, sinks) in enumerate(zip(shapes, self.sinks))]
        order = [(i, items) for i, items in order if items.stop > items.start]
        positions = [shapes[i].positions(segment)[items] for i, items in order]
        none = torch.zeros(0, dtype=torch.int64)
        there = [at + self.offsets[i] for at, (i, _) in zip(positions, order)]
        return order, torch.cat([none, *positions]), torch.cat([none, *there])

    def first_within(self, position: Tensor, window: int) -> Tensor:
        """Of links and suffix, which see all sinks, the first item behind these; a prefix sees itself whole."""
        first = position - window + 1
        behind = self.sink + torch.searchsorted(self.rest, first)
        return torch.where(position < self.prefix, 0, torch.where(first < int(self.floor[-1]), behind, first))

    def unseen(self, window: int, items: int) -> int:
        """As of any text; here none is taken off."""
        following = torch.tensor([items], device=self.device)
        return max(0, int(self.first_within(following, window)) - self.sink)

    def prefix_sight(self, begin: int, end: int) -> Sight:
        """What tokens ``[begin, end)`` of the prefix see: those before them, and themselves."""
        number = torch.arange(begin, end, device=self.device)
        hi = torch.zeros(self.levels + 1, len(number), dtype=torch.int64, device=self.device)
        hi[-1] = number + 1
        return self._raw_sight(number, torch.zeros_like(hi), hi, torch.zeros_like(number), begin)

    def read_links(self, count: int) -> Sight:
        """Enter the next ``count`` links: each sees the parts up to its own, by their sinks and all of their gists."""
        number = torch.arange(self.counts[-1], self.counts[-1] + count, device=self.device)
        part = (number - int(self.floor[-1])) // self.links
        hi = self.upto[part].T.clone()
        sinks = hi[-1].clone()
        hi[-1] = number + 1
        lo = torch.zeros_like(hi)
        lo[-1] = self.floor[-1]
        sight = self._raw_sight(number, lo, hi, sinks, self.counts[-1])
        self.counts[-1] += count
        return sight

    def _raw_sight(self, number: Tensor, lo: Tensor, hi: Tensor, sinks: Tensor, begin: int) -> Sight:
        segment, nobody = torch.full_like(number, self.levels), torch.zeros_like(number, dtype=torch.bool)
        start = (*self.counts[:-1], begin)
        return Sight(segment, number, lo, hi, sinks, hi[:-1].clone(), nobody, start, self.borders, self.sink)

    def drop(self, tokens: int) -> None:
        """Forget the last tokens, which must be of the suffix."""
        self.counts[-1] -= tokens
        assert self.counts[-1] >= int(self.floor[-1]), "a part stands among them"
