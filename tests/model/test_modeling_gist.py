"""The attention, placement and cache of the remote code, each against the project's own, in fp64."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.gist_exports import GISTS, LLAMA, PAD, STARTS, VOCAB, load, make_model, text, write_export
from unfold.kernels.unfold import recall_attention
from unfold.model.config import GistConfig
from unfold.model.gist import build_layout, build_recall, interleave, select_rule
from unfold.model.hf.gist_attention import GistPass, take_best
from unfold.model.hf.gist_sequence import GistSequence, GistSettings, pack_word_starts, unpack_word_starts
from unfold.model.hf.modeling_gist import GistCache
from unfold.model.hf.own_kernels import find_kernels
from unfold.model.hf.remote import config_entries

HEADS, KV_HEADS, DIM = 4, 2, 8
RULES = {
    "forgetting": {"recall": "none"},
    "adaptive": {"recall": "suffix"},
    "adaptive, small ratio": {"recall": "suffix", "budget_ratio": 1, "share": "group"},
    "top-2": {"recall": "suffix", "topk": 2},
    "top-2 by group": {"recall": "suffix", "topk": 2, "share": "group"},
    "top-p": {"recall": "suffix", "top_p": 0.6},
    "everybody": {"recall": "all", "topk": 3},
    "wide": {"recall": "suffix", "topk": 10**6, "sink": 9, "n_prev": 3},
    "narrow": {"recall": "suffix", "topk": 1, "sink": 0, "n_prev": 0},
    "own group": {"recall": "suffix", "own_group": True, "n_prev": 2},
    "chunks of one length": {"recall": "suffix", "word_aware": False},
    "unfold all": {"recall": "suffix", "topk": 1, "unfold_all": True},
}


def settings_of(gist: GistConfig, starts=STARTS) -> GistSettings:
    entry = config_entries("LlamaForCausalLM", gist, GISTS[: gist.levels], GISTS, starts)["gist"]
    return GistSettings.of(type("Config", (), {"gist": entry}))


class Reading:
    """A sequence with random queries, keys and values that is read in pieces, and all of it at once by the project's code."""

    def __init__(self, gist: GistConfig, kernels=None, starts=STARTS):
        self.gist, self.kernels = gist, kernels
        self.sequence = GistSequence(settings_of(gist, starts), torch.device("cpu"))
        self.ids, self.level, self.recalls = [], [], []
        self.qkv = torch.zeros(HEADS + 2 * KV_HEADS, 0, DIM, dtype=torch.float64)
        self.noise = torch.Generator().manual_seed(0)

    def read(self, tokens, query_start=None, grow=None, index=1) -> tuple[torch.Tensor, torch.Tensor]:
        """Output at the tokens that were read, by the remote code and by ours: two [H, n, D]."""
        feed = self.sequence.read(tokens, query_start, grow)
        keep = len(self.ids) - feed.drop
        self.ids, self.level = self.ids[:keep] + feed.ids, self.level[:keep] + feed.level
        self.recalls = self.recalls[:keep] + feed.recalls
        new = torch.randn(len(self.qkv), len(feed.ids), DIM, dtype=torch.float64, generator=self.noise)
        self.qkv = torch.cat([self.qkv[:, :keep], new], 1)
        if not feed.ids:
            return new[:HEADS], new[:HEADS]
        parts = new.split([HEADS, KV_HEADS, KV_HEADS])
        attend = GistPass([(self.sequence, self.sequence.append(feed))], self.kernels, keep=True)
        return attend.attend(index, *parts, DIM**-0.5), self.ours(*self.qkv.split([HEADS, KV_HEADS, KV_HEADS]))[:, keep:]

    def ours(self, *qkv) -> torch.Tensor:
        level = torch.tensor([self.level])
        layout = build_layout(level, torch.zeros_like(level), self.gist)
        tree = build_recall(layout, self.gist, torch.tensor([self.recalls]))
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        return recall_attention(q, k, v, tree, select_rule(self.gist), backend="reference")[0][0].transpose(0, 1)


@pytest.fixture(params=["torch", "kernels"])
def kernels(request):
    found = find_kernels()
    assert found is not None, "unfold's kernels are here"
    return found if request.param == "kernels" else None


@pytest.mark.parametrize("sizes", [(8,), (8, 4), (4, 3, 2), (3, 1, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_attention_is_ours(rule, sizes, kernels):
    reading = Reading(GistConfig(sizes, **RULES[rule]), kernels)
    tokens = text(110, 3)
    for first, last, start in ((0, 70, 60), (70, 71, 60), (71, 80, 60), (80, 110, 95), (109, 110, 95)):
        theirs, ours = reading.read(tokens[first:last], start)
        assert (theirs - ours).abs().max() < 1e-10
    assert any(reading.recalls) == (RULES[rule]["recall"] != "none") and max(reading.level) == len(sizes) - 1


@pytest.mark.parametrize("starts", [STARTS, np.zeros(VOCAB, bool), np.ones(VOCAB, bool)], ids=["some", "none", "all"])
@pytest.mark.parametrize("grow", [None, True])
def test_text_that_grows_token_by_token(starts, grow):
    """Chunks whose end is only known later are read again; gists are where training puts them."""
    gist = GistConfig((5, 3), recall="suffix", topk=2)
    reading = Reading(gist, starts=starts)
    tokens = text(70, 4)
    for first, last in ((0, 23), *((i, i + 1) for i in range(23, 70))):
        theirs, ours = reading.read(tokens[first:last], None if grow is None else 12, grow)
        assert (theirs - ours).abs().max() < 1e-10
    if grow is None:
        whole = interleave(np.array(tokens), [len(tokens)], starts, gist, GISTS[:2])
        # The end may still grow: there the last chunk has no gist yet.
        same = len(reading.ids) - 5 - 5 // 2 - 2
        assert reading.ids[:same] == whole.ids[:same].tolist() and reading.level[:same] == whole.level[:same].tolist()
    assert [i for i, l in zip(reading.ids, reading.level) if l < 0] == tokens


@pytest.mark.parametrize("grow", [None, True])
def test_chunks_of_one_length_are_folded_at_once(grow):
    """By an export without a bitmap: after every token the gists are those of training, and nothing is read twice."""
    gist = GistConfig((5, 3), recall="suffix", topk=2, word_aware=False)
    reading = Reading(gist, starts=None)
    tokens, fed = text(70, 4), 0
    for first, last in ((0, 23), *((i, i + 1) for i in range(23, 70))):
        theirs, ours = reading.read(tokens[first:last], None if grow is None else 12, grow)
        assert (theirs - ours).abs().max() < 1e-10
        fed += theirs.shape[1]
        if grow is None:
            whole = interleave(np.array(tokens[:last]), [last], None, gist, GISTS[:2])
            assert reading.ids == whole.ids.tolist() and reading.level == whole.level.tolist()
    assert fed == len(reading.ids) and reading.level.count(0) > 10


@pytest.mark.parametrize("length", [0, 1, 2, 3, 11, 12, 40])
def test_contexts_of_every_length(length):
    for context in range(max(0, length - 3), length + 1):
        reading = Reading(GistConfig((4, 2), recall="suffix"))
        for tokens in (text(length, 1), text(1, 2), text(6, 3)):
            theirs, ours = reading.read(tokens, context)
            assert torch.allclose(theirs, ours, rtol=0, atol=1e-10)
        assert reading.level.count(-1) == length + 7 and reading.recalls[-1]


@pytest.mark.parametrize("rule", ["forgetting", "top-2", "everybody"])
def test_gradients_are_ours(rule, kernels):
    gist = GistConfig((4, 3), **RULES[rule])
    sequence = GistSequence(settings_of(gist), torch.device("cpu"))
    feed = sequence.read(text(70, 5), 50, None)
    sight = sequence.append(feed)
    reading = Reading(gist)
    reading.level, reading.recalls = feed.level, feed.recalls
    noise = torch.Generator().manual_seed(2)
    make = lambda heads: torch.randn(heads, len(feed.ids), DIM, dtype=torch.float64, generator=noise).requires_grad_()
    qkv, upstream = [make(heads) for heads in (HEADS, KV_HEADS, KV_HEADS)], make(HEADS).detach()
    theirs = GistPass([(sequence, sight)], kernels, keep=False).attend(1, *qkv, DIM**-0.5)
    expected, got = (torch.autograd.grad(out, qkv, upstream) for out in (reading.ours(*qkv), theirs))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(expected, got))


@pytest.mark.parametrize("first", [1, 2])
def test_layers_before_the_first_that_recalls(kernels, first):
    reading = Reading(GistConfig((4, 2), recall="suffix", topk=1, recall_from=first), kernels)
    theirs, ours = reading.read(text(60, 6), 40, index=first)
    assert (theirs - ours).abs().max() < 1e-10
    reading = Reading(reading.gist, kernels)
    theirs, _ = reading.read(text(60, 6), 40, index=first - 1)
    reading.recalls = [False] * len(reading.recalls)
    ours = reading.ours(*reading.qkv.split([HEADS, KV_HEADS, KV_HEADS]))
    assert (theirs - ours).abs().max() < 1e-10


class Largest(TorchDispatchMode):
    """The most elements that one tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("recall", ["none", "all"])
def test_memory_is_linear(recall):
    """With a fixed number of top gists; T x T would be four times as much for twice the tokens."""
    largest = []
    for length in (1024, 2048):
        sequence = GistSequence(settings_of(GistConfig((8, length // 128), recall=recall, topk=1)), torch.device("cpu"))
        sight = sequence.append(sequence.read(text(length), None, None))
        noise = torch.randn(4, len(sight.recalls), 4)
        with Largest() as seen, torch.no_grad():
            GistPass([(sequence, sight)], None, keep=False).attend(1, noise[:2], noise[2:3], noise[3:], 0.5)
        largest.append(seen.elements)
    assert largest[1] <= 2.3 * largest[0] and largest[1] < 2048**2 / 8


def test_equal_scores_go_to_the_earlier_gist():
    scores = torch.tensor([[[[1.0, 2.0, 2.0, 2.0, 0.0]]]])
    candidates = torch.tensor([True, True, False, True, True])
    taken = take_best(scores, candidates, torch.tensor([1]), None)
    assert taken.flatten().tolist() == [False, True, False, False, False]
    assert take_best(scores, candidates, torch.tensor([9]), None).flatten().tolist() == candidates.tolist()


def test_word_starts_survive_packing():
    for size in (1, 8, 60, 1003):
        starts = np.random.default_rng(size).random(size) < 0.3
        assert list(unpack_word_starts(pack_word_starts(torch.from_numpy(starts))))[:size] == starts.astype(int).tolist()


def test_beams_go_on_independently():
    first = Reading(GistConfig((4, 2), recall="suffix", topk=1))
    first.read(text(30, 1), 20)
    cache = GistCache([first.sequence])
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert len({id(s) for s in cache.sequences}) == 3
    for sequence, last in zip(cache.sequences, (1, 7, 9)):
        branch = Reading(first.gist)
        branch.__dict__.update(sequence=sequence, **{k: list(getattr(first, k)) for k in ("ids", "level", "recalls")})
        branch.qkv = first.qkv
        branch.noise.manual_seed(last)
        for _ in range(9):
            theirs, ours = branch.read([last], 20)
            assert (theirs - ours).abs().max() < 1e-10


@pytest.fixture(scope="module")
def model(build, tmp_path_factory):
    gist = GistConfig((4, 2), recall="suffix")
    return load(write_export(tmp_path_factory.mktemp("gist") / "llama", make_model(LLAMA, build), gist))


def test_bad_input_is_named(model):
    from transformers import StaticCache

    ids = torch.tensor([text(20)])
    cache = model(ids).past_key_values
    static = StaticCache(config=model.config, max_cache_len=64)
    for kwargs, message in (
        (dict(inputs_embeds=torch.zeros(1, 3, 32)), "inputs_embeds: gists are placed by token ids"),
        (dict(input_ids=ids, output_attentions=True), "output_attentions: gist attention keeps no weights"),
        (dict(input_ids=ids, attention_mask=torch.ones(1, 1, 20, 20)), r"attention_mask: \(1, 1, 20, 20\)"),
        (dict(input_ids=ids, attention_mask=torch.zeros(1, 20)), "hides all of them"),
        (dict(input_ids=ids, gist_query_start=-1), r"gist_query_start: \[-1\] for 1 sequences"),
        (dict(input_ids=ids, gist_query_start=3.5), r"gist_query_start: \[3.5\] for 1 sequences; give one whole number"),
        (dict(input_ids=ids, gist_query_start="3"), r"gist_query_start: \['3'\] for 1 sequences; give one whole number"),
        (dict(input_ids=ids, gist_chunk_sizes=8), "gist_chunk_sizes: 8; expected a list of one size per level"),
        (dict(input_ids=ids, gist_chunk_sizes="8,4"), "gist_chunk_sizes: '8,4'; expected a list"),
        (dict(input_ids=ids, gist_query_start=5, past_key_values=cache), "gist_query_start: 5, but 20 tokens were read"),
        (dict(input_ids=ids + VOCAB), "outside the vocabulary of 128"),
        (dict(input_ids=ids, past_key_values=static), "past_key_values: a StaticCache"),
        (dict(input_ids=ids.repeat(2, 1), past_key_values=cache), "holds 1 sequences, input_ids 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**kwargs)
    with pytest.raises(ValueError, match="this class does not put gists in"):
        model.model(ids)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(3)


def test_settings_that_an_older_export_does_not_have_are_the_defaults():
    entry = config_entries("LlamaForCausalLM", GistConfig((4, 2)), GISTS[:2], GISTS, STARTS)["gist"]
    old = {name: value for name, value in entry.items() if name not in ("own_group", "recall_from", "unfold_all")}
    settings_from = lambda entry: GistSettings.of(type("Config", (), {"gist": entry}))
    assert len(old) == len(entry) - 3 and settings_from(old) == settings_from(entry)
    assert "word_aware" not in entry and settings_from(entry).word_aware, "what an older export does not say, no export says"
    exact = GistConfig((4, 2), word_aware=False)
    entry = config_entries("LlamaForCausalLM", exact, GISTS[:2], GISTS, None)["gist"]
    assert "word_starts" not in entry and not settings_from(entry).word_aware
    with pytest.raises(ValueError, match=r"config.gist: lacks \['word_starts'\]"):
        settings_from(entry | {"word_aware": True})


def test_unusable_settings_are_named():
    entry = config_entries("LlamaForCausalLM", GistConfig((4, 2)), GISTS[:2], GISTS, STARTS)["gist"]
    for changes, message in (
        ({"token_ids": [3]}, "1 token_ids for 2 chunk_sizes"),
        ({"recall": "some"}, "recall 'some' is not one of none, suffix, all"),
        ({"chunks": 4}, r"has unknown \['chunks'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            GistSettings.of(type("Config", (), {"gist": entry | changes}))
    with pytest.raises(ValueError, match="config.gist: None"):
        GistSettings.of(object())


def test_a_window_or_dropout_is_refused(model):
    from unfold.model.hf.modeling_gist import gist_attention_forward

    x = torch.zeros(1, 2, 3, 4)
    for kwargs, message in (({"sliding_window": 8}, "sliding_window: 8"), ({"dropout": 0.1}, "attention_dropout: 0.1")):
        with pytest.raises(ValueError, match=message):
            gist_attention_forward(None, x, x, x, None, gist_pass=object(), **kwargs)


def test_packed_documents_are_those_of_a_batch(model):
    """Positions that begin again, as data collators without padding write them: same logits, same loss, nothing across."""
    documents = [text(40, 1), text(3, 2), text(57, 3)]
    ids = torch.tensor([sum(documents, [])])
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    packed = model(ids, position_ids=positions, labels=ids)
    alone = [model(torch.tensor([d]), labels=torch.tensor([d])) for d in documents]
    assert packed.past_key_values is None
    assert torch.allclose(packed.logits[0], torch.cat([a.logits[0] for a in alone]), rtol=0, atol=1e-5)
    targets = [len(d) - 1 for d in documents]
    mean = sum(a.loss * n for a, n in zip(alone, targets)) / sum(targets)
    assert abs(packed.loss - mean) < 1e-5
    with pytest.raises(ValueError, match="rows hold several documents"):
        model(ids, position_ids=positions, gist_query_start=3)
    with pytest.raises(ValueError, match="position_ids: must count up from 0"):
        model(ids, position_ids=positions + 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_goes_on_as_its_texts_alone(model, side):
    """generate() looks at the last column, which on the right of a shorter text is padding."""
    texts, width = [text(21, 1), text(9, 2), text(30, 3)], 30
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}
    ids, mask = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.int64)
    for row, tokens in enumerate(texts):
        place = slice(len(tokens)) if side == "right" else slice(width - len(tokens), None)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    batch = model.generate(ids, attention_mask=mask, **how)
    alone = [model.generate(torch.tensor([tokens]), **how)[0, len(tokens) :].tolist() for tokens in texts]
    assert batch[:, width:].tolist() == alone and len({tuple(a) for a in alone}) == 3


def test_hidden_states_and_kept_logits_are_those_of_raw_tokens(model):
    ids = torch.tensor([text(20), text(20, 1)])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == LLAMA.layers + 1 and out.hidden_states[-1].shape == (2, 20, LLAMA.hidden_size)
        assert torch.equal(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
        assert torch.equal(model(ids, return_dict=False)[0], out.logits)
        embedded = model.get_input_embeddings()(ids)
    assert torch.equal(out.hidden_states[0], embedded)


def test_bf16_is_as_exact_as_the_kernels(model):
    """Scores and softmax are taken in fp32: the error in bf16 is that of its weights and activations."""
    ids, errors = torch.tensor([text(90)]), []
    with torch.no_grad():
        exact = model(ids, gist_query_start=80).logits
        for kernels in (find_kernels(), None):
            low = load(model.name_or_path, dtype=torch.bfloat16)
            low.gist_kernels = kernels
            errors.append((low(ids, gist_query_start=80).logits - exact).abs().mean())
    assert errors[1] <= 2 * errors[0]
