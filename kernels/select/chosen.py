"""Which level-0 gists any query of a tree selected: what ranks that share a sequence tell each other."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree


def chosen_gists(tree: GistTree, selection: Selection | BlockLists, gists: int) -> Tensor:
    """Marks, without asking a GPU how much was selected.

    Args:
        tree: with at least one query.
        selection: of its queries, from any backend.
        gists: level-0 gists of the sample that has most.

    Returns:
        uint8 [B, gists], 1 for those that some query selected, in the order of their rows.
    """
    if isinstance(selection, BlockLists):
        from unfold.kernels.select.triton import mark_lists  # Triton is imported only where it is used

        return mark_lists(tree, selection, gists)
    marks = torch.zeros(tree.others.batch, gists, dtype=torch.uint8, device=tree.device)
    owner = torch.arange(len(selection.start[-1]) - 1, device=tree.device).repeat_interleave(selection.start[-1].diff())
    sample = tree.tokens[owner // selection.kv_heads] // tree.others.tokens
    marks[sample, selection.rows[-1].long() - tree.others.segment_start[sample, tree.levels - 1]] = 1
    return marks
