"""A decoding step of one layer, launch by launch: each kernel's own time, and the whole step replayed from a CUDA graph.

    python -m tests.benchmarks.gpu.decode_times [--raw 32768 131072] [--batch 1 8] [--seconds 55] [--output FILE]

For every variant of the tiles (VARIANTS; and the default's without programmatic dependent launch) beside dense SDPA. Kernels' own
times are read off PyTorch's profiler without a graph: with dependent launch a kernel's time holds its waiting, so they are taken
without. Every variant's output is compared with the default's, whose error against fp64 is printed. Variants are compiled first,
in parallel processes. On a CPU machine (TRITON_INTERPRET=1 and small sizes) the same course, with times that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.benchmarks.gpu import recall as bench_recall
from tests.benchmarks.gpu.kernel_times import kernel_times
from unfold.kernels.decode.tiles import DecodeTiles, Launch, decode_tiles

CHUNKS = (8, 4)
TOLERANCE = dict(atol=1e-2, rtol=2e-2)  # bf16 outputs, means of values of size one


def variants(default: DecodeTiles) -> dict[str, dict]:
    """Arguments of kernels.decode.triton.run by name; the first is what the others are compared with."""
    changed = lambda **fields: dict(tiles=replace(default, **fields))
    return {
        "default": dict(tiles=default),
        "no dependent launch": dict(tiles=default, pdl=False),
        "attend 128, 4 warps": changed(attend=Launch(128, 4, 1)),
        "attend 32, 1 warp": changed(attend=Launch(32, 1, 1), splits=256),
        "attend 32, 4 warps": changed(attend=Launch(32, 4, 1), splits=256),
        "attend 64, 4 warps": changed(attend=Launch(64, 4, 1), part=64),
        "score 32": changed(top=Launch(32, 4, 1), below=Launch(32, 1, 1)),
        "score 128": changed(top=Launch(128, 4, 1), below=Launch(64, 2, 1)),
        "held 8": changed(held=8),
        "held 4": changed(held=4, part=16),
        "held 32": changed(held=32, part=64),
        "1056 programs": changed(programs=1056, splits=64),
    }


def replay_microseconds(step: Callable[[], object], own: SimpleNamespace, rounds: int = 5, repeats: int = 50) -> float:
    """Median over rounds of a replay from a CUDA graph."""
    run = bench_recall.captured(step, own)
    if own.device != "cuda":
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / repeats)
    return statistics.median(times)


def own_times(step: Callable[[], object], own: SimpleNamespace) -> dict[str, list[float]]:
    """Microseconds of each launch of a step, by kernel: the median over several steps."""
    if own.device != "cuda":
        return {}
    repeats = 5
    times = kernel_times(step, repeats)
    result = {}
    for name, values in times.items():
        launches = len(values) // repeats
        result[name] = [round(1e3 * statistics.median(values[i::launches]), 2) for i in range(launches)]
    return result


def measured(
    name: str, how: dict, case: bench_recall.DecodeCase, want: Tensor | None, own: SimpleNamespace
) -> tuple[dict, Tensor]:
    """One variant's times and what is wrong with its output, and the output."""
    step = bench_recall.launched(case, **how)
    out = step()
    result = dict(name=name, graph_us=round(replay_microseconds(step, own), 2))
    if want is None:
        result["error"] = case.error(out)
    elif not torch.allclose(out.float(), want.float(), **TOLERANCE):
        result["wrong"] = float((out.float() - want.float()).abs().max())
    result["kernels_us"] = own_times(bench_recall.launched(case, **how | dict(pdl=False)), own)
    return result, out


def dense(case: bench_recall.DecodeCase, own: SimpleNamespace) -> dict:
    keys, values = (torch.stack([layer[-1].memory[i] for layer in case.layers]) for i in (0, 1))
    step = lambda: bench_recall.sdpa(case.q[:, :, None], keys, values)
    return dict(name="dense SDPA", graph_us=round(replay_microseconds(step, own), 2))


def _compile(job: tuple[str, dict, int, list[int], SimpleNamespace]) -> str | None:
    """Compile one variant for one length by running it; what went wrong, if anything."""
    name, how, raw, batches, own = job
    try:
        for batch in batches:
            case = bench_recall.decode_case(raw, batch, CHUNKS, own, shared=True)
            for pdl in {how.get("pdl"), False}:
                bench_recall.launched(case, **how | dict(pdl=pdl))()
        if own.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{name} {raw}: {type(error).__name__}: {error}".split("\n")[0][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--seconds", type=float, default=55, help="begin no further variant after this")
    parser.add_argument("--output", type=Path, default=Path("decode_times.json"))
    args = parser.parse_args()
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = SimpleNamespace(device=device, dtype=torch.bfloat16, heads=args.heads, kv_heads=args.kv_heads, dim=args.dim)
    chosen = {n: how for n, how in variants(decode_tiles(args.dim, 2)).items() if not args.only or n in ("default", *args.only)}
    if device == "cuda":
        jobs = [(name, how, raw, args.batch, own) for raw in args.raw for name, how in chosen.items()]
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            wrong = [w for w in pool.map(_compile, jobs, chunksize=1) if w]
        print(f"compiled in {time.perf_counter() - begin:.0f} s; {wrong or 'all well'}", flush=True)
    results = []
    for raw in args.raw:
        for batch in args.batch:
            case, want = bench_recall.decode_case(raw, batch, CHUNKS, own), None
            results.append(dict(raw=raw, batch=batch) | dense(case, own))
            print(json.dumps(results[-1]), flush=True)
            for name, how in chosen.items():
                if time.perf_counter() - begin > args.seconds:
                    print(f"{raw} {batch} {name}: left out, time is up", flush=True)
                    continue
                try:
                    result, out = measured(name, how, case, want, own)
                    want = out if want is None else want
                except Exception as error:
                    result = dict(name=name, refused=f"{type(error).__name__}: {error}".split("\n")[0][:300])
                results.append(dict(raw=raw, batch=batch) | result)
                print(json.dumps(results[-1]), flush=True)
                args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
