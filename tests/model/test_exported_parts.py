"""Documents read once by an exported model and joined: logits, answers and refusals are those of the project's own decoder."""

import copy
import dataclasses

import pytest
import torch

from tests.model import gist_exports
from tests.model.gist_exports import GISTS, LLAMA, STARTS, load, make_model, text, write_export
from unfold.model.config import GistConfig, RopeScaling
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.gist.parts import Part

YARN = RopeScaling("yarn", factor=4.0, original_max_position=64, attention_factor=1.3)
SHAPES = {
    "llama": {},
    "llama3": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position=64)},
    "linear": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "yarn": {"rope_scaling": YARN},
    "qwen3, normed heads": {"qk_norm": True, "family": "qwen3"},
    "smollm3, layers without positions": {"nope_layers": (1,), "family": "smollm3"},
}
GIST = GistConfig((4, 2), recall="suffix", topk=2, links=2)


def both(build, directory, shape, gist=GIST):
    """Our decoder and the exported model."""
    model = make_model(dataclasses.replace(LLAMA, **SHAPES[shape]), build)
    decoder = Decoder(model, gist, GISTS, STARTS, link_ids=GISTS[gist.levels :][: gist.links])
    return decoder, load(write_export(directory / "export", model, gist))


@pytest.mark.parametrize("shape", SHAPES)
def test_joined_parts_give_our_logits(build, tmp_path, shape):
    decoder, model = both(build, tmp_path, shape)
    documents = [text(length, length) for length in (30, 1, 17, 2)]
    ours, theirs = ([read(tokens) for tokens in documents] for read in (decoder.read_part, model.read_part))
    for order, prefix in (((0, 1, 2, 3), text(5, 7)), ((3, 2, 0), []), ((), text(4, 7))):
        sequence = decoder.join([ours[i] for i in order], prefix)
        cache = model.join_parts([theirs[i] for i in order], prefix)
        assert cache.get_seq_length() == cache.input_ids.shape[1] == sequence.cache.outline.counts[-1]
        assert cache.input_ids[0].tolist() == [i for i, level in zip(sequence.ids, sequence.level) if level < 0]
        question = text(9, 8)
        with torch.no_grad():
            logits = model(torch.tensor([question]), past_key_values=cache).logits[0]
        for place, token in enumerate(question):
            decoder.read_suffix(sequence, [token])
            assert (logits[place] - sequence.logits).abs().max() < 1e-4 * sequence.logits.abs().max()


def test_generate_goes_on_from_joined_parts(build, tmp_path):
    decoder, model = both(build, tmp_path, "llama")
    documents, question = [text(length, length) for length in (30, 17)], text(6, 8)
    sequence = decoder.join([decoder.read_part(tokens) for tokens in documents])
    decoder.read_suffix(sequence, question)
    expected = [token for _, token in decoder.stream([sequence], Sampling(8))]
    cache = model.join_parts([model.read_part(torch.tensor([tokens])) for tokens in documents])
    again = copy.deepcopy(cache)
    for one in (cache, again):
        ids = torch.cat([one.input_ids, torch.tensor([question])], 1)
        out = model.generate(ids, past_key_values=one, max_new_tokens=8, do_sample=False, pad_token_id=gist_exports.PAD)
        assert out[0, ids.shape[1] :].tolist() == expected
    with pytest.raises(ValueError, match="gist_grow: True, but what follows joined parts gets no gists"):
        model(torch.tensor([question]), past_key_values=cache, gist_grow=True)
    with pytest.raises(ValueError, match="a cache of joined parts cannot be emptied"):
        cache.reset()


def test_saved_loaded_and_refused(build, tmp_path):
    _, model = both(build, tmp_path, "llama")
    part, path = model.read_part(text(30)), tmp_path / "a.safetensors"
    part.save(path)
    again = Part.load(path, model.gist_identity())
    assert again.identity == part.identity and again.ids == part.ids and again.shape.counts == part.shape.counts
    assert all(torch.equal(a, b) for a, b in zip(again.rows, part.rows))
    with torch.no_grad():
        logits = [model(torch.tensor([text(5)]), past_key_values=model.join_parts([p])).logits for p in (part, again)]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="^input_ids: a part has no token; leave it out$"):
        model.read_part([])
    model.config.max_position_embeddings = 50
    with pytest.raises(ValueError, match=r"^parts: 2 of them take 64 positions .* meant for 50 \(max_position_embeddings\)"):
        model.join_parts([part, part])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    for call in (lambda: model.join_parts([part]), lambda: Part.load(path, model.gist_identity())):
        with pytest.raises(ValueError, match="^part .*: was read by another model "):
            call()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="^part .*: cannot be read"):
        Part.load(path, model.gist_identity())
