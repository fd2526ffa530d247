"""Exports whose layers are of several kinds: logits, answers, gradients and joined parts are ours."""

import dataclasses

import pytest
import torch

from tests.model import gist_exports
from tests.model.gist_exports import GISTS, LLAMA, STARTS, load, make_model, recomputed, text, write_export
from unfold.model.config import GistConfig
from unfold.model.decode.generation import Decoder, Sampling

KINDS = {"every kind": ("gist", "dense", "window:6"), "windows": ("window:9", "gist"), "one dense": ("dense", "gist", "gist")}
GIST = GistConfig((4, 2), recall="suffix", topk=2, links=2)


@pytest.fixture(params=KINDS)
def pair(request, build, tmp_path):
    """Our decoder and the exported model."""
    model = make_model(dataclasses.replace(LLAMA, layer_attention=KINDS[request.param]), build)
    decoder = Decoder(model, GIST, GISTS, STARTS, link_ids=GISTS[GIST.levels :][: GIST.links])
    return decoder, load(write_export(tmp_path / "export", model, GIST))


@pytest.mark.parametrize("by", ["kernels", "torch"])
def test_logits_and_answers_are_ours(pair, by):
    decoder, model = pair
    if by == "torch":
        model.gist_kernels = None
    prompt = text(70, 3)
    sequence = gist_exports.read(decoder, prompt, 50)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), gist_query_start=50).logits[0]
    assert (logits - recomputed(decoder, sequence)).abs().max() < 1e-4 * logits.abs().max()
    expected = [token for _, token in decoder.stream([sequence], Sampling(12))]
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": gist_exports.PAD}
    out = model.generate(torch.tensor([prompt]), gist_query_start=50, **how)
    assert out[0, len(prompt) :].tolist() == expected


def test_joined_parts_give_our_logits(pair):
    decoder, model = pair
    documents, question = [text(length, length) for length in (30, 1, 17)], text(9, 8)
    ours, theirs = ([read(tokens) for tokens in documents] for read in (decoder.read_part, model.read_part))
    sequence, cache = decoder.join(ours, text(5, 7)), model.join_parts(theirs, text(5, 7))
    with torch.no_grad():
        logits = model(torch.tensor([question]), past_key_values=cache).logits[0]
    for place, token in enumerate(question):
        decoder.read_suffix(sequence, [token])
        assert (logits[place] - sequence.logits).abs().max() < 1e-4 * sequence.logits.abs().max()


def test_a_wrong_kind_is_named(pair):
    _, model = pair
    model.config.gist["layer_attention"] = ["gist", "windows"]
    with pytest.raises(ValueError, match="config.gist: layer_attention 'windows' is not one of gist, dense, window:N"):
        model(torch.tensor([text(5)]))
