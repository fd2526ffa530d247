"""Compressed attention on CPU beside SDPA: time and peak memory of forward + backward, in one run.

    python -m tests.benchmarks.compressed_cpu [--raw 2048 8192] [--threads 1]

Prints a table: our time, SDPA with the dense mask (what a user would write), plain causal SDPA, and their ratios
(medians), then the peak memory beyond inputs over growing lengths, each length in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from unfold.kernels.compressed import compressed_attention
from unfold.model.gist import GistConfig, build_layout, interleave

HEADS, DIM = 8, 64


def make(raw: int, chunk_sizes=(8, 4)):
    """One document of ``raw`` tokens: its layout, q, k, v."""
    config = GistConfig(chunk_sizes)
    sample = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), config, range(1, 1 + config.levels))
    layout = build_layout(torch.from_numpy(sample.level)[None], torch.from_numpy(sample.doc)[None], config)
    torch.manual_seed(0)
    return layout, [torch.randn(1, len(sample.ids), HEADS, DIM, requires_grad=True) for _ in range(3)]


def median_seconds(step, repeats: int) -> float:
    """Median wall time of ``step`` after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(raw: int, repeats: int) -> str:
    layout, qkv = make(raw)
    mask = layout.intervals.dense_mask()[:, None]

    def sdpa(**how):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), **how)
        torch.autograd.grad(out.sum(), qkv)

    ours = median_seconds(lambda: torch.autograd.grad(compressed_attention(*qkv, layout.intervals).sum(), qkv), repeats)
    masked = median_seconds(lambda: sdpa(attn_mask=mask), repeats)
    causal = median_seconds(lambda: sdpa(is_causal=True), repeats)
    return f"| {raw} | {ours:.3f} | {masked:.3f} | {causal:.3f} | {masked / ours:.1f} | {causal / ours:.1f} |"


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mb(raw: int) -> float:
    """Peak memory of forward + backward beyond what stood before, in this process: results and gradients included."""
    layout, qkv = make(raw)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the current size
    before = resident_mb("VmRSS")
    torch.autograd.grad(compressed_attention(*qkv, layout.intervals).sum(), qkv)
    return resident_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=int, help="only print the peak memory at this length")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_mb(args.peak))
        return
    print(f"{HEADS} heads, d {DIM}, fp32, c = (8, 4), {args.threads} thread(s), forward + backward, seconds (median)")
    print("| raw tokens | ours | SDPA dense mask | SDPA causal | ratio to mask | ratio to causal |\n|---|---|---|---|---|---|")
    for raw in args.raw:
        print(row(raw, args.repeats), flush=True)
    print("\n| raw tokens | peak memory beyond inputs, MB |\n|---|---|")
    for raw in (4096, 8192, 16384, 32768, 65536):
        command = [sys.executable, "-m", __spec__.name, "--peak", str(raw), "--threads", str(args.threads)]
        print(f"| {raw} | {float(subprocess.run(command, check=True, capture_output=True, text=True).stdout):.0f} |", flush=True)


if __name__ == "__main__":
    main()
