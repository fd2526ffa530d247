"""Whether lists fit the room that the kernels of selection would give them."""

from __future__ import annotations

import torch

from unfold.kernels.select import SelectRule
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.select.room import UNIT, list_room
from unfold.kernels.tree import GistTree


def check_room(tree: GistTree, rule: SelectRule, lists: BlockLists, heads: int) -> None:
    """No list of a selection by a rule of numbers outgrows the room that it would have: items, candidates, places, queries."""
    kv_heads, levels = lists.kv_heads, tree.levels
    room = list_room(tree, rule, lists.blocks.size, heads, kv_heads)
    has = torch.nn.functional.pad(room.first.flatten(), (0, 1), value=room.items).diff()
    assert (lists.count[:levels].flatten() <= has).all() and (lists.count[levels] <= room.start.diff()).all()
    assert lists.entries <= room.entries and room.slices[-1][1] == len(lists.blocks.table)
    assert int(room.spans[0][:, 1].max()) <= room.rooms[0] * UNIT
    for s in range(1, levels):
        owner, at = lists.items(s - 1)
        begin, opened = room.spans[s][owner // kv_heads].unbind(1)
        gist = lists.blocks.table[owner // kv_heads, 2].long() * tree.others.tokens + lists.row[at]
        before = tree.child_hi.flatten()[gist].minimum(begin.where(opened > 0, 2**30)) - tree.child_lo.flatten()[gist]
        candidates = room.spans[s][:, 1].repeat_interleave(kv_heads).long().index_add(0, owner, before.clamp(min=0).long())
        assert int(candidates.max()) <= room.rooms[s] * UNIT
