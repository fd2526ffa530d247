"""Where gists go in a sequence that still grows: the rule of :mod:`unfold.model.gist.insertion`, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unfold.model.config import GistConfig


@dataclass(frozen=True)
class Feed:
    """What to append to the interleaved sequence, after its last ``drop`` tokens (all raw) were taken off again.

    Attributes:
        drop: tokens to take off; they stand at the beginning of what is to be appended, with a gist among them.
        ids, level: vocabulary ids and levels (-1 is raw) of the tokens to append.
    """

    drop: int
    ids: list[int]
    level: list[int]


class GistPlacement:
    """Places gists in one growing document.

    A chunk that is due may still grow to where a word starts, so its gist is placed only when the next token is known.
    If ``c0 // 2`` tokens later no word has started, the chunk closes where it was due: those tokens, which were read
    without the gist, are taken off and read again. So a whole text has its gists where ``interleave`` puts them.

    Args:
        config: chunk sizes and sink.
        word_starts: [vocab] bool, whether a piece starts a word.
        gist_ids: one vocabulary id per gist level.
    """

    def __init__(self, config: GistConfig, word_starts: np.ndarray, gist_ids: Sequence[int]):
        if len(gist_ids) != config.levels:
            raise ValueError(f"gist_ids: {len(gist_ids)} ids for {config.levels} gist levels; give one id per level")
        self.config, self.word_starts, self.gist_ids = config, word_starts, list(gist_ids)
        self.chunk: list[int] = []  # raw tokens since the last level-0 gist
        self.open = [0] * config.levels  # at l > 0: gists of level l - 1 since the last one of level l
        self.sinks_left = config.sink  # sinks that the open chunk holds or will hold: they do not count

    def push(self, tokens: Sequence[int], close: bool = False) -> Feed:
        """Append raw tokens; with ``close`` they end a context, which gets a gist at every level not just closed."""
        known = self.chunk + list(tokens)
        read, begin = len(self.chunk), 0  # of ``known``: what was appended before, and where the open chunk begins
        drop, ids, level = 0, [], []
        while (end := self._chunk_end(known, begin, close)) is not None:
            if end < read:
                drop, read = read - end, end
            ids += known[read:end]
            level += [-1] * (end - read)
            self.sinks_left = max(0, self.sinks_left - (end - begin))
            read = begin = end
            self._close_chunk(ids, level)
        ids += known[read:]
        level += [-1] * (len(known) - read)
        self.chunk = known[begin:]
        if close:
            self._close_all(ids, level)
        return Feed(drop, ids, level)

    def leave(self, tokens: Sequence[int]) -> Feed:
        """Append raw tokens to the open chunk without gists: a suffix."""
        self.chunk += tokens
        return Feed(0, list(tokens), [-1] * len(tokens))

    def _chunk_end(self, known: list[int], begin: int, close: bool) -> int | None:
        """Where the chunk that begins at ``begin`` closes; None if it is cut short or that is not certain yet."""
        size = self.config.chunk_sizes[0]
        due = begin + self.sinks_left + size
        if due > len(known):
            return None
        for end in range(due, due + size // 2 + 1):
            if end == len(known):
                return due if close else None
            if self.word_starts[known[end]]:
                return end
        return due

    def _close_chunk(self, ids: list[int], level: list[int]) -> None:
        """A level-0 gist, and one of every level whose section it completes."""
        for l, gist in enumerate(self.gist_ids):
            ids.append(gist)
            level.append(l)
            if l + 1 == self.config.levels:
                break
            self.open[l + 1] += 1
            if self.open[l + 1] < self.config.chunk_sizes[l + 1]:
                break
            self.open[l + 1] = 0

    def _close_all(self, ids: list[int], level: list[int]) -> None:
        """Close what is open at every level."""
        for l, gist in enumerate(self.gist_ids):
            if self.chunk if l == 0 else self.open[l]:
                ids.append(gist)
                level.append(l)
                if l + 1 < self.config.levels:
                    self.open[l + 1] += 1
            self.open[l] = 0
        self.sinks_left = max(0, self.sinks_left - len(self.chunk))
        self.chunk = []
