"""Run under torchrun by test_counts.py: bytes that real engines hold on two CPU ranks, of the layouts that are named, as one JSON
line."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import logging
import math
import sys
import time

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from unfold.model.gist import build_layout, interleave
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain import parallel
from unfold.pretrain.checkpoint.state import AVERAGE, RunningAverage, fragments
from unfold.pretrain.config import RunConfig, parse_config
from unfold.pretrain.plan.work import measure_sample
from unfold.pretrain.train.engine import build_engine
from unfold.pretrain.train.step import train_step

# Settings of each layout, by section.
LAYOUTS = {
    "zero 1, adapters, average": {"lora": {"rank": 4}, "checkpoint": {"average_decay": 0.9}},
    "zero 2": {"parallel": {"zero": 2}},
    "zero 3": {"parallel": {"zero": 3}},
    "bf16 moments": {"parallel": {"zero": 2}, "optimizer": {"state": "bf16"}},
    "tensor 2": {"parallel": {"tensor": 2}},
}
MORE_LAYOUTS = {
    "muon": {"optimizer": {"kind": "muon"}},  # first: DeepSpeed goes on to use an mpu of an engine before, and Muon brings none
    "zero 1": {},
    "zero 2, fp32 reduction": {"parallel": {"zero": 2, "reduce": "fp32"}},
    "zero 2, gists, feed-forward, average": {
        "parallel": {"zero": 2}, "train": {"trainable": ["gists", "*mlp*"]}, "checkpoint": {"average_decay": 0.9}
    },
    "8bit moments": {"parallel": {"zero": 3}, "optimizer": {"state": "8bit"}},
    "zero 3, adapters": {"parallel": {"zero": 3}, "lora": {"rank": 16}},
    "tensor 2, adapters": {"parallel": {"tensor": 2}, "lora": {"rank": 16}},
    "pipeline 2": {"parallel": {"pipeline": 2}},
    "context 2": {"parallel": {"context": 2}},
}  # fmt: skip
OF_FOUR = {  # on four ranks, the others on two
    "context 2 x 2": {"parallel": {"context": 4, "context_heads": 2}},
    "ulysses 2": {"parallel": {"context": 2, "context_method": "ulysses"}},
}
RAW = 67  # three sinks and whole groups
HUGE = 10**8  # DeepSpeed's communication bucket has half a billion elements, whatever the model; it is not counted


def run_config(layout: str, precision: str = "bf16") -> RunConfig:
    """The configuration that is measured here and planned in the test."""
    given = (LAYOUTS | MORE_LAYOUTS | OF_FOUR)[layout]
    sizes = (given.get("parallel", {}).get(name, 1) for name in ("tensor", "pipeline", "context"))
    replicas = (4 if layout in OF_FOUR else 2) // math.prod(sizes)
    return parse_config(
        given
        | {
            "precision": precision,
            "model": {"vocab_size": 512, "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 256},
            "gist": {"chunk_sizes": [4, 2], "links": 0},
            "data": {"train": ["x"], "tokenizer": "t", "raw_tokens": RAW},
            # Two micro-batches for each rank.
            "train": given.get("train", {}) | {"global_batch": 2 * replicas},
        }
    )


def micro_batch(config: RunConfig) -> MicroBatch:
    rng = np.random.default_rng(0)
    made = interleave(rng.integers(0, 510, RAW), [RAW], np.ones(512, bool), config.gist, [510, 511])
    pad = measure_sample(config).length - len(made.ids)
    padded = ((made.ids, 0), (made.level, -1), (made.doc, -1))
    ids, level, doc = (torch.from_numpy(np.pad(x, (0, pad), constant_values=empty))[None] for x, empty in padded)
    return MicroBatch(ids, torch.where((level < 0) & (doc >= 0), ids, IGNORED), build_layout(level, doc, config.gist))


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


class Sent:
    """Counts the bytes that this rank sends between entering and leaving: collectives as rings, a reduce as its part of a
    reduce-scatter, a broadcast by its source alone. Entered before DeepSpeed looks the functions up; ``begin`` sets to 0."""

    NAMES = (
        "all_reduce",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "reduce",
        "broadcast",
        "send",
        "isend",
        "all_to_all_single",
    )

    def __enter__(self):
        self.bytes, self._real = {}, {name: getattr(dist, name) for name in self.NAMES}
        for name, real in self._real.items():
            setattr(dist, name, functools.partial(self._count, name, real))
        return self

    def begin(self) -> None:
        self.bytes = dict.fromkeys(self.NAMES, 0)

    def _count(self, name, real, *args, **kwargs):
        named = inspect.signature(real).bind(*args, **kwargs).arguments
        tensor = next(named[n] for n in ("output_tensor", "input", "tensor") if n in named)
        ranks = dist.get_world_size(named.get("group"))
        ring = (ranks - 1) / ranks
        parts = {"all_reduce": 2 * ring, "reduce": named.get("dst") != dist.get_rank(), "send": 1, "isend": 1,
                 "broadcast": named.get("src") == dist.get_rank()}  # fmt: skip
        self.bytes[name] = self.bytes.get(name, 0) + parts.get(name, ring) * tensor.numel() * tensor.element_size()
        return real(*args, **kwargs)

    def __exit__(self, *error):
        for name, real in self._real.items():
            setattr(dist, name, real)


def rest_of_step(engine, batch: MicroBatch) -> None:
    """The second of two micro-batches, and the update."""
    engine.step()
    engine.backward(engine(batch))
    engine.step()


def measure(layout: str, sent: Sent) -> dict:
    """parameters; bytes sent in a step; of plain data-parallel layouts weights, gradients, optimizer after one backward."""
    config = run_config(layout)
    groups, began = parallel.initialize(config.parallel), time.monotonic()
    batch, before = micro_batch(config), live()
    held = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]  # or a gradient may come to lie where one of them was
    engine = build_engine(config, groups, (510, 511))
    parameters = list(engine.module.parameters())
    result = {"parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}
    if groups.stages == 1 and groups.context_group.size() == 1:
        sent.begin()
        loss = engine(batch)
        engine.backward(loss)  # the first of two micro-batches: gradients are accumulated
        result["all_reduced"] = sent.bytes["all_reduce"]  # a ring of two sends what is reduced once
        del loss
        weights = storages([getattr(p, "ds_tensor", p) for p in parameters])
        gathered = storages([p for p in parameters if hasattr(p, "ds_tensor")])
        adam = engine.optimizer.optimizer
        states = [x for state in adam.state.values() for x in state.values()]
        masters = [p for group in adam.param_groups for p in group["params"]]
        masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 lends them to Adam in a step only
        optimizer = storages([*states, *masters])
        averages = fragments(engine, groups, RunningAverage(config.checkpoint.average_decay))
        averaged = sum(f.values.nbytes for f in averages if f.name.startswith(f"{AVERAGE}."))
        known = {*before, *weights, *gathered, *optimizer}
        rest = {address: size for address, size in live().items() if address not in known}
        sizes = {"weights": weights, "gradients": rest, "optimizer": optimizer}
        result |= {name: sum(found.values()) for name, found in sizes.items()}
        result["optimizer"] += averaged
        rest_of_step(engine, batch)
    else:
        train_step(engine, [batch, batch], groups, config.model, config.folding)  # in its first step a pipeline also tells shapes
    sent.begin()
    train_step(engine, [batch, batch], groups, config.model, config.folding)
    result["sent"] = dict(sent.bytes)
    del held
    result["seconds"] = time.monotonic() - began
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return result


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.ERROR)
    with Sent() as counted:
        results = {layout: measure(layout, counted) for layout in sys.argv[1:]}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    dist.destroy_process_group()
