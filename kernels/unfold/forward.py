"""The forward kernel of unfolding: one online softmax over what a block's queries see."""

import triton.language as tl

from unfold.kernels.common.tl import kernel, load_tile, softmax_step, store_tile
from unfold.kernels.unfold.common import block_rows, listed_tile, near_spans, near_tile


@kernel
def unfold_kernel(
    p_q, p_k, p_v, p_out, p_shift, p_factor, p_tokens, p_lo, p_hi, p_blocks, p_first, p_count, p_row, p_bits, p_start, p_key,
    p_seen, scale, i_from, queries, keys, lists,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [.., H, D] at p_tokens and, for backward, each row's shift and factor [HKV, N * G] as in compressed attention.

    Grid: (blocks from i_from on, HKV).
    """
    i_block, i_head = i_from + tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the last select most: they begin
    i_sample, m_row, o_query, o_bit, o_q, o_stat = block_rows(p_blocks, p_tokens, i_block, i_head, queries, H, HKV, D, BM)
    b_q = load_tile(p_q, o_q, m_row, D, BD)
    stride: tl.constexpr = HKV * D
    o_head = i_sample.to(tl.int64) * keys * stride + i_head * D
    p_k += o_head
    p_v += o_head
    i_list = i_block * HKV + i_head
    # Finite from the start: a row that has seen nothing yet must not compute inf - inf.
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)

    b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks = near_spans(p_lo, p_hi, o_query, m_row, queries, L)
    for i in range(0, window + sinks, BN):
        o_key, m_seen = near_tile(i, b_lo, b_hi, b_slo, b_shi, i_window, window, i_sinks, sinks, BN)
        b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_seen, scale, True, UPCAST)
    for s in tl.static_range(L - 1):
        i_first = tl.load(p_first + s * lists + i_list)
        items = tl.load(p_count + s * lists + i_list)
        for i in range(0, items, BN):
            o_key, m_seen = listed_tile(p_row + i_first, p_bits + i_first, i, items, o_bit, BN)
            b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
            b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
            b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_seen, scale, True, UPCAST)
    i_start = tl.load(p_start + i_list) - tl.load(p_start + i_from * HKV)
    places = tl.load(p_count + L * lists + i_list)
    for i in range(0, places, BN):
        o_key, m_seen = listed_tile(p_key + i_start, p_seen + i_start, i, places, o_bit, BN)
        b_k = load_tile(p_k, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        b_v = load_tile(p_v, o_key.to(tl.int64) * stride, o_key >= 0, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_seen, scale, True, UPCAST)

    b_inverse = 1.0 / tl.where(b_sum > 0, b_sum, 1.0)  # only a row that does not exist sees nothing
    store_tile(p_out, o_q, m_row, b_out * b_inverse[:, None], D, BD)
    if EXACT:
        tl.store(p_shift + o_stat, b_max, mask=m_row)
        tl.store(p_factor + o_stat, b_inverse, mask=m_row)
    else:
        tl.store(p_shift + o_stat, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), mask=m_row)
