"""The search for the bound that exactly a budget of one row's scores reaches, by one program: selection and decoding share it.

Scores are compared as ordered 32-bit integers. ``count`` scores reach ``lower``, at least the budget; ``over`` reach ``upper``,
fewer. Where the bound lies between them is guessed, first from the scores' mean and spread as if they were normal, then in
proportion to what is left; where a guess does not halve that, a step quarters the range. The result is exact whatever was
guessed. All numbers are scalars, which every thread works out between two passes: so the arithmetic is short, without 64 bits,
and in terms of the ordered integers, which between two close bounds are as evenly spread as the numbers.
"""

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-2147483648)
MOST: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def ordered(b_s):
    """fp32 -> int32 that compares alike; both zeros are one, and no number becomes LEAST."""
    b_bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    return tl.where(b_bits >= 0, b_bits, b_bits ^ MOST)


@triton.jit
def unordered(b_i):
    """The number of an ordered integer."""
    return tl.where(b_i >= 0, b_i, b_i ^ MOST).to(tl.float32, bitcast=True)


@triton.jit
def spread_of(b_n, b_sum, b_square):
    """Mean and standard deviation of n numbers from their sum and the sum of their squares."""
    b_n = tl.maximum(b_n, 1).to(tl.float32)
    b_mean = b_sum / b_n
    return b_mean, tl.sqrt(tl.maximum(b_square / b_n - b_mean * b_mean, 0.0))


@triton.jit
def load_scores(p_score, i, n, BS: tl.constexpr):
    """Ordered scores at the places i .. i + BS, LEAST behind the n-th."""
    o_place = i + tl.arange(0, BS)
    return tl.load(p_score + o_place, mask=o_place < n, other=LEAST)


@triton.jit
def normal_quantile(n, budget):
    """Above how many standard deviations the budget's share of n normal numbers lies, and the standard error of that.

    Abramowitz and Stegun 26.2.22.
    """
    n = tl.maximum(n, 2).to(tl.float32)
    share = tl.minimum(tl.maximum(budget.to(tl.float32), 0.5) / n, 1.0 - 0.5 / n)
    t = tl.sqrt(-2.0 * tl.log(tl.minimum(share, 1.0 - share)))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + 0.99229 * t + 0.04481 * t * t)
    error = tl.sqrt(share * (1.0 - share) / n) / (0.4 * tl.exp(-0.5 * z * z))
    return tl.where(share < 0.5, z, -z), error + 0.05  # the scores are not normal


@triton.jit
def _moments(b_s):
    """Candidates among ordered scores, the sum of their numbers and of the squares, the least and the greatest."""
    m_s = b_s > LEAST
    b_x = tl.where(m_s, unordered(b_s), 0.0)
    low = tl.min(tl.where(m_s, b_s, MOST), 0)
    return tl.sum(m_s.to(tl.int32), 0), tl.sum(b_x, 0), tl.sum(b_x * b_x, 0), low, tl.max(b_s, 0)


@triton.jit
def _reach(b_s, bound_1, bound_2, bound_3, SMALL: tl.constexpr):
    """How many scores reach each of three ascending bounds above the least of them; few are counted in parts of one sum."""
    b_1, b_2, b_3 = ((b_s >= bound_1).to(tl.int32), (b_s >= bound_2).to(tl.int32), (b_s >= bound_3).to(tl.int32))
    if SMALL:
        count = tl.sum(b_1 | (b_2 << 10) | (b_3 << 20), 0)
        return count & 1023, (count >> 10) & 1023, count >> 20
    else:
        count = tl.sum(b_1 | (b_2 << 16), 0)
        return count & 0xFFFF, count >> 16, tl.sum(b_3, 0)


@triton.jit
def _width(lower, upper):
    """How far two ordered integers are apart."""
    return (upper - lower).to(tl.uint32, bitcast=True)


@triton.jit
def _inside(x, lower, upper):
    """An ordered integer, moved to where it lies strictly between two."""
    return tl.maximum(tl.minimum(x, upper - 1), lower + 1)


@triton.jit
def _step(part, width):
    """A part of a width, strictly within it, as the distance of a bound."""
    x = tl.minimum(tl.maximum(part, 0.0), 4.29e9).to(tl.uint32)
    return tl.maximum(tl.minimum(x, width - 1), 1).to(tl.int32, bitcast=True)


@triton.jit
def _next_bounds(lower, upper, count, over, budget, quarter):
    """The bounds that the next pass counts: around the proportional guess, or quarters."""
    width = _width(lower, upper)
    inverse = 1.0 / (count - over).to(tl.float32)
    share = ((count - budget).to(tl.float32) + 0.5) * inverse
    error = tl.sqrt(tl.maximum(share * (1.0 - share), 0.5 * inverse) * inverse)
    share = (share + 0.5 * inverse) / (1.0 + inverse)  # few scores are left: not quite at an end of them
    error = tl.where(quarter, 0.25, error)
    share = tl.where(quarter, 0.5, share)
    wide = width.to(tl.float32)
    return (
        lower + _step(wide * (share - error), width),
        lower + _step(wide * share, width),
        lower + _step(wide * (share + error), width),
    )


@triton.jit
def find_bound(p_score, b_s, n, budget, z, error, BS: tl.constexpr, WHOLE: tl.constexpr):
    """The bound that the budget reaches, how many scores reach it, and how many of those equal to it are taken.

    b_s: [BS], the first scores; all of them where WHOLE. z, error: of :func:`normal_quantile`, where the search begins.
    No score may be MOST. ``count`` scores reach ``lower``, at least the budget; ``over`` reach ``upper``, fewer.
    """
    SMALL: tl.constexpr = WHOLE and BS <= 1024
    count, summed, square, lower, high = _moments(b_s)
    if not WHOLE:
        for i in range(BS, n, BS):
            more_count, more_summed, more_square, more_low, more_high = _moments(load_scores(p_score, i, n, BS))
            count += more_count
            summed += more_summed
            square += more_square
            lower = tl.minimum(lower, more_low)
            high = tl.maximum(high, more_high)
    mean, std = spread_of(count, summed, square)
    upper = high + 1
    over = tl.minimum(count, 0)
    guess = mean + z * std
    bound_1 = _inside(ordered(guess - error * std), lower, upper)
    bound_2 = _inside(ordered(guess), lower, upper)
    bound_3 = _inside(ordered(guess + error * std), lower, upper)
    quarter = count < 0  # not yet
    while (count > budget) & (_width(lower, upper) > 1):
        over_1, over_2, over_3 = _reach(b_s, bound_1, bound_2, bound_3, SMALL)
        if not WHOLE:
            for i in range(BS, n, BS):
                more_1, more_2, more_3 = _reach(load_scores(p_score, i, n, BS), bound_1, bound_2, bound_3, False)
                over_1 += more_1
                over_2 += more_2
                over_3 += more_3
        left = count - over
        m_1, m_2, m_3 = over_1 >= budget, over_2 >= budget, over_3 >= budget
        upper = tl.where(m_3, upper, tl.where(m_2, bound_3, tl.where(m_1, bound_2, bound_1)))
        over = tl.where(m_3, over, tl.where(m_2, over_3, tl.where(m_1, over_2, over_1)))
        lower = tl.where(m_3, bound_3, tl.where(m_2, bound_2, tl.where(m_1, bound_1, lower)))
        count = tl.where(m_3, over_3, tl.where(m_2, over_2, tl.where(m_1, over_1, count)))
        quarter = (quarter == 0) & (2 * (count - over) > left)
        bound_1, bound_2, bound_3 = _next_bounds(lower, upper, count, over, budget, quarter)
    return lower, count, budget - over
