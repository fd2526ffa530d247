"""Table and plot of the experiment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tests.benchmarks.quotes.training import Plan, Reading
from tests.benchmarks.quotes.ways import DENSE, ways_of


@dataclass(frozen=True)
class Outcome:
    """What one way reached.

    Attributes:
        chunk_sizes: of the ways that it is compared with; a dense model has none itself.
        steps: that it was trained for.
        seconds: of processor time, for training and measuring.
        read: by way of reading (dense, forget, recall, everything), see :func:`tests.benchmarks.quotes.training.readings`.
        far_coverage: of level 0, on text that quotes; None for a dense model.
    """

    seed: int
    way: str
    chunk_sizes: tuple[int, ...]
    steps: int
    seconds: float
    read: dict[str, Reading]
    far_coverage: float | None

    @property
    def own(self) -> Reading:
        """As it was trained to read at the end."""
        if self.way == DENSE or self.way.startswith("dense-"):
            return self.read["dense"]
        return self.read[self.way if self.way in ("forget", "everything") else "recall"]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: dict) -> Outcome:
        read = {name: Reading(**reading) for name, reading in entry["read"].items()}
        return cls(**{**entry, "read": read})


def write_report(directory: Path, outcomes: list[Outcome], plan: Plan) -> Iterator[str]:
    """Write results.json, table.md and quotes.png into directory; yields the table's lines."""
    lines = table(outcomes)
    (directory / "table.md").write_text("\n".join(lines) + "\n")
    (directory / "results.json").write_text(json.dumps([o.to_dict() for o in outcomes], indent=1) + "\n")
    plot(directory / "quotes.png", outcomes, plan)
    yield from lines


def table(outcomes: list[Outcome]) -> list[str]:
    """Markdown: a line per chunk sizes and way, means over seeds."""
    lines = [
        "| chunk sizes | way | steps | nats per quoted token | per plain token | far coverage | unfolded "
        "| quoted, everything unfolded | quoted, dense attention | seeds |",
        "|" + "---|" * 10,
    ]
    for sizes in sorted({o.chunk_sizes for o in outcomes}):
        for name, way in ways_of(sizes).items():
            same = [o for o in outcomes if o.chunk_sizes == sizes and o.way == name]
            if not same:
                continue
            own = [o.own for o in same]
            covered = [o.far_coverage for o in same if o.far_coverage is not None]
            cells = [
                ", ".join(map(str, sizes)),
                way.label,
                str(same[0].steps),
                *(spread([getattr(r, field) for r in own], 3) for field in ("quote", "plain")),
                spread(covered, 2) if covered else "-",
                f"{mean(r.unfolded for r in own):.0f}" if any(r.unfolded for r in own) else "-",
                *(spread([o.read[reading].quote for o in same], 2) for reading in ("everything", "dense")),
                str(len(same)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: list[float], digits: int) -> str:
    """The mean, and of several seeds the lowest and the highest."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def plot(path: Path, outcomes: list[Outcome], plan: Plan) -> None:
    """Nats per quoted token by way, a panel per chunk sizes: as read at the end, and with everything unfolded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({o.chunk_sizes for o in outcomes})
    most = max(len({o.way for o in outcomes if o.chunk_sizes == sizes}) for sizes in panels)
    size = (8.5, len(panels) * (1.3 + 0.34 * most))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for sizes, axis in zip(panels, axes[:, 0]):
        same = [o for o in outcomes if o.chunk_sizes == sizes]
        names = [name for name in ways_of(sizes) if any(o.way == name for o in same)][::-1]
        labels = [ways_of(sizes)[name].label for name in names]
        own, unfolded = ([mean(values[name]) for name in names] for values in (_quoted(same, True), _quoted(same, False)))
        axis.barh(labels, own, color="#1b7837", height=0.6, label="as trained to read")
        axis.plot(unfolded, labels, "D", color="#d6604d", markersize=4, label="with everything unfolded")
        for o in same:
            if o.way == DENSE:
                axis.axvline(o.own.quote, color="#444444", linestyle="--", linewidth=1)
        axis.set_title(f"gists of {', '.join(map(str, sizes))}", fontsize=10)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.25)
    axes[-1, 0].set_xlabel("nats per quoted token")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(f"quotes of {plan.whole.span} tokens in {plan.whole.raw_tokens}; dashed: dense attention", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _quoted(outcomes: list[Outcome], own: bool) -> dict[str, list[float]]:
    """Way -> nats per quoted token of every seed, as trained to read or with everything unfolded."""
    found: dict[str, list[float]] = {}
    for o in outcomes:
        found.setdefault(o.way, []).append((o.own if own else o.read["everything"]).quote)
    return found
