"""The routing loss by plain loops and autograd, one query and one head at a time: slow, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.route.queries import Routed


def routing_loss_reference(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Tensor:
    """The loss summed over queries and heads, a scalar.

    Args:
        q: [M, H, D], the sampled queries.
        k: [B, T, Hkv, D], keys in interleaved order; those of gists get the gradient.
        routed: the sampled queries' hierarchy and documents.
        far: chunks in a query's raw window count nothing.
        scale: factor on all scores.
    """
    tree, group = routed.tree, q.shape[1] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.detach().to(wide)
    loss = k.new_zeros((), dtype=wide)
    for n in range(tree.queries):
        sample = int(tree.tokens[n]) // k.shape[1]
        keys = k[sample][tree.others.rows[sample, : k.shape[1]]].to(wide)  # [T, Hkv, D], level-sorted
        for h in range(q.shape[1]):
            own = keys[:, h // group]
            mass = masses_reference(q[n, h], own.detach(), routed, n, sample, far, scale)
            for s in range(tree.levels):
                if mass[s]:
                    log_share = (own[min(mass[s]) : max(mass[s]) + 1] @ q[n, h] * scale).log_softmax(0)
                    loss = loss - (torch.stack(list(mass[s].values())) * log_share).sum()
    return loss


def masses_reference(
    q: Tensor, keys: Tensor, routed: Routed, n: int, sample: int, far: bool, scale: float
) -> list[dict[int, Tensor]]:
    """Per segment the teacher's mass of every gist before query ``n``, by row. q: [D]; keys: [T, D], level-sorted."""
    tree = routed.tree
    first, last = int(routed.first[n]), int(tree.hi[tree.levels, n])
    share = (keys[first:last] @ q * scale).softmax(0)
    mass: list[dict[int, Tensor]] = [{} for _ in range(tree.levels)]
    for s in reversed(range(tree.levels)):
        for row in range(int(tree.lo[s, n]), int(tree.hi[s, n])):
            lo, hi = int(tree.child_lo[sample, row]), int(tree.child_hi[sample, row])
            if s < tree.levels - 1:
                mass[s][row] = sum((mass[s + 1][child] for child in range(lo, hi)), share.new_zeros(()))
            elif far and hi > int(tree.lo[tree.levels, n]):
                mass[s][row] = share.new_zeros(())
            else:
                mass[s][row] = share[lo - first : hi - first].sum()
    return mass
