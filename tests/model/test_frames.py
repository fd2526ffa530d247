"""Generation through steps at fixed addresses: the same tokens and logits as step by step, and nothing that a graph forbids.

Here on the CPU, in fp64, with plain loops over the tables in place of the kernels; tests/kernels/test_frames.py has the kernels.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from tests.model import by_tables
from tests.model.decoding import GISTS, STARTS, VOCAB, make_decoder, text
from tests.model.test_cache_per_kind import MODELS
from tests.model.test_parts import DOCUMENTS, documents
from tests.model.test_parts import make as make_joining
from tests.waits import Waits
from unfold.kernels.select import SelectRule
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode import frame as frames
from unfold.model.decode import rounds
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.kinds import window_of

LENGTHS = [(52, 7), (21, 1)]
SUFFIX = GistConfig((4, 2), recall="suffix")


def read(decoder, context, question, seed=0):
    sequence = decoder.start()
    decoder.read_context(sequence, text(context, seed + 1))
    decoder.read_suffix(sequence, text(question, seed + 2))
    return sequence


def framed(decoder):
    """The same decoder with frames, as on a GPU."""
    other = copy.copy(decoder)
    other.frames = rounds.Frames(other)
    return other


def continued(decoder, sequences, sampling, **how):
    """(number, token, logits) as they come."""
    return [(n, token, sequences[n].logits.clone()) for n, token in decoder.stream(sequences, sampling, **how)]


def check_same(got, want, others, sequences):
    """What came, and what the sequences are afterwards."""
    assert [x[:2] for x in got] == [x[:2] for x in want] and got
    assert max(float((a[2] - b[2]).abs().max()) for a, b in zip(got, want)) < 1e-10
    for a, b in zip(sequences, others):
        assert (a.ids, a.level, a.recalls, a.pending) == (b.ids, b.level, b.recalls, b.pending)
        assert a.cache.outline.counts == b.cache.outline.counts
        for layer, other, kind in zip(a.cache.layers, b.cache.layers, a.cache.kinds):
            for rows, others in zip(layer, other):
                kept = rows.buffer.rows, others.buffer.rows
                if window_of(kind) is not None:  # each forgets when it looks; both keep the sinks and the last rows
                    first = a.cache.outline.sink
                    last = max(0, min(x.shape[2] for x in kept) - first)
                    kept = [torch.cat([x[:, :, :first], x[:, :, x.shape[2] - last :]], 2) for x in kept]
                torch.testing.assert_close(*kept, atol=1e-10, rtol=0)


def same(decoder, start, sampling, **how):
    """start: makes the sequences of a decoder, the same ones every time."""
    other = framed(decoder)
    one, two = start(decoder), start(decoder)
    check_same(continued(other, two, sampling, **how), continued(decoder, one, sampling, **how), two, one)
    return other, two


def both(decoder):
    return [read(decoder, *lengths, seed=n) for n, lengths in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def by_plain_loops(monkeypatch):
    by_tables.patch(monkeypatch)


@pytest.fixture
def short_ahead(monkeypatch):
    """States that hold for three tokens, so that buckets and memories change under way."""
    monkeypatch.setattr(frames, "AHEAD", 3)


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("recall", ["none", "suffix"])
@pytest.mark.parametrize("sizes", [(4,), (4, 2), (3, 2, 2)])
def test_equals_step_by_step(build, sizes, recall, grow):
    decoder = make_decoder(build, GistConfig(sizes, recall=recall, budget_ratio=2), grow)
    same(decoder, both, Sampling(9, temperature=1.0))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_dense(build, top_p):
    same(make_decoder(build, None), both, Sampling(8, temperature=1.0, top_p=top_p))


@pytest.mark.parametrize("ahead", [3, 128])
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_several_kinds(build, name, ahead, monkeypatch):
    """Windows move on with every token; their rows move up when half of them are seen no more."""
    monkeypatch.setattr(frames, "AHEAD", ahead)
    gist, kinds = MODELS[name]
    for grow in (False, True):
        other, _ = same(make_decoder(build, gist, grow, layer_attention=kinds), both, Sampling(20, temperature=1.0))
        assert other.frames.made


@pytest.mark.parametrize("name", ["windows beside gists", "one gist layer"])
def test_several_turns_over_layers_of_several_kinds(build, name, short_ahead):
    """Chunks are folded later and read again, behind what windows have forgotten; sequences branch and take turns."""
    gist, kinds = MODELS[name]
    decoder, results = make_decoder(build, gist, layer_attention=kinds), []
    for d in (decoder, framed(decoder)):
        sequences = both(d)
        got = continued(d, sequences, Sampling(5))
        d.read_context(sequences[0], text(23, 8))
        branch = copy.deepcopy(sequences[1])
        got += continued(d, [branch, sequences[0]], Sampling(7, temperature=1.0))
        d.read_suffix(sequences[1], text(4, 9))
        got += continued(d, sequences, Sampling(6))
        results += [got, [*sequences, branch]]
    check_same(results[2], results[0], results[3], results[1])


@pytest.mark.parametrize("name", ["gists", "windows beside gists"])
def test_raw_rows_on_the_host(build, name, short_ahead):
    """Steps read and write them where they lie; their memory changes under way."""
    gist, kinds = MODELS[name] if name in MODELS else (GistConfig((4, 2), recall="suffix", topk=2), ())
    model = make_decoder(build, gist, layer_attention=kinds).model
    decoder = Decoder(model, gist, GISTS, STARTS, raw_cache="host")
    _, sequences = same(decoder, both, Sampling(20, temperature=1.0))
    assert any(rows.on_host for layer in sequences[0].cache.layers for rows in layer)


@pytest.mark.parametrize("kinds", [(), ("gist", "dense", "window:7"), ("window:3", "gist")], ids=str)
def test_joined_parts(build, kinds):
    """Windows of the text that goes on reach into parts, skip them, and leave them behind."""
    decoder = make_joining(build, GistConfig((4, 2), recall="suffix", topk=2), layer_attention=kinds)
    parts = [decoder.read_part(tokens) for tokens in documents(DOCUMENTS["several"])]

    def start(decoder):
        joined = decoder.join(parts, text(4))
        decoder.read_suffix(joined, text(2, 20))
        return [joined, read(decoder, 40, 3)]

    same(decoder, start, Sampling(15))


RULES = {
    "fixed": dict(topk=2),
    "everything": dict(topk=10**6),
    "by group": dict(topk=2, share="group"),
    "unfold all": dict(topk=2, unfold_all=True),
    "own group": dict(own_group=True, recall_from=2, budget_ratio=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_budget_while_buckets_and_memories_change(build, rule, short_ahead):
    """Greedy; the budget grows with the text, and states are filled anew every fourth token."""
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix", **RULES[rule]))
    other, _ = same(decoder, both, Sampling(9))
    (only,) = other.frames.made.values()
    assert only.slots == only.sequences == 2


@pytest.mark.parametrize("starts", ["none", "all", "not looked at"])
def test_chunks_that_are_read_again_or_close_when_they_are_due(build, starts, short_ahead):
    bitmap = {"none": STARTS & False, "all": STARTS | True}.get(starts)
    decoder = make_decoder(build, GistConfig((5, 2), recall="suffix", topk=2, word_aware=bitmap is not None), True, bitmap)
    other, _ = same(decoder, lambda d: [read(d, 33, 3), d_start(d)], Sampling(16, temperature=1.5))
    assert max(slots for slots, _ in other.frames.made) >= 4


def d_start(decoder):
    """A prompt alone, whose text grows."""
    sequence = decoder.start()
    decoder.read_context(sequence, text(2), close=False)
    return sequence


def test_draws_beyond_a_block(build, monkeypatch):
    for module in (frames, rounds, __import__("unfold.model.decode.sampling", fromlist=["x"])):
        monkeypatch.setattr(module, "BLOCK", 4)
    same(make_decoder(build, None), both, Sampling(11, temperature=1.0))


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix"), None], ids=["gists", "dense"])
def test_sequences_that_end_under_way(build, gist):
    """By a stop id, by the caller, by the caller who stops listening; what the GPU has read ahead is of no account."""
    decoder = make_decoder(build, gist)
    start = lambda d: [read(d, *n) for n in [(40, 3), (17, 2), (9, 5)]]
    plain = continued(decoder, start(decoder), Sampling(8, temperature=1.0))
    stop = next(token for n, token, _ in plain[6:] if n == 1)
    results = []
    for d in (decoder, framed(decoder)):
        sequences, ended, got = start(d), set(), []
        for n, token in d.stream(sequences, Sampling(9, temperature=1.0), [stop], ended):
            got.append((n, token, sequences[n].logits.clone()))
            if len(got) == 9:
                ended.add(0)
            if len(got) == 13:
                break
        got += continued(d, sequences[1:], Sampling(3, temperature=1.0, seed=5))
        d.read_suffix(sequences[0], text(4, 9))
        got += continued(d, sequences, Sampling(4))
        results += [got, sequences]
    check_same(results[2], results[0], results[3], results[1])


def test_a_branch_in_mid_stream_goes_its_own_way(build):
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix", topk=2))
    results = []
    for d in (decoder, framed(decoder)):
        sequences, branch = [read(d, 30, 3)], None
        for count, _ in enumerate(d.stream(sequences, Sampling(6))):
            if count == 2:
                branch = copy.deepcopy(sequences[0])
        branches = [branch, *sequences]
        d.step(branches)
        results += [continued(d, branches, Sampling(4, temperature=1.0)), branches]
    check_same(results[2], results[0], results[3], results[1])


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix", topk=2), None], ids=["gists", "dense"])
def test_streams_that_take_turns(build, gist):
    """Two of the same decoder and of the same size, other sequences that are read between, a token that the caller replaces."""
    decoder = make_decoder(build, gist)
    results = []
    for d in (decoder, framed(decoder)):
        pairs, other, got = [both(d), [read(d, 30, 2, 5), read(d, 8, 3, 6)]], read(d, 12, 2, 7), []
        streams = [d.stream(pair, Sampling(9, temperature=1.0, seed=n)) for n, pair in enumerate(pairs)]
        for turn in (0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0):
            got += [(n, token, pairs[turn][n].logits.clone()) for n, token in (next(streams[turn]), next(streams[turn]))]
            if len(got) == 10:
                pairs[0][1].pending = [3]
                got += continued(d, pairs[1], Sampling(2))  # a stream within a stream, over the same sequences
                got += continued(d, [other, other_one(d)], Sampling(3))
        results += [got, [*pairs[0], *pairs[1]]]
    check_same(results[2], results[0], results[3], results[1])


def other_one(decoder):
    return read(decoder, 5, 1, 8)


class Record(TorchDispatchMode):
    """Operations with the shapes of their tensors, and the addresses of those that lie in some memories."""

    def __init__(self, memories):
        super().__init__()
        self.fixed = {x.untyped_storage().data_ptr() for x in memories}
        self.log = []

    def note(self, what, *values):
        def told(x):
            if not isinstance(x, torch.Tensor):
                return x if isinstance(x, (int, float, str, bool, type(None))) else str(x)
            at = x.data_ptr() if x.untyped_storage().data_ptr() in self.fixed else None
            return tuple(x.shape), x.stride(), x.dtype, at

        self.log.append((what, tree_map(told, values)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note(str(func), list(args), kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dense", "forget", "recall", "kinds"])
def test_a_step_reads_nothing_on_the_host_and_is_always_the_same(build, kind, monkeypatch):
    """What replaying needs: every operation and launch once more, at the same addresses, with the same shapes; nothing waits."""
    gist = {"dense": None, "forget": GistConfig((4, 2)), "recall": SUFFIX, "kinds": SUFFIX}[kind]
    decoder = framed(make_decoder(build, gist, layer_attention=("window:6", "gist", "dense") if kind == "kinds" else ()))
    sequences = both(decoder)
    decoder.frames.replays.prepare = lambda key, frame: frame.step
    stream = decoder.stream(sequences, Sampling(20, temperature=1.0, top_p=0.9))
    for _ in range(4):
        next(stream)
    (frame,) = decoder.frames.made.values()
    monkeypatch.undo()  # the kernels' own launching, but for the launches
    from unfold.kernels.decode import triton as backend

    memories = [frame.state.memory, frame.logits, frame.chosen, frame.draws, frame.anchor, frame.ends, decoder.never]
    memories += list(decoder.model.parameters())
    record, waits = Record(memories), Waits(monkeypatch)
    for x in memories:
        waits.mark(x)
    launch = lambda self, kernel, grid, launch, *args, **sizes: record.note(kernel, grid, launch, list(args), sizes)
    monkeypatch.setattr(backend.Chain, "launch", launch)
    grids = lambda grid: lambda *args, **sizes: record.note("keep", grid, list(args), sizes)
    monkeypatch.setattr(backend, "keep_kernel", type("Kernel", (), {"__getitem__": staticmethod(grids)})())
    monkeypatch.setattr(backend, "architecture", lambda q: "sm_90")
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: waits.mark(made(*a, **k)))
    logs = []
    for _ in range(3):
        record.log = []
        with waits, record:
            frame.step()
        logs.append(record.log)
    assert not waits.where, waits.where
    assert waits.operations > 100 and len(logs[0]) > 100
    assert sum(isinstance(entry[0], str) and entry[0] == "keep" for entry in logs[0]) == 3
    for log in logs[1:]:
        assert log == logs[0]
    fixed = {at for _, values in logs[0] for x in tree_iter(values) if isinstance(x, int) for at in [x]}
    assert frame.logits.data_ptr() in fixed and frame.state.memory.data_ptr() in fixed


def test_which_decoders_have_frames(build, monkeypatch):
    """None on a CPU; on a GPU those whose shape the kernels serve, whatever the kinds of layers and wherever their rows lie."""
    decoder = make_decoder(build, None)
    assert Decoder(decoder.model, None, GISTS, STARTS).frames is None
    gist, shape = GistConfig((4, 2)), dict(layers=3, heads=4, kv_heads=2, head_dim=64)
    on_a_gpu = dict(device=torch.device("cuda"), dtype=torch.bfloat16, rule=None, raw_on_host=False, gist=gist)

    def made(kind="gist", layer_attention=(), capture=True, **other):
        config = ModelConfig(VOCAB, attention=kind, layer_attention=layer_attention, **shape)
        return rounds.frames_of(SimpleNamespace(**on_a_gpu | other, model=SimpleNamespace(config=config)), capture)

    monkeypatch.setattr(rounds, "Frames", lambda decoder: "frames")
    assert made() == made("dense", gist=None) == made(raw_on_host=True) == "frames"
    assert made(layer_attention=("gist", "window:8")) == made("dense", ("dense", "window:8"), gist=None) == "frames"
    refused = [
        dict(capture=False),
        dict(dtype=torch.float64),
        dict(rule=SelectRule(2, 4, top_p=0.5)),
        dict(device=decoder.device),
    ]
    assert [made(**other) for other in refused] == [None] * 4
