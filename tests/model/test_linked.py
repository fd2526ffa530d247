"""Linked contexts against docs/method.md#linked-contexts restated literally (tests/rules.py), on random bundles."""

import itertools

import numpy as np
import pytest
import torch

from tests import recall_rules, rules
from tests.kernels.cases import ROLES, columns, structure
from unfold.kernels.select import SelectRule, select_gists
from unfold.kernels.unfold.reference import visible_tokens
from unfold.model.gist import (
    Bundle,
    GistConfig,
    Role,
    build_layout,
    build_recall,
    interleave,
    max_interleaved_length,
    raw_layout,
)

VOCAB = 30
LINK_IDS = range(40, 45)


def random_bundles(rng, most_parts=4):
    """Some documents of one sample, of which at least one is a bundle: bundles, lengths."""
    bundles, lengths = [], []
    for _ in range(rng.integers(1, 4)):
        if bundles and rng.random() < 0.3:
            bundles.append(None)
            lengths.append(int(rng.integers(1, 30)))
            continue
        parts = rng.integers(1, rng.choice([3, 12, 30]), rng.integers(1, most_parts + 1)).tolist()
        bundles.append(Bundle(int(rng.integers(0, 7)), parts))
        lengths.append(bundles[-1].context + int(rng.integers(0, 9)))
    return bundles, lengths


def make(rng, config):
    """A sample of random bundles: what interleave made, and what it was given."""
    bundles, lengths = random_bundles(rng)
    ids = rng.integers(0, VOCAB, sum(lengths))
    starts = rng.random(VOCAB) < rng.choice([0.3, 0.8, 1.0])
    gist_ids = list(range(VOCAB, VOCAB + config.levels))
    made = interleave(ids, lengths, starts, config, gist_ids, bundles=bundles, link_ids=LINK_IDS[: config.links])
    return made, ids, lengths, starts, gist_ids, bundles


def layout_of(samples, config):
    level, doc, role, part = columns(samples, extra=2)
    return build_layout(level, doc, config, role, part)


SIZES = [(3,), (4, 2), (2, 3, 2)]
SETTINGS = [
    GistConfig(sizes, sink=sink, n_prev=n_prev, links=links, own_group=own)
    for (sizes, n_prev, own), (sink, links) in zip(
        itertools.product(SIZES, (0, 1, 2), (False, True)), itertools.cycle([(3, 5), (2, 0), (0, 1), (3, 2), (4, 3)])
    )
]
SETTINGS += [GistConfig(sizes, word_aware=False) for sizes in SIZES]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.chunk_sizes} {c.n_prev} {c.links} {c.own_group}")
def test_insertion_and_visible_sets_follow_the_rules(config):
    rng = np.random.default_rng(config.n_prev + 10 * config.links)
    for _ in range(4):
        samples = []
        for _ in range(2):
            made, ids, lengths, starts, gist_ids, bundles = make(rng, config)
            samples.append(made)
            at = 0
            for doc, (length, bundle) in enumerate(zip(lengths, bundles)):
                own, mine = ids[at : at + length], made.doc == doc
                at += length
                if bundle is None:
                    shape = starts, config.chunk_sizes, config.sink, gist_ids, False, config.word_aware
                    want = rules.insert_gists(own, [length], *shape)
                    got = made.ids[mine].tolist(), made.level[mine].tolist(), [0] * mine.sum(), made.position[mine].tolist()
                    assert list(map(list, got)) == [list(x) for x in want]
                    assert not made.role[mine].any() and not made.part[mine].any()
                    continue
                links = LINK_IDS[: config.links]
                shape = starts, config.chunk_sizes, config.sink, gist_ids, links
                want = rules.insert_bundle(own, bundle.prefix, bundle.parts, *shape, config.word_aware)
                roles = [ROLES[r] for r in made.role[mine].tolist()]
                got = [getattr(made, name)[mine].tolist() for name in ("ids", "level", "position", "part")]
                assert [*got[:3], roles, got[3]] == want
            closed, links = sum(len(b.parts) for b in bundles if b), sum(config.links * len(b.parts) for b in bundles if b)
            assert len(made.ids) <= max_interleaved_length(len(ids), config.chunk_sizes, closed, links)
        layout = layout_of(samples, config)
        mask = layout.intervals.dense_mask().numpy()
        for b, made in enumerate(samples):
            want = rules.visible_in(*structure(layout, b), config.levels, config.sink, config.n_prev, config.own_group)
            assert (mask[b] == want).all(), np.argwhere(mask[b] != want)[:5]
            assert layout.position[b, : len(made.ids)].tolist() == made.position.tolist()
        iv = layout.intervals
        start, end = iv.segment_start[:, :-1, None], iv.segment_start[:, 1:, None]
        assert ((iv.lo <= iv.hi) & (start <= iv.lo) & (iv.hi <= end)).all()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("config", SETTINGS[::4], ids=lambda c: f"{c.chunk_sizes} {c.n_prev} {c.links} {c.own_group}")
def test_recalling_queries_follow_the_rules(config, everything):
    """Suffixes select among the gists of all parts, tokens of parts among their part's, and read what is behind them."""
    rng = np.random.default_rng(7)
    made = [make(rng, config)[0] for _ in range(2)]
    layout = layout_of(made, config)
    tree = build_recall(layout, config, torch.ones_like(layout.level, dtype=torch.bool))
    assert torch.equal(tree.tokens, layout.text.flatten().nonzero()[:, 0])
    k = torch.from_numpy(rng.standard_normal((2, layout.level.shape[1], 1, 4)))
    q = torch.from_numpy(rng.standard_normal((2, layout.level.shape[1], 2, 4)))
    rule = SelectRule(ratio=1, chunk=1, everything=everything)
    selection = select_gists(q.flatten(0, 1)[tree.tokens], k, tree, rule, backend="reference")
    for n in range(tree.queries):
        sample, token = divmod(int(tree.tokens[n]), layout.level.shape[1])
        level, doc, role, part = structure(layout, sample)
        where = config.levels, (1,), config.sink, config.n_prev
        document = recall_rules.Document(level, doc, token, *where, role, part)
        scores = [(k[sample, :, 0] @ q[sample, token, h]).tolist() for h in range(2)]
        chosen = recall_rules.group_selection(document, scores, "head", ratio=1, everything=everything)
        assert int(tree.span[n]) == len(document.items)
        assert visible_tokens(tree, selection, n, 0) == recall_rules.unfolded(document, chosen), (n, role[token])


def test_dense_attention_keeps_to_a_part():
    """A part's tokens see that part, links and suffix all before them in the bundle; gists see themselves alone."""
    config = GistConfig((4, 2), sink=2, links=2)
    layout = layout_of([make(np.random.default_rng(3), config)[0]], config)
    level, doc, role, part = structure(layout, 0)
    unit = lambda j: (doc[j], role[j], part[j])
    want = np.eye(len(level), dtype=bool)
    for i, j in itertools.combinations(range(len(level)), 2):
        if level[i] == level[j] == -1 and doc[i] == doc[j] >= 0:
            want[j, i] = role[j] in ("link", "suffix") or unit(i) == unit(j)
    assert (raw_layout(layout, gists=False).intervals.dense_mask()[0].numpy() == want).all()


def test_the_example_of_the_page():
    config = GistConfig((3,), sink=1, n_prev=1, links=1)
    made = interleave(np.arange(13), [13], np.ones(13, bool), config, [98], bundles=[Bundle(1, (4, 6))], link_ids=[99])
    assert "".join("gpdls"[r] if l < 0 else "g" for l, r in zip(made.level, made.role)) == "pddddgddddgddgllss"
    layout = layout_of([made], config)
    mask = layout.intervals.dense_mask()[0].int().tolist()
    row = lambda i: "".join(map(str, mask[i][: i + 1]))
    assert row(10) == "00000011111"  # the first gist of the second part: nothing outside it
    assert row(14) == "110001000000001"  # the link of the first part: prefix, its sink and its gist
    assert row(17) == "110001100010011111"


def test_wrong_bundles_are_named():
    config, ids, starts = GistConfig((4,), links=2), np.zeros(9, np.int64), np.ones(5, bool)
    with pytest.raises(ValueError, match="part 2 of 3 is empty"):
        Bundle(0, (3, 0, 2))
    with pytest.raises(ValueError, match="prefix: -1 tokens"):
        Bundle(-1, (3,))
    with pytest.raises(ValueError, match="document 0 have 10 tokens, the document has 9"):
        interleave(ids, [9], starts, config, [6], bundles=[Bundle(2, (8,))], link_ids=[7, 8])
    with pytest.raises(ValueError, match="link_ids: 1 ids for gist.links = 2"):
        interleave(ids, [9], starts, config, [6], bundles=[Bundle(2, (4,))], link_ids=[7])
    assert Role.SUFFIX > Role.LINK > Role.PART, "the order that layouts rely on"
