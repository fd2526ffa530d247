"""The Triton backend against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.cases import CASES, make_layout, random_qkv
from tests.kernels.interpreter import DEVICE, GPU, compute_like_a_gpu, needs_runs
from tests.kernels.uniform import gradients, plain_attention, uniform_intervals
from unfold.kernels.common.launch import HEAD_DIMS
from unfold.kernels.compressed import compressed_attention, plan
from unfold.kernels.compressed import triton as backend
from unfold.kernels.compressed.reference import compressed_attention_reference
from unfold.kernels.compressed.tiles import TABLE
from unfold.model.gist import raw_layout

# fp32 sums of some ten terms of size one: where plain PyTorch is exactly right (one visible key), a kernel need not be. On a GPU
# exp2 is right to two units of the last place only, of sums of any size.
FP32_ROUNDING = 2e-6
# Layouts in fp32 by default: what the other tests, most of them of packed documents or a closed context, do not have.
SOME = [
    "jittered chunks", "four levels", "wide window", "no sink", "no gist at all", "shorter than a chunk", "shorter than the sink",
    "single token", "own group, one level", "own group, closed context", "linked",
]  # fmt: skip


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    if backend.INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def errors_at_most_twice_plain(attention, qkv, d_out, intervals, scale):
    """out, d_q, d_k, d_v against fp64, measured by plain PyTorch in the same dtype."""
    exact = gradients(lambda *x: compressed_attention_reference(*x, intervals, scale), [x.double() for x in qkv], d_out.double())
    plain = gradients(lambda *x: plain_attention(*x, intervals, scale), qkv, d_out)
    ours = gradients(attention, qkv, d_out)
    for name, got, near, true in zip(("out", "d_q", "d_k", "d_v"), ours, plain, exact):
        assert got.dtype == qkv[0].dtype and got.shape == true.shape
        error, allowed = (got - true).abs().max(), 2 * (near - true).abs().max()
        allowed += FP32_ROUNDING * (true.abs().max().clamp(min=1) if GPU else 1)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def case(name, heads, kv_heads, dim, dtype, seed=0):
    layout, _ = make_layout(name)
    layout = layout.to(DEVICE)
    *qkv, d_out = random_qkv(layout, heads, kv_heads, dim, dtype, DEVICE, seed)
    return layout, qkv, d_out


@needs_runs
@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_error_at_most_twice_plain_pytorch(name):
    """Every case in fp32 (whose bound is the tightest); 16 bits below."""
    layout, qkv, d_out = case(name, 2, 1, 64, torch.float32)
    scale = 64**-0.5
    ours = lambda *x: compressed_attention(*x, layout.intervals, backend="triton")
    errors_at_most_twice_plain(ours, qkv, d_out, layout.intervals, scale)


@needs_runs
@pytest.mark.parametrize("name", ["packed documents", "own group, closed context"])
def test_dense_attention_of_the_same_rows(name):
    """What distillation computes without a gradient: ranges of raw tokens with gists in between that see themselves alone."""
    layout, qkv, _ = case(name, 2, 1, 64, torch.float32)
    intervals = raw_layout(layout, gists=False).intervals
    with torch.no_grad():
        got = compressed_attention(*qkv, intervals, scale=0.125, backend="triton")
        want = compressed_attention_reference(*(x.double() for x in qkv), intervals, 0.125)
    assert (got - want).abs().max() <= FP32_ROUNDING


@needs_runs
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16])
def test_16_bits(dtype):
    layout, qkv, d_out = case("packed documents", 2, 1, 64, dtype)
    ours = lambda *x: compressed_attention(*x, layout.intervals, scale=0.125, backend="triton")
    errors_at_most_twice_plain(ours, qkv, d_out, layout.intervals, 0.125)


@needs_runs
@pytest.mark.parametrize("dim,dtype", [(80, torch.float32), (96, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)])
def test_head_dimensions(dim, dtype):
    layout, qkv, d_out = case("no sink" if dim == 96 else "closed context", 1, 1, dim, dtype)
    ours = lambda *x: compressed_attention(*x, layout.intervals, scale=0.2, backend="triton")
    errors_at_most_twice_plain(ours, qkv, d_out, layout.intervals, 0.2)


LONG_GROUPS = [pytest.param(*n, marks=pytest.mark.long) for n in ((3, 3), (7, 1))]


@needs_runs
@pytest.mark.parametrize("heads,kv_heads", [(6, 2), (40, 1), *LONG_GROUPS])
def test_group_sizes(heads, kv_heads):
    layout, qkv, d_out = case("chunk of one" if heads < 40 else "shorter than the sink", heads, kv_heads, 64, torch.float32)
    ours = lambda *x: compressed_attention(*x, layout.intervals, scale=0.1, backend="triton")
    errors_at_most_twice_plain(ours, qkv, d_out, layout.intervals, 0.1)


@needs_runs
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
def test_tiles_of_the_table(arch):
    """The tile sizes that GPUs run, with split key blocks and long full parts."""
    _, intervals = uniform_intervals(300, (2, 2), device=DEVICE)
    g = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(1, intervals.tokens, h, 64, generator=g, dtype=torch.float64).to(DEVICE, torch.float16) for h in (2, 1, 1, 2)
    )
    tiles = TABLE[arch][64, 2]
    ours = lambda q, k, v: backend.compressed_attention_triton(q, k, v, intervals, 0.125, tiles)
    errors_at_most_twice_plain(ours, [q, k, v], d_out, intervals, 0.125)


@needs_runs
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_many_partial_sums(monkeypatch, dtype):
    """Blocks of keys split into many items: as at 100k tokens, and with one head per KV head."""
    monkeypatch.setattr(plan, "SHORTEST_SPLIT", 24)
    layout, qkv, d_out = case("packed documents", 2, 2, 64, dtype)
    errors_at_most_twice_plain(
        lambda *x: compressed_attention(*x, layout.intervals, scale=0.125, backend="triton"), qkv, d_out, layout.intervals, 0.125
    )
    (keys,) = (p for name, p in layout.intervals.plans.items() if name[0] == "key plan")
    assert min(keys.sink.slots, keys.top.slots, keys.local.slots) >= 8


@needs_runs
def test_two_runs_are_bit_equal_and_no_uninitialised_memory_is_read(monkeypatch):
    """Every buffer the backend allocates begins as NaN in the second run; nothing may change."""
    layout, qkv, d_out = case("packed documents", 2, 1, 64, torch.bfloat16)
    step = lambda: gradients(lambda *x: compressed_attention(*x, layout.intervals, backend="triton"), qkv, d_out)
    first = step()

    def poisoned(make):
        def poisoned_make(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return poisoned_make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(1).isnan() and torch.empty_like(d_out).isnan().all() and d_out.new_empty(1).isnan()
    assert all(torch.equal(a, b) for a, b in zip(first, step()))


@needs_runs
def test_hidden_keys_do_not_matter():
    """Huge keys and values of other documents reach neither output nor gradient of a document."""
    layout, qkv, d_out = case("packed documents", 1, 1, 64, torch.float32)
    own = layout.doc == 2
    d_out = d_out * own[..., None, None]
    poisoned = [x.detach().clone() for x in qkv]
    for x in poisoned[1:]:
        x[~own] = 1e38  # products with them overflow
    attention = lambda *x: compressed_attention(*x, layout.intervals, backend="triton")
    clean, dirty = (gradients(attention, x, d_out) for x in (qkv, poisoned))
    for a, b in zip(clean, dirty):
        assert torch.equal(a[own], b[own])


@needs_runs
def test_inputs_that_are_not_contiguous():
    layout, qkv, d_out = case("one level", 2, 2, 64, torch.float32)
    attention = lambda *x: compressed_attention(*x, layout.intervals, backend="triton")
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    ones = torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(d_out)  # what sum().backward() hands back
    for a, b in zip(gradients(attention, qkv, ones.contiguous()), gradients(attention, strided, ones)):
        assert torch.equal(a, b)


@needs_runs
@pytest.mark.parametrize(
    "dim,dtype,message", [(72, torch.float32, "head dimension 72 is not one of"), (64, torch.float64, "float64; backend")]
)
def test_what_the_kernels_do_not_serve_is_refused(dim, dtype, message):
    layout, qkv, _ = case("one level", 1, 1, dim, dtype)
    with pytest.raises(ValueError, match=message):
        compressed_attention(*qkv, layout.intervals, backend="triton")


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_by_name():
    layout, _ = make_layout("one level")
    *qkv, _ = random_qkv(layout, 1, 1, 64, torch.float32)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        compressed_attention(*qkv, layout.intervals, backend="triton")


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("chunk_sizes", [(8,), (8, 4), (4, 4), (8, 8, 4)])
def test_long_sequences_on_a_gpu(chunk_sizes, dim, dtype):
    _, intervals = uniform_intervals(3000, chunk_sizes, device="cuda")
    g = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(1, intervals.tokens, h, dim, generator=g, dtype=torch.float64).to("cuda", dtype) for h in (8, 2, 2, 8)
    )
    ours = lambda *x: compressed_attention(*x, intervals)
    errors_at_most_twice_plain(ours, [q, k, v], d_out, intervals, dim**-0.5)
