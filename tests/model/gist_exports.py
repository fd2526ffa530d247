"""Exported directories of small random models with gists, and what our own code computes for them."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.generation import Decoder, LiveSequence, Sampling
from unfold.model.gist import Recall, build_layout
from unfold.model.hf.keys import hf_config
from unfold.model.hf.names import to_hugging_face
from unfold.model.hf.remote import config_entries, remote_code_files
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer

VOCAB, WORDS = 128, 124  # characters, then gists; no padding rows, whose logits are a part of training's loss
GISTS = range(WORDS, VOCAB)
PAD = VOCAB - 1  # no word: generate() would take it for padding
# Some word in two starts, and some run on for long.
STARTS = np.random.default_rng(5).random(VOCAB) < 0.4
LLAMA = ModelConfig(VOCAB, hidden_size=32, layers=3, heads=4, kv_heads=2, ffn_size=48)


def text(length: int, seed: int = 0) -> list[int]:
    """Raw token ids."""
    return np.random.default_rng(seed).integers(0, WORDS, length).tolist()


def make_model(config: ModelConfig, build: BuildContext) -> Transformer:
    """A model whose attention is far from uniform, so that what is seen shows in the logits."""
    model = Transformer(config, build).eval()
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    return model


def write_export(directory: Path, model: Transformer, gist: GistConfig) -> Path:
    """What an export consists of, with a tokenizer of single characters."""
    directory.mkdir(parents=True)
    keys = hf_config(model.config, "float32", None, None, None)
    links = GISTS[gist.levels :][: gist.links]
    own = GISTS[: gist.levels], GISTS, STARTS, links, model.config.layer_attention
    keys |= config_entries(keys["architectures"][0], gist, *own)
    (directory / "config.json").write_text(json.dumps(keys, indent=2))
    generation = {"pad_token_id": PAD, "suppress_tokens": list(GISTS)}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    state = to_hugging_face({n: p.detach() for n, p in model.named_parameters()}, model.config)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in remote_code_files().items():
        (directory / name).write_text(content)
    pieces = [*string.ascii_letters, *" .,\n", *map(chr, range(192, 260)), *(f"<gist{level}>" for level in range(VOCAB - WORDS))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": f"<gist{PAD - WORDS}>", "model_max_length": 10**9}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def load(directory: Path, **kwargs):
    """The directory through transformers, with gists."""
    from transformers import AutoModelForCausalLM

    how = {"trust_remote_code": True, "attn_implementation": "gist", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(directory, **{**how, **kwargs}).eval()


def decoder(model: Transformer, gist: GistConfig, grow: bool) -> Decoder:
    """Ours."""
    return Decoder(model, gist, GISTS, STARTS, grow)


def read(decoder: Decoder, tokens: list[int], context: int | None = None) -> LiveSequence:
    """A sequence that begins with tokens, the first ``context`` of them closed; a plain prompt without."""
    sequence = decoder.start()
    if context is None:
        decoder.read_context(sequence, tokens, close=False)
    else:
        decoder.read_context(sequence, tokens[:context])
        decoder.read_suffix(sequence, tokens[context:])
    return sequence


def recomputed(decoder: Decoder, sequence: LiveSequence) -> torch.Tensor:
    """[raw tokens, vocab] logits of a sequence from scratch, by what training computes with."""
    level = torch.tensor(sequence.level)[None]
    layout = build_layout(level, torch.zeros_like(level), decoder.gist)
    recall = Recall.of(layout, decoder.gist, torch.tensor(sequence.recalls)[None])
    return decoder.model.logits(torch.tensor(sequence.ids)[None], layout, recall)[0][level[0] < 0]


def greedy(decoder: Decoder, sequence: LiveSequence, tokens: int = 16) -> list[int]:
    """The likeliest continuation."""
    return [token for _, token in decoder.stream([sequence], Sampling(tokens))]
