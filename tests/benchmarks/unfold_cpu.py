"""Recall on CPU beside forgetting alone: time and peak memory of forward + backward of one layer's attention.

    python -m tests.benchmarks.unfold_cpu [--raw 2048 8192] [--threads 1]

One document of c = (8, 4), 8 heads of 64, fp32, random keys. "suffix": the last tenth of the tokens recalls; "every tenth":
every tenth token; "all": all raw tokens. Times are CPU seconds of this process (best of --repeats), so that a busy machine
disturbs them less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.compressed_cpu import make, resident_mb
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.select import select_gists
from unfold.kernels.unfold import recall_attention, unfold_attention
from unfold.model.gist import GistConfig, build_recall, select_rule

CONFIG = GistConfig((8, 4))
RECALLS = {
    "suffix": lambda position, raw: position >= raw - raw // 10,
    "every tenth": lambda position, raw: position % 10 == 9,
    "all": lambda position, raw: position >= 0,
}


def best_seconds(step, repeats: int) -> float:
    """Least CPU time of ``step`` after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times)


def row(raw: int, which: str, repeats: int) -> str:
    layout, qkv = make(raw, CONFIG.chunk_sizes)
    rule = select_rule(CONFIG)
    tree = build_recall(layout, CONFIG, RECALLS[which](layout.position, raw))
    queries = qkv[0].detach().flatten(0, 1)[tree.tokens].requires_grad_()
    selection = select_gists(queries, qkv[1], tree, rule)
    train = lambda out, leaves: torch.autograd.grad(out.sum(), leaves)
    unfold = lambda: unfold_attention(queries, *qkv[1:], tree, selection)
    steps = [
        lambda: train(compressed_attention(*qkv, layout.intervals), qkv),
        lambda: select_gists(queries, qkv[1], tree, rule),
        lambda: train(unfold(), (queries, *qkv[1:])),
        lambda: train(recall_attention(*qkv, tree, rule)[0], qkv),
    ]
    none, select, unfolding, layer = (best_seconds(step, repeats) for step in steps)
    unfolded = float(recall_attention(*qkv, tree, rule)[1].unfolded)
    return (
        f"| {raw} | {which} | {tree.queries} | {unfolded:.0f} | {none:.3f} | {select:.3f} | {unfolding:.3f} | {layer:.3f} "
        f"| {none / layer:.2f} |"
    )


def peak_mb(raw: int, which: str) -> float:
    """Peak memory of a layer's forward + backward beyond what stood before: results and gradients included."""
    layout, qkv = make(raw, CONFIG.chunk_sizes)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the current size
    before = resident_mb("VmRSS")
    tree = build_recall(layout, CONFIG, RECALLS[which](layout.position, raw))
    torch.autograd.grad(recall_attention(*qkv, tree, select_rule(CONFIG))[0].sum(), qkv)
    return resident_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recall", choices=RECALLS, default="suffix")
    parser.add_argument("--peak", type=int, help="only print the peak memory at this length, for --recall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_mb(args.peak, args.recall))
        return
    print(
        "| raw tokens | recall | queries | raw tokens unfolded per query and head | none, s | select, s | unfold, s | layer, s "
        "| throughput to none |\n|---|---|---|---|---|---|---|---|---|"
    )
    for raw in args.raw:
        for which in RECALLS:
            print(row(raw, which, args.repeats), flush=True)
    print("\n| raw tokens | recall | peak memory beyond inputs, MB |\n|---|---|---|")
    for raw, which in ((8192, "suffix"), (32768, "suffix"), (8192, "all")):
        command = [sys.executable, "-m", __spec__.name, "--peak", str(raw), "--recall", which]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {raw} | {which} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
