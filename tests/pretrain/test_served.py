"""On a GPU a run that the kernels do not serve is refused before it starts, in the names of its settings."""

import dataclasses
import importlib.util

import pytest
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.pretrain.config import RunConfig, StageConfig
from unfold.pretrain.config.schema import DataConfig
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.served import refuse_uncompiled, refuse_unserved, unserved

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_config(**changes) -> RunConfig:
    """A run that GPUs serve, with settings of model and gist changed."""
    model = ModelConfig(64, layers=2, heads=4, kv_heads=2, hidden_size=256, head_dim=changes.pop("head_dim", 64))
    model = dataclasses.replace(model, attention=changes.pop("attention", "gist"))
    gist = GistConfig(**dict(chunk_sizes=(8, 4), recall="all") | changes)
    return RunConfig(data=DataConfig(train=("shard",), tokenizer="tokenizer"), model=model, gist=gist)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(head_dim=72), "model.head_dim: 72 has no kernels"),
        (dict(top_p=0.5), "gist.top_p: 0.5 has no kernels"),
        (dict(chunk_sizes=(100,)), "gist.chunk_sizes: a chunk of 100 tokens can grow to 150"),
        (dict(chunk_sizes=(128,), word_aware=False), "gist.chunk_sizes: a chunk of 128 tokens; recall on GPUs serves 127"),
    ],
)
def test_what_no_kernel_serves_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        refuse_unserved(run_config(**changes), torch.device("cuda"))
    refuse_unserved(run_config(**changes), torch.device("cpu"))


SERVED = [
    dict(head_dim=72, attention="dense"),
    dict(chunk_sizes=(100,), recall="none"),
    dict(chunk_sizes=(127,), word_aware=False),
]


@pytest.mark.parametrize("changes", [{}, *SERVED])
def test_what_is_served_passes(changes):
    refuse_unserved(run_config(**changes), torch.device("cuda"))


def test_a_stage_is_looked_at_too():
    config = run_config(recall="none")
    stages = (StageConfig(until=5, recall="all", top_p=0.5),)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))
    with pytest.raises(UserError, match="train.stages.0.top_p: 0.5 has no kernels"):
        refuse_unserved(config, torch.device("cuda"))


def test_what_stages_have_from_all_is_named_once():
    config = run_config(top_p=0.5)
    stages = (StageConfig(until=2, recall="all"), StageConfig(until=4, lr=1e-4), StageConfig(until=5, topk=4))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))
    assert unserved(config) == ["gist.top_p: 0.5 has no kernels for GPUs, which select by number; set topk, or neither"]


@pytest.mark.parametrize("device,variable,name", [("cpu", "CXX", "g\\+\\+"), ("cuda", "CC", "gcc or clang")])
def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path, device, variable, name):
    config = run_config(recall="none")
    fused = dataclasses.replace(config, train=dataclasses.replace(config.train, fuse_pointwise=True))
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse_uncompiled(config, torch.device(device))
    with pytest.raises(UserError, match=f"train.fuse_pointwise: true needs a compiler, and {name} is not found; .* {variable}"):
        refuse_uncompiled(fused, torch.device(device))
    own = tmp_path / "own"
    own.touch(0o755)
    monkeypatch.setenv(variable, str(own))
    refuse_uncompiled(fused, torch.device(device))
