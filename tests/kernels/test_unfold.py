"""Unfolding: visible sets against the rules, the CPU path against the reference, everything selected against dense."""

import subprocess
import sys

import pytest
import torch

from tests import recall_rules
from tests.kernels.cases import make_layout, together
from tests.kernels.recall_cases import CASES, RULES, SUFFIX_CASES, check_apart, make_recall, make_rule, random_qkv, recalling
from tests.kernels.test_select import as_tokens, document_of
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.select import SelectRule, select_gists
from unfold.kernels.unfold import cpu, recall_attention, unfold_attention
from unfold.kernels.unfold.reference import visible_tokens
from unfold.model.gist import build_recall

ALL = [*CASES, *SUFFIX_CASES]


def run(backend, qkv, d_out, tree, rule):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out, stats = recall_attention(*leaves, tree, rule, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out)), stats


@pytest.mark.parametrize("name", ALL)
def test_visible_sets_follow_the_rules(name):
    layout, config, tree = make_recall(name)
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float64)
    selection = select_gists(recalling(q, tree), k, tree, make_rule("adaptive, small ratio", config, "head"))
    for n in range(0, tree.queries, 2):
        _, document = document_of(tree, layout, config, n)
        for h in range(2):
            want = recall_rules.unfolded(document, as_tokens(selection, tree, n, h))
            assert visible_tokens(tree, selection, n, h) == want


@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("heads,kv_heads,share", [(2, 2, "head"), (6, 2, "head"), (6, 2, "group")])
@pytest.mark.parametrize("name", ALL)
def test_cpu_equals_reference(name, heads, kv_heads, share, rule_name):
    layout, config, tree = make_recall(name)
    rule = make_rule(rule_name, config, share)
    *qkv, d_out = random_qkv(layout, heads, kv_heads, 6, torch.float64)
    (got, got_stats), (want, want_stats) = (run(b, qkv, d_out, tree, rule) for b in ("cpu", "reference"))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert torch.equal(got_stats.unfolded, want_stats.unfolded) and torch.equal(got_stats.selected, want_stats.selected)


@pytest.mark.parametrize("rule", [SelectRule(1, 1, topk=10**6), SelectRule(1, 1, everything=True)], ids=["topk", "everything"])
@pytest.mark.parametrize("name", ALL)
def test_with_everything_selected_recall_is_attention_over_the_document(name, rule):
    """Against a dense softmax over all that stands before a query in its document, raw tokens and gists."""
    layout, config, tree = make_recall(name)
    *qkv, d_out = random_qkv(layout, 4, 2, 6, torch.float64)
    (got, *grads), _ = run("cpu", qkv, d_out, tree, rule)

    causal = torch.ones(layout.level.shape[1:] * 2, dtype=torch.bool).tril()
    recalls = torch.zeros_like(layout.doc, dtype=torch.bool)
    recalls.view(-1)[tree.tokens] = True
    mask = torch.where(recalls[..., None], together(layout) & causal, layout.intervals.dense_mask())
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 2) for x in leaves[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 6**0.5
    out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)
    for a, b in zip((got, *grads), (out.detach(), *torch.autograd.grad(out, leaves, d_out))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_patterns_of_any_size_agree(monkeypatch):
    """One pattern per head and block of queries gives what one for all gives."""
    layout, config, tree = make_recall("packed documents")
    *qkv, d_out = random_qkv(layout, 6, 3, 6, torch.float64)
    rule = make_rule("adaptive, small ratio", config, "head")
    whole, _ = run("cpu", qkv, d_out, tree, rule)
    monkeypatch.setattr("unfold.kernels.unfold.cpu.CHUNKS", 1)
    monkeypatch.setattr("unfold.kernels.unfold.cpu.BLOCK", 7)
    monkeypatch.setattr("unfold.kernels.unfold.pattern.NUMBERS", 1)
    for a, b in zip(run("cpu", qkv, d_out, tree, rule)[0], whole):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_patterns_are_bounded_where_little_is_selected(monkeypatch):
    """One chunk per query fills no pattern for long: what lies beside the chunks (windows, upper gists) must end it."""
    layout, _, tree = make_recall("jittered chunks")
    *qkv, d_out = random_qkv(layout, 4, 2, 6, torch.float64)
    rule = SelectRule(1, 1, topk=1)
    whole, _ = run("cpu", qkv, d_out, tree, rule)
    monkeypatch.setattr("unfold.kernels.unfold.cpu.BLOCK", 8)
    monkeypatch.setattr("unfold.kernels.unfold.cpu.LOCAL", 2**12)
    selection = select_gists(recalling(qkv[0], tree), qkv[1], tree, rule)
    entries = [
        [piece.hidden.numel() * 2 for piece in p.local] for p in cpu._patterns(tree, selection, 2, tree.others.rows.numel())
    ]
    assert len(entries) > 3 and all(sum(pieces[:-1]) < 2**12 for pieces in entries)
    for a, b in zip(run("cpu", qkv, d_out, tree, rule)[0], whole):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SUFFIX_CASES)
def test_chunks_may_stand_apart(name, backend):
    """What lies apart is read there and gets its gradient there; what was read is the same."""
    check_apart(name, backend, 6, torch.float64, 1e-12)


def test_those_that_do_not_recall_keep_the_compressed_mask():
    layout, config, tree = make_recall("suffixes of packed documents")
    *qkv, _ = random_qkv(layout, 4, 2, 6, torch.float64)
    out, _ = recall_attention(*qkv, tree, SelectRule(6, 3))
    change = (out - compressed_attention(*qkv, layout.intervals)).abs().flatten(2).amax(-1)
    recalls = torch.zeros_like(change, dtype=torch.bool).view(-1).index_fill_(0, tree.tokens, True).view_as(change)
    assert change[~recalls].max() < 1e-12 and change[recalls].median() > 0.1


def test_nothing_recalls():
    layout, config = make_layout("two levels")
    tree = build_recall(layout, config, torch.zeros_like(layout.level, dtype=torch.bool))
    *qkv, d_out = random_qkv(layout, 4, 2, 6, torch.float32)
    (out, *_), stats = run("cpu", qkv, d_out, tree, SelectRule(6, 3))
    torch.testing.assert_close(out, compressed_attention(*qkv, layout.intervals), atol=0, rtol=0)
    assert stats.unfolded == 0 and stats.selected.tolist() == [0, 0]


def test_unselected_gists_and_folded_tokens_do_not_matter():
    """What no recalling query sees may hold anything."""
    layout, config, tree = make_recall("suffix")
    q, k, v, _ = random_qkv(layout, 2, 1, 8, torch.float32)
    rows = recalling(q, tree)[:1]
    alone = torch.zeros_like(layout.level, dtype=torch.bool)
    alone.view(-1)[tree.tokens[0]] = True
    tree = build_recall(layout, config, alone)
    selection = select_gists(rows, k, tree, SelectRule(8, 4))
    hidden = sorted(set(range(layout.level.shape[1])) - visible_tokens(tree, selection, 0, 0))
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    dirty_k[:, hidden], dirty_v[:, hidden] = 1e30, 1e30
    clean, dirty = (unfold_attention(rows, *kv, tree, selection) for kv in ((k, v), (dirty_k, dirty_v)))
    assert len(hidden) > 20
    torch.testing.assert_close(clean, dirty, atol=0, rtol=0)


def test_gradients_reach_selected_gists_only():
    layout, config, tree = make_recall("suffix")
    q, k, v, _ = random_qkv(layout, 2, 1, 8, torch.float64)
    selection = select_gists(recalling(q, tree), k, tree, SelectRule(8, 4))
    d_k, d_v = torch.autograd.grad(unfold_attention(recalling(q, tree), k, v, tree, selection).square().sum(), (k, v))
    seen = set().union(*(visible_tokens(tree, selection, n, 0) for n in range(tree.queries)))
    for grad in (d_k, d_v):
        assert set(grad[0].abs().sum((1, 2)).nonzero()[:, 0].tolist()) == seen
    assert any(layout.level[0, token] >= 0 for token in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_error_at_most_twice_plain_pytorch(dtype):
    layout, config, tree = make_recall("packed documents")
    q, k, v, _ = random_qkv(layout, 4, 2, 16, dtype)
    rows = recalling(q, tree).detach()
    d_out = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    selection = select_gists(rows, k, tree, make_rule("adaptive, small ratio", config, "head"))

    def attend(backend, upcast):
        leaves = [(x.double() if upcast else x).detach().clone().requires_grad_() for x in (rows, k, v)]
        out = unfold_attention(*leaves, tree, selection, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype)))

    for got, near, true in zip(attend("cpu", False), attend("reference", False), attend("reference", True)):
        assert got.dtype == dtype
        assert (got - true).abs().max() <= 2 * (near - true).abs().max()


def test_two_runs_are_bit_equal():
    layout, config, tree = make_recall("jittered chunks")
    *qkv, d_out = random_qkv(layout, 4, 2, 16, torch.float32)
    (first, _), (second, _) = (run("cpu", qkv, d_out, tree, SelectRule(2, 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_what_was_read_is_counted():
    """Of a set, not of a list: the union of two heads that agree is as large as each."""
    layout, config, tree = make_recall("suffix")
    q, k, v, _ = random_qkv(layout, 4, 2, 6, torch.float64)
    q = q[:, :, :1].expand(-1, -1, 4, -1)
    k = k[:, :, :1].expand(-1, -1, 2, -1)
    _, stats = recall_attention(q, k, v, tree, SelectRule(8, 4, topk=2))
    assert stats.selected.tolist() == [2.0, 2.0]
    selection = select_gists(recalling(q, tree), k, tree, SelectRule(8, 4, topk=2))
    extra = 0
    for n in range(tree.queries):
        _, document = document_of(tree, layout, config, n)
        chunks = {j for j in document.raw() if document.parent(j) in as_tokens(selection, tree, n, 0)[0]}
        extra += len(chunks - document.window() - set(document.sinks()))
    assert stats.unfolded == pytest.approx(extra / tree.queries)


def test_bad_arguments_are_named():
    layout, config, tree = make_recall("packed documents")
    q, k, v, _ = random_qkv(layout, 4, 2, 8, torch.float32)
    rows = recalling(q, tree)
    selection = select_gists(rows, k, tree, SelectRule(8, 4))
    with pytest.raises(ValueError, match="v: torch.float64"):
        unfold_attention(rows, k, v.double(), tree, selection)
    with pytest.raises(ValueError, match="selection: .* lists for 2 KV heads"):
        unfold_attention(rows, k[:, :, :1], v[:, :, :1], tree, selection)
    with pytest.raises(ValueError, match="q: 3 queries, the tree has"):
        unfold_attention(rows[:3], k, v, tree, selection)
    with pytest.raises(ValueError, match="backend: 'fpga'"):
        unfold_attention(rows, k, v, tree, selection, backend="fpga")


@pytest.mark.parametrize("recall", ["suffix", "all"])
def test_memory_at_32k(recall):
    """Peak of forward and backward at 32k raw tokens, 8 heads, in its own process; inputs are 3 x 88 MB."""
    raw = {"suffix": "32768", "all": "8192"}[recall]
    probe = [sys.executable, "-m", "tests.benchmarks.unfold_cpu", "--peak", raw, "--recall", recall]
    peak_mb = float(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    assert peak_mb < {"suffix": 2000, "all": 800}[recall], f"{peak_mb:.0f} MB beyond the inputs"
