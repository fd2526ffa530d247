"""Where attention goes, against softmax over the dense mask, and against recall's sets taken one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unfold.kernels.select import select_gists
from unfold.kernels.unfold.reference import visible_tokens
from unfold.model.config import GistConfig
from unfold.model.gist import Recall, build_layout, interleave
from unfold.pretrain.monitor import attention_mass as subject
from unfold.pretrain.monitor.attention_mass import attention_mass, kinds, sample_queries


def make(config: GistConfig, lengths=(70, 9), padding=5):
    """A layout of two samples of packed documents, and random q, k."""
    raw = sum(lengths)
    ids = list(range(900, 900 + len(config.chunk_sizes)))
    levels, docs = [], []
    for order in (lengths, lengths[::-1]):
        made = interleave(np.zeros(raw, np.int64), list(order), np.ones(1, bool), config, ids)
        levels.append(made.level)
        docs.append(made.doc)
    size = max(map(len, levels)) + padding
    pad = lambda xs: torch.from_numpy(np.stack([np.pad(x, (0, size - len(x)), constant_values=-1) for x in xs]))
    layout = build_layout(pad(levels), pad(docs), config)
    generator = torch.Generator().manual_seed(5)
    q = 2 * torch.randn(2, size, 4, 8, generator=generator)
    return layout, q, torch.randn(2, size, 2, 8, generator=generator)


def kind_of(layout, config, sample: int, query: int, token: int) -> str:
    """From level and place alone: a sink is a document's first raw token where the window has left it behind."""
    level = int(layout.level[sample, token])
    if level >= 0:
        return f"gist_{level}"
    first, last = (int(x[sample, config.levels, query]) for x in (layout.intervals.lo, layout.intervals.hi))
    return "raw" if first <= int(layout.intervals.row_of[sample, token]) < last else "sink"


def reference(layout, config, q, k, recall=None) -> dict[str, float]:
    """One query and head at a time, in fp64."""
    mask, names = layout.intervals.dense_mask(), kinds(config.levels)
    sums = dict.fromkeys(names, 0.0)
    size = layout.level.shape[1]
    selection = select_gists(q.flatten(0, 1)[recall.tree.tokens], k, recall.tree, recall.rule) if recall else None
    places = {token: n for n, token in enumerate(recall.tree.tokens.tolist())} if recall else {}
    for flat in sample_queries(layout).tolist():
        sample, query = divmod(flat, size)
        window = {t for t in range(size) if mask[sample, query, t]}
        for head in range(q.shape[2]):
            seen = window if flat not in places else visible_tokens(recall.tree, selection, places[flat], head // 2)
            tokens = sorted(seen)
            weights = (k[sample, tokens, head // 2].double() @ q[sample, query, head].double() / 8**0.5).softmax(-1)
            for token, weight in zip(tokens, weights.tolist()):
                unfolded = token not in window and int(layout.level[sample, token]) < 0
                sums["unfolded" if unfolded else kind_of(layout, config, sample, query, token)] += weight
    return sums


@pytest.mark.parametrize("sizes", [(4,), (4, 2), (3, 2, 2)])
@pytest.mark.parametrize("elements", [1 << 24, 300])
def test_forgetting(sizes, elements, monkeypatch):
    monkeypatch.setattr(subject, "ELEMENTS", elements)  # also in several pieces
    config = GistConfig(sizes)
    layout, q, k = make(config)
    expected = reference(layout, config, q, k)
    found = attention_mass(q, k, layout)
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-9)
    assert float(found.sum()) == pytest.approx(len(sample_queries(layout)) * q.shape[2])
    assert all(expected[f"gist_{level}"] > 0 for level in range(len(sizes))) and expected["sink"] > 0


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("mode", ["all", "suffix"])
def test_recall(share, mode):
    config = GistConfig((4, 2), recall=mode, share=share, topk=3)
    layout, q, k = make(config)
    suffix = torch.zeros_like(layout.doc, dtype=torch.bool)
    suffix[:, 40:] = True
    recall = Recall.of(layout, config, suffix)
    expected = reference(layout, config, q, k, recall)
    found = attention_mass(q, k, layout, recall)
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-9)
    assert expected["unfolded"] > 1


def test_plans_of_all_queries_do_not_serve_some():
    """Nor does the host's copy of the tree, of which a GPU's plans are made."""
    config = GistConfig((4, 2), recall="all", topk=3)
    layout, _, _ = make(config)
    tree = Recall.of(layout, config).tree
    whole = replace(tree, others=replace(tree.others, host=tree.others), host=tree)
    some = subject._part_of(whole, torch.tensor([0, 2, 5]))
    assert some.host is None and some.others.host is None and not some.plans and not some.others.plans


def test_queries_are_raw_tokens_spread_over_the_batch():
    layout, _, _ = make(GistConfig((4, 2)), lengths=(300, 100))
    queries = sample_queries(layout)
    assert len(queries) == subject.QUERIES == len(set(queries.tolist()))
    flat = lambda x: x.flatten()[queries]
    assert (flat(layout.level) == -1).all() and (flat(layout.doc) >= 0).all()
    assert queries[0] < 10 and queries[-1] > layout.level.numel() - 30


def test_a_sample_of_padding_has_no_mass():
    """A rank that has no validation sample left takes part with one."""
    config = GistConfig((4, 2))
    nowhere = torch.full((1, 12), -1, dtype=torch.int32)
    layout = build_layout(nowhere, nowhere, config)
    mass = attention_mass(torch.randn(1, 12, 4, 8), torch.randn(1, 12, 2, 8), layout)
    assert mass.shape == (len(kinds(2)),) and not mass.any()
