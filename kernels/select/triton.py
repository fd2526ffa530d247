"""Selection on GPUs: launches the Triton kernels level by level; makes the lists of blocks that unfolding works through.

Memory: the lists, the candidates of one level, and a scratch for the scores of as many lists as fit SCRATCH bytes. One
synchronisation per level, for the length of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from unfold.kernels.common.launch import DTYPES, HEAD_DIMS, INTERPRETED, architecture, check_flat, on_device
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.plan import key_rows
from unfold.kernels.select import kernels
from unfold.kernels.select.blocks import BITS, BlockLists, QueryBlocks, query_blocks, selection_of
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
SCRATCH = 1 << 28  # bytes of scores at once: few enough to be read back from the cache in part, enough to fill a GPU
# In the interpreter so little fits that the tests go every way: rows held whole and in parts, several slices of lists.
LONGEST_ROW, SLICE = (32, 3) if INTERPRETED else (8192, None)
UNIT = kernels.ROOM_UNIT.value
LIST_KEYS, LIST_WARPS = 128, 4  # candidates of a tile where nothing is multiplied


def select_gists_triton(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, scale: float) -> Selection:
    """As :func:`kernels.select.reference.select_gists_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k, rule)
    if reason:
        raise ValueError(reason)
    group = q.shape[1] // k.shape[2]
    return selection_of(tree, select_lists(q, k, tree, rule, max(1, min(BITS, tiles_for(q).top.rows // group))))


def why_not(q: Tensor, k: Tensor, rule: SelectRule) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do. q: [N, H, D], k: [B, T, Hkv, D]."""
    if rule.top_p is not None:
        return f"top_p: {rule.top_p}; backend 'triton' selects by number, use backend='cpu', which runs on any device"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, use backend='cpu'"
    if q.shape[2] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[2]} is not one of {HEAD_DIMS}; use one, or backend='cpu'"
    group = q.shape[1] // k.shape[2]
    if group > LARGEST_GROUP:
        return f"q: {group} query heads per KV head, backend 'triton' serves {LARGEST_GROUP}; use backend='cpu'"
    return None


def tiles_for(q: Tensor, share: str = "head") -> SelectTiles:
    """The tiles for the device, head dimension and dtype of q."""
    return TABLE[architecture(q)][share][max(64, triton.next_power_of_2(q.shape[2])), q.element_size()]


@dataclass(frozen=True)
class _Candidates:
    """What the blocks of a level choose from, by list: see kernels/select/kernels.py. At the top there is only ``room``.

    Attributes:
        begin: [lists + 1] int64; places: [lists] int32; key: [places] int32; words: [places, WORDS] int32.
        room: most places of a list, in units of ROOM_UNIT.
    """

    begin: Tensor
    places: Tensor
    key: Tensor
    words: Tensor
    room: int


@dataclass(frozen=True)
class _Level:
    """The lists of one level: [lists + 1] int64, five [items] int32; where the places of each begin, and how many there are."""

    first: Tensor
    row: Tensor
    bits: Tensor
    takers: Tensor
    owner: Tensor
    place: Tensor
    start: Tensor
    places: int


def select_lists(
    q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, size: int, tiles: SelectTiles | None = None
) -> BlockLists:
    """What blocks of at most ``size`` queries select. q: [N, H, D]; k: [B, T, Hkv, D]."""
    q, k = q.contiguous(), k.reshape(-1, *k.shape[2:]).index_select(0, key_rows(tree.others))  # [B * R, Hkv, D]
    blocks = query_blocks(tree, size)
    with on_device(q):
        search = _Search(q, k, tree, rule, blocks, tiles or tiles_for(q, rule.share))
        nothing = blocks.table.new_empty(0)
        candidates = _Candidates(*[nothing] * 4, search.top_room)
        levels: list[_Level] = []
        for s in range(tree.levels):
            level, candidates = search.level(s, candidates)
            levels.append(level)
    sizes = tuple(len(level.row) for level in levels)
    firsts = torch.stack([level.first + sum(sizes[:s]) for s, level in enumerate(levels)])
    items = (torch.cat([getattr(level, name) for level in levels]) for name in ("row", "bits", "takers", "owner", "place"))
    return BlockLists(blocks, firsts, *items, levels[-1].start, levels[-1].places, sizes, k.shape[1])


def _spans(tree: GistTree, size: int) -> tuple[Tensor, int]:
    """[L, blocks, 2] int32: per level the first gist that needs no selected parent and how many there are; room at the top."""
    table = query_blocks(tree, size).table
    query = torch.minimum(table[:, :1] + torch.arange(size, device=tree.device), table[:, 1:2] - 1)  # [blocks, size]
    lo, hi = tree.tail[:, query], tree.hi[: tree.levels, query]
    some = hi > lo
    end = hi.masked_fill(~some, 0).amax(-1)  # [L, blocks]
    first = lo.masked_fill(~some, torch.iinfo(lo.dtype).max).amin(-1).masked_fill_(end == 0, 0)
    spans = torch.stack([first, end - first], -1).contiguous()
    return spans, _room(int(spans[0, :, 1].amax()))


def _room(places: int) -> int:
    return max(1, triton.cdiv(places, UNIT))


class _Search:
    """What the levels of one selection share. q: [N, H, D]; k: [B * R, Hkv, D], sorted by level."""

    def __init__(self, q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, blocks: QueryBlocks, tiles: SelectTiles):
        self.q, self.k, self.tree, self.rule, self.blocks = q, k, tree, rule, blocks
        check_flat(tail=tree.tail, hi=tree.hi, child_lo=tree.child_lo, child_hi=tree.child_hi, blocks=blocks.table)
        make = lambda whole: _spans(whole, blocks.size)
        self.spans, self.top_room = tree.planned(("spans of candidates", blocks.size), make)
        self.group = q.shape[1] // k.shape[1]
        self.summed = self.group if rule.share == "group" else 1
        self.tiles = tiles.fit(blocks.size * self.group // self.summed)
        self.rows = self.tiles.top.rows
        self.words = triton.cdiv(self.rows, 32)
        self.lists = len(blocks.table) * k.shape[1]

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.q.device)

    def level(self, s: int, candidates: _Candidates) -> tuple[_Level, _Candidates]:
        """The lists of segment s from its candidates, and the candidates of the segment below."""
        tree, bottom = self.tree, s == self.tree.levels - 1
        taken = self.new(len(candidates.key) if s else self.lists * candidates.room * UNIT, self.words)
        count, places = self.new(2, self.lists)
        self._choose(s, candidates, taken, count, places)
        first, start = torch.nn.functional.pad(torch.stack([count, places]).cumsum(1), (1, 0))
        items, total, most = torch.stack([first[-1], start[-1], places.amax()]).tolist()
        level = _Level(first, *self.new(5, items), start, total)
        wanted = 0 if bottom else total
        below = _Candidates(start, places, self.new(wanted), self.new(wanted, self.words), _room(most))
        next_level = s if bottom else s + 1  # nothing is read of the level below the last
        kernels.list_kernel[(self.lists,)](
            taken, tree.tail[next_level], tree.hi[next_level], self.blocks.table, self.spans[s], self.spans[next_level],
            candidates.begin, candidates.places, candidates.key, tree.child_lo, tree.child_hi, first, start, level.row,
            level.bits, level.takers, level.owner, level.place, below.key, below.words, candidates.room, tree.others.tokens,
            HKV=self.k.shape[1], BM=self.rows, BN=LIST_KEYS, PER=self.group // self.summed, WORDS=self.words, TOP=s == 0,
            BOTTOM=bottom, num_warps=LIST_WARPS,
        )  # fmt: skip
        return level, below

    def _choose(self, s: int, candidates: _Candidates, taken: Tensor, count: Tensor, places: Tensor) -> None:
        """Fill ``taken`` [places, WORDS], ``count`` and ``places`` [lists]: slice by slice of lists, so that the scratch fits."""
        q, tree, kv_heads = self.q, self.tree, self.k.shape[1]
        top, bottom, room = s == 0, s == tree.levels - 1, candidates.room
        tile, run = self.tiles.top if top else self.tiles.below, self.tiles.run
        budget = self.rule.budget(tree.span, tree.hi[s] - tree.lo[s], self.group).int()  # its cap counts all gists of the level
        step = min(self.lists, SLICE or max(1, SCRATCH // (4 * self.rows * room * UNIT)))
        score, (bound, last) = self.new(step, self.rows, room * UNIT), self.new(2, step, self.rows)
        own = candidates.begin, candidates.places, candidates.key
        held = triton.next_power_of_2(room * UNIT)
        shared = dict(HKV=kv_heads, BM=self.rows, TOP=top)
        for i in range(0, self.lists, step):
            lists = min(step, self.lists - i)
            kernels.score_kernel[(lists, triton.cdiv(room * UNIT, run * tile.keys))](
                q, self.k, tree.tail[s], tree.hi[s], self.blocks.table, self.spans[s], *own, candidates.words, score, i, room,
                tree.others.rows.shape[1], H=q.shape[1], D=q.shape[2], BD=triton.next_power_of_2(q.shape[2]), BN=tile.keys,
                SUM=self.summed, WORDS=self.words, TILES=run, UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **shared,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            kernels.bound_kernel[(lists, self.rows)](
                score, budget, self.blocks.table, self.spans[s], candidates.places, bound, last, i, room,
                PER=self.group // self.summed, N=min(held, LONGEST_ROW), WHOLE=held <= LONGEST_ROW, **shared,
                num_warps=max(1, min(held, LONGEST_ROW) // self.tiles.held),
            )  # fmt: skip
            kernels.mark_kernel[(lists,)](
                score, bound, last, self.spans[s], self.spans[s if bottom else s + 1], *own, tree.child_lo, tree.child_hi,
                self.blocks.table, taken, count, places, i, room, tree.others.tokens, BN=LIST_KEYS, WORDS=self.words,
                BOTTOM=bottom, **shared, num_warps=LIST_WARPS,
            )  # fmt: skip
