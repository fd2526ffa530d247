"""Run by test_waits.py in a process of its own: where a step would wait for a GPU, way by way, as one JSON line."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.waits import Waits
from unfold.model.gist import Recall, build_layout, interleave
from unfold.model.gist.recall import RECALLS, ROUTES
from unfold.model.visibility import IGNORED, MicroBatch
from unfold.pretrain import parallel
from unfold.pretrain.config import RunConfig, parse_config
from unfold.pretrain.train.added import Added
from unfold.pretrain.train.engine import build_engine
from unfold.pretrain.train.step import train_step

LENGTHS = (40, 27)
WAYS = {
    "forgetting": {},
    "zero 2": {"parallel": {"zero": 2}},
    "zero 3": {"parallel": {"zero": 3}},
    "dense": {"model": {"attention": "dense"}},
    "recall": {"gist": {"chunk_sizes": [4, 2], "recall": "all", "route_loss": 1.0}, "distill": {"logits": 1.0}},
}


def run_config(way: str) -> RunConfig:
    tree = {
        "model": {"vocab_size": 512, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 96},
        "gist": {"chunk_sizes": [4, 2]},
        "data": {"train": ["x"], "tokenizer": "t", "raw_tokens": sum(LENGTHS)},
    }
    for section, values in WAYS[way].items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree)


def micro_batch(config: RunConfig) -> MicroBatch:
    """Two documents and some padding."""
    rng = np.random.default_rng(0)
    if config.folding is None:
        ids, level = rng.integers(0, 510, sum(LENGTHS)), np.full(sum(LENGTHS), -1)
        doc = np.repeat([0, 1], LENGTHS)
    else:
        made = interleave(rng.integers(0, 510, sum(LENGTHS)), LENGTHS, np.ones(512, bool), config.gist, [510, 511])
        ids, level, doc = made.ids, made.level, made.doc
    ids, level, doc = (torch.from_numpy(np.pad(x, (0, 5), constant_values=-1))[None] for x in (ids, level, doc))
    layout = build_layout(level, doc, config.folding)
    recall = None
    if config.gist.recall == "all":
        recall = Recall.from_flags(layout, config.gist, torch.full_like(doc, RECALLS | ROUTES).int())
    ids = ids.clamp(min=0)
    labels = torch.where((level < 0) & (doc >= 0), ids, IGNORED)
    return MicroBatch(ids, labels, layout, recall, distilled=(0,) if config.distill.active else ())


def waits(way: str) -> dict[str, int]:
    """{what it waits for, where: how often} in a step of three micro-batches."""
    config = run_config(way)
    config = replace(config, train=replace(config.train, global_batch=3))
    groups = parallel.initialize(config.parallel)
    engine = build_engine(config, groups)
    batches = [micro_batch(config) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch, Waits(patch) as seen:
        for parameter in engine.module.parameters():
            seen.mark(parameter)
        train_step(engine, batches, groups, config.model, config.folding, Added(0.1, config.distill))
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return {" ".join(key): count for key, count in seen.where.items()}


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.ERROR)
    print("RESULT " + json.dumps({way: waits(way) for way in WAYS}), flush=True)
    dist.destroy_process_group()
