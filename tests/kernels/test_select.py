"""Selection: the reference against the rules restated literally, the CPU path against the reference, ties, budgets."""

import pytest
import torch

from tests import recall_rules
from tests.kernels.cases import make_layout, structure
from tests.kernels.recall_cases import CASES, RULES, SUFFIX_CASES, make_recall, make_rule, random_qkv, recalling, suffix_layout
from unfold.kernels.select import SelectRule, select_gists, take_best
from unfold.model.gist import GistConfig, build_recall, recalling_tokens, select_rule

ALL = [*CASES, *SUFFIX_CASES]


def as_tokens(selection, tree, n, h):
    """{level: set of tokens} of one query and KV head."""
    sample = int(tree.tokens[n]) // tree.others.tokens
    rows = tree.others.rows[sample]
    return {tree.levels - 1 - s: set(rows[selection.of(s, n, h).long()].tolist()) for s in range(tree.levels)}


def document_of(tree, layout, config, n):
    sample, token = divmod(int(tree.tokens[n]), layout.level.shape[1])
    level, doc, *linked = structure(layout, sample)
    where = (config.levels, config.chunk_sizes, config.sink, config.n_prev)
    return sample, recall_rules.Document(level, doc, token, *where, *linked)


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("name", ["three levels", "jittered chunks", "closed context", *SUFFIX_CASES])
def test_reference_follows_the_rules(name, rule_name, share):
    layout, config, tree = make_recall(name)
    rule = make_rule(rule_name, config, share)
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float64)
    selection = select_gists(recalling(q, tree), k, tree, rule, backend="reference")
    how = dict(topk=rule.topk, top_p=rule.top_p, ratio=rule.ratio, everything=rule.everything)
    for n in range(0, tree.queries, 3):
        sample, document = document_of(tree, layout, config, n)
        for h in range(2):
            token = document.i
            scores = [(k[sample, :, h] @ q[sample, token, 2 * h + i] / 6**0.5).tolist() for i in range(2)]
            want = recall_rules.group_selection(document, scores, share, **how)
            assert as_tokens(selection, tree, n, h) == want, (n, h)


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("name", ALL)
def test_cpu_equals_reference(name, heads, kv_heads, share):
    layout, config, tree = make_recall(name)
    q, k, *_ = random_qkv(layout, heads, kv_heads, 6, torch.float64)
    for rule_name in RULES:
        rule = make_rule(rule_name, config, share)
        got, want = (select_gists(recalling(q, tree), k, tree, rule, backend=b) for b in ("cpu", "reference"))
        for s in range(tree.levels):
            assert torch.equal(got.start[s], want.start[s]) and torch.equal(got.rows[s], want.rows[s]), rule_name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_equal_scores_the_earlier_gist_wins(backend):
    """All keys equal, in numbers whose sums are exact, so that every score ties: the document's first gists are taken."""
    layout, config, tree = make_recall("packed documents")
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float32)
    q, k = (q * 4).round(), torch.ones_like(k)
    selection = select_gists(recalling(q, tree), k, tree, SelectRule(8, 4, topk=2), backend=backend)
    for n in range(tree.queries):
        _, document = document_of(tree, layout, config, n)
        want = recall_rules.select(document, [0.0] * layout.level.shape[1], 2, topk=2)
        assert as_tokens(selection, tree, n, 0) == as_tokens(selection, tree, n, 1) == want
        assert want[1] == set(document.gists(1)[:2])


def test_ties_at_the_bound_only():
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 1.0, 0.0, 9.0], [0.0, 2.0, 2.0, 2.0, -1.0, 2.0]])
    candidates = torch.tensor([[True] * 6, [True, False, True, True, True, False], [True] * 6])
    taken = take_best(scores, candidates, torch.tensor([4, 2, 3]))
    assert [row.nonzero()[:, 0].tolist() for row in taken] == [[0, 1, 2, 5], [0, 2], [1, 2, 3]]


def test_scores_that_tie_in_half_precision():
    """In bf16 many scores are equal: both backends take gists of the same scores, the CPU path as many as the budget."""
    layout, config, tree = make_recall("jittered chunks")
    q, k, *_ = random_qkv(layout, 2, 2, 4, torch.bfloat16)
    rows, keys = recalling(q, tree), (k[0] * 2).round() / 2
    got, want = (select_gists(rows, keys[None], tree, SelectRule(1, 1, topk=3), backend=b) for b in ("cpu", "reference"))
    order = tree.others.rows[0]
    for n in range(tree.queries):
        for h in range(2):
            scores = [(keys[order[s.of(0, n, h).long()], h].float() @ rows[n, h].float()).sort().values for s in (got, want)]
            torch.testing.assert_close(*scores)


def test_selection_carries_no_gradient_and_repeats_exactly():
    layout, config, tree = make_recall("jittered chunks")
    q, k, *_ = random_qkv(layout, 4, 2, 6, torch.float32)
    first, second = (select_gists(recalling(q, tree), k, tree, SelectRule(2, 1)) for _ in range(2))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first.rows + first.start, second.rows + second.start))


def test_adaptive_budget():
    rule = SelectRule(ratio=32, chunk=8)
    span, gists = torch.tensor([10, 255, 256, 4096, 4096, 4096]), torch.tensor([0, 100, 100, 1000, 7, 8])
    assert rule.budget(span, gists, 1).tolist() == [1, 1, 2, 17, 1, 2]
    assert rule.budget(span, gists, 4).tolist() == [1, 1, 1, 5, 1, 2]
    assert SelectRule(32, 8, topk=9).budget(span, gists, 4).tolist() == [9] * 6, "a fixed number is not capped"


def test_which_tokens_recall():
    layout, config, suffix = suffix_layout("suffixes of packed documents")
    raw = (layout.level == -1) & (layout.doc >= 0)
    assert torch.equal(recalling_tokens(layout, GistConfig((3, 2, 2), recall="all")), raw)
    assert torch.equal(recalling_tokens(layout, config, suffix), suffix)
    assert not recalling_tokens(layout, GistConfig((3, 2, 2))).any()
    with pytest.raises(ValueError, match="recall: 'suffix' needs to know"):
        recalling_tokens(layout, config)
    everything = torch.ones_like(suffix)
    assert torch.equal(build_recall(layout, config, everything).tokens, raw.flatten().nonzero()[:, 0]), "gists recall"


def test_rule_of_a_configuration():
    assert select_rule(GistConfig((8, 4))) == SelectRule(32, 8)
    assert select_rule(GistConfig((4,), budget_ratio=7, share="group")) == SelectRule(7, 4, share="group")
    assert select_rule(GistConfig((4, 4), topk=5)).topk == 5
    everything = select_rule(GistConfig((4, 4), top_p=0.5, unfold_all=True))
    assert everything == SelectRule(16, 4, everything=True) and everything.top_p is None
    span, gists = torch.tensor([5, 90]), torch.tensor([0, 17])
    assert everything.budget(span, gists, 2).tolist() == [1, 17]


def test_configuration_names_what_is_wrong():
    with pytest.raises(ValueError) as error:
        GistConfig((8, 4), recall="some", topk=0, top_p=1.5, budget_ratio=0, share="all")
    for text in ("recall: 'some'", "topk: 0", "top_p: 1.5", "budget_ratio: 0", "share: 'all'", "at most one of them"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=torch.zeros(4, 8)), "q: torch.float32"),
        (dict(q=torch.zeros(5, 4, 8)), "q: 5 queries, the tree has"),
        (dict(k=torch.zeros(1, 5, 2, 8)), "k: shape"),
        (dict(k="double"), "k: torch.float64"),
        (dict(k="three"), "k: 3 KV heads do not divide q's 4 heads"),
        (dict(backend="fpga"), "backend: .fpga. is not one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    layout, config, tree = make_recall("packed documents")
    q, k, *_ = random_qkv(layout, 4, 2, 8, torch.float32)
    keys = {"double": k.double(), "three": torch.cat([k, k[:, :, :1]], 2)}
    k = keys.get(change.get("k")) if isinstance(change.get("k"), str) else change.get("k", k)
    with pytest.raises(ValueError, match=message):
        select_gists(change.get("q", recalling(q, tree)), k, tree, SelectRule(8, 4), backend=change.get("backend"))


def test_recalls_of_another_shape_are_refused():
    layout, config = make_layout("one level")
    with pytest.raises(ValueError, match="recalls: torch.bool"):
        build_recall(layout, config, torch.ones(1, 3, dtype=torch.bool))
