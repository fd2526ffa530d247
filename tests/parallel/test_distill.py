"""Learning from dense attention, and a loss of the log-partition: under every layout the same as in one process."""

from __future__ import annotations

import pytest

from tests.integration.runs import series, train, train_until_killed
from tests.integration.test_train import EXACT
from tests.parallel.test_layouts import LAYOUTS

DISTILL = {"logits": 0.5, "hidden": 2.0, "every": 3}  # of the four samples of a step one or two
SHORT = ("dp2 zero3", "cp2")
LONG = (
    "micro_batch 4", "dp2 zero2 micro_batch 2", "tp2 sequence", "activation checkpointing",
    "dp2 zero3 offload", "tp2", "tp2 dp2 zero3", "cp2 tp2 sequence", "ulysses2",
)  # fmt: skip
NAMES = ("z_loss", "distill_logits", "distill_hidden")


def config_of(tiny, path, **sections):
    wide = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 96, "tied_embeddings": False}
    return tiny.config(path / "c.yaml", distill=DISTILL, model=wide, **sections)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return config_of(tiny, tmp_path_factory.mktemp("distill"), train={"steps": 5, "z_loss": 1e-2})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run", 1, "train.activation_checkpointing=full")


def assert_same(metrics: list[dict], alone: list[dict], names=NAMES) -> None:
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]
        assert got.get("valid_loss") == pytest.approx(want.get("valid_loss"), abs=1e-5)
        for name in names:
            assert got[name] == pytest.approx(want[name], rel=2e-5), name


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_layout_gives_the_losses_of_one_process(name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    assert_same(train(config, tmp_path / "run", ranks, *settings), alone)


@pytest.mark.parametrize("name", ["pp2", pytest.param("tp2 pp2 sequence", marks=pytest.mark.long)])
def test_a_pipeline_has_the_loss_of_the_log_partition(name, config, tmp_path):
    ranks, settings = LAYOUTS[name]
    without = ["train.steps=3", "distill.logits=0", "distill.hidden=0"]
    alone = train(config, tmp_path / "alone", 1, *without)
    assert_same(train(config, tmp_path / "run", ranks, *without, *settings), alone, ["z_loss"])
    assert all(m["z_loss"] > 0 and "distill_logits" not in m for m in alone)


def test_a_run_that_is_resumed_goes_on_alike(config, alone, tmp_path):
    run_dir = tmp_path / "run"
    train_until_killed(config, run_dir, 1, 3, "checkpoint.every=2", "train.activation_checkpointing=full")
    again = train(config, run_dir, 1, "checkpoint.every=2", "train.activation_checkpointing=full")
    assert series(again, *EXACT, *NAMES) == series(alone, *EXACT, *NAMES)


@pytest.mark.long
def test_beside_recall_and_its_routing_loss(tiny, tmp_path):
    """The teacher neither recalls nor is routed; what the student reads stays the same."""
    gist = {"chunk_sizes": [4, 2], "recall": "all", "route_loss": 1.0, "route_queries": 20}
    config = config_of(tiny, tmp_path, gist=gist, train={"steps": 3})
    alone = train(config, tmp_path / "alone")
    run = train(config, tmp_path / "run", 2, "parallel.zero=2", "train.micro_batch=2")
    assert_same(run, alone, [*NAMES[1:], "route_loss", "unfolded_tokens"])
    plain = train(config, tmp_path / "plain", 1, "distill.logits=0", "distill.hidden=0")
    assert plain[0]["unfolded_tokens"] == alone[0]["unfolded_tokens"]
    assert plain[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)
