"""Levels and document ids -> positions and visible sets, once per micro-batch (docs/method.md#who-sees-whom).

Everything follows from running counts: how many items of each level stand before a token, in its sample and in its
document. The same few tensor operations serve CPU and GPU, any number of levels and packed documents.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device
from unfold.kernels.intervals import Intervals
from unfold.model.config import GistConfig
from unfold.model.gist.linked import Role, Units, see_parts, sink_copies, unit_of
from unfold.model.kinds import window_of


@dataclass(frozen=True)
class Layout(Planned):
    """What is derived from an interleaved micro-batch, shared by all layers.

    Attributes:
        level: [B, T] int, -1 for raw tokens (and padding), 0 .. L-1 for gists.
        doc: [B, T] int, number of the document within its sample, -1 for padding.
        position: [B, T] int64, rotary position.
        intervals: what each token sees under the compressed mask; padding sees itself.
        role, part: [B, T] int of a micro-batch with bundles, as :class:`unfold.model.gist.Interleaved` has them; else None.
        host: the same on the host, where this was copied from it.
        sink: first raw tokens of a document that all its later tokens see; 0 where there are no gists.
    """

    level: Tensor
    doc: Tensor
    position: Tensor
    intervals: Intervals
    role: Tensor | None = None
    part: Tensor | None = None
    host: Layout | None = field(default=None, repr=False, compare=False)
    sink: int = 0

    @property
    def text(self) -> Tensor:
        """bool [B, T], the raw tokens: neither gists nor links nor padding."""
        raw = (self.level < 0) & (self.doc >= 0)
        return raw if self.role is None else raw & (self.role != Role.LINK)

    @cached_property
    def first_seen(self) -> Tensor:
        """[B, T] int64, the first token that one could see, however it attends: that of its document, or of its part.

        Of a prefix, links and a suffix it is the first one of the bundle.
        """
        own = document_starts(unit_of(self.doc, self.role, self.part))
        return own if self.role is None else torch.where(self.role >= Role.LINK, document_starts(self.doc), own)

    @property
    def plans(self) -> dict[Hashable, Any]:
        return self.intervals.plans

    @property
    def device(self) -> torch.device:
        return self.level.device

    @property
    def document_spans(self) -> list[tuple[int, int, int]]:
        """(sample, first token, end) of every document of the micro-batch."""
        return self.planned("document spans", Layout._find_document_spans)

    def _find_document_spans(self) -> list[tuple[int, int, int]]:
        spans = []
        for sample, doc in enumerate(self.doc):
            values, lengths = torch.unique_consecutive(doc, return_counts=True)
            ends = lengths.cumsum(0)
            for value, start, end in zip(values.tolist(), (ends - lengths).tolist(), ends.tolist()):
                if value >= 0:
                    spans.append((sample, start, end))
        return spans

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on a device: this one, if it is there."""
        level = to_device(self.level, device)
        if level is self.level:
            return self
        doc, position = (to_device(x, device) for x in (self.doc, self.position))
        optional = (x if x is None else to_device(x, device) for x in (self.role, self.part))
        host = self if self.device.type == "cpu" else None
        return Layout(level, doc, position, self.intervals.to(device), *optional, host, self.sink)

    def in_layer(self, kind: str) -> Layout:
        """That of the layers of one kind (:mod:`unfold.model.kinds`): what their tokens see."""
        if kind == "gist":
            return self
        return self.planned(("layers", kind), lambda whole: raw_layout(whole, window_of(kind)))


def build_layout(
    level: Tensor, doc: Tensor, config: GistConfig | None, role: Tensor | None = None, part: Tensor | None = None
) -> Layout:
    """Derive the layout of a micro-batch.

    Args:
        level: [B, T] int, -1 raw, 0 .. L-1 gist.
        doc: [B, T] int, document of each token, consecutive tokens of one document equal; -1 is padding.
        config: chunk sizes (their number is the number of levels), sink, n_prev; None for raw tokens of a dense model.
        role, part: [B, T] int, where documents may be bundles: as :class:`unfold.model.gist.Interleaved` has them, 0 in padding.

    Returns:
        The layout, on the device of ``level``.
    """
    batch, tokens = level.shape
    sink = config.sink if config else 0
    config = config or GistConfig((tokens + 1,))  # dense attention needs documents and positions: any sizes yield them
    levels = len(config.chunk_sizes)
    device = level.device
    # int32 throughout: counts stay below 2^31 and half the memory traffic halves the time on CPU.
    padding = doc < 0
    level = level.to(torch.int32).masked_fill(padding, -1)
    # Segment of a token in the level-sorted order: the top level is 0, level 0 is L-1, raw tokens are L.
    segment = levels - 1 - level
    member = segment[:, None] == torch.arange(levels + 1, dtype=torch.int32, device=device)[:, None]  # [B, L+1, T]
    upto = member.cumsum(2, dtype=torch.int32)  # items of a segment up to and including a token
    segment_start = torch.nn.functional.pad(upto[:, :, -1].cumsum(1, dtype=torch.int32), (1, 0))  # [B, L+2]
    rank = upto.gather(1, segment[:, None].long())[:, 0]
    row_of = (segment_start.gather(1, segment.long()) + rank - 1).long()  # [B, T]
    rows = torch.empty(batch, tokens, dtype=torch.int64, device=device)
    rows.scatter_(1, row_of, torch.arange(tokens, device=device).expand(batch, -1))

    before = upto - member.int()  # items of a segment strictly before a token
    units = _find_units(unit_of(doc, role, part), before)
    before_unit = units.before.gather(2, units.number[:, None].expand(-1, levels + 1, -1))  # [B, L+1, T]
    # A token of level q sees segments 0 .. L - q (levels q-1 and up); elsewhere, and for padding, its range is empty.
    # Multiplying by the flag is several times faster on CPU than torch.where with a broadcast condition.
    shown = torch.arange(levels + 1, dtype=torch.int32, device=device)[:, None] <= (levels - level)[:, None]
    shown &= ~padding[:, None]
    n_prev = config.n_prev
    if config.own_group:  # a gist's group of the level below is that which it closes: no group before it counts
        n_prev = (~member[:, :-1]).int().mul_(n_prev)
    width = (upto - _window_starts(upto, before, before_unit, rows, segment_start, n_prev)).mul_(shown)
    width[:, levels] += padding.int()  # padding sees itself: some position of a softmax must be finite
    # Sinks that the raw window does not hold already: those before it, or all so far for a gist that sees no raw token.
    sinks = upto[:, levels] - width[:, levels] - before_unit[:, levels]
    sinks = sinks.clamp_(max=config.sink).mul_(~padding)  # [B, T]

    copies, sink_rows = _sink_rows(rows, segment_start[:, levels], upto[:, levels, -1], units, role, config.sink)
    bounds = torch.empty(2, batch, levels + 2, tokens, dtype=torch.int32, device=device)
    lo, hi = bounds[0], bounds[1]
    torch.add(upto, segment_start[:, : levels + 1, None], out=hi[:, :-1])
    torch.sub(hi[:, :-1], width, out=lo[:, :-1])
    lo[:, -1] = units.of_token(copies)
    torch.add(lo[:, -1], sinks, out=hi[:, -1])
    raw_before = before_unit[:, levels]
    if role is not None:
        doc_first = document_starts(doc)
        see_parts(lo, hi, units, doc_first, role, part, segment_start, copies)
        raw_before = before[:, levels].gather(1, doc_first)  # positions count on through a bundle

    rows = torch.cat([rows, sink_rows], 1)
    end = torch.full_like(segment_start[:, :1], rows.shape[1])
    intervals = Intervals(rows, row_of, lo, hi, torch.cat([segment_start, end], 1))
    position = (upto[:, levels] - raw_before - 1).clamp_(min=0).long().masked_fill(padding, 0)
    return Layout(level, doc, position, intervals, role, part, sink=sink)


def _find_units(unit: Tensor, before: Tensor) -> Units:
    """unit: [B, T] int, equal for neighbouring tokens of one; before: [B, S, T] int32, items of a segment before a token."""
    batch, tokens = unit.shape
    is_first = torch.ones_like(unit, dtype=torch.bool)
    torch.ne(unit[:, 1:], unit[:, :-1], out=is_first[:, 1:])
    number = is_first.cumsum(1) - 1  # runs of equal numbers, a run of padding included
    units = int(number[:, -1].max()) + 1
    # First token of each run; tokens that are not first write into a spare last slot.
    first = torch.zeros(batch, units + 1, dtype=torch.int64, device=unit.device)
    index = torch.arange(tokens, device=unit.device).expand(batch, -1)
    first = first.scatter_(1, number.masked_fill(~is_first, units), index)[:, :units]
    return Units(number, first, before.gather(2, first[:, None].expand(-1, before.shape[1], -1)))


def raw_layout(layout: Layout, window: int | None = None, samples: Tensor | None = None, gists: bool = True) -> Layout:
    """The same rows where every token sees the raw tokens of its document (or part) up to itself, and itself.

    In a bundle a token of a part sees that part's; links and the suffix see all raw tokens and links before them; a prefix is
    seen like sinks are.

    Args:
        layout: of whole samples under the compressed mask.
        window: of the raw tokens it sees the last so many, and the sinks before them; None: all.
        samples: int64 [n], those of the micro-batch that are wanted; None: all.
        gists: whether gists see raw tokens; else each sees itself alone, where nobody looks at what they find.
    """
    pick = lambda x: x if samples is None else x.index_select(0, samples)
    intervals, level, doc = layout.intervals, pick(layout.level), pick(layout.doc)
    row_of, lo, hi = (pick(x) for x in (intervals.row_of, intervals.lo, intervals.hi))
    role, part = (x if x is None else pick(x) for x in (layout.role, layout.part))
    row, raw = row_of.int(), intervals.segments - 2
    first = row.gather(1, pick(layout.first_seen))  # it is raw
    apart = (level >= 0) | (doc < 0)  # they see themselves beside raw tokens, or alone
    # A range ends where the count of its segment's items stands, wherever it is seen or not.
    end = torch.where(doc < 0 if gists else apart, first, hi[:, raw])
    begin = first if window is None else torch.maximum(first, end - window)
    if window is not None and role is not None:
        begin = torch.where(role == Role.PREFIX, first, begin)
    lo, sink_first, seen_sinks = hi.clone(), lo[:, -1], hi[:, -1] - lo[:, -1]
    hi = lo.clone()
    lo[:, raw], hi[:, raw] = begin, end
    segment = (raw - 1 - level).long()[:, None]  # the top level is 0, raw tokens are L; padding is among them
    own = lambda x, to: x.scatter_(1, segment, torch.where(apart, to, x.gather(1, segment)[:, 0])[:, None])
    own(lo, row), own(hi, row + 1)
    lo[:, -1] = hi[:, -1] = sink_first
    if window is not None:
        sinks = (begin - first).clamp(max=layout.sink)
        if role is not None:
            before = _sink_copies_before(pick(intervals.rows), row_of, sink_first, seen_sinks)
            in_bundle = before.gather(1, begin.long()) - before.gather(1, first.long())
            sinks = torch.where(role >= Role.LINK, in_bundle, sinks)
        hi[:, -1] += sinks
    seen = Intervals(pick(intervals.rows), row_of, lo, hi, pick(intervals.segment_start))
    return Layout(level, doc, pick(layout.position), seen, role, part, sink=layout.sink)


def _sink_copies_before(rows: Tensor, row_of: Tensor, first: Tensor, seen: Tensor) -> Tensor:
    """How many tokens with a sink copy that anybody sees stand in rows before a row: int32 [B, T + 1].

    rows, row_of: of the intervals; first, seen: [B, T] int32, of every token the first copy it sees, and how many.
    """
    tokens = row_of.shape[1]
    copies = rows.shape[1] - tokens
    edges = torch.zeros(len(rows), copies + 1, dtype=torch.int32, device=rows.device)
    one = (seen > 0).int()
    begin = (first - tokens).long().clamp(0, copies)
    edges.scatter_add_(1, begin, one).scatter_add_(1, (begin + seen).clamp(max=copies), -one)
    is_seen = (edges.cumsum(1)[:, :copies] > 0).int()
    marked = torch.zeros(len(rows), tokens + 1, dtype=torch.int32, device=rows.device)
    marked.scatter_add_(1, row_of.gather(1, rows[:, tokens:]) + 1, is_seen)
    return marked.cumsum(1, dtype=torch.int32)


def document_starts(doc: Tensor) -> Tensor:
    """[B, T] int64, the first token of each token's document (of its run of equal document ids)."""
    index = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    is_first = torch.ones_like(doc, dtype=torch.bool)
    torch.ne(doc[:, 1:], doc[:, :-1], out=is_first[:, 1:])
    return index.masked_fill(~is_first, 0).cummax(1).values


def _window_starts(
    upto: Tensor, before: Tensor, before_doc: Tensor, rows: Tensor, segment_start: Tensor, n_prev: int | Tensor
) -> Tensor:
    """First item of each segment that a token may see, counted within the segment: [B, L+1, T].

    At the top level that is the document's first gist. Below, it is the first item of the group that lies ``n_prev``
    groups before the token's own; groups are closed by the gists one level (one segment) up. n_prev: one number, or [B, L, T],
    one by segment of those gists and token.
    """
    closed = before[:, :-1]  # parents strictly before: the token's own group is the one after them
    # The parent that closed the group before the window; its own count is where the window starts.
    parent = segment_start[:, :-2, None] + closed - (n_prev + 1)
    closer = rows.gather(1, parent.clamp_(min=0).flatten(1).long()).view_as(parent)  # [B, L, T] token index
    # Where the document has no such parent, what was gathered means nothing, and its own first item is the start.
    start = torch.where(closed - before_doc[:, :-1] > n_prev, upto[:, 1:].gather(2, closer), before_doc[:, 1:])
    return torch.cat([before_doc[:, :1], start], 1)


def _sink_rows(
    rows: Tensor, raw_start: Tensor, raw: Tensor, units: Units, role: Tensor | None, sink: int
) -> tuple[Tensor, Tensor]:
    """The row of each unit's first sink copy, [B, U] int64, and the tokens behind all of them, [B, copies].

    Copies behind the end of a short document are seen by no query. raw_start, raw: [B] int32, first row of the raw tokens and
    their number; role: of bundles.
    """
    begin = raw_start[:, None] + units.before[:, -1]  # [B, U], the row of each unit's first raw token
    tokens = rows.shape[1]
    if role is None:
        offsets = torch.arange(sink, device=rows.device)
        at = begin[:, :, None] + offsets  # [B, U, sink]
        copies = tokens + torch.arange(begin.shape[1], device=rows.device) * sink
        return copies.expand_as(begin), rows.gather(1, at.flatten(1).clamp_(max=tokens - 1).long())
    room = sink_copies(units, raw, role, sink)
    upto = room.cumsum(1)
    place = torch.arange(int(upto[:, -1].max()), device=rows.device).expand(len(rows), -1).contiguous()
    unit = torch.searchsorted(upto, place, right=True).clamp_(max=begin.shape[1] - 1)
    at = begin.gather(1, unit) + place - (upto - room).gather(1, unit)
    return tokens + upto - room, rows.gather(1, at.clamp_(0, tokens - 1))
