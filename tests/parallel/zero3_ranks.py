"""Run on two ranks by test_zero3.py: losses of ZeRO-3 where every weight is gathered for use, as those of large models are, for
every way of computing layers again, as one JSON line."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import deepspeed
import torch.distributed as dist
from megatron.core import parallel_state

from tests.pretrain.plan.engine_bytes import micro_batch, run_config
from unfold.pretrain import parallel
from unfold.pretrain.train import engine as engine_module
from unfold.pretrain.train.step import train_step

WAYS = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "tiles": {"mlp_tiles": 3},
    "full tiles": {"activation_checkpointing": "full", "mlp_tiles": 3},
    "selective": {"activation_checkpointing": "selective"},
    "selective host tiles": {"activation_checkpointing": "selective", "offload_activations": True, "mlp_tiles": 3},
}


def losses(way: str, steps: int = 3) -> list[float]:
    """Of some steps of two micro-batches."""
    config = run_config("zero 3", "fp32")
    config = replace(config, train=replace(config.train, **WAYS[way]))
    groups = parallel.initialize(config.parallel)
    made = engine_module.deepspeed_config

    def gathering(*args) -> dict:
        settings = made(*args)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    engine_module.deepspeed_config = gathering
    engine = engine_module.build_engine(config, groups)
    engine_module.deepspeed_config = made
    batch = micro_batch(config)
    engine_module.set_learning_rate(engine, 1e-3)
    found = [train_step(engine, [batch, batch], groups, config.model, config.folding).loss for _ in range(steps)]
    engine.destroy()
    parallel_state.destroy_model_parallel()
    return found


if __name__ == "__main__":
    deepspeed.utils.logger.setLevel(logging.ERROR)
    results = {way: losses(way) for way in WAYS}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.destroy_process_group()
