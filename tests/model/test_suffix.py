"""Closed contexts with suffixes: the layout against docs/method.md restated, training against generation, gradients to gists."""

import numpy as np
import pytest
import torch

from tests import rules
from tests.model.decoding import GISTS, STARTS, VOCAB, make_decoder, text
from unfold.model.config import GistConfig
from unfold.model.gist import Recall, build_layout, interleave, max_interleaved_length
from unfold.model.visibility import IGNORED, MicroBatch

# (context, suffix) tokens of each document; -1: no context at all, plain text
DOCUMENTS = {
    "one": [(61, 12)],
    "packed, with plain text": [(40, 7), (-1, 33), (5, 3), (30, 9)],
    "shorter than a chunk": [(2, 9), (7, 4)],
    "shorter than the sinks": [(1, 12), (2, 1)],
    "one gist": [(7, 6)],
    "no context": [(0, 9), (0, 1), (20, 5)],
    "no suffix": [(30, 0), (16, 0)],
    "closed at every level at its end": [(19, 8), (35, 3)],
}
SIZES = [(4,), (4, 2), (3, 2, 2), (1,)]


def sample(documents, config: GistConfig, seed: int = 0):
    """Interleaved sample, its raw tokens, and which raw tokens are a suffix."""
    lengths = [max(context, 0) + suffix for context, suffix in documents]
    raw = np.array(text(sum(lengths), seed), np.int64)
    contexts = [context for context, _ in documents]
    made = interleave(raw, lengths, STARTS, config, GISTS[: config.levels], contexts=contexts)
    context = np.array(contexts)[made.doc]
    return made, raw, (made.level < 0) & (context >= 0) & (made.position >= context)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("word_aware", [True, False])
def test_insertion_closes_contexts_and_leaves_suffixes(name, sizes, word_aware):
    config = GistConfig(sizes, word_aware=word_aware)
    made, raw, suffix = sample(DOCUMENTS[name], config)
    want, at = [[], [], [], []], 0
    for number, (context, after) in enumerate(DOCUMENTS[name]):
        plain = context < 0
        folded = after if plain else context
        tokens = raw[at : at + folded].tolist()
        columns = rules.insert_gists(tokens, [folded], STARTS, sizes, config.sink, list(GISTS), not plain, word_aware)
        rest = [] if plain else raw[at + context : at + context + after].tolist()
        columns[0] += rest
        columns[1] += [-1] * len(rest)
        columns[2] = [number] * len(columns[0])
        columns[3] += range(context, context + len(rest))
        for column, values in zip(want, columns):
            column += values
        at += folded + len(rest)
    for field, values in zip(("ids", "level", "doc", "position"), want):
        assert getattr(made, field).tolist() == values, field
    closed = sum(context >= 0 for context, _ in DOCUMENTS[name])
    assert len(made.ids) <= max_interleaved_length(len(raw), sizes, closed)
    assert suffix.sum() == sum(after for context, after in DOCUMENTS[name] if context >= 0)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("n_prev", [0, 1, 2])
def test_visible_sets_follow_the_rules(name, sizes, n_prev):
    config = GistConfig(sizes, n_prev=n_prev)
    made, _, _ = sample(DOCUMENTS[name], config)
    layout = build_layout(torch.from_numpy(made.level)[None], torch.from_numpy(made.doc)[None], config)
    want = rules.visible(made.level.tolist(), made.doc.tolist(), config.levels, config.sink, n_prev)
    assert (layout.intervals.dense_mask()[0].numpy() == want).all()


def test_a_suffix_sees_its_own_tokens_and_the_last_closed_groups():
    """Written out: c = (3, 2), s = 2, n_prev = 1; the context of 9 closes at both levels, two tokens follow."""
    config = GistConfig((3, 2), sink=2)
    made = interleave(np.arange(11), [11], np.ones(11, bool), config, [98, 99], contexts=[9])
    assert "".join(".gG"[level + 1] for level in made.level) == ".....g...gG.gG.."
    layout = build_layout(torch.from_numpy(made.level)[None], torch.from_numpy(made.doc)[None], config)
    row = "".join(map(str, layout.intervals.dense_mask()[0].int().tolist()[15]))
    # Sinks; the level-0 gist of the last closed section; both G's; the last closed chunk; the suffix itself.
    assert row == "1100000000111111"


def batch_of(documents, config: GistConfig, seed: int = 0) -> tuple[MicroBatch, np.ndarray]:
    made, raw, suffix = sample(documents, config, seed)
    layout = build_layout(torch.from_numpy(made.level)[None], torch.from_numpy(made.doc)[None], config)
    ids = torch.from_numpy(made.ids)[None]
    labels = torch.full_like(ids, IGNORED)
    targets = torch.from_numpy(np.append(raw[1:], IGNORED))
    labels[0, made.level < 0] = targets
    labels[0, ~suffix] = IGNORED
    return MicroBatch(ids, labels, layout, Recall.of(layout, config, torch.from_numpy(suffix)[None])), suffix


BUDGETS = {"adaptive": {}, "fixed": {"topk": 2}, "more than there are": {"topk": 1000}, "top-p": {"top_p": 0.7}}


@pytest.mark.parametrize("recall", ["none", "suffix", "all"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("context,after", [(61, 12), (2, 9), (7, 6), (0, 9), (19, 8)])
def test_training_gives_the_logits_of_generation(build, recall, budget, context, after):
    """A whole sample in one forward pass; and the context read, closed, and the suffix read with a cache."""
    if recall == "none" and budget != "adaptive":
        pytest.skip("nothing is selected")
    config = GistConfig((4, 2), recall=recall, **BUDGETS[budget])
    decoder = make_decoder(build, config)
    batch, _ = batch_of([(context, after)], config)
    logits = decoder.model.logits(batch.ids, batch.layout, batch.recall)[0]
    raw = text(context + after)
    sequence = decoder.start()
    if context:
        decoder.read_context(sequence, raw[:context])
    for token in range(context, context + after):
        decoder.read_suffix(sequence, raw[token : token + 1])
        at = len(sequence.ids) - 1
        assert (sequence.logits - logits[at]).abs().max() < 1e-10, token
    assert sequence.ids == batch.ids[0].tolist()
    whole = decoder.start()
    if context:
        decoder.read_context(whole, raw[:context])
    decoder.read_suffix(whole, raw[context:])
    assert (whole.logits - logits[-1]).abs().max() < 1e-10


@pytest.mark.parametrize("sizes", [(4,), (4, 2)])
def test_gradients_of_answers_reach_the_selected_gists(build, sizes):
    config = GistConfig(sizes, recall="suffix", topk=2)
    decoder = make_decoder(build, config)
    model = decoder.model.train()
    batch, suffix = batch_of([(80, 10)], config)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out.retain_grad() or out))
    model(batch).backward()
    level = batch.layout.level[0]
    window = int(torch.from_numpy(suffix).nonzero()[0]) - 14
    grad = embedded[0].grad[:, 0].norm(dim=1)
    far = torch.arange(len(level)) < window
    assert ((grad > 0) & far & (level == 0)).any(), "selected gists before the window"
    rows = model.embedding.weight.grad[list(GISTS[: config.levels])]
    assert (rows.norm(dim=1) > 0).all(), "the gists' embedding rows"


def test_a_sample_without_suffix_recalls_nothing():
    config = GistConfig((4, 2), recall="suffix")
    batch, suffix = batch_of([(-1, 50)], config)
    assert not suffix.any() and batch.recall is None


@pytest.mark.parametrize("contexts", [[5], [5, 9], [1, 2, 3]])
def test_contexts_that_do_not_fit(contexts):
    with pytest.raises(ValueError, match="contexts: .* give each one of at most its length"):
        interleave(np.zeros(12, np.int64), [4, 8], np.ones(VOCAB, bool), GistConfig((4,)), [50], contexts=contexts)
