"""Run by test_scale.py: one rank of a large run, started by itself: fake process groups, tensors without memory.

Everything that :func:`unfold.pretrain.train.engine.build_engine` does is done: modules, groups, DeepSpeed's engine and its
division of the optimizer; nothing is computed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from unfold.pretrain import parallel
from unfold.pretrain.checkpoint.state import fragments
from unfold.pretrain.config import load_config
from unfold.pretrain.train.engine import build_engine

SENDING = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather",
    "broadcast",
    "reduce_scatter_tensor",
    "all_gather_object",
    "barrier",
)


def convert_in_place(module: nn.Module, change, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, whose way of exchanging parameters does not know tensors without memory."""
    for child in module.children():
        convert_in_place(child, change)
    for parameter in filter(lambda p: p is not None, module._parameters.values()):
        with torch.no_grad():
            parameter.data = change(parameter.data)
    return module


def counted(counts: Counter) -> None:
    """Count calls of collectives and groups that are made, and the groups that this rank is in."""
    for name in SENDING:
        real = getattr(dist, name)

        def call(*args, _name=name, _real=real, **kwargs):
            counts[_name] += 1
            return _real(*args, **kwargs)

        setattr(dist, name, call)
    make = dist.new_group

    def new_group(ranks=None, **kwargs):
        counts["groups made"] += 1
        counts["groups of this rank"] += ranks is None or dist.get_rank() in ranks
        return make(ranks, **kwargs | {"backend": "fake"})

    dist.new_group = new_group


def live_bytes() -> int:
    """Bytes that all tensors would take; storages are shared."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(storages.values())


def start(config_file: str, overrides: list[str], rank: int, world: int) -> dict:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    counts: Counter = Counter()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    counted(counts)
    nn.Module._apply = convert_in_place
    Tensor.tolist, Tensor.item = (lambda x: [0] * x.numel()), (lambda x: 0)  # numbers that DeepSpeed logs
    config = load_config(config_file, overrides)
    groups = parallel.initialize(config.parallel)
    before = live_bytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = build_engine(config, groups)
        held = live_bytes() - before
        written = [f for f in fragments(engine, groups) if f.writes]
    places = {f.name: [list(f.offsets), list(f.shape)] for f in written}
    return {
        "place": [groups.stage, groups.data_rank, groups.context_group.rank(), groups.tensor_group.rank()],
        "sharing": [dist.get_process_group_ranks(g) for g in (groups.gists_group, groups.heads_group) if g.size() > 1],
        "replicas": groups.replica_group.size(),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "held": held,
        "rectangles": len(written),
        "written": sum(f.values.numel() for f in written) * 4,
        "index": len(json.dumps(places)),
        "calls": dict(counts),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    print("RESULT " + json.dumps(start(args.config, args.overrides, args.rank, args.world)), flush=True)
    os._exit(0)  # there is nothing to end in an orderly way
