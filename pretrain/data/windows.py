"""The samples of one source of documents, as windows that are cut from a stream of them.

The order is a pure function of (key, number): an epoch lays the documents in an order drawn from (seed, epoch), cuts that
stream into windows of R raw tokens and draws the order of the windows.

Where stages of a run have samples of several lengths, a source's samples are legs, each of one length. A leg reads one unbroken
part of the stream, beginning where the leg before it ended: it has as many windows as it is planned to give, in an order drawn
among them. So no token is read twice and none is left out at a border; less than a window may be left at the end of an epoch, as
always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unfold.data_prep.format.lazy import LazyShard
from unfold.pretrain.config.numbers import whole_weights
from unfold.pretrain.errors import UserError

LengthWeights = Sequence[tuple[int, float]]
GROUPS = 1 << 20  # documents are shuffled in at most so many runs, so that entering an epoch takes milliseconds


@dataclass(frozen=True)
class Segment:
    """A piece of one document within a sample: (document number over all shards, first token, number of tokens)."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Leg:
    """Neighbouring samples of a source that have one length.

    Attributes:
        begin: the source's own number of its first one.
        raw_tokens: of each.
        planned: how many it gives, as far as the run's settings tell; None: they go on without end.
    """

    begin: int
    raw_tokens: int
    planned: int | None = None


class Windows:
    """What the kinds of windows share: what an epoch holds, and its draws.

    An epoch holds entries: every document once or, where lengths have weights, as often as its own says.

    Attributes:
        tokens: of an epoch.
        entries: of an epoch.
    """

    def __init__(
        self,
        shards: list[LazyShard],
        first_document: int,
        key: list[int],
        setting: str,
        patterns: str,
        length_weights: LengthWeights = (),
    ):
        """first_document: number of its first document over all shards. key: two integers that choose its order.
        setting, patterns: that named the shards, for messages. length_weights: see :func:`repeated`."""
        self._first, self._key, self._setting, self._patterns = first_document, key, setting, patterns
        self._lengths = np.concatenate([shard.lengths for shard in shards])
        self._documents = repeated(self._lengths, length_weights) if length_weights else None
        if self._documents is not None:
            self._lengths = self._lengths[self._documents]
        self.tokens, self.entries = int(self._lengths.sum(dtype=np.int64)), len(self._lengths)
        self._epoch = -1
        self._open(shards)

    def _open(self, shards: list[LazyShard]) -> None:
        """What a kind of windows needs to know of them."""
        raise NotImplementedError

    def _document(self, entry: int) -> int:
        """The number of an entry's document over all shards."""
        return self._first + (entry if self._documents is None else int(self._documents[entry]))

    def _draw(self, epoch: int) -> np.random.Generator:
        seed, source = self._key
        return np.random.Generator(np.random.Philox(key=[seed, epoch + (source << 40)]))


class CutWindows(Windows):
    """Exactly R raw tokens each; a border cuts a document."""

    def _open(self, shards: list[LazyShard]) -> None:
        self._run = -(-len(self._lengths) // GROUPS)  # neighbouring entries that stay together: 1 below GROUPS entries
        self._run_starts = np.arange(0, len(self._lengths), self._run)
        self._run_tokens = np.add.reduceat(self._lengths, self._run_starts, dtype=np.int64)

    def check(self, raw_tokens: int) -> None:
        """Raise UserError where an epoch has no sample of this length."""
        if self.tokens < raw_tokens:
            raise UserError(
                f"{self._setting}: {self._patterns} hold {self.tokens} tokens, less than one sample of data.raw_tokens = "
                f"{raw_tokens}"
            )

    def per_epoch(self, raw_tokens: int) -> int:
        """Samples of an epoch."""
        return self.tokens // raw_tokens

    def most(self, legs: Sequence[Leg]) -> tuple[int, int]:
        """Contexts or parts that a sample of the last leg closes at most, and parts of linked contexts in it."""
        return 0, 0

    def shares(self, raw_tokens: int) -> tuple[float, float]:
        """Of the samples of this length in the first epoch, the share that is padding; of its entries, the share that is cut."""
        order = self._draw(0).permutation(len(self._run_tokens))
        begins = np.empty(len(order), np.int64)
        begins[order] = np.cumsum(self._run_tokens[order]) - self._run_tokens[order]  # of a run in the epoch's stream
        within = np.cumsum(self._lengths, dtype=np.int64) - self._lengths
        runs = np.arange(len(within)) // self._run
        begin = begins[runs] + within - within[self._run_starts][runs]
        return 0.0, float((begin // raw_tokens != (begin + self._lengths - 1) // raw_tokens).mean())

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        draw = self._draw(epoch)
        self._order = draw.permutation(len(self._run_tokens))
        self._ends = np.cumsum(self._run_tokens[self._order])
        self._rounds = [int(x) for x in draw.integers(1, 1 << 62, 4)]
        self._epoch = epoch

    def _reached(self, legs: Sequence[Leg]) -> tuple[int, int]:
        """(epoch, token in its stream) where the last leg begins."""
        epoch = offset = 0
        for leg, following in zip(legs, legs[1:]):
            given, size = following.begin - leg.begin, leg.raw_tokens
            if leg.planned is not None:
                given = max(given, leg.planned)  # fewer were given: the leg's other windows lie between those that were
            left = (self.tokens - offset) // size
            if given <= left:
                offset += given * size
            else:
                more, rest = divmod(given - left, self.tokens // size)
                epoch, offset = epoch + 1 + more, rest * size
        return epoch, offset

    def _place(self, number: int, legs: Sequence[Leg]) -> tuple[int, int]:
        """(epoch, first token in its stream) of a sample of the last leg; enters the epoch."""
        leg, index = legs[-1], number - legs[-1].begin
        epoch, offset = self._reached(legs)
        first, here = 0, (self.tokens - offset) // leg.raw_tokens  # windows of the leg before this epoch, and within it
        if index >= here:
            whole = self.tokens // leg.raw_tokens
            more = (index - here) // whole
            epoch, offset, first, here = epoch + 1 + more, 0, here + more * whole, whole
        self._enter_epoch(epoch)
        place = index - first
        if leg.planned is None or index < leg.planned:
            drawn = here if leg.planned is None else min(here, leg.planned - first)
            place = shuffled(place, drawn, self._rounds)
        return epoch, offset + place * leg.raw_tokens

    def segments(self, number: int, legs: Sequence[Leg]) -> list[Segment]:
        """The pieces of this source's sample ``number``, which is of the last of the legs."""
        _, at = self._place(number, legs)
        stop = at + legs[-1].raw_tokens
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces: list[Segment] = []
        while at < stop:
            run = int(self._order[place])
            end = int(self._ends[place])
            position = end - int(self._run_tokens[run])  # of the document, in the epoch's stream
            first = run * self._run
            for entry in range(first, min(first + self._run, len(self._lengths))):
                following = position + int(self._lengths[entry])
                if following > at and at < stop:
                    length = min(stop, following) - at
                    pieces.append(Segment(self._document(entry), at - position, length))
                    at += length
                position = following
            place += 1
        return pieces


def repeated(lengths: np.ndarray, weights: LengthWeights) -> np.ndarray:
    """int64 [entries], the documents of an epoch: each as often as the weight of its length says, weights being whole numbers.

    Equal ones are far from one another, so that an order that keeps neighbours together does not bring them into one sample.

    Args:
        lengths: int [documents].
        weights: (tokens, weight): the weight of documents from so many tokens on, by rising tokens; shorter ones have 1.
    """
    times = np.array(whole_weights(weights))[np.searchsorted([edge for edge, _ in weights], lengths, side="right")]
    return np.concatenate([np.flatnonzero(times > turn) for turn in range(times.max())])


def shuffled(index: int, size: int, rounds: Sequence[int]) -> int:
    """The place of ``index`` in a permutation of range(size), which is nowhere written down.

    A Feistel network over the next power of 4, walked until it falls into the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in rounds:
            mixed = ((right + key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        index = left << half | right
        if index < size:
            return index


def all_shuffled(size: int, rounds: Sequence[int]) -> np.ndarray:
    """int64 [size], :func:`shuffled` of every index."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found, walking = np.arange(size, dtype=np.uint64), np.arange(size)
    while len(walking):
        left, right = found[walking] >> half, found[walking] & mask
        for key in rounds:
            mixed = (right + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        found[walking] = left << half | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)
