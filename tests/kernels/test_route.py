"""The routing loss: the reference against the formula restated over tokens, the CPU path against the reference, masses."""

import dataclasses
import math

import pytest
import torch

from tests import recall_rules
from tests.kernels.cases import structure
from tests.kernels.recall_cases import SUFFIX_CASES, make_layout
from tests.kernels.route_cases import ALL, make_routed, queries_and_keys
from unfold.kernels.route import Routed, chunk_mass, cpu, routing_loss
from unfold.kernels.route.reference import masses_reference
from unfold.model.gist import build_recall

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


def loss_and_gradient(q, k, routed, **how):
    loss = routing_loss(q, k, routed, **how)
    gradient = torch.autograd.grad(loss, k)[0] if loss.requires_grad else torch.zeros_like(k)
    return loss.detach(), gradient


def literal_loss(q, k, places, token, config, far, scale):
    """One query and head of one sample, over lists of tokens. q: [D]; k: [T, D]; places: level, doc, role, part."""
    level, doc, *linked = places
    how = config.levels, config.chunk_sizes, config.sink, config.n_prev
    document = recall_rules.Document(level, doc, token, *how, *linked)
    raw = document.raw()
    weight = {t: math.exp(float(k[t] @ q) * scale) for t in raw}
    behind = {g: [t for t in raw if document.parent(t) == g and t not in document.sinks()] for g in document.gists(0)}
    if far:
        behind = {g: [] if document.window() & set(own) else own for g, own in behind.items()}
    mass = {g: sum(weight[t] for t in own) / sum(weight.values()) for g, own in behind.items()}
    loss = 0.0
    for l in range(config.levels):
        gists = document.gists(l)
        if l:
            mass = {g: sum(m for c, m in mass.items() if document.parent(c) == g) for g in gists}
        scores = {g: float(k[g] @ q) * scale for g in gists}
        if gists:
            log_sum = math.log(sum(map(math.exp, scores.values())))
            loss -= sum(mass[g] * (scores[g] - log_sum) for g in gists)
    return loss


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    "name",
    ["two levels", "three levels", "packed documents", "closed context", "no sink", "no neighbour", "suffix of linked parts"],
)
def test_the_reference_follows_the_formula(name, far):
    layout, routed = make_routed(name, share=0.2)
    _, config = make_layout(SUFFIX_CASES.get(name, name))
    q, k = queries_and_keys(layout, routed, 2, 1, 4, torch.float64)
    want, (tree, tokens) = 0.0, (routed.tree, layout.level.shape[1])
    for n in range(tree.queries):
        sample, token = divmod(int(tree.tokens[n]), tokens)
        places = structure(layout, sample)
        want += sum(literal_loss(q[n, h], k[sample, :, 0].detach(), places, token, config, far, 0.5) for h in range(2))
    got = routing_loss(q, k, routed, far=far, scale=0.5, backend="reference")
    assert tree.queries and got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("heads,kv_heads,far", [(3, 3, True), (4, 2, False)])
@pytest.mark.parametrize("name", ALL)
def test_cpu_equals_reference(name, heads, kv_heads, far, monkeypatch):
    """Also in blocks and pieces so small that there are many."""
    layout, routed = make_routed(name)
    q, k = queries_and_keys(layout, routed, heads, kv_heads, 6, torch.float64)
    want = loss_and_gradient(q, k, routed, far=far, backend="reference")
    for queries, scores in ((64, 2**16), (5, 40)):
        monkeypatch.setattr(cpu, "QUERIES", queries)
        monkeypatch.setitem(cpu.SCORES, "cpu", scores)
        for a, b in zip(loss_and_gradient(q, k, routed, far=far, backend="cpu"), want):
            torch.testing.assert_close(a, b, **TOLERANCE)


def test_gists_alone_get_a_gradient():
    layout, routed = make_routed("jittered chunks")
    q, k = queries_and_keys(layout, routed, 4, 2, 6, torch.float64)
    q.requires_grad_()
    for backend in ("cpu", "reference"):
        loss = routing_loss(q, k, routed, backend=backend)
        d_q, d_k = torch.autograd.grad(3 * loss, (q, k), allow_unused=True)
        assert d_q is None
        moved = d_k.abs().sum((2, 3)) > 0
        assert moved.any() and not moved[layout.level < 0].any()
        torch.testing.assert_close(d_k, 3 * torch.autograd.grad(routing_loss(q, k, routed), k)[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["packed documents", "suffixes of packed documents"])
def test_what_no_query_has_is_never_read(name):
    layout, routed = make_routed(name, share=0.1)
    q, k = queries_and_keys(layout, routed, 4, 2, 6, torch.float64)
    tree, tokens = routed.tree, layout.level.shape[1]
    seen = torch.zeros(layout.level.shape, dtype=torch.bool)
    for n in range(tree.queries):
        sample, token = divmod(int(tree.tokens[n]), tokens)
        seen[sample, : token + 1] |= layout.doc[sample, : token + 1] == layout.doc[sample, token]
    poisoned = torch.where(seen[..., None, None], k.detach(), torch.nan).requires_grad_()
    assert not seen.all()
    for far in (False, True):
        want, d_want = loss_and_gradient(q, k, routed, far=far)
        got, d_got = loss_and_gradient(q, poisoned, routed, far=far)
        assert torch.equal(got, want) and torch.equal(d_got, d_want)


def test_16_bits_are_summed_in_fp32():
    layout, routed = make_routed("jittered chunks")
    q, k = queries_and_keys(layout, routed, 4, 2, 16, torch.bfloat16)
    loss, d_k = loss_and_gradient(q, k, routed)
    want, d_want = loss_and_gradient(q.double(), k.detach().double().requires_grad_(), routed, backend="reference")
    assert loss.dtype == torch.float32 and d_k.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(d_k.double(), d_want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", ["three levels", "packed documents", "suffixes of packed documents"])
def test_masses_of_chunks(name, far, monkeypatch):
    monkeypatch.setattr(cpu, "QUERIES", 7)
    layout, routed = make_routed(name)
    q, k = queries_and_keys(layout, routed, 4, 2, 6, torch.float64)
    tree, found = routed.tree, []
    for block in chunk_mass(q, k, routed, far=far):
        for i, n in enumerate(range(block.queries.start, block.queries.stop)):
            found.append(n)
            keys = k.detach()[block.sample][tree.others.rows[block.sample, : k.shape[1]]]
            for h in range(4):
                want = masses_reference(q[n, h], keys[:, h // 2], routed, n, block.sample, far, 6**-0.5)
                for s, mass in enumerate(block.mass):
                    inside = {block.first[s] + c: m for c, m in enumerate(mass[i, h].tolist()) if m}
                    assert inside == pytest.approx({row: float(m) for row, m in want[s].items() if m}, abs=1e-12)
    assert found == list(range(tree.queries))


def test_plans_are_kept_for_the_sampled_queries_alone():
    """The tree of all recalling queries may share the intervals of that of the sampled ones: plans of one are not the other's."""
    layout, routed = make_routed("two levels", share=0.5)
    _, config = make_layout("two levels")
    everyone = build_recall(layout, config, layout.doc >= 0)
    other = Routed(dataclasses.replace(routed.tree, others=everyone.others), routed.first)
    everyone.plan(64)
    q, k = queries_and_keys(layout, routed, 4, 2, 6, torch.float64)
    assert torch.equal(routing_loss(q, k, other), routing_loss(q, k, routed)) and routed.plans
    assert routed.to("cpu").plans == {} and routed == Routed(routed.tree, routed.first)


def test_no_query():
    layout, routed = make_routed("two levels", share=0.0)
    q, k = queries_and_keys(layout, routed, 4, 2, 6, torch.bfloat16)
    loss, d_k = loss_and_gradient(q, k, routed)
    assert routed.tree.queries == 0 and loss == 0 and loss.dtype == torch.float32 and not d_k.any()
    assert list(chunk_mass(q, k, routed)) == []


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=torch.zeros(5, 4, 8)), "q: 5 queries, the tree has"),
        (dict(k=torch.zeros(1, 5, 2, 8)), "k: shape"),
        (dict(first=torch.zeros(3, dtype=torch.int32)), "routed: first is torch.int32 .3,., expected"),
        (dict(first="long"), "routed: first is torch.int64"),
        (dict(backend="fpga"), "backend: .fpga. is not one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    layout, routed = make_routed("packed documents")
    q, k = queries_and_keys(layout, routed, 4, 2, 8, torch.float32)
    first = change.get("first", routed.first)
    routed = Routed(routed.tree, routed.first.long() if isinstance(first, str) else first)
    with pytest.raises(ValueError, match=message):
        routing_loss(change.get("q", q), change.get("k", k), routed, backend=change.get("backend"))
