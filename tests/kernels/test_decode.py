"""Decoding: the CPU path against the reference, here; the Triton kernels against it on a GPU or in Triton's interpreter."""

import dataclasses
import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

from tests import rules
from unfold.kernels.decode import decode_attention
from unfold.kernels.decode.step import Step
from unfold.kernels.select import SelectRule
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.cache import CachedJoinedOutline, CachedOutline, SequenceCache
from unfold.model.decode.step import step_of
from unfold.model.gist.joining import PartShape

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from tests.kernels.interpreter import DEVICE, INTERPRETED, compute_like_a_gpu, needs_runs
else:
    DEVICE, INTERPRETED, needs_runs = "cpu", False, pytest.mark.skip(reason="triton is not installed")

# Configuration of the gists, and (context, suffix) tokens of each sequence of a batch, of uneven lengths; a context of several
# numbers is joined of parts of so many tokens, behind a prefix of five, with two links each.
CASES = {
    "one level": (dict(chunk_sizes=(4,)), [(61, 3), (9, 1)]),
    "two levels": (dict(chunk_sizes=(4, 3)), [(100, 7), (3, 2), (0, 5), (37, 0)]),
    "four levels": (dict(chunk_sizes=(2, 2, 2, 2), sink=1, n_prev=2), [(90, 2), (31, 9)]),
    "no sink": (dict(chunk_sizes=(3, 2), sink=0, n_prev=0), [(50, 4), (51, 1)]),
    "long suffix": (dict(chunk_sizes=(4, 2)), [(40, 70)]),
    "joined": (dict(chunk_sizes=(4, 3)), [((30, 1, 17), 5), (20, 2), ((2,), 1)]),
}
# What the interpreter runs by default; the other combinations are `long`.
SOME = [
    ("two levels", "adaptive", "head"),
    ("two levels", "three", "group"),
    ("no sink", "everything", "head"),
    ("two levels", "unfold all", "head"),
    ("joined", "adaptive", "head"),
    ("joined", "everything", "group"),
]
BUDGETS = {
    "adaptive": dict(ratio=2),
    "one": dict(topk=1),
    "three": dict(topk=3),
    "everything": dict(topk=10**6),
    "unfold all": dict(topk=1, everything=True),
}


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch):
    if INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def outline_of(gist, context):
    """Of a context that was closed, or joined of parts."""
    if isinstance(context, tuple):
        shapes = [PartShape.of(outline_of(gist, length)) for length in context]
        outline = CachedJoinedOutline(gist, 5, shapes, links=2)
        outline.read_links(2 * len(context))
        return outline
    outline, gists = CachedOutline(gist), list(range(gist.levels))
    if context:
        outline.append(rules.insert_gists([0] * context, [context], [True], gist.chunk_sizes, gist.sink, gists, close=True)[1])
    return outline


def batch(name, heads, kv_heads, dim, dtype, device="cpu", recalls=True, whole=False):
    """Queries [N, H, D], caches of one layer and a step: the last token of every sequence asks. Random keys and values."""
    settings, lengths = CASES[name]
    gist = GistConfig(**settings)
    model = ModelConfig(64, layers=1, heads=heads, kv_heads=kv_heads, head_dim=dim, hidden_size=heads * dim)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    if whole:  # small whole numbers: products that every order of sums gives exactly, many of them equal
        draw = lambda *shape: torch.randint(-1, 2, shape, generator=g).float()
    caches, sights = [], []
    for context, suffix in lengths:
        cache = SequenceCache(model, outline_of(gist, context), dtype, torch.device(device))
        level = torch.tensor([-1] * max(suffix, 1))
        if len(level) > 1:
            cache.outline.append(level[:-1])
        sights.append(cache.outline.append(level[-1:], [recalls]))
        for rows, count in zip(cache.layers[0], cache.outline.counts):
            rows.append(*(draw(count, kv_heads, dim).to(device, dtype) for _ in range(2)))
        caches.append(cache)
    q = draw(len(caches), heads, dim).to(device, dtype)
    return q, [cache.layers[0] for cache in caches], step_of(caches, sights)


def rule_of(name, share="head"):
    return SelectRule(**(dict(ratio=8, chunk=4, share=share) | BUDGETS[name]))


def copied(caches, dtype):
    """The same rows as plain tensors of another dtype."""
    memories = [[rows.memory.to(dtype) for rows in layer] for layer in caches]
    read = lambda m, which: lambda lo, hi: m[which, :, lo:hi]
    return [[SimpleNamespace(memory=m, keys=read(m, 0), values=read(m, 1)) for m in layer] for layer in memories]


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("budget", [*BUDGETS, "top-p"])
@pytest.mark.parametrize("name", CASES)
def test_cpu_equals_reference(name, budget, share):
    q, caches, step = batch(name, 4, 2, 6, torch.float64)
    rule = SelectRule(8, 4, top_p=0.4, share=share) if budget == "top-p" else rule_of(budget, share)
    got, want = (decode_attention(q, caches, step, rule, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_cpu_equals_reference_where_nothing_recalls(name):
    q, caches, step = batch(name, 4, 2, 6, torch.float64, recalls=False)
    got, want = (decode_attention(q, caches, step, None, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def plain(q, caches, step, rule, scale):
    """As one writes it in PyTorch: products in q's dtype, softmax in fp32, over what the reference in fp64 sees."""
    from unfold.kernels.decode.reference import visible_items

    outs = []
    for i, layer in enumerate(copied(caches, q.dtype)):
        kv_heads = layer[-1].memory.shape[1]
        for h, own in enumerate(q[i].unflatten(0, (kv_heads, -1))):
            keys = [rows.memory[0, h, :n].double() for rows, n in zip(layer, step.upto[:, i].tolist())]
            seen = visible_items(own.double(), keys, step, i, rule, scale)
            k, v = (torch.cat([rows.memory[w, h, sorted(s)] for rows, s in zip(layer, seen)]) for w in (0, 1))
            weights = (own @ k.T * scale).float().softmax(-1).to(q.dtype)
            outs.append(weights @ v)
    return torch.stack(outs).flatten(0, 1).view_as(q)


def check(name, heads, kv_heads, dim, dtype, budget="adaptive", share="head", recalls=True):
    q, caches, step = batch(name, heads, kv_heads, dim, dtype, DEVICE, recalls)
    rule = rule_of(budget, share)
    exact = decode_attention(q.double(), copied(caches, torch.float64), step, rule, scale=0.1, backend="reference")
    near = plain(q, caches, step, rule, 0.1)
    got = decode_attention(q, caches, step, rule, scale=0.1, backend="triton")
    error, allowed = (got - exact).abs().max(), 2 * (near - exact).abs().max() + 2e-6
    assert got.dtype == dtype and error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@needs_runs
@pytest.mark.parametrize(
    "name,budget,share",
    [
        case if case in SOME else pytest.param(*case, marks=pytest.mark.long)
        for case in itertools.product(CASES, BUDGETS, ("head", "group"))
    ],
)
def test_error_at_most_twice_plain_pytorch(name, budget, share):
    check(name, 4, 2, 64, torch.float32, budget, share)


@needs_runs
@pytest.mark.parametrize("name", ["four levels", "long suffix"])
def test_where_nothing_recalls(name):
    check(name, 4, 2, 64, torch.float32, recalls=False)


@needs_runs
@pytest.mark.parametrize(
    "heads,kv_heads,dim,dtype",
    [
        (3, 3, 80, torch.float16),
        (7, 1, 128, torch.bfloat16),
        (32, 1, 64, torch.float16),
        (4, 2, 96, torch.bfloat16),
        (2, 1, 256, torch.float16),
    ],
)
def test_groups_dimensions_dtypes(heads, kv_heads, dim, dtype):
    check("one level", heads, kv_heads, dim, dtype)


@needs_runs
@pytest.mark.parametrize("budget", [pytest.param("adaptive", marks=pytest.mark.long), "three"])
def test_ties(budget):
    """Scores of small whole numbers, many of them equal: of equal ones the earlier gists."""
    q, caches, step = batch("two levels", 4, 2, 64, torch.float32, DEVICE, whole=True)
    q[..., 3:] = 0
    got, want = (decode_attention(q, caches, step, rule_of(budget), scale=0.1, backend=b) for b in ("triton", "cpu"))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@needs_runs
def test_two_runs_are_bit_equal_and_no_uninitialised_memory_is_read(monkeypatch):
    q, caches, step = batch("four levels", 4, 2, 64, torch.bfloat16, DEVICE)
    run = lambda: decode_attention(q, caches, step, rule_of("three"), backend="triton")
    first = run()
    make = torch.empty
    poisoned = lambda *a, **k: x.fill_(torch.nan if x.is_floating_point() else 2**30) if len(x := make(*a, **k)) else x
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(first, run())


def run_kernels(q, caches, step, rule, change_tables=lambda tables: tables, **how):
    """The Triton kernels as decode_attention launches them, with other tables, tiles or launches."""
    from unfold.kernels.decode import triton as backend

    group = q.shape[1] // caches[0][-1].memory.shape[1]
    tables = backend.make_tables(step, rule, group, q.device)
    places = backend.make_places(q, caches, step, tables.ends)
    return backend.run(q, change_tables(tables), places, 0.1, caches[0][-1].memory.shape[1], rule, **how)


def few_or_many_splits():
    from unfold.kernels.decode.tiles import DecodeTiles, Launch

    return {
        "one program": DecodeTiles(*[Launch(16, 4, 1)] * 3, programs=1, splits=1, part=128),
        "some": DecodeTiles(Launch(32, 1, 1), Launch(16, 2, 1), Launch(16, 1, 2), programs=8, splits=4, held=2),
        "a tile each": DecodeTiles(*[Launch(16, 1, 1)] * 3, programs=10**6, splits=256, held=1, part=16),
    }


@needs_runs
@pytest.mark.parametrize("name,share", [("two levels", "head"), ("four levels", "group"), ("long suffix", "head")])
def test_any_number_of_splits(name, share):
    q, caches, step = batch(name, 4, 2, 64, torch.float32, DEVICE)
    rule = rule_of("three", share)
    want = decode_attention(q, caches, step, rule, scale=0.1, backend="cpu")
    for how, tiles in few_or_many_splits().items():
        got = run_kernels(q, caches, step, rule, tiles=tiles)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0, msg=how)


@needs_runs
@pytest.mark.parametrize("budget", ["three", pytest.param("everything", marks=pytest.mark.long)])
def test_what_several_heads_select_counts_once(budget):
    """Heads with one and the same query select the same, heads with similar ones much of it."""
    q, caches, step = batch("two levels", 8, 2, 64, torch.float32, DEVICE)
    alike = q.unflatten(1, (2, 4))[:, :, :1].expand(-1, -1, 4, -1).flatten(1, 2).contiguous()
    alike[:, 1::4] += 0.2 * q[:, 1::4]
    rule = rule_of(budget)
    got, want = (decode_attention(alike, caches, step, rule, scale=0.1, backend=b) for b in ("triton", "cpu"))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


@needs_runs
def test_a_step_in_larger_buckets():
    """As a captured graph runs it, which was captured for longer sequences."""
    q, caches, step = batch("two levels", 4, 2, 64, torch.float32, DEVICE)
    larger = lambda tables: dataclasses.replace(
        tables,
        candidates=tuple(4 * n for n in tables.candidates),
        widths=tuple(w + 4 for w in tables.widths),
        room=2 * tables.room,
        rows=4 * tables.rows,
    )
    for budget in ("adaptive", "three"):
        want = decode_attention(q, caches, step, rule_of(budget), scale=0.1, backend="cpu")
        torch.testing.assert_close(run_kernels(q, caches, step, rule_of(budget), larger), want, atol=2e-6, rtol=0)


@needs_runs
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_end_the_search_and_harm_nobody_else(bad):
    """No list grows beyond its budget into another's, whatever the scores: the other sequences' outputs stay as they are."""
    q, caches, step = batch("two levels", 4, 2, 64, torch.float32, DEVICE)
    want = run_kernels(q, caches, step, rule_of("three"))
    caches[0][0].memory[0, 1, ::3] = bad  # the keys of some top gists of one KV head
    caches[0][1].memory[0, 0] = bad
    got = run_kernels(q, caches, step, rule_of("three"))
    assert torch.equal(got[1:], want[1:])


@needs_runs
@pytest.mark.parametrize(
    "heads,dim,dtype,message",
    [(1, 72, torch.float32, "head dimension 72"), (1, 64, torch.float64, "float64"), (33, 64, torch.float32, "33 query heads")],
)
def test_what_the_kernels_do_not_serve_is_refused(heads, dim, dtype, message):
    q, caches, step = batch("one level", heads, 1, dim, dtype, DEVICE)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, caches, step, rule_of("one"), backend="triton")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=torch.zeros(1, 4, 6, dtype=torch.float64)), "q: shape"),
        (dict(q=torch.zeros(2, 4, 6)), "does not fit a cache of torch.float64"),
        (dict(rule=None), "rule: None, but some tokens recall"),
        (dict(backend="fpga"), "backend: 'fpga'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, caches, step = batch("one level", 4, 2, 6, torch.float64)
    with pytest.raises(ValueError, match=message):
        decode_attention(change.get("q", q), caches, step, change.get("rule", rule_of("one")) if "rule" not in change else None,
                         backend=change.get("backend"))  # fmt: skip


def test_a_step_forgets_without_its_plans():
    _, _, step = batch("one level", 4, 2, 6, torch.float64)
    step.memo("something", lambda: 1)
    assert isinstance(step.forgetting(), Step) and not step.forgetting().recalls.any() and not step.forgetting().plans
