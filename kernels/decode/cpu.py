"""Decoding in plain tensor operations, query by query: reads the top gists, children of the selected ones, what they unfold.

The same selection as :mod:`kernels.select`, but the scores of one query are never taken over all gists of a level: the cost
of a token is ``T / prod(c) + k * (c_1 + ..) + |union| * c_0`` rows, not T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unfold.kernels.decode.step import Borders, RowStore, Step
from unfold.kernels.select.selection import SelectRule, take_best


def decode_attention_cpu(
    q: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, rule: SelectRule | None, scale: float
) -> Tensor:
    """As :func:`kernels.decode.reference.decode_attention_reference`; on any device, its bookkeeping on the CPU."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = []
    for i, layer in enumerate(layers):
        kv_heads = layer[-1].memory.shape[1]
        query = Query(q[i].to(wide).unflatten(0, (kv_heads, -1)), scale)
        see_ranges(query, layer, step, i)
        if step.recalls[i]:
            unfold(query, layer, step, i, rule)
        out.append(query.attention().flatten(0, 1))
    return torch.stack(out).to(q.dtype)


class Query:
    """One query: the scores of all keys it sees so far, and their values. q: [Hkv, r, D]."""

    def __init__(self, q: Tensor, scale: float):
        self.q, self.scale = q, scale
        self.scores: list[Tensor] = []
        self.values: list[Tensor] = []

    def score(self, keys: Tensor) -> Tensor:
        """[Hkv, n, D] -> [Hkv, r, n]"""
        return (self.q @ keys.to(self.q.dtype).transpose(1, 2)).mul_(self.scale)

    def see(self, scores: Tensor, values: Tensor) -> None:
        """scores: [Hkv, r, n], -inf for what is not seen; values: [Hkv, n, D]."""
        self.scores.append(scores)
        self.values.append(values.to(self.q.dtype))

    def attention(self) -> Tensor:
        """One softmax over all that was seen: [Hkv, r, D]."""
        weights = torch.cat(self.scores, 2).softmax(2).split([s.shape[2] for s in self.scores], 2)
        return sum(w @ v for w, v in zip(weights, self.values))


def see_ranges(query: Query, layer: Sequence[RowStore], step: Step, i: int) -> None:
    """Token ``i`` sees its raw range and the sinks, and unless it recalls its ranges of gists."""
    lo, hi = step.lo[:, i].tolist(), step.hi[:, i].tolist()
    ranges = [(layer[-1], lo[-1], hi[-1])] if step.recalls[i] else [*zip(layer, lo, hi)]
    for rows, first, last in (*ranges, (layer[-1], 0, int(step.sinks[i]))):
        if last > first:
            query.see(query.score(rows.keys(first, last)), rows.values(first, last))


def unfold(query: Query, layer: Sequence[RowStore], step: Step, i: int, rule: SelectRule) -> None:
    """Token ``i`` selects gists level by level and sees them, and the raw tokens behind those of level 0."""
    kv_heads, group, _ = query.q.shape
    outline = step.borders[i]
    parents = None  # selected one level up: rows [Hkv, K] ascending, and by which head [Hkv, heads, K]
    for s in range(outline.levels):
        count = int(step.upto[s, i])
        if count == 0:
            continue
        if parents is None:  # no gist above: every gist of this level is a candidate
            rows, keys = torch.arange(count).expand(kv_heads, -1), layer[s].keys(0, count)
            candidates = torch.ones(1, 1, count, dtype=torch.bool)
        else:
            rows, candidates = _candidates(outline, s, *parents, int(step.tail[s, i]), count)
            keys = layer[s].keys_at(rows.to(query.q.device))
        scores = query.score(keys)  # [Hkv, r, n]
        summed = scores.sum(1, keepdim=True) if rule.share == "group" else scores
        budget = rule.budget(step.span[i : i + 1], step.upto[s, i : i + 1], group).to(scores.device)
        taken = take_best(summed[:, :, None], candidates[:, :, None].to(scores.device), budget, rule.top_p)[:, :, 0]
        order, valid = _compact(taken.any(1))
        pick = lambda x: x.gather(2, order[:, None].expand(-1, x.shape[1], -1))  # noqa: B023
        chosen = rows.gather(1, order.cpu())
        query.see(pick(scores).masked_fill(~valid[:, None], -torch.inf), layer[s].values_at(chosen.to(order.device)))
        parents = chosen, (pick(taken) & valid[:, None]).cpu()
    if parents is None:
        return
    raw, unfolded = _raw_behind(outline, *parents, int(step.lo[-1, i]))
    if raw.shape[1]:
        raw, unfolded = raw.to(query.q.device), unfolded.to(query.q.device)
        scores = query.score(layer[-1].keys_at(raw)).masked_fill(~unfolded[:, None], -torch.inf)
        query.see(scores, layer[-1].values_at(raw))


def _compact(taken: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Hkv, n] -> where each head's True entries are, ascending [Hkv, K], and which of these exist."""
    count = taken.sum(1)
    order = taken.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return order, torch.arange(order.shape[1], device=order.device) < count[:, None]


def _expand(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [Hkv, K] -> their members side by side, padded to the longest, and which exist: two [Hkv, K, W]."""
    members = lo[..., None] + torch.arange(int((hi - lo).max()))
    exist = members < hi[..., None]
    return members.where(exist, lo[..., None]), exist


def _candidates(outline: Borders, segment: int, rows: Tensor, by: Tensor, tail: int, count: int) -> tuple[Tensor, Tensor]:
    """Children of the selected parents, then gists whose parent is not closed yet: ascending, so that ties go to the earlier.

    rows: [Hkv, K] parents; by: bool [Hkv, heads, K], who selected them. Returns [Hkv, n] and bool [Hkv, heads, n].
    """
    members, exist = _expand(*outline.children(segment - 1, rows))
    open_ones = torch.arange(tail, count)
    candidates = (by[..., None] & exist[:, None]).flatten(2)  # [Hkv, heads, K * W]
    return (
        torch.cat([members.flatten(1), open_ones.expand(len(rows), -1)], 1),
        torch.cat([candidates, candidates.new_ones(len(rows), by.shape[1], len(open_ones))], 2),
    )


def _raw_behind(outline: Borders, rows: Tensor, by: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Raw tokens of the chunks of selected level-0 gists that begin before the window: [Hkv, n], and which exist."""
    lo, hi = outline.children(outline.levels - 1, rows)
    # A chunk lies in the window entirely or not at all: the window begins where a chunk does.
    near = (hi > window) | ~by.any(1)
    members, exist = _expand(lo, hi.where(~near, lo))
    return members.flatten(1), exist.flatten(1)
