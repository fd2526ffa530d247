"""What the Triton kernels of several ops share: names, products, loads, masks, one step of a softmax and of its gradients.

``rows`` are (token, query head of one KV head) pairs and ``keys`` rows of the level-sorted key buffer (kernels/compressed/
plan.py, which makes every loop bound). Scores are in units of log2: ``exp2`` is what the hardware has.
EXACT, for fp32: a row's largest score and its sum of exponentials are kept apart, since their joint log-sum-exp (one number
less to hold per row, and exact enough for 16 bits) would cost half the digits of an fp32 gradient.

Names: ``b_`` tile, ``p_`` pointer, ``m_`` mask, ``o_`` offsets, ``i_`` index. Compile-time sizes: H query heads, HKV key heads,
D head dimension, BD its next power of two, S segments, BM rows and BN keys of a tile. UPCAST multiplies 16-bit tiles as
fp32: only for Triton's interpreter, whose bf16 product is wrong.
"""

import functools

import triton
import triton.language as tl

# Numbers that differ from one micro-batch or decoding step to the next, and tables that may begin anywhere: a kernel is compiled
# once for all of them. Left to itself Triton compiles anew, for seconds, where one of them is or is not a multiple of 16.
CHANGING = (
    "tokens keys queries items lists capacity room next_room splits sink i_from batch groups most slots blocks per above"
).split()
_TABLES = (
    "lo hi plan items rows copy_of sums parts blocks first start row bits takers words place places key seen unfolded begin "
    "child_lo child_hi budget bound count spans next_spans next_lo next_hi end query ends ints new_places new_words new_key "
    "tokens token_rows tally total spread starts marks"
)
TABLES = [f"p_{name}" for name in _TABLES.split()]
kernel = functools.partial(triton.jit, do_not_specialize=CHANGING, do_not_specialize_on_alignment=TABLES)


@triton.jit
def dot(b_a, b_b, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, input_precision="ieee")


@triton.jit
def load_tile(p_x, o_x, m_x, D: tl.constexpr, BD: tl.constexpr):
    """Tile [n, BD] of rows that begin at offsets o_x [n]; zero outside the mask m_x [n] and beyond D."""
    o_dim = tl.arange(0, BD)
    m_tile = m_x[:, None] if BD == D else m_x[:, None] & (o_dim < D)[None, :]
    return tl.load(p_x + o_x[:, None] + o_dim[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_full_tile(p_x, i_first, n: tl.constexpr, stride: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Tile [n, BD] of rows i_first .., all of which exist."""
    o_dim = tl.arange(0, BD)
    o_tile = tl.arange(0, n)[:, None] * stride + o_dim[None, :]
    p_tile = p_x + i_first.to(tl.int64) * stride
    if BD == D:
        return tl.load(p_tile + o_tile)
    else:
        return tl.load(p_tile + o_tile, mask=(o_dim < D)[None, :], other=0.0)


@triton.jit
def store_tile(p_x, o_x, m_x, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Store [n, BD] to rows that begin at offsets o_x [n], where the mask m_x [n] holds."""
    o_dim = tl.arange(0, BD)
    m_tile = m_x[:, None] if BD == D else m_x[:, None] & (o_dim < D)[None, :]
    tl.store(p_x + o_x[:, None] + o_dim[None, :], b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def row_offsets(i_sample, i_head, o_row, tokens, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr):
    """Where each row begins in [B, T, H, D], int64."""
    o_token = i_sample.to(tl.int64) * tokens + o_row // (H // HKV)
    return o_token * (H * D) + (i_head * (H // HKV) + o_row % (H // HKV)) * D


@triton.jit
def in_range(o_key, b_lo, b_hi):
    """lo <= key < hi in one comparison: a key before lo wraps around to a huge number."""
    return (o_key - b_lo).to(tl.uint32, bitcast=True) < (b_hi - b_lo).to(tl.uint32, bitcast=True)


@triton.jit
def listed_keys(p_plan, o_place, S: tl.constexpr):
    """Keys at places of a block's list (its spans side by side), -1 behind its end."""
    o_key = o_place + tl.load(p_plan + 4)
    for s in tl.static_range(1, S):
        o_key = tl.where(o_place >= tl.load(p_plan + 3 + 2 * s), o_place + tl.load(p_plan + 4 + 2 * s), o_key)
    return tl.where(o_place < tl.load(p_plan + 2), o_key, -1)


@triton.jit
def seen_places(p_plan, p_lo, p_hi, o_token, m_row, o_place, tokens, S: tl.constexpr):
    """bool [rows, keys]: the place lies in the row's range of some segment, moved to where that segment stands in the list.

    A range never reaches over the end of its segment's part, and only the first part's may begin before it.
    """
    m_seen = tl.zeros([o_token.shape[0], o_place.shape[0]], tl.int1)
    for s in tl.static_range(S):
        i_shift = tl.load(p_plan + 4 + 2 * s)
        b_lo = tl.load(p_lo + s * tokens + o_token, mask=m_row, other=0) - i_shift
        b_hi = tl.load(p_hi + s * tokens + o_token, mask=m_row, other=0) - i_shift
        m_seen = m_seen | in_range(o_place[None, :], b_lo[:, None], b_hi[:, None])
    return m_seen


@triton.jit
def softmax_step(b_out, b_max, b_sum, b_q, b_k, b_v, m_seen, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Add one tile of keys to the running output, maximum and sum."""
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale
    if MASKED:
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_out = b_out * b_old[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
    return b_out, b_new, b_sum


@triton.jit
def _weights(b_q, b_k, b_shift, m_seen, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """exp2(score - shift) [rows, keys], zero where not seen: the weights but for the row's factor."""
    b_p = tl.exp2(dot(b_q, tl.trans(b_k), UPCAST) * scale - b_shift[:, None])
    if MASKED:
        b_p = tl.where(m_seen, b_p, 0.0)
    return b_p


@triton.jit
def mean_step(b_mean, b_sum, b_q, b_do, b_shift, b_k, b_v, m_seen, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Add one tile of keys to the sums of weights times d_out . v, and of weights."""
    b_p = _weights(b_q, b_k, b_shift, m_seen, scale, MASKED, UPCAST)
    b_dp = dot(b_do, tl.trans(b_v), UPCAST)
    if MASKED:
        b_dp = tl.where(b_p > 0, b_dp, 0.0)
    return b_mean + tl.sum(b_p * b_dp, 1), b_sum + tl.sum(b_p, 1)


@triton.jit
def d_query_step(
    b_dq, b_q, b_do, b_shift, b_mean, b_k, b_v, m_seen, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    b_p = _weights(b_q, b_k, b_shift, m_seen, scale, MASKED, UPCAST)
    b_ds = b_p * (dot(b_do, tl.trans(b_v), UPCAST) - b_mean[:, None])
    if MASKED:
        b_ds = tl.where(b_p > 0, b_ds, 0.0)  # the product with a hidden value may have been inf
    return b_dq + dot(b_ds.to(b_k.dtype), b_k, UPCAST)
