"""Generation where layers are of several kinds: cached, batched, in turns, of parts; against recomputation in fp64."""

import dataclasses

import pytest
import torch

from tests.model import bundles
from tests.model.decoding import GISTS, STARTS, VOCAB, continue_checked, make_decoder, recomputed, text
from tests.model.layer_kinds import sees
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode import generation
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.kinds import kind_of
from unfold.model.transformer import Transformer

SUFFIX = GistConfig((4, 2), recall="suffix", topk=2)
# Folding, and kinds of the layers.
MODELS = {
    "dense beside gists": (SUFFIX, ("gist", "dense", "gist")),
    "windows beside gists": (SUFFIX, ("window:6", "gist", "dense")),
    "a window within a chunk": (GistConfig((8,), sink=0), ("gist", "window:3", "gist")),
    "one gist layer": (dataclasses.replace(SUFFIX, recall="all", sink=5), ("window:9", "dense", "gist")),
    "windows without gists": (None, ("window:6", "dense")),
}


def make(build, name, grow=False) -> Decoder:
    gist, kinds = MODELS[name]
    return make_decoder(build, gist, grow, layer_attention=kinds)


def read(decoder, context, question, seed=0):
    sequence = decoder.start()
    decoder.read_context(sequence, text(context, seed + 1))
    decoder.read_suffix(sequence, text(question, seed + 2))
    return sequence


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_recomputation(build, name, grow):
    decoder = make(build, name, grow)
    continue_checked(decoder, [read(decoder, 70, 9), read(decoder, 3, 1)], 20, temperature=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_in_runs_of_any_length(build, name, monkeypatch):
    for run in (1, 3, 1024):
        monkeypatch.setattr(generation, "PREFILL", run)
        decoder = make(build, name)
        sequence = read(decoder, 41, 12)
        assert (sequence.logits - recomputed(decoder, sequence)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["windows beside gists", "a window within a chunk"])
def test_several_turns(build, name):
    """What was said is folded later, and read again without what windows have forgotten."""
    decoder = make(build, name)
    sequence = read(decoder, 40, 26)
    continue_checked(decoder, [sequence], 9, temperature=1.0)
    decoder.read_context(sequence, text(33, 8))
    assert (sequence.logits - recomputed(decoder, sequence)).abs().max() < 1e-10
    decoder.read_suffix(sequence, text(4, 9))
    continue_checked(decoder, [sequence], 9, temperature=1.0)


def test_a_layer_keeps_what_its_kind_reads(build):
    """Rows of gists in gist layers alone; of raw tokens in a window the sinks and the last ones."""
    decoder = make(build, "windows beside gists", grow=True)
    sequence = read(decoder, 300, 5)
    for _ in decoder.stream([sequence], Sampling(100, 1.0)):
        pass
    counts = sequence.cache.outline.counts
    window, gist, dense = ([rows.buffer.length for rows in layer] for layer in sequence.cache.layers)
    assert gist == counts and dense[-1] == counts[-1] > 400
    assert window[-1] < 60 and max(window[0], dense[0], window[1], dense[1]) <= 1


def test_a_host_keeps_raw_tokens_of_gist_layers(build):
    gist, kinds = MODELS["windows beside gists"]
    model = make(build, "windows beside gists").model
    decoder = Decoder(model, gist, GISTS, STARTS, raw_cache="host")
    sequence = read(decoder, 60, 7)
    assert [layer[-1].on_host for layer in sequence.cache.layers] == [kind == "gist" for kind in kinds]
    continue_checked(decoder, [sequence], 5, temperature=1.0)


@pytest.mark.parametrize("links", [0, 2])
@pytest.mark.parametrize("kinds", [("gist", "dense", "window:7"), ("window:3", "gist")], ids=str)
def test_parts_are_joined_in_any_order(build, kinds, links):
    """Documents that were read alone, against all of a bundle in one pass by masks."""
    gist = GistConfig((4, 2), recall="suffix", topk=10**6)
    shape = {"hidden_size": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_size": 48, "init_std": 0.2}
    model = Transformer(ModelConfig(VOCAB, **shape, layer_attention=kinds), build).double().eval()
    decoder = Decoder(model, gist, GISTS, STARTS, link_ids=range(VOCAB - 2, VOCAB - 2 + links))
    texts = [text(length, 100 + length) for length in (30, 1, 17, 2)]
    parts = [decoder.read_part(tokens) for tokens in texts]
    for prefix, order in (([], (0, 1, 2, 3)), (text(5, 7), (2, 0, 3, 1))):
        sequence = decoder.join([parts[i] for i in order], prefix)
        decoder.read_suffix(sequence, text(12, 8))
        rows = bundles.bundle(prefix, [texts[i] for i in order], decoder.link_ids, text(12, 8), STARTS, gist, GISTS)
        got = [sequence.logits]
        decoder.read_suffix(sequence, [3])
        longer = bundles.bundle(prefix, [texts[i] for i in order], decoder.link_ids, [*text(12, 8), 3], STARTS, gist, GISTS)
        got.append(sequence.logits)
        for logits, whole in zip(got, (rows, longer)):
            assert (logits - by_masks(decoder, whole)[-1]).abs().max() < 1e-10


def by_masks(decoder: Decoder, rows: bundles.Rows) -> torch.Tensor:
    """[T, vocab] logits of a bundle in which everything is unfolded."""
    forget = bundles.visible(rows, decoder.gist)
    part = [n + 1 for n in rows.part]
    masks = {}
    for index, kind in enumerate(decoder.model.config.layer_kinds):
        if kind == "gist":
            masks[index] = bundles.unfolded(rows, forget) if index else forget
        else:
            masks[index] = sees(rows.level, [0] * len(part), kind, decoder.gist.sink, rows.kind, part)

    def attend(index, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) / q.shape[3] ** 0.5
        hidden = ~torch.from_numpy(masks[index])
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    with torch.no_grad():
        position = torch.tensor([rows.position])
        return decoder.model.head_logits(decoder.model.run_layers(torch.tensor([rows.ids]), position, attend))[:, 0]


def test_one_pattern_is_repeated():
    assert [kind_of(("gist", "gist", "dense"), i) for i in range(5)] == ["gist", "gist", "dense", "gist", "gist"]
    assert ModelConfig(layers=5, layer_attention=("dense", "gist")).layer_kinds == ["dense", "gist", "dense", "gist", "dense"]


@pytest.mark.parametrize("size", ["", "0", "-1", " 5", "5.0", "١", str(1 << 31), "9" * 5000])
def test_no_window_that_places_cannot_hold(size):
    with pytest.raises(ValueError, match="layer_attention: 'window:.*' is not one of gist, dense, window:N"):
        ModelConfig(layer_attention=("gist", f"window:{size}"))
    assert ModelConfig(layer_attention=("gist", f"window:{(1 << 31) - 1}")).layer_attention
