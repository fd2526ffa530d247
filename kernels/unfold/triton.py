"""Unfolding on GPUs: launches the Triton kernels, forward and backward. Memory linear in what may be selected, bit-equal runs.

Forward: a block of neighbouring queries runs one online softmax over its windows and the union of what its queries selected.
Backward recomputes the weights: d_q block by block of queries; d_k and d_v in fp32 rows of the level-sorted buffer, which three
kernels fill one after another without atomics: windows and sinks, chunks, gists above level 0.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from unfold.kernels.compressed.plan import KeyItems
from unfold.kernels.compressed.triton import SUM_ROWS, attend_sorted, compressed_tiles, gradients, prepare, sort_keys
from unfold.kernels.select import triton as selecting
from unfold.kernels.select.blocks import BlockLists, block_lists
from unfold.kernels.select.room import list_room
from unfold.kernels.select.selection import Selection, SelectRule
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import backward, common, forward, turn
from unfold.kernels.unfold.plan import UpperParts, level_0_gists, longest_chunk, near_items, upper_parts, visible_copies
from unfold.kernels.unfold.tiles import LARGEST_TILE, LONGEST_CHUNK, UnfoldTiles, choose_unfold_tiles
from unfold.kernels.unfold.turn import ITEMS, ChunkQueries, chunk_queries, spread_bits


def unfold_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: GistTree,
    selection: Selection | BlockLists,
    scale: float,
    apart: tuple[Tensor, Tensor] | None = None,
    tiles: UnfoldTiles | None = None,
) -> Tensor:
    """As :func:`kernels.unfold.reference.unfold_attention_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k, tree)
    if reason:
        raise ValueError(reason)
    tiles = tiles or tiles_for(q)
    lists = selection
    if not isinstance(selection, BlockLists):
        lists = block_lists(tree, selection, tiles.block(q.shape[1] // k.shape[2]))
    return _UnfoldAttention.apply(q, k, v, *(apart or (None, None)), tree, lists, scale, tiles.of(q, k, longest_chunk(tree)))


def lists_to_unfold(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule) -> BlockLists:
    """What is selected, in lists of blocks as unfolding works through them: no entry is ever sorted. q: [N, H, D].

    Raises:
        ValueError: what :func:`why_not` says, here or for selection.
    """
    check_recall(q, k, tree, rule)
    return selecting.select_lists(q, k, tree, rule, tiles_for(q).block(q.shape[1] // k.shape[2]))


def recall_layer_triton(
    q: Tensor, k: Tensor, v: Tensor, tree: GistTree, rule: SelectRule, scale: float
) -> tuple[Tensor, BlockLists]:
    """A layer's attention where some tokens recall, [B, T, H, D], and what was selected; arguments of ``recall_attention``.

    Raises:
        ValueError: what :func:`why_not` says, here or for selection.
    """
    check_recall(q, k, tree, rule)
    found: list[BlockLists] = []
    return _RecallAttention.apply(q, k, v, tree, rule, scale, found), found[0]


def prepare_layer(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule) -> None:
    """Make the plans of :func:`recall_layer_triton` and its gradients; q [.., H, D], k [.., Hkv, D] of any length.

    Raises:
        ValueError: what :func:`why_not` says, here or for selection.
    """
    check_recall(q, k, tree, rule)
    prepare(q, k, tree.others, backward=True)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    size, tiles = tiles_for(q).block(heads // kv_heads), tiles_for(q).fit(heads // kv_heads, longest_chunk(tree))
    list_room(tree, rule, size, heads, kv_heads)
    near_items(tree, tiles.near.keys)
    upper_parts(tree, size, tiles.upper.keys)
    level_0_gists(tree)
    visible_copies(tree)


def check_recall(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule) -> None:
    reason = why_not(q, k, tree) or selecting.why_not(q, k, rule)
    if reason:
        raise ValueError(reason)


def why_not(q: Tensor, k: Tensor, tree: GistTree) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do. q: [.., H, D], k: [B, T, Hkv, D]."""
    instead = "use backend='reference' or 'cpu'"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, {instead}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[-1]} is not one of {HEAD_DIMS}; use one, or backend='reference'"
    if q.shape[-2] // k.shape[2] > LARGEST_TILE:
        return f"q: {q.shape[-2] // k.shape[2]} query heads per KV head, backend 'triton' serves {LARGEST_TILE}; {instead}"
    if longest_chunk(tree) > LONGEST_CHUNK:
        return f"tree: a chunk of {longest_chunk(tree)} tokens, backend 'triton' serves {LONGEST_CHUNK}; {instead}"
    return None


def tiles_for(q: Tensor) -> UnfoldTiles:
    """Tiles for the device, head dimension and dtype of q."""
    return choose_unfold_tiles(architecture(q), max(64, triton.next_power_of_2(q.shape[-1])), q.element_size())


class _UnfoldAttention(torch.autograd.Function):
    """The queries alone: [N, H, D]; k_apart, v_apart: [F, Hkv, D], or None."""

    @staticmethod
    def forward(ctx, q, k, v, k_apart, v_apart, tree: GistTree, lists: BlockLists, scale: float, tiles: UnfoldTiles) -> Tensor:
        q, shape, stand_apart = q.contiguous(), k.shape, k_apart is not None
        k, v = sort_keys(tree.others, k, v)
        if stand_apart:
            k, v = torch.cat([k, k_apart]), torch.cat([v, v_apart])
        out = torch.empty_like(q)
        stats = _attend(q, selecting.every_query(tree), k, v, out, tree, lists, scale, tiles)
        # A checkpoint lets go of what is saved like this, and makes it again; the blocks are those of all layers.
        ctx.lists, chosen = without_tensors(lists)
        ctx.save_for_backward(q, k, v, out, *stats, *chosen)
        ctx.tree, ctx.scale, ctx.tiles, ctx.shape, ctx.stand_apart = tree, scale, tiles, shape, stand_apart
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, shift, factor, *chosen = ctx.saved_tensors
        tree, d_out, lists = ctx.tree, d_out.contiguous(), with_tensors(ctx.lists, chosen)
        d_q, (d_k, d_v) = torch.empty_like(q), torch.empty(2, *ctx.shape, dtype=k.dtype, device=k.device).unbind()
        at, stats = selecting.every_query(tree), (shift, factor)
        d_rows = _add_gradients(q, at, k, v, out, d_out, *stats, tree, lists, ctx.scale, ctx.tiles, d_q, d_k, d_v, add=False)
        d_apart = (x[tree.others.rows.numel() :].to(k.dtype) if ctx.stand_apart else None for x in d_rows)
        return d_q, d_k, d_v, *d_apart, None, None, None, None


class _RecallAttention(torch.autograd.Function):
    """A whole layer: keys are sorted once, and what recalls is read and written where it stands among the others' rows."""

    @staticmethod
    def forward(ctx, q, k, v, tree: GistTree, rule: SelectRule, scale: float, found: list[BlockLists]) -> Tensor:
        q, others = q.contiguous(), compressed_tiles(q)
        tiles = tiles_for(q)
        size, tiles = tiles.block(q.shape[-2] // k.shape[2]), tiles.of(q, k, longest_chunk(tree))
        k, v = sort_keys(tree.others, k, v)
        out, *stats = attend_sorted(q, k, v, tree.others, scale, others)
        lists = selecting.select_sorted(q, tree.tokens, k, tree, rule, size)
        found.append(lists)
        stats += _attend(q, tree.tokens, k, v, out, tree, lists, scale, tiles)
        ctx.lists, chosen = without_tensors(lists)
        ctx.save_for_backward(q, k, v, out, *stats, *chosen)
        ctx.tree, ctx.scale, ctx.tiles, ctx.others = tree, scale, tiles, others
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, shift, factor, *others = ctx.saved_tensors
        tree, d_out, (stats, chosen) = ctx.tree, d_out.contiguous(), (others[:2], others[2:])
        d_q, d_k, d_v = gradients(q, k, v, out, d_out, shift, factor, tree.others, ctx.scale, ctx.others)
        lists = with_tensors(ctx.lists, chosen)
        _add_gradients(q, tree.tokens, k, v, out, d_out, *stats, tree, lists, ctx.scale, ctx.tiles, d_q, d_k, d_v, add=True)
        return d_q, d_k, d_v, None, None, None, None


def _attend(
    q: Tensor, at: Tensor, k: Tensor, v: Tensor, out: Tensor, tree: GistTree, lists: BlockLists, scale: float, tiles: UnfoldTiles
) -> tuple[Tensor, Tensor]:
    """Fill the rows ``at`` [N] of out [.., H, D]; each row's shift and factor [Hkv, N * G] fp32. k, v: sorted by level."""
    check_flat(lo=tree.lo, hi=tree.hi, child_lo=tree.child_lo, child_hi=tree.child_hi, first=lists.first, start=lists.start)
    kv_heads = k.shape[1]
    shift = torch.empty(kv_heads, tree.queries * (q.shape[-2] // kv_heads), dtype=torch.float32, device=q.device)
    factor = torch.empty_like(shift) if q.dtype == torch.float32 else shift  # 16 bits need none
    with on_device(q):
        for first, last, places in _sliced(tree, lists):
            forward.unfold_kernel[last - first, kv_heads](
                q, k, v, out, shift, factor, at, tree.lo, tree.hi, lists.blocks.table, lists.first, lists.count, lists.row,
                lists.bits, lists.start, *places, scale * LOG2_E, first, tree.queries, tree.others.rows.shape[1],
                lists.first.shape[1], **_sizes(q, k, tree), **launch_options(tiles.forward),
            )  # fmt: skip
    return shift, factor


def _sliced(tree: GistTree, lists: BlockLists) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
    """Slices of blocks, first and last + 1, with key and bits of every place of the chunks, [places] int32 each.

    Made anew by each pass: kept, they would outweigh the layer.
    """
    most, size = max(places for *_, places in lists.slices), lists.blocks.size
    places = tuple(torch.empty(most, dtype=torch.int32, device=lists.row.device) for _ in range(2))
    for first, last, _ in lists.slices:
        common.place_kernel[((last - first) * lists.kv_heads,)](
            lists.first, lists.count, lists.start, lists.row, lists.bits, tree.lo, lists.blocks.table, tree.child_lo,
            tree.child_hi, *places, first, tree.queries, tree.others.tokens, lists.first.shape[1], HKV=lists.kv_heads,
            L=tree.levels, SIZE=size, BQ=triton.next_power_of_2(size), BN=ITEMS,
        )  # fmt: skip
        yield first, last, places


def _add_gradients(
    q, at, k, v, out, d_out, shift, factor, tree: GistTree, lists: BlockLists, scale: float, tiles: UnfoldTiles,
    d_q: Tensor, d_k: Tensor, d_v: Tensor, *, add: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill the rows ``at`` of d_q, and d_k, d_v [B, T, Hkv, D], or ``add`` to these: the gradients of :func:`_attend`.

    Returns:
        Those of k and v, as they are, in fp32.
    """
    mean, kv_heads, lengths = torch.empty_like(shift), k.shape[1], tree.others.rows.shape[1]
    stats = q, k, v, d_out, shift, factor, mean, at
    near, queries = near_items(tree, tiles.near.keys), chunk_queries(tree, lists, tiles.chunks.keys)
    upper = upper_parts(tree, lists.blocks.size, tiles.upper.keys)
    new = lambda n, keys: torch.empty(2, n, keys, k.shape[2], dtype=torch.float32, device=q.device)
    d_rows = new(len(k), kv_heads)
    if len(k) > tree.others.rows.numel():
        d_rows[:, tree.others.rows.numel() :].zero_()  # windows and sinks are none of what stands apart
    d_rows = d_rows.unbind()
    slots = (near[2].slots * kv_heads * tiles.near.keys, upper.slots * kv_heads * tiles.upper.keys)
    parts = new(max(*slots, queries.slots * tiles.chunks.keys), 1).unbind()  # of each kind in turn
    with on_device(q):
        for first, last, places in _sliced(tree, lists):
            backward.unfold_d_query_kernel[last - first, kv_heads](
                q, k, v, out, d_out, shift, factor, mean, d_q, at, tree.lo, tree.hi, lists.blocks.table, lists.first,
                lists.count, lists.row, lists.bits, lists.start, *places, scale * LOG2_E, scale, first, tree.queries, lengths,
                lists.first.shape[1], **_sizes(q, k, tree), **launch_options(tiles.d_query),
            )  # fmt: skip
        _d_near(stats, d_rows, parts, tree, *near, scale, tiles.near)
        _d_chunks(stats, d_rows, parts, tree, queries, scale, tiles.chunks)
        if len(upper.table):
            _d_upper(stats, d_rows, parts, tree, lists, upper, scale, tiles.upper)
        tokens, (dim, block_dim) = tree.others.tokens, (k.shape[2], triton.next_power_of_2(k.shape[2]))
        backward.by_token_kernel[triton.cdiv(tree.others.batch * tokens, SUM_ROWS), kv_heads](
            *d_rows, tree.others.row_of, visible_copies(tree), d_k, d_v, tokens, lengths, tree.others.batch,
            HKV=kv_heads, D=dim, BD=block_dim, BN=SUM_ROWS, ADD=add,
        )  # fmt: skip
    return d_rows


def _d_near(stats: tuple, d_rows: tuple, parts: tuple, tree: GistTree, lo, hi, items: KeyItems, scale: float, tile: Tile) -> None:
    """d_k and d_v of windows and sinks, two [B * R, Hkv, D] fp32; every row is written."""
    q, k = stats[:2]
    rows = tree.others.rows.numel()
    every = tree.others.memo("every row", lambda: torch.arange(rows, device=q.device))
    sizes = dict(HKV=k.shape[1], D=k.shape[2], BD=triton.next_power_of_2(k.shape[2]), COPIES=False)
    nothing = parts  # sink copies are rows of their own here
    ranges.d_key_kernel[len(items.items), k.shape[1]](
        *stats, lo, hi, items.items, every, lo, *nothing, *d_rows, *parts, scale * LOG2_E, scale, tree.queries, rows,
        H=q.shape[-2], S=len(lo), APART=True, EXACT=q.dtype == torch.float32,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **sizes, **launch_options(tile),
    )  # fmt: skip
    if len(items.sums):
        ranges.sum_parts_kernel[len(items.sums), k.shape[1], tile.keys // SUM_ROWS](
            *parts, items.sums, every, lo, *nothing, *d_rows, tree.queries, rows,
            BN=tile.keys, BR=SUM_ROWS, SINK=False, **sizes,
        )  # fmt: skip


def _d_chunks(
    stats: tuple, d_rows: tuple, parts: tuple, tree: GistTree, queries: ChunkQueries, scale: float, tile: Tile
) -> None:  # fmt: skip
    """Add what chunks get from the queries that selected them to d_rows."""
    q, k = stats[:2]
    families = tree.others.segment_start, tree.child_lo, tree.child_hi
    numbers = tree.others.batch, queries.groups, queries.slots, queries.most
    lengths, short = (tree.others.rows.shape[1], tree.others.tokens), turn.SHORTEST_LIST
    backward.chunk_d_key_kernel[(queries.slots + len(queries.end),)](
        *stats, tree.lo, queries.end, queries.query, *families, *d_rows, *parts, scale * LOG2_E, scale, tree.queries,
        *lengths, *numbers, SHORT=short, **_sizes(q, k, tree), **launch_options(tile),
    )  # fmt: skip
    backward.add_chunks_kernel[queries.slots, tile.keys // 16](
        *parts, queries.end, *families, *d_rows, *lengths, *numbers, HKV=k.shape[1], D=k.shape[2],
        BD=triton.next_power_of_2(k.shape[2]), L=tree.levels, BN=tile.keys, SHORT=short,
    )  # fmt: skip


def _d_upper(
    stats: tuple, d_rows: tuple, parts: tuple, tree: GistTree, lists: BlockLists, upper: UpperParts, scale: float, tile: Tile
) -> None:
    """Add what gists above level 0 get from the blocks that visit them."""
    q, k = stats[:2]
    lengths = tree.others.rows.shape[1]
    for first, last, spread in spread_bits(tree, lists, upper.keys):
        backward.upper_d_key_kernel[len(upper.table), k.shape[1]](
            *stats, lists.blocks.table, upper.table, spread, *d_rows, *parts, scale * LOG2_E, scale, first, last - first,
            upper.keys, tree.queries, lengths, **_sizes(q, k, tree), **launch_options(tile),
        )  # fmt: skip
        if len(upper.sums):
            backward.add_upper_kernel[len(upper.sums), k.shape[1], tile.keys // 16](
                *parts, upper.sums, *d_rows, lengths, HKV=k.shape[1], D=k.shape[2], BD=triton.next_power_of_2(k.shape[2]),
                BN=tile.keys,
            )  # fmt: skip


def _sizes(q: Tensor, k: Tensor, tree: GistTree) -> dict[str, int | bool]:
    """Compile-time arguments that the kernels share."""
    return dict(
        H=q.shape[-2], HKV=k.shape[1], D=k.shape[2], BD=triton.next_power_of_2(k.shape[2]), L=tree.levels,
        EXACT=q.dtype == torch.float32, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
