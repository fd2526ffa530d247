"""``python -m pretrain report``: one self-contained HTML page on a run, or on several to compare."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from unfold.pretrain.errors import UserError
from unfold.pretrain.report.page import charts_section, checkpoints_section, configuration_section, headline, sample_section, text
from unfold.pretrain.report.runs import Run, read_runs
from unfold.pretrain.report.sample import read_sample, script_data
from unfold.pretrain.report.style import SCRIPT, STYLE

REPORT = "report.html"
MOST_SAMPLES = 4  # pictures of layouts; runs with the same gist settings share one


def write_report(run_dirs: list[Path]) -> Path:
    """Write ``report.html`` into the first run directory, for one run or for several compared.

    Returns:
        The path of the page. It needs no network and no other file.

    Raises:
        UserError: no directory given, one is not a run directory, has no metrics yet or a damaged configuration, or the
            page cannot be written.
    """
    runs = read_runs([Path(path) for path in run_dirs])
    path = runs[0].directory / REPORT
    page = _page(runs)
    temporary = path.with_name(f".{REPORT}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)  # a reader never sees half a page
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _page(runs: list[Run]) -> str:
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else f"Run {runs[0].name}"
    samples = _samples(runs)
    curves, curve_data = charts_section(runs)
    pictures = "".join(
        sample_section(sample, those[0].config, [run.name for run in those] if several else None) for sample, those in samples
    )
    left_out = _gist_settings_count(runs) - len(samples)
    more = f'<p class="muted">{left_out} more gist settings are not pictured.</p>' if left_out else ""
    data = json.dumps({"curves": curve_data, "samples": [script_data(sample) for sample, _ in samples]}, separators=(",", ":"))
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)} – unfold</title><style>{STYLE}</style></head><body><main>",
            f'<header><h1>{text(title)}</h1><p class="muted">unfold pretraining report, written {written}</p></header>',
            _warnings(runs),
            headline(runs),
            curves,
            f'<h2 id="sample">Gists and forgetting</h2>{pictures}{more}',
            checkpoints_section(runs),
            configuration_section(runs),
            # A "<" in the data must not be read as markup.
            f'</main><script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>',
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def _warnings(runs: list[Run]) -> str:
    found = []
    for run in runs:
        if run.damaged_lines:
            found.append(f"{run.name}: {run.damaged_lines} damaged lines of metrics.jsonl were left out.")
        missing = len(run.metrics["loss"]) - len(run.finite("loss")) if "loss" in run.metrics else len(run.metrics["step"])
        if missing:
            found.append(f"{run.name}: {missing} steps have no finite loss.")
    return "".join(f'<p class="card warning">{text(line)}</p>' for line in found)


def _gist_settings(run: Run) -> tuple:
    gist = run.config.gist
    if run.config.model.attention != "gist":
        return ()
    return gist.chunk_sizes, gist.word_aware, gist.sink, gist.n_prev, gist.own_group, gist.recall


def _gist_settings_count(runs: list[Run]) -> int:
    return len({_gist_settings(run) for run in runs})


def _samples(runs: list[Run]) -> list:
    """(sample, runs that it stands for), one per kind of gist settings."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(_gist_settings(run), []).append(run)
    return [(read_sample(those[0].config), those) for those in list(groups.values())[:MOST_SAMPLES]]
