"""Speed of gist insertion and layout, one thread: raw tokens per second (median of many runs).

python -m tests.benchmarks.layout_speed [--raw 2048 8192 32768]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from tests.benchmarks.compressed_cpu import median_seconds
from unfold.model.gist import GistConfig, build_layout, interleave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[8, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GistConfig(tuple(args.chunk_sizes))
    rng = np.random.default_rng(0)
    vocab = 8000
    starts = rng.random(vocab) < 0.65  # the share of word starts in English text
    gists = range(vocab, vocab + config.levels)
    print("| raw tokens | insertion, us | layout, us | together, million raw tokens/s |\n|---|---|---|---|")
    for raw in args.raw:
        ids = rng.integers(0, vocab, raw)
        lengths = [raw // 3, raw - raw // 3]
        sample = interleave(ids, lengths, starts, config, gists)
        level, doc = torch.from_numpy(sample.level)[None], torch.from_numpy(sample.doc)[None]
        insertion = median_seconds(lambda: interleave(ids, lengths, starts, config, gists), 300)  # noqa: B023
        layout = median_seconds(lambda: build_layout(level, doc, config), 300)  # noqa: B023
        print(f"| {raw} | {insertion * 1e6:.0f} | {layout * 1e6:.0f} | {raw / (insertion + layout) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
