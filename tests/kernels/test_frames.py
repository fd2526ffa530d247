"""Steps at fixed addresses through the Triton kernels, on a GPU or in the interpreter: tokens and logits of the CPU's steps."""

import copy

import numpy as np
import pytest
import torch

from tests.kernels.interpreter import DEVICE, INTERPRETED, compute_like_a_gpu, needs_runs
from tests.model.decoding import text
from tests.model.test_replay import capturing
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode import frame, rounds
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.transformer import Transformer

VOCAB, WORDS = 60, 50
GISTS = {
    "dense": None,
    "forgetting": GistConfig((4, 2), recall="none"),
    "recall": GistConfig((4, 2), recall="suffix", topk=2),
    "chunks of one length": GistConfig((4, 2), recall="suffix", topk=2, word_aware=False),
    "recall, one level": GistConfig((4,), recall="suffix", budget_ratio=2, recall_from=2),
}


@pytest.fixture(autouse=True)
def short_and_faithful(monkeypatch):
    """States that hold for three tokens, so that they are filled anew under way."""
    monkeypatch.setattr(frame, "AHEAD", 3)
    if INTERPRETED:
        compute_like_a_gpu(monkeypatch)


def make_decoder(build, gist, device, grow=False, kinds=(), raw_cache="device"):
    """In fp32, of the smallest shape that the kernels serve."""
    kind = "gist" if gist else "dense"
    config = ModelConfig(
        VOCAB, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=64, ffn_size=48, init_std=0.2, attention=kind,
        layer_attention=kinds,
    )  # fmt: skip
    model = Transformer(config, build).float().eval().to(device)
    return Decoder(model, gist, range(WORDS, VOCAB), np.arange(VOCAB) % 2 == 0, grow, raw_cache=raw_cache)


def continued(decoder, tokens):
    """(number, token, logits) as they come, of two sequences of uneven lengths."""
    sequences = []
    for n, (context, question) in enumerate([(33, 5), (14, 1)]):
        sequences.append(decoder.start())
        decoder.read_context(sequences[n], text(context, n))
        decoder.read_suffix(sequences[n], text(question, n + 7))
    stream = decoder.stream(sequences, Sampling(tokens, temperature=1.0))
    return [(n, token, sequences[n].logits.cpu().clone()) for n, token in stream]


CASES = {
    "dense": {},
    "forgetting": {},
    "recall": {"grow": True},
    "recall, one level": {},
    "recall, raw rows on the host": {"raw_cache": "host"},
    "recall, a window": {"kinds": ("window:6", "gist")},
    "chunks of one length, a window": {"kinds": ("window:6", "gist"), "grow": True},
    "forgetting, a dense layer": {"kinds": ("dense", "gist"), "grow": True},
}


@needs_runs
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.long) if "of one length" in c else c for c in CASES])
def test_tokens_and_logits_of_the_cpu(build, case):
    gist = GISTS[case] if case in GISTS else GISTS[case.split(",")[0]]
    plain = make_decoder(build, gist, "cpu", **CASES[case])
    framed = copy.copy(plain) if DEVICE == "cpu" else make_decoder(build, gist, DEVICE, **CASES[case])
    framed.frames = rounds.Frames(framed)
    if DEVICE == "cpu":
        capturing(framed.frames.replays)  # fake graphs
    want, got = continued(plain, 7), continued(framed, 7)
    assert [x[:2] for x in got] == [x[:2] for x in want] and len(got) == 14
    for a, b in zip(got, want):
        torch.testing.assert_close(a[2], b[2], atol=1e-5, rtol=0)
    replays = framed.frames.replays
    assert replays.capture and replays.graphs, "every graph, at its first replay, did what the step does"
