"""One source of samples: its shards, and the ways in which stages of a run read them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unfold.data_prep.format.lazy import LazyShard
from unfold.pretrain.data.blend import Arranged
from unfold.pretrain.data.packing import PackedWindows
from unfold.pretrain.data.windows import CutWindows, Leg, Segment
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How a source is read in one of its legs.

    Attributes:
        stream: the windows that the leg is of.
        legs: those of the stream up to this one, in the stream's own numbers.
        before: samples that the source has given of other streams.
    """

    stream: CutWindows | PackedWindows
    legs: tuple[Leg, ...]
    before: int

    def segments(self, number: int) -> list[Segment]:
        """The pieces of the source's sample ``number``, which is of this leg."""
        return self.stream.segments(number - self.before, self.legs)

    def most(self) -> tuple[int, int]:
        """Contexts or parts that a sample of it closes at most, and parts of linked contexts in it."""
        return self.stream.most(self.legs)


class Source:
    """Shards, and a stream of windows for every way of arranging their documents.

    Attributes:
        fingerprint: of their tokens.

    Each way has an order, epochs and a place of its own: a stage that arranges otherwise begins a new stream, and one that
    arranges as an earlier one did goes on where that one ended.
    """

    def __init__(self, shards: list[LazyShard], first_document: int, key: list[int], setting: str, patterns: str):
        """As of :class:`unfold.pretrain.data.windows.Windows`. Raises UserError where some shards are supervised, others not."""
        self._given = shards, first_document, key, setting, patterns
        self._packs = _is_supervised(shards, setting)
        hashes = "".join(shard.sha256 for shard in shards)
        self.fingerprint = shards[0].sha256 if len(shards) == 1 else hashlib.sha256(hashes.encode()).hexdigest()
        self._streams: dict[Arranged, CutWindows | PackedWindows] = {}

    def stream(self, arranged: Arranged) -> CutWindows | PackedWindows:
        """All samples that the documents make if all are arranged so."""
        if self._packs:  # supervised documents are packed whatever text is
            arranged = arranged._replace(packing="best_fit")
        if arranged not in self._streams:
            kind = PackedWindows if arranged.packing == "best_fit" else CutWindows
            self._streams[arranged] = kind(*self._given, arranged.length_weights)
        return self._streams[arranged]

    def readings(self, legs: Sequence[Leg], arranged: Sequence[Arranged]) -> list[Reading]:
        """How each leg is read. legs: in the source's own numbers."""
        streams = [self.stream(one) for one in arranged]
        counts = [after.begin - leg.begin for leg, after in zip(legs, legs[1:])]
        found = []
        for number, stream in enumerate(streams):
            own, at = [], 0
            for leg, other, count in zip(legs, streams[:number], counts):
                if other is stream:
                    own.append(replace(leg, begin=at))
                    at += count
            last = legs[number]
            found.append(Reading(stream, (*own, replace(last, begin=at)), last.begin - at))
        return found


def _is_supervised(shards: list[LazyShard], setting: str) -> bool:
    """Whether these shards of one source are supervised; all of them must be, or none."""
    supervised = [shard for shard in shards if shard.info.supervised]
    if 0 < len(supervised) < len(shards):
        plain = next(shard for shard in shards if not shard.info.supervised)
        raise UserError(
            f"{setting}: {supervised[0].prefix} is supervised, {plain.prefix} is not; give each kind an entry with a weight "
            "(`PREFIX weight=0.5`), so that each is a source of its own"
        )
    return bool(supervised)
