"""The samples of one source of documents: windows cut from a stream of them, or whole documents packed together.

The order is a pure function of (key, number): an epoch lays the documents in an order drawn from (seed, epoch), cuts that
stream into windows of R raw tokens and draws the order of the windows. Supervised documents must not be cut, so they are
packed into windows once, in an order drawn from the seed, and an epoch draws the order of the windows only: every epoch has
the same number of them. Documents of one window never see each other, so which ones share it decides nothing but the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from unfold.data_prep.format.lazy import LazyShard
from unfold.pretrain.errors import UserError

GROUPS = 1 << 20  # documents are shuffled in at most so many runs, so that entering an epoch takes milliseconds
OPEN_WINDOWS = 128  # that packing keeps open at a time
PACKING = 1 << 39  # the "epoch" whose draw orders documents for packing


@dataclass(frozen=True)
class Segment:
    """A piece of one document within a sample: (document number over all shards, first token, number of tokens)."""

    document: int
    offset: int
    length: int


class _Windows:
    """What the two kinds share: the shards' documents, and the draws of an epoch."""

    def __init__(self, shards: list[LazyShard], first_document: int, raw_tokens: int, key: list[int]):
        """first_document: number of its first document over all shards. key: two integers that choose its order."""
        self._first, self._raw_tokens, self._key = first_document, raw_tokens, key
        self._lengths = np.concatenate([shard.lengths for shard in shards])
        self.tokens = int(self._lengths.sum(dtype=np.int64))
        hashes = "".join(shard.sha256 for shard in shards)
        self.fingerprint = shards[0].sha256 if len(shards) == 1 else hashlib.sha256(hashes.encode()).hexdigest()
        self._epoch = -1

    def _draw(self, epoch: int) -> np.random.Generator:
        seed, source = self._key
        return np.random.Generator(np.random.Philox(key=[seed, epoch + (source << 40)]))


class CutWindows(_Windows):
    """Exactly R raw tokens each; a border cuts a document."""

    closed = parts = 0  # contexts or parts that a window closes at most, and parts of linked contexts

    def __init__(self, shards: list[LazyShard], first_document: int, raw_tokens: int, key: list[int], name: str):
        """name: of the source, for messages."""
        super().__init__(shards, first_document, raw_tokens, key)
        self._run = -(-len(self._lengths) // GROUPS)  # neighbouring documents that stay together: 1 below GROUPS documents
        self._run_starts = np.arange(0, len(self._lengths), self._run)
        self._run_tokens = np.add.reduceat(self._lengths, self._run_starts, dtype=np.int64)
        self.samples_per_epoch = self.tokens // raw_tokens
        if not self.samples_per_epoch:
            raise UserError(
                f"{name} hold {self.tokens} tokens, less than one sample of data.raw_tokens = {raw_tokens}"
            )

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        draw = self._draw(epoch)
        self._order = draw.permutation(len(self._run_tokens))
        self._ends = np.cumsum(self._run_tokens[self._order])
        self._rounds = [int(x) for x in draw.integers(1, 1 << 62, 4)]
        self._epoch = epoch

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of this source's sample number ``sample``."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        self._enter_epoch(epoch)
        at = shuffled(index, self.samples_per_epoch, self._rounds) * self._raw_tokens
        stop = at + self._raw_tokens
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces: list[Segment] = []
        while at < stop:
            run = int(self._order[place])
            end = int(self._ends[place])
            position = end - int(self._run_tokens[run])  # of the document, in the epoch's stream
            first = run * self._run
            for document in range(first, min(first + self._run, len(self._lengths))):
                following = position + int(self._lengths[document])
                if following > at and at < stop:
                    length = min(stop, following) - at
                    pieces.append(Segment(self._first + document, at - position, length))
                    at += length
                position = following
            place += 1
        return pieces


class PackedWindows(_Windows):
    """Whole documents, together at most R raw tokens."""

    def __init__(self, shards: list[LazyShard], first_document: int, raw_tokens: int, key: list[int], setting: str):
        """setting: the configuration key that named the shards, for messages."""
        super().__init__(shards, first_document, raw_tokens, key)
        for shard in shards:
            long = shard.lengths > raw_tokens
            if long.any():
                raise UserError(
                    f"{setting}: {shard.prefix} has {int(long.sum())} documents of more than data.raw_tokens = {raw_tokens} "
                    f"tokens (the longest {shard.lengths.max()}); raise it, or make the shard with --max-tokens {raw_tokens} "
                    "and, to cut contexts, --truncate middle"
                )
        order = self._draw(PACKING).permutation(len(self._lengths))
        window = pack(self._lengths[order], raw_tokens, OPEN_WINDOWS)
        by_window = np.argsort(window, kind="stable")
        self._documents = order[by_window]
        self.samples_per_epoch = int(window.max()) + 1
        self._starts = np.searchsorted(window[by_window], np.arange(self.samples_per_epoch + 1))
        parts = np.concatenate([shard.parts for shard in shards])[self._documents]
        most = lambda counts: int(np.add.reduceat(counts, self._starts[:-1]).max())
        self.parts, self.closed = most(parts), most(np.maximum(parts, 1))

    def segments(self, sample: int) -> list[Segment]:
        """The documents of this source's sample number ``sample``."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        if epoch != self._epoch:
            self._rounds = [int(x) for x in self._draw(epoch).integers(1, 1 << 62, 4)]
            self._epoch = epoch
        window = shuffled(index, self.samples_per_epoch, self._rounds)
        documents = self._documents[self._starts[window] : self._starts[window + 1]].tolist()
        return [Segment(self._first + document, 0, int(self._lengths[document])) for document in documents]


@numba.njit(cache=True, nogil=True)
def pack(lengths: np.ndarray, room: int, most_open: int) -> np.ndarray:
    """Best fit with a bounded number of open windows.

    Args:
        lengths: int [documents], in the order in which they are placed, each at most ``room``.
        room: tokens of a window.
        most_open: windows that may be open at a time; a further one closes the fullest.

    Returns:
        int64 [documents], the window of each; windows are numbered from 0 without gaps.
    """
    window = np.empty(len(lengths), np.int64)
    left = np.zeros(most_open, np.int64)  # room in each open window
    number = np.full(most_open, -1, np.int64)
    made = 0
    for i in range(len(lengths)):
        best, fullest = -1, 0
        for slot in range(most_open):
            if left[slot] >= lengths[i] and number[slot] >= 0 and (best < 0 or left[slot] < left[best]):
                best = slot
            if left[slot] < left[fullest]:
                fullest = slot
        if best < 0:
            best = fullest
            left[best], number[best] = room, made
            made += 1
        left[best] -= lengths[i]
        window[i] = number[best]
    return window


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
