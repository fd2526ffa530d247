"""Where the time goes: each kernel's own time on the GPU, of whole steps of every operation and of several tile sizes.

    python -m tests.benchmarks.gpu.kernel_times [--raw 8192 32768 131072] [--sweep] [--output FILE]

Times are read off PyTorch's profiler, so that the kernels of a backward pass are told apart and no host work counts. ``--sweep``
also times every kernel at the tiles of VARIANTS (one variant sets the tiles of all kernels at once); they are compiled first, in
parallel processes. Nothing here is checked: tests.benchmarks.gpu.smoke and tests/kernels do that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu import attention as bench
from tests.benchmarks.gpu import recall as bench_recall
from tests.kernels.uniform import uniform_tree
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.tiles import Tiles
from unfold.kernels.compressed.triton import compressed_attention_triton
from unfold.kernels.select.triton import SelectTiles
from unfold.kernels.unfold import recall_attention
from unfold.kernels.unfold import triton as unfolding
from unfold.kernels.unfold.tiles import UnfoldTiles

CHUNKS = (8, 4)
SMALL = 512  # raw tokens with which a variant is compiled

# Head dimension, raw tokens, then rows, keys, warps and stages of each kernel: forward, d_query, top, local, sink.
COMPRESSED = [
    (128, 131072, [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 16, 4, 3)]),
    (128, 131072, [(128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (64, 16, 4, 2)]),
    (128, 131072, [(64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (128, 16, 4, 3)]),
    (64, 32768, [(128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2), (64, 16, 4, 2)]),
    (64, 32768, [(64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 16, 4, 3)]),
    (64, 32768, [(64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3), (128, 16, 4, 3)]),
    (64, 32768, [(128, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2), (32, 64, 4, 3), (64, 16, 2, 3)]),
]
# Head dimension, tiles of a scoring program, scores that a warp holds; then forward, d_query, chunks, upper; near, selection
# at the top and below. The rows of forward make the block of queries. At 32k tokens, of which a tenth recalls.
UNFOLD = [
    (128, 4, 1024, [(64, 64, 4, 2), (64, 64, 4, 2), (32, 16, 1, 2), (64, 64, 4, 2),
        (64, 32, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)]),
    (128, 8, 2048, [(64, 64, 4, 2), (64, 64, 4, 2), (64, 16, 2, 2), (64, 32, 4, 2),
        (64, 32, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)]),
    (128, 4, 1024, [(128, 64, 8, 2), (128, 64, 8, 2), (16, 16, 1, 2), (128, 64, 8, 2),
        (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2)]),
    (64, 4, 1024, [(32, 64, 4, 2), (32, 64, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2),
        (64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)]),
    (64, 4, 1024, [(64, 64, 4, 2), (64, 64, 4, 2), (32, 16, 1, 2), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)]),
]  # fmt: skip


def kernel_times(step: Callable[[], object], repeats: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every launch of each kernel during ``repeats`` steps, after one that is not counted."""
    step()
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    times = defaultdict(list)
    for event in events:
        times[short(event.name)].append(event.device_time / 1e3)
    # Our own kernels by the number of their launch within a step: d_key#0 is that of the sink copies, d_key#1 of the top, ..
    split = {}
    for name, found in times.items():
        launches = len(found) // repeats
        if name.endswith("_kernel") and "::" not in name and 1 < launches <= 8 and len(found) == launches * repeats:
            split |= {f"{name}#{i}": found[i::launches] for i in range(launches)}
        else:
            split[name] = found
    return split


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return re.sub(r"<.*|\(.*", "", name.replace("void ", "").replace("at::native::", ""))[:60]


def summary(step: Callable[[], object], repeats: int = 3) -> dict:
    """Of a step: milliseconds on the GPU and by the clock, launches, and its costliest kernels."""
    times = kernel_times(step, repeats)
    clock = []
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(repeats):
        finish()
        begin = time.perf_counter()
        step()
        finish()
        clock.append(1e3 * (time.perf_counter() - begin))
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    return dict(
        gpu_ms=sum(map(sum, times.values())) / repeats,
        clock_ms=statistics.median(clock),
        launches=sum(map(len, times.values())) / repeats,
        kernels={name: [round(sum(t) / repeats, 4), len(t) / repeats] for name, t in ranked[:24]},
    )


def compressed_step(raw: int, tiles: Tiles | None, args: SimpleNamespace) -> Callable[[], object]:
    shape = bench.Shape(raw, CHUNKS, args)
    leaves = (shape.q, shape.k, shape.v)

    def step():
        out = compressed_attention_triton(*leaves, shape.intervals, shape.scale, tiles)
        return torch.autograd.grad(out, leaves, shape.d_out)

    return step


def dense_step(name: str, raw: int, args: SimpleNamespace) -> Callable[[], object]:
    shape = bench.Shape(raw, CHUNKS, args)
    leaves, d_out = (shape.q, shape.k, shape.v), shape.d_out[:, :raw]
    attend = bench.CONTESTANTS[name](shape)
    return lambda: torch.autograd.grad(attend(*leaves), leaves, d_out)


def recall_step(raw: int, recalling: int, args: SimpleNamespace) -> Callable[[], object]:
    """A whole layer's attention, of which the last ``recalling`` tokens recall."""
    tree = uniform_tree(raw, CHUNKS, recalling, device=args.device)
    tokens, rule = tree.others.tokens, bench_recall.rule_for(CHUNKS, None)
    leaves = bench_recall.random_leaves(args, *((1, tokens, h, args.dim) for h in (args.heads, args.kv_heads, args.kv_heads)))
    leaves[0] = bench_recall.alike(leaves[0][0])[None].detach().requires_grad_()
    d_out = torch.randn_like(leaves[0])

    def step():
        out, _ = recall_attention(*leaves, tree, rule, backend="triton")
        return torch.autograd.grad(out, leaves, d_out)

    return step


def unfold_step(raw: int, recalling: int, tiles: tuple[UnfoldTiles, SelectTiles], args: SimpleNamespace) -> Callable[[], object]:
    """Selecting and unfolding alone, at given tiles."""
    tiles, select_tiles = tiles
    tree = uniform_tree(raw, CHUNKS, recalling, device=args.device)
    tokens, rule = tree.others.tokens, bench_recall.rule_for(CHUNKS, None)
    shapes = (recalling, args.heads, args.dim), *((1, tokens, args.kv_heads, args.dim),) * 2
    q, k, v = bench_recall.random_leaves(args, *shapes)
    q = bench_recall.alike(q)
    d_out = torch.randn_like(q)
    size = tiles.block(args.heads // args.kv_heads)

    def step():
        with torch.no_grad():
            lists = unfolding.selecting.select_lists(q, k, tree, rule, size, select_tiles)
        out = unfolding.unfold_attention_triton(q, k, v, tree, lists, args.dim**-0.5, tiles=tiles)
        return torch.autograd.grad(out, (q, k, v), d_out)

    return step


@dataclasses.dataclass(frozen=True)
class Variant:
    """Tiles to measure at a head dimension and a length: Tiles, or UnfoldTiles with SelectTiles."""

    name: str
    dim: int
    raw: int
    tiles: Tiles | tuple[UnfoldTiles, SelectTiles]

    def step(self, args: SimpleNamespace, raw: int | None = None) -> Callable[[], object]:
        own, raw = SimpleNamespace(**vars(args) | dict(dim=self.dim)), raw or self.raw
        make = compressed_step if isinstance(self.tiles, Tiles) else lambda raw, *x: unfold_step(raw, raw // 10, *x)
        return make(raw, self.tiles, own)


def variants() -> list[Variant]:
    made = [
        Variant(f"compressed variant {i}, d {dim}, {raw}", dim, raw, Tiles(*(Tile(*t) for t in row)))
        for i, (dim, raw, row) in enumerate(COMPRESSED)
    ]
    for i, (dim, run, held, row) in enumerate(UNFOLD):
        tiles = [Tile(*t) for t in row]
        both = UnfoldTiles(*tiles[:5]), SelectTiles(*tiles[5:], run=run, held=held)
        made.append(Variant(f"unfold variant {i}, d {dim}, 32768", dim, 32768, both))
    return made


def _compile(job: tuple[Variant | None, SimpleNamespace]) -> str | None:
    """Compile one variant, or the table's tiles, by running it on few tokens; what went wrong, if anything."""
    variant, args = job
    try:
        step = variant.step(args, SMALL) if variant else recall_step(SMALL, SMALL // 2, args)
        step()
    except Exception as error:
        return f"{variant and variant.name}: {type(error).__name__}: {error}".split("\n")[0][:200]


def compile_variants(args: SimpleNamespace, sweep: bool) -> list[str]:
    """Fill Triton's cache in parallel processes; the variants that do not compile."""
    jobs = [(variant, args) for variant in [None, *(variants() if sweep else [])]]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        return [wrong for wrong in pool.map(_compile, jobs, chunksize=1) if wrong]


def cases(args: argparse.Namespace, own: SimpleNamespace) -> Iterator[tuple[str, Callable[[], Callable]]]:
    """Name and maker of every step."""
    for raw in args.raw:
        yield f"compressed {raw}", lambda raw=raw: compressed_step(raw, None, own)
        for name in () if args.no_dense else bench.DENSE[: None if own.device == "cuda" else 1]:
            yield f"{name} {raw}", lambda raw=raw, name=name: dense_step(name, raw, own)
        if raw <= args.recall_up_to:
            yield f"recall, a tenth {raw}", lambda raw=raw: recall_step(raw, raw // 10, own)
        if raw <= args.all_up_to:
            yield f"recall, all {raw}", lambda raw=raw: recall_step(raw, raw, own)
    for variant in variants() if args.sweep else ():
        yield variant.name, lambda variant=variant: variant.step(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--recall-up-to", type=int, default=131072)
    parser.add_argument("--all-up-to", type=int, default=32768)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--no-dense", action="store_true", help="leave out dense attention")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further step after this")
    parser.add_argument("--output", type=Path, default=Path("kernel_times.json"))
    args = parser.parse_args()
    begin = time.perf_counter()
    own = SimpleNamespace(device="cuda", dtype=torch.bfloat16, heads=32, kv_heads=8, dim=128)
    if not torch.cuda.is_available():  # the course of it, in Triton's interpreter
        own = SimpleNamespace(device="cpu", dtype=torch.float32, heads=2, kv_heads=1, dim=64)
    wrong = compile_variants(own, args.sweep) if torch.cuda.is_available() else None
    print(f"compiled in {time.perf_counter() - begin:.0f} s; {wrong or 'all well'}", flush=True)
    results = {}
    if args.compile_only:
        return
    for name, make in cases(args, own):
        if time.perf_counter() - begin > args.seconds:
            print(f"{name}: left out, time is up", flush=True)
            continue
        try:
            results[name] = summary(make(), 3 if torch.cuda.is_available() else 1)
        except Exception as error:
            results[name] = dict(refused=f"{type(error).__name__}: {error}".split("\n")[0][:300])
        print(name, json.dumps(results[name]), flush=True)
        args.output.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()  # nothing where there is no GPU


if __name__ == "__main__":
    main()
