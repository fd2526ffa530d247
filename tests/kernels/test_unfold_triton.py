"""Unfolding in Triton against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.interpreter import DEVICE, GPU, compute_like_a_gpu, needs_runs
from tests.kernels.recall_cases import CASES, SUFFIX_CASES, check_apart, make_recall, make_rule, random_qkv, recalling
from unfold.kernels.common.launch import HEAD_DIMS
from unfold.kernels.common.tiles import Tile
from unfold.kernels.select import SelectRule, select_gists
from unfold.kernels.select.blocks import block_lists, count_bits, query_blocks, selection_of
from unfold.kernels.unfold import plan, recall_attention, turn, unfold_attention
from unfold.kernels.unfold import triton as backend
from unfold.kernels.unfold.reference import unfold_attention_reference, visible_tokens
from unfold.kernels.unfold.tiles import TABLE, UnfoldTiles
from unfold.model.gist import build_recall

# fp32 sums of some ten terms of size one: where plain PyTorch is exactly right (one visible key), a kernel need not be. On a GPU
# exp2 is right to two units of the last place only, of sums of any size.
FP32_ROUNDING = 2e-6
ALL = [*CASES, *SUFFIX_CASES]
# One layout of each kind; the others are `long`, fp32 only.
SOME = ["shorter than a chunk", "suffixes of packed documents", "no gist at all", "suffix of linked parts"]


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    if backend.INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def case(name, heads, kv_heads, dim, dtype, rule_name="adaptive, small ratio", share="head"):
    """Tree, selection, [q, k, v] with q [N, H, D], upstream gradient."""
    layout, config, tree = make_recall(name)
    q, k, v, d_out = random_qkv(layout, heads, kv_heads, dim, dtype)
    q, d_out = recalling(q.detach(), tree), recalling(d_out, tree)
    selection = select_gists(q, k, tree, make_rule(rule_name, config, share), backend="cpu")
    return tree.to(DEVICE), on_device(selection), [x.detach().to(DEVICE).requires_grad_() for x in (q, k, v)], d_out.to(DEVICE)


def on_device(selection):
    move = lambda parts: tuple(x.to(DEVICE) for x in parts)
    return type(selection)(move(selection.rows), move(selection.start), selection.kv_heads)


def plain_unfold(q, k, v, tree, selection, scale):
    """As one writes it in PyTorch: products in q's dtype, softmax in fp32, a mask of queries x tokens."""
    (tokens, kv_heads), group = k.shape[1:3], q.shape[1] // k.shape[2]
    mask = torch.zeros(len(q), kv_heads, tokens, dtype=torch.bool)
    for n in range(len(q)):
        for h in range(kv_heads):
            mask[n, h, sorted(visible_tokens(tree, selection, n, h))] = True
    sample, mask = tree.tokens // tokens, mask.to(q.device).repeat_interleave(group, 1)
    outs = torch.zeros_like(q)
    for b in range(len(k)):
        own = (sample == b).nonzero()[:, 0]
        keys, values = (x[b].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("nhd,khd->nhk", q[own], keys) * scale
        weights = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask[own], -torch.inf).softmax(-1)
        outs = outs.index_copy(0, own, torch.einsum("nhk,khd->nhd", weights.to(q.dtype), values))
    return outs


def gradients(attention, qkv, d_out):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


def errors_at_most_twice_plain(attention, qkv, d_out, tree, selection, scale):
    """out, d_q, d_k, d_v against fp64, measured by plain PyTorch in the same dtype."""
    reference = lambda *x: unfold_attention_reference(*x, tree, selection, scale)
    exact = gradients(reference, [x.double() for x in qkv], d_out.double())
    plain = gradients(lambda *x: plain_unfold(*x, tree, selection, scale), qkv, d_out)
    for name, got, near, true in zip(("out", "d_q", "d_k", "d_v"), gradients(attention, qkv, d_out), plain, exact):
        assert got.dtype == qkv[0].dtype and got.shape == true.shape
        error, allowed = (got - true).abs().max(), 2 * (near - true).abs().max()
        allowed += FP32_ROUNDING * (true.abs().max().clamp(min=1) if GPU else 1)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check(name, heads, kv_heads, dim, dtype, tiles=None, scale=0.125, **rule):
    tree, selection, qkv, d_out = case(name, heads, kv_heads, dim, dtype, **rule)
    ours = lambda q, k, v: backend.unfold_attention_triton(q, k, v, tree, selection, scale, tiles=tiles)
    errors_at_most_twice_plain(ours, qkv, d_out, tree, selection, scale)


@needs_runs
@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.long) for n in ALL])
def test_error_at_most_twice_plain_pytorch(name):
    """Every layout in fp32 (whose bound is the tightest); 16 bits below."""
    check(name, 2, 1, 64, torch.float32)


@needs_runs
@pytest.mark.parametrize("name", ["suffix", pytest.param("suffixes of packed documents", marks=pytest.mark.long)])
def test_chunks_may_stand_apart(name):
    """As ranks that share a sequence have what they fetched from others."""
    check_apart(name, "triton", 64, torch.float32, 1e-5, DEVICE)


@needs_runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    check("suffix", 4, 2, 64, dtype)


@needs_runs
@pytest.mark.parametrize("rule_name", ["everything", "fixed"])
def test_everything_selected_and_little(rule_name):
    check("suffix", 2, 1, 64, torch.float32, rule_name=rule_name)


@needs_runs
@pytest.mark.parametrize("dim,dtype", [(80, torch.float32), (96, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)])
def test_head_dimensions(dim, dtype):
    check("suffix", 1, 1, dim, dtype)


LONG_GROUPS = [pytest.param(*n, marks=pytest.mark.long) for n in ((3, 3), (7, 1), (40, 1))]


@needs_runs
@pytest.mark.parametrize("heads,kv_heads", [(6, 2), *LONG_GROUPS])
def test_group_sizes(heads, kv_heads):
    """Blocks of 32, 10, 4 queries and, with more heads than a tile has rows, of one."""
    check("suffix longer than a chunk", heads, kv_heads, 64, torch.float32)


@needs_runs
@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tiles_of_the_table(arch):
    """The tile sizes that GPUs run."""
    tiles = UnfoldTiles(*TABLE[arch][64, 2], Tile(64, 64, 4, 2))
    check("packed documents", 2, 1, 64, torch.float16, tiles)


@needs_runs
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_many_partial_sums(monkeypatch, dtype):
    """Groups of keys split into many parts: as where thousands of queries select one chunk."""
    monkeypatch.setattr(plan, "SHORTEST_PART", 1)
    monkeypatch.setattr(turn, "SHORTEST_LIST", 5)
    monkeypatch.setattr(plan, "SHORTEST_SPLIT", 24)
    small = Tile(16, 16, 4, 1)
    check("suffix", 4, 1, 64, dtype, UnfoldTiles(small, small, small, small, Tile(64, 32, 4, 1)))


@needs_runs
def test_two_runs_are_bit_equal_and_no_uninitialised_memory_is_read(monkeypatch):
    """Every buffer begins as NaN in the second run; nothing may change."""
    tree, selection, qkv, d_out = case("suffixes of packed documents", 2, 2, 64, torch.bfloat16)
    step = lambda: gradients(lambda *x: unfold_attention(*x, tree, selection, backend="triton"), qkv, d_out)
    first = step()

    def poisoned(make):
        def poisoned_make(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return poisoned_make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(1).isnan()
    assert all(torch.equal(a, b) for a, b in zip(first, step()))


@needs_runs
def test_what_no_query_sees_does_not_matter():
    """Huge keys and values that one query alone does not see reach neither its output nor its gradients."""
    layout, config, _ = make_recall("suffix")
    alone = torch.zeros_like(layout.level, dtype=torch.bool)
    alone[0, ((layout.level[0] < 0) & (layout.doc[0] >= 0)).nonzero()[-1]] = True
    tree = build_recall(layout, config, alone)
    q, k, v, d_out = (x.detach() for x in random_qkv(layout, 2, 1, 64, torch.float32))
    q, d_out = recalling(q, tree), recalling(d_out, tree)
    selection = on_device(select_gists(q, k, tree, SelectRule(8, 4), backend="cpu"))
    seen = sorted(visible_tokens(tree, selection, 0, 0))
    hidden = sorted(set(range(layout.level.shape[1])) - set(seen))
    tree, q, k, v, d_out = (x.to(DEVICE) for x in (tree, q, k, v, d_out))
    dirty = [x.clone().index_fill_(1, torch.tensor(hidden, device=DEVICE), 1e38) for x in (k, v)]
    attention = lambda *x: unfold_attention(*x, tree, selection, backend="triton")
    clean, dirty = (gradients(attention, x, d_out) for x in ([q, k, v], [q, *dirty]))
    assert len(hidden) > 20 and all(torch.equal(a, b) for a, b in zip(clean, dirty))


@needs_runs
@pytest.mark.parametrize(
    "heads,dim,dtype,message",
    [
        (1, 72, torch.float32, "head dimension 72 is not one of"),
        (1, 64, torch.float64, "float64; backend"),
        (130, 64, torch.float32, "130 query heads per KV head"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(heads, dim, dtype, message):
    tree, selection, qkv, _ = case("one level", heads, 1, dim, dtype)
    with pytest.raises(ValueError, match=message):
        unfold_attention(*qkv, tree, selection, backend="triton")


@pytest.mark.parametrize("size", [1, 5, 32])
@pytest.mark.parametrize("name", ALL)
def test_lists_of_blocks_hold_the_selection(name, size):
    """Plain tensor operations: to lists of blocks and back, nothing lost, nothing twice, no block of two samples."""
    layout, config, tree = make_recall(name)
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float32)
    selection = select_gists(recalling(q, tree), k, tree, make_rule("adaptive, small ratio", config, "head"))
    lists = block_lists(tree, selection, size)
    back = selection_of(tree, lists)
    assert all(torch.equal(a, b) for a, b in zip(selection.rows + selection.start, back.rows + back.start))
    assert int(count_bits(lists.bits).sum()) == sum(len(rows) for rows in selection.rows)
    blocks = query_blocks(tree, size)
    for block, (first, last, sample) in enumerate(blocks.table.tolist()):
        assert 0 < last - first <= size and (blocks.of_query[first:last] == block).all()
        assert (tree.tokens[first:last] // layout.level.shape[1] == sample).all()


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("name", SOME[:3])
def test_all_dimensions_on_a_gpu(name, dim, dtype):
    check(name, 8, 2, dim, dtype)


@needs_runs
@pytest.mark.parametrize(
    "rule_name,share",
    [
        ("adaptive, small ratio", "head"),
        pytest.param("adaptive, small ratio", "group", marks=pytest.mark.long),
        ("unfold all", "head"),
    ],
)
def test_a_whole_layer(rule_name, share):
    """Selection's lists handed on as they are: output, gradients and what is reported, against the CPU path."""
    layout, config, tree = make_recall("suffixes of packed documents")
    rule = make_rule(rule_name, config, share)
    *qkv, d_out = random_qkv(layout, 2, 1, 64, torch.float32)
    stats = {}

    def layer(name, device):
        def run(q, k, v):
            out, stats[name] = recall_attention(q, k, v, tree.to(device), rule, backend=name)
            return out

        return [x.cpu() for x in gradients(run, [x.to(device) for x in qkv], d_out.to(device))]

    for got, want in zip(layer("triton", DEVICE), layer("cpu", "cpu")):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(stats["triton"].unfolded.cpu(), stats["cpu"].unfolded)
    torch.testing.assert_close(stats["triton"].selected.cpu(), stats["cpu"].selected)
