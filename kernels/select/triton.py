"""Selection on GPUs: launches the Triton kernels level by level; makes the lists of blocks that unfolding works through.

Memory: room for the lists, and a scratch for scores and candidates of as many lists as fit SCRATCH bytes. All sizes are known
beforehand (kernels/select/room.py), so nothing is read and the host does not wait.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from unfold.kernels.common.launch import DTYPES, HEAD_DIMS, INTERPRETED, architecture, check_flat, on_device
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.plan import key_rows
from unfold.kernels.select import kernels
from unfold.kernels.select.blocks import BITS, BlockLists, query_blocks, selection_of
from unfold.kernels.select.room import UNIT, list_room
from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree

LARGEST_GROUP = 128  # rows of a tile


@dataclass(frozen=True)
class SelectTiles:
    """Tiles that score candidates at the top level and below it; their rows are those of one block of queries.

    ``run``: tiles that one program scores. ``held``: scores of a row that one warp holds in registers.
    """

    top: Tile
    below: Tile
    run: int = 4
    held: int = 1024

    def fit(self, rows: int) -> SelectTiles:
        """With as many rows as a block has."""
        rows = max(16, triton.next_power_of_2(rows))
        return replace(self, top=replace(self.top, rows=rows), below=replace(self.below, rows=rows))


def _same(tile: Tile) -> SelectTiles:
    return SelectTiles(tile, tile)


# Per padded head dimension and bytes per element. Sums of several heads' scores take more registers.
_HEAD = {
    (64, 2): SelectTiles(Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    (128, 2): SelectTiles(Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    (256, 2): _same(Tile(32, 32, 8, 2)),
    (64, 4): _same(Tile(32, 32, 8, 1)),
    (128, 4): _same(Tile(16, 16, 8, 1)),
    (256, 4): _same(Tile(16, 16, 8, 1)),
}
_GROUP = {
    (64, 2): _same(Tile(16, 16, 4, 2)),
    (128, 2): SelectTiles(Tile(16, 16, 4, 2), Tile(16, 64, 4, 2)),
    (256, 2): SelectTiles(Tile(16, 32, 4, 2), Tile(16, 64, 4, 2)),
} | {(dim, 4): _same(Tile(16, 16, 8, 1)) for dim in (64, 128, 256)}
_SM80 = {"head": _HEAD, "group": _GROUP}
_SM90 = _SM80 | {"head": _HEAD | {(128, 2): SelectTiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2))}}
TABLE = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM90}
TABLE["interpreter"] = {share: {key: _same(Tile(32, 32, 4, 1)) for key in _HEAD} for share in _SM80}
SCRATCH = 1 << 29  # room for scores at once, in bytes: few launches, and a fraction of what a layer keeps
# In the interpreter so little fits that the tests go every way: rows held whole and in parts, several slices of lists.
LONGEST_ROW, SLICE = (32, 3) if INTERPRETED else (8192, None)
LIST_KEYS, LIST_WARPS = 128, 4  # candidates of a tile where nothing is multiplied


def select_gists_triton(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, scale: float) -> Selection:
    """As :func:`kernels.select.reference.select_gists_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k, rule)
    if reason:
        raise ValueError(reason)
    return selection_of(tree, select_lists(q, k, tree, rule, _block_size(q, k)))


def prepare(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule) -> None:
    """Make the plans of :func:`select_gists_triton`; q [.., H, D], k [.., Hkv, D] of any length."""
    key_rows(tree.others)
    list_room(tree, rule, _block_size(q, k), q.shape[-2], k.shape[-2])


def _block_size(q: Tensor, k: Tensor) -> int:
    """Queries of a block where nothing else works through the lists."""
    return max(1, min(BITS, tiles_for(q).top.rows // (q.shape[-2] // k.shape[-2])))


def why_not(q: Tensor, k: Tensor, rule: SelectRule) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do. q: [.., H, D], k: [B, T, Hkv, D]."""
    if rule.top_p is not None:
        return f"top_p: {rule.top_p}; backend 'triton' selects by number, use backend='cpu', which runs on any device"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, use backend='cpu'"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[-1]} is not one of {HEAD_DIMS}; use one, or backend='cpu'"
    group = q.shape[-2] // k.shape[2]
    if group > LARGEST_GROUP:
        return f"q: {group} query heads per KV head, backend 'triton' serves {LARGEST_GROUP}; use backend='cpu'"
    return None


def tiles_for(q: Tensor, share: str = "head") -> SelectTiles:
    """The tiles for the device, head dimension and dtype of q."""
    return TABLE[architecture(q)][share][max(64, triton.next_power_of_2(q.shape[-1])), q.element_size()]


def select_lists(
    q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, size: int, tiles: SelectTiles | None = None
) -> BlockLists:
    """What blocks of at most ``size`` queries select. q: [N, H, D]; k: [B, T, Hkv, D]."""
    k = k.reshape(-1, *k.shape[2:]).index_select(0, key_rows(tree.others))
    return select_sorted(q.contiguous(), every_query(tree), k, tree, rule, size, tiles)


def every_query(tree: GistTree) -> Tensor:
    """[N] int64, the (memoised) places of the queries where nothing but them is there."""
    return tree.memo("every query", lambda: torch.arange(tree.queries, device=tree.device))


def select_sorted(
    q: Tensor, at: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, size: int, tiles: SelectTiles | None = None
) -> BlockLists:
    """The same where k, [B * R, Hkv, D], is sorted by level, and the queries stand at ``at``, [N] int64, in q, [.., H, D]."""
    blocks, heads, kv_heads = query_blocks(tree, size), q.shape[-2], k.shape[1]
    room = list_room(tree, rule, size, heads, kv_heads)
    tails, ends = tree.memo("bounds of open gists", lambda: (tree.tail.unbind(), tree.hi[: tree.levels].unbind()))
    check_flat(tail=tree.tail, hi=tree.hi, child_lo=tree.child_lo, child_hi=tree.child_hi, blocks=blocks.table, q=q)
    summed = heads // kv_heads if rule.share == "group" else 1
    per = heads // kv_heads // summed  # rows of a query
    tiles = (tiles or tiles_for(q, rule.share)).fit(size * per)
    rows, lists, levels = tiles.top.rows, len(blocks.table) * kv_heads, tree.levels
    words = triton.cdiv(rows, 32)
    most = max(room.rooms) * UNIT
    step = min(lists, SLICE or max(1, SCRATCH // (4 * rows * most)))
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=q.device)
    row, bits, count = new(room.items), new(room.items), new(2 * levels + 2, lists)
    score, bound = new(step * rows * most), new(step, rows, 2)
    # Of every level but the top its candidates: their number, keys, rows. What is not there stands for nothing.
    below = [(new(step), new(step * r * UNIT), new(step * r * UNIT * words)) for r in room.rooms[1:]]
    candidates = [(bound,) * 3, *below, (bound,) * 3]
    shared = dict(HKV=kv_heads, BM=rows)
    with on_device(q):
        for i, s in itertools.product(range(0, lists, step), range(levels)):
            here, top, following = room.rooms[s], s == 0, min(s + 1, levels - 1)
            tile, held, now = tiles.top if top else tiles.below, triton.next_power_of_2(here * UNIT), min(step, lists - i)
            kernels.score_kernel[(now, triton.cdiv(here * UNIT, tiles.run * tile.keys))](
                q, k, at, tails[s], ends[s], blocks.table, room.spans[s], *candidates[s], score, i, here,
                tree.others.rows.shape[1], H=heads, D=q.shape[-1], BD=triton.next_power_of_2(q.shape[-1]), BN=tile.keys,
                SUM=summed, WORDS=words, TILES=tiles.run, TOP=top, UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **shared,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            kernels.bound_kernel[(now, rows)](
                score, room.budgets[s], blocks.table, room.spans[s], candidates[s][0], bound, i, here, PER=per,
                N=min(held, LONGEST_ROW), WHOLE=held <= LONGEST_ROW, TOP=top, **shared,
                num_warps=max(1, min(held, LONGEST_ROW) // tiles.held),
            )  # fmt: skip
            kernels.take_kernel[(now,)](
                score, bound, room.spans[s], room.spans[following], tails[following], ends[following], *candidates[s][:2],
                tree.child_lo, tree.child_hi, blocks.table, room.first, row, bits, count, *candidates[s + 1], i, here,
                room.rooms[following], tree.others.tokens, lists, BN=LIST_KEYS, PER=per, WORDS=words, S=s, L=levels, **shared,
                num_warps=LIST_WARPS,
            )  # fmt: skip
    return BlockLists(blocks, room.first, count, row, bits, room.start, room.slices, room.entries, kv_heads)


def mark_lists(tree: GistTree, lists: BlockLists, gists: int) -> Tensor:
    """As :func:`kernels.select.chosen.chosen_gists`."""
    marks = torch.zeros(tree.others.batch, gists, dtype=torch.int32, device=lists.row.device)
    every = lists.first.shape[1]
    with on_device(marks):
        kernels.mark_kernel[(every,)](
            lists.first, lists.count, lists.row, lists.blocks.table, tree.others.segment_start, marks, every, gists,
            HKV=lists.kv_heads, L=tree.levels, BN=LIST_KEYS, num_warps=LIST_WARPS,
        )  # fmt: skip
    return marks.to(torch.uint8)
