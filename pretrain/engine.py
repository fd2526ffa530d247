"""The DeepSpeed engine: its configuration is derived from the run's, never written by hand."""

from __future__ import annotations

import math

import deepspeed

from model.layers import BuildContext
from model.transformer import Transformer
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.engine_state import allocate_optimizer_state
from pretrain.errors import UserError
from pretrain.parallel import Parallel


def accumulation_steps(config: RunConfig, data_size: int) -> int:
    """Micro-batches of one rank per step. Raises UserError when the global batch cannot be divided."""
    samples_at_once = config.train.micro_batch * data_size
    if config.train.global_batch % samples_at_once:
        next_fit = -(-config.train.global_batch // samples_at_once) * samples_at_once
        raise UserError(
            f"train.global_batch: {config.train.global_batch} is not a multiple of train.micro_batch x data-parallel ranks = "
            f"{config.train.micro_batch} x {data_size}; set it to {next_fit}"
        )
    return config.train.global_batch // samples_at_once


def deepspeed_config(config: RunConfig, data_size: int) -> dict:
    """The DeepSpeed configuration of a run."""
    optimizer = config.optimizer
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, data_size),
        "gradient_clipping": config.train.clip,
        "steps_per_print": 10**9,  # the trainer reports
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # PyTorch's own fused AdamW: no compilation at start, and faster on CPU than DeepSpeed's.
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": config.parallel.zero, "overlap_comm": False},
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def build_engine(config: RunConfig, parallel: Parallel) -> deepspeed.DeepSpeedEngine:
    """Model and optimizer under DeepSpeed. Matrices decay, norm weights do not."""
    build = BuildContext(parallel.tensor_group, config.train.seed)
    model = Transformer(config.model, build, config.train.activation_checkpointing)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=deepspeed_config(config, parallel.data_size), mpu=parallel.mpu()
    )
    allocate_optimizer_state(engine)
    return engine


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step (counted from 0): a pure function, so that nothing of it needs to be saved."""
    warmup = math.ceil(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        falling = math.ceil(schedule.decay * steps)
        left = steps - step
        part = min(1.0, left / (falling + 1))
        return peak * (schedule.floor + (1 - schedule.floor) * part)
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return peak * (schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate

