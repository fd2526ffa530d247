"""Curves of the report: decimation that hides nothing, and inline SVG.

A curve of any length becomes at most a few hundred buckets of steps. The line is the mean of a bucket, the band behind it
runs from its smallest to its largest value, so no spike is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 78, 14, 10, 40  # margins of the plot inside a chart, in pixels


@dataclass(frozen=True)
class Curve:
    """A decimated curve.

    Attributes:
        name: of the run or of what is drawn, for the legend.
        style: CSS class of its colour and dashes.
        x: {axis: float [n]} mean of each bucket on each axis, for 'step', 'tokens' and, if known, 'hours'.
        end: {axis: the newest value's place}.
        y, low, high: float [n] mean (of the smoothed values, where smoothed), smallest and largest value.
        first, last: int [n] the steps of a bucket.
        points: draw a marker at every value (few values, such as validations).
    """

    name: str
    style: str
    x: dict[str, np.ndarray]
    end: dict[str, float]
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: np.ndarray
    last: np.ndarray
    points: bool


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        title, unit: unit is what stands at the y axis.
        curves: at least one.
        wide: takes the whole width of the page.
        from_zero: the y axis starts at 0.
        references: (y, label) of horizontal lines.
    """

    title: str
    unit: str
    curves: list[Curve]
    wide: bool = False
    from_zero: bool = False
    references: tuple[tuple[float, str], ...] = ()


def smoothing_window(count: int) -> int:
    """Values over which a curve of ``count`` values is averaged: 4 % of them, at most 501, always odd."""
    return min(max(count // 50, 1), 250) * 2 + 1 if count >= 25 else 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` (odd) values. It shrinks evenly towards the start, where a curve falls fastest, so that
    it lags nowhere; at the end it is cut off."""
    if window == 1:
        return values
    # Not by a running sum: after one huge value that would keep no digits of the others.
    box = np.ones(window)
    mean = np.convolve(values, box, "same") / np.convolve(np.ones(len(values)), box, "same")
    for i in range(window // 2):
        mean[i] = values[: 2 * i + 1].mean()
    return mean


def make_curve(name: str, style: str, x: dict[str, np.ndarray], values: np.ndarray, buckets: int, smoothed: bool) -> Curve | None:
    """Decimate the finite values of a metric; None when there is none.

    x: {axis: [N]}, with 'step'; values: [N], NaN where there is none. Smoothing is left out for sparse values.
    """
    there = np.isfinite(values)
    count = int(there.sum())
    if not count:
        return None
    x, values_there = {axis: v[there] for axis, v in x.items()}, values[there]
    points = count <= 60 and count < max(0.5 * len(values), 3)
    line = smooth(values_there, smoothing_window(count)) if smoothed and not points else values_there
    size = -(-count // buckets)
    starts = np.arange(0, count, size)
    lengths = np.diff(np.append(starts, count))
    mean = lambda v: np.add.reduceat(v, starts) / lengths
    return Curve(
        name,
        style,
        {axis: mean(v) for axis, v in x.items()},
        {axis: float(v[-1]) for axis, v in x.items()},
        mean(line),
        np.minimum.reduceat(values_there, starts),
        np.maximum.reduceat(values_there, starts),
        x["step"][starts].astype(int),
        x["step"][starts + lengths - 1].astype(int),
        points,
    )


def number(value: float, digits: int = 4) -> str:
    """A figure as people write it: 3.142, 12.3 k, 4.50 M, 3e-4."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    for limit, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit * (1 - 0.5 * 10.0**-digits):  # what rounds up to the limit is written in its unit
            return f"{value / divisor:.{digits}g} {unit}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.{digits}g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within ``[low, high]``."""
    span = high - low
    rough = span / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(m * power - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """A value axis: linear, or logarithmic where values span more than a factor of 50."""

    low: float
    high: float
    logarithmic: bool

    def at(self, values) -> np.ndarray:
        """Part of the axis, 0 .. 1."""
        if self.logarithmic:
            return (np.log10(values) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (np.asarray(values, dtype=float) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 2 else (1, 2, 5)
        found = [f * 10.0**d for d in decades for f in factors]
        return [v for v in found if self.low <= v <= self.high]


def value_scale(chart: Chart) -> Scale:
    """The y axis that shows all of a chart's values."""
    low = min(float(min(c.low.min(), c.y.min())) for c in chart.curves)
    high = max(float(max(c.high.max(), c.y.max())) for c in chart.curves)
    for y, _ in chart.references:
        low, high = min(low, y), max(high, y)
    if chart.from_zero and low >= 0:
        return Scale(0.0, high * 1.06 or 1.0, False)
    if low > 0 and high / low > 50:
        return Scale(low / 1.15, high * 1.15, True)
    span = high - low
    pad = span * 0.05 if span > 1e-6 * abs(high) else abs(high) * 0.05 or 1.0  # a constant is no staircase of rounding errors
    return Scale(low - pad, high + pad, False)


AXES = {"step": "step", "tokens": "raw tokens", "hours": "training time (h)"}


def draw(chart: Chart, axis: str, first_id: int) -> str:
    """A chart on one x axis as inline SVG. Curve i is marked ``data-curve = first_id + i`` for the script."""
    width, height = (1140, 380) if chart.wide else (560, 270)
    scale = value_scale(chart)
    x_low = 0.0
    x_high = max(c.end[axis] for c in chart.curves) or 1.0
    right, bottom = width - RIGHT, height - BOTTOM
    px = lambda v: LEFT + (np.asarray(v) - x_low) / (x_high - x_low) * (right - LEFT)
    py = lambda v: bottom - scale.at(v) * (bottom - TOP)
    parts = [_axes(scale, x_low, x_high, axis, chart.unit, width, height, px, py)]
    for y, label in chart.references:
        at = float(py(y))
        above = at - 6 if at > TOP + 20 else at + 15
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="reference-label" x="{right - 4}" y="{above:.1f}" text-anchor="end">{escape(label)}</text>')
    # All bands first: a band must not hide another curve's line.
    for curve in chart.curves:
        parts.append(_band(curve, px(curve.x[axis]), py(curve.low), py(curve.high)))
    for i, curve in enumerate(chart.curves):
        x, y = px(curve.x[axis]), py(curve.y)
        parts.append(f'<path class="line {curve.style}" data-curve="{first_id + i}" d="{_path(x, y)}"/>')
        if curve.points or len(x) == 1:
            marks = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in zip(x, y))
            parts.append(f'<g class="marks {curve.style}">{marks}</g>')
    unit = f" ({chart.unit})" if chart.unit else ""
    label = escape(f"{chart.title}{unit} over {AXES[axis]}: {_summary(chart)}", quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" data-axis="{axis}">{"".join(parts)}</svg>'


def _axes(scale: Scale, x_low: float, x_high: float, axis: str, unit: str, width: int, height: int, px, py) -> str:
    right, bottom = width - RIGHT, height - BOTTOM
    parts = []
    for value in scale.ticks():
        y = float(py(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x_low, x_high, width // 130):
        x = float(px(value))
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        anchor = "end" if x > right - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="axis-label" x="{middle:.0f}" y="{height - 5}" text-anchor="middle">{AXES[axis]}</text>')
    y_label = escape(", ".join(t for t in (unit, "log scale" if scale.logarithmic else "") if t))
    centre = (TOP + bottom) / 2
    parts.append(
        f'<text class="axis-label" transform="translate(13 {centre:.0f}) rotate(-90)" text-anchor="middle">{y_label}</text>'
    )
    return "".join(parts)


def _band(curve: Curve, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """The unsmoothed values: a faint line while every step has its own point, else the range of each bucket."""
    if curve.points:
        return ""
    if (curve.first == curve.last).all():
        return f'<path class="trace {curve.style}" d="{_path(x, low)}"/>'
    outline = _path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))
    return f'<path class="band {curve.style}" d="{outline}Z"/>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _summary(chart: Chart) -> str:
    return "; ".join(f"{c.name} from {number(float(c.y[0]))} to {number(float(c.y[-1]))}" for c in chart.curves)


def hover_data(curve: Curve) -> dict:
    """What the script shows of a curve, index for index the points of its line."""
    four = lambda values: [float(f"{v:.5g}") for v in values]
    data = {"name": curve.name, "style": curve.style, "first": curve.first.tolist(), "y": four(curve.y)}
    data["tokens"] = four(curve.x["tokens"]) if "tokens" in curve.x else []
    if not curve.points:
        data |= {"low": four(curve.low), "high": four(curve.high)}
    if (curve.first != curve.last).any():
        data["last"] = curve.last.tolist()
    return data
