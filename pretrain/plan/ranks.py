"""Which rank does what: the division of a cluster's GPUs, as :mod:`unfold.pretrain.parallel` makes it when a run starts."""

from __future__ import annotations

from dataclasses import dataclass

from unfold.pretrain.config import RunConfig, accumulation_steps
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.hardware import Cluster

SHOWN = 16  # ranks of a table before it is abbreviated


@dataclass(frozen=True)
class Division:
    """How many ranks each kind of parallelism has, and micro-batches of a rank per step."""

    tensor: int
    context: int
    data: int
    pipeline: int
    micro_batches: int

    @classmethod
    def of(cls, config: RunConfig, gpus: int) -> Division:
        """Raises UserError where the GPUs or the global batch cannot be divided as configured."""
        parallel = config.parallel
        model_size = parallel.tensor * parallel.pipeline * parallel.context
        if gpus % model_size:
            raise UserError(
                f"parallel: tensor x pipeline x context = {model_size} does not divide --gpus {gpus}; "
                f"{-(-gpus // model_size) * model_size} GPUs would do"
            )
        data = gpus // model_size
        return cls(parallel.tensor, parallel.context, data, parallel.pipeline, accumulation_steps(config, data))

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model: ZeRO partitions over them."""
        return self.data * self.context

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """(pipeline, data, context, tensor) of a rank: tensor-parallel ranks are neighbours, stages are farthest apart."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return pipeline, data, context, tensor


def rank_table(division: Division, cluster: Cluster) -> list[str]:
    """One line per rank; of many, the first and last ones."""
    head = f"{'rank':>6} {'node':>5} {'pipeline':>9} {'data':>5} {'context':>8} {'tensor':>7}"
    ranks = list(range(division.ranks))
    if len(ranks) > SHOWN:
        ranks = [*ranks[: SHOWN - 4], None, *ranks[-3:]]
    lines = [head]
    for rank in ranks:
        if rank is None:
            lines.append(f"{'..':>6}")
            continue
        pipeline, data, context, tensor = division.place(rank)
        lines.append(f"{rank:>6} {rank // cluster.gpus_per_node:>5} {pipeline:>9} {data:>5} {context:>8} {tensor:>7}")
    return lines
