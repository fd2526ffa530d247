"""Averages of weights, and losses of held-out sources while a run goes on: the same under every layout."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.integration.runs import series, train
from unfold.model.config import ModelConfig
from unfold.pretrain.checkpoint import average as average_module
from unfold.pretrain.checkpoint.load import load_run
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.command import main
from unfold.pretrain.errors import UserError

STEPS, DECAY = 4, 0.7
AVERAGE = [f"checkpoint.average_decay={DECAY}"]
LORA = ["lora.rank=2", "train.trainable=gists"]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    train = {"steps": STEPS, "valid_every": 0, "valid_samples": 3}
    evaluation = {"every": 2, "sources": [f"own={tiny.train}", f"other={tiny.valid}"], "samples": 3}
    path = tmp_path_factory.mktemp("average") / "c.yaml"
    return tiny.config(
        path, train=train, checkpoint={"every": 1}, data={"raw_tokens": 64}, optimizer={"lr": 1e-2}, evaluation=evaluation
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(config, run_dir, 1, *AVERAGE)


def tensors(run_dir, step):
    return TensorDirectory(run_dir / "checkpoints" / f"step-{step:08d}")


def test_the_average_is_what_it_says_and_changes_no_loss(config, alone, tmp_path):
    run_dir, metrics = alone
    plain = train(config, tmp_path / "run", 1, "evaluation.every=0", "evaluation.sources=[]")
    assert series(plain, "loss", "grad_norm", "valid_loss") == series(metrics, "loss", "grad_norm", "valid_loss")
    by_step = [tensors(run_dir, step) for step in range(1, STEPS + 1)]
    for name in ("layers.1.mlp.down.weight", "embedding.weight"):
        for before, after in zip(by_step, by_step[1:]):
            want = DECAY * before.read(f"average.{name}") + (1 - DECAY) * after.read(f"model.{name}")
            torch.testing.assert_close(after.read(f"average.{name}"), want, atol=1e-7, rtol=1e-6)


def test_held_out_sources_have_losses_of_their_own(alone):
    metrics = alone[1]
    assert ["source_loss" in m for m in metrics] == [False, True, False, True]
    found = metrics[-1]["source_loss"]
    assert list(found) == ["own", "other"]
    assert found["other"] == pytest.approx(metrics[-1]["valid_loss"], abs=1e-6)  # the same shards, the same samples


@pytest.mark.parametrize(
    "layout", [["parallel.zero=3"], ["parallel.tensor=2"], pytest.param(["parallel.pipeline=2"], marks=pytest.mark.long)]
)
def test_a_layout_keeps_the_same_average_and_resumes_it(config, alone, tmp_path, layout):
    shutil.copytree(alone[0], tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    metrics = train(config, tmp_path / "run", 2, *AVERAGE, *layout)
    for name in ("own", "other"):
        assert metrics[-1]["source_loss"][name] == pytest.approx(alone[1][-1]["source_loss"][name], abs=1e-5)
    got, want = tensors(tmp_path / "run", STEPS), tensors(alone[0], STEPS)
    names = [name for name in want.shapes if name.startswith("average.")]
    assert len(names) == len([n for n in want.shapes if n.startswith("model.")])
    for name in names:
        torch.testing.assert_close(got.read(name), want.read(name), atol=2e-5, rtol=1e-4)


def test_the_command_averages_checkpoints(alone, tmp_path, capsys):
    run_dir = alone[0]
    assert main(["average", "--run-dir", str(run_dir), "--last", "3", "--output", str(tmp_path / "mean")]) == 0
    assert "the mean of steps 2, 3, 4" in capsys.readouterr().out
    name = "layers.0.attention.qkv.weight"
    mean = sum(tensors(run_dir, step).read(f"model.{name}").double() for step in (2, 3, 4)) / 3
    torch.testing.assert_close(load_run(tmp_path / "mean", None).model.get_parameter(name), mean.float())
    assert main(["average", "--run-dir", str(run_dir), "--exponential", "--output", str(tmp_path / "ema")]) == 0
    kept = tensors(run_dir, STEPS).read(f"average.{name}")
    torch.testing.assert_close(load_run(tmp_path / "ema", None).model.get_parameter(name), kept)
    assert main(["average", "--run-dir", str(run_dir), "--last", "9", "--output", str(tmp_path / "x")]) == 1
    assert "has 4 whole checkpoints" in capsys.readouterr().err


def test_averages_of_adapters_and_rows_are_those_of_what_they_make(config, tmp_path, tiny):
    run_dir = tmp_path / "run"
    train(config, run_dir, 1, *AVERAGE, *LORA, "evaluation.every=0", "evaluation.sources=[]")
    assert main(["average", "--run-dir", str(run_dir), "--steps", "3", "4", "--output", str(tmp_path / "mean")]) == 0
    runs = [load_run(run_dir, step).model for step in (3, 4)]
    mean = load_run(tmp_path / "mean", None).model
    for name in ("layers.0.attention.qkv.weight", "layers.1.mlp.gate_up.weight", "embedding.weight"):
        want = (runs[0].get_parameter(name).double() + runs[1].get_parameter(name).double()) / 2
        torch.testing.assert_close(mean.get_parameter(name), want.float(), atol=1e-6, rtol=1e-5)
    assert main(["average", "--run-dir", str(run_dir), "--exponential", "--output", str(tmp_path / "ema")]) == 0
    kept, stored = load_run(tmp_path / "ema", None), tensors(run_dir, STEPS)
    ids = sorted(kept.tokenizer.reserved_ids)
    torch.testing.assert_close(kept.model.embedding.weight[ids], stored.read("average.embedding.rows"))
    torch.testing.assert_close(kept.model.embedding.weight[10:300], stored.read("model.embedding.weight")[10:300])


def test_checkpoints_of_stages_with_other_rotary_settings_have_no_average(tmp_path, monkeypatch):
    def found(run_dir, step):
        model = ModelConfig(max_position=4096 if step == 3 else 8192)
        return SimpleNamespace(config=SimpleNamespace(model=model), manifest=SimpleNamespace(step=step))

    monkeypatch.setattr(average_module, "find_run", found)
    with pytest.raises(UserError, match="^steps 3: were trained with other rotary settings .* than step 7"):
        average_module.average(tmp_path, None, [3, 5, 7], tmp_path / "out")
    assert not (tmp_path / "out").exists()
