"""Unfolding by plain loops, one query and one KV head at a time: slow, obviously right, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree


def unfold_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: GistTree,
    selection: Selection,
    scale: float,
    apart: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of every recalling query over its set of keys.

    Args:
        q: [N, H, D], the recalling queries; k, v: [B, T, Hkv, D] in interleaved order.
        tree: hierarchy and queries.
        selection: the gists that each query and KV head selected.
        scale: factor on the scores.
        apart: keys and values [F, Hkv, D] of the raw tokens that stand apart; None: there are none.

    Returns:
        [N, H, D] in q's dtype.
    """
    tokens, kv_heads = k.shape[1:3]
    group = q.shape[1] // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    apart = apart or (k.new_empty(0, *k.shape[2:]),) * 2
    rows = []
    for n in range(tree.queries):
        sample = int(tree.tokens[n]) // tokens
        heads = []
        for h in range(kv_heads):
            seen, beyond = sorted(visible_tokens(tree, selection, n, h)), _visible_apart(tree, selection, n, h)
            keys, values = (torch.cat([x[sample, seen, h], y[beyond, h]]).to(wide) for x, y in zip((k, v), apart))  # [keys, D]
            scores = q[n, h * group : (h + 1) * group].to(wide) @ keys.T * scale  # [r, keys]
            heads.append(scores.softmax(-1) @ values)
        rows.append(torch.cat(heads))
    return torch.stack(rows).to(q.dtype) if rows else q * 1


def visible_tokens(tree: GistTree, selection: Selection, query: int, kv_head: int) -> set[int]:
    """The tokens (of the query's sample) that one recalling query and KV head attends to, but for those that stand apart."""
    sample = int(tree.tokens[query]) // tree.others.tokens
    rows = [row for row in _visible_rows(tree, selection, query, kv_head) if row < tree.others.rows.shape[1]]
    return set(tree.others.rows[sample, sorted(rows)].tolist())


def _visible_apart(tree: GistTree, selection: Selection, query: int, kv_head: int) -> list[int]:
    """Which of the tokens that stand apart it attends to."""
    first = tree.others.rows.numel() - int(tree.tokens[query]) // tree.others.tokens * tree.others.rows.shape[1]
    return sorted(row - first for row in _visible_rows(tree, selection, query, kv_head) if row >= first)


def _visible_rows(tree: GistTree, selection: Selection, query: int, kv_head: int) -> set[int]:
    sample = int(tree.tokens[query]) // tree.others.tokens
    ranges = [(int(tree.lo[s, query]), int(tree.hi[s, query])) for s in (tree.levels, tree.levels + 1)]  # window, sinks
    rows = {row for first, last in ranges for row in range(first, last)}
    for s in range(tree.levels):
        rows |= set(selection.of(s, query, kv_head).tolist())
    for gist in selection.of(tree.levels - 1, query, kv_head).tolist():
        rows |= set(range(int(tree.child_lo[sample, gist]), int(tree.child_hi[sample, gist])))
    return rows
