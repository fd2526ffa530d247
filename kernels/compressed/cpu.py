"""Compressed attention on CPU: blocks of queries against the few key ranges they see. Memory linear in T.

Forward keeps the largest score and the sum of exponentials of each row (apart, since their joint log-sum-exp costs half
the digits of an fp32 gradient); backward recomputes the scores of a block, so that nothing of size queries x keys
outlives its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals, QueryBlock

# Queries per block. Larger blocks waste work on masked keys, smaller ones on call overhead.
BLOCK = 64


def compressed_attention_cpu(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float) -> Tensor:
    """As :func:`kernels.compressed.reference.compressed_attention_reference`, with memory linear in T."""
    return _CompressedAttention.apply(q, k, v, intervals, scale)


def _group_queries(x: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] -> [Hkv, T, G, D], contiguous: a block of queries is then one slice, its rows a plain view."""
    tokens, heads, dim = x.shape
    return x.view(tokens, kv_heads, heads // kv_heads, dim).transpose(0, 1).contiguous()


def _sort_keys(x: Tensor, rows: Tensor) -> Tensor:
    """[T, Hkv, D] -> [Hkv, R, D] in level-sorted order."""
    return x.index_select(0, rows).transpose(0, 1).contiguous()


def _unsort_keys(x: Tensor, intervals: Intervals, sample: int) -> Tensor:
    """Gradient of :func:`_sort_keys`: [Hkv, R, D] -> [T, Hkv, D]; sink copies are added to their tokens."""
    by_row = x.transpose(0, 1)
    out = by_row.index_select(0, intervals.row_of[sample])
    sink = intervals.tokens
    return out.index_add_(0, intervals.rows[sample, sink:], by_row[sink:])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _hidden(block: QueryBlock, lo: Tensor, hi: Tensor) -> Tensor:
    """bool [queries, keys], True where a query of the block does *not* see a key of its spans. lo, hi: [S, T]."""
    parts = []
    for s, first, last in block.spans:
        row = torch.arange(first, last, dtype=lo.dtype)
        start, stop = lo[s, block.start : block.stop, None], hi[s, block.start : block.stop, None]
        parts.append((row < start) | (row >= stop))
    return torch.cat(parts, 1)


def _span_keys(x: Tensor, block: QueryBlock) -> Tensor:
    """[Hkv, R, D] -> [Hkv, keys, D], the block's spans side by side."""
    return torch.cat([x[:, first:last] for _, first, last in block.spans], 1)


def _add_to_spans(x: Tensor, block: QueryBlock, rows: Tensor) -> None:
    """Add [Hkv, keys, D] to the block's spans of x [Hkv, R, D]: the transpose of :func:`_span_keys`."""
    at = 0
    for _, first, last in block.spans:
        x[:, first:last] += rows[:, at : at + last - first]
        at += last - first


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[Hkv, queries, G, D] x [Hkv, keys, D] -> scaled, masked scores [Hkv, queries * G, keys]."""
    heads, queries, group, dim = q.shape
    scores = torch.bmm(q.reshape(heads, queries * group, dim), k.transpose(1, 2)).mul_(scale)
    scores.view(heads, queries, group, -1).masked_fill_(hidden[:, None], -torch.inf)
    return scores


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float) -> Tensor:
        batch, tokens, heads, dim = q.shape
        kv_heads = k.shape[2]
        out = torch.zeros_like(q)
        group = heads // kv_heads
        row_max, row_sum = _wide(q).new_ones(2, batch, kv_heads, tokens * group)
        for b, blocks in enumerate(intervals.plan(BLOCK)):
            q_b = _group_queries(_wide(q[b]), kv_heads)
            k_b, v_b = (_sort_keys(_wide(x[b]), intervals.rows[b]) for x in (k, v))
            for block in blocks:
                if not block.spans:
                    continue
                i, j = block.start, block.stop
                hidden = _hidden(block, intervals.lo[b], intervals.hi[b])
                scores = _scores(q_b[:, i:j], _span_keys(k_b, block), hidden, scale)
                # A row that sees nothing has maximum -inf and sum 0: its weights, output and gradients shall be 0, not nan.
                largest = scores.amax(-1).clamp_(min=-1e30)
                weights = scores.sub_(largest[..., None]).exp_()
                total = weights.sum(-1)
                total += total == 0
                row_max[b, :, i * group : j * group] = largest
                row_sum[b, :, i * group : j * group] = total
                rows = torch.bmm(weights, _span_keys(v_b, block)).div_(total[..., None])  # [Hkv, queries * G, D]
                out[b, i:j] = rows.view(kv_heads, j - i, group, dim).transpose(0, 1).reshape(j - i, heads, dim)
        ctx.save_for_backward(q, k, v, row_max, row_sum)
        ctx.intervals, ctx.scale = intervals, scale
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, row_max, row_sum = ctx.saved_tensors
        intervals, scale = ctx.intervals, ctx.scale
        heads, dim = q.shape[2:]
        kv_heads = k.shape[2]
        group = heads // kv_heads
        d_q, d_k, d_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for b, blocks in enumerate(intervals.plan(BLOCK)):
            q_b = _group_queries(_wide(q[b]), kv_heads)
            do_b = _group_queries(_wide(d_out[b]), kv_heads)
            k_b, v_b = (_sort_keys(_wide(x[b]), intervals.rows[b]) for x in (k, v))
            # The upstream gradient over the row's sum: exp(score - max) then serves as the weight as it is.
            do_b = do_b / row_sum[b].view(*do_b.shape[:3], 1)
            dk_b, dv_b = torch.zeros_like(k_b), torch.zeros_like(v_b)
            for block in blocks:
                if not block.spans:
                    continue
                i, j = block.start, block.stop
                flat = lambda x: x[:, i:j].reshape(kv_heads, (j - i) * group, -1)  # noqa: B023
                k_s, v_s = _span_keys(k_b, block), _span_keys(v_b, block)
                hidden = _hidden(block, intervals.lo[b], intervals.hi[b])
                weights = _scores(q_b[:, i:j], k_s, hidden, scale)
                at = slice(i * group, j * group)
                weights = weights.sub_(row_max[b, :, at, None]).exp_()
                d_weights = torch.bmm(flat(do_b), v_s.transpose(1, 2))
                # The weighted mean from the very products it is taken off: d_out . out would differ from it by rounding.
                mean = (weights * d_weights).sum(-1).div_(row_sum[b, :, at])
                d_scores = d_weights.sub_(mean[..., None]).mul_(weights).mul_(scale)
                rows = torch.bmm(d_scores, k_s)
                d_q[b, i:j] = rows.view(kv_heads, j - i, group, dim).transpose(0, 1).reshape(j - i, heads, dim)
                _add_to_spans(dk_b, block, torch.bmm(d_scores.transpose(1, 2), flat(q_b)))
                _add_to_spans(dv_b, block, torch.bmm(weights.transpose(1, 2), flat(do_b)))
            d_k[b] = _unsort_keys(dk_b, intervals, b)
            d_v[b] = _unsort_keys(dv_b, intervals, b)
        return d_q, d_k, d_v, None, None
