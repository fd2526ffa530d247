"""Muon: what its update is, that ranks and resumed runs give the losses of one process, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from tests.integration.runs import series, train
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.config import load_config
from unfold.pretrain.errors import UserError

MUON = ["precision=bf16", "optimizer.kind=muon", "train.steps=5"]
STOP = "checkpoint.stop_after_minutes=0.0001"  # after the first step


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("muon") / "c.yaml"
    return tiny.config(path, model={"tied_embeddings": False}, checkpoint={"every": 1, "keep": 0}, data={"valid": []})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(config, run_dir, 1, *MUON)


def test_matrices_of_layers_move_orthogonally_and_the_rest_by_adam(alone):
    run_dir, metrics = alone
    before, after = (TensorDirectory(run_dir / "checkpoints" / f"step-{step:08d}") for step in (2, 3))
    rate = metrics[2]["lr"]
    muon_rate = rate * 0.02 / 1e-3
    names = [n.removeprefix("model.") for n in after.shapes if n.startswith("model.")]
    of_muon = [n for n in names if f"momentum_buffer.{n}" in after.shapes]
    assert set(of_muon) == {n for n in names if n.startswith("layers.") and n.count("norm") == 0}
    assert all(f"exp_avg.{n}" in after.shapes for n in names if n not in of_muon)
    assert "head.weight" in names and "head.weight" not in of_muon
    for layer in range(2):
        for part in ("attention.qkv", "attention.output", "mlp.down"):
            old, new = (x.read(f"model.layers.{layer}.{part}.weight").double() for x in (before, after))
            update = (old * (1 - 0.1 * muon_rate) - new) / muon_rate
            scale = max(1, old.shape[0] / old.shape[1]) ** 0.5  # Muon's factor for tall matrices
            values = torch.linalg.svdvals(update) / scale
            # Five steps of the iteration bring singular values near 1, all but tiny ones.
            assert values.max() < 1.3 and values.median() > 0.6, (part, values)


def test_two_ranks_and_a_resumed_run_give_the_losses_of_one(config, alone, tmp_path):
    """Begun on one rank, gone on on two: the momentum of every matrix moves along."""
    begun = train(config, tmp_path / "run", 1, *MUON, STOP)
    assert 0 < len(begun) < 5
    for got, want in zip(train(config, tmp_path / "run", 2, *MUON), alone[1], strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-4 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 2e-3 * want["grad_norm"]


@pytest.mark.long
@pytest.mark.parametrize("ranks,more", [(1, []), (2, []), (2, ["parallel.context=2"])], ids=["alone", "dp2", "cp2"])
def test_a_resumed_run_is_bit_exact_in_its_layout(config, alone, tmp_path, ranks, more):
    whole = alone[1] if ranks == 1 else train(config, tmp_path / "whole", ranks, *MUON, *more)
    train(config, tmp_path / "run", ranks, *MUON, *more, STOP)
    resumed = train(config, tmp_path / "run", ranks, *MUON, *more)
    assert series(resumed, "loss", "grad_norm") == series(whole, "loss", "grad_norm")
    for got, want in zip(whole, alone[1], strict=True):
        assert abs(got["loss"] - want["loss"]) <= 3e-3 * want["loss"]


@pytest.mark.parametrize(
    "setting,needs",
    [
        ("parallel.tensor=2", "parallel.tensor: 1"),
        ("parallel.pipeline=2", "parallel.pipeline: 1"),
        ("parallel.zero=2", "parallel.zero: 1"),
        ("parallel.zero=3", "parallel.zero: 1"),
        ("precision=fp32", "precision: bf16"),
        ("optimizer.kind=sgd", "kind: 'sgd' is not one of adamw, muon"),
    ],
)
def test_where_muon_cannot_run_it_is_refused(config, setting, needs):
    with pytest.raises(UserError, match=needs):
        load_config(config, [*MUON, setting])
