"""Run by test_ahead.py in a process of its own: which plans real ranks make ahead, and which in a step."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from tests.forked import run_ranks
from tests.made import Made, make_batch, make_model, with_losses
from unfold.model.ahead import Ahead
from unfold.model.parallel.context import ContextParallel
from unfold.model.parallel.tensor import Alone


def check(context: ContextParallel, kinds: tuple[str, ...]) -> None:
    model = make_model(kinds, context=context)
    ahead = Ahead.of(model, model.config, torch.device("cpu"), context=context, from_logits=True)
    batches = [make_batch("routed", (1,), multiple=2) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        loss = model(with_losses(batches[0]))
        loss.backward()
        asked = made.take()
        ahead.prepare(batches[1])
        before = made.take()
        again = model(with_losses(batches[1]))
        again.backward()
        late = made.take()
    assert torch.equal(loss, again)
    assert sorted(before) == asked and not late, (before, late, asked)


def rank_main(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for kinds in (("gist",), ("gist", "window:4", "dense")):
        check(ContextParallel(dist.group.WORLD, Alone(), kinds if len(kinds) > 1 else "gist"), kinds)
        if rank == 0:
            print("ALIKE", kinds, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_ranks(rank_main, int(sys.argv[1])))
