"""Rounds of decoding: every sequence reads the token chosen last, and the next one is chosen for each.

On a CPU, and where :func:`frames_of` says so, step by step (:class:`Rounds`). On a GPU (:class:`FrameRounds`) through steps at
fixed addresses, replayed from CUDA graphs, and one ahead: while the host looks at a round's tokens, the GPU already reads them.
What it read of a sequence that then ends is of no account: rows behind a cache's length hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unfold.kernels.select import SelectRule
from unfold.model.decode.frame import Frame
from unfold.model.decode.live import LiveSequence
from unfold.model.decode.replay import Replays
from unfold.model.decode.sampling import BLOCK, Draws, Sampling, choose
from unfold.model.decode.step import NewTokens
from unfold.model.gist import GistConfig
from unfold.model.gist.growing import Feed
from unfold.model.transformer import Transformer


class Decoder(Protocol):
    """What rounds need of :class:`unfold.model.decode.generation.Decoder`; see there."""

    model: Transformer
    gist: GistConfig | None
    rule: SelectRule | None
    first: int
    never: Tensor
    device: torch.device
    dtype: torch.dtype
    frames: Frames | None

    def step(self, sequences: Sequence[LiveSequence]) -> None: ...

    def feed_pending(self, sequence: LiveSequence) -> Feed: ...

    def certain(self, sequence: LiveSequence) -> bool: ...


class Rounds:
    """Rounds of some sequences, one step of the model after another.

    Args:
        decoder: whose sequences they are.
        sequences: to be continued.
        sampling: how tokens are chosen.
    """

    def __init__(self, decoder: Decoder, sequences: Sequence[LiveSequence], sampling: Sampling):
        self.decoder, self.all, self.sampling = decoder, sequences, sampling
        self.draws, self.number = Draws(sampling, len(sequences)), -1

    def tokens(self, running: Sequence[int], last: bool) -> list[int]:
        """Read what is pending of the sequences with these numbers, and choose the next token of each.

        last: no round follows.
        """
        self.number += 1
        self.decoder.step([self.all[n] for n in running if self.all[n].pending])
        return self._choose(running)

    def _choose(self, running: Sequence[int]) -> list[int]:
        """From the sequences' logits."""
        logits = torch.stack([self.all[n].logits for n in running])
        draw = self.draws.of(self.number)[list(running)].to(logits.device)
        return choose(logits, self.decoder.never, self.sampling, draw).tolist()

    def close(self) -> None:
        """No further round."""


class Frames:
    """The frames of a decoder, by their sizes, powers of two: made when they are first needed.

    capture: whether their steps are captured where that can be.
    """

    def __init__(self, decoder: Decoder, capture: bool = True):
        self.decoder, self.replays = decoder, Replays(decoder.device, capture)
        self.made: dict[tuple[int, int], Frame] = {}

    def frame(self, tokens: int, sequences: int, single: bool) -> Frame:
        """For so many tokens of so many sequences. single: none of them reads more than one."""
        size = lambda n: 1 << (n - 1).bit_length()
        sequences = size(sequences)
        sizes = sequences if single else max(size(tokens), 2 * sequences), sequences
        if sizes not in self.made:
            d = self.decoder
            levels = d.gist.levels if d.gist else 0
            self.made[sizes] = Frame(d.model, levels, d.rule, d.first, d.never, *sizes, self.replays)
        return self.made[sizes]


def frames_of(decoder: Decoder, capture: bool) -> Frames | None:
    """A decoder's frames; None where it reads step by step.

    That is without ``capture``, on a CPU, and where the kernels do not serve the model.
    """
    if not capture or decoder.device.type != "cuda":
        return None
    config = decoder.model.config
    from unfold.kernels.decode.triton import why_not_shape

    refused = why_not_shape(decoder.dtype, config.head_dim, config.heads // config.kv_heads, decoder.rule)
    return None if refused else Frames(decoder)


@dataclass(frozen=True)
class Flight:
    """A step that was launched.

    Attributes:
        numbers: of the sequences that read.
        logits: [S, vocab]; chosen: [S], the tokens, on the host when ``done``.
    """

    numbers: list[int]
    logits: Tensor
    chosen: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Until ``chosen`` is there, and all that was launched before."""
        if self.done is not None:
            self.done.synchronize()


class FrameRounds(Rounds):
    """The same through frames, a round ahead where the next step does not depend on which tokens were chosen.

    sampling None: sequences read what is pending, and no token is chosen (:meth:`read`).
    """

    def __init__(self, decoder: Decoder, sequences: Sequence[LiveSequence], sampling: Sampling | None):
        super().__init__(decoder, sequences, sampling or Sampling())
        self.choosing = sampling
        self.frame: Frame | None = None
        self.ahead: Flight | None = None  # of the round that comes next
        self.due: list[tuple[int, list[int]]] = []  # what its sequences are like before it, if nobody else continued them
        self.fills = self.block = -1

    def read(self) -> None:
        """Read what is pending of all sequences."""
        flight = self._launch([n for n, sequence in enumerate(self.all) if sequence.pending])
        for n in flight.numbers:
            self.all[n].logits = flight.logits[n]
        flight.wait()

    def tokens(self, running: Sequence[int], last: bool) -> list[int]:
        """As :meth:`Rounds.tokens`."""
        self.number += 1
        reading = [n for n in running if self.all[n].pending]
        flight, self.ahead = self.ahead, None
        if flight is not None and (flight.numbers != reading or self._standing(reading) != self.due):  # some have ended since
            flight.wait()
            flight = None
        if flight is not None:
            for n in reading:
                self._enter(n)
        elif reading:
            flight = self._launch(reading)
        if flight is None or reading != list(running):  # a prompt's logits are there without a step
            for n in reading:
                self.all[n].logits = flight.logits[n]
            return self._choose(running)
        goes_on = self.frame.left > 0 and self.frame.fills == self.fills  # another stream of the decoder may have filled it
        if not last and goes_on and all(self.decoder.certain(self.all[n]) for n in reading):
            self.ahead = self._run(reading, self.number + 1)
        flight.wait()
        chosen = flight.chosen.tolist()
        self.due = [(length, [chosen[n]]) for n, (length, _) in zip(reading, self._standing(reading))]
        for n in reading:
            self.all[n].logits = flight.logits[n]
        return [chosen[n] for n in reading]

    def close(self) -> None:
        """Nothing reads or writes the sequences any more when the caller has them."""
        if self.ahead is not None:
            self.ahead.wait()

    def _standing(self, numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Tokens that these sequences hold, and what is pending."""
        return [(len(self.all[n].ids), self.all[n].pending) for n in numbers]

    def _enter(self, number: int) -> None:
        """What the host keeps of a raw token that a step has read already."""
        sequence = self.all[number]
        feed = self.decoder.feed_pending(sequence)
        assert feed.level == [-1] and not feed.drop
        sequence.take(feed)
        sequence.cache.append_raw()

    def _launch(self, reading: list[int]) -> Flight:
        """A step of what is pending, its state filled by the host."""
        new = []
        for n in reading:
            sequence = self.all[n]
            feed = self.decoder.feed_pending(sequence)
            sequence.take(feed)
            sight = sequence.cache.outline.append(feed.level, feed.recalls)
            new.append((n, NewTokens(sequence.cache, sight), feed.ids))
        count = [len(ids) for _, _, ids in new]
        self.frame = self.decoder.frames.frame(sum(count), len(self.all), max(count) == 1)
        self.block = -1
        self.frame.fill(new, self.choosing, self.number)
        self.fills = self.frame.fills
        return self._run(reading, self.number)

    def _run(self, reading: list[int], number: int) -> Flight:
        """The step of a round. What it leaves is copied before the next one can be launched."""
        frame = self.frame
        if self.choosing is not None and self.choosing.temperature > 0 and self.block != number // BLOCK:
            self.block = number // BLOCK
            frame.draws[: len(self.all)].copy_(self.draws.block(self.block))
        frame.run()
        if not frame.logits.is_cuda:
            return Flight(reading, frame.logits.clone(), frame.chosen.clone(), None)
        chosen = torch.empty(frame.chosen.shape, dtype=torch.int64, pin_memory=True)
        chosen.copy_(frame.chosen, non_blocking=True)
        done = torch.cuda.Event()
        logits = frame.logits.clone()
        done.record(torch.cuda.current_stream(frame.device))  # the current device may be another
        return Flight(reading, logits, chosen, done)
