"""Generation through steps at fixed addresses: the same tokens and logits as step by step, and nothing that a graph forbids."""

import copy

import pytest
import torch

from tests.model import by_tables
from tests.model.decoding import make_decoder, text
from unfold.model.config import GistConfig
from unfold.model.decode.generation import Sampling
from unfold.model.decode.rounds import Frames


def read(decoder, context, question, seed=0):
    sequence = decoder.start()
    decoder.read_context(sequence, text(context, seed + 1))
    decoder.read_suffix(sequence, text(question, seed + 2))
    return sequence


def framed(decoder):
    """The same decoder with frames, as on a GPU."""
    other = copy.copy(decoder)
    other.frames = Frames(other)
    return other


def continued(decoder, sequences, sampling, **how):
    """(number, token, logits) as they come."""
    return [(n, token, sequences[n].logits.clone()) for n, token in decoder.stream(sequences, sampling, **how)]


def same(decoder, lengths, sampling, **how):
    one, two = ([read(decoder, *n) for n in lengths] for _ in range(2))
    want = continued(decoder, one, sampling, **how)
    got = continued(framed(decoder), two, sampling, **how)
    assert [x[:2] for x in got] == [x[:2] for x in want] and got
    assert max(float((a[2] - b[2]).abs().max()) for a, b in zip(got, want)) < 1e-10
    for a, b in zip(one, two):
        assert (a.ids, a.level, a.recalls, a.pending) == (b.ids, b.level, b.recalls, b.pending)
        assert a.cache.outline.counts == b.cache.outline.counts
        for rows, others in zip(a.cache.layers[-1], b.cache.layers[-1]):
            torch.testing.assert_close(others.buffer.rows, rows.buffer.rows, atol=1e-10, rtol=0)


@pytest.fixture(autouse=True)
def by_plain_loops(monkeypatch):
    by_tables.patch(monkeypatch)


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("recall", ["none", "suffix"])
@pytest.mark.parametrize("sizes", [(4,), (4, 2), (3, 2, 2)])
def test_equals_step_by_step(build, sizes, recall, grow):
    decoder = make_decoder(build, GistConfig(sizes, recall=recall, budget_ratio=2), grow)
    same(decoder, [(70, 9), (33, 1)], Sampling(14, temperature=1.0))
