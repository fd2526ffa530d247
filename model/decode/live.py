"""A sequence that is read and continued: its cache and the record of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from unfold.model.decode.cache import SequenceCache
from unfold.model.gist.growing import Feed, GistPlacement


@dataclass
class LiveSequence:
    """One sequence that is read and continued, over any number of turns.

    Attributes:
        cache: its keys and values.
        placement: where its gists go; None for a dense model.
        ids, level, recalls: its interleaved tokens so far: vocabulary ids, levels (-1 is raw), and which unfold chunks.
        logits: [vocab] of the token after its last raw one; None before the first.
        pending: raw tokens that were chosen but not read yet; the next read or step begins with them.
    """

    cache: SequenceCache
    placement: GistPlacement | None
    ids: list[int] = field(default_factory=list)
    level: list[int] = field(default_factory=list)
    recalls: list[bool] = field(default_factory=list)
    logits: Tensor | None = None
    pending: list[int] = field(default_factory=list)

    def take(self, feed: Feed) -> range:
        """Enter what the placement said into the record (not the cache): the places of the new tokens."""
        start = len(self.ids) - feed.drop
        del self.ids[start:], self.level[start:], self.recalls[start:]
        self.cache.drop(feed.drop)
        self.ids += feed.ids
        self.level += feed.level
        self.recalls += feed.recalls
        return range(start, len(self.ids))
