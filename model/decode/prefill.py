"""Attention of a run of new tokens over a cache, through the kernels that training uses.

A run of tokens that do not recall sees one span per segment: these rows, in level-sorted order, are a short
sample of their own in which the older rows ask nothing. Recalling tokens may reach everything: for them a layer's whole cache
is put in that order, once per run; where raw rows lie on the host, what is unfolded is brought alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.compressed import compressed_attention
from unfold.kernels.intervals import Intervals
from unfold.kernels.select import Selection, SelectRule, select_gists
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import recall_queries, unfold_attention
from unfold.model.decode.cache import SequenceCache
from unfold.model.gist.growing import Outline, Sight, families, recalls_in


@dataclass(frozen=True)
class Run:
    """What a run of new tokens sees in the layers of one kind, as a sample of its own (:func:`short_sample`)."""

    spans: list[tuple[int, int, int]]
    own: Tensor
    intervals: Intervals

    @classmethod
    def of(cls, sight: Sight, device: torch.device) -> Run:
        """On the device of the layers."""
        spans, own, intervals = short_sample(sight)
        return cls(spans, own.to(device), intervals.to(device))


class PrefillAttention:
    """The next ``n`` tokens of one sequence attend to its cache; an :data:`unfold.model.visibility.Attend` of one row.

    Args:
        cache: the sequence's; its outline holds the tokens already, its layers not yet.
        sight: of the n tokens.
        rule: how gists are selected; None where nothing recalls.
        first: the first layer that recalls.
    """

    def __init__(self, cache: SequenceCache, sight: Sight, rule: SelectRule | None, first: int, device: torch.device):
        self.cache, self.sight, self.rule, self.first = cache, sight, rule, first
        self.runs = {kind: Run.of(seen, device) for kind, seen in cache.views(sight).items()}
        self.tree = None
        if bool(sight.recalls.any()):
            run = self.runs["gist"]
            self.recalling = sight.recalls.nonzero()[:, 0].to(device)
            self.tree = whole_tree(cache.outline, sight.at(sight.recalls)).to(device)
            asleep = torch.zeros(1, run.intervals.tokens, dtype=torch.bool, device=device)
            asleep[0, run.own[self.recalling]] = True
            self.forgetting = run.intervals.without(asleep)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, n, H, D], k, v [1, n, Hkv, D] -> [1, n, H, D]"""
        self.cache.append(index, self.sight.segment, k[0], v[0])
        kind = self.cache.kinds[index]
        run, recall = self.runs[kind], self.tree is not None and recalls_in(index, self.first, kind)
        queries = q.new_zeros(1, run.intervals.tokens, *q.shape[2:])
        queries[0, run.own] = q[0]
        near = self._rows(index, run.spans)
        out = compressed_attention(queries, *near, self.forgetting if recall else run.intervals)[:, run.own]
        if recall:
            out[0, self.recalling] = self._recall(index, q[0, self.recalling])
        return out

    def _recall(self, index: int, q: Tensor) -> Tensor:
        """Attention of the recalling tokens, [N, H, D]."""
        layer, counts = self.cache.layers[index], self.cache.outline.counts
        if not layer[-1].on_host:
            everything = self._rows(index, [(s, 0, n) for s, n in enumerate(counts)])
            return recall_queries(q, *everything, self.tree, self.rule)[0]
        gists = self._rows(index, [(s, 0, n) for s, n in enumerate(counts[:-1])])
        # Nobody reads the rows that are not fetched; kernels may multiply them by zero.
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, counts[-1])) for x in gists)
        selection = select_gists(q, keys, self.tree, self.rule)
        raw = unfolded_rows(self.tree, selection)
        place, heads = raw - sum(counts[:-1]), keys.shape[2]
        keys[0, raw] = layer[-1].keys_at(place.expand(heads, -1)).transpose(0, 1)
        values[0, raw] = layer[-1].values_at(place.expand(heads, -1)).transpose(0, 1)
        return unfold_attention(q, keys, values, self.tree, selection)

    def _rows(self, index: int, spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Keys and values of some spans of a layer, side by side: two [1, rows, Hkv, D]."""
        layer = self.cache.layers[index]
        keys = torch.cat([layer[s].keys(first, last) for s, first, last in spans], 1)
        values = torch.cat([layer[s].values(first, last) for s, first, last in spans], 1)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


def short_sample(sight: Sight) -> tuple[list[tuple[int, int, int]], Tensor, Intervals]:
    """What the tokens of a sight see of their document, as a sample of its own.

    Returns:
        The spans (segment, first, last) of items that make up its W tokens, in this order; the place of each of the n
        tokens among these, [n] int64; its intervals, in which all other tokens see nothing.
    """
    segments = len(sight.lo)
    sinks = int(sight.sinks.max())
    seen = sight.hi > sight.lo  # [L+1, n]
    span = lambda s: (int(sight.lo[s][seen[s]].min()), int(sight.hi[s][seen[s]].max()))  # noqa: B023
    first, last = zip(*(span(s) if bool(seen[s].any()) else (sinks, sinks) for s in range(segments)))
    # Sinks before the raw span stand before it here too; those within it are there already.
    apart = min(sinks, first[-1])
    spans = [*zip(range(segments - 1), first, last), (segments - 1, 0, apart), (segments - 1, first[-1], last[-1])]
    ends = torch.tensor([b - a for _, a, b in spans]).cumsum(0)
    width, start = int(ends[-1]), torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-2], ends[-1:]])  # [L+2]
    shift = start[:-1] - torch.tensor(first)  # from an item's number to its place
    shift[-1] += apart
    own = shift[sight.segment] + sight.number
    sink = torch.arange(sinks)
    rows = torch.cat([torch.arange(width), torch.where(sink < apart, start[-2] + sink, shift[-1] + sink)])
    lo, hi = torch.zeros(2, 1, segments + 1, width, dtype=torch.int32)
    lo[0, :-1, own] = ((sight.lo + shift[:, None]) * seen).int()
    hi[0, :-1, own] = ((sight.hi + shift[:, None]) * seen).int()
    lo[0, -1, own], hi[0, -1, own] = width, (width + sight.sinks).int()
    bounds = torch.cat([start, start[-1:] + sinks])[None].int()
    return spans, own, Intervals(rows[None], torch.arange(width)[None], lo, hi, bounds)


def unfolded_rows(tree: GistTree, selection: Selection) -> Tensor:
    """The raw rows that any query of a tree of one sample reads, ascending, [n] int64: chunks, windows, sinks."""
    chunks, levels = selection.rows[-1].long().unique(), tree.levels
    sinks = tree.others.rows[0, tree.others.tokens :][: int((tree.hi - tree.lo)[-1].max())]
    lo = torch.cat([tree.child_lo[0, chunks], tree.lo[levels]]).long()
    hi = torch.cat([tree.child_hi[0, chunks], tree.hi[levels]]).long()
    edge = torch.zeros(tree.others.tokens + 1, dtype=torch.int64, device=lo.device)
    edge.index_add_(0, lo, torch.ones_like(lo)).index_add_(0, hi, -torch.ones_like(hi))
    read = edge.cumsum(0)[:-1] > 0
    read[sinks] = True
    return read.nonzero()[:, 0]


def whole_tree(outline: Outline, queries: Sight) -> GistTree:
    """A whole text as the kernels see it, for some recalling tokens.

    One sample whose T tokens are in level-sorted order: the items of segment 0, of segment 1, ..
    """
    counts, levels, tokens, sink = torch.tensor(outline.counts), outline.levels, outline.length, outline.sink
    start = F.pad(counts.cumsum(0), (1, 0))  # [L+2]
    rows = torch.cat([torch.arange(tokens), start[-2] + torch.arange(sink).clamp(max=outline.counts[-1] - 1)])
    nothing = torch.zeros(1, levels + 2, tokens, dtype=torch.int32)
    bounds = torch.cat([start, start[-1:] + sink])[None].int()
    others = Intervals(rows[None], torch.arange(tokens)[None], nothing, nothing, bounds)
    lo = torch.cat([torch.zeros_like(queries.tail), queries.lo[-1:], torch.zeros_like(queries.sinks)[None]])
    hi = torch.cat([queries.hi, queries.sinks[None]])
    place = start[queries.segment] + queries.number
    return GistTree(
        others,
        *(x[None].int() for x in families(outline.borders, sink, outline.counts)),
        place,
        (0, len(place)),
        *((x + start[:, None]).int() for x in (lo, hi)),
        (queries.tail + start[:levels, None]).int(),
        queries.span.int(),
    )
