"""The small operations of a layer, compiled: the same numbers, fewer kernels, fewer bytes."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import metrics

from unfold.model.pointwise import Pointwise
from unfold.pretrain.plan.moved import Moved

pytestmark = pytest.mark.long  # compiles for the CPU, for a minute


@pytest.fixture(scope="module")
def compiled() -> Pointwise:
    return Pointwise.compiled()


def inputs(name: str, length: int, dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    if name == "rotate":
        angle = torch.rand(2, length, 1, 8)
        return [draw(2, length, 4, 16), angle.cos(), angle.sin()]
    if name == "swiglu":
        return [draw(length, 2, 96)]
    return [*(draw(length, 2, 64) for _ in range(2 if name == "add_and_norm" else 1)), draw(64), 1e-5]


def results(function, arguments: list) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    out = function(*arguments)
    outs = out if isinstance(out, tuple) else (out,)
    given = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    return [x.detach() for x in (*outs, *torch.autograd.grad(outs, given, slopes))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "add_and_norm", "rotate", "swiglu"])
def test_compiled_they_are_the_same(compiled, name, dtype):
    for length in (37, 128):
        arguments = inputs(name, length, dtype)
        bound = 2e-6 if dtype == torch.float32 else 8e-3  # one rounding of bf16
        for ours, theirs in zip(results(getattr(Pointwise(), name), arguments), results(getattr(compiled, name), arguments)):
            scale = theirs.float().abs().max()
            assert (ours.float() - theirs.float()).abs().max() <= bound * scale, name


@pytest.mark.parametrize("name,most", [("rms_norm", 4), ("add_and_norm", 4), ("rotate", 3), ("swiglu", 2)])
def test_compiled_they_are_few_kernels(name, most):
    arguments = inputs(name, 64, torch.bfloat16)
    with Moved() as moved:
        results(getattr(Pointwise(), name), arguments)
    metrics.reset()
    results(getattr(Pointwise.compiled(), name), inputs(name, 64, torch.bfloat16))
    print(name, sum(moved.kernels.values()), moved.total, metrics.generated_kernel_count, metrics.num_bytes_accessed)
    assert metrics.generated_kernel_count <= most < sum(moved.kernels.values())
