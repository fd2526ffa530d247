"""How long it takes until the first sample of millions of documents is known, in windows and packed, and what padding that costs.

    python -m tests.benchmarks.packing_speed --documents 5000000 --raw-tokens 4096 32768

Only lengths are made (log-normal, the median 500 tokens), no tokens: opening shards is timed in tests/pretrain/test_blend.py.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import numpy as np

from unfold.pretrain.data.packing import PackedWindows, pack
from unfold.pretrain.data.windows import CutWindows, Leg

MEDIAN, SPREAD = 500, 1.3
WEIGHTS = ((4096, 2.0), (16384, 4.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--raw-tokens", type=int, nargs="+", default=[4096, 32768])
    args = parser.parse_args()
    pack(np.array([1]), 2, 1)  # compiled once per installation
    lengths = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN), SPREAD, args.documents)).astype(np.int32).clip(2)
    info = SimpleNamespace(supervised=False)
    shard = SimpleNamespace(lengths=lengths, sha256="", parts=np.zeros(len(lengths), np.int64), info=info)
    print(f"{args.documents:,} documents of {lengths.sum(dtype=np.int64):,} tokens")
    print("| raw tokens | packing | length weights | first sample, s | next border, s | shares, s | padding | documents cut |")
    print("|---|---|---|---|---|---|---|---|")
    for raw in args.raw_tokens:
        for kind in (CutWindows, PackedWindows):
            for weights in ((), WEIGHTS):
                clock = time.process_time
                began = clock()
                source = kind([shard], 0, [1, 0], "data.train", "", weights)
                source.segments(0, [Leg(0, raw)])
                first = clock()
                legs = [Leg(0, raw, 1000), Leg(1000, 2 * raw)]
                source.segments(1000, legs)
                border = clock()
                padding, cut = source.shares(raw)
                seconds = first - began, border - first, clock() - border
                times = " | ".join(f"{s:.2f}" for s in seconds)
                said = {CutWindows: "windows", PackedWindows: "best_fit"}[kind]
                print(
                    f"| {raw:,} | {said} | {list(map(list, weights)) or ''} | {times} | {padding:.2%} | {cut:.2%} |", flush=True
                )


if __name__ == "__main__":
    main()
