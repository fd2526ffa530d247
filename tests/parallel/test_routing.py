"""The routing loss, samples that forget or unfold everything, and stages: under every layout the same as in one process."""

from __future__ import annotations

import pytest

from tests.integration.runs import series, train, train_until_killed
from tests.integration.test_train import EXACT
from tests.parallel.test_layouts import LAYOUTS
from tests.supervised import make_shard

GIST = {
    "chunk_sizes": [4, 2],
    "recall": "all",
    "own_group": True,
    "route_loss": 1.0,
    "route_queries": 40,
    "route_far": True,
    "unfold_share": 0.3,
    "forget_share": 0.2,
}
TRAIN = {
    "steps": 6,
    "valid_every": 3,
    "stages": [{"until": 2, "unfold_all": True}, {"until": 4, "topk": 3, "route_loss": 0.5}],
}
SHORT = ("tp2 sequence", "pp2 checkpointing", "cp2", "cp2 ulysses2")
LONG = (
    "micro_batch 4", "dp2 zero2 micro_batch 2", "ulysses2", "activation checkpointing",
    "dp2 zero3", "dp2 zero2 offload", "tp2 pp2", "cp2 tp2 sequence", "cp2 pp2",
    "cp2 ulysses2 zero2 micro_batch 4",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return tiny.config(tmp_path_factory.mktemp("routing") / "c.yaml", gist=GIST, train=TRAIN, data={"raw_tokens": 256})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run")


def assert_same(metrics: list[dict], alone: list[dict]) -> None:
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got["route_loss"] == pytest.approx(want["route_loss"], rel=2e-6)
        # Of two gists that score all but the same, sums in another order may prefer the other: in one query of hundreds.
        assert got["unfolded_tokens"] == pytest.approx(want["unfolded_tokens"], rel=5e-4)
        assert got["selected_gists"] == pytest.approx(want["selected_gists"], rel=5e-4)
        assert ("valid_loss" in got) == ("valid_loss" in want)
        if "valid_loss" in want:
            assert got["valid_loss"] == pytest.approx(want["valid_loss"], rel=2e-6)


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    assert_same(train(config, tmp_path / "run", ranks, *settings), alone)


def test_stages_change_what_is_unfolded(alone):
    unfolded = [m["unfolded_tokens"] for m in alone]
    assert min(unfolded[:2]) > max(unfolded[2:])
    assert all(m["route_loss"] > 0 for m in alone)


def test_a_killed_run_goes_on_in_its_stage(config, alone, tmp_path):
    run_dir = tmp_path / "run"
    train_until_killed(config, run_dir, 1, 3)
    assert series(train(config, run_dir), *EXACT, "route_loss") == series(alone, *EXACT, "route_loss")


@pytest.mark.long
@pytest.mark.parametrize("name", ["dp2 zero2", "pp2", "cp2"])
def test_suffixes_are_routed_alike(tiny, tmp_path, name):
    shards = make_shard(tiny, tmp_path / "questions")
    config = tiny.config(
        tmp_path / "c.yaml",
        gist={"chunk_sizes": [4, 2], "recall": "suffix", "route_loss": 1.0, "route_queries": 10},
        data={"train": [str(shards)], "valid": [], "raw_tokens": 256},
        train={"steps": 4, "global_batch": 4},
    )
    layouts = LAYOUTS | {"dp2 zero2": (2, ["parallel.zero=2"])}
    alone = train(config, tmp_path / "alone")
    ranks, settings = layouts[name]
    assert_same(train(config, tmp_path / "run", ranks, *settings), alone)
