"""Recall, routing and decoding for tests.benchmarks.compiled: every kernel with the sizes that its launcher gives it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton

from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed import backward as ranges
from unfold.kernels.compressed.triton import SUM_ROWS
from unfold.kernels.decode import attend
from unfold.kernels.decode import kernels as decoding
from unfold.kernels.decode.keep import keep_kernel
from unfold.kernels.decode.tiles import decode_tiles
from unfold.kernels.decode.triton import COMPARED, HELD, searched
from unfold.kernels.route import kernels as routing
from unfold.kernels.route.triton import UPPER, route_tiles
from unfold.kernels.select import kernels as selecting
from unfold.kernels.select.triton import LIST_KEYS, LIST_WARPS
from unfold.kernels.select.triton import TABLE as SELECT_TILES
from unfold.kernels.unfold import backward, forward, turn
from unfold.kernels.unfold.common import place_kernel
from unfold.kernels.unfold.tiles import choose_unfold_tiles
from unfold.kernels.unfold.turn import ITEMS

LONGEST_CHUNK = 12  # c0 = 8, and up to half of it more
SPLITS = 32
_INT32 = (
    "lo hi blocks row bits place places child_lo child_hi parts sums budget words bound count new_words new_places ints score "
    "query item spans next_spans next_lo next_hi key seen new_key tally total spread starts copy_of items"
)
_INT64 = "rows first ends end start tokens token_rows"
_FP32 = "shift factor mean part_k part_v part max sum rows_k rows_v copy_k copy_v"
_TYPES = {f"p_{n}": kind for kind, names in (("*i32", _INT32), ("*i64", _INT64), ("*fp32", _FP32)) for n in names.split()}


@dataclass(frozen=True)
class Program:
    """A kernel, how it is launched, its compile-time sizes, and types of arguments that have others than their name says."""

    kernel: triton.JITFunction
    tile: Tile
    sizes: dict[str, Any]
    types: dict[str, str]

    def type_of(self, name: str, dtype: str) -> str:
        """Triton's name for the type of an argument."""
        if not name.startswith("p_"):
            return "fp32" if name in ("scale", "d_scale") else "i32"
        return self.types.get(name) or _TYPES.get(name, f"*{dtype}")


def recall_programs(arch: str, dim: int, dtype: str, item_size: int, heads: int, kv_heads: int) -> dict[str, Program]:
    """Every program of selection, unfolding, routing and decoding at two gist levels: name -> program."""
    block_dim = max(64, triton.next_power_of_2(dim))
    group = heads // kv_heads
    tiles = choose_unfold_tiles(arch, block_dim, item_size)
    size = tiles.block(group)
    tiles = tiles.fit(group, LONGEST_CHUNK)
    common = dict(H=heads, HKV=kv_heads, D=dim, BD=triton.next_power_of_2(dim), L=2, EXACT=dtype == "fp32", UPCAST=False)
    sums, cut = {"p_dk": "*fp32", "p_dv": "*fp32"}, dict(SHORT=turn.SHORTEST_LIST)
    made = {
        "unfold": (forward.unfold_kernel, tiles.forward, {}, {}),
        "unfold d_query": (backward.unfold_d_query_kernel, tiles.d_query, {}, {}),
        "unfold d_key near": (ranges.d_key_kernel, tiles.near, dict(S=3, COPIES=False, APART=True), sums),
        "unfold d_key chunks": (backward.chunk_d_key_kernel, tiles.chunks, cut, sums),
        "unfold d_key upper": (backward.upper_d_key_kernel, tiles.upper, {}, sums),
        "unfold add chunks": (backward.add_chunks_kernel, replace(tiles.chunks, warps=4, stages=3), cut, sums),
        "unfold add upper": (backward.add_upper_kernel, replace(tiles.upper, warps=4, stages=3), {}, sums),
        "unfold by token": (backward.by_token_kernel, Tile(1, SUM_ROWS, 4, 3), dict(ADD=True), {}),
    }
    for share, summed in (("head", 1), ("group", group)):
        chosen = SELECT_TILES[arch][share][block_dim, item_size].fit(size * group // summed)
        for top, tile in ((True, chosen.top), (False, chosen.below)):
            words, per = -(-tile.rows // 32), group // summed
            flags = dict(SUM=summed, WORDS=words, TOP=top, S=0 if top else 1, TILES=chosen.run, PER=per)
            name, light = f"{share} {'top' if top else 'below'}", Tile(tile.rows, LIST_KEYS, LIST_WARPS, 3)
            made[f"select score {name}"] = (selecting.score_kernel, tile, flags, {})
            made[f"select take {name}"] = (selecting.take_kernel, light, flags, {})
    for n, warps in ((1024, 1), (8192, 8)):  # scores of a row that stay in registers
        flags = dict(N=n, WHOLE=n < 8192, TOP=True, PER=group)
        made[f"select bound {n}"] = (selecting.bound_kernel, Tile(size * group, n, warps, 3), flags, {})
    light = Tile(1, ITEMS, 4, 3)
    made |= {
        "select mark": (selecting.mark_kernel, Tile(1, LIST_KEYS, LIST_WARPS, 3), {}, {"p_marks": "*i32"}),
        "turn tally": (turn.tally_kernel, light, {}, {}),
        "turn fold": (turn.fold_kernel, light, {}, {}),
        "turn fill": (turn.fill_kernel, light, dict(SIZE=size), {}),
        "turn spread": (turn.spread_kernel, light, {}, {}),
    }
    made["unfold places"] = (place_kernel, Tile(1, ITEMS, 4, 3), dict(SIZE=size, BQ=size), {})
    made |= _route_programs(arch, dim, item_size, group)
    made |= _decode_programs(arch, dim, item_size, group, kv_heads)
    return {n: Program(k, t, common | dict(BM=t.rows, BN=t.keys) | own, types) for n, (k, t, own, types) in made.items()}


def _route_programs(arch: str, dim: int, item_size: int, group: int) -> dict[str, tuple]:
    """The programs of the routing loss: name -> kernel, tile, sizes, types."""
    tiles = route_tiles(arch, dim, item_size, group)
    sums = {f"p_{name}": "*fp32" for name in ("shift", "factor", "mass", "loss", "d")}
    types = sums | {"p_first": "*i32", "p_items": "*i32"}
    return {
        "route raw sums": (routing.raw_sum_kernel, tiles.raw, {}, types),
        "route masses": (routing.mass_kernel, tiles.mass, dict(BC=tiles.chunks, FAR=True), types),
        "route masses above": (routing.upper_kernel, replace(UPPER, rows=tiles.raw.rows), dict(BC=UPPER.keys, S=0), types),
        "route student": (routing.student_kernel, tiles.student, {}, types),
        "route d_gist": (routing.d_gist_kernel, tiles.d_gist, {}, types),
    }


def _decode_programs(arch: str, dim: int, item_size: int, group: int, kv_heads: int) -> dict[str, tuple]:
    """The programs of decoding, every head selecting for itself: name -> kernel, tile, sizes, types."""
    width = triton.next_power_of_2(group)
    rows = max(16, width)
    tiles = decode_tiles(triton.next_power_of_2(dim), item_size)
    tile = lambda launch: Tile(rows, launch.keys, launch.warps, launch.stages)
    flags = dict(BG=rows, GS=width, HS=group, W=8, LEVEL=1, BO=COMPARED, RECALLS=True, PDL=arch != "sm_80")
    places = {"p_places": "*i64"}
    lists = places | {"p_lo": "*i32", "p_hi": "*i32", "p_item": "*i32", "p_new": "*i32", "p_score": "*i32"}
    made = {
        "decode score top": (decoding.score_top_kernel, tile(tiles.top), flags, lists),
        "decode score below": (decoding.score_below_kernel, tile(tiles.below), flags | dict(BO=128), lists),
        "decode attend": (attend.attend_kernel, tile(tiles.attend), flags, lists),
    }
    for name, scores, level in (("top", 4096, 0), ("below", 1024, 1), ("most", HELD, 0), ("many", 2 * HELD, 1)):
        warps, held = searched(scores, tiles, HELD)
        search = Tile(1, held["BS"], warps, 1)
        made[f"decode select {name}"] = (decoding.select_kernel, search, flags | held | dict(LEVEL=level), lists)
    sums = Tile(1, tiles.part, tiles.combine_warps, 1)
    own = dict(BN=tiles.attend.keys, BS=tiles.splits, BP=tiles.part)
    made["decode combine"] = (attend.combine_kernel, sums, flags | own, {})
    strides = dict(K_TOKEN=kv_heads * dim, K_HEAD=dim, V_TOKEN=kv_heads * dim, V_HEAD=dim)
    made["decode keep"] = (keep_kernel, Tile(1, 1, 1, 3), strides, places | {"p_items": "*i64"})
    return made
