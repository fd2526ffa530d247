"""The routing loss in Triton against the CPU path: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.interpreter import DEVICE, compute_like_a_gpu, needs_runs
from tests.kernels.route_cases import ALL, make_routed, queries_and_keys
from unfold.kernels.route import Routed, routing_loss
from unfold.kernels.route import triton as backend

# Packed documents in two samples, three levels, suffixes without gists, nobody who has a gist; the others are `long`.
SOME = ["three levels", "packed documents", "suffixes of packed documents", "no gist at all", "context shorter than the sink"]
LARGE = pytest.param(40, 1, 64, torch.float32, marks=pytest.mark.long)


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    if backend.INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def run(q, k, routed, far, name):
    """The loss and its gradient, fp64 on the CPU."""
    k = k.detach().requires_grad_()
    loss = routing_loss(q, k, routed, far=far, backend=name)
    return loss.detach().cpu().double(), torch.autograd.grad(loss, k)[0].cpu().double()


def check(name, heads, kv_heads, dim, dtype, far, share=0.2):
    """Errors against fp64 are at most twice those of plain torch operations in the same dtype, and a rounding."""
    layout, routed = make_routed(name, share=share)
    q, k = queries_and_keys(layout, routed, heads, kv_heads, dim, dtype)
    # By the CPU path, which tests/kernels/test_route.py holds to the reference: that one is slow.
    want = run(q.double(), k.detach().double(), routed, far, "cpu")
    plain = run(q, k, routed, far, "cpu")
    got = run(q.to(DEVICE), k.to(DEVICE), routed.to(DEVICE), far, "triton")
    rounding = torch.finfo(dtype).eps
    assert (got[0] - want[0]).abs() <= 2 * (plain[0] - want[0]).abs() + 1e-6 * want[0].abs()
    scale = want[1].abs().amax()
    assert (got[1] - want[1]).abs().amax() <= 2 * (plain[1] - want[1]).abs().amax() + rounding * scale
    assert torch.equal(got[1] == 0, want[1] == 0) or dtype != torch.float32
    return got


@needs_runs
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in ALL])
def test_equals_the_cpu_path(name, far):
    check(name, 4, 2, 64, torch.float32, far, share=0.1 if name in SOME[:2] else 0.3)


@needs_runs
@pytest.mark.parametrize(
    "heads,kv_heads,dim,dtype",
    [(3, 3, 80, torch.float16), (7, 1, 128, torch.bfloat16), (2, 1, 80, torch.float32), LARGE],
)
def test_groups_dimensions_dtypes(heads, kv_heads, dim, dtype):
    check("suffixes of packed documents", heads, kv_heads, dim, dtype, False, share=0.4)


@needs_runs
def test_repeats_exactly_whatever_the_slices(monkeypatch):
    layout, routed = make_routed("suffixes of packed documents")
    q, k = queries_and_keys(layout, routed, 8, 2, 64, torch.float32)
    case = (q.to(DEVICE), k.to(DEVICE), routed.to(DEVICE), True, "triton")
    first = run(*case)
    assert all(map(torch.equal, run(*case), first))
    monkeypatch.setattr(backend, "SLICE", 1)
    for a, b in zip(run(*case), first):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_runs
@pytest.mark.parametrize("far", [False, True])
def test_what_no_query_has_counts_nothing(far):
    name = "suffixes of packed documents"
    layout, routed = make_routed(name, share=0.1)
    q, k = queries_and_keys(layout, routed, 4, 2, 64, torch.float32)
    tree, tokens = routed.tree, layout.level.shape[1]
    seen = torch.zeros(layout.level.shape, dtype=torch.bool)
    for n in range(tree.queries):
        sample, token = divmod(int(tree.tokens[n]), tokens)
        seen[sample, : token + 1] |= layout.doc[sample, : token + 1] == layout.doc[sample, token]
    assert not seen.all()
    poisoned = torch.where(seen[..., None, None], k.detach(), torch.nan)
    q, device = q.to(DEVICE), routed.to(DEVICE)
    want, got = (run(q, x.to(DEVICE), device, far, "triton") for x in (k, poisoned))
    assert all(map(torch.equal, want, got))


@needs_runs
def test_without_a_gradient_the_loss_is_the_same():
    layout, routed = make_routed("suffix")
    q, k = queries_and_keys(layout, routed, 4, 2, 64, torch.float32)
    q, k, routed = q.to(DEVICE), k.to(DEVICE), routed.to(DEVICE)
    loss = routing_loss(q, k.detach(), routed, backend="triton")
    assert not loss.requires_grad and torch.equal(loss, routing_loss(q, k, routed, backend="triton").detach())


@needs_runs
def test_no_query():
    layout, routed = make_routed("suffix", share=0.0)
    q, k = queries_and_keys(layout, routed, 4, 2, 64, torch.bfloat16)
    loss, d_k = run(q.to(DEVICE), k.to(DEVICE), routed.to(DEVICE), False, "triton")
    assert routed.tree.queries == 0 and loss == 0 and not d_k.any()


@needs_runs
@pytest.mark.parametrize(
    "shape,dtype,message",
    [((4, 2, 48), torch.float32, "q: head dimension 48"), ((4, 2, 64), torch.float64, "q: dtype torch.float64"),
     ((129, 1, 64), torch.float32, "q: 129 query heads per KV head")],
)  # fmt: skip
def test_what_is_not_served_is_named(shape, dtype, message):
    layout, routed = make_routed("suffix")
    heads, kv_heads, dim = shape
    q, k = queries_and_keys(layout, routed, heads, kv_heads, dim, dtype)
    with pytest.raises(ValueError, match=message):
        routing_loss(q.to(DEVICE), k.to(DEVICE), routed.to(DEVICE), backend="triton")


@needs_runs
def test_tables_with_gaps_are_refused():
    layout, routed = make_routed("suffix")
    q, k = queries_and_keys(layout, routed, 2, 1, 64, torch.float32)
    strided = Routed(routed.tree, routed.first.repeat_interleave(2)[::2])
    with pytest.raises(AssertionError, match="first: .* is not contiguous"):
        routing_loss(q.to(DEVICE), k.to(DEVICE), strided.to(DEVICE), backend="triton")
