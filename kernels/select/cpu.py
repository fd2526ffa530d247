"""Selection in plain tensor operations, on any device: blocks of neighbouring queries score all gists that any could take.

The scores of a block are dense over the gists of its documents (T / c0 of them, not T): one matrix product is cheaper on
CPU than a gather of each query's candidates. What is no candidate is masked before the best are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.intervals import QueryBlock
from unfold.kernels.select.selection import Selection, SelectRule, take_best
from unfold.kernels.tree import GistTree

# Queries per block; bounds the scores to heads x BLOCK x gists.
BLOCK = 64


def select_gists_cpu(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, scale: float) -> Selection:
    """As :func:`kernels.select.reference.select_gists_reference`, vectorised; memory linear in T."""
    kv_heads = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = [[torch.zeros(0, dtype=torch.int32, device=q.device)] for _ in range(tree.levels)]
    counts = [[torch.zeros(1, dtype=torch.int64, device=q.device)] for _ in range(tree.levels)]
    for sample, blocks in enumerate(tree.plan(BLOCK)):
        if not blocks:
            continue
        gists = int(tree.others.segment_start[sample, tree.levels])
        sorted_rows = tree.others.rows[sample, :gists]
        keys = k[sample].index_select(0, sorted_rows).to(wide).transpose(0, 1).contiguous()  # [Hkv, gists, D]
        for block in blocks:
            for s, (first, taken) in enumerate(_select_block(q, keys, block, sample, tree, rule, scale)):
                by_query = taken.transpose(0, 1)  # [queries, Hkv, W]
                rows[s].append((by_query.nonzero()[:, 2] + first).int())
                counts[s].append(by_query.sum(-1).flatten())
    starts = tuple(torch.cat(c).cumsum(0) for c in counts)
    return Selection(tuple(torch.cat(r) for r in rows), starts, kv_heads)


def _select_block(
    q: Tensor, keys: Tensor, block: QueryBlock, sample: int, tree: GistTree, rule: SelectRule, scale: float
) -> list[tuple[int, Tensor]]:
    """Per segment its first scored row and what was taken from there: bool [Hkv, queries, W]; W is 0 without gists.

    q: [N, H, D]; keys: [Hkv, gists, D], the sample's gists in level-sorted order.
    """
    at = slice(block.start, block.stop)
    queries, (kv_heads, _, dim) = block.stop - block.start, keys.shape
    group = q.shape[1] // kv_heads
    q_block = q[at].to(keys.dtype).view(queries, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    spans = {s: (first, last) for s, first, last in block.spans}
    result, parents = [], None
    for s in range(tree.levels):
        first, last = spans.get(s, (0, 0))
        scores = torch.bmm(q_block, keys[:, first:last].transpose(1, 2)).mul_(scale)
        scores = scores.view(kv_heads, group, queries, last - first)
        if rule.share == "group":
            scores = scores.sum(1, keepdim=True)
        row = torch.arange(first, last, dtype=torch.int32, device=q.device)
        lo, hi = tree.lo[s, at, None], tree.hi[s, at, None]
        candidates = (row >= tree.tail[s, at, None]) & (row < hi)  # [queries, W]
        if parents is not None and last > first:
            # A parent outside of what was scored is closed for no query of the block: its children are in the tail.
            parent = (tree.parent[sample, first:last] - parents[0]).clamp_(0, parents[1].shape[-1] - 1)
            chosen = parents[1].index_select(-1, parent)  # [Hkv, heads, queries, W]
            candidates = candidates | (chosen & ((row >= lo) & (row < hi)))
        taken = torch.zeros_like(scores, dtype=torch.bool)
        if last > first:
            budget = rule.budget(tree.span[at], (hi - lo)[:, 0], group)
            taken = take_best(scores, candidates, budget, rule.top_p)
        parents = (first, taken) if last > first else None
        result.append((first, taken.any(1)))
    return result
