"""The DeepSpeed engine: its configuration is derived from the run's, never written by hand."""

from __future__ import annotations

import math
from functools import partial

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from unfold.model.ahead import Ahead
from unfold.model.layers import MLP, BuildContext
from unfold.model.parallel.pipeline import StageAttention, canonical_name, layer_specs, stage_loss
from unfold.model.pointwise import Pointwise
from unfold.model.recompute import Offload, Recompute
from unfold.model.transformer import Transformer
from unfold.pretrain.checkpoint.state import allocate_optimizer_state
from unfold.pretrain.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig, accumulation_steps
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.train.compact import CompactAdamW
from unfold.pretrain.train.trainable import freeze, needs_rows, parameter_groups, tied_attributes


def deepspeed_config(config: RunConfig, data_size: int) -> dict:
    """The DeepSpeed configuration of a run."""
    parallel = config.parallel
    # Gradients go to their owners, and under ZeRO-3 weights come, beside the computation. A pipeline knows nothing of it, and
    # without streams of a GPU there is nothing to gain.
    zero = {"stage": parallel.zero, "overlap_comm": torch.cuda.is_available() and parallel.pipeline == 1}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    reduce = {} if parallel.reduce == "precision" else {"communication_data_type": parallel.reduce}
    return reduce | {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, data_size),
        "gradient_clipping": config.train.clip,
        "steps_per_print": 10**9,  # the trainer reports
        "zero_optimization": zero,
        # A pipeline's BF16_Optimizer loses gradients of micro-batches unless each is added to the fp32 sum as it arises (0.19.8:
        # the norm comes out a seventh too small).
        "bf16": {"enabled": config.precision == "bf16", "immediate_grad_update": parallel.pipeline > 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Partitioned sends would cut the residual stream apart, which sequence parallelism has done already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def build_engine(config: RunConfig, parallel: Parallel, row_ids: tuple[int, ...] = ()) -> deepspeed.DeepSpeedEngine:
    """Model and optimizer under DeepSpeed: a plain module, or a PipelineModule where there are stages.

    Matrices decay, norm weights do not. row_ids: gist and link ids, whose rows may be trained apart from the others.
    """
    context = parallel.context_parallel(config.model.kinds)
    build = BuildContext(
        parallel.tensor_group,
        config.train.seed,
        config.parallel.sequence,
        context,
        recompute=_recompute(config.train),
        rows=row_ids if needs_rows(config) else (),
        lora=config.lora if config.lora.rank else None,
        pointwise=Pointwise.compiled() if config.train.fuse_pointwise else Pointwise(),
    )
    model = _pipeline(config, build, parallel) if parallel.stages > 1 else Transformer(config.model, build)
    if config.train.mlp_tiles > 1 and config.parallel.zero == 3:
        set_z3_leaf_modules(model, [MLP])  # both weights are gathered once for all tiles
    model.context_parallel = context  # what it sends is counted there
    rename = getattr(model, "canonical_name", str)
    freeze(model, config, rename)
    settings = deepspeed_config(config, parallel.data_size)
    if config.optimizer.kind == "muon":
        # Without an mpu: DeepSpeed's Muon refuses one, and the ranks that hold the same weights are all there are.
        engine, *_ = deepspeed.initialize(model=model, optimizer=make_muon(model, config), config=settings)
    else:
        decay = ({}, {"weight_decay": 0.0})  # of matrices as configured, of vectors none
        groups = [group | decay[kind] for kind, group in parameter_groups(model, config, rename)]
        mpu = {} if parallel.stages > 1 else {"mpu": parallel.mpu()}  # a PipelineModule brings its own
        if config.optimizer.state == "fp32":
            made = {"model_parameters": groups}
            settings["optimizer"] = adamw_settings(config.optimizer)
        else:
            made = {"optimizer": CompactAdamW(groups, config.optimizer.state, **adamw_numbers(config.optimizer))}
            # DeepSpeed asks to be told that an optimizer which it does not know is meant.
            settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine, *_ = deepspeed.initialize(model=model, config=settings, **made, **mpu)
    if parallel.stages > 1:
        _check_agreement(engine, parallel)
    allocate_optimizer_state(engine)
    return engine


def _recompute(train: TrainConfig) -> Recompute:
    """What layers keep and what they compute again (a pipeline's too: DeepSpeed's own checkpoints know of all or nothing)."""
    return Recompute(train.activation_checkpointing, Offload() if train.offload_activations else None, train.mlp_tiles)


def adamw_numbers(optimizer: OptimizerConfig) -> dict:
    """What AdamW is given, by PyTorch's names."""
    return {
        "lr": optimizer.lr,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }


def adamw_settings(optimizer: OptimizerConfig) -> dict:
    """PyTorch's own fused AdamW: no compilation at start, and faster on CPU than DeepSpeed's."""
    return {"type": "AdamW", "params": adamw_numbers(optimizer) | {"torch_adam": True, "fused": True}}


def make_muon(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """DeepSpeed's Muon for the layers' matrices, with fused AdamW for embedding, head, norms and biases.

    Its own way of telling them apart, by names such as lm_head, would take this model's untied head for a layer.
    """
    # Imported here: it decorates its kernels, which takes seconds.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # compiling the few small products takes minutes on CPU
    for name, parameter in model.named_parameters():
        parameter.use_muon = name.startswith("layers.") and parameter.dim() == 2
    optimizer = config.optimizer
    adam = dict(use_muon=False, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    muon = dict(use_muon=True, momentum=optimizer.muon_momentum, weight_decay=optimizer.weight_decay)
    kinds = lambda p: p.use_muon, lambda p: p.dim() > 1, lambda p: True
    groups = []
    for kind, group in parameter_groups(model, config, kinds=kinds):
        if kind == 0:
            rate = optimizer.muon_lr * group["rate_factor"]
            groups.append(group | muon | dict(lr=rate, rate_factor=rate / optimizer.lr))
        else:
            groups.append(group | adam | dict(weight_decay=optimizer.weight_decay if kind == 1 else 0.0))
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True})


def _pipeline(config: RunConfig, build: BuildContext, parallel: Parallel) -> PipelineModule:
    topology = PipeModelDataParallelTopology(
        num_pp=parallel.stages, num_mp=parallel.tensor_group.size(), num_dp=parallel.replica_group.size()
    )
    shared = StageAttention(config.model, build)
    model = PipelineModule(
        layer_specs(config.model, build, shared, tied_attributes(config)),
        topology=topology,
        loss_fn=partial(stage_loss, build, shared),
        partition_method="type:LayerStage",
        seed_layers=False,
    )
    model.canonical_name = canonical_name(config.model.layers)
    model.stage_attention = shared  # what the step at hand asks for is told there
    return model


def ahead_of(engine: deepspeed.DeepSpeedEngine, config: RunConfig, parallel: Parallel) -> Ahead:
    """What this rank's part of the model asks of every micro-batch."""
    return Ahead.of(
        engine.module,
        config.model,
        parallel.device,
        parallel.tensor_group.size(),
        context=engine.module.context_parallel,
        predicts=parallel.stage == parallel.stages - 1,
        from_logits=config.distill.logits > 0,
    )


def _check_agreement(engine: deepspeed.DeepSpeedEngine, parallel: Parallel) -> None:
    """DeepSpeed's topology and megatron-core's groups must place every rank alike."""
    grid = engine.grid
    ranks = torch.distributed.get_process_group_ranks
    pairs = {
        "stage": (grid.get_stage_id(), parallel.stage),
        "data-parallel ranks": (ranks(grid.get_data_parallel_group()), ranks(parallel.replica_group)),
        "tensor-parallel ranks": (ranks(grid.get_slice_parallel_group()), ranks(parallel.tensor_group)),
    }
    for what, (theirs, ours) in pairs.items():
        assert theirs == ours, f"{what}: DeepSpeed has {theirs}, megatron-core {ours}"


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


def rate_at(config: RunConfig, step: int) -> float:
    """Learning rate of a step (counted from 1), which a stage may begin with a rise of its own."""
    stage = config.stage(step)
    rate = learning_rate(step - 1, config.train.steps, stage.config.optimizer.lr, config.schedule)
    risen = step + 1 - stage.first
    return rate * risen / stage.warmup if risen < stage.warmup else rate


def set_stage(engine: deepspeed.DeepSpeedEngine, config: RunConfig, parallel: Parallel) -> None:
    """Let the engine follow a stage of the run: micro-batches of a step, and rotary positions.

    config: what holds in the stage.
    """
    count = accumulation_steps(config, parallel.data_size)
    if count != engine.gradient_accumulation_steps() or config.train.micro_batch != engine.train_micro_batch_size_per_gpu():
        engine.set_train_micro_batch_size(config.train.micro_batch)
        engine.set_train_batch_size(count * config.train.micro_batch * engine.dp_world_size)
        engine.micro_steps = 0  # whose remainder by their number in a step tells when it ends
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO has a copy
            engine.optimizer.gradient_accumulation_steps = count
    if parallel.stages > 1:
        engine.reset_activation_shape()
    model = engine.module
    (model.stage_attention if parallel.stages > 1 else model).config = config.model


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of every parameter group; that of Muon's matrices follows the same schedule from its own peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
