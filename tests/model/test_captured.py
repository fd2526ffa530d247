"""Steps replayed from graphs against steps launched one by one, for every kind of layer and cache: bit-equal, token for token.

Both ways compute with the same plain loops over the same tables (by_tables.py). A graph here is what CUDA's is: the tensor
operations and launches of one run, done again with the same tensors and the same numbers of Python, whatever these are by then.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.model import by_tables
from tests.model.decoding import GISTS, STARTS, make_model, text
from tests.model.test_frames import framed
from unfold.kernels.decode import op, triton
from unfold.model.config import GistConfig
from unfold.model.decode import frame
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.gist.growable import Growable

# Kinds of the layers, and where raw rows lie.
CACHES = {
    "gist layers": (("gist",), "device"),
    "raw rows on the host": (("gist",), "host"),
    "dense beside gist layers": (("gist", "dense", "gist"), "device"),
    "windows beside gist layers": (("window:6", "gist", "window:3"), "device"),
    "all kinds, raw rows on the host": (("window:6", "gist", "dense"), "host"),
    "windows and no gists": (("window:6", "dense"), "device"),
}


class Recorded(TorchDispatchMode):
    """A graph: records what is done within; :meth:`replay` does it again."""

    active = None

    def __init__(self):
        super().__init__()
        self.done, self.replayed = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs or {})

    def record(self, func, args, kwargs):
        out = func(*args, **kwargs)
        self.done.append((func, args, kwargs, out))
        return out

    def replay(self):
        self.replayed += 1
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)  # results have fixed addresses too


@pytest.fixture(autouse=True)
def plain_loops(monkeypatch):
    """In place of the Triton kernels, for both ways; a graph holds each as one launch. Rows are multiplied one by one."""
    by_tables.patch(monkeypatch)

    def launched(kernel):
        def launch(*args, **kwargs):
            graph = Recorded.active
            with _disable_current_modes():
                return graph.record(kernel, args, kwargs) if graph else kernel(*args, **kwargs)

        return launch

    for name in ("keep", "run"):
        monkeypatch.setattr(triton, name, launched(getattr(triton, name)))
    monkeypatch.setattr(op, "default_backend", lambda *_: "triton")
    monkeypatch.setattr(triton, "why_not", lambda *_: None)
    product = torch.matmul  # of many rows at once it may sum in another order than of few
    by_row = lambda x, w: torch.cat([torch.mm(row, w) for row in x.flatten(0, -2).split(1)]).view(*x.shape[:-1], -1)
    monkeypatch.setattr(torch, "matmul", lambda x, w: by_row(x, w) if x.dim() > 1 and w.dim() == 2 else product(x, w))


@pytest.fixture
def moved(monkeypatch):
    """Counts rows that got other memory, and chunks that were taken off to be read again."""
    counts = SimpleNamespace(memory=0, dropped=0)
    move, drop = Growable._move, Decoder.feed_pending

    def counted(self, room):
        counts.memory += self.length > 0
        move(self, room)

    def fed(self, sequence):
        feed = drop(self, sequence)
        counts.dropped += feed.drop > 0
        return feed

    monkeypatch.setattr(Growable, "_move", counted)
    monkeypatch.setattr(Decoder, "feed_pending", fed)
    return counts


def captured(decoder):
    """The decoder as on a GPU, and its graphs as they come."""
    other, graphs = framed(decoder), []

    def capture(step):
        step()
        Recorded.active = graph = Recorded()
        try:
            with graph:
                step()
        finally:
            Recorded.active = None
        graphs.append(graph)
        return graph

    other.frames.replays.capture, other.frames.replays._captured = True, capture
    return other, graphs


def told(decoder, lengths, tokens):
    """Tokens and logits of sequences that are continued, branch, read on, and are continued again; and the sequences."""
    sequences, got = [], []
    for n, (context, question) in enumerate(lengths):
        sequences.append(decoder.start())
        decoder.read_context(sequences[n], text(context, n + 1))
        decoder.read_suffix(sequences[n], text(question, n + 2))
    note = lambda several, **how: got.extend(
        (n, token, several[n].logits.clone()) for n, token in decoder.stream(several, Sampling(tokens, **how))
    )
    note(sequences, temperature=1.0)
    branch = copy.deepcopy(sequences[0])
    decoder.read_suffix(sequences[0], text(2, 9))
    note([branch, *sequences[:-1]], temperature=1.0, seed=3)
    return got, [branch, *sequences]


def check_equal(got, want):
    (tokens, sequences), (wanted, others) = got, want
    assert [x[:2] for x in tokens] == [x[:2] for x in wanted] and tokens
    assert all(torch.equal(a[2], b[2]) for a, b in zip(tokens, wanted))
    for a, b in zip(sequences, others):
        assert (a.ids, a.level, a.recalls, a.pending) == (b.ids, b.level, b.recalls, b.pending)
        for layer, other in zip(a.cache.layers, b.cache.layers):
            for rows, others in zip(layer, other):
                assert rows.on_host == others.on_host
                if len(rows.buffer.rows[0, 0]) == len(others.buffer.rows[0, 0]):  # windows forget at times of their own
                    assert torch.equal(rows.buffer.rows, others.buffer.rows)


def check_captured(decoder, lengths, tokens):
    other, graphs = captured(decoder)
    check_equal(told(other, lengths, tokens), told(decoder, lengths, tokens))
    assert other.frames.replays.capture, "every graph did what the step does"
    assert graphs and max(graph.replayed for graph in graphs) > 1


def make(build, cache, recall, grow, starts):
    kinds, raw = CACHES[cache]
    budget = {} if recall == "none" else {"topk": 2}
    gist = GistConfig((4, 2), recall=recall, **budget) if cache in WITH_GISTS else None
    model = make_model(build, "gist" if gist else "dense", layer_attention=kinds)
    return Decoder(model, gist, GISTS, starts, grow, raw_cache=raw)


WITH_GISTS = [cache for cache in CACHES if "no gists" not in cache]


@pytest.mark.parametrize("sequences", [pytest.param(1, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("cache,recall", [*((c, "none") for c in CACHES), *((c, "suffix") for c in WITH_GISTS)])
def test_bit_equal_while_caches_grow(build, cache, recall, sequences, moved, monkeypatch):
    """States hold for three tokens, memory for what is there: both are made anew under way."""
    monkeypatch.setattr(frame, "AHEAD", 3)
    check_captured(make(build, cache, recall, False, STARTS), [(14, 1), (9, 3), (2, 1)][:sequences], 6)
    assert moved.memory


@pytest.mark.parametrize("sequences", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("cache", WITH_GISTS)
def test_bit_equal_where_chunks_are_read_again(build, cache, sequences, moved):
    """No piece starts a word: a chunk's last tokens are taken off when it closes, and read again behind its gist."""
    check_captured(make(build, cache, "suffix", True, STARTS & False), [(13, 1), (6, 2)][:sequences], 7)
    assert moved.dropped
