"""Table and plot of the experiment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import mean

from tests.benchmarks.recall_claim.arms import DENSE, WAYS
from tests.benchmarks.recall_claim.training import Outcome, Plan

NAMES = {DENSE: "dense attention"} | {name: way.label for name, way in WAYS.items()}
# Those that are drawn, by colours that the colour-blind tell apart.
COLOURS = {
    DENSE: "#444444",
    "taught": "#1b7837",
    "mixed": "#7fbf7b",
    "recall": "#762a83",
    "gists": "#2166ac",
    "random": "#d6604d",
    "recent": "#b2abd2",
}


def write_report(directory: Path, outcomes: list[Outcome], plan: Plan) -> Iterator[str]:
    """Write results.json, table.md and recall-claim.png into directory; yields the table's lines."""
    lines = table(outcomes)
    (directory / "table.md").write_text("\n".join(lines) + "\n")
    (directory / "results.json").write_text(json.dumps([o.to_dict() for o in outcomes], indent=1) + "\n")
    plot(directory / "recall-claim.png", outcomes, plan)
    yield from lines


def table(outcomes: list[Outcome]) -> list[str]:
    """Markdown: per structure and arm the mean accuracy over seeds, with the lowest and highest seed."""
    lines = [
        "| ratio | chunk sizes | arm | one hop | two hops | one hop, gists alone | raw tokens unfolded | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sizes in sorted({o.chunk_sizes for o in outcomes}, key=lambda s: (prod(s), len(s))):
        for arm in NAMES:
            same = [o for o in outcomes if o.chunk_sizes == sizes and o.arm == arm]
            if same:
                unfolded = f"{mean(o.unfolded for o in same):.0f}" if any(o.unfolded for o in same) else "-"
                chunks = ", ".join(map(str, sizes)) or "-"
                figures = [_spread(same, name) for name in ("one_hop", "two_hop", "alone")]
                cells = [str(prod(sizes)), chunks, NAMES[arm], *figures, unfolded]
                lines.append(f"| {' | '.join(cells)} | {len(same)} |")
    return lines


def _spread(outcomes: list[Outcome], field: str) -> str:
    values = [getattr(o, field) for o in outcomes]
    return f"{mean(values):.2f} ({min(values):.2f} - {max(values):.2f})"


LEVELS = {"flat": "one level", "hierarchical": "two levels"}


def plot(path: Path, outcomes: list[Outcome], plan: Plan) -> None:
    """Accuracy over the compression ratio: one panel each for one and two hops, one and two levels of gists."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [k for k in ("flat", "hierarchical") if any(_kind(o) == k for o in outcomes)] or ["flat"]
    size = (1.5 + 4 * len(kinds), 6.4)
    figure, axes = pyplot.subplots(2, len(kinds), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False)
    ratios = sorted({prod(o.chunk_sizes) for o in outcomes if o.chunk_sizes})
    for row, (field, hops) in enumerate((("one_hop", "one hop"), ("two_hop", "two hops"))):
        for column, kind in enumerate(kinds):
            axis = axes[row][column]
            _dense_line(axis, [o for o in outcomes if o.arm == DENSE], field, ratios)
            for arm in list(COLOURS)[1:]:
                _arm_line(axis, [o for o in outcomes if o.arm == arm and _kind(o) == kind], field, arm)
            axis.set_title(f"{hops}, {LEVELS[kind]} of gists", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_xticks(ratios, [f"{r}x" for r in ratios])
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.25)
    for axis in axes[1]:
        axis.set_xlabel("compression ratio")
    for axis in axes[:, 0]:
        axis.set_ylabel("questions answered rightly")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    holds = f"{plan.task.facts} facts and {plan.task.links} links in {plan.context} tokens"
    figure.suptitle(f"{holds}; mean, lowest and highest seed", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _kind(outcome: Outcome) -> str:
    """Which panel an outcome belongs to; the dense arm to none."""
    return ("dense", "flat", "hierarchical")[min(len(outcome.chunk_sizes), 2)]


def _dense_line(axis, same: list[Outcome], field: str, ratios: list[int]) -> None:
    if same and ratios:
        value = mean(getattr(o, field) for o in same)
        axis.plot(ratios, [value] * len(ratios), "--", color=COLOURS[DENSE], label=NAMES[DENSE])


def _arm_line(axis, same: list[Outcome], field: str, arm: str) -> None:
    same = [o for o in same if len(o.chunk_sizes) < 3]  # of a ratio one structure a panel
    ratios = sorted({prod(o.chunk_sizes) for o in same})
    groups = [[getattr(o, field) for o in same if prod(o.chunk_sizes) == ratio] for ratio in ratios]
    if groups:
        axis.plot(ratios, [mean(g) for g in groups], "-o", color=COLOURS[arm], label=NAMES[arm], markersize=4)
        axis.fill_between(ratios, [min(g) for g in groups], [max(g) for g in groups], color=COLOURS[arm], alpha=0.15)
