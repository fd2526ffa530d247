"""The routing loss in plain tensor operations, on any device: blocks of queries against pieces of their documents.

Scores of a block are [rows, columns], a column being a query and a head of one KV head: then the sums over chunks are sums of
neighbouring rows. The loss is a sum and only gists get a gradient, so forward knows the gradient too: backward has nothing
to recompute, and nothing the size of queries times tokens is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.route.gradient import gists_of, wants_gradient, with_gradient
from unfold.kernels.route.queries import Routed
from unfold.kernels.route.rows import RoutedBlock, SampleRows, sample_rows, sum_bags

QUERIES = 64  # of a block
# Scores of a block against a piece of raw rows. On CPU they should stay in the cache; elsewhere few launches are what counts.
SCORES = {"cpu": 2**16}
MOST_SCORES = 2**25
HIDDEN = -1e30  # finite: a column that sees nothing must not compute inf - inf


def rows_of(
    routed: Routed, group: int, part: tuple[int, int] | None = None, device: torch.device | None = None
) -> list[SampleRows]:
    """The (memoised) rows of every sample, or of its tokens ``part``, in blocks for a device (that of ``routed``) and group."""
    scores = SCORES.get((device or routed.device).type, MOST_SCORES)
    return sample_rows(routed, QUERIES, max(1, scores // (QUERIES * group)), part)


def segment_keys(k: Tensor, rows: SampleRows, routed: Routed, first_token: int = 0) -> list[Tensor]:
    """Per segment [Hkv, rows, D] at least fp32. k: [B, tokens, Hkv, D], of which the first is token ``first_token``."""
    wide = torch.promote_types(k.dtype, torch.float32)
    tokens = [routed.tree.others.rows[rows.sample, first:last] - first_token for first, last in rows.rows]
    return [k[rows.sample].index_select(0, t).to(wide).transpose(0, 1).contiguous() for t in tokens]


def columns_of(q: Tensor, block: RoutedBlock, head: int, kv_heads: int, scale: float) -> Tensor:
    """[columns, D] at least fp32: the block's queries times the scale, query by query the heads of one KV head. q: [M, H, D]."""
    group = q.shape[1] // kv_heads
    own = q[block.queries, head * group : (head + 1) * group]
    return own.to(torch.promote_types(q.dtype, torch.float32)).reshape(-1, q.shape[2]) * scale


@dataclass(frozen=True)
class Hidden:
    """What the columns of a block do not have, True there; the same for all KV heads, which share it.

    Attributes:
        raw: per piece of raw rows [rows, columns], None where every column has all of them.
        gists: per gist segment [slots of the span, columns].
        untaught: [level-0 slots of the span, columns], chunks that count nothing: those, and near ones where far.
    """

    raw: list[Tensor | None]
    gists: list[Tensor]
    untaught: Tensor

    @classmethod
    def of(cls, block: RoutedBlock, group: int, far: bool) -> Hidden:
        lo, hi, near = (x.repeat_interleave(group, -1) for x in (block.lo, block.hi, block.far))
        row = torch.arange(max([raw.last for raw, _ in block.raw], default=0), device=lo.device)[:, None]
        slot = torch.arange(max(last - first for first, last in block.spans), device=lo.device)[:, None]
        outside = lambda x, s: (x < lo[s]) | (x >= hi[s])
        raw = [None if whole else outside(row[piece.first : piece.last], -1) for piece, whole in block.raw]
        gists = [outside(slot[: last - first], s) for s, (first, last) in enumerate(block.spans)]
        return cls(raw, gists, gists[-1] | (slot[: len(gists[-1])] >= near) if far else gists[-1])


def teacher(q: Tensor, keys: Tensor, block: RoutedBlock, hidden: Hidden) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the raw rows: each column's largest score, and relative to it the sums of exponentials, in all and by chunk.

    Args:
        q: [columns, D], scaled.
        keys: [raw rows, D].

    Returns:
        [columns], [columns], and [level-0 slots of the span, columns], that of chunks beyond a column's range included.
    """
    first, last = block.spans[-1]
    chunks = q.new_zeros(last - first, len(q))
    pieces = []
    for (raw, _), mask in zip(block.raw, hidden.raw):
        scores = keys[raw.first : raw.last] @ q.T
        if mask is not None:
            scores.masked_fill_(mask, -torch.inf)
        top = scores.amax(0).clamp_(min=HIDDEN)
        weights = scores.sub_(top).exp_()
        if raw.chunks[1] > raw.chunks[0]:
            chunks[slice(*raw.chunks)] = sum_bags(weights, raw.bag)
        pieces.append((top, weights.sum(0), slice(*raw.chunks)))
    if not pieces:
        return q.new_full((len(q),), HIDDEN), q.new_zeros(len(q)), chunks
    highest = torch.stack([top for top, *_ in pieces]).amax(0)
    total = torch.zeros_like(highest)
    for top, summed, at in pieces:
        factor = (top - highest).exp_()
        total += summed * factor
        chunks[at] *= factor
    return highest, total, chunks


def masses(chunks: Tensor, block: RoutedBlock, hidden: Hidden) -> list[Tensor]:
    """Per gist segment [slots of the span, columns], zero where hidden. ``chunks``, of all level-0 slots, is overwritten."""
    found = [chunks.masked_fill_(hidden.untaught, 0)]
    for s in reversed(range(len(block.upper))):
        found.insert(0, sum_bags(found[0], block.upper[s]).masked_fill_(hidden.gists[s], 0))
    return found


def student_scores(q: Tensor, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [gists, columns], HIDDEN where hidden; per column the largest, and the sum of exponentials relative to it."""
    scores = (keys @ q.T).masked_fill_(hidden, HIDDEN)
    if len(scores) == 0:
        return scores, q.new_full((len(q),), HIDDEN), q.new_zeros(len(q))
    top = scores.amax(0)
    return scores, top, (scores - top).exp_().sum(0)


def student_loss(scores: Tensor, mass: Tensor, log_sum: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one level, a scalar, and its gradient with respect to the scores.

    Args:
        scores, mass: [gists, columns].
        log_sum: [columns], of the exponentials of all gists' scores, wherever these are.
        whole: [columns], the sum of all gists' masses.
    """
    scores = scores - log_sum
    loss = -(mass * scores).sum()
    return loss, scores.exp_().mul_(whole).sub_(mass)


def sample_masses(
    q: Tensor, k: Tensor, rows: SampleRows, routed: Routed, far: bool, scale: float
) -> Iterator[tuple[RoutedBlock, int, Tensor, list[Tensor], Hidden, list[Tensor]]]:
    """Of a whole sample, by block and KV head: block, head, scaled columns, keys by segment, hidden, masses by segment."""
    kv_heads = k.shape[2]
    if not rows.blocks:
        return
    keys = segment_keys(k, rows, routed)
    for block in rows.blocks:
        hidden = Hidden.of(block, q.shape[1] // kv_heads, far)
        for h in range(kv_heads):
            columns = columns_of(q, block, h, kv_heads, scale)
            _, total, chunks = teacher(columns, keys[-1][h], block, hidden)
            yield block, h, columns, [x[h] for x in keys], hidden, masses(chunks.div_(total), block, hidden)


@torch.no_grad()
def _loss_and_gradient(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the level-sorted gists: [B, Hkv, gists, D], at least fp32, if wanted."""
    wide = torch.promote_types(q.dtype, torch.float32)
    plan = rows_of(routed, q.shape[1] // k.shape[2])
    loss = torch.zeros((), dtype=wide, device=q.device)
    d_gists = torch.zeros(k.shape[0], k.shape[2], gists_of(routed), k.shape[3], dtype=wide, device=k.device)
    for rows in plan:
        for block, h, columns, keys, hidden, mass in sample_masses(q, k, rows, routed, far, scale):
            for s, (first, last) in enumerate(block.spans):
                if last == first:
                    continue
                scores, top, summed = student_scores(columns, keys[s][first:last], hidden.gists[s])
                part, d_scores = student_loss(scores, mass[s], top + summed.log(), mass[s].sum(0))
                loss += part
                if wanted:
                    at = slice(rows.rows[s][0] + first, rows.rows[s][0] + last)
                    d_gists[rows.sample, h, at].addmm_(d_scores, columns)  # the columns hold the scale
    return loss, d_gists


def routing_loss_cpu(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Tensor:
    """As :func:`kernels.route.reference.routing_loss_reference`, vectorised; memory linear in T."""
    loss, d_gists = _loss_and_gradient(q, k, routed, far, scale, wants_gradient(k))
    return with_gradient(k, loss, d_gists.transpose(1, 2), routed.tree.others.rows[:, : d_gists.shape[2]])
