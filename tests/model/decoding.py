"""Small models in fp64, sequences, and what cached decoding is held against: the whole sequence computed again."""

from __future__ import annotations

import numpy as np
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.generation import Decoder, LiveSequence, Sampling
from unfold.model.gist import Recall, build_layout
from unfold.model.transformer import Transformer

VOCAB, WORDS = 60, 50  # ids from WORDS on are gists
GISTS = range(WORDS, VOCAB)
# About every second piece starts a word; some run on for long.
STARTS = np.arange(VOCAB) % 2 == 0


def make_model(build, kind="gist", layers=3, seed_std=0.2, layer_attention=()) -> Transformer:
    kinds = {"attention": kind, "layer_attention": layer_attention}
    config = ModelConfig(VOCAB, hidden_size=32, layers=layers, heads=4, kv_heads=2, ffn_size=48, init_std=seed_std, **kinds)
    return Transformer(config, build).double().eval()


def make_decoder(build, gist: GistConfig | None, grow=False, starts=STARTS, **kwargs) -> Decoder:
    return Decoder(make_model(build, "gist" if gist else "dense", **kwargs), gist, GISTS, starts, grow)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, WORDS, length).tolist()


def recomputed(decoder: Decoder, sequence: LiveSequence) -> torch.Tensor:
    """[vocab] logits after the last raw token, from scratch: no cache, the kernels' reference of whole samples."""
    level = torch.tensor(sequence.level)[None]
    layout = build_layout(level, torch.zeros_like(level), decoder.gist)
    recall = decoder.gist and Recall.of(layout, decoder.gist, torch.tensor(sequence.recalls)[None])
    logits = decoder.model.logits(torch.tensor(sequence.ids)[None], layout, recall)[0]
    return logits[int((level[0] < 0).nonzero()[-1])]


def continue_checked(decoder: Decoder, sequences: list[LiveSequence], tokens: int, **sampling) -> list[list[int]]:
    """Continue, comparing the logits of every step with recomputation."""
    out = [[] for _ in sequences]
    for number, token in decoder.stream(sequences, Sampling(tokens, **sampling)):
        error = (sequences[number].logits - recomputed(decoder, sequences[number])).abs().max()
        assert error < 1e-10, f"sequence {number}, token {len(out[number])}: {error:.1e}"
        assert token < WORDS
        out[number].append(token)
    return out
