"""The logits processor for vLLM, with a stand-in for vLLM itself; the real one: tests/benchmarks/serving.py."""

import importlib
import sys
import tomllib
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def plugin(monkeypatch):
    """The class that the entry point names, loaded as vLLM loads it."""
    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = sys.modules["vllm.v1.sample.logits_processor"]
    interface.LogitsProcessor, interface.BatchUpdate = object, object
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.logits_processors"]["unfold"].split(":")
    monkeypatch.delitem(sys.modules, module, raising=False)
    return getattr(importlib.import_module(module), name)


def make(plugin, gist, generation):
    config = SimpleNamespace(hf_config=SimpleNamespace(gist=gist), try_get_generation_config=lambda: generation)
    return plugin(SimpleNamespace(model_config=config), torch.device("cpu"), False)


@pytest.mark.parametrize("gist,generation", [({"reserved_ids": [1, 3]}, {}), (None, {"suppress_tokens": [3, 1]})])
def test_reserved_ids_are_never_sampled(plugin, gist, generation):
    processor = make(plugin, gist, generation)
    logits = torch.arange(10.0).view(2, 5)
    out = processor.apply(logits.clone())
    assert not processor.is_argmax_invariant() and bool((out[:, [1, 3]] == -torch.inf).all())
    assert torch.equal(out[:, [0, 2, 4]], logits[:, [0, 2, 4]])


def test_other_models_are_left_as_they_are(plugin):
    processor = make(plugin, None, {})
    logits = torch.arange(10.0).view(2, 5)
    assert processor.is_argmax_invariant() and torch.equal(processor.apply(logits.clone()), logits)
