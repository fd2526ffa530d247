"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # numbers drawn at a time


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: 0 picks the likeliest token.
        top_p: sample from the smallest set of tokens whose probabilities reach it.
        seed: of the sampling; the n-th sequence of a batch draws as one alone with ``seed + n``.

    Raises:
        ValueError: a number is outside its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is below 0")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is not a number from 0 on; 0 picks the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]; 1 samples from all tokens")


class Draws:
    """Numbers of [0, 1), one for every sequence and round; drawn on the CPU, so that they are the same on every device."""

    def __init__(self, sampling: Sampling, sequences: int):
        self.generators = [torch.Generator().manual_seed(sampling.seed + n) for n in range(sequences)]
        self.blocks: list[Tensor] = []

    def block(self, number: int) -> Tensor:
        """Those of rounds ``number * BLOCK`` and following, fp64 [sequences, BLOCK]."""
        while len(self.blocks) <= number:
            self.blocks.append(torch.stack([torch.rand(BLOCK, generator=g, dtype=torch.float64) for g in self.generators]))
        return self.blocks[number]

    def of(self, round_number: int) -> Tensor:
        """fp64 [sequences]"""
        return self.block(round_number // BLOCK)[:, round_number % BLOCK]


def choose(logits: Tensor, never: Tensor, sampling: Sampling, draw: Tensor) -> Tensor:
    """The next token of every sequence: nothing is read by the host.

    Args:
        logits: [N, vocab].
        never: ids that are not chosen, [n] int64.
        sampling: temperature and top_p.
        draw: fp64 [N], what :class:`Draws` made; ignored where the likeliest token is picked.

    Returns:
        [N] int64.
    """
    logits = logits.float().index_fill(1, never, -torch.inf)
    if sampling.temperature <= 0:
        return logits.argmax(1)
    share, order = (logits / sampling.temperature).softmax(1), None
    if sampling.top_p < 1:
        share, order = share.sort(dim=1, descending=True, stable=True)
        # Keep a token while what stands before it has not reached top_p: at least one stays.
        share = share.masked_fill(share.cumsum(1) - share >= sampling.top_p, 0.0)
    reached = share.double().cumsum(1)
    whole = reached[:, -1:].contiguous()
    # The first token with which the sum passes the number drawn; rounding up to the whole sum leads behind no token that counts.
    place = torch.searchsorted(reached, draw[:, None] * whole, right=True).minimum(torch.searchsorted(reached, whole))
    place = place.clamp(max=share.shape[1] - 1)  # where nothing is a number
    return (place if order is None else order.gather(1, place))[:, 0]
