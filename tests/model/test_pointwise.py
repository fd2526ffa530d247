"""The small operations of a layer, compiled: the same numbers, few kernels, fewer bytes, no compilation for another length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.benchmarks.pointwise import FUNCTIONS, as_compiled, as_counted, inputs, results
from tests.model.test_recall_model import VOCAB, micro_batch
from tests.model.test_recompute import GISTS, WAYS
from unfold.model.config import LoraConfig, ModelConfig
from unfold.model.pointwise import Pointwise
from unfold.model.recompute import Recompute
from unfold.model.transformer import Transformer

SHAPE = ModelConfig(VOCAB, hidden_size=64, layers=2, heads=4, kv_heads=2, ffn_size=96, init_std=0.2, qk_norm=True)
LORA = LoraConfig(rank=4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def without_inductor(monkeypatch):
    """What torch.compile traces is run as it was traced: kernels are not made, which takes long."""
    torch._dynamo.reset()
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: traced(function, dynamic=dynamic))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled() -> Pointwise:
    return Pointwise.compiled()


def model_of(build, **changes) -> Transformer:
    model = Transformer(SHAPE, replace(build, **changes))
    if changes.get("lora"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return model


def learned(model: Transformer, batch) -> list[torch.Tensor]:
    """Loss and gradients."""
    loss = model(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def compare(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """The loss within 2e-6 of itself, gradients within 2e-6 of their largest."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("lora", [None, LORA])
def test_another_length_is_not_compiled_again(build, without_inductor, lora):
    """With checkpoints, tiles and adapters, and in validation; after a first step nothing is traced."""
    plain = model_of(build, lora=lora)
    compiled = model_of(build, lora=lora, recompute=WAYS["selective offload tiles"], pointwise=Pointwise.compiled())
    traced = []
    for lengths in ((90, 50), (33,), (70, 21, 44)):
        batch = micro_batch(GISTS["recall"], lengths)
        for model in (plain, compiled):
            model.zero_grad()
        compare(learned(compiled, batch), learned(plain, batch))
        with torch.no_grad():
            compare([compiled(batch)], [plain(batch)])
        traced.append(counters["stats"]["unique_graphs"])
    assert 0 < traced[0] == traced[-1] and not counters["graph_break"]


@pytest.mark.long
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_they_are_the_same(compiled, name, precision):
    for length in (37, 128):
        arguments = inputs(name, SHAPE, length, DTYPES[precision])
        bound = 2e-6 if precision == "fp32" else 8e-3  # one rounding of bf16
        both = [results(getattr(functions, name), arguments) for functions in (compiled, Pointwise())]
        for ours, theirs in zip(*both, strict=True):
            scale = theirs.float().abs().max()
            assert (ours.float() - theirs.float()).abs().max() <= bound * scale, name


@pytest.mark.long
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_compiler_makes_the_kernels_that_plans_count(name, precision):
    """As many, and what each reads and writes, to the byte but for a scalar."""
    arguments = inputs(name, SHAPE, 256, DTYPES[precision])
    kernels, size = as_counted(name, arguments)
    made, moving = as_compiled(name, arguments)
    assert made == kernels and abs(moving - size) <= 16


def kept_by(function: Callable, arguments: list) -> int:
    """Bytes that backward needs, of all but parameters of a model."""
    kept = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function(*arguments)
    return sum(kept.values())


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_they_keep_no_more_for_backward(compiled, name):
    arguments = inputs(name, SHAPE, 256, torch.bfloat16)
    assert 0 < kept_by(getattr(compiled, name), arguments) <= kept_by(getattr(Pointwise(), name), arguments)


@pytest.mark.long
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("way", ["none", "full", "selective offload", "tiles", "selective offload tiles"])
def test_a_model_with_compiled_functions_learns_the_same(build, compiled, way, lora):
    recompute = WAYS.get(way, Recompute())
    batch = lambda: micro_batch(GISTS["recall"])
    want = learned(model_of(build, lora=lora), batch())
    compare(learned(model_of(build, lora=lora, recompute=recompute, pointwise=compiled), batch()), want)
