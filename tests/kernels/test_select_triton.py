"""Selection in Triton against the CPU path: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses
import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.kernels.interpreter import DEVICE, compute_like_a_gpu, needs_runs
from tests.kernels.recall_cases import CASES, SUFFIX_CASES, make_recall, make_rule, random_qkv, recalling
from tests.kernels.rooms import check_room
from unfold.kernels.select import SelectRule, chosen_gists, select_gists
from unfold.kernels.select import triton as backend
from unfold.kernels.select.blocks import block_lists
from unfold.kernels.unfold import select_to_unfold
from unfold.kernels.unfold.plan import level_0_gists
from unfold.model.gist import build_layout, build_recall
from unfold.model.parallel.division import Division
from unfold.model.parallel.recall import make_recall_plan

ALL = [*CASES, *SUFFIX_CASES]
# Few queries: a pass over the candidates takes the interpreter long. The others are `long`.
SOME = [
    ("context shorter than the sink", "everything", "head"),
    ("suffix", "fixed", "group"),
    ("suffix", "unfold all", "head"),
    ("suffix of linked parts, three levels", "adaptive, small ratio", "head"),
]
LARGE = pytest.param(40, 1, 64, torch.float32, marks=pytest.mark.long)
BY_NUMBER = ["adaptive", "adaptive, small ratio", "fixed", "everything", "unfold all"]


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    if backend.INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def case(name, heads, kv_heads, dim, dtype, whole=True):
    """Tree, config, queries and keys; ``whole``: of small whole numbers, whose products every order of sums gives exactly."""
    layout, config, tree = make_recall(name)
    q, k, *_ = (x.detach() for x in random_qkv(layout, heads, kv_heads, dim, torch.float32))
    if whole:
        q, k = ((x * 8).round() for x in (q, k))
    return tree.to(DEVICE), config, recalling(q, tree).to(DEVICE, dtype), k.to(DEVICE, dtype)


def equal(got, want):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got.start + got.rows, want.start + want.rows))


def on_cpu(q, k, tree, rule):
    return select_gists(q.cpu(), k.cpu(), tree.to("cpu"), rule, backend="cpu")


@needs_runs
@pytest.mark.parametrize(
    "name,rule_name,share",
    [
        case if case in SOME else pytest.param(*case, marks=pytest.mark.long)
        for case in itertools.product(ALL, BY_NUMBER, ("head", "group"))
    ],
)
def test_equals_the_cpu_path(name, rule_name, share):
    tree, config, q, k = case(name, 4, 2, 64, torch.float32)
    rule = make_rule(rule_name, config, share)
    assert equal(select_gists(q, k, tree, rule, backend="triton"), on_cpu(q, k, tree, rule))


@needs_runs
@pytest.mark.parametrize(
    "heads,kv_heads,dim,dtype",
    [(3, 3, 80, torch.float16), (7, 1, 128, torch.bfloat16), (2, 1, 80, torch.float32), LARGE],
)
def test_groups_dimensions_dtypes(heads, kv_heads, dim, dtype):
    tree, config, q, k = case("suffix", heads, kv_heads, dim, dtype)
    rule = make_rule("adaptive, small ratio", config, "head")
    assert equal(select_gists(q, k, tree, rule, backend="triton"), on_cpu(q, k, tree, rule))


@needs_runs
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size(dtype):
    """Real numbers, where another order of sums may swap gists that all but tie: each pair's scores differ by rounding alone."""
    tree, config, q, k = case("suffixes of packed documents", 4, 2, 64, dtype, whole=False)
    rule = make_rule("adaptive, small ratio", config, "head")
    got, want = select_gists(q, k, tree, rule, backend="triton"), on_cpu(q, k, tree, rule)
    if equal(got, want):
        return
    for s in range(tree.levels):
        assert torch.equal(got.start[s].cpu(), want.start[s])
        for n in range(tree.queries):
            sample = int(tree.tokens[n]) // k.shape[1]
            for h in range(2):
                lists = [x.of(s, n, h).long().cpu() for x in (got, want)]
                keys = [k[sample, tree.others.rows[sample].cpu()[rows], h].double().cpu() for rows in lists]
                best = [(x @ q[n, 2 * h : 2 * h + 2].double().cpu().T).sort(0).values for x in keys]
                torch.testing.assert_close(*best, atol=1e-4, rtol=0)


@needs_runs
def test_the_tree_of_a_context_rank():
    """Two samples, of which each rank has a short sequence of its own: tables without gaps, selections as on the CPU."""
    name = "suffixes of packed documents"
    layout, config, tree = make_recall(name)
    pad = lambda x, value=-1: torch.nn.functional.pad(x, (0, -x.shape[1] % 2), value=value)
    recalls = torch.zeros_like(layout.level, dtype=torch.bool).flatten().index_fill(0, tree.tokens, True).view_as(layout.level)
    layout = build_layout(pad(layout.level), pad(layout.doc), config)
    whole = build_recall(layout, config, pad(recalls, False))
    plan = make_recall_plan(whole, Division.even([layout.intervals], 2), 1)
    short = plan.short.to(DEVICE)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-8, 9, shape, generator=g).float().to(DEVICE)
    q, k = draw(short.queries, 2, 64), draw(short.others.batch, short.others.tokens, 1, 64)
    rule = make_rule("adaptive, small ratio", config, "head")
    assert short.others.batch == 2 and short.queries > 10
    want = on_cpu(q, k, short, rule)
    assert equal(select_gists(q, k, short, rule, backend="triton"), want)
    lists, gists = select_to_unfold(q, k, short, rule, backend="triton"), level_0_gists(short)
    marks = chosen_gists(short, lists, gists)
    assert torch.equal(marks.cpu(), chosen_gists(short.to("cpu"), want, gists)) and 0 < marks.sum() < marks.numel()


@needs_runs
def test_tables_with_gaps_are_refused():
    """Context parallelism once made such views; a kernel would read the second sample's children from a wrong place."""
    tree, config, q, k = case("suffixes of packed documents", 2, 1, 64, torch.float32)
    gap = lambda x: torch.nn.functional.pad(x, (0, 1))[:, :-1]
    strided = dataclasses.replace(tree, child_lo=gap(tree.child_lo), child_hi=gap(tree.child_hi))
    with pytest.raises(AssertionError, match="child_lo: .* is not contiguous"):
        select_gists(q, k, strided, make_rule("fixed", config, "head"), backend="triton")


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("name", ALL)
def test_no_list_outgrows_its_room(name, share):
    """What the CPU selects, as lists of blocks: items, candidates, places and queries of chunks, under every rule by number."""
    layout, config, tree = make_recall(name)
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float32)
    for rule_name, size in itertools.product(BY_NUMBER, (1, 5, 32)):
        rule = make_rule(rule_name, config, share)
        lists = block_lists(tree, select_gists(recalling(q, tree), k, tree, rule, backend="cpu"), size)
        check_room(tree, rule, lists, 4)


@needs_runs
@pytest.mark.parametrize("share", ["head", pytest.param("group", marks=pytest.mark.long)])
def test_ties(share):
    """Few different scores, zeros of both signs among them: of equal ones the earlier gists, exactly as many as the budget."""
    tree, config, q, k = case("suffix", 2, 1, 64, torch.float32)
    k = k.sign() * (torch.arange(64, device=DEVICE) < 2)
    q = q.sign()
    rule = SelectRule(1, 1, topk=3, share=share)
    assert equal(select_gists(q, k, tree, rule, backend="triton"), on_cpu(q, k, tree, rule))
    same = torch.zeros_like(k)
    assert equal(select_gists(-q, same, tree, rule, backend="triton"), on_cpu(q, same, tree, rule))


@needs_runs
def test_two_runs_are_bit_equal_and_no_uninitialised_memory_is_read(monkeypatch):
    tree, config, q, k = case("suffix", 2, 1, 64, torch.bfloat16, whole=False)
    rule = SelectRule(1, 1, topk=3)
    first = select_gists(q, k, tree, rule, backend="triton")
    make = torch.empty
    poisoned = lambda *a, **k: x.fill_(torch.nan if x.is_floating_point() else 2**30) if len(x := make(*a, **k)) else x
    monkeypatch.setattr(torch, "empty", poisoned)
    assert equal(first, select_gists(q, k, tree, rule, backend="triton"))


@needs_runs
@pytest.mark.parametrize(
    "heads,dim,dtype,rule,message",
    [
        (1, 72, torch.float32, dict(topk=1), "head dimension 72 is not one of"),
        (1, 64, torch.float64, dict(topk=1), "float64; backend"),
        (130, 64, torch.float32, dict(topk=1), "130 query heads per KV head"),
        (1, 64, torch.float32, dict(top_p=0.5), "top_p: 0.5; backend 'triton' selects by number"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(heads, dim, dtype, rule, message):
    tree, _, q, k = case("one level", heads, 1, dim, dtype)
    with pytest.raises(ValueError, match=message):
        select_gists(q, k, tree, SelectRule(1, 1, **rule), backend="triton")
