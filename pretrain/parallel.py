"""All process groups of a run, made once and handed on as one object."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from unfold.model.kinds import Kinds
from unfold.model.parallel.context import ContextParallel
from unfold.model.parallel.megatron import parallel_state
from unfold.model.parallel.tensor import Alone, Group
from unfold.pretrain.config import ParallelConfig
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the run.

    Attributes:
        rank, world: global rank and number of ranks.
        device: where this rank computes.
        data_group: ranks that see different samples, with the same part of the model and of every sequence.
        host_group: the same ranks, for numbers that lie in host memory: adding these up waits for no GPU.
        replica_group: ranks that hold the same part of the model: data_group x context_group. Gradients are averaged over
            it, and ZeRO partitions over it.
        tensor_group: ranks that share every layer.
        context_group: ranks that share every sequence, in the order of its parts.
        gists_group, heads_group: those of them that exchange gists, and those, next to one another, that trade the sequence for
            heads: either is all of them, or each rank is in one of both.
        stage, stages: pipeline stage of this rank, and how many there are.
    """

    rank: int
    world: int
    device: torch.device
    data_group: ProcessGroup
    host_group: ProcessGroup
    replica_group: ProcessGroup
    tensor_group: ProcessGroup
    context_group: ProcessGroup
    gists_group: Group
    heads_group: Group
    stage: int
    stages: int

    @property
    def data_size(self) -> int:
        return self.data_group.size()

    @property
    def data_rank(self) -> int:
        return self.data_group.rank()

    @property
    def is_main(self) -> bool:
        """The one rank that writes logs and metrics."""
        return self.rank == 0

    def context_parallel(self, kinds: Kinds) -> ContextParallel | None:
        """How ranks share sequences, for layers of some kinds; None where every rank has whole ones."""
        return ContextParallel(self.gists_group, self.heads_group, kinds) if self.context_group.size() > 1 else None

    def mpu(self) -> ModelParallelUnit:
        """What DeepSpeed asks of a model-parallel run."""
        return ModelParallelUnit(self)

    def sum_over_data(self, value: float) -> float:
        """Sum of a number that hosts know over the data-parallel ranks; fp64, in rank order, so the same on every run."""
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.item()

    def sum_over_replicas(self, values: Sequence[float | Tensor]) -> Tensor:
        """Sums of numbers over the data- and context-parallel ranks: fp64 [numbers] on the device, which nobody waits for."""
        return self._sums(values, self.replica_group)

    def sum_over_parts(self, values: Sequence[float | Tensor]) -> Tensor:
        """The same over all ranks, each of which holds a part of them."""
        return self._sums(values, dist.group.WORLD)

    def vector(self, values: Sequence[float | Tensor]) -> Tensor:
        """Numbers, some of which may be on the device already: fp64 [numbers] there. An offloaded optimizer's are on the host."""
        like = {"dtype": torch.float64, "device": self.device}
        number = lambda x: x.to(**like) if isinstance(x, Tensor) else torch.full((), x, **like)
        return torch.stack([number(x) for x in values])

    def _sums(self, values: Sequence[float | Tensor], group: ProcessGroup) -> Tensor:
        total = self.vector(values)
        dist.all_reduce(total, group=group)
        return total


class ModelParallelUnit:
    """The interface through which DeepSpeed learns the groups. It must not offer more: DeepSpeed reacts to what it finds."""

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    def get_data_parallel_group(self):
        return self._parallel.replica_group

    def get_data_parallel_world_size(self):
        return self._parallel.replica_group.size()

    def get_data_parallel_rank(self):
        return self._parallel.replica_group.rank()

    def get_model_parallel_group(self):
        return self._parallel.tensor_group

    def get_model_parallel_world_size(self):
        return self._parallel.tensor_group.size()

    def get_model_parallel_rank(self):
        return self._parallel.tensor_group.rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def initialize(config: ParallelConfig) -> Parallel:
    """Start torch.distributed and make every group. Under torchrun or SLURM the ranks come from the environment;
    without one this process is the only rank.

    Raises:
        UserError: the ranks cannot be divided as configured.
    """
    # DeepSpeed insists on these variables; without a launcher this process is the only rank.
    for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model_size = config.tensor * config.pipeline * config.context
    if world % model_size:
        raise UserError(
            f"parallel: tensor x pipeline x context = {model_size} does not divide the {world} rank(s) that were started; "
            f"start a multiple of {model_size}"
        )
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=config.timeout_minutes)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        store = {} if world > 1 else {"store": dist.HashStore()}
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, **store)
    # DeepSpeed would compile a shared-memory all-reduce for CPU at start (about 50 s) that these runs do not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            context_parallel_size=config.context,
            hierarchical_context_parallel_sizes=[config.heads_ranks, config.gists_ranks] if config.context_heads > 1 else None,
        )
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    context_group = parallel_state.get_context_parallel_group()
    if config.context_heads > 1:
        heads_group, gists_group = parallel_state.get_hierarchical_context_parallel_groups()
    else:
        heads_group, gists_group = (context_group, Alone()) if config.gists_ranks == 1 else (Alone(), context_group)
    return Parallel(
        rank=rank,
        world=world,
        device=device,
        data_group=parallel_state.get_data_parallel_group(),
        host_group=parallel_state.get_data_parallel_group_gloo(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor_group=tensor_group,
        context_group=context_group,
        gists_group=gists_group,
        heads_group=heads_group,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        stages=config.pipeline,
    )


def shutdown() -> None:
    """End torch.distributed cleanly."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
