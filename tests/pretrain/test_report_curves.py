"""Curves of the report page: smoothing, decimation, numbers and ticks."""

import numpy as np
import pytest

from unfold.pretrain.report.curves import Scale, make_curve, number, smooth, ticks


def test_smoothing_is_a_centred_mean():
    smoothed = smooth(values := np.random.default_rng(0).normal(size=50), 5)
    assert smoothed[0] == values[0] and smoothed[1] == pytest.approx(values[:3].mean())
    assert smoothed[20] == pytest.approx(values[18:23].mean()) and smoothed[-1] == pytest.approx(values[-3:].mean())
    assert smooth(np.append(1e30, np.ones(40)), 3)[10:] == pytest.approx(np.ones(31))


def test_decimation_keeps_means_and_extremes():
    step, values = np.arange(1.0, 1001), np.random.default_rng(0).normal(size=1000)
    curve = make_curve("x", "c0", {"step": step}, values, 40, smoothed=False)
    assert curve.y == pytest.approx(values.reshape(40, 25).mean(1))
    assert (curve.low.min(), curve.high.max()) == (values.min(), values.max())
    assert make_curve("x", "c0", {"step": step}, np.full(1000, np.nan), 40, False) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (3.14159, "3.142"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (9999, "9999"), (12_345, "12.35 k"), (655_360, "655.4 k"),
     (999_999, "1 M"), (1_234_567, "1.235 M"), (7e9, "7 G"), (0.003, "0.003"), (-2.5, "-2.5")],
)  # fmt: skip
def test_numbers_read_well(value, shown):
    assert number(value) == shown


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert all(0.37 <= t <= 1.93 for t in ticks(0.37, 1.93)) and 3 <= len(ticks(0.37, 1.93)) <= 9
    assert Scale(1e-3, 1e3, True).ticks() == [0.001, 0.01, 0.1, 1, 10, 100, 1000]
