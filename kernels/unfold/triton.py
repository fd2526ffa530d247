"""Unfolding on GPUs: launches the Triton kernels, forward and backward. Memory linear in what was selected, bit-equal runs.

Forward: a block of neighbouring queries runs one online softmax over its windows and the union of what its queries selected.
Backward recomputes the weights: d_q block by block of queries; d_k and d_v in fp32 rows of the level-sorted buffer, which three
kernels fill one after another without atomics: windows and sinks, chunks, gists above level 0.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from unfold.kernels.common.launch import (
    DTYPES,
    HEAD_DIMS,
    INTERPRETED,
    LOG2_E,
    architecture,
    check_flat,
    launch_options,
    on_device,
)
from unfold.kernels.common.saved import with_tensors, without_tensors
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed import backward as ranges
from unfold.kernels.compressed.plan import key_rows
from unfold.kernels.compressed.triton import SUM_ROWS
from unfold.kernels.select import triton as selecting
from unfold.kernels.select.blocks import BlockLists, block_lists
from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import backward, common, forward
from unfold.kernels.unfold.plan import longest_chunk, near_items
from unfold.kernels.unfold.tiles import LARGEST_TILE, LONGEST_CHUNK, UnfoldTiles, choose_unfold_tiles
from unfold.kernels.unfold.turn import ITEMS, ChunkItems, Parts, Visits, turned_lists


def unfold_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tree: GistTree, selection: Selection, scale: float, tiles: UnfoldTiles | None = None
) -> Tensor:
    """As :func:`kernels.unfold.reference.unfold_attention_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k, tree)
    if reason:
        raise ValueError(reason)
    tiles = tiles or tiles_for(q)
    return unfold_lists(q, k, v, tree, block_lists(tree, selection, tiles.block(q.shape[1] // k.shape[2])), scale, tiles)[0]


def unfold_lists(
    q: Tensor, k: Tensor, v: Tensor, tree: GistTree, lists: BlockLists, scale: float, tiles: UnfoldTiles | None = None
) -> tuple[Tensor, Tensor]:
    """The same from the lists that selection on a GPU makes, of blocks as ``tiles`` has them.

    Returns:
        [N, H, D], and [lists] int32: the raw tokens that the queries of each list unfold.
    """
    tiles = (tiles or tiles_for(q)).fit(q.shape[1] // k.shape[2], longest_chunk(tree))
    unfolded = lists.row.new_empty(lists.first.shape[1] - 1)
    return _UnfoldAttention.apply(q, k, v, tree, lists, scale, tiles, unfolded), unfolded


def recall_queries_triton(
    q: Tensor, k: Tensor, v: Tensor, tree: GistTree, rule: SelectRule, scale: float
) -> tuple[Tensor, BlockLists, Tensor]:
    """Select, then unfold: [N, H, D], what was selected, and the raw tokens that each list unfolds.

    Raises:
        ValueError: what :func:`why_not` says, here or for selection.
    """
    reason = why_not(q, k, tree) or selecting.why_not(q, k, rule)
    if reason:
        raise ValueError(reason)
    tiles = tiles_for(q)
    with torch.no_grad():
        lists = selecting.select_lists(q, k, tree, rule, tiles.block(q.shape[1] // k.shape[2]))
    out, unfolded = unfold_lists(q, k, v, tree, lists, scale, tiles)
    return out, lists, unfolded


def why_not(q: Tensor, k: Tensor, tree: GistTree) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do. q: [N, H, D], k: [B, T, Hkv, D]."""
    instead = "use backend='reference' or 'cpu'"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, {instead}"
    if q.shape[2] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[2]} is not one of {HEAD_DIMS}; use one, or backend='reference'"
    if q.shape[1] // k.shape[2] > LARGEST_TILE:
        return f"q: {q.shape[1] // k.shape[2]} query heads per KV head, backend 'triton' serves {LARGEST_TILE}; {instead}"
    if longest_chunk(tree) > LONGEST_CHUNK:
        return f"tree: a chunk of {longest_chunk(tree)} tokens, backend 'triton' serves {LONGEST_CHUNK}; {instead}"
    return None


def tiles_for(q: Tensor) -> UnfoldTiles:
    """Tiles for the device, head dimension and dtype of q."""
    return choose_unfold_tiles(architecture(q), max(64, triton.next_power_of_2(q.shape[2])), q.element_size())


class _UnfoldAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, tree: GistTree, lists: BlockLists, scale: float, tiles: UnfoldTiles,
        unfolded: Tensor,
    ) -> Tensor:  # fmt: skip
        q, shape = q.contiguous(), k.shape
        check_flat(lo=tree.lo, hi=tree.hi, child_lo=tree.child_lo, child_hi=tree.child_hi, first=lists.first, start=lists.start)
        rows = key_rows(tree.others)
        k, v = (x.reshape(-1, *x.shape[2:]).index_select(0, rows) for x in (k, v))  # [B * R, Hkv, D]
        out = torch.empty_like(q)
        shift = torch.empty(k.shape[1], q.shape[0] * (q.shape[1] // k.shape[1]), dtype=torch.float32, device=q.device)
        factor = torch.empty_like(shift) if q.dtype == torch.float32 else shift  # 16 bits need none
        with on_device(q):
            forward.unfold_kernel[len(lists.blocks.table), k.shape[1]](
                q, k, v, out, shift, factor, tree.lo, tree.hi, lists.blocks.table, lists.first, lists.row, lists.bits,
                lists.start, *_places(tree, lists, unfolded), scale * LOG2_E, *_lengths(tree),
                **_sizes(q, k, tree), **launch_options(tiles.forward),
            )  # fmt: skip
        # A checkpoint lets go of what is saved like this, and makes it again; the blocks are those of all layers.
        ctx.lists, chosen = without_tensors(lists)
        ctx.save_for_backward(q, k, v, out, shift, factor, *chosen)
        ctx.tree, ctx.scale, ctx.tiles, ctx.shape = tree, scale, tiles, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, shift, factor, *chosen = ctx.saved_tensors
        tree, scale, tiles = ctx.tree, ctx.scale, ctx.tiles
        lists = with_tensors(ctx.lists, chosen)
        d_out = d_out.contiguous()
        mean, d_q = torch.empty_like(shift), torch.empty_like(q)
        with on_device(q):
            backward.unfold_d_query_kernel[len(lists.blocks.table), k.shape[1]](
                q, k, v, out, d_out, shift, factor, mean, d_q, tree.lo, tree.hi, lists.blocks.table, lists.first, lists.row,
                lists.bits, lists.start, *_places(tree, lists), scale * LOG2_E, scale, *_lengths(tree),
                **_sizes(q, k, tree), **launch_options(tiles.d_query),
            )  # fmt: skip
            rows = _d_near(q, k, v, d_out, shift, factor, mean, tree, scale, tiles.near)
            items, visits = turned_lists(tree, lists, tiles.chunks.keys, tiles.upper.keys)
            _d_chunks(q, k, v, d_out, shift, factor, mean, rows, tree, lists, items, scale, tiles.chunks)
            _d_upper(q, k, v, d_out, shift, factor, mean, rows, tree, lists, visits, scale, tiles.upper)
        d_k, d_v = (_by_token(x, tree, ctx.shape).to(k.dtype) for x in rows)
        return d_q, d_k, d_v, None, None, None, None, None


def _places(tree: GistTree, lists: BlockLists, unfolded: Tensor | None = None) -> Tensor:
    """Key and bits of every place of the chunks, [2, places] int32. Made anew by each pass: kept, it would outweigh the layer.

    ``unfolded`` [lists] int32 gets the raw tokens that the queries of each list unfold.
    """
    places = lists.row.new_empty(2, lists.places)
    unfolded = lists.row.new_empty(lists.first.shape[1] - 1) if unfolded is None else unfolded
    owners, size = len(unfolded), lists.blocks.size
    common.place_kernel[(owners,)](
        lists.first[-1], lists.start, lists.row, lists.bits, lists.place, tree.lo, lists.blocks.table, tree.child_lo,
        tree.child_hi, *places, unfolded, tree.queries, tree.others.tokens, HKV=lists.kv_heads, L=tree.levels, SIZE=size,
        BQ=triton.next_power_of_2(size), BN=ITEMS,
    )  # fmt: skip
    return places


def _d_near(q, k, v, d_out, shift, factor, mean, tree: GistTree, scale: float, tile: Tile) -> Tensor:
    """d_k and d_v of windows and sinks, [2, B * R, Hkv, D] fp32; every row is written."""
    lo, hi, items = near_items(tree, tile.keys)
    heads, (keys, kv_heads, dim) = q.shape[1], k.shape
    d_rows = torch.empty(2, keys, kv_heads, dim, dtype=torch.float32, device=q.device)
    parts = torch.empty(2, items.slots, kv_heads, tile.keys, dim, dtype=torch.float32, device=q.device)
    every = tree.others.memo("every row", lambda: torch.arange(keys, device=q.device))
    block_dim = triton.next_power_of_2(dim)
    nothing = d_rows[0, :0]  # sink copies are rows of their own here
    ranges.d_key_kernel[len(items.items), kv_heads](
        q, k, v, d_out, shift, factor, mean, lo, hi, items.items, every, lo, nothing, nothing, *d_rows, *parts,
        scale * LOG2_E, scale, len(q), keys, H=heads, HKV=kv_heads, D=dim, BD=block_dim, S=len(lo), COPIES=False,
        EXACT=q.dtype == torch.float32, UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **launch_options(tile),
    )  # fmt: skip
    if len(items.sums):
        ranges.sum_parts_kernel[len(items.sums), kv_heads, tile.keys // SUM_ROWS](
            *parts, items.sums, every, lo, nothing, nothing, *d_rows, len(q), keys,
            HKV=kv_heads, D=dim, BD=block_dim, BN=tile.keys, BR=SUM_ROWS, SINK=False, COPIES=False,
        )  # fmt: skip
    return d_rows


def _d_chunks(
    q, k, v, d_out, shift, factor, mean, d_rows, tree: GistTree, lists: BlockLists, items: ChunkItems, scale, tile: Tile
) -> None:
    """Add what chunks get from the queries that selected them to d_rows [2, B * R, Hkv, D]."""
    if not items.queries:
        return
    query = torch.empty(items.queries, dtype=torch.int32, device=q.device)
    count = len(items.bits)
    backward.list_queries_kernel[(triton.cdiv(count, ITEMS),)](
        items.bits, items.block, lists.blocks.table, items.end, query, count, SIZE=lists.blocks.size, BN=ITEMS
    )
    parts = _new_parts(q, items.parts, tile)
    backward.chunk_d_key_kernel[(len(items.parts.table),)](
        q, k, v, d_out, shift, factor, mean, tree.lo, items.parts.table, query, tree.child_lo, tree.child_hi, *d_rows, *parts,
        scale * LOG2_E, scale, *_lengths(tree), **_sizes(q, k, tree), **launch_options(tile),
    )  # fmt: skip
    _add_parts(q, k, d_rows, parts, items.parts, tree, tile, True)


def _d_upper(
    q, k, v, d_out, shift, factor, mean, d_rows, tree: GistTree, lists: BlockLists, visits: Visits, scale, tile: Tile
) -> None:
    """Add what gists above level 0 get from the blocks that visit them."""
    if not len(visits.visits):
        return
    parts = _new_parts(q, visits.parts, tile)
    backward.upper_d_key_kernel[(len(visits.parts.table),)](
        q, k, v, d_out, shift, factor, mean, lists.blocks.table, visits.parts.table, visits.visits, visits.row, visits.bits,
        *d_rows, *parts, scale * LOG2_E, scale, *_lengths(tree), **_sizes(q, k, tree), **launch_options(tile),
    )  # fmt: skip
    _add_parts(q, k, d_rows, parts, visits.parts, tree, tile, False)


def _new_parts(q: Tensor, parts: Parts, tile: Tile) -> Tensor:
    return torch.empty(2, parts.slots, tile.keys, q.shape[2], dtype=torch.float32, device=q.device)


def _add_parts(q: Tensor, k: Tensor, d_rows: Tensor, partial: Tensor, parts: Parts, tree: GistTree, tile: Tile, chunks: bool):
    """Add partial sums [2, slots, keys, D] to d_rows."""
    if len(parts.sums):
        backward.add_parts_kernel[len(parts.sums), tile.keys // 16](
            *partial, parts.sums, tree.child_lo, tree.child_hi, *d_rows, *_lengths(tree)[1:],
            HKV=k.shape[1], D=q.shape[2], BD=triton.next_power_of_2(q.shape[2]), BN=tile.keys, CHUNK=chunks,
        )  # fmt: skip


def _by_token(rows: Tensor, tree: GistTree, shape: torch.Size) -> Tensor:
    """[B * R, Hkv, D] -> [B, T, Hkv, D]; the rows of sink copies are added to those of their tokens."""
    others = tree.others
    batch, tokens = shape[:2]
    sample = torch.arange(batch, device=rows.device)[:, None]
    rows = rows.unflatten(0, (batch, -1))
    out = rows[sample, others.row_of].flatten(0, 1)
    # Two copies of one token are never both seen: adding zeros in any order changes nothing.
    out.index_add_(0, (others.rows[:, tokens:] + sample * tokens).flatten(), rows[:, tokens:].flatten(0, 1))
    return out.view(shape)


def _lengths(tree: GistTree) -> tuple[int, int, int]:
    """Queries, rows and tokens of a sample: the arguments that end every launch."""
    return tree.queries, tree.others.rows.shape[1], tree.others.tokens


def _sizes(q: Tensor, k: Tensor, tree: GistTree) -> dict[str, int | bool]:
    """Compile-time arguments that the kernels share."""
    return dict(
        H=q.shape[1], HKV=k.shape[1], D=q.shape[2], BD=triton.next_power_of_2(q.shape[2]), L=tree.levels,
        EXACT=q.dtype == torch.float32, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
