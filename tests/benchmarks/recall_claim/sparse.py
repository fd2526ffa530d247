"""The routing loss with a teacher that reads a part of the chunks: the selected ones, and a random sample of the others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.route import Routed, chunk_mass
from unfold.kernels.route.measure import ChunkMass
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree


def sparse_routing_loss(
    q: Tensor, k: Tensor, routed: Routed, selection: Selection, others: int, draw: torch.Generator
) -> Tensor:  # fmt: skip
    """Summed over queries and heads as by :func:`unfold.kernels.route.routing_loss`; gradients go to the keys of gists alone.

    It is worked out from the whole teacher, so it shows what a sparse one would teach, not what it would cost.

    Args:
        q: [N, H, D], all queries that recall. k: [B, T, Hkv, D].
        routed: their hierarchy and documents.
        selection: what the layer selected for them.
        others: chunks that each query and head draws beside the selected ones. Their mass stands for that of all that are not
            selected; with as many as there are, the loss is that of the whole teacher.
        draw: what they are drawn by.
    """
    tree, group = routed.tree, q.shape[1] // k.shape[2]
    chosen = selected_chunks(tree, selection).repeat_interleave(group, 1)  # [N, H, T]
    loss = q.new_zeros(())
    for block in chunk_mass(q, k, routed):
        mass = _estimated(block, tree, chosen[block.queries], others, draw)
        rows = tree.others.rows[block.sample, : mass.shape[2]]
        keys = k[block.sample, rows].repeat_interleave(group, 1)  # [gists, H, D]
        scores = torch.einsum("nhd,ghd->nhg", q[block.queries].detach(), keys) / math.sqrt(q.shape[-1])
        for level in range(tree.levels):
            before = _candidates(tree, level, block.queries, mass.shape[2])
            log_share = scores.masked_fill(~before, -1e30).log_softmax(-1)
            loss = loss - (mass * log_share).masked_fill(~before, 0.0).sum()
    return loss


def selected_chunks(tree: GistTree, selection: Selection) -> Tensor:
    """bool [N, Hkv, T]: whether the level-0 gist in a row of the level-sorted order was selected."""
    rows, start = selection.rows[-1].long(), selection.start[-1]
    lists = torch.arange(len(start) - 1).repeat_interleave(start.diff())
    chosen = torch.zeros(len(start) - 1, tree.others.tokens, dtype=torch.bool)
    chosen[lists, rows] = True
    return chosen.unflatten(0, (-1, selection.kv_heads))


def _candidates(tree: GistTree, level: int, queries: slice, rows: int) -> Tensor:
    """bool [n, 1, rows]: the gists of a segment that stand before each query in its document."""
    row = torch.arange(rows)
    lo, hi = (x[level, queries, None] for x in (tree.lo, tree.hi))
    return ((row >= lo) & (row < hi))[:, None]


def _estimated(block: ChunkMass, tree: GistTree, chosen: Tensor, others: int, draw: torch.Generator) -> Tensor:
    """Masses of all gists of the sample, [n, H, gists], from those of some chunks and of the tokens in no chunk."""
    full, first = block.mass[-1], block.first[-1]
    width = full.shape[2]
    chosen = chosen[..., first : first + width]
    rest = _candidates(tree, tree.levels - 1, block.queries, first + width)[..., first:] & ~chosen
    drawn = torch.rand(rest.shape, generator=draw).masked_fill(~rest, -1.0).topk(min(others, width))
    sampled = torch.zeros_like(rest).scatter_(-1, drawn.indices, drawn.values >= 0)
    stands_for = rest.sum(-1, keepdim=True) / sampled.sum(-1, keepdim=True).clamp(min=1)
    mass = full * (chosen + sampled * stands_for)
    outside = (1 - full.sum(-1, keepdim=True)).clamp(min=0)
    mass = F.pad(mass / (mass.sum(-1, keepdim=True) + outside), (first, 0))
    start = tree.others.segment_start[block.sample].tolist()
    for level in reversed(range(tree.levels - 1)):
        upto = F.pad(mass.cumsum(-1), (1, 0))
        rows = slice(start[level], start[level + 1])
        lo, hi = (x[block.sample, rows].long() for x in (tree.child_lo, tree.child_hi))
        mass[..., rows] = upto[..., hi] - upto[..., lo]
    return mass
