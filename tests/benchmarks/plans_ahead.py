"""What making plans costs the host of a GPU, and what is copied of them, without a GPU.

    python -m tests.benchmarks.plans_ahead [--raw 8192 32768] [--chunks 8 4] [--runs gist ..]

Micro-batches of one document of so many raw tokens, for layers of 32/8 heads of 128 in bf16 with the tiles of compute capability
9.0. The layout, and who recalls, is what a loader works out in any case; plans are what it makes besides (`unfold.model.ahead`),
or what the first layers of a step make where no loader did. CPU seconds of one thread, the least of three; the tensors of plans,
and their bytes. A line of Markdown each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from tests.kernels.uniform import uniform_levels
from unfold.kernels.common.plans import pinned
from unfold.model.ahead import Ahead
from unfold.model.config import ModelConfig
from unfold.model.gist import GistConfig, Recall, build_layout
from unfold.model.gist.recall import RECALLS, ROUTES
from unfold.model.visibility import MicroBatch

OPS = ("compressed", "select", "unfold", "route")
# Kinds of layers, the part of the tokens that recalls, sampled queries of the routing loss, whether dense attention teaches.
RUNS = {
    "forgetting": (("gist",), 0.0, 0, False),
    "windows beside gists": (("gist", "window:1024"), 0.0, 0, False),
    "dense beside gists": (("gist", "dense"), 0.0, 0, False),
    "a tenth recalls": (("gist",), 0.1, 0, False),
    "all recall, routing loss": (("gist",), 1.0, 256, False),
    "forgetting, distilled": (("gist",), 0.0, 0, True),
}


def micro_batch(raw: int, config: GistConfig, part: float, routed: int, distilled: bool) -> MicroBatch:
    level = uniform_levels(raw, config.chunk_sizes)[None]
    layout = build_layout(level, torch.zeros_like(level), config)
    recall = None
    if part:
        tokens = layout.level.shape[1]
        late = torch.arange(tokens) >= (1 - part) * tokens
        sampled = torch.rand(tokens) < routed / tokens
        recall = Recall.from_flags(layout, config, (late.int() * (RECALLS + ROUTES * sampled.int()))[None])
    ids = torch.zeros_like(layout.level, dtype=torch.int64)
    return MicroBatch(ids, ids, layout, recall, (0,) if distilled else ())


def measured(make: Callable[[], Any], then: Callable[[Any], None]) -> tuple[float, float]:
    """Least CPU seconds of ``make``, and of ``then`` with what it made."""
    best = [float("inf")] * 2
    for _ in range(3):
        begin = time.thread_time()
        made = make()
        middle = time.thread_time()
        then(made)
        best = [min(b, s) for b, s in zip(best, (middle - begin, time.thread_time() - middle))]
    return best[0], best[1]


def tensors(batch: MicroBatch) -> tuple[int, int]:
    """Tensors of a micro-batch, its plans included, and their bytes."""
    found: list[int] = []
    with mock.patch("torch.Tensor.pin_memory", lambda x: found.append(x.numel() * x.element_size()) or x):
        pinned(batch)
    return len(found), sum(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GistConfig(tuple(args.chunks), recall="all")
    print("| micro-batch | raw tokens | layout, ms | plans, ms | tensors | MB |\n|---|---|---|---|---|---|")
    for raw in args.raw:
        for name in args.runs:
            kinds, part, routed, distilled = RUNS[name]
            sizes = dict(hidden_size=4096, layers=4, heads=32, kv_heads=8, ffn_size=14336)
            model = ModelConfig(0, **sizes, layer_attention=kinds if len(kinds) > 1 else ())
            q, k = (torch.empty(0, 0, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
            ahead = Ahead(model, tuple(range(model.layers)), q, k, from_logits=distilled)
            batch = micro_batch(raw, config, part, routed, distilled)
            make = lambda w=(raw, config, part, routed, distilled): micro_batch(*w)
            layout, plans = measured(make, ahead.prepare)
            bare = tensors(batch)
            ahead.prepare(batch)
            count, size = (with_plans - without for with_plans, without in zip(tensors(batch), bare))
            print(f"| {name} | {raw:,} | {1e3 * layout:.0f} | {1e3 * plans:.0f} | {count} | {size / 1e6:.1f} |", flush=True)


def as_for_a_gpu() -> None:
    """Plans of Triton's kernels for a card that is not here."""
    for op in OPS:
        mock.patch(f"unfold.kernels.{op}.op.default_backend", lambda *_: "triton").start()
        mock.patch(f"unfold.kernels.{op}.triton.architecture", lambda _: "sm_90").start()


if __name__ == "__main__":
    as_for_a_gpu()
    main()
