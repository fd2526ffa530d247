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
from torch.autograd.function import once_differentiable

from unfold.kernels.route.queries import Routed
from unfold.kernels.route.rows import RoutedBlock, SampleRows, sample_rows, sum_bags

QUERIES = 64  # of a block
# Raw rows of a piece. On CPU its scores should stay in the cache; elsewhere few launches are what counts.
RAW_ROWS = {"cpu": 512}
MOST_RAW_ROWS = 8192
HIDDEN = -1e30  # finite: a column that sees nothing must not compute inf - inf


def rows_of(routed: Routed, part: tuple[int, int] | None = None) -> list[SampleRows]:
    """The (memoised) rows of every sample, or of the tokens ``part`` of every sample, in blocks for this device."""
    return sample_rows(routed, QUERIES, RAW_ROWS.get(routed.first.device.type, MOST_RAW_ROWS), part)


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
class Ranges:
    """A block's ranges by column: lo, hi [L + 1, columns], far [columns], as in :class:`RoutedBlock`."""

    lo: Tensor
    hi: Tensor
    far: Tensor

    @classmethod
    def of(cls, block: RoutedBlock, group: int) -> Ranges:
        return cls(*(x.repeat_interleave(group, -1) for x in (block.lo, block.hi, block.far)))

    def inside(self, s: int, count: int) -> Tensor:
        """bool [count, columns], the slots of a gist segment's span that are in each column's range."""
        slot = torch.arange(count, device=self.lo.device)[:, None]
        return (slot >= self.lo[s]) & (slot < self.hi[s])


def teacher(q: Tensor, keys: Tensor, block: RoutedBlock, ranges: Ranges) -> tuple[Tensor, Tensor, Tensor]:
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
    for raw, whole in block.raw:
        scores = keys[raw.first : raw.last] @ q.T
        if not whole:
            row = torch.arange(raw.first, raw.last, device=q.device)[:, None]
            scores.masked_fill_((row < ranges.lo[-1]) | (row >= ranges.hi[-1]), -torch.inf)
        top = scores.amax(0).clamp_(min=HIDDEN)
        weights = scores.sub_(top).exp_()
        a, b = (min(max(c, first), last) for c in raw.chunks)
        if b > a:
            bag = raw.bag.part(a - raw.chunks[0], b - raw.chunks[0], 0)
            chunks[a - first : b - first] = sum_bags(weights, bag)
        pieces.append((top, weights.sum(0), slice(a - first, b - first)))
    if not pieces:
        return q.new_full((len(q),), HIDDEN), q.new_zeros(len(q)), chunks
    highest = torch.stack([top for top, *_ in pieces]).amax(0)
    total = torch.zeros_like(highest)
    for top, summed, at in pieces:
        factor = (top - highest).exp_()
        total += summed * factor
        chunks[at] *= factor
    return highest, total, chunks


def masses(chunks: Tensor, block: RoutedBlock, ranges: Ranges, far: bool) -> list[Tensor]:
    """Per gist segment [slots of the span, columns], zero outside of a column's range; ``chunks``: of all, by level-0 slot."""
    inside = ranges.inside(len(block.spans) - 1, len(chunks))
    if far:
        inside &= torch.arange(len(chunks), device=chunks.device)[:, None] < ranges.far
    found = [chunks * inside]
    for s in reversed(range(len(block.upper))):
        summed = sum_bags(found[0], block.upper[s])
        found.insert(0, summed * ranges.inside(s, len(summed)))
    return found


def student_scores(q: Tensor, keys: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [gists, columns], HIDDEN outside; per column the largest, and the sum of exponentials relative to it."""
    scores = (keys @ q.T).masked_fill_(~inside, HIDDEN)
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
) -> Iterator[tuple[RoutedBlock, int, Tensor, list[Tensor], Ranges, list[Tensor]]]:
    """Of a whole sample, by block and KV head: block, head, scaled columns, keys by segment, ranges, masses by segment."""
    kv_heads = k.shape[2]
    if not rows.blocks:
        return
    keys = segment_keys(k, rows, routed)
    for block in rows.blocks:
        ranges = Ranges.of(block, q.shape[1] // kv_heads)
        for h in range(kv_heads):
            columns = columns_of(q, block, h, kv_heads, scale)
            _, total, chunks = teacher(columns, keys[-1][h], block, ranges)
            yield block, h, columns, [x[h] for x in keys], ranges, masses(chunks.div_(total), block, ranges, far)


def routing_loss_cpu(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Tensor:
    """As :func:`kernels.route.reference.routing_loss_reference`, vectorised; memory linear in T."""
    return _RoutingLoss.apply(q.detach(), k, routed, far, scale)


class _RoutingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=q.device)
        plan = rows_of(routed)
        d_gists = gist_gradients(k, plan)
        for rows in plan:
            for block, h, columns, keys, ranges, mass in sample_masses(q, k, rows, routed, far, scale):
                for s, (first, last) in enumerate(block.spans):
                    if last == first:
                        continue
                    scores, top, summed = student_scores(columns, keys[s][first:last], ranges.inside(s, last - first))
                    part, d_scores = student_loss(scores, mass[s], top + summed.log(), mass[s].sum(0))
                    loss += part
                    at = slice(rows.rows[s][0] + first, rows.rows[s][0] + last)
                    d_gists[rows.sample, h, at].addmm_(d_scores, columns)  # the columns hold the scale
        ctx.save_for_backward(d_gists)
        ctx.routed, ctx.like = routed, (k.shape, k.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        (d_gists,) = ctx.saved_tensors
        shape, dtype = ctx.like
        tokens = ctx.routed.tree.others.rows[:, : d_gists.shape[2]]
        return None, spread_gists(d_gists.transpose(1, 2) * d_loss, tokens, shape, dtype), None, None, None


def gist_gradients(k: Tensor, plan: list[SampleRows]) -> Tensor:
    """Zeros [B, Hkv, gists of the sample that has most, D], at least fp32, for the gradients of level-sorted gists."""
    most = max(rows.rows[-2][1] for rows in plan)
    return k.new_zeros(len(plan), k.shape[2], most, k.shape[3], dtype=torch.promote_types(k.dtype, torch.float32))


def spread_gists(d_gists: Tensor, tokens: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """d_gists [B, n, Hkv, D] to where ``tokens`` [B, n], all different, says; [B, T, Hkv, D], zero elsewhere."""
    d_k = torch.zeros(shape, dtype=dtype, device=d_gists.device)
    sample = torch.arange(shape[0], device=d_k.device)[:, None]
    d_k[sample, tokens] = d_gists.to(dtype)
    return d_k
