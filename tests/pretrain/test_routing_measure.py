"""Coverage, hits and distances of a selection, against plain loops over one query and head at a time."""

import pytest
import torch

from tests.pretrain.test_attention_mass import make
from unfold.kernels.select import select_gists
from unfold.model.gist import GistConfig, Recall, build_layout
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.monitor.routing import PAIRS, RoutingMeasure, neighbours


def measured(config, q, k, layout):
    recall = Recall.of(layout, config)
    measure = RoutingMeasure(config, 3)
    measure.look(MicroBatchAttention("gist", layout, recall), 1, q, k)
    return measure, recall


def coverage_by_loops(config, q, k, layout, recall, level, far):
    """(mass of what was selected, of as many best ones), summed over the queries that were measured."""
    group = q.shape[2] // k.shape[2]
    routed = neighbours(layout, config, recall)
    tree = routed.tree
    rule = recall.rule
    one = best = 0.0
    for n, token in enumerate(tree.tokens.tolist()):
        sample, place = divmod(token, layout.level.shape[1])
        doc, level_of = layout.doc[sample], layout.level[sample]
        raw = [t for t in range(place + 1) if doc[t] == doc[place] and level_of[t] < 0]
        for head in range(q.shape[2]):
            keys = k[sample, :, head // group]
            weight = torch.softmax(torch.stack([keys[t] @ q[sample, place, head] for t in raw]) / q.shape[3] ** 0.5, 0)
            weight = dict(zip(raw, weight.tolist()))
            mass = {}
            for s in range(tree.levels):
                for row in range(int(tree.lo[s, n]), int(tree.hi[s, n])):
                    mass[s, row] = 0.0
            last = tree.levels - 1
            window = int(tree.lo[tree.levels, n])
            for row in range(int(tree.lo[last, n]), int(tree.hi[last, n])):
                lo, hi = int(tree.child_lo[sample, row]), int(tree.child_hi[sample, row])
                held = 0.0 if far and hi > window else sum(weight[int(tree.others.rows[sample, r])] for r in range(lo, hi))
                s, at = last, row
                while at >= 0 and (s, at) in mass:
                    mass[s, at] += held
                    at, s = int(tree.parent[sample, at]), s - 1
            s = tree.levels - 1 - level
            alone = type(rule)(rule.ratio * group, rule.chunk, rule.topk)
            asking = q.flatten(0, 1)[tree.tokens][:, head : head + 1]
            chosen = select_gists(asking, k[:, :, head // group, None].contiguous(), tree, alone)
            rows = chosen.of(s, n, 0).tolist()
            one += sum(mass[s, r] for r in rows)
            best += sum(sorted((m for (seg, _), m in mass.items() if seg == s), reverse=True)[: len(rows)])
    return one, best


@pytest.mark.parametrize("sizes", [(4,), (4, 2)])
def test_coverage_is_that_of_plain_loops(sizes):
    config = GistConfig(sizes, recall="all", topk=2)
    layout, q, k = make(config, lengths=(40, 21))
    q, k = q.double(), k.double()
    measure, recall = measured(config, q, k, layout)
    found = measure.by_layer()
    assert [entry["layer"] for entry in found] == [1]
    for level in range(len(sizes)):
        for name, far in (("coverage", False), ("far_coverage", True)):
            one, best = coverage_by_loops(config, q, k, layout, recall, level, far)
            assert found[0][name][level] == pytest.approx(one / best, rel=1e-9)
    assert 0 < found[0]["hit"][0] < 1 and 0 <= found[0]["neighbour_distance"] <= 1
    assert measure.overall()["coverage_0"] == pytest.approx(found[0]["coverage"][0])


def test_who_selects_what_attention_looks_for_covers_all():
    """Gists whose keys are the mean of their chunk's, where a query looks at one chunk only."""
    config = GistConfig((4,), recall="all", topk=3)
    layout, q, k = make(config, lengths=(64,))
    level = layout.level[0]
    chunk = (level == 0).cumsum(0) - (level == 0).int()
    width = q.shape[3]
    sign = torch.randn(int(chunk.max()) + 1, width, generator=torch.Generator().manual_seed(0)).sign() * 3
    k = sign[chunk][None, :, None].expand_as(k).contiguous()
    q = k[:, :, :1].roll(24, 1).expand_as(q).contiguous()
    measure, _ = measured(config, q, k, layout)
    assert measure.overall()["coverage_0"] > 0.999 and measure.overall()["hit_0"] > 0.95


def test_pairs_are_neighbours_with_a_gist_before_them():
    config = GistConfig((4, 2), recall="all")
    layout, _, _ = make(config, lengths=(900, 5))
    tokens = neighbours(layout, config, Recall.of(layout, config)).tree.tokens
    assert PAIRS < len(tokens) <= 2 * PAIRS and int((tokens.diff() <= 3).sum()) >= PAIRS - 2
    length = layout.doc.shape[1]
    for token in tokens.tolist():
        sample, place = divmod(token, length)
        before = layout.doc[sample, :place] == layout.doc[sample, place]
        assert (layout.level[sample, :place][before] == 0).any(), "in a document of five tokens nothing is to be found"


def test_nothing_to_find_is_no_measure():
    config = GistConfig((8,), recall="all")
    level, doc = torch.full((1, 6), -1, dtype=torch.int32), torch.zeros(1, 6, dtype=torch.int32)
    layout = build_layout(level, doc, config)
    measure, _ = measured(config, torch.randn(1, 6, 2, 8), torch.randn(1, 6, 1, 8), layout)
    assert measure.by_layer() == [] and measure.overall() == {}
