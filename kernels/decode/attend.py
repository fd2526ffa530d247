"""The Triton kernels of decoding that attend: over all that a query sees, in splits, and the sum of the splits.

A KV head's heads share the union of their selections, and each key counts once: an entry of a head's list (kernels.py) whose gist
stands in the list of a head before it is passed over: above level 0 as p_new says already. Places stand side by side: the window,
the sinks, the ranges of the compressed mask, an entry each for the gists selected above level 0; then, from a tile's start on,
W + 1 for each entry of level 0, the gist and the raw tokens behind it. A split takes every splits-th tile.
"""

import triton
import triton.language as tl

from unfold.kernels.common.tl import kernel, load_tile, softmax_step, store_tile
from unfold.kernels.decode.kernels import key_begin, let_next_begin, taken_before, wait_for_last


@triton.jit
def _tiles(p_ints, L: tl.constexpr, HS: tl.constexpr, W: tl.constexpr, BN: tl.constexpr):
    """Places of ranges and of entries above level 0, tiles of these, all tiles."""
    single = tl.load(p_ints) + tl.load(p_ints + 2) - tl.load(p_ints + 1)
    for s in tl.static_range(L):
        single += tl.load(p_ints + 4 + 5 * s) - tl.load(p_ints + 3 + 5 * s)
    for s in tl.static_range(L - 1):
        single += HS * tl.load(p_ints + 7 + 5 * s)
    tiles = tl.cdiv(single, BN)
    behind = 0
    if L > 0:
        behind = HS * tl.load(p_ints + 2 + 5 * L) * (W + 1)
    return single, tiles, tiles + tl.cdiv(behind, BN)


@triton.jit
def _single_rows(
    p_ints, p_new, o_place, single, room, L: tl.constexpr, HS: tl.constexpr, RECALLS: tl.constexpr
):  # fmt: skip
    """Segment and row at places of the sinks, the window, the ranges of the compressed mask, the gists selected above level 0."""
    sinks, i_lo = tl.load(p_ints), tl.load(p_ints + 1)
    i_before = sinks + tl.load(p_ints + 2) - i_lo
    o_key = tl.where(o_place < sinks, o_place, i_lo + o_place - sinks)
    o_segment = tl.full([o_place.shape[0]], L, tl.int32)
    for s in tl.static_range(L):
        i_first = tl.load(p_ints + 3 + 5 * s)
        m_behind = o_place >= i_before
        o_segment = tl.where(m_behind, s, o_segment)
        o_key = tl.where(m_behind, i_first + o_place - i_before, o_key)
        i_before += tl.load(p_ints + 4 + 5 * s) - i_first
    m_key = o_place < single
    if RECALLS:
        for s in tl.static_range(L - 1):
            entries = HS * tl.load(p_ints + 7 + 5 * s)
            o_entry = o_place - i_before
            m_entry = (o_entry >= 0) & (o_entry < entries)
            b_gist = tl.load(p_new + s * HS * room + o_entry, mask=m_entry, other=-1)
            o_segment = tl.where(m_entry, s, o_segment)
            o_key = tl.where(m_entry, b_gist, o_key)
            m_key = m_key & ((b_gist >= 0) | (m_entry == 0))
            i_before += entries
    return o_segment, o_key, m_key


@triton.jit
def _unfolded_rows(
    p_item, p_lo, p_hi, i_first, budget, L: tl.constexpr, HS: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr
):  # fmt: skip
    """Segment and row at BN places from i_first on of entries of level 0: the gist, what is behind it."""
    # So many entries can have a place among BN, if a tile begins anywhere among an entry's places.
    TOUCHED: tl.constexpr = (BN - 1) // (W + 1) + 2
    BE: tl.constexpr = triton.next_power_of_2(TOUCHED)
    o_place = i_first + tl.arange(0, BN)
    o_entry, o_within = o_place // (W + 1), o_place % (W + 1)
    m_entry = o_entry < HS * budget
    b_gist = tl.load(p_item + o_entry, mask=m_entry, other=-1)
    o_raw = tl.load(p_lo + o_entry, mask=m_entry, other=0) + o_within - 1
    o_end = tl.load(p_hi + o_entry, mask=m_entry, other=0)
    m_key = (b_gist >= 0) & ((o_within == 0) | (o_raw < o_end))
    if HS > 1:  # looked up once per entry
        i_entry = i_first // (W + 1)
        o_touched = tl.minimum(i_entry + tl.arange(0, BE), HS * budget - 1)
        b_touched = tl.load(p_item + o_touched)
        b_before = taken_before(p_item, o_touched, b_touched, budget, BO)
        m_key = m_key & (tl.gather(b_before, o_entry - i_entry, 0) == 0)
    return tl.where(o_within == 0, L - 1, L), tl.where(o_within == 0, b_gist, o_raw), m_key


@kernel
def attend_kernel(
    p_q, p_anchor, p_ints, p_places, p_item, p_lo, p_hi, p_new, p_part, p_max, p_sum, scale, room,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, BG: tl.constexpr, HS: tl.constexpr,
    BN: tl.constexpr, BO: tl.constexpr, W: tl.constexpr, RECALLS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of a KV head of a query: sums [N, H, splits, D], maxima and sums of weights [N, H, splits], fp32.

    p_item, p_lo, p_hi, p_new: [N, HKV, L, HS * room]. W: items of a chunk at most. Splits without a tile write nothing.
    Grid: (splits, HKV, N).
    """
    G: tl.constexpr = H // HKV
    i_split, i_head, i_query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    let_next_begin(PDL)
    p_ints += i_query * (3 + 5 * L)
    p_places += i_query * (3 * L + 2)
    i_list = (i_query.to(tl.int64) * HKV + i_head) * L * HS * room
    o_row = tl.arange(0, BG)
    o_q = i_query.to(tl.int64) * H + i_head * G + o_row
    b_q = load_tile(p_q, o_q * D, o_row < G, D, BD)
    single, single_tiles, tiles = _tiles(p_ints, L, HS, W, BN)
    b_max = tl.full([BG], -1e30, tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    b_out = tl.zeros([BG, BD], tl.float32)
    wait_for_last(PDL)
    for i in range(i_split, tiles, splits):
        o_segment, o_key, m_key = tl.zeros([BN], tl.int32), tl.zeros([BN], tl.int32), tl.zeros([BN], tl.int1)
        if i < single_tiles:
            o_place = i * BN + tl.arange(0, BN)
            o_segment, o_key, m_key = _single_rows(p_ints, p_new + i_list, o_place, single, room, L, HS, RECALLS)
        else:
            if RECALLS:
                i_last = i_list + (L - 1) * HS * room
                o_segment, o_key, m_key = _unfolded_rows(
                    p_item + i_last, p_lo + i_last, p_hi + i_last, (i - single_tiles) * BN, tl.load(p_ints + 2 + 5 * L),
                    L, HS, W, BN, BO,
                )  # fmt: skip
        o_k = tl.zeros([BN], tl.int64)
        o_v = tl.zeros([BN], tl.int64)
        for s in tl.static_range(L + 1):
            i_first, to_value = key_begin(p_places, s, i_head, HKV, D)
            o_s = i_first + o_key.to(tl.int64) * D
            o_k = tl.where(o_segment == s, o_s, o_k)
            o_v = tl.where(o_segment == s, o_s + to_value, o_v)
        b_k = load_tile(p_anchor, o_k, m_key, D, BD)
        b_v = load_tile(p_anchor, o_v, m_key, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_key[None, :], scale, True, UPCAST)
    m_row = (o_row < G) & (i_split < tiles)
    store_tile(p_part, (o_q * splits + i_split) * D, m_row, b_out, D, BD)
    tl.store(p_max + o_q * splits + i_split, b_max, mask=m_row)
    tl.store(p_sum + o_q * splits + i_split, b_sum, mask=m_row)


@kernel
def combine_kernel(
    p_ints, p_part, p_max, p_sum, p_out, splits,
    H: tl.constexpr, D: tl.constexpr, L: tl.constexpr, HS: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, BS: tl.constexpr,
    BP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N, H, D]: the splits, weighted by their sums, always in the same order. BN, W: as they were attended with.

    Grid: (cdiv(D, BP), N * H). BS >= splits.
    """
    i_row = tl.program_id(1).to(tl.int64)
    let_next_begin(PDL)
    _, _, tiles = _tiles(p_ints + i_row // H * (3 + 5 * L), L, HS, W, BN)
    o_split = tl.arange(0, BS)
    m_split = o_split < tl.minimum(splits, tiles)
    o_dim = tl.program_id(0) * BP + tl.arange(0, BP)
    wait_for_last(PDL)
    b_max = tl.load(p_max + i_row * splits + o_split, mask=m_split, other=-1e30)
    b_sum = tl.load(p_sum + i_row * splits + o_split, mask=m_split, other=0.0)
    o_part = (i_row * splits + o_split)[:, None] * D + o_dim[None, :]
    b_part = tl.load(p_part + o_part, mask=m_split[:, None] & (o_dim < D)[None, :], other=0.0)
    b_weight = tl.where(m_split, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.sum(b_weight * b_sum, 0)
    tl.store(p_out + i_row * D + o_dim, b_out.to(p_out.dtype.element_ty), mask=o_dim < D)
