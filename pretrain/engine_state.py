"""The engine's weights and optimizer state under canonical names, whatever ZeRO stage and tensor-parallel size.

Every parameter yields three fp32 tensors: ``model.NAME`` (master weight), ``exp_avg.NAME`` and ``exp_avg_sq.NAME``. What a
tensor-parallel rank holds a part of is handed over as a DTensor, so that torch.distributed.checkpoint sees whole tensors
and any layout can read what another wrote. A parameter split in strides (gate and up in one matrix) is several tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

KINDS = ("model", "exp_avg", "exp_avg_sq")


def piece_names(name: str, parameter: nn.Parameter) -> list[str]:
    """Names of the checkpoint tensors of a parameter."""
    stride = _stride(parameter)
    return [name] if stride == 1 else [f"{name}.{i}" for i in range(stride)]


def _stride(parameter: nn.Parameter) -> int:
    return parameter.partition_stride if getattr(parameter, "tensor_model_parallel", False) else 1


def to_pieces(parameter: nn.Parameter, local: Tensor, mesh: DeviceMesh | None) -> list[Tensor]:
    """This rank's fp32 tensor of a parameter as checkpoint tensors; ``mesh`` None means that it is whole."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return [local]
    dim = parameter.partition_dim
    chunks = [chunk.contiguous() for chunk in local.chunk(_stride(parameter), dim)]
    return chunks if mesh is None else [DTensor.from_local(c, mesh, [Shard(dim)], run_check=False) for c in chunks]


def from_pieces(parameter: nn.Parameter, pieces: list[Tensor]) -> Tensor:
    """The inverse of :func:`to_pieces`."""
    local = [piece.to_local() if isinstance(piece, DTensor) else piece for piece in pieces]
    return local[0] if len(local) == 1 else torch.cat(local, parameter.partition_dim)


def _named_tensors(engine) -> Iterator[tuple[str, nn.Parameter, str]]:
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            yield name, parameter, kind


def read_state(engine: deepspeed.DeepSpeedEngine, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Checkpoint tensors of weights and optimizer. A collective: all ranks call it."""
    state = {}
    for name, parameter, kind in _named_tensors(engine):
        local = safe_get_full_fp32_param(parameter) if kind == "model" else safe_get_full_optimizer_state(parameter, kind)
        for piece_name, piece in zip(piece_names(name, parameter), to_pieces(parameter, local, mesh)):
            state[f"{kind}.{piece_name}"] = piece
    state["optimizer.step"] = torch.as_tensor(_adam_states(engine)[0]["step"]).detach().clone().float().cpu()
    return state


def empty_state(engine: deepspeed.DeepSpeedEngine, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Tensors of the same names and shapes, to be filled by a load."""
    state = {}
    for name, parameter, kind in _named_tensors(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the whole shape there
        local = torch.empty(shape, dtype=torch.float32, device=engine.device)
        for piece_name, piece in zip(piece_names(name, parameter), to_pieces(parameter, local, mesh)):
            state[f"{kind}.{piece_name}"] = piece
    state["optimizer.step"] = torch.zeros(())
    return state


def write_state(engine: deepspeed.DeepSpeedEngine, state: dict[str, Tensor]) -> None:
    """Put checkpoint tensors into weights and optimizer; the inverse of :func:`read_state`. A collective."""
    for name, parameter, kind in _named_tensors(engine):
        value = from_pieces(parameter, [state[f"{kind}.{n}"] for n in piece_names(name, parameter)])
        if kind == "model":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    for adam in _adam_states(engine):
        adam["step"].copy_(state["optimizer.step"])
    _refresh_compute_weights(engine)


def _adam_states(engine) -> list[dict]:
    return [s for s in engine.optimizer.optimizer.state.values() if "step" in s]


def allocate_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give Adam its moments before the first step: a load comes before it, and DeepSpeed links master weights to
    moments once, after the first parameter group's first step, when those of later groups would not exist yet."""
    zero = engine.optimizer
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    flat_groups = next(getattr(zero, n) for n in names if hasattr(zero, n))
    for flat in flat_groups:
        zero.optimizer.state[flat] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _refresh_compute_weights(engine) -> None:
    """Copy the master weights into the weights that forward reads."""
    zero = engine.optimizer
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
        return
    for compute, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat):
        if compute is not None:
            compute.data.copy_(master.data)
    if zero.persistent_parameters:  # small parameters that ZeRO-3 keeps whole
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
