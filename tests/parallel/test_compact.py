"""Moments in bf16 or 8 bits under layouts: their losses beside those of fp32, and that a resumed run goes on as it would have."""

from __future__ import annotations

import pytest
import torch

from tests.integration.runs import series, train
from unfold.pretrain.checkpoint.tensors import TensorDirectory

STOP = "checkpoint.stop_after_minutes=0.0001"  # after the first step
LAYOUTS = {
    "alone": (1, []),
    "dp2 zero2": (2, ["parallel.zero=2"]),
    "dp2 zero3 offload": (2, ["parallel.zero=3", "parallel.offload=all"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "dp2 bf16": (2, ["precision=bf16"]),
    "pp2 bf16": (2, ["parallel.pipeline=2", "precision=bf16"]),
}
SHORT = [("8bit", "dp2 zero3 offload"), ("8bit", "pp2 bf16")]
ALL = [(state, layout) for state in ("bf16", "8bit") for layout in LAYOUTS]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "c.yaml"
    return tiny.config(path, checkpoint={"every": 1, "keep": 0}, data={"valid": []}, train={"steps": 5})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("state,name", [c if c in SHORT else pytest.param(*c, marks=pytest.mark.long) for c in ALL])
def test_losses_are_near_those_of_fp32_and_a_resumed_run_is_exact(state, name, config, alone, tmp_path):
    ranks, settings = LAYOUTS[name]
    settings = [f"optimizer.state={state}", *settings]
    whole = train(config, tmp_path / "whole", ranks, *settings)
    assert 0 < len(train(config, tmp_path / "run", ranks, *settings, STOP)) < 5
    assert series(train(config, tmp_path / "run", ranks, *settings), "loss", "grad_norm") == series(whole, "loss", "grad_norm")
    for got, want in zip(whole, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-3 * want["loss"]


def test_bf16_moments_resume_exactly_under_another_layout(config, tmp_path):
    """They are rounded one by one, so no layout changes them: within what fp32 sums of other order differ by."""
    state = "optimizer.state=bf16"
    whole = train(config, tmp_path / "whole", 1, state)
    train(config, tmp_path / "run", 1, state, STOP)
    resumed = train(config, tmp_path / "run", 2, state, "parallel.zero=3")
    for got, want in zip(resumed, whole, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    moment = TensorDirectory(tmp_path / "whole" / "checkpoints" / "step-00000005").read("exp_avg.layers.0.mlp.down.weight")
    assert moment.dtype == torch.float32 and torch.equal(moment, moment.bfloat16().float()) and moment.any()


@pytest.mark.long
def test_moments_may_change_what_they_are_kept_in(config, alone, tmp_path):
    """Checkpoints hold fp32 numbers whatever the optimizer keeps."""
    train(config, tmp_path / "run", 1, STOP)
    metrics = train(config, tmp_path / "run", 2, "optimizer.state=8bit", "train.allow_changes=[optimizer.state]")
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-3 * want["loss"]
