"""Unfolding on CPU: blocks of recalling queries, memory proportional to what a block unfolds.

Forward keeps the selection and two numbers per row; backward recomputes a block's weights, as compressed attention does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.intervals import QueryBlock
from kernels.select.selection import Selection
from kernels.tree import GistTree
from kernels.unfold.pattern import Entries, Keys, Pattern, Rows

# Queries per local piece.
BLOCK = 64
# Numbers (slots * r * D) that one copy of the rows in tiles may hold. They must stay in the cache, or every product waits for
# memory (3x slower at 16M); many rows per chunk fill its tiles. So one KV head with many queries goes before many heads.
NUMBERS = 2**21


def unfold_attention_cpu(q: Tensor, k: Tensor, v: Tensor, tree: GistTree, selection: Selection, scale: float) -> Tensor:
    """As :func:`kernels.unfold.reference.unfold_attention_reference`, vectorised."""
    return _UnfoldAttention.apply(q, k, v, tree, selection, scale)


def _patterns(tree: GistTree, selection: Selection, sample: int, group: int, dim: int) -> Iterator[Pattern]:
    """The sample's recalling queries and KV heads in patterns of bounded size."""
    kv_heads, blocks = selection.kv_heads, tree.plan(BLOCK)[sample]
    if not blocks:
        return
    most = max(1, NUMBERS // (group * dim))  # (query, chunk) pairs
    ends = selection.start[-1][[b.start * kv_heads for b in blocks] + [blocks[-1].stop * kv_heads]]
    pairs_per_head = [-(-n // kv_heads) for n in ends.diff().tolist()]
    width = min(kv_heads, max(1, most // max(1, sum(pairs_per_head))))
    for first in range(0, kv_heads, width):
        heads = slice(first, min(first + width, kv_heads))
        for batch in _batches(blocks, pairs_per_head, most):
            yield Pattern(tree, selection, sample, batch, heads, group)


def _batches(blocks: list[QueryBlock], sizes: list[int], most: int) -> Iterator[list[QueryBlock]]:
    """Consecutive blocks, as many as together have at most the size ``most``, at least one."""
    batch, total = [], 0
    for block, size in zip(blocks, sizes):
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(block)
        total += size
    yield batch


def _scores(pattern: Pattern, rows: Rows, keys: Keys, scale: float) -> Entries:
    """Scaled scores, -inf where a row does not attend."""
    scores = pattern.against(rows, keys).map(lambda x: x.mul_(scale))
    pattern.hide_(scores)
    return scores


def _weights(pattern: Pattern, scores: Entries, row_max: Tensor) -> Entries:
    """exp(score - the row's largest), in place; 0 in the empty slots of a tile."""
    pattern.less_(scores, row_max, padding=torch.inf)
    return scores.map(torch.Tensor.exp_)


class _UnfoldAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tree: GistTree, selection: Selection, scale: float) -> Tensor:
        out = torch.empty_like(q)
        stats = []
        for sample in range(len(k)):
            keys, values = (Keys.of(x[sample], tree, sample) for x in (k, v))
            for pattern in _patterns(tree, selection, sample, q.shape[1] // k.shape[2], q.shape[2]):
                scores = _scores(pattern, pattern.rows(pattern.by_row(q)), keys, scale)
                row_max = pattern.maximum(scores)
                weights = _weights(pattern, scores, row_max)
                row_sum = pattern.total(weights)
                out[pattern.at] = pattern.by_query(pattern.mix(weights, values).div_(row_sum[..., None]))
                stats.append((row_max, row_sum))
        ctx.save_for_backward(q, k, v)
        ctx.stats, ctx.tree, ctx.selection, ctx.scale = stats, tree, selection, scale
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v = ctx.saved_tensors
        tree, selection, scale = ctx.tree, ctx.selection, ctx.scale
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        stats = iter(ctx.stats)
        for sample in range(len(k)):
            keys, values = (Keys.of(x[sample], tree, sample) for x in (k, v))
            d_keys, d_values = keys.zeros_like(), values.zeros_like()
            for pattern in _patterns(tree, selection, sample, q.shape[1] // k.shape[2], q.shape[2]):
                row_max, row_sum = next(stats)
                queries = pattern.rows(pattern.by_row(q))
                weights = _weights(pattern, _scores(pattern, queries, keys, scale), row_max)
                # The upstream gradient over the row's sum: exp(score - max) then serves as the weight as it is.
                d_rows = pattern.rows(pattern.by_row(d_out) / row_sum[..., None])
                d_scores = pattern.against(d_rows, values)
                # The weighted mean from the very products it is taken off, as in compressed attention.
                mean = pattern.total(d_scores.map(torch.mul, weights)) / row_sum
                pattern.less_(d_scores, mean)
                d_scores = d_scores.map(lambda x, w: x.mul_(w).mul_(scale), weights)
                d_q[pattern.at] = pattern.by_query(pattern.mix(d_scores, keys))
                pattern.spread_(d_scores, queries, d_keys)
                pattern.spread_(weights, d_rows, d_values)
            d_k[sample] = d_keys.unsorted(tree, sample)
            d_v[sample] = d_values.unsorted(tree, sample)
        return d_q, d_k, d_v, None, None, None
