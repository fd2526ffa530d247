"""What a run did, for people: PREFIX.report.json and, with matplotlib, PREFIX.report.png."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def length_statistics(lengths: np.ndarray) -> dict:
    """Figures of document lengths, int [documents]: extremes, mean, quantiles, and counts by powers of two; none of none."""
    if not len(lengths):
        return {}
    powers = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    return {
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "mean": float(lengths.mean()),
        "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)},
        "by_power_of_two": {str(1 << power): int(n) for power, n in enumerate(counts) if n},
    }


def write_report(prefix: str, summary, lengths: dict[str, np.ndarray], plot: bool) -> list[str]:
    """Write the report of a run beside its output; returns the files.

    Args:
        summary: encode.Summary.
        lengths: prefix -> document lengths, int32 [documents].
        plot: also draw the lengths.
    """
    tokens = sum(info.tokens for info in summary.shards.values())
    content = {
        **asdict(summary.counts),
        "tokens": tokens,
        "seconds": round(summary.seconds, 3),
        "megabytes_per_second": round(summary.megabytes_per_second, 3),
        "backend": summary.backend,
        "resumed_documents": summary.resumed,
        "rejects": summary.rejects,
        "outputs": {
            name: {"documents": info.documents, "tokens": info.tokens, "lengths": length_statistics(lengths[name])}
            for name, info in summary.shards.items()
        },
    }
    path = Path(f"{prefix}.report.json")
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written = [str(path)]
    if plot and any(map(len, lengths.values())):
        written.append(draw_lengths(f"{prefix}.report.png", lengths))
    return written


def draw_lengths(path: str, lengths: dict[str, np.ndarray]) -> str:
    """Draw histograms of document lengths (name -> int [documents]) as a PNG; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no state beside the figure, half the time
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.11, 0.16, 0.86, 0.8))
    lengths = {name: values for name, values in lengths.items() if len(values)}
    longest = max(int(x.max()) for x in lengths.values())
    edges = np.geomspace(1, longest + 1, 60)
    for name, values in lengths.items():
        axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.6, label=f"{Path(name).name}: {len(values):,}")
    axes.set_xscale("log")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
    return path
