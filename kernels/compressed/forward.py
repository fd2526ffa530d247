"""The forward kernel of compressed attention: one online softmax over a block's full tiles and its list of other keys."""

import triton.language as tl

from unfold.kernels.common.tl import (
    kernel,
    listed_keys,
    load_full_tile,
    load_tile,
    row_offsets,
    seen_places,
    softmax_step,
    store_tile,
)


@kernel
def forward_kernel(
    p_q, p_k, p_v, p_out, p_shift, p_factor, p_lo, p_hi, p_plan, scale, tokens, keys,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, D] and, for backward, each row's shift and factor [B, HKV, T * G]: weight = exp2(score - shift) * factor.

    EXACT: the shift is the largest score, the factor 1 / sum; else the shift is the log-sum-exp, and there is no factor.
    Grid: (blocks, HKV, B).
    """
    blocks = tl.num_programs(0)
    i_block = blocks - 1 - tl.program_id(0)  # the last rows see most: begin with them
    i_head, i_sample = tl.program_id(1), tl.program_id(2)
    rows = tokens * (H // HKV)
    o_row = i_block * BM + tl.arange(0, BM)
    m_row = o_row < rows
    o_q = row_offsets(i_sample, i_head, o_row, tokens, H, HKV, D)
    o_token = o_row // (H // HKV)
    b_q = load_tile(p_q, o_q, m_row, D, BD)

    stride: tl.constexpr = HKV * D
    o_head = i_sample.to(tl.int64) * keys * stride + i_head * D
    p_k += o_head
    p_v += o_head
    p_lo += i_sample.to(tl.int64) * S * tokens
    p_hi += i_sample.to(tl.int64) * S * tokens
    p_plan += (i_sample.to(tl.int64) * blocks + i_block) * (3 + 2 * S)
    # Finite from the start: a row that has seen nothing yet must not compute inf - inf.
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BD], tl.float32)

    i_full = tl.load(p_plan)
    for i in range(0, tl.load(p_plan + 1)):
        b_k = load_full_tile(p_k, i_full + i * BN, BN, stride, D, BD)
        b_v = load_full_tile(p_v, i_full + i * BN, BN, stride, D, BD)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, None, scale, False, UPCAST)
    for i in range(0, tl.load(p_plan + 2), BN):
        o_place = i + tl.arange(0, BN)
        o_key = listed_keys(p_plan, o_place, S)
        o_k = o_key.to(tl.int64) * stride
        b_k = load_tile(p_k, o_k, o_key >= 0, D, BD)
        b_v = load_tile(p_v, o_k, o_key >= 0, D, BD)
        m_seen = seen_places(p_plan, p_lo, p_hi, o_token, m_row, o_place, tokens, S)
        b_out, b_max, b_sum = softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_seen, scale, True, UPCAST)

    b_inverse = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)  # a row that sees nothing gets 0
    store_tile(p_out, o_q, m_row, b_out * b_inverse[:, None], D, BD)
    o_stat = (i_sample.to(tl.int64) * HKV + i_head) * rows + o_row
    if EXACT:
        tl.store(p_shift + o_stat, b_max, mask=m_row)
        tl.store(p_factor + o_stat, b_inverse, mask=m_row)
    else:
        tl.store(p_shift + o_stat, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), mask=m_row)
