"""Selection on GPUs: launches the Triton kernels level by level; makes the lists of blocks that unfolding works through.

Memory: the lists, two numbers per row and level, and what the programs that run at once hold, 32 KB each. One
synchronisation per level, for the length of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from unfold.kernels.compressed.plan import key_rows
from unfold.kernels.compressed.tiles import HEAD_DIMS, Tile
from unfold.kernels.compressed.triton import DTYPES, INTERPRETED, architecture, launch_options, on_device
from unfold.kernels.select import kernels
from unfold.kernels.select.blocks import BITS, BlockLists, QueryBlocks, query_blocks, selection_of
from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree

LARGEST_GROUP = 128  # rows of a tile
# Per padded head dimension and bytes per element, of the top level and of those below it; the rows are those of one block of
# queries. Sums of several heads' scores take more registers.
_HEAD = {
    (64, 2): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    (128, 2): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    (256, 2): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    (64, 4): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    (256, 4): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
_GROUP = {
    (64, 2): (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    (128, 2): (Tile(16, 16, 4, 2), Tile(16, 64, 4, 2)),
    (256, 2): (Tile(16, 32, 4, 2), Tile(16, 64, 4, 2)),
} | {(dim, 4): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)) for dim in (64, 128, 256)}
_GPU = {"head": _HEAD, "group": _GROUP}
TABLE = {arch: _GPU for arch in ("sm_80", "sm_90", "sm_100")}
TABLE["interpreter"] = {share: {key: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)) for key in _HEAD} for share in _GPU}
PROGRAMS = 4  # that search, per multiprocessor: their scratch stays in the L2 cache


def select_gists_triton(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, scale: float) -> Selection:
    """As :func:`kernels.select.reference.select_gists_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k, rule)
    if reason:
        raise ValueError(reason)
    group = q.shape[1] // k.shape[2]
    return selection_of(tree, select_lists(q, k, tree, rule, max(1, min(BITS, tiles_for(q)[0].rows // group))))


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


def tiles_for(q: Tensor, share: str = "head") -> tuple[Tile, Tile]:
    """The tiles for the device, head dimension and dtype of q: at the top level, below."""
    return TABLE[architecture(q)][share][max(64, triton.next_power_of_2(q.shape[2])), q.element_size()]


def fitted(tile: Tile, rows: int) -> Tile:
    """The tile for a number of rows in a block."""
    return replace(tile, rows=max(16, triton.next_power_of_2(rows)))


def held(tile: Tile, interpreted: bool = INTERPRETED) -> int:
    """Scores per row that a program holds. In the interpreter so few that the tests go every way."""
    return 16 if interpreted else max(16, min(256, 8192 // tile.rows))


def _programs(q: Tensor, lists: int) -> int:
    """Programs that share the lists."""
    return min(lists, 3 if INTERPRETED else PROGRAMS * torch.cuda.get_device_properties(q.device).multi_processor_count)


@dataclass(frozen=True)
class _Level:
    """The lists of one level: [lists + 1], [items], [items], [items, words], [items], [lists]."""

    first: Tensor
    row: Tensor
    bits: Tensor
    words: Tensor
    place: Tensor
    places: Tensor


def select_lists(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, size: int) -> BlockLists:
    """What blocks of at most ``size`` queries select. q: [N, H, D]; k: [B, T, Hkv, D]."""
    q, k = q.contiguous(), k.reshape(-1, *k.shape[2:]).index_select(0, key_rows(tree.others))  # [B * R, Hkv, D]
    blocks = query_blocks(tree, size)
    group = q.shape[1] // k.shape[1]
    summed = group if rule.share == "group" else 1
    rows = size * group // summed
    top, below = (fitted(tile, rows) for tile in tiles_for(q, rule.share))
    levels: list[_Level] = []
    for s in range(tree.levels):
        # The budget's cap counts all gists of the level before the query.
        budget = rule.budget(tree.span, tree.hi[s] - tree.lo[s], group).int()
        levels.append(_level(q, k, tree, blocks, budget, levels[-1] if levels else None, s, summed, below if s else top))
    sizes = [len(level.row) for level in levels]
    firsts = torch.stack([level.first + sum(sizes[:s]) for s, level in enumerate(levels)])
    row, bits, place = (torch.cat([getattr(level, name) for level in levels]) for name in ("row", "bits", "place"))
    return BlockLists(blocks, firsts, row, bits, place, levels[-1].places, k.shape[1])


def _level(
    q: Tensor,
    k: Tensor,
    tree: GistTree,
    blocks: QueryBlocks,
    budget: Tensor,
    above: _Level | None,
    s: int,
    summed: int,
    tile: Tile,
) -> _Level:
    """The lists of segment s from those of the segment above it. k: [B * R, Hkv, D], sorted by level; budget: [N] int32."""
    kv_heads, dim = k.shape[1:]
    count, words = len(blocks.table) * kv_heads, -(-tile.rows // 32)
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=q.device)
    bound, last, taken = new(count, tile.rows), new(count, tile.rows), new(count)
    # Nothing is read of the level above at the top.
    above = above or _Level(*[new(0)] * 6)
    top, bottom = s == 0, s == tree.levels - 1
    sizes = dict(
        H=q.shape[1], HKV=kv_heads, D=dim, BD=triton.next_power_of_2(dim), SUM=summed, WORDS=words, TOP=top,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **launch_options(tile),
    )  # fmt: skip
    lists = (above.first, above.row, above.words, above.place, above.places, tree.child_lo, tree.child_hi)
    ends = tree.others.rows.shape[1], tree.others.tokens
    grid = len(blocks.table), kv_heads
    programs = _programs(q, count)
    scratch = new(programs, tile.rows, held(tile))
    with on_device(q):
        kernels.bound_kernel[(programs,)](
            q, k, tree.tail[s], tree.hi[s], budget, blocks.table, *lists, bound, last, taken, scratch, count, *ends,
            HELD=held(tile), **sizes,
        )  # fmt: skip
        first = torch.nn.functional.pad(taken.cumsum(0), (1, 0))
        items = int(first[-1])
        level = _Level(first, new(items), new(items), new(0 if bottom else items, words), new(items), new(count))
        kernels.list_kernel[grid](
            q, k, tree.tail[s], tree.hi[s], blocks.table, *lists, bound, last,
            level.first, level.row, level.bits, level.words, level.place, level.places, *ends, BOTTOM=bottom, **sizes,
        )  # fmt: skip
    return level
