"""The measured figures as Markdown tables: python -m tests.benchmarks.gpu.tables [DIR]

DIR (docs/benchmarks/gpu) holds what tests.benchmarks.gpu wrote on one card: CARD_kernel_times.json, CARD_decode_times.json and
CARD_train.json. Times of a step are sums of its kernels' own times, medians are taken by the programs that measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FORWARD = ("forward_kernel", "vectorized_gather", "flash_fwd", "fprop")


def row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def passes(kernels: dict[str, list[float]]) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward pass."""
    forward = sum(ms for name, (ms, _) in kernels.items() if any(word in name for word in FORWARD))
    return forward, sum(ms for ms, _ in kernels.values()) - forward


def attention(times: dict) -> list[str]:
    lines = [row("raw tokens", "", "forward, ms", "backward, ms", "x flash (SDPA)", "x cuDNN"), "|---|---|---|---|---|---|"]
    for raw in (8192, 32768, 131072):
        found = {n: passes(times[f"{n} {raw}"]["kernels"]) for n in ("compressed", "dense SDPA", "dense cuDNN")}
        for name, own in found.items():
            others = [found[dense] for dense in ("dense SDPA", "dense cuDNN") if name == "compressed"]
            ratios = [f"{forward / own[0]:.1f} / {backward / own[1]:.1f}" for forward, backward in others]
            lines.append(row(raw, name, *(f"{x:.3g}" for x in own), *(ratios or ("", ""))))
    return lines


def recall(times: dict) -> list[str]:
    lines = [row("step", "GPU, ms", "by the clock, ms", "launches"), "|---|---|---|---|"]
    for name, found in times.items():
        if name.startswith("recall") or name.startswith("compressed ") and "variant" not in name:
            lines.append(row(name, f"{found['gpu_ms']:.1f}", f"{found['clock_ms']:.1f}", f"{found['launches']:.0f}"))
    return lines


def decode(results: list[dict]) -> list[str]:
    lines = [row("raw tokens", "batch", "dense, us", "ours, us", "x dense", "fastest tiles"), "|---|---|---|---|---|---|"]
    for raw, batch in dict.fromkeys((r["raw"], r["batch"]) for r in results):
        own = [r for r in results if (r["raw"], r["batch"]) == (raw, batch) and "graph_us" in r]
        dense = next(r["graph_us"] for r in own if r["name"] == "dense SDPA")
        best = min((r for r in own if r["name"] != "dense SDPA"), key=lambda r: r["graph_us"])
        lines.append(row(raw, batch, dense, best["graph_us"], f"{dense / best['graph_us']:.1f}", best["name"]))
    return lines


def training(results: dict) -> list[str]:
    lines = [row("run", "raw tokens/s", "seconds a step", "MFU", "GiB"), "|---|---|---|---|---|"]
    for name, found in results.items():
        last = found["last"]
        rate = found["raw_tokens_per_s"]
        seconds = last["seconds"] * last["raw_tokens_per_s"] / rate
        lines.append(row(name, f"{rate:,.0f}", f"{seconds:.3f}", f"{last['mfu']:.0%}", f"{last['memory_gib']:.0f}"))
    return lines


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks/gpu")
    load = lambda path: json.loads(path.read_text())
    for path in sorted(directory.glob("*_kernel_times.json")):
        card = path.name.removesuffix("_kernel_times.json")
        times = load(path)
        tables = {
            "Compressed attention": attention(times),
            "A whole layer's attention, forward and backward": recall(times),
            "A decoding step of one layer": decode(load(directory / f"{card}_decode_times.json")),
            "Training": training(load(directory / f"{card}_train.json")["results"]),
        }
        for title, lines in tables.items():
            print(f"**{title}** ({card})\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
