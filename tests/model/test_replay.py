"""Replaying steps from graphs, as far as a CPU can tell: fake graphs, right and wrong ones, in place of CUDA's."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.model import by_tables
from tests.model.decoding import make_decoder
from tests.model.test_frames import both, check_same, continued, framed, read
from unfold.kernels.decode import triton
from unfold.model.config import GistConfig
from unfold.model.decode import replay
from unfold.model.decode.generation import Sampling


@pytest.fixture(autouse=True)
def by_plain_loops(monkeypatch):
    by_tables.patch(monkeypatch)


class Counter:
    """A step that counts: as a frame, for the machinery of replaying."""

    def __init__(self):
        self.count, self.log = torch.zeros(1, dtype=torch.int64), []

    def step(self):
        self.log.append("step")
        self.count += 1

    def rest(self):
        self.log.append("rest")

    def kept(self):
        return [self.count]

    def spoil(self):
        self.log.append("spoil")


class FakeGraph:
    """In place of a CUDA graph. run: what its replay does."""

    def __init__(self, run):
        self.run, self.replayed = run, 0

    def replay(self):
        self.replayed += 1
        self.run()


def capturing(replays, run=None):
    """Let it capture fake graphs; returns the list of those that it will capture. run: what their replays do; None: the step."""
    graphs = []
    replays.capture, replays._captured = True, lambda step: graphs.append(FakeGraph(run or step)) or graphs[-1]
    return graphs


def test_graphs_are_captured_once_checked_at_times_and_kept_within_a_number(monkeypatch):
    """Of capturing what a CPU can tell: when it is asked for, from which state, and what replays are held against."""
    replays, counter = replay.Replays(torch.device("cpu")), Counter()
    replays.prepare("a", counter)()
    assert counter.log == ["step"] and not replays.graphs, "without a GPU a step runs as it is"
    graphs = capturing(replays)
    monkeypatch.setattr(replay, "MOST", 2)
    counter.log.clear()
    for key in "aabacaba":
        replays.prepare(key, counter)()
    assert counter.log.count("rest") == len(graphs) == 4
    assert counter.log.count("spoil") == 5, "the first replay of each, and the fourth of one"
    assert list(replays.graphs) == ["b", "a"]  # b was dropped for c, and made again
    assert sum(graph.replayed for graph in graphs) == 8 and counter.log.count("step") == 8 + 5  # a checked one runs twice
    assert int(counter.count) == 9 and replays.capture, "and still every run counts once"


def replayed(build, gist, run):
    """What check_same takes of streams through fake graphs and step by step, the replays, the graphs. run: of a frame."""
    plain = make_decoder(build, gist)
    decoder = framed(plain)
    graphs = capturing(decoder.frames.replays, lambda: run(next(iter(decoder.frames.made.values()))))
    one, two = both(plain), both(decoder)
    want, got = (continued(d, s, Sampling(9, temperature=1.0)) for d, s in ((plain, one), (decoder, two)))
    return got, want, two, one, decoder.frames.replays, graphs


def add_to_logits(what):
    def run(frame):
        frame.step()
        frame.logits.add_(what)

    return run


def miscount(frame):
    frame.step()
    frame.state.position.add_(1)


def keep_no_rows(frame):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "keep", lambda *_: None)
        frame.step()


WRONG = {
    "logits": add_to_logits(1e-3),
    "a logit that is no number": add_to_logits(torch.nan),
    "the next state": miscount,
    "no rows written": keep_no_rows,
    "nothing done": lambda frame: None,
}


@pytest.mark.parametrize("how", WRONG)
def test_a_graph_that_does_not_do_what_the_step_does_is_not_trusted(build, how, caplog):
    """Found at its first replay; tokens, logits and caches are those without graphs all the same, and one line says so."""
    gist = GistConfig((4, 2), recall="suffix", topk=2)
    *results, replays, graphs = replayed(build, gist, WRONG[how])
    check_same(*results)
    assert not replays.capture and not replays.graphs and [graph.replayed for graph in graphs] == [1]
    (message,) = caplog.messages
    assert "without CUDA graphs" in message and "replay 1 of one differed" in message and "\n" not in message


def test_a_graph_that_is_right_at_first_is_looked_at_again(build, caplog):
    """A number that was captured as it stood then, and did not change for a while; found before a fourth token comes of it."""
    runs = []

    def run(frame):
        frame.step()
        runs.append(1)
        if len(runs) == 4:
            frame.state.span.sub_(1)

    *results, replays, _ = replayed(build, None, run)
    check_same(*results)
    (message,) = caplog.messages
    assert not replays.capture and "replay 4 of one differed" in message


def test_a_graph_that_cannot_be_replayed_is_not_trusted(build, caplog):
    def fail(frame):
        raise RuntimeError("CUDA error: invalid argument\nmore lines")

    *results, replays, _ = replayed(build, None, fail)
    check_same(*results)
    (message,) = caplog.messages
    assert not replays.capture and "could not be replayed (CUDA error: invalid argument)" in message


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix", topk=2), None], ids=["gists", "dense"])
def test_a_graph_that_differs_by_rounding_is_replayed(build, gist, caplog):
    *results, replays, graphs = replayed(build, gist, add_to_logits(1e-15))
    check_same(*results)
    assert replays.capture and not caplog.messages
    assert sum(graph.replayed for graph in graphs) >= 8


def test_where_a_graph_cannot_be_captured_one_line_says_so(build, caplog):
    decoder = framed(make_decoder(build, None))
    replays = decoder.frames.replays

    def fail(step):
        step()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    replays.capture, replays._captured = True, fail
    want = continued(make_decoder(build, None), [read(decoder, 9, 1)], Sampling(4))
    got = continued(decoder, [read(decoder, 9, 1)], Sampling(4))
    assert [x[:2] for x in got] == [x[:2] for x in want] and not replays.capture
    (message,) = caplog.messages
    assert "without CUDA graphs" in message and "not permitted" in message and "\n" not in message


def test_a_capture_that_fails_leaves_the_caller_its_stream(monkeypatch):
    """PyTorch's context leaves the capture's stream current where the capture is found invalid as it ends."""

    @contextmanager
    def graph(*_, **__):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    here, own = (SimpleNamespace(wait_stream=lambda _: None) for _ in range(2))
    became = []
    fakes = dict(device=nullcontext, stream=nullcontext, current_stream=lambda: here, CUDAGraph=object, graph=graph)
    for name, fake in (fakes | dict(set_stream=became.append)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replays = replay.Replays(torch.device("cpu"))
    replays.stream = own
    with pytest.raises(RuntimeError, match="during capture"):
        replays._captured(lambda: None)
    assert became == [here]
