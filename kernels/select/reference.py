"""Selection by plain loops, one query and one head at a time: slow, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree


def select_gists_reference(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, scale: float) -> Selection:
    """The selection of every recalling query.

    Args:
        q: [N, H, D], the recalling queries.
        k: [B, T, Hkv, D], keys of all tokens in interleaved order; only those of gists are read.
        tree: hierarchy and queries.
        rule: budget and sharing.
        scale: factor on the scores; matters to top-p alone.
    """
    kv_heads = k.shape[2]
    group = q.shape[1] // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    lists = [[] for _ in range(tree.levels)]
    for n in range(tree.queries):
        sample = int(tree.tokens[n]) // k.shape[1]
        keys = k[sample][tree.others.rows[sample, : k.shape[1]]].to(wide)  # [T, Hkv, D], level-sorted
        for h in range(kv_heads):
            scores = (keys[:, h] @ q[n, h * group : (h + 1) * group].to(wide).T) * scale  # [T, r]
            columns = [scores.sum(1)] if rule.share == "group" else scores.unbind(1)
            chosen = [_descend(column.tolist(), n, sample, tree, rule, group) for column in columns]
            for s in range(tree.levels):
                lists[s].append(sorted(set().union(*(c[s] for c in chosen))))
    rows = tuple(torch.tensor([r for one in level for r in one], dtype=torch.int32, device=q.device) for level in lists)
    lengths = (torch.tensor([0] + [len(one) for one in level], device=q.device) for level in lists)
    return Selection(rows, tuple(x.cumsum(0) for x in lengths), kv_heads)


def _descend(score: list[float], n: int, sample: int, tree: GistTree, rule: SelectRule, group: int) -> list[list[int]]:
    """The rows that query ``n`` selects in each segment, best first, given the score of every row."""
    chosen = []
    for s in range(tree.levels):
        first, last, tail = int(tree.lo[s, n]), int(tree.hi[s, n]), int(tree.tail[s, n])
        candidates = list(range(tail, last))
        if s > 0:
            for parent in chosen[s - 1]:
                candidates += range(int(tree.child_lo[sample, parent]), int(tree.child_hi[sample, parent]))
        candidates.sort(key=lambda row: (-score[row], row))
        if rule.top_p is None:
            count = int(rule.budget(tree.span[n], torch.tensor(last - first), group))
        else:
            count = fewest([score[row] for row in candidates], rule.top_p)
        chosen.append(candidates[:count])
    return chosen


def fewest(scores: list[float], top_p: float) -> int:
    """How many of the descending ``scores`` it takes for their share of the softmax to reach ``top_p``."""
    share = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    reached = 0.0
    for count, part in enumerate(share):
        if reached >= top_p:
            return count
        reached += part
    return len(share)
