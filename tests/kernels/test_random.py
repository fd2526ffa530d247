"""Selection, unfolding and the routing loss on random micro-batches: the CPU path against plain loops, gradients included."""

import pytest
import torch

from tests.kernels.random_cases import gradients, random_case, whole_numbers
from unfold.kernels.route import routing_loss
from unfold.kernels.select import select_gists
from unfold.kernels.unfold import recall_attention

SCALE = 0.25  # a power of two: scores of whole numbers tie exactly, however they are summed
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
SEEDS = [*range(12), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 300))]


@pytest.mark.parametrize("seed", SEEDS)
def test_cpu_equals_reference(seed):
    case = random_case(seed)
    *qkv, d_out = case.draw([2, 3, 6][seed % 3], torch.float64, seed)
    q, k = case.tree_queries(qkv[0]), qkv[1]
    if case.rule.top_p is not None:  # a sum of shares may be p but for rounding
        q = q + torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=q.dtype)
    got, want = (select_gists(q, k, case.tree, case.rule, scale=SCALE, backend=name) for name in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got.start + got.rows, want.start + want.rows))

    read = {}

    def layer(name):
        def run(*leaves):
            out, read[name] = recall_attention(*leaves, case.tree, case.rule, scale=SCALE, backend=name)
            return out

        return gradients(run, qkv, d_out)

    if case.rule.top_p is None:
        for a, b in zip(layer("cpu"), layer("reference")):
            torch.testing.assert_close(a, b, **TOLERANCE)
        torch.testing.assert_close(read["cpu"].unfolded, read["reference"].unfolded)
        torch.testing.assert_close(read["cpu"].selected, read["reference"].selected)

    asking = case.routed_queries(qkv[0])
    loss = lambda name: lambda k: routing_loss(asking, k, case.routed, far=case.far, scale=SCALE, backend=name)
    for a, b in zip(*(gradients(loss(name), qkv[1:2]) for name in ("cpu", "reference"))):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_the_cases_are_of_every_kind():
    """Levels, heads, rules, several samples, some without a query, some without a gist, links, windows of no chunk."""
    cases = [random_case(seed) for seed in range(60)]
    assert {case.tree.levels for case in cases} == {1, 2, 3, 4} and {case.heads // case.kv_heads for case in cases} >= {
        1,
        3,
        5,
        16,
    }
    assert any(case.tree.queries == 0 for case in cases) and any(case.layout.role is not None for case in cases)
    splits = [torch.tensor(case.tree.splits).diff() for case in cases]
    assert any((n == 0).any() and (n > 0).any() for n in splits)
    gists = [case.tree.others.segment_start[:, case.tree.levels] for case in cases]
    assert any((n == 0).any() and (n > 0).any() for n in gists)
    assert any(case.rule.everything for case in cases) and any(case.rule.share == "group" for case in cases)
    assert any(case.rule.topk for case in cases) and any(case.rule.top_p for case in cases)


def test_draws_are_whole_numbers():
    x = whole_numbers((4, 50), 0, torch.float32)
    assert torch.equal(x, x.round()) and x.abs().max() == 6
