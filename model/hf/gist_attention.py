"""Gist attention over a sequence's keys and values, in plain PyTorch. Shipped with exports; needs torch alone.

Queries are taken in blocks. For each block the rows that any of its queries may read are gathered, and a mask says which of
them each query reads: memory is that of one block, never T x T. In training a block's weights are computed again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unfold.model.gist.growing import Sight, children, recalls_in

from .gist_sequence import GistSequence, GistSettings, SegmentRows
from .own_kernels import WholeSequence

BLOCK = 64  # queries at a time


@dataclass(frozen=True)
class Columns:
    """Rows of one segment that a block of queries reads.

    Attributes:
        segment: whose rows.
        items: [W] int64, their numbers.
        mask: [1 or Hkv, n, W] bool, which of them each query (of each KV head) reads.
    """

    segment: int
    items: Tensor
    mask: Tensor


class GistPass:
    """One pass of the model over new tokens of several sequences, which stand one after another in a single row.

    Args:
        parts: the sequences, and the sight of their new tokens.
        kernels: from :func:`find_kernels`; None does everything in PyTorch.
        keep: whether the sequences will go on.
    """

    def __init__(self, parts: Sequence[tuple[GistSequence, Sight]], kernels: SimpleNamespace | None, keep: bool):
        self.parts, self.kernels, self.keep = parts, kernels, keep
        self.views: dict[str, list[tuple[Sight, WholeSequence | None]]] = {}

    def seen(self, kind: str) -> list[tuple[Sight, WholeSequence | None]]:
        """What the new tokens of every sequence see in layers of one kind, also as samples for the kernels."""
        if kind not in self.views:
            sights = [sequence.outline.in_layer(kind, sight) for sequence, sight in self.parts]
            whole = lambda sight: self.kernels is not None and not any(sight.start)
            sample = lambda sight, settings: WholeSequence(self.kernels, sight, settings) if whole(sight) else None
            self.views[kind] = [(s, sample(s, sequence.settings)) for s, (sequence, _) in zip(sights, self.parts)]
        return self.views[kind]

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of layer ``index``. q [H, N, D], k, v [Hkv, N, D], rotary applied -> [H, N, D]"""
        out, at = [], 0
        kind = self.parts[0][0].settings.kind(index)
        for (sequence, _), (sight, sample) in zip(self.parts, self.seen(kind)):
            new = slice(at, at := at + len(sight.recalls))
            own = [x[:, new] for x in (q, k, v)]
            recall = recalls_in(index, sequence.settings.recall_from, kind)
            by_kernels = sample is not None and sight.lo.device == q.device
            if self.keep or not by_kernels:
                keep_rows(sequence.layer(index), sight, *own[1:])
            if by_kernels:
                out.append(sample.attend(*own, scale, recall))
            else:
                out.append(attend_sequence(own[0], sequence.layer(index), sight, sequence.settings, scale, recall))
        return torch.cat(out, 1)


def keep_rows(layer: list[SegmentRows], sight: Sight, k: Tensor, v: Tensor) -> None:
    """Put the new tokens' keys and values [Hkv, n, D] into their segments."""
    for rows, start, members in zip(layer, sight.start, sight.members):
        if len(members):
            members = members.to(k.device)
            rows.put(start, k.index_select(1, members), v.index_select(1, members))


def attend_sequence(
    q: Tensor, layer: list[SegmentRows], sight: Sight, settings: GistSettings, scale: float, recall: bool, block: int = BLOCK
) -> Tensor:
    """Attention of one sequence's new tokens over all its rows.

    Args:
        q: [H, n, D] queries.
        layer: keys and values by segment, those of the new tokens included.
        sight: of the n tokens.
        settings: budget and sharing of the selection.
        scale: factor on the scores.
        recall: whether tokens recall in this layer.
        block: queries at a time.

    Returns:
        [H, n, D] in q's dtype.
    """
    kv_heads = next(rows.keys.shape[0] for rows in layer if rows.keys is not None)
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(0, (kv_heads, -1))  # [Hkv, r, n, D]
    unfolding = sight.recalls if recall else torch.zeros_like(sight.recalls)
    order, out = [], []
    for kind, columns_of in ((~unfolding, _ranges), (unfolding, _unfolded)):
        which = kind.nonzero()[:, 0]
        for at in which.split(block) if len(which) else ():
            queries = grouped.index_select(2, at.to(q.device))
            columns = columns_of(queries, layer, sight, at, settings, scale)
            order.append(at)
            out.append(_softmax_over(queries, layer, columns, scale))
    inverse = torch.cat(order).argsort().to(q.device)
    return torch.cat(out, 2).index_select(2, inverse).flatten(0, 1).to(q.dtype)


def _softmax_over(q: Tensor, layer: list[SegmentRows], columns: list[Columns], scale: float) -> Tensor:
    """One softmax over the rows of all columns. q: [Hkv, r, n, D] -> same."""
    n, device = q.shape[2], q.device
    mask = torch.cat([c.mask.expand(q.shape[0], n, -1) for c in columns], 2)[:, None].to(device)  # [Hkv, 1, n, W]

    def attention(q: Tensor, *rows: Tensor) -> Tensor:
        gathered = [x.index_select(1, c.items.to(device)).to(q.dtype) for x, c in zip(rows, [*columns, *columns])]
        keys, values = torch.cat(gathered[: len(columns)], 1), torch.cat(gathered[len(columns) :], 1)
        scores = (q @ keys.transpose(1, 2)[:, None]).mul(scale).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ values[:, None]

    rows = [layer[c.segment].keys for c in columns] + [layer[c.segment].values for c in columns]
    if not torch.is_grad_enabled():
        return attention(q, *rows)
    return checkpoint(attention, q, *rows, use_reentrant=False, preserve_rng_state=False)


def _between(segment: int, lo: Tensor, hi: Tensor) -> list[Columns]:
    """The items that queries see as ranges ``[lo, hi)``, two [n]; nothing where all are empty."""
    seen = hi > lo
    if not bool(seen.any()):
        return []
    items = torch.arange(int(lo[seen].min()), int(hi[seen].max()), device=lo.device)
    return [Columns(segment, items, ((items >= lo[:, None]) & (items < hi[:, None]))[None])]


def _ranges(
    q: Tensor, layer: list[SegmentRows], sight: Sight, at: Tensor, settings: GistSettings, scale: float, first: int = 0
) -> list[Columns]:
    """What tokens ``at`` see while forgetting, in segments from ``first`` on, and the sinks."""
    lo, hi, sinks = sight.lo[:, at], sight.hi[:, at], sight.sinks[at]
    columns = [c for s in range(first, len(lo)) for c in _between(s, lo[s], hi[s])]
    return columns + _between(len(lo) - 1, torch.zeros_like(sinks), sinks)


@torch.no_grad()
def _unfolded(
    q: Tensor, layer: list[SegmentRows], sight: Sight, at: Tensor, settings: GistSettings, scale: float
) -> list[Columns]:
    """What tokens ``at`` see when they recall: selected gists, the raw tokens behind them, their window, the sinks.

    The selection goes down the levels: below the top, candidates are the children of what a head selected one level up, and
    the gists whose parent is not closed yet.
    """
    levels, group = settings.levels, q.shape[1]
    hi, device = sight.hi[:, at], sight.hi.device
    span = hi.sum(0)  # interleaved tokens up to and including each query
    columns: list[Columns] = []
    parents = torch.zeros(0, dtype=torch.int64, device=device)  # selected one level up by anyone, ascending
    chosen = torch.zeros(0, dtype=torch.bool, device=device)  # [Hkv, heads, n, parents], by whom
    for s in range(levels):
        tail, end = sight.tail[s, at], hi[s]
        below = _members(*children(sight.ends, sight.sink, s - 1, parents))[0] if s else parents
        open_ones = torch.arange(int(tail.min()), int(end.max()), device=device)
        rows = torch.cat([below[below < tail.min()], open_ones])  # ascending, so that of equal scores the earlier wins
        if not len(rows):
            continue
        candidates = ((rows >= tail[:, None]) & (rows < end[:, None]))[None, None]  # [1, 1, n, W]
        if len(parents):
            parent = torch.searchsorted(sight.ends[s - 1], rows, right=True)
            slot = torch.searchsorted(parents, parent).clamp(max=len(parents) - 1)
            candidates = candidates | (chosen[..., slot] & (parents[slot] == parent))
        keys = layer[s].keys.index_select(1, rows.to(q.device)).to(q.dtype)
        scores = (q @ keys.transpose(1, 2)[:, None]).mul_(scale)  # [Hkv, r, n, W]
        if settings.share == "group":
            scores = scores.sum(1, keepdim=True)
        taken = take_best(scores.to(device), candidates, settings.budget(span, end, group), settings.top_p)
        kept = taken.flatten(0, 2).any(0)
        parents, chosen = rows[kept], taken[..., kept]
        columns.append(Columns(s, parents, chosen.any(1)))
    window = sight.lo[-1, at]
    if len(parents):
        raw, owner = _members(*children(sight.ends, sight.sink, levels - 1, parents))
        # A chunk lies in a query's window entirely or not at all: the window begins where a chunk does.
        columns.append(Columns(levels, raw, chosen.any(1)[..., owner] & (raw < window[:, None])))
    return columns + _ranges(q, layer, sight, at, settings, scale, first=levels)


def _members(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The members of ranges [m], one range after another, and the number of the range of each."""
    lengths = hi - lo
    owner = torch.repeat_interleave(torch.arange(len(lo), device=lo.device), lengths)
    first = lengths.cumsum(0) - lengths
    return torch.arange(len(owner), device=lo.device) - first[owner] + lo[owner], owner


def take_best(scores: Tensor, candidates: Tensor, budget: Tensor, top_p: float | None) -> Tensor:
    """The best candidates of each query; of equal ones the first.

    scores: [Hkv, heads, n, W]; candidates: bool, broadcastable to it; budget: [n] candidates to take; top_p: take instead the
    fewest whose softmax reaches it. Returns bool like scores.
    """
    best, order = scores.masked_fill(~candidates, -math.inf).sort(dim=-1, descending=True, stable=True)
    if top_p is None:
        needed = torch.arange(scores.shape[-1], device=scores.device) < budget[:, None]
    else:
        share = best.softmax(-1)
        needed = share.cumsum(-1) - share < top_p
    return torch.zeros_like(best, dtype=torch.bool).scatter_(-1, order, needed & (best > -math.inf))
