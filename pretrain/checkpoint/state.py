"""The engine's weights and optimizer state under canonical names, whatever ZeRO stage and tensor-parallel size.

Every parameter yields three fp32 tensors: ``model.NAME`` (master weight), ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; one that Muon
updates yields two: ``model.NAME`` and ``momentum_buffer.NAME``. ZeRO gives each data-parallel rank a run of a parameter's
elements; of a matrix that is up to three rectangles (the rest of a row, whole rows, the beginning of a row). Each rank writes
and reads exactly its own rectangles, so neither needs communication or memory beyond them, and any layout can read what
another wrote. A parameter split in strides (gate and up in one matrix) is several tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor, nn

from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.parallel import Parallel

KINDS = ("model", "exp_avg", "exp_avg_sq")
MUON_KINDS = ("model", "momentum_buffer")
RECTANGLES = 3  # that a run of a matrix's elements can consist of
ADAM_STEP = "optimizer.step"


@dataclass(frozen=True)
class Fragment:
    """A rectangle of a checkpoint tensor that this rank holds.

    Attributes:
        name: the whole tensor's.
        offsets, shape: of the rectangle within it.
        whole: the whole tensor's shape.
        which: 0 to 2, different for the rectangles that one parameter's run consists of.
        writes: whether this rank writes it; ranks that share a replicated parameter all read it, one writes.
        values: its elements, a flat view of the optimizer's memory.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    which: int
    writes: bool
    values: Tensor


def rectangles(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple, tuple, int]]:
    """The elements start..stop of a row-major tensor as (offsets, shape, which), in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,), 0
        return
    rows, columns = shape
    row, column = divmod(start, columns)
    if column:
        part = min(stop - start, columns - column)
        yield (row, column), (1, part), 1
        start, row = start + part, row + 1
    if full := max(0, stop - start) // columns:
        yield (row, 0), (full, columns), 0
        start, row = start + full * columns, row + full
    if start < stop:
        yield (row, 0), (1, stop - start), 2


def pieces(name: str, parameter: nn.Parameter) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint tensors of a parameter, as far as this rank's tensor-parallel part reaches."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps the shape there
    stride = parameter.partition_stride if _is_split(parameter) else 1
    if stride == 1:
        return [(name, shape)]
    assert parameter.partition_dim == 0, name  # so that a piece is a run of elements
    part = (shape[0] // stride, *shape[1:])
    return [(f"{name}.{i}", part) for i in range(stride)]


def _is_split(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def fragments(engine: deepspeed.DeepSpeedEngine, parallel: Parallel) -> Iterator[Fragment]:
    """Everything of weights and optimizer that this rank holds."""
    tensor_rank, tensor_size = parallel.tensor_group.rank(), parallel.tensor_group.size()
    rename = getattr(engine.module, "canonical_name", str)  # a pipeline numbers its layers in its own way
    for name, parameter in engine.module.named_parameters():
        name = rename(name)
        split = _is_split(parameter)
        # The last stage has the tied embedding too; the first one writes it.
        owner = (split or tensor_rank == 0) and not (parallel.stage > 0 and name.startswith("embedding."))
        for kind in MUON_KINDS if getattr(parameter, "use_muon", False) else KINDS:
            first, run = _run(engine, parameter, kind)
            begin = 0  # of the piece among the parameter's elements
            for piece, shape in pieces(f"{kind}.{name}", parameter):
                end = begin + math.prod(shape)
                a, b = max(first, begin), min(first + len(run), end)
                shift, whole = [0] * len(shape), list(shape)
                if split:
                    shift[parameter.partition_dim] = tensor_rank * shape[parameter.partition_dim]
                    whole[parameter.partition_dim] *= tensor_size
                for offsets, part, which in rectangles(a - begin, b - begin, shape):
                    values = run[a - first : a - first + math.prod(part)]
                    offsets = tuple(x + y for x, y in zip(offsets, shift))
                    yield Fragment(piece, offsets, part, tuple(whole), which, owner, values)
                    a += math.prod(part)
                begin = end


def _run(engine, parameter: nn.Parameter, kind: str) -> tuple[int, Tensor]:
    """The number of the first of a parameter's elements that this rank's optimizer holds, and those elements, flat."""
    zero, key = engine.optimizer, None if kind == "model" else kind
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last ones padded
        held, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        first = len(held) * torch.distributed.get_rank(parameter.ds_process_group)
        return first, held[: max(0, parameter.ds_numel - first)]
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)


def adam_step(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Updates done so far (skipped steps are none), fp32 [1] on CPU."""
    return torch.as_tensor(_adam_states(engine)[0]["step"]).detach().float().cpu().reshape(1)


@torch.no_grad()
def load_state(engine: deepspeed.DeepSpeedEngine, parallel: Parallel, source: TensorDirectory, weights_only: bool) -> None:
    """Fill weights and, unless ``weights_only``, optimizer state from a checkpoint's tensors. A collective.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    for fragment in fragments(engine, parallel):
        if weights_only and not fragment.name.startswith("model."):
            continue
        source.expect(fragment.name, fragment.whole)
        values = source.read(fragment.name, fragment.offsets, fragment.shape)
        fragment.values.copy_(values.reshape(-1))
    if not weights_only:
        source.expect(ADAM_STEP, (1,))
        for adam in _adam_states(engine):
            adam["step"].copy_(source.read(ADAM_STEP)[0])
    _refresh_compute_weights(engine)


def _adam_states(engine) -> list[dict]:
    return [s for s in engine.optimizer.optimizer.state.values() if "step" in s]


def allocate_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give Adam its moments, and Muon its momentum, before the first step: a load comes before it, and DeepSpeed links master
    weights to them once, after the first parameter group's first step, when those of later groups would not exist yet."""
    zero = engine.optimizer
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    flat_groups = next(getattr(zero, n) for n in names if hasattr(zero, n))
    of_muon = {id(p) for group in zero.optimizer.param_groups if group.get("use_muon") for p in group["params"]}
    for flat in flat_groups:
        if id(flat) in of_muon:
            zero.optimizer.state[flat] = {"momentum_buffer": torch.zeros_like(flat)}
            continue
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
