"""The Triton kernel that keeps new tokens' keys and values: each in its own sequence's cache, where the tables say."""

import triton.language as tl

from unfold.kernels.common.tl import kernel
from unfold.kernels.decode.kernels import key_begin


@kernel
def keep_kernel(
    p_k, p_v, p_anchor, p_places, p_items,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
):  # fmt: skip
    """Copy a token's key and value of one KV head from k and v, of any strides, to its row of the cache.

    p_places: see kernels/decode/kernels.py. p_items: [N, 2] int64, segment and row of each token. Grid: (HKV, N).
    """
    i_head, i_token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_segment, i_row = tl.load(p_items + 2 * i_token), tl.load(p_items + 2 * i_token + 1)
    i_first, to_value = key_begin(p_places + i_token * (3 * L + 2), i_segment, i_head, HKV, D)
    o_dim = tl.arange(0, BD)
    m_dim = o_dim < D
    b_k = tl.load(p_k + i_token * K_TOKEN + i_head * K_HEAD + o_dim, mask=m_dim)
    b_v = tl.load(p_v + i_token * V_TOKEN + i_head * V_HEAD + o_dim, mask=m_dim)
    p_row = p_anchor + i_first + i_row * D + o_dim
    tl.store(p_row, b_k, mask=m_dim)
    tl.store(p_row + to_value, b_v, mask=m_dim)
