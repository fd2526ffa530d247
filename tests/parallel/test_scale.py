"""Large runs, started rank by rank in shape (tests/parallel/in_shape.py): bytes as planned, start-up work that grows more
slowly than the number of ranks."""

from __future__ import annotations

import json
import os
import re
import sys
from functools import lru_cache

import pytest

from tests.conftest import ROOT, run
from unfold.pretrain.config import RunConfig, load_config
from unfold.pretrain.plan.activations import element_size
from unfold.pretrain.plan.hardware import Cluster, find_gpu
from unfold.pretrain.plan.make import Planner
from unfold.pretrain.plan.memory import BUCKET

pytestmark = pytest.mark.long
CONFIGS = ROOT / "launch" / "configs"


@lru_cache
def started(name: str, rank: int, world: int, *overrides: str) -> dict:
    command = [sys.executable, "-m", "tests.parallel.in_shape", str(CONFIGS / f"{name}.yaml"), str(rank), str(world)]
    done = run(*command, *overrides, env=os.environ, timeout=600)
    return json.loads(re.search(r"RESULT (.*)", done.stdout)[1])


@pytest.mark.parametrize(
    "name,rank,world",
    [("llama-3.1-70b", 5, 128), ("llama-3.1-70b", 127, 128), ("llama-3.1-70b", 5, 1024), ("llama-3.1-70b", 700, 1024),
     ("llama-3.1-8b-1m", 3, 8)],
)  # fmt: skip
def test_a_rank_holds_what_the_plan_says(name, rank, world):
    assert_as_planned(started(name, rank, world), load_config(CONFIGS / f"{name}.yaml"), rank, world)


@pytest.mark.parametrize(
    "rank,world,tensor,gists,heads",
    [(37, 64, 1, [37, 45, 53, 61], list(range(32, 40))), (21, 64, 2, [5, 21, 37, 53], list(range(17, 32, 2)))],
)
def test_nodes_exchange_gists_and_their_ranks_trade_heads(rank, world, tensor, gists, heads):
    """8 x 4 ranks share every sequence: eight of a node, or of two nodes where two of each share layers, and four such groups."""
    overrides = (
        "parallel.context=32", "parallel.context_heads=8", "parallel.context_method=gists", f"parallel.tensor={tensor}",
        "model.kv_heads=16", "data.raw_tokens=65536", "train.global_batch=2",
    )  # fmt: skip
    found = started("llama-3.1-8b-1m", rank, world, *overrides)
    assert found["sharing"] == [gists, heads]
    assert_as_planned(found, load_config(CONFIGS / "llama-3.1-8b-1m.yaml", list(overrides)), rank, world)


def assert_as_planned(found: dict, config: RunConfig, rank: int, world: int) -> None:
    plan = Planner(Cluster(find_gpu("H100", None), world, 8)).plan(config)
    pipeline, data, context, tensor = plan.division.place(rank)
    assert found["place"] == [pipeline, data, context, tensor] and found["replicas"] == plan.division.replicas
    memory = plan.memory[pipeline]
    planned = memory.weights + memory.gradients + memory.optimizer
    if config.parallel.zero == 3:  # made before the first step, and counted among the buffers
        planned += element_size(config) * BUCKET
    assert found["held"] == pytest.approx(planned, rel=0.02)
    # The checkpoint is of master weights and moments: a rank writes its part of them, and nothing twice.
    assert found["written"] == pytest.approx(memory.optimizer, rel=0.02)


def test_starting_costs_a_rank_no_more_in_a_larger_run():
    """Eight times the ranks: as many groups and collectives for each, and no more to tell of a checkpoint in all."""
    few, many = started("llama-3.1-70b", 5, 128), started("llama-3.1-70b", 5, 1024)
    for name in ("broadcast", "all_reduce", "groups of this rank"):
        assert many["calls"][name] == few["calls"][name], name
    assert 8 * many["rectangles"] < 2 * few["rectangles"]
    assert 8 * many["index"] < few["index"] * 1.5
    # Every rank names every group, its own or not; that is a list of numbers each, without a word to another rank.
    assert many["calls"]["groups made"] < 8 * few["calls"]["groups made"]
