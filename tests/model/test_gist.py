"""Insertion and layout against the rules of docs/method.md restated literally (tests/rules.py)."""

import dataclasses

import numpy as np
import pytest
import torch

from tests import rules
from tests.kernels.cases import CASES, make_layout, structure
from unfold.model.gist import GistConfig, build_layout, interleave, max_interleaved_length


def test_example_of_the_specification():
    config = GistConfig((3, 2), sink=2, n_prev=1)
    sample = interleave(np.arange(17), [17], np.ones(17, bool), config, [98, 99])
    assert "".join(".gG"[level + 1] for level in sample.level) == ".....g...gG...g...gG...g"
    layout = build_layout(torch.from_numpy(sample.level)[None], torch.from_numpy(sample.doc)[None], config)
    mask = layout.intervals.dense_mask()[0].int().tolist()
    row = lambda i: "".join(map(str, mask[i][: i + 1]))
    assert row(16) == "11000100011111111"
    assert row(18) == "1100010001111111111"
    assert row(19) == "11000100011000100011"
    assert sample.position.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 8, 9, 10, 10, 11, 12, 13, 13, 13, 14, 15, 16, 16]
    own = dataclasses.replace(config, own_group=True)
    mask = build_layout(layout.level, layout.doc, own).intervals.dense_mask()[0].int().tolist()
    assert row(16) == "11000100011111111"
    assert row(18) == "1100010001100011111"  # sinks, its own chunk; gists as before
    assert row(19) == "11000000001000100011"  # sinks, the gists of its own section; its own level as before


@pytest.mark.parametrize("word_aware", [True, False])
@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("chunk_sizes", [(1,), (5,), (8,), (3, 2), (8, 4), (2, 3, 2), (2, 2, 2, 2)])
def test_insertion_follows_the_rules(chunk_sizes, close, word_aware):
    rng = np.random.default_rng(len(chunk_sizes))
    vocab = 30
    gist_ids = list(range(vocab, vocab + len(chunk_sizes)))
    for trial in range(60):
        lengths = rng.integers(0, [4, 20, 150][trial % 3], rng.integers(1, 6)).tolist()
        ids = rng.integers(0, vocab, sum(lengths))
        starts = rng.random(vocab) < [0.0, 0.2, 0.6, 1.0][trial % 4]
        sink = trial % 5
        config = GistConfig(chunk_sizes, sink=sink, word_aware=word_aware)
        got = interleave(ids, lengths, starts, config, gist_ids, close)
        want = rules.insert_gists(ids, lengths, starts, chunk_sizes, sink, gist_ids, close, word_aware)
        for name, column in zip(("ids", "level", "doc", "position"), want):
            assert getattr(got, name).tolist() == column, (name, lengths, sink, close)
        if not close:
            assert len(got.ids) <= max_interleaved_length(len(ids), chunk_sizes)


@pytest.mark.parametrize("chunk_sizes", [(1,), (5,), (3, 2), (2, 3, 2)])
def test_chunks_that_are_not_word_aware_are_counted(chunk_sizes):
    """Where gists stand follows from the lengths alone: no token is looked at, and nobody need know which start words."""
    rng, sink = np.random.default_rng(0), 3
    for _ in range(20):
        lengths = rng.integers(0, 60, 3).tolist()
        config = GistConfig(chunk_sizes, sink=sink, word_aware=False)
        ids, gist_ids = rng.integers(0, 30, sum(lengths)), list(range(30, 30 + len(chunk_sizes)))
        made = interleave(ids, lengths, None, config, gist_ids)
        for doc, length in enumerate(lengths):
            group = 1
            for level, size in enumerate(chunk_sizes):
                group *= size
                mine = (made.doc == doc) & (made.level == level)
                assert made.position[mine].tolist() == list(range(sink + group - 1, length, group))
    with pytest.raises(ValueError, match="word_starts: None, but chunks grow to where a word starts; .*gist.word_aware: false"):
        interleave(ids, lengths, None, GistConfig(chunk_sizes), gist_ids)
    with pytest.raises(ValueError, match="ids: token id -1 is outside the vocabulary$"):
        interleave(np.array([0, -1]), [2], None, config, gist_ids)


@pytest.mark.parametrize("name", CASES)
def test_visible_sets_follow_the_rules(name):
    layout, config = make_layout(name)
    got = layout.intervals.dense_mask().numpy()
    for b in range(len(got)):
        want = rules.visible_in(*structure(layout, b), config.levels, config.sink, config.n_prev, config.own_group)
        assert (got[b] == want).all(), np.argwhere(got[b] != want)[:5]


@pytest.mark.parametrize("name", CASES)
def test_layout_positions_and_sorted_order(name):
    layout, config = make_layout(name)
    for b in range(layout.level.shape[0]):
        level, doc = layout.level[b], layout.doc[b]
        for d in set(doc.tolist()) - {-1}:
            mine = doc == d
            raw_seen = (level[mine] == -1).cumsum(0)
            assert layout.position[b][mine].tolist() == (raw_seen - 1).tolist()
        iv = layout.intervals
        rows = iv.rows[b, : iv.tokens]
        assert level[rows].tolist() == sorted(level[rows].tolist(), key=lambda l: -l), "keys are not sorted by level"
        assert rows[iv.row_of[b]].tolist() == list(range(iv.tokens))


def test_ranges_are_within_their_segment():
    for name in CASES:
        iv = make_layout(name)[0].intervals
        start, end = iv.segment_start[:, :-1, None], iv.segment_start[:, 1:, None]
        assert ((iv.lo <= iv.hi) & (start <= iv.lo) & (iv.hi <= end)).all(), name


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(lengths=[3]), "doc_lengths: they sum to 3, the sample has 4"),
        (dict(gists=[9]), "gist_ids: 1 ids for 2 gist levels"),
        (dict(ids=[0, 1, 7, 2]), "token id 7 is outside the vocabulary of 5"),
        (dict(ids=[0, -1, 1, 2]), "token id -1 is outside"),
    ],
)
def test_insertion_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        interleave(
            np.array(arguments.get("ids", [0, 1, 2, 3])),
            arguments.get("lengths", [4]),
            np.ones(5, bool),
            GistConfig((4, 2)),
            arguments.get("gists", [5, 6]),
        )


def test_configuration_reports_everything_at_once():
    with pytest.raises(ValueError) as error:
        GistConfig((8, 0), sink=-1, n_prev=-2, recall="sometimes")
    assert all(name in str(error.value) for name in ("chunk_sizes", "sink: -1", "n_prev: -2", "recall: 'sometimes'"))
    with pytest.raises(ValueError, match="chunk_sizes: empty"):
        GistConfig(())
