"""Cached decoding equals recomputation, in every mode; batches, turns, edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.model.decoding import GISTS, STARTS, VOCAB, WORDS, continue_checked, make_decoder, recomputed, text
from unfold.model.config import GistConfig
from unfold.model.decode import generation
from unfold.model.decode.generation import Sampling
from unfold.model.decode.sampling import BLOCK, Draws, choose
from unfold.model.gist import build_layout, interleave
from unfold.model.visibility import MicroBatchAttention

BUDGETS = {
    "adaptive": {},
    "adaptive, small ratio": dict(budget_ratio=1),
    "fixed": dict(topk=2),
    "top-p": dict(top_p=0.4),
    "everything": dict(topk=10**6),
    "by group": dict(topk=2, share="group"),
    "unfold all": dict(topk=2, unfold_all=True),
}


def read(decoder, context, question, seed=0):
    sequence = decoder.start()
    decoder.read_context(sequence, text(context, seed + 1))
    decoder.read_suffix(sequence, text(question, seed + 2))
    return sequence


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("recall", ["none", "suffix", "all"])
@pytest.mark.parametrize("sizes", [(4,), (4, 2), (3, 2, 2)])
def test_equals_recomputation(build, sizes, recall, grow):
    decoder = make_decoder(build, GistConfig(sizes, recall=recall), grow)
    sequence = read(decoder, 70, 9)
    gists = len([l for l in sequence.level if l >= 0])
    continue_checked(decoder, [sequence], 24, temperature=1.0)
    assert (len([l for l in sequence.level if l >= 0]) > gists) == grow
    assert any(sequence.recalls) == (recall != "none") and sequence.recalls[3] == (recall == "all")


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget(build, budget):
    decoder = make_decoder(build, GistConfig((3, 2, 2), recall="suffix", **BUDGETS[budget]), grow=True)
    continue_checked(decoder, [read(decoder, 100, 5)], 10, temperature=1.0)


OWN_GROUP = GistConfig((4, 2), recall="suffix", own_group=True, recall_from=2)


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix", topk=3), OWN_GROUP, None], ids=["gist", "own", "dense"])
def test_prefill_in_runs_of_any_length(build, gist, monkeypatch):
    """Runs that end anywhere: within a chunk, between a gist and the one above it, within the sinks."""
    expected = None
    for run in (1, 2, 7, 1024):
        monkeypatch.setattr(generation, "PREFILL", run)
        decoder = make_decoder(build, gist)
        sequence = read(decoder, 61, 12)
        assert (sequence.logits - recomputed(decoder, sequence)).abs().max() < 1e-10
        expected = sequence.logits if expected is None else expected
        assert (sequence.logits - expected).abs().max() < 1e-10


def test_dense(build):
    decoder = make_decoder(build, None)
    assert not any(level >= 0 for level in read(decoder, 30, 3).level)
    continue_checked(decoder, [read(decoder, 30, 3), read(decoder, 300, 1)], 8, temperature=1.0)


@pytest.mark.parametrize("grow", [False, True])
def test_batch_of_very_different_lengths_equals_each_alone(build, grow):
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix"), grow)
    lengths = [(0, 1), (400, 3), (3, 2), (37, 0), (0, 40)]
    together = continue_checked(decoder, [read(decoder, *n) for n in lengths], 12, temperature=0.8, top_p=0.9)
    for number, n in enumerate(lengths):
        alone = [t for _, t in decoder.stream([read(decoder, *n)], Sampling(12, 0.8, 0.9, seed=number))]
        assert alone == together[number]


EDGES = {
    "context shorter than a chunk": ((8, 2), 5, 3, {}),
    "context shorter than the sink": ((4, 2), 2, 6, {}),
    "empty context": ((4, 2), 0, 5, {}),
    "a prompt of one token": ((4, 2), 0, 1, {}),
    "one gist": ((4,), 7, 2, {}),
    "no suffix": ((4, 2), 30, 0, {}),
    "context that a gist of every level just closed": ((4, 2), 11, 3, {}),
    "more asked for than there is": ((4, 2), 30, 3, dict(topk=1000)),
    "no sink, no neighbours": ((4, 2), 30, 3, dict(sink=0, n_prev=0)),
    "wide windows": ((2, 2), 40, 3, dict(sink=9, n_prev=3)),
    "own group": ((4, 2), 45, 9, dict(own_group=True, n_prev=2, recall_from=2)),
    "chunks of one length": ((4, 2), 45, 9, dict(word_aware=False)),
    "chunks of one token": ((1, 3), 20, 3, dict(word_aware=False)),
}


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(build, edge, grow):
    sizes, context, question, options = EDGES[edge]
    decoder = make_decoder(build, GistConfig(sizes, recall="suffix", **options), grow)
    continue_checked(decoder, [read(decoder, context, question)], 14, temperature=1.0)


@pytest.mark.parametrize("recall", ["none", "all", "suffix"])
@pytest.mark.parametrize("starts", ["some", "none", "all"])
def test_text_that_goes_on_has_its_gists_where_training_puts_them(build, recall, starts):
    """Whatever was read at once and whatever came token by token; without word starts every chunk is read twice in part."""
    bitmap = {"some": STARTS, "none": np.zeros(VOCAB, bool), "all": np.ones(VOCAB, bool)}[starts]
    config = GistConfig((5, 3), recall=recall, topk=2)
    decoder = make_decoder(build, config, grow=True, starts=bitmap)
    sequence = decoder.start()
    prompt = text(23)
    decoder.read_context(sequence, prompt, close=False)
    new = continue_checked(decoder, [sequence], 40, temperature=1.5)[0]
    decoder.step([sequence])
    raw = np.array(prompt + new)
    whole = interleave(raw, [len(raw)], bitmap, config, GISTS[:2])
    # The end may still grow: there the last chunk has no gist yet.
    same = len(sequence.ids) - 5 - 5 // 2 - 2
    assert sequence.ids[:same] == whole.ids[:same].tolist() and sequence.level[:same] == whole.level[:same].tolist()
    assert [i for i, l in zip(sequence.ids, sequence.level) if l < 0] == raw.tolist()
    assert max(sequence.level) == 1


@pytest.mark.parametrize("recall", ["none", "all", "suffix"])
def test_chunks_of_one_length_are_folded_at_once_and_nothing_is_read_twice(build, recall, monkeypatch):
    """Two sequences in step, prefilled in runs; the model is given every token of the training layout once, and no other."""
    config = GistConfig((5, 3), recall=recall, topk=2, word_aware=False)
    decoder = make_decoder(build, config, grow=True, starts=None)
    monkeypatch.setattr(generation, "PREFILL", 7)
    given, run = [], decoder._run
    monkeypatch.setattr(decoder, "_run", lambda ids, *rest: given.extend(ids) or run(ids, *rest))
    sequences, prompts = [decoder.start(), decoder.start()], [text(23), text(9, 1)]
    for sequence, prompt in zip(sequences, prompts):
        decoder.read_context(sequence, prompt, close=False)
    new = continue_checked(decoder, sequences, 22, temperature=1.5)
    decoder.step(sequences)
    for sequence, prompt, tokens in zip(sequences, prompts, new):
        raw = np.array(prompt + tokens)
        whole = interleave(raw, [len(raw)], None, config, GISTS[:2])
        assert sequence.ids == whole.ids.tolist() and sequence.level == whole.level.tolist()
    assert sorted(given) == sorted(sequences[0].ids + sequences[1].ids)
    with pytest.raises(ValueError, match=f"tokens: id {VOCAB} is outside the vocabulary of {VOCAB} pieces"):
        decoder.read_suffix(sequences[0], [VOCAB])


@pytest.mark.parametrize("grow,word_aware", [(False, True), (True, True), (False, False)])
def test_several_turns(build, grow, word_aware):
    decoder = make_decoder(build, GistConfig((4, 2), recall="suffix", topk=2, word_aware=word_aware), grow)
    sequence = read(decoder, 40, 6)
    first = continue_checked(decoder, [sequence], 9, temperature=1.0)[0]
    decoder.read_suffix(sequence, text(5, 7))  # another question
    assert (sequence.logits - recomputed(decoder, sequence)).abs().max() < 1e-10
    second = continue_checked(decoder, [sequence], 9, temperature=1.0)[0]
    decoder.read_context(sequence, text(33, 8))  # more context: what was said before is folded with it
    assert (sequence.logits - recomputed(decoder, sequence)).abs().max() < 1e-10
    assert sequence.level[-1] >= 0 and sequence.level[-30:].count(-1) < 30
    decoder.read_suffix(sequence, text(4, 9))
    continue_checked(decoder, [sequence], 9, temperature=1.0)
    raw = [i for i, l in zip(sequence.ids, sequence.level) if l < 0]
    said = text(40, 1) + text(6, 2) + first + text(5, 7) + second + text(33, 8) + text(4, 9)
    assert raw[: len(said)] == said


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("budget", [dict(topk=10**6), dict(topk=1, unfold_all=True)], ids=["topk", "unfold_all"])
def test_everything_recalled_is_attention_over_everything(build, budget, first):
    """Raw tokens and gists of the document, in every layer from the first that recalls on: by a mask written here."""
    gist = GistConfig((4, 2), recall="suffix", recall_from=first, own_group=first == 2, **budget)
    decoder = make_decoder(build, gist, layers=3)
    sequence = read(decoder, 60, 5)
    for _ in decoder.stream([sequence], Sampling(6, 1.0)):
        pass
    level, recalls = torch.tensor(sequence.level), torch.tensor(sequence.recalls)
    layout = build_layout(level[None], torch.zeros_like(level)[None], gist)
    forget = MicroBatchAttention("gist", layout)
    seen = torch.where(
        recalls[:, None], torch.ones(len(level), len(level), dtype=torch.bool).tril(), layout.intervals.dense_mask()[0]
    )

    def attend(index, q, k, v):
        if index < first:
            return forget(index, q, k, v)
        keys, values = (x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(1, 2)

    with torch.no_grad():
        hidden = decoder.model.run_layers(torch.tensor([sequence.ids]), layout.position, attend)
        expected = decoder.model.head_logits(hidden)[-1, 0]
    assert (sequence.logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix"), GistConfig((8,)), None], ids=["recall", "forget", "dense"])
def test_fp32_gives_the_same_tokens(build, gist):
    decoder = generation.Decoder(make_decoder(build, gist).model.float(), gist, GISTS, STARTS, grow=True)
    sequence = read(decoder, 90, 5)
    for _, token in decoder.stream([sequence], Sampling(30)):
        expected = recomputed(decoder, sequence).float()
        expected[list(GISTS)] = -torch.inf
        assert token == int(expected.argmax())


@pytest.mark.parametrize("gist", [GistConfig((4, 2), recall="suffix"), None], ids=["recall", "dense"])
def test_bf16(build, gist):
    """Its logits are as far from those of fp64 weights as recomputation's, within a factor."""
    exact = make_decoder(build, gist)
    decoder = generation.Decoder(make_decoder(build, gist).model.bfloat16(), gist, GISTS, STARTS)
    sequence = read(decoder, 50, 4)
    for _ in decoder.stream([sequence], Sampling(6)):
        true = recomputed(exact, sequence)
        error, plain = ((x.double() - true).abs().mean() for x in (sequence.logits, recomputed(decoder, sequence)))
        assert sequence.logits.dtype == torch.bfloat16 and error <= 2 * plain


def test_gist_ids_and_stop_ids_are_never_emitted(build):
    decoder = make_decoder(build, GistConfig((4, 2)), grow=True)
    with torch.no_grad():  # every gist id gets the largest logits
        decoder.model.embedding.weight[list(GISTS)] *= 50
    new = [t for _, t in decoder.stream([read(decoder, 30, 3)], Sampling(40, temperature=2.0))]
    assert len(new) == 40 and max(new) < WORDS
    sequences = [read(decoder, 30, 3), read(decoder, 20, 3)]
    got = list(decoder.stream(sequences, Sampling(40, temperature=2.0), stop_ids=[new[0]]))
    assert all(number == 1 for number, _ in got), "the first sequence ends at once"
    assert sequences[0].pending == [] and len(sequences[0].ids) > 0


def test_a_caller_may_end_a_sequence(build):
    decoder = make_decoder(build, GistConfig((4, 2)))
    ended, count = set(), [0, 0]
    for number, _ in decoder.stream([read(decoder, 20, 2), read(decoder, 9, 2)], Sampling(10), ended=ended):
        count[number] += 1
        if number == 0 and count[0] == 3:
            ended.add(0)
    assert count == [3, 10]


def test_bad_input_is_named(build):
    decoder = make_decoder(build, GistConfig((4, 2)))
    with pytest.raises(ValueError, match="number 1 is empty"):
        list(decoder.stream([read(decoder, 5, 1), decoder.start()], Sampling(3)))
    with pytest.raises(ValueError, match="id 60 is outside the vocabulary of 60"):
        decoder.read_suffix(decoder.start(), [3, VOCAB])
    with pytest.raises(ValueError, match="gist_ids: 1 ids for 2 gist levels"):
        generation.Decoder(decoder.model, GistConfig((4, 2)), [50], STARTS).start()
    for wrong, message in (
        (dict(max_new_tokens=-1), "max_new_tokens: -1 is below 0"),
        (dict(temperature=-0.5), "temperature: -0.5 is not a number from 0 on"),
        (dict(temperature=math.nan), "temperature: nan is not"),
        (dict(top_p=0.0), r"top_p: 0.0 is not in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p: 1.5 is not in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**wrong)


def test_sampling():
    logits, never = torch.tensor([[0.1, 3.0, 2.0, -5.0, 9.0]]), torch.tensor([4])
    many = logits.expand(4000, -1)
    draw = torch.rand(4000, dtype=torch.float64)
    assert choose(logits, never, Sampling(), draw[:1]).tolist() == [1]
    nucleus = choose(many[:200], never, Sampling(temperature=1.0, top_p=0.9), draw[:200])
    assert set(nucleus.tolist()) == {1, 2}
    drawn = choose(many, never, Sampling(temperature=1.0), draw)
    assert math.isclose((drawn == 1).float().mean(), logits[0, :4].softmax(0)[1], abs_tol=0.03)
    for top_p in (1.0, 0.9):  # the largest and the smallest number that can be drawn
        edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert max(choose(logits.expand(2, -1), never, Sampling(temperature=1.0, top_p=top_p), edges).tolist()) < 4


def test_draws_are_those_of_each_sequence_alone():
    together = Draws(Sampling(seed=3), 2)
    for number in (0, BLOCK - 1, BLOCK, 3 * BLOCK + 1):
        alone = torch.cat([Draws(Sampling(seed=3 + n), 1).of(number) for n in range(2)])
        assert torch.equal(together.of(number), alone)
    assert together.of(0)[0] != together.of(0)[1] and together.of(0)[0] != together.of(BLOCK)[0]
