"""Text continuation under the compressed mask: the context is folded into gists as it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.gist import GistConfig, build_layout, interleave
from model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: 0 picks the likeliest token.
        top_p: sample from the smallest set of tokens whose probabilities reach it.
        seed: of the sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_tokens(
    model: Transformer,
    prompt: Sequence[int],
    gist: GistConfig | None,
    gist_ids: Sequence[int],
    word_starts: np.ndarray,
    stop_ids: Sequence[int],
    sampling: Sampling,
) -> Iterator[int]:
    """Continue a prompt, token by token; each step recomputes the whole sequence in O(T (window + T / ratio)).

    Args:
        model: in eval mode.
        prompt: raw token ids, at least one.
        gist: how to fold the context; None for a dense model.
        gist_ids: every gist id of the vocabulary; none of them is ever emitted.
        word_starts: [vocab] bool.
        stop_ids: a token that ends the continuation (it is not yielded).
        sampling: how tokens are chosen.
    """
    ids = list(prompt)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_new_tokens):
        logits = next_token_logits(model, ids, gist, gist_ids, word_starts, device)
        logits[list(gist_ids)] = -torch.inf
        token = choose(logits, sampling, generator)
        if token in stop_ids:
            return
        yield token
        ids.append(token)


def next_token_logits(model, ids: Sequence[int], gist: GistConfig | None, gist_ids, word_starts, device) -> Tensor:
    """[vocab] fp32 logits of the token after ``ids``."""
    config = gist or GistConfig((len(ids) + 1,))  # one chunk that never closes: no gists
    sample = interleave(np.asarray(ids), [len(ids)], word_starts, config, gist_ids[: config.levels])
    level, doc = torch.from_numpy(sample.level)[None], torch.from_numpy(sample.doc)[None]
    layout = build_layout(level, doc, config).to(device)
    logits = model.logits(torch.from_numpy(sample.ids)[None].to(device), layout)[0]
    last_raw = int((level[0] < 0).nonzero()[-1])
    return logits[last_raw].float().cpu()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token id from [vocab] logits."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    # Keep a token while what stands before it has not reached top_p: at least one stays.
    ordered = ordered.masked_fill(ordered.cumsum(0) - ordered >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(ordered, 1, generator=generator)])
