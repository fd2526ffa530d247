"""The engine's weights and optimizer state under canonical names, whatever ZeRO stage and tensor-parallel size.

Every parameter yields three fp32 tensors: ``model.NAME`` (master weight), ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; one that Muon
updates yields two: ``model.NAME`` and ``momentum_buffer.NAME``. ZeRO gives each data-parallel rank a run of a parameter's
elements; of a matrix that is up to three rectangles (the rest of a row, whole rows, the beginning of a row). Each rank writes
and reads exactly its own rectangles, so neither needs communication or memory beyond them, and any layout can read what
another wrote. A parameter split in strides (gate and up in one matrix) is several tensors. Moments that the optimizer keeps in
fewer bits (:mod:`unfold.pretrain.train.compact`) are fp32 here too, and stored again as they were.

A parameter that is not trained has its weights alone, in the precision that it computes in; every replica reads them, each writes
a part. Rows that are a parameter of their own (:mod:`unfold.model.rows`) stand in their matrix, so that it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor, nn

from unfold.model.lora import A, B
from unfold.model.rows import ROWS
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.train.compact import CompactAdamW, PackedMoment, in_pieces

KINDS = ("model", "exp_avg", "exp_avg_sq")
MUON_KINDS = ("model", "momentum_buffer")
AVERAGE = "average"
ADAM_STEP = "optimizer.step"


@dataclass(frozen=True)
class Fragment:
    """A rectangle of a checkpoint tensor that this rank holds.

    Attributes:
        name: the whole tensor's.
        offsets, shape: of the rectangle within it.
        whole: the whole tensor's shape.
        writes: whether this rank writes it; ranks that share a replicated parameter all read it, one writes.
        values: its elements, a flat view of the optimizer's memory.
        packed: the moment whose codes ``values`` are, where the optimizer keeps it in 8 bits.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    writes: bool
    values: Tensor
    packed: PackedMoment | None = None

    def copy_to(self, target: Tensor) -> None:
        """Copy its elements, ``values`` or what their codes mean; a GPU is not waited for. target: fp32, flat."""
        if self.packed is None:
            target.copy_(self.values, non_blocking=True)
            return
        first = self.values.storage_offset()
        for begin, end in in_pieces(self.values):  # at once they would need more memory than 8 bits save
            target[begin:end].copy_(self.packed.read(first + begin, first + end), non_blocking=True)

    def write(self, values: Tensor) -> None:
        """Set its elements; those in codes when the optimizer's ``finish`` is called. values: flat."""
        if self.packed:
            self.packed.write(self.values.storage_offset(), values)
        else:
            self.values.copy_(values)


def rectangles(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple, tuple]]:
    """The elements start..stop of a row-major tensor as (offsets, shape), in order: of a matrix at most three."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    rows, columns = shape
    row, column = divmod(start, columns)
    if column:
        part = min(stop - start, columns - column)
        yield (row, column), (1, part)
        start, row = start + part, row + 1
    if full := max(0, stop - start) // columns:
        yield (row, 0), (full, columns)
        start, row = start + full * columns, row + full
    if start < stop:
        yield (row, 0), (1, stop - start)


@dataclass(frozen=True)
class Place:
    """Where a run of a parameter's elements stands in the checkpoint.

    Attributes:
        name: of the tensor, without its kind.
        first: number of the run's first element among the parameter's, on this rank.
        shape: of the run; offsets: where it begins in the tensor; whole: the tensor's shape.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    whole: tuple[int, ...]


def pieces(name: str, parameter: nn.Parameter) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint tensors of a parameter, as far as this rank's tensor-parallel part reaches."""
    shape = _shape(parameter)
    stride = parameter.partition_stride if _is_split(parameter) else 1
    if stride == 1:
        return [(name, shape)]
    assert parameter.partition_dim == 0, name  # so that a piece is a run of elements
    part = (shape[0] // stride, *shape[1:])
    return [(f"{name}.{i}", part) for i in range(stride)]


def places(name: str, parameter: nn.Parameter, rank: int, size: int) -> list[Place]:
    """Where a parameter's elements stand, all of this rank's part of it. rank, size: of the tensor-parallel group."""
    found, first = [], 0
    for piece, shape in pieces(name, parameter):
        offsets, whole = [0] * len(shape), list(shape)
        if _is_split(parameter):
            offsets[parameter.partition_dim] = rank * shape[parameter.partition_dim]
            whole[parameter.partition_dim] *= size
        found.append(Place(piece, first, shape, tuple(offsets), tuple(whole)))
        first += math.prod(shape)
    return found


def _without_rows(place: Place, ids: tuple[int, ...]) -> Iterator[Place]:
    """A matrix's place without these of its rows, which are elsewhere."""
    (begin, _), (rows, width) = place.offsets, place.shape
    edges = [begin - 1, *(i for i in ids if begin <= i < begin + rows), begin + rows]
    for before, after in zip(edges, edges[1:]):
        if after - before > 1:
            start = before + 1
            yield Place(place.name, (start - begin) * width, (after - start, width), (start, 0), place.whole)


def _rows_in_matrix(matrix: Place, ids: tuple[int, ...]) -> Iterator[Place]:
    """The rows' places in their matrix, one after the other. matrix: any part of it."""
    width = matrix.whole[1]
    for i, row in enumerate(ids):
        yield Place(matrix.name, i * width, (1, width), (row, 0), matrix.whole)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps the shape there


def _is_split(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


class RunningAverage:
    """The exponential average of a run's trained weights: ``average += (1 - decay) * (weight - average)`` after every update.

    It lies beside the fp32 weights that each rank's optimizer holds, so it needs no communication.
    """

    def __init__(self, decay: float):
        """decay: 0 keeps none."""
        self._decay = decay
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # address of weights -> (these weights, their average), flat

    def __bool__(self) -> bool:
        return self._decay > 0

    def of(self, weights: Tensor) -> Tensor:
        """The average of these weights of the optimizer, which begins with them; always the same memory."""
        if weights.data_ptr() not in self._held:
            self._held[weights.data_ptr()] = weights, weights.detach().clone()
        return self._held[weights.data_ptr()][1]

    @torch.no_grad()
    def begin(self) -> None:
        """Begin with the weights as they are."""
        for weights, average in self._held.values():
            average.copy_(weights)

    @torch.no_grad()
    def update(self) -> None:
        """The weights were updated."""
        if self._held:
            weights, averages = zip(*self._held.values())
            torch._foreach_lerp_(averages, weights, 1 - self._decay)


def fragments(engine: deepspeed.DeepSpeedEngine, parallel: Parallel, average: RunningAverage | None = None) -> Iterator[Fragment]:
    """Everything of weights and optimizer that this rank holds, and of their average where there is one."""
    tensor_rank, tensor_size = parallel.tensor_group.rank(), parallel.tensor_group.size()
    rename = getattr(engine.module, "canonical_name", str)  # a pipeline numbers its layers in its own way
    parameters = {rename(name): parameter for name, parameter in engine.module.named_parameters()}
    compact = _compact(engine)
    for name, parameter in parameters.items():
        # The last stage has the tied embedding too; the first one writes it.
        owner = (_is_split(parameter) or tensor_rank == 0) and not (parallel.stage > 0 and name.startswith("embedding."))
        standing = places(name, parameter, tensor_rank, tensor_size)
        ids = getattr(parameter, "row_ids", ())
        is_rows = bool(ids) and name.endswith(f".{ROWS}")
        matrix = parameters[name.removesuffix(ROWS) + "weight"] if is_rows else None
        for kind in _kinds(parameter):
            where = standing
            if is_rows and (kind == "model" or matrix.requires_grad):  # else nothing of the matrix stands under this kind
                whole = places(name.removesuffix(ROWS) + "weight", matrix, tensor_rank, tensor_size)[0]
                where = list(_rows_in_matrix(whole, ids))
            elif ids and not is_rows:
                where = [part for place in standing for part in _without_rows(place, ids)]
            for first, run, writes in _runs(engine, parallel, parameter, kind):
                yield from _cut(kind, where, first, run, owner and writes, compact.packed(run) if compact else None)
        if average and parameter.requires_grad:  # it stands where the moments do
            for first, run, writes in _runs(engine, parallel, parameter, "model"):
                if len(run):
                    yield from _cut(AVERAGE, where, first, average.of(run), owner and writes)


def _kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    if not parameter.requires_grad:
        return KINDS[:1]
    return MUON_KINDS if getattr(parameter, "use_muon", False) else KINDS


def _compact(engine: deepspeed.DeepSpeedEngine) -> CompactAdamW | None:
    """The optimizer that keeps moments in fewer bits, where this is one."""
    inner = engine.optimizer.optimizer
    return inner if isinstance(inner, CompactAdamW) else None


def _cut(
    kind: str, where: list[Place], first: int, run: Tensor, writes: bool, packed: PackedMoment | None = None
) -> Iterator[Fragment]:
    """A run of a parameter's elements, the first one's number being ``first``, as rectangles of tensors."""
    for place in where:
        a, b = max(first, place.first), min(first + len(run), place.first + math.prod(place.shape))
        for offsets, part in rectangles(a - place.first, b - place.first, place.shape):
            values = run[a - first : a - first + math.prod(part)]
            offsets = tuple(x + y for x, y in zip(offsets, place.offsets))
            yield Fragment(f"{kind}.{place.name}", offsets, part, place.whole, writes, values, packed)
            a += math.prod(part)


def _runs(engine, parallel: Parallel, parameter: nn.Parameter, kind: str) -> Iterator[tuple[int, Tensor, bool]]:
    """Runs of a parameter's elements that this rank holds: the first one's number, the elements, flat, whether it writes them."""
    zero, key = engine.optimizer, None if kind == "model" else kind
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last ones padded
        if parameter.requires_grad:
            held, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        else:
            held = parameter.ds_tensor.data
        first = len(held) * torch.distributed.get_rank(parameter.ds_process_group)
        yield first, held[: max(0, parameter.ds_numel - first)], True
    elif not parameter.requires_grad:  # whole on every rank: each writes its part
        flat, size, mine = parameter.data.view(-1), parallel.replica_group.size(), parallel.replica_group.rank()
        step = -(-len(flat) // size)
        for i in range(size):
            yield i * step, flat[i * step : (i + 1) * step], i == mine
    elif parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        yield mapping.lp_fragment_address.start, mapping.get_hp_fragment(key), True


def adam_step(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Updates that Adam has done so far (skipped steps are none; 0 where it has nothing to train), fp32 [1] on CPU.

    A copy: a checkpoint is written while Adam goes on to count.
    """
    step = next((state["step"] for state in _adam_states(engine)), 0)
    return torch.tensor([float(step)])


@torch.no_grad()
def load_state(
    engine: deepspeed.DeepSpeedEngine,
    parallel: Parallel,
    source: TensorDirectory,
    weights_only: bool,
    average: RunningAverage | None = None,
) -> None:
    """Fill weights and, unless ``weights_only``, optimizer state and adapters from a checkpoint's tensors. A collective.

    average: filled too; where the checkpoint has none, or ``weights_only``, it begins with the weights.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    stored = not weights_only and any(name.startswith(f"{AVERAGE}.") for name in source.shapes)
    for fragment in fragments(engine, parallel, average if stored else None):
        if weights_only and (not fragment.name.startswith("model.") or _of_adapter(fragment.name)):
            continue
        source.expect(fragment.name, fragment.whole)
        values = source.read(fragment.name, fragment.offsets, fragment.shape)
        fragment.write(values.reshape(-1))
    if compact := _compact(engine):
        compact.finish()
    if not weights_only:
        source.expect(ADAM_STEP, (1,))
        for adam in _adam_states(engine):
            adam["step"].copy_(source.read(ADAM_STEP)[0])
    if average and not stored:
        average.begin()
    _refresh_compute_weights(engine)


@torch.no_grad()
def load_adapter(engine: deepspeed.DeepSpeedEngine, parallel: Parallel, adapter: dict[str, Tensor | dict[int, Tensor]]) -> None:
    """Fill adapters, and rows of vocabulary matrices, with those that :func:`unfold.pretrain.hf.adapter.read_adapter` gives."""
    for fragment in fragments(engine, parallel):
        given = adapter.get(fragment.name)
        if given is None:
            continue
        values, begin = fragment.values.view(fragment.shape), fragment.offsets
        if isinstance(given, Tensor):
            values.copy_(given[tuple(slice(a, a + n) for a, n in zip(begin, fragment.shape))])
            continue
        for row, content in given.items():
            if begin[0] <= row < begin[0] + fragment.shape[0]:
                values[row - begin[0]].copy_(content[begin[1] : begin[1] + fragment.shape[1]])
    _refresh_compute_weights(engine)


def _of_adapter(name: str) -> bool:
    return any(part in (A, B) for part in name.split("."))


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
        if compact := _compact(engine):
            compact.allocate(flat)
            continue
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
