"""Where a training step waits for the GPU, as CUDA itself tells (torch.cuda.set_sync_debug_mode), by place and per step.

    python -m tests.benchmarks.gpu.waits

The ways of tests/pretrain/test_waits.py, which counts them without a GPU. A copy out of memory that is not pinned is seen by CUDA
alone, what the engine's own code of C++ waits for as well. One JSON line per way.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.pretrain.step_waits import WAYS, micro_batch, run_config
from unfold.kernels.common.plans import pinned
from unfold.pretrain import parallel
from unfold.pretrain.train.added import Added
from unfold.pretrain.train.engine import build_engine
from unfold.pretrain.train.step import train_step


def waits(way: str) -> dict[str, float]:
    """{place: how often per step}, of steps of three micro-batches, once everything is compiled."""
    config = run_config(way)
    config = replace(config, model=replace(config.model, head_dim=64), train=replace(config.train, global_batch=3))
    groups = parallel.initialize(config.parallel)
    engine = build_engine(config, groups)
    steps, found = 2, Counter()
    for step in range(1 + steps):
        batches = [pinned(micro_batch(config)) for _ in range(3)]
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step else "default")
            train_step(engine, batches, groups, config.model, config.folding, Added(0.1, config.distill))
            torch.cuda.set_sync_debug_mode("default")
        found.update(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return {place: n / steps for place, n in found.most_common()}


def main() -> None:
    if not torch.cuda.is_available():
        print("left out, there is no GPU here: python -m pytest tests/pretrain/test_waits.py counts without one")
        return
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for way in WAYS:
        print(json.dumps({way: waits(way)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
