"""The search for the bound that exactly a budget of scores reaches: the part that selection and decoding share.

A row's scores are compared as ordered 32-bit integers. The search keeps ``from`` and ``to``: ``count`` scores reach ``from``, at
least the budget; ``over`` reach ``to``, fewer than the budget. Where the bound lies is guessed, first from the row's mean and
spread as if its scores were normal, then in proportion to the scores between ``from`` and ``to``. A guess may be wrong, and
costs a pass then; the result is exact whatever was guessed. Guesses that do not halve what is left are followed by a step
that quarters the range of integers, so that scores of any distribution take a bounded number of passes.
"""

import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-2147483648)
MOST: tl.constexpr = tl.constexpr(2147483647)
HIGHEST: tl.constexpr = tl.constexpr(0x7F800000)  # of infinity
LOWEST: tl.constexpr = tl.constexpr(-0x7F800001)
FAR: tl.constexpr = tl.constexpr(8.0)  # standard deviations from the mean beyond which nothing is guessed


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
def moments(b_s):
    """Per row: candidates among ordered scores, their sum, the sum of their squares."""
    m_s = b_s > LEAST
    b_x = tl.where(m_s, unordered(b_s), 0.0)
    return tl.sum(m_s.to(tl.int32), 1), tl.sum(b_x, 1), tl.sum(b_x * b_x, 1)


@triton.jit
def spread_of(b_n, b_sum, b_square):
    """Mean and standard deviation of n numbers from their sum and the sum of their squares."""
    b_n = tl.maximum(b_n, 1).to(tl.float32)
    b_mean = b_sum / b_n
    return b_mean, tl.sqrt(tl.maximum(b_square / b_n - b_mean * b_mean, 0.0))


@triton.jit
def normal_bound(b_n, b_budget, b_mean, b_std):
    """Where the budget's share of n normal numbers lies above, and the standard error of that, for 0 < budget < n."""
    b_n = tl.maximum(b_n, 2).to(tl.float32)
    b_share = tl.minimum(tl.maximum(b_budget.to(tl.float32), 0.5) / b_n, 1.0 - 0.5 / b_n)
    b_t = tl.sqrt(-2.0 * tl.log(tl.minimum(b_share, 1.0 - b_share)))
    # Abramowitz and Stegun 26.2.22.
    b_z = b_t - (2.30753 + 0.27061 * b_t) / (1.0 + 0.99229 * b_t + 0.04481 * b_t * b_t)
    b_density = 0.4 * tl.exp(-0.5 * b_z * b_z)
    b_error = tl.sqrt(b_share * (1.0 - b_share) / b_n) / b_density
    return b_mean + tl.where(b_share < 0.5, b_z, -b_z) * b_std, b_error * b_std


@triton.jit
def between(b_x, b_from, b_to):
    """Ordered int32 of a number, moved to where it lies strictly between from and to."""
    return tl.maximum(tl.minimum(ordered(b_x).to(tl.int64), b_to - 1), b_from + 1).to(tl.int32)


@triton.jit
def proportional_bound(b_from, b_to, b_count, b_over, b_budget, b_mean, b_std):
    """Where the bound lies between from and to if the scores there are evenly spread, and the standard error of that."""
    b_low = tl.maximum(unordered(tl.maximum(b_from, LOWEST).to(tl.int32)), b_mean - FAR * b_std)
    b_high = tl.minimum(unordered(tl.minimum(b_to, HIGHEST).to(tl.int32)), b_mean + FAR * b_std)
    b_left = tl.maximum(b_count - b_over, 1).to(tl.float32)
    b_share = (b_count - b_budget + 0.5) / b_left
    b_error = tl.sqrt(tl.maximum(b_share * (1.0 - b_share), 0.5 / b_left) / b_left)
    return b_low + (b_high - b_low) * b_share, (b_high - b_low) * b_error


@triton.jit
def quarters(b_from, b_to, b_more):
    """Three bounds that quarter from .. to, where there is more to do."""
    b_width = tl.where(b_more, b_to - b_from, 0)
    b_third = b_from + b_width // 4 * 3 + b_width % 4 * 3 // 4
    return (b_from + b_width // 4).to(tl.int32), (b_from + b_width // 2).to(tl.int32), b_third.to(tl.int32)


@triton.jit
def three_bounds(b_from, b_to, b_count, b_over, b_budget, b_more, b_mean, b_std, FIRST: tl.constexpr, m_quarter):
    """The bounds that the next pass counts: around the guess, or quarters."""
    if FIRST:
        b_guess, b_error = normal_bound(b_count, b_budget, b_mean, b_std)
        b_error += 0.05 * b_std  # the scores are not normal
    else:
        b_guess, b_error = proportional_bound(b_from, b_to, b_count, b_over, b_budget, b_mean, b_std)
    b_1, b_2, b_3 = quarters(b_from, b_to, b_more)
    b_1 = tl.where(m_quarter, b_1, between(b_guess - b_error, b_from, b_to))
    b_2 = tl.where(m_quarter, b_2, between(b_guess, b_from, b_to))
    b_3 = tl.where(m_quarter, b_3, between(b_guess + b_error, b_from, b_to))
    return b_1, b_2, b_3


@triton.jit
def narrow(b_from, b_to, b_count, b_over, b_more, b_1, b_2, b_3, b_over_1, b_over_2, b_over_3, b_budget):
    """One step of the search, where ``more`` holds: the part of from .. to in which the budget is reached.

    ``over_1`` .. ``over_3`` scores are >= the three ascending bounds between. Done where exactly the budget is >= from, or
    from is the only score left.
    """
    m_1, m_2, m_3 = b_over_1 >= b_budget, b_over_2 >= b_budget, b_over_3 >= b_budget
    b_next = tl.where(m_3, b_to, tl.where(m_2, b_3, tl.where(m_1, b_2, b_1)).to(tl.int64))
    b_next_over = tl.where(m_3, b_over, tl.where(m_2, b_over_3, tl.where(m_1, b_over_2, b_over_1)))
    b_from = tl.where(b_more & m_1, tl.where(m_3, b_3, tl.where(m_2, b_2, b_1)).to(tl.int64), b_from)
    b_count = tl.where(b_more & m_1, tl.where(m_3, b_over_3, tl.where(m_2, b_over_2, b_over_1)), b_count)
    b_to = tl.where(b_more, b_next, b_to)
    b_over = tl.where(b_more, b_next_over, b_over)
    return b_from, b_to, b_count, b_over, (b_count > b_budget) & (b_to - b_from > 1)
