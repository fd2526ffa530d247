"""What an evaluation leaves: tables for people, JSON for programs, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from unfold.pretrain.errors import UserError

# Colours that the colour-blind tell apart, as in the report of a run; modes of one ratio differ by line style.
COLOURS = ("#0072b2", "#d55e00", "#00855f", "#a3478f", "#8a6a00", "#3a78d8")
STYLES = {"dense": "-", "forget": "--", "recall": "-"}


def make_output(directory: Path) -> None:
    """Make the directory of results before anything is computed for it. Raises UserError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory}: cannot be made ({error})") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output {directory}: cannot be written to; name another directory")


class Written:
    """Around the writing of results: what was measured is printed before it is told that a file could not be written."""

    def __init__(self, directory: Path):
        self.directory, self.error = directory, None

    def __enter__(self) -> Written:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, OSError) else None
        return self.error is not None

    def files(self, *names: str) -> str:
        """The last line to print: what was written. Raises UserError where it could not be."""
        if self.error is not None:
            raise UserError(f"--output {self.directory}: cannot be written ({self.error}); what was measured is printed above")
        return f"{self.directory}/{', '.join(names)}"


def write_json(path: Path, content: dict) -> None:
    """Readable JSON with a line feed at its end."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table in Markdown whose columns are aligned; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    align = lambda row: [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
    yield f"| {' | '.join(align(head))} |"
    yield f"|{'|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths))}|"
    for row in rows:
        yield f"| {' | '.join(align(row))} |"


def cost_table(results: Sequence[dict]) -> Iterator[str]:
    """Lines of a table of what each variant cost; results have ``cost`` entries of :class:`unfold.model.decode.cost.Recorder`."""
    from unfold.model.decode.cost import COST_TITLES, describe_cost

    yield from table(["cost", *COST_TITLES], [[result["name"], *describe_cost(result["cost"])] for result in results])


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """(figure, axes [rows][columns]) that no window belongs to; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def line_chart(
    path: Path, lines: dict[str, tuple[Sequence[float], Sequence[float]]], styles: Sequence[str], labels: Sequence[str]
) -> None:
    """A PNG with a line per name.

    Args:
        lines: name -> (x, y).
        styles: of each line, one of STYLES.
        labels: of the chart, the x axis and the y axis.
    """
    figure, ((axes,),) = new_figure(8, 4.5)
    for i, ((name, (x, y)), style) in enumerate(zip(lines.items(), styles)):
        axes.plot(x, y, STYLES[style], color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, label=name)
    axes.set(title=labels[0], xlabel=labels[1], ylabel=labels[2])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def bar_chart(path: Path, groups: Sequence[str], bars: dict[str, Sequence[float]], labels: Sequence[str]) -> None:
    """A PNG with a group of bars per entry of ``groups``, and in each a bar per name of ``bars``."""
    figure, ((axes,),) = new_figure(max(6.0, 1.5 + 0.35 * len(groups) * (len(bars) + 1)), 4.5)
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        places = [group - 0.4 + (i + 0.5) * width for group in range(len(groups))]
        drawn = axes.bar(places, values, width, color=COLOURS[i % len(COLOURS)], label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set(title=labels[0], ylabel=labels[1], ylim=(0, 105))
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=120)


def heat_maps(
    path: Path, maps: Sequence[tuple[str, Sequence[Sequence[float]]]], x: Sequence, y: Sequence, labels: Sequence[str]
) -> None:
    """A PNG with one map of shares between 0 and 1 beside the other.

    Args:
        maps: (title, [len(y)][len(x)] values).
        x, y: what columns and rows stand for.
        labels: of the x axis and the y axis.
    """
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    size = (1.2 + columns * (1.2 + 0.6 * len(x)), 0.6 + rows * (1.2 + 0.4 * len(y)))
    figure, grid = new_figure(*size, rows, columns)
    cells = [axes for row in grid for axes in row]
    for axes, (title, values) in zip(cells, maps):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(x)), x, fontsize=8)
        axes.set_yticks(range(len(y)), y, fontsize=8)
        axes.set_xlabel(labels[0], fontsize=8)
        axes.set_ylabel(labels[1], fontsize=8)
        for j, row in enumerate(values):
            for i, value in enumerate(row):
                axes.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    for axes in cells[len(maps) :]:
        axes.remove()
    figure.colorbar(image, ax=cells[: len(maps)])
    figure.savefig(path, dpi=120)
