"""Run under torchrun by test_plan.py: bytes that real engines hold on two CPU ranks, layout by layout, as one JSON line."""

from __future__ import annotations

import gc
import json
import logging

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.gist import build_layout, interleave
from model.transformer import IGNORED, MicroBatch
from pretrain import parallel
from pretrain.config import RunConfig, parse_config
from pretrain.engine import build_engine

LAYOUTS = {
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "muon": {"zero": 1},
}
RAW = 67  # three sinks and whole groups
HUGE = 10**8  # DeepSpeed's communication bucket has half a billion elements, whatever the model; it is not counted


def run_config(layout: str, precision: str = "bf16") -> RunConfig:
    """The configuration that is measured here and planned in the test."""
    return parse_config(
        {
            "precision": precision,
            "model": {"vocab_size": 512, "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 256},
            "gist": {"chunk_sizes": [4, 2]},
            "data": {"train": ["x"], "tokenizer": "t", "raw_tokens": RAW},
            "train": {"global_batch": 4},
            "parallel": LAYOUTS[layout],
            "optimizer": {"kind": "muon" if layout == "muon" else "adamw"},
        }
    )


def micro_batch(config: RunConfig) -> MicroBatch:
    rng = np.random.default_rng(0)
    made = interleave(rng.integers(0, 510, RAW), [RAW], np.ones(512, bool), config.gist, [510, 511])
    ids, level, doc = (torch.from_numpy(x)[None] for x in (made.ids, made.level, made.doc))
    return MicroBatch(ids, torch.where(level < 0, ids, IGNORED), build_layout(level, doc, config.gist))


def storages(tensors) -> dict[int, int]:
    """{address: bytes} of distinct storages."""
    found = {}
    for x in tensors:
        if isinstance(x, torch.Tensor) and 0 < x.untyped_storage().nbytes() < HUGE:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return found


def live() -> dict[int, int]:
    """All tensors that Python reaches, gradients included."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    grads = [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    partitions = [getattr(x, "ds_tensor", None) for x in tensors]
    return storages([*tensors, *grads, *partitions])


class CountedAllReduce:
    """Counts the bytes that pass through all_reduce between entering and leaving."""

    def __enter__(self):
        self.bytes, self._real = 0, dist.all_reduce
        dist.all_reduce = self._count
        return self

    def _count(self, tensor, *args, **kwargs):
        self.bytes += tensor.numel() * tensor.element_size()
        return self._real(tensor, *args, **kwargs)

    def __exit__(self, *error):
        dist.all_reduce = self._real


def measure(layout: str) -> dict:
    """parameters, and where there is no pipeline weights, gradients, optimizer after one backward, and bytes all-reduced."""
    config = run_config(layout)
    groups = parallel.initialize(config.parallel)
    batch, before = micro_batch(config), live()
    engine = build_engine(config, groups)
    parameters = list(engine.module.parameters())
    result = {"parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}
    if groups.stages == 1:
        with CountedAllReduce() as counted:
            loss = engine(batch)
            engine.backward(loss)  # the first of two micro-batches: gradients are accumulated
        del loss
        weights = storages([getattr(p, "ds_tensor", p) for p in parameters])
        gathered = storages([p for p in parameters if hasattr(p, "ds_tensor")])
        adam = engine.optimizer.optimizer
        states = [x for state in adam.state.values() for x in state.values()]
        masters = [p for group in adam.param_groups for p in group["params"]]
        masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 lends them to Adam in a step only
        optimizer = storages([*states, *masters])
        known = {*before, *weights, *gathered, *optimizer}
        rest = {address: size for address, size in live().items() if address not in known}
        sizes = {"weights": weights, "gradients": rest, "optimizer": optimizer}
        result |= {name: sum(found.values()) for name, found in sizes.items()} | {"all_reduced": counted.bytes}
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return result


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.ERROR)
    results = {layout: measure(layout) for layout in LAYOUTS}
    everyone = [None, None]
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    dist.destroy_process_group()
