"""Context parallelism: the plans of all ranks, played through in one process, give the attention of the whole sequence."""

import re

import numpy as np
import pytest
import torch

from tests import warm
from tests.kernels.cases import CASES, make_layout, padded, random_qkv
from tests.kernels.recall_cases import SUFFIX_CASES
from unfold.kernels.compressed import compressed_attention
from unfold.model.gist import GistConfig, build_layout, interleave
from unfold.model.parallel import context as subject
from unfold.model.parallel.context import ContextParallel, make_plan
from unfold.model.parallel.division import Division, imbalance, visible_pairs
from unfold.model.parallel.rows import take
from unfold.model.parallel.tensor import Alone


def play(layout, q, k, v, division):
    """What the ranks would compute, their all-gather done by indexing."""
    size = division.ranks
    plans = [make_plan(layout, division, rank) for rank in range(size)]
    parts = [[division.part(x, 1, rank) for rank in range(size)] for x in (q, k, v)]
    received = torch.stack([take(torch.cat([parts[1][r], parts[2][r]], 2), plans[r].exports.exported) for r in range(size)])
    outs = []
    for rank, plan in enumerate(plans):
        own = torch.cat([parts[1][rank], parts[2][rank]], 2)
        pool = torch.cat([own, received.transpose(0, 1).flatten(1, 2)], 1)
        k_near, v_near = take(pool, plan.source).split(k.shape[2], 2)
        q_near = take(torch.cat([parts[0][rank], torch.zeros_like(parts[0][rank][:, :1])], 1), plan.query_source)
        outs.append(take(compressed_attention(q_near, k_near, v_near, plan.layout.intervals), plan.own))
    return division.joined(outs, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_compute_the_whole(name, size):
    layout, config = make_layout(name)
    layout = padded(layout, config, size)
    q, k, v, d_out = random_qkv(layout, 4, 2, 8, torch.float64)
    want = compressed_attention(q, k, v, layout.intervals)
    got = play(layout, q, k, v, Division.even([layout.intervals], size))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    grads = zip(torch.autograd.grad(got, (q, k, v), d_out), torch.autograd.grad(want, (q, k, v), d_out))
    for a, b in grads:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def sample_layout(lengths, config, multiple):
    sample = interleave(np.zeros(sum(lengths), np.int64), lengths, np.ones(1, bool), config, range(1, 1 + config.levels))
    level, doc = (torch.from_numpy(x)[None] for x in (sample.level, sample.doc))
    return padded(build_layout(level, doc, config), config, multiple)


@pytest.mark.parametrize(
    "lengths",
    [[65536], [40000, 25536], [30000, 20000, 9000, 4000, 2536], [9000, *[211] * 268], [655] * 100],
    ids=["one document", "two", "five", "one long and many short", "many"],
)
@pytest.mark.parametrize("ranks", [8, 5])
def test_all_ranks_have_the_same_work(lengths, ranks):
    """In few slices; parts one after another are far from it where documents are long."""
    intervals = sample_layout(lengths, GistConfig((8, 4)), ranks).intervals
    even, in_a_row = Division.even([intervals], ranks), parts_in_a_row(intervals.tokens, ranks)
    spans = sorted(span for own in even.spans for span in own)
    assert [stop for _, stop in spans] == [*(start for start, _ in spans[1:]), intervals.tokens] and spans[0][0] == 0
    assert len(spans) < 2 * ranks
    assert imbalance(visible_pairs(intervals, even)) < 1.001
    if len(lengths) < 100:
        assert imbalance(visible_pairs(intervals, in_a_row)) > 1.6
    assert sum(visible_pairs(intervals, even)) == int((intervals.hi - intervals.lo).sum())


def parts_in_a_row(tokens, ranks):
    held = tokens // ranks
    return Division(tokens, tuple(((rank * held, (rank + 1) * held),) for rank in range(ranks)))


def test_packed_documents_of_a_micro_batch_are_even_together():
    """Samples of one micro-batch are divided alike, by what their tokens see in all of them and in all kinds of layers."""
    config = GistConfig((4, 2))
    samples = [sample_layout(lengths, config, 6000) for lengths in ([4096], [1000] * 3 + [1096])]
    level, doc = (torch.cat([getattr(sample, name) for sample in samples]) for name in ("level", "doc"))
    layout = build_layout(level, doc, config)
    layers = [layout.in_layer(kind).intervals for kind in ("gist", "window:64", "dense")]
    division = Division.even(layers, 4)
    pairs = [sum(of_rank) for of_rank in zip(*(visible_pairs(intervals, division) for intervals in layers))]
    assert imbalance(pairs) < 1.001 and division.slices <= 3


def test_any_division_is_exact():
    """Whichever slices a rank holds, one or several."""
    layout, config = make_layout("packed documents")
    layout = padded(layout, config, 12)
    q, k, v, _ = random_qkv(layout, 4, 2, 8, torch.float64)
    want = compressed_attention(q, k, v, layout.intervals)
    tokens = layout.intervals.tokens
    a, b = tokens // 3 + 4, 2 * tokens // 3
    in_a_row = parts_in_a_row(tokens, 3)
    uneven = Division(tokens, (((5, 9), (a + 1, b), (b + 1, b + 2)), ((0, 5), (9, a)), ((a, a + 1), (b, b + 1), (b + 2, tokens))))
    for division in (in_a_row, Division(tokens, in_a_row.spans[::-1]), uneven):
        torch.testing.assert_close(play(layout, q, k, v, division), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk_sizes", [(8,), (8, 4), (16, 8)])
def test_what_is_sent_approaches_the_compression_ratio(chunk_sizes):
    """One long document on 4 ranks: tokens sent per rank over tokens held, against 1 / ratio of the gists."""
    config = GistConfig(chunk_sizes)
    raw = 16384
    sample = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), config, range(1, 1 + config.levels))
    level, doc = (torch.from_numpy(x)[None] for x in (sample.level, sample.doc))
    layout = padded(build_layout(level, doc, config), config, 4)
    plan = make_plan(layout, Division.even([layout.intervals], 4), 1)
    top_gists_held = plan.tokens_held / len(sample.ids) * (sample.level == config.levels - 1).sum()
    # Beyond the top-level gists, of each slice: sinks, the last chunks and the last sections before its border.
    border = 2 * (config.sink + 2 * sum(chunk_sizes) + 8)
    assert top_gists_held - 1 <= plan.exports.sent <= top_gists_held + border


def test_the_ratio_of_bytes_approaches_the_compression_ratio(monkeypatch):
    """What a run reports as context_ratio, for one document over 4 ranks that grows: keys of all tokens over those sent."""
    # What others send does not matter to the bytes that are counted here.
    monkeypatch.setattr(subject, "gather_sequence", lambda x, group: x.expand(group.size(), *x.shape[1:]))
    ratios = []
    for raw in (2048, 8192, 65536):
        config = GistConfig((8, 4))
        sample = interleave(np.zeros(raw, np.int64), [raw], np.ones(1, bool), config, [1, 2])
        level, doc = (torch.from_numpy(x)[None] for x in (sample.level, sample.doc))
        layout = padded(build_layout(level, doc, config), config, 4)
        plan = make_plan(layout, Division.even([layout.intervals], 4), 1)
        context = ContextParallel(FourRanks(), Alone())
        context.gather(torch.zeros(1, plan.tokens_held, 4, 8), plan.exports)
        counted = context.traffic.take()
        assert (counted.exchanges, counted.whole) == (1, 3 * plan.tokens_held * 4 * 8 * 4)
        assert context.traffic.take().sent == 0
        ratios.append(counted.whole / counted.sent)
    # Per top-level gist a rank holds 32 raw tokens and 5 gists.
    assert ratios == sorted(ratios) and ratios[0] > 5 and 31 < ratios[-1] < 37, ratios


class FourRanks:
    """Stands for a process group of which only the size is asked."""

    def size(self) -> int:
        return 4


@pytest.mark.parametrize("ranks,heads", [(2, 1), *(pytest.param(*x, marks=pytest.mark.long) for x in ((3, 1), (4, 2), (6, 2)))])
def test_recall_over_ranks_is_that_of_the_whole(ranks, heads):
    """Real ranks exchange chunks: outputs, gradients and what was read, in fp64, on every layout case and rule; heads: so many
    neighbours trade heads besides."""
    done = warm.command("tests.model.context_ranks", ranks, heads, timeout=600)
    cases, sent = re.search(r"CASES (\d+) SENT (\d+)", done.stdout).groups()
    assert int(cases) == 4 * (len(CASES) + len(SUFFIX_CASES)) and int(sent) > 0
