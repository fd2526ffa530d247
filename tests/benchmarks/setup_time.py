"""What preparing a long sample costs on one CPU thread: gists, layout, kernels' plans, the exchange of context ranks.

    python -m tests.benchmarks.setup_time [--raw 65536 262144 1048576]

Processor seconds (so that others on the machine matter little), and the most bytes that are alive beyond what was there before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from tests.live_memory import LiveMemory
from unfold.kernels.compressed.plan import key_plan, row_plan
from unfold.model.config import GistConfig
from unfold.model.gist import build_layout, interleave, max_interleaved_length
from unfold.model.parallel.context import make_plan
from unfold.model.parallel.division import Division

RANKS = 8


def timed(work: Callable[[], object]) -> tuple[object, float]:
    began = time.process_time()
    made = work()
    return made, time.process_time() - began


def measure(raw: int, config: GistConfig) -> dict[str, float]:
    """Seconds of each step for one document of ``raw`` tokens, and bytes per raw token of layout and plan."""
    rng = np.random.default_rng(0)
    ids, starts = rng.integers(0, 30000, raw), rng.random(32000) < 0.7
    made, seconds = timed(lambda: interleave(ids, [raw], starts, config, range(31998, 31998 + config.levels)))
    found = {"insertion": seconds}
    length = max_interleaved_length(raw, config.chunk_sizes)
    length += -length % RANKS
    pad = lambda x: torch.from_numpy(np.pad(x, (0, length - len(x)), constant_values=-1))[None]
    level, doc = pad(made.level), pad(made.doc)
    with LiveMemory() as memory:
        layout, found["layout"] = timed(lambda: build_layout(level, doc, config))
        found["layout bytes"] = memory.peak
    with LiveMemory() as memory:
        _, found["exchange"] = timed(lambda: make_plan(layout, Division.even([layout.intervals], RANKS), RANKS - 1))
        found["exchange bytes"] = memory.peak
    with LiveMemory() as memory:
        _, found["plans"] = timed(lambda: (row_plan(layout.intervals, 4, 128, 64), key_plan(layout.intervals, 64, 64, 64)))
        found["plans bytes"] = memory.peak
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", type=int, nargs="+", default=[2**16, 2**18, 2**20])
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GistConfig((8, 4))
    measure(4096, config)  # compiles insertion
    print("| raw tokens | insertion, s | layout, s | kernels' plans, s | exchange, s | layout, bytes/token | plans | exchange |")
    print("|---|---|---|---|---|---|---|---|")
    for raw in args.raw:
        f = measure(raw, config)
        seconds = (f"{f[name]:.3f}" for name in ("insertion", "layout", "plans", "exchange"))
        sizes = (f"{f[name] / raw:,.0f}" for name in ("layout bytes", "plans bytes", "exchange bytes"))
        print(f"| {raw:,} | {' | '.join((*seconds, *sizes))} |", flush=True)


if __name__ == "__main__":
    main()
