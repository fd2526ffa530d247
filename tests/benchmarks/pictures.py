"""The pictures of docs/method.md, drawn from what the code says: who sees whom, and what a token reads that recalls.

    python -m tests.benchmarks.pictures [--output docs]

tests/test_docs.py compares the committed files with what this makes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from unfold.model.gist import GistConfig, Layout, build_layout, build_recall, interleave

EXAMPLE = GistConfig(chunk_sizes=(3, 2), sink=2, n_prev=1)  # the worked example of the page
RECALLING = GistConfig(chunk_sizes=(4, 3), sink=2, n_prev=1, recall="all")
LETTERS = {-1: ".", 0: "g", 1: "G"}
COLOURS = {"sink": "#7b5ea7", "raw": "#4477aa", "g": "#228833", "G": "#d9822b"}
NAMES = {"sink": "sinks", "raw": "raw tokens", "g": "gists of level 0", "G": "gists of level 1, the top"}
UNSEEN, INK, LINE = "#e9ecef", "#212529", "#adb5bd"
ROWS = {16: "a raw token", 18: "a gist of level 0", 19: "a gist of level 1"}  # rows of the mask that the page explains


def layout_of(raw: int, config: GistConfig) -> Layout:
    """One document of so many raw tokens, of which each starts a word."""
    sample = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), config, range(config.levels))
    level, doc = (torch.from_numpy(x)[None] for x in (sample.level, sample.doc))
    return build_layout(level, doc, config)


def kinds_of(level: list[int], sink: int) -> list[str]:
    """What each token is, as a key of COLOURS."""
    raw = np.cumsum([x < 0 for x in level])
    return [LETTERS[x] if x >= 0 else "sink" if n <= sink else "raw" for x, n in zip(level, raw)]


class Picture:
    """An SVG as text."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="13" fill="{INK}" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, **style: str) -> None:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>')

    def text(self, x: float, y: float, text: str, **style: str) -> None:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{more}>{text}</text>')

    def line(self, *points: tuple[float, float], colour: str = LINE) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def mask_picture() -> str:
    """The compressed mask of the worked example."""
    layout = layout_of(17, EXAMPLE)
    level, mask = layout.level[0].tolist(), layout.intervals.dense_mask()[0]
    kinds, cell, left, top = kinds_of(level, EXAMPLE.sink), 19, 40, 52
    size = len(level)
    picture = Picture(left + size * cell + 200, top + size * cell + 14, "Who sees whom while forgetting")
    picture.text(left, 18, "keys, from left to right; queries, from top to bottom")
    for i, value in enumerate(level):
        letter = dict(text_anchor="middle", font_weight="bold", fill=COLOURS[kinds[i]])
        picture.text(left + (i + 0.5) * cell, top - 10, LETTERS[value], **letter)
        picture.text(left - 14, top + (i + 0.75) * cell, LETTERS[value], **letter)
        for j in range(i + 1):
            fill = COLOURS[kinds[j]] if mask[i, j] else UNSEEN
            picture.box(left + j * cell + 1, top + i * cell + 1, cell - 2, cell - 2, fill)
    for i, name in ROWS.items():
        picture.box(left - 1, top + i * cell - 1, (i + 1) * cell + 2, cell + 2, "none", stroke=INK, stroke_width="1.5")
        picture.text(left + size * cell + 10, top + (i + 0.75) * cell, f"{i}: {name}")
        if (i + 1) < size:
            picture.line((left + (i + 1) * cell + 2, top + (i + 0.5) * cell), (left + size * cell + 6, top + (i + 0.5) * cell))
    legend(picture, left + size * cell + 10, top + 12)
    return str(picture)


def legend(picture: Picture, x: float, y: float) -> None:
    for i, (kind, name) in enumerate([*NAMES.items(), ("", "not seen")]):
        picture.box(x, y + 22 * i - 11, 13, 13, COLOURS.get(kind, UNSEEN))
        picture.text(x + 20, y + 22 * i, name)


def recall_picture() -> str:
    """What the last token of a document reads, forgetting and recalling; the best gist of each level is chosen here."""
    layout = layout_of(32, RECALLING)
    level = layout.level[0].tolist()
    last = len(level) - 1
    recalls = torch.zeros_like(layout.level, dtype=torch.bool)
    recalls[0, last] = True
    tree = build_recall(layout, RECALLING, recalls)
    token = layout.intervals.rows[0].tolist()  # of each row
    children = lambda row: set(range(tree.child_lo[0, row], tree.child_hi[0, row]))
    ranges = [set(range(lo, hi)) for lo, hi in zip(tree.lo[:, 0].tolist(), tree.hi[:, 0].tolist())]
    best_top, best_below = 0, 3  # rows: the first top gist, the second gist below it
    candidates = ranges[0] | children(best_top) | {row for row in ranges[1] if row >= tree.tail[1, 0]}
    assert best_top in ranges[0] and best_below in candidates
    read = {best_top, best_below} | children(best_below) | ranges[2] | ranges[3]
    forgetting = set(layout.intervals.dense_mask()[0, last].nonzero()[:, 0].tolist())

    panel = 190
    picture = Picture(840, 2 * panel + 40, "What the last token reads, forgetting and recalling")
    draw_tree(picture, level, 24, "The last token forgets", forgetting, set())
    read, candidates = ({token[row] for row in rows} for rows in (read, candidates))
    draw_tree(picture, level, 24 + panel, "The last token recalls", read, candidates)
    names = (*NAMES.items(), ("", "not read"), ("scored", "scored"))
    for (kind, name), x in zip(names, (20, 100, 210, 365, 575, 670)):
        outline = dict(stroke=INK, stroke_width="2") if kind == "scored" else {}
        picture.box(x, 2 * panel + 14, 13, 13, COLOURS.get(kind, UNSEEN), **outline)
        picture.text(x + 19, 2 * panel + 25, name)
    return str(picture)


def draw_tree(picture: Picture, level: list[int], top: float, title: str, read: set[int], candidates: set[int]) -> None:
    """Tokens in three rows, the gists above what they closed."""
    kinds, cell, left = kinds_of(level, RECALLING.sink), 22, 110
    y = {1: top + 22, 0: top + 74, -1: top + 126}
    picture.text(20, top, title, font_weight="bold")
    for value, name in ((1, "level 1"), (0, "level 0"), (-1, "raw")):
        picture.text(20, y[value] + 15, name)
    place, opened, raw = {}, {0: [], 1: []}, 0
    for i, value in enumerate(level):
        if value < 0:
            x = left + raw * cell
            raw += 1
        else:
            behind = opened[value]
            x = (place[behind[0]] + place[behind[-1]]) / 2
            edge = y[value - 1] - 4
            ends = place[behind[0]] + 2, place[behind[-1]] + cell - 4
            picture.line((ends[0], edge), (ends[0], edge - 6), (ends[1], edge - 6), (ends[1], edge))
            picture.line((x + cell / 2 - 1, edge - 6), (x + cell / 2 - 1, y[value] + 20))
            opened[value] = []
        place[i] = x
        opened.setdefault(value + 1, []).append(i)
        outline = dict(stroke=INK, stroke_width="2") if i in candidates else {}
        picture.box(x, y[value], cell - 3, 20, COLOURS[kinds[i]] if i in read else UNSEEN, rx="3", **outline)
    picture.text(place[len(level) - 1] + cell / 2 - 2, y[-1] + 15, "q", text_anchor="middle", fill="#ffffff", font_weight="bold")


PICTURES = {"method-mask.svg": mask_picture, "method-recall.svg": recall_picture}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pictures", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent.parent / "docs")
    output = parser.parse_args().output
    for name, draw in PICTURES.items():
        (output / name).write_text(draw())


if __name__ == "__main__":
    main()
