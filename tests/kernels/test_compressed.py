"""Compressed attention: every CPU backend against the dense reference, outputs and gradients."""

import subprocess
import sys

import pytest
import torch

from tests.kernels.cases import CASES, make_layout, random_qkv
from unfold.kernels.common.backend import default_backend
from unfold.kernels.compressed import compressed_attention


def run(backend, qkv, d_out, intervals):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = compressed_attention(*leaves, intervals, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", CASES)
def test_cpu_equals_reference(name, heads, kv_heads):
    layout, _ = make_layout(name)
    *qkv, d_out = random_qkv(layout, heads, kv_heads, 10, torch.float64)
    for got, want in zip(run("cpu", qkv, d_out, layout.intervals), run("reference", qkv, d_out, layout.intervals)):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_error_at_most_twice_plain_pytorch(dtype):
    layout, _ = make_layout("packed documents")
    *qkv, d_out = random_qkv(layout, 4, 2, 16, dtype)
    exact = run("reference", [x.double() for x in qkv], d_out.double(), layout.intervals)
    plain = run("reference", qkv, d_out, layout.intervals)
    for got, near, true in zip(run("cpu", qkv, d_out, layout.intervals), plain, exact):
        assert got.dtype == dtype
        assert (got - true).abs().max() <= 2 * (near - true).abs().max()


def test_two_runs_are_bit_equal():
    layout, _ = make_layout("jittered chunks")
    *qkv, d_out = random_qkv(layout, 4, 2, 16, torch.float32)
    first, second = (run("cpu", qkv, d_out, layout.intervals) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_hidden_keys_do_not_matter():
    """What a query does not see may hold NaN: padding rows and other documents cannot leak into it."""
    layout, _ = make_layout("packed documents")
    *qkv, _ = random_qkv(layout, 2, 1, 8, torch.float32)
    poisoned = [x.detach().clone() for x in qkv]
    other = layout.doc != 2
    for x in poisoned[1:]:
        x[other] = 1e30
    clean, dirty = (compressed_attention(*x, layout.intervals, backend="cpu") for x in (qkv, poisoned))
    torch.testing.assert_close(clean[~other], dirty[~other], atol=0, rtol=0)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=torch.zeros(1, 5, 4)), "q: shape"),
        (dict(k=torch.zeros(2, 3, 2, 8)), "k: shape"),
        (dict(v=torch.zeros(2, 3, 2, 8)), "v: shape"),
        (dict(k=torch.zeros(1)), "k: shape"),
        (dict(heads=5), "divisor of q's 5 heads"),
        (dict(backend="fpga"), "backend: 'fpga' is not one of"),
        (dict(double=True), "torch.float64"),
        (dict(other="one level"), "intervals: made for"),
    ],
)
def test_bad_arguments_are_named(change, message):
    layout, _ = make_layout("packed documents")
    q, k, v, _ = random_qkv(layout, change.get("heads", 4), 2, 8, torch.float32)
    q, k, v = change.get("q", q), change.get("k", k), change.get("v", v)
    if "double" in change:
        k = k.double()
    intervals = make_layout(change["other"])[0].intervals if "other" in change else layout.intervals
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        compressed_attention(q, k, v, intervals, backend=change.get("backend"))


def test_the_choice_of_backend_is_logged_once(caplog):
    layout, _ = make_layout("one level")
    *qkv, _ = random_qkv(layout, 1, 1, 8, torch.float32)
    default_backend.cache_clear()
    with caplog.at_level("INFO", logger="unfold.kernels"):
        for _ in range(3):
            compressed_attention(*qkv, layout.intervals)
            compressed_attention(*qkv, layout.intervals, backend="reference")
    assert [r.getMessage() for r in caplog.records] == ["compressed attention: backend 'cpu', since the tensors are on 'cpu'"]
    assert default_backend("compressed attention", "cuda") == "triton"


def test_no_token_by_token_tensor_at_32k():
    """Peak memory of forward and backward at 32k raw tokens, in its own process: a T x T bool mask alone would be 1.4 GB."""
    probe = [sys.executable, "-m", "tests.benchmarks.compressed_cpu", "--peak", "32768"]
    peak_mb = float(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    # q, k, v, the output and each gradient are 77 MB; the sorted copies of one backward pass come on top.
    assert peak_mb < 1100, f"{peak_mb:.0f} MB beyond the inputs"
