"""Time and memory of a step, and the yardstick of a machine."""

from __future__ import annotations

import argparse
import statistics
import time

import torch


def milliseconds(step, device: str, seconds: float) -> float:
    """Median time of a step, after a warm-up; on CUDA with a cold L2 cache."""
    step()
    cold = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        if cold is None:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        cold.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        step()
        marks[1].record()
        torch.cuda.synchronize()
        times.append(marks[0].elapsed_time(marks[1]))
    return statistics.median(times)


def peak_bytes(step) -> int:
    """Most GPU memory in use during a step beyond what was in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_peak(args: argparse.Namespace) -> float:
    """FLOP/s of a large square product in the measured dtype: the yardstick of this machine."""
    n = 8192 if args.device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    return 2 * n**3 / (1e-3 * milliseconds(lambda: a @ b, args.device, args.seconds))
