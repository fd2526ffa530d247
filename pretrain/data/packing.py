"""Windows of whole documents: packed together by best fit, so that each has at most R raw tokens.

Supervised documents are never cut; of text, a document of more than R tokens is cut into pieces of R and a rest. All of them are
packed once, in an order drawn from the seed, and an epoch draws the order of the windows only: every epoch has the same number of
them. Documents of one window never see each other, so which ones share it decides nothing but the batch.

Where stages of a run have samples of several lengths, what an epoch has not given when the length changes is packed anew, pieces
of one document that follow one another joined before. So every token of it is still read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from unfold.data_prep.format.lazy import LazyShard
from unfold.pretrain.data.windows import Leg, Segment, Windows, all_shuffled, shuffled
from unfold.pretrain.errors import UserError

OPEN_WINDOWS = 128  # that packing keeps open at a time
PACKING = 1 << 39  # the "epoch" whose draw orders documents for packing; those after it, for what a leg finds of an epoch


Pieces = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # entry of the epoch, first token in its document, number of tokens: int64 [pieces]


@dataclass(frozen=True)
class Packed:
    """Pieces of documents in windows, in the order of the windows.

    Attributes:
        pieces: entries, offsets, lengths.
        rising: int64 [pieces], the place of each among them by rising entry and offset.
        starts: int64 [windows + 1], the number of each window's first piece.
        closed, parts: contexts or parts that a window closes at most, and parts of linked contexts in it.
    """

    pieces: Pieces
    rising: np.ndarray
    starts: np.ndarray
    closed: int
    parts: int

    @property
    def windows(self) -> int:
        return len(self.starts) - 1

    def without(self, windows: np.ndarray) -> Pieces:
        """The pieces of all windows but these; those of one document that follow one another are one piece."""
        there = np.ones(self.windows, bool)
        there[windows] = False
        places = np.empty_like(self.rising)
        places[self.rising] = np.arange(len(places))
        chosen = places[np.repeat(there, np.diff(self.starts))[places]]
        entry, offset, length = (x[chosen] for x in self.pieces)
        follows = (entry[1:] == entry[:-1]) & (offset[1:] == offset[:-1] + length[:-1])
        first = np.flatnonzero(np.append(True, ~follows)[: len(entry)])
        return entry[first], offset[first], np.add.reduceat(length, first) if len(first) else length


class PackedWindows(Windows):
    """Whole documents, together at most R raw tokens."""

    def _open(self, shards: list[LazyShard]) -> None:
        self._shards = shards
        self._supervised = shards[0].info.supervised
        parts = np.concatenate([shard.parts for shard in shards])
        self._parts = parts if self._documents is None else parts[self._documents]
        self._known: dict[tuple, Packed] = {}  # packings by what they are of

    def check(self, raw_tokens: int) -> None:
        """Raise UserError where a supervised document does not fit into a sample of this length."""
        for shard in self._shards if self._supervised else ():
            long = shard.lengths > raw_tokens
            if long.any():
                raise UserError(
                    f"{self._setting}: {shard.prefix} has {int(long.sum())} documents of more than data.raw_tokens = "
                    f"{raw_tokens} tokens (the longest {shard.lengths.max()}); raise it, or make the shard with --max-tokens "
                    f"{raw_tokens} and, to cut contexts, --truncate middle"
                )

    def per_epoch(self, raw_tokens: int) -> int:
        """Samples of an epoch."""
        return self._whole(raw_tokens).windows

    def most(self, legs: Sequence[Leg]) -> tuple[int, int]:
        """Contexts or parts that a sample of the last leg closes at most, and parts of linked contexts in it."""
        if not self._supervised:
            return 0, 0
        _, rest = self._reached(legs)
        packings = [self._whole(legs[-1].raw_tokens), *([rest] if rest else [])]
        return max(p.closed for p in packings), max(p.parts for p in packings)

    def shares(self, raw_tokens: int) -> tuple[float, float]:
        """Of the samples of this length in an epoch, the share that is padding; of its entries, the share that is cut."""
        return 1 - self.tokens / (self.per_epoch(raw_tokens) * raw_tokens), float((self._lengths > raw_tokens).mean())

    def segments(self, number: int, legs: Sequence[Leg]) -> list[Segment]:
        """The documents of this source's sample ``number``, which is of the last of the legs."""
        epoch, packed, index = self._place(number - legs[-1].begin, legs)
        if epoch != self._epoch:
            self._rounds, self._epoch = self._rounds_of(epoch), epoch
        window = shuffled(index, packed.windows, self._rounds)
        here = slice(packed.starts[window], packed.starts[window + 1])
        pieces = zip(*(x[here].tolist() for x in packed.pieces))
        return [Segment(self._document(entry), offset, length) for entry, offset, length in pieces]

    def _rounds_of(self, epoch: int) -> list[int]:
        return [int(x) for x in self._draw(epoch).integers(1, 1 << 62, 4)]

    def _place(self, index: int, legs: Sequence[Leg]) -> tuple[int, Packed, int]:
        """Epoch and packing of the last leg's sample ``index``, and which of the packing's it is."""
        epoch, rest = self._reached(legs)
        if rest is not None:
            if index < rest.windows:
                return epoch, rest, index
            epoch, index = epoch + 1, index - rest.windows
        whole = self._whole(legs[-1].raw_tokens)
        more, index = divmod(index, whole.windows)
        return epoch + more, whole, index

    def _reached(self, legs: Sequence[Leg]) -> tuple[int, Packed | None]:
        """The epoch in which the last leg begins, and what is left of it; None: all."""
        if len(legs) == 1:
            return 0, None
        leg = legs[-1]
        epoch, packed, index = self._place(leg.begin - legs[-2].begin, legs[:-1])
        if index == 0 and packed is self._whole(legs[-2].raw_tokens):
            return epoch, None
        key = (leg.raw_tokens, *legs[:-1], leg.begin)
        if key not in self._known:
            given = all_shuffled(packed.windows, self._rounds_of(epoch))[:index]
            self._known[key] = self._pack(packed.without(given), leg.raw_tokens, PACKING + len(legs))
        return epoch, self._known[key]

    def _whole(self, raw_tokens: int) -> Packed:
        """Everything that an epoch has."""
        key = (raw_tokens,)
        if key not in self._known:
            entry = np.arange(self.entries)
            self._known[key] = self._pack((entry, np.zeros_like(entry), self._lengths.astype(np.int64)), raw_tokens, PACKING)
        return self._known[key]

    def _pack(self, pieces: Pieces, raw_tokens: int, draw: int) -> Packed:
        """pieces: by rising entry and offset. draw: what the order in which they are packed is drawn from."""
        pieces = cut(pieces, raw_tokens)
        order = self._draw(draw).permutation(len(pieces[0]))
        window = pack(pieces[2][order], raw_tokens, OPEN_WINDOWS)
        by_window = np.argsort(window, kind="stable")
        rising = order[by_window]  # as they come here
        pieces = tuple(x[rising] for x in pieces)
        starts = np.searchsorted(window[by_window], np.arange(int(window.max()) + 2))
        parts = self._parts[pieces[0]]
        most = lambda counts: int(np.add.reduceat(counts, starts[:-1]).max())
        return Packed(pieces, rising, starts, most(np.maximum(parts, 1)), most(parts))


def cut(pieces: Pieces, longest: int) -> Pieces:
    """The same pieces, those of more than ``longest`` tokens cut into such and a rest."""
    entry, offset, length = pieces
    counts = -(-length // longest)
    if (counts <= 1).all():
        return pieces
    which = np.repeat(np.arange(len(counts)), counts)
    before = longest * (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts))  # tokens of its piece before it
    return entry[which], offset[which] + before, np.minimum(length[which] - before, longest)


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
    number = np.zeros(most_open, np.int64)  # the window in each slot
    open_ones = np.arange(most_open)  # room left * most_open + slot, rising; a slot without a window has no room left
    made = 0
    for i in range(len(lengths)):
        at = np.searchsorted(open_ones, lengths[i] * most_open)
        if at < most_open:
            key = open_ones[at] - lengths[i] * most_open
            while at > 0 and open_ones[at - 1] > key:
                open_ones[at] = open_ones[at - 1]
                at -= 1
        else:  # it fits nowhere: the first one, which is the fullest, closes
            key = (room - lengths[i]) * most_open + open_ones[0] % most_open
            number[key % most_open] = made
            made += 1
            at = 0
            while at + 1 < most_open and open_ones[at + 1] < key:
                open_ones[at] = open_ones[at + 1]
                at += 1
        open_ones[at] = key
        window[i] = number[key % most_open]
    return window
