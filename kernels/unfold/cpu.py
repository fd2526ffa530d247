"""Unfolding on CPU: blocks of recalling queries, memory proportional to what a block unfolds.

Forward keeps the selection and two numbers per row; backward recomputes a block's weights, as compressed attention does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unfold.kernels.common.saved import with_tensors, without_tensors
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold.pattern import Entries, Pattern, apart_keys, local_keys, sort_keys, unsort_keys

# Queries per local piece.
BLOCK = 64
# Unfolded chunks (over queries and KV heads) per pattern, which bounds the memory: each costs a few times r * c0 numbers.
# Many of them fill the tiles of a chunk.
CHUNKS = 2**18
# Entries of its local pieces, which bound the memory where queries select little of a long document: four bytes each.
LOCAL = 2**26


def unfold_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: GistTree,
    selection: Selection,
    scale: float,
    apart: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As :func:`kernels.unfold.reference.unfold_attention_reference`, vectorised."""
    return _UnfoldAttention.apply(q, k, v, *(apart or (None, None)), tree, selection, scale)


def _patterns(tree: GistTree, selection: Selection, group: int, rows: int) -> Iterator[Pattern]:
    """The recalling queries in patterns of about equal and bounded size, each of whole blocks; rows: as of :class:`Pattern`."""
    blocks = [(sample, block) for sample, blocks in enumerate(tree.plan(BLOCK)) for block in blocks]
    if not blocks:
        return
    # Chunks unfolded up to the end of each block.
    chunks = selection.start[-1][[block.stop * selection.kv_heads for _, block in blocks]].tolist()
    share = chunks[-1] / max(1, -(-chunks[-1] // CHUNKS))
    batch, filled, local = [], 0, 0
    for block, upto in zip(blocks, chunks):
        batch.append(block)
        local += local_keys(tree, block[1]) * (block[1].stop - block[1].start) * group * selection.kv_heads
        if upto - filled >= share or local >= LOCAL:
            yield Pattern(tree, selection, batch, group, rows)
            batch, filled, local = [], upto, 0
    if batch:
        yield Pattern(tree, selection, batch, group, rows)


def _scores(pattern: Pattern, by_row: Tensor, keys: Tensor, scale: float) -> Entries:
    """Scaled scores, -inf where a row does not attend."""
    scores = pattern.against(by_row, keys).map(lambda x: x.mul_(scale))
    pattern.hide_(scores)
    return scores


def _weights(pattern: Pattern, scores: Entries, row_max: Tensor) -> Entries:
    """exp(score - the row's largest), in place; 0 in the empty slots of a tile."""
    pattern.less_(scores, row_max, padding=torch.inf)
    return scores.map(torch.Tensor.exp_)


class _UnfoldAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_apart, v_apart, tree: GistTree, selection: Selection, scale: float) -> Tensor:
        out = torch.empty_like(q)
        stats = []
        keys, values = sort_keys(k, k_apart, tree), sort_keys(v, v_apart, tree)
        for pattern in _patterns(tree, selection, q.shape[1] // k.shape[2], keys.shape[1]):
            scores = _scores(pattern, pattern.by_row(q), keys, scale)
            row_max = pattern.maximum(scores)
            weights = _weights(pattern, scores, row_max)
            row_sum = pattern.total(weights)
            out[pattern.at] = pattern.by_query(pattern.mix(weights, values).div_(row_sum[..., None]))
            stats.append((row_max, row_sum))
        ctx.selection, chosen = without_tensors(selection)
        # A checkpoint lets go of what is saved like this, and makes it again.
        ctx.save_for_backward(q, k, v, k_apart, v_apart, *chosen, *(x for pair in stats for x in pair))
        ctx.tree, ctx.scale, ctx.chosen = tree, scale, len(chosen)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, k_apart, v_apart, *saved = ctx.saved_tensors
        tree, scale = ctx.tree, ctx.scale
        selection, stats = with_tensors(ctx.selection, saved[: ctx.chosen]), saved[ctx.chosen :]
        d_q = torch.empty_like(q)
        keys, values = sort_keys(k, k_apart, tree), sort_keys(v, v_apart, tree)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        patterns = _patterns(tree, selection, q.shape[1] // k.shape[2], keys.shape[1])
        for pattern, row_max, row_sum in zip(patterns, stats[::2], stats[1::2]):
            queries = pattern.by_row(q)
            weights = _weights(pattern, _scores(pattern, queries, keys, scale), row_max)
            # The upstream gradient over the row's sum: exp(score - max) then serves as the weight as it is.
            d_rows = pattern.by_row(d_out) / row_sum[..., None]
            d_scores = pattern.against(d_rows, values)
            # The weighted mean from the very products it is taken off, as in compressed attention.
            mean = pattern.total(d_scores.map(torch.mul, weights)) / row_sum
            pattern.less_(d_scores, mean)
            d_scores = d_scores.map(lambda x, w: x.mul_(w).mul_(scale), weights)
            d_q[pattern.at] = pattern.by_query(pattern.mix(d_scores, keys))
            pattern.spread_(d_scores, queries, d_keys)
            pattern.spread_(weights, d_rows, d_values)
        d_k, d_v = (unsort_keys(x, tree).to(k.dtype) for x in (d_keys, d_values))
        d_apart = (None if k_apart is None else apart_keys(x, tree).to(k.dtype) for x in (d_keys, d_values))
        return d_q, d_k, d_v, *d_apart, None, None, None
