"""A text that grows: where its gists go, what each of its tokens sees, and what lies behind each gist.

The rules of :mod:`unfold.model.gist.insertion` and :mod:`unfold.model.gist.layout`, token by token. One code for generation and
for exported models, with which this file is shipped: it needs torch alone.

The items of each *segment* (0 holds the gists of the top level, L - 1 those of level 0, L the raw tokens) are numbered from 0
in the text's order: the places of their keys in a cache. What a token sees in a segment is one range of these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from unfold.model.gist.growable import Growable
from unfold.model.kinds import window_of


def recalls_in(layer: int, first: int, kind: str = "gist") -> bool:
    """Whether tokens recall in a layer, counted from 0. first: ``recall_from``, at least 1; kind: of the layer.

    Only in gist layers, and not in the first layer, where gists hold nothing yet; one of level l does from layer l + 1 on.
    """
    return kind == "gist" and layer >= first


class Folding(Protocol):
    """How tokens are folded into gists: a GistConfig, or what an export's config.json says."""

    chunk_sizes: tuple[int, ...]
    sink: int
    n_prev: int
    own_group: bool
    word_aware: bool
    levels: int


NEEDS_WORD_STARTS = (
    "word_starts: None, but chunks grow to where a word starts; give the bitmap of the vocabulary, or set gist.word_aware: false"
)


@dataclass(frozen=True)
class Feed:
    """What a text reads next, after its last ``drop`` tokens (all raw) were taken off again.

    Attributes:
        drop: tokens to take off; they stand at the beginning of what is to be read, with a gist among them.
        ids, level, recalls: of the tokens to read: vocabulary id, level (-1 is raw), whether it unfolds chunks.
    """

    drop: int = 0
    ids: list[int] = field(default_factory=list)
    level: list[int] = field(default_factory=list)
    recalls: list[bool] = field(default_factory=list)

    def add_raw(self, tokens: Sequence[int], recalls: Sequence[bool]) -> None:
        """Go on with raw tokens."""
        self.ids.extend(tokens)
        self.level.extend([-1] * len(tokens))
        self.recalls.extend(recalls)

    def add_gist(self, gist: int, level: int) -> None:
        """Go on with a gist; gists never recall."""
        self.ids.append(gist)
        self.level.append(level)
        self.recalls.append(False)

    def then(self, after: Feed) -> Feed:
        """This and another one, which drops none of what this one reads."""
        return Feed(self.drop + after.drop, self.ids + after.ids, self.level + after.level, self.recalls + after.recalls)


def raw_feed(tokens: Sequence[int], recalls: bool) -> Feed:
    """Raw tokens and no gist."""
    feed = Feed()
    feed.add_raw(tokens, [recalls] * len(tokens))
    return feed


class GistPlacement:
    """Places gists in one growing text.

    A chunk that is due may still grow to where a word starts, so its gist is placed only when the next token is known.
    If ``c0 // 2`` tokens later no word has started, the chunk closes where it was due: those tokens, which were read
    without the gist, are taken off and read again. So a whole text has its gists where ``interleave`` puts them.
    Without ``folding.word_aware`` a chunk never grows: its gist comes at once after its last token, and nothing is read again.

    Args:
        folding: chunk sizes, sink and whether chunks grow to where a word starts.
        word_starts: [vocab] bool, whether a piece starts a word; may be None without ``folding.word_aware``.
        gist_ids: one vocabulary id per gist level.
    """

    def __init__(self, folding: Folding, word_starts: Sequence[bool] | None, gist_ids: Sequence[int]):
        if folding.word_aware and word_starts is None:
            raise ValueError(NEEDS_WORD_STARTS)
        if len(gist_ids) != folding.levels:
            raise ValueError(f"gist_ids: {len(gist_ids)} ids for {folding.levels} gist levels; give one id per level")
        self.folding, self.word_starts, self.gist_ids = folding, word_starts, list(gist_ids)
        self.chunk: list[int] = []  # raw tokens since the last level-0 gist, and which of them recall
        self.chunk_recalls: list[bool] = []
        self.open = [0] * folding.levels  # at l > 0: gists of level l - 1 since the last one of level l
        self.sinks_left = folding.sink  # sinks that the open chunk holds or will hold: they do not count

    def copy(self) -> GistPlacement:
        """One that goes on independently."""
        other = object.__new__(GistPlacement)
        other.__dict__.update(self.__dict__)
        other.chunk, other.chunk_recalls, other.open = list(self.chunk), list(self.chunk_recalls), list(self.open)
        return other

    def push(self, tokens: Sequence[int], recalls: bool = False, close: bool = False) -> Feed:
        """Append raw tokens; with ``close`` they end a context, which gets a gist at every level not just closed."""
        known, flags = self.chunk + list(tokens), self.chunk_recalls + [recalls] * len(tokens)
        read, begin = len(self.chunk), 0  # of ``known``: what was appended before, and where the open chunk begins
        feed = Feed()
        while (end := self._chunk_end(known, begin, close)) is not None:
            if end < read:  # the first chunk only: what follows has not been read
                feed, read = Feed(drop=read - end), end
            feed.add_raw(known[read:end], flags[read:end])
            self.sinks_left = max(0, self.sinks_left - (end - begin))
            read = begin = end
            self._close_chunk(feed)
        feed.add_raw(known[read:], flags[read:])
        self.chunk, self.chunk_recalls = known[begin:], flags[begin:]
        if close:
            self._close_all(feed)
        return feed

    @property
    def certain(self) -> bool:
        """Whether the next token stands in the open chunk whatever it is: its feed is that token alone, without a gist."""
        with_it = len(self.chunk) + 1
        due = self.sinks_left + self.folding.chunk_sizes[0]
        return with_it <= due if self.folding.word_aware else with_it < due

    def leave(self, tokens: Sequence[int], recalls: bool = False) -> Feed:
        """Append raw tokens to the open chunk without gists: a suffix."""
        self.chunk += tokens
        self.chunk_recalls += [recalls] * len(tokens)
        return raw_feed(tokens, recalls)

    def _chunk_end(self, known: list[int], begin: int, close: bool) -> int | None:
        """Where the chunk that begins at ``begin`` closes; None if it is cut short or that is not certain yet."""
        size = self.folding.chunk_sizes[0]
        due = begin + self.sinks_left + size
        if due > len(known):
            return None
        if not self.folding.word_aware:
            return due
        for end in range(due, due + size // 2 + 1):
            if end == len(known):
                return due if close else None
            if self.word_starts[known[end]]:
                return end
        return due

    def _close_chunk(self, feed: Feed) -> None:
        """A level-0 gist, and one of every level whose section it completes."""
        for level, gist in enumerate(self.gist_ids):
            feed.add_gist(gist, level)
            if level + 1 == len(self.open):
                break
            self.open[level + 1] += 1
            if self.open[level + 1] < self.folding.chunk_sizes[level + 1]:
                break
            self.open[level + 1] = 0

    def _close_all(self, feed: Feed) -> None:
        """Close what is open at every level."""
        for level, gist in enumerate(self.gist_ids):
            if self.chunk if level == 0 else self.open[level]:
                feed.add_gist(gist, level)
                if level + 1 < len(self.open):
                    self.open[level + 1] += 1
            self.open[level] = 0
        self.sinks_left = max(0, self.sinks_left - len(self.chunk))
        self.chunk, self.chunk_recalls = [], []


@dataclass(frozen=True)
class Sight:
    """What ``n`` new tokens of a growing text may read. Item numbers are per segment.

    Attributes:
        segment, number: [n] int64, which item each token is.
        lo, hi: [L + 1, n] int64, what it sees under the compressed mask; empty where equal. ``hi`` is also the number of items
            up to and including the token.
        sinks: [n] int64, how many of the first raw tokens it sees beside its raw range.
        tail: [L, n] int64, the first gist whose parent is not closed yet; 0 at the top.
        recalls: [n] bool, whether it unfolds chunks.
        start: items of each segment before the new tokens.
        ends: for each gist segment, how many items of the segment below stand before each gist, [gists] int64.
        sink: how many of the first raw tokens every later token sees.
    """

    segment: Tensor
    number: Tensor
    lo: Tensor
    hi: Tensor
    sinks: Tensor
    tail: Tensor
    recalls: Tensor
    start: tuple[int, ...]
    ends: tuple[Tensor, ...]
    sink: int

    @property
    def span(self) -> Tensor:
        """[n] int64, interleaved tokens up to and including the token."""
        return self.hi.sum(0)

    @property
    def position(self) -> Tensor:
        """[n] int64, rotary position."""
        return self.hi[-1] - 1

    def at(self, queries: Tensor) -> Sight:
        """That of some of the tokens."""
        names = ("segment", "number", "lo", "hi", "sinks", "tail", "recalls")
        return replace(self, **{name: getattr(self, name)[..., queries] for name in names})

    @cached_property
    def members(self) -> list[Tensor]:
        """For each segment which of the new tokens are its items, [m] int64."""
        return [(self.segment == s).nonzero()[:, 0] for s in range(len(self.lo))]


class Outline:
    """Counts and borders of one growing text.

    Args:
        folding: chunk sizes, sink and n_prev; None where there are no gists (dense attention): every token sees all before.
        device: of all that is derived.
    """

    def __init__(self, folding: Folding | None, device: torch.device | str = "cpu"):
        self.folding, self.device = folding, device
        self.levels = folding.levels if folding else 0
        self.sink = folding.sink if folding else 0
        self.counts = [0] * (self.levels + 1)  # items of each segment
        self.floor: Tensor | None = None  # [L + 1] int64, the first item of each segment that windows may hold; None: any
        # For every gist, how many items of the segment below stand before it: the end of what it closed.
        self.ends = [Growable([0], 0, torch.int64, device) for _ in range(self.levels)]

    def copy(self) -> Outline:
        """One that goes on independently."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.counts, other.ends = list(self.counts), [ends.copy() for ends in self.ends]
        return other

    @property
    def length(self) -> int:
        """Interleaved tokens."""
        return sum(self.counts)

    def drop(self, tokens: int) -> None:
        """Forget the last tokens, which must be raw."""
        self.counts[-1] -= tokens
        if tokens and self.levels and self.counts[self.levels - 1]:
            assert self.counts[-1] >= int(self.ends[-1].rows[-1]), "a gist stands among them"

    def append_raw(self, tokens: int) -> None:
        """Append raw tokens whose sight nobody asks for."""
        self.counts[-1] += tokens

    def append(self, level: Sequence[int] | Tensor, recalls: Sequence[bool] | None = None) -> Sight:
        """Append tokens of these levels, [n], -1 for raw ones. recalls: which of them unfold chunks; None: none."""
        level = torch.as_tensor(level, dtype=torch.int64, device=self.device)
        start = tuple(self.counts)
        segments = torch.arange(self.levels + 1, device=self.device)[:, None]
        segment = self.levels - 1 - level
        member = segment == segments  # [L+1, n]
        hi = member.cumsum(1) + torch.tensor(start, device=self.device)[:, None]
        before = hi - member.long()
        for s, ends in enumerate(self.ends):
            ends.append(hi[s + 1][member[s]])
        number = before.gather(0, segment[None])[0]
        first, tail = torch.zeros_like(hi), torch.zeros_like(hi[:-1])
        for s in range(self.levels):
            # The window below begins where the group ended that lies n_prev groups before the token's own. Where a gist has its
            # own group alone, none lies before it of the level below.
            reach = self.folding.n_prev * ~(member[s] & self.folding.own_group)
            first[s + 1] = self._end_of(s, before[s] - reach - 1)
            if s + 1 < self.levels:
                tail[s + 1] = self._end_of(s, before[s] - 1)
        if self.floor is not None:
            first = first.maximum(self.floor[:, None])
        lo = torch.where(segments <= self.levels - level, first, hi)  # a token of level q sees segments 0 .. L - q
        # The sinks that the raw range does not hold: those before it, or all so far for a gist without one.
        sinks = lo[-1].clamp(max=self.sink)
        self.counts = hi[:, -1].tolist()
        unfolds = torch.zeros_like(level, dtype=torch.bool)
        if recalls is not None:
            unfolds = torch.as_tensor(recalls, dtype=torch.bool, device=self.device)
        return Sight(segment, number, lo, hi, sinks, tail, unfolds, start, self.borders, self.sink)

    def in_layer(self, kind: str, sight: Sight) -> Sight:
        """What the tokens of a sight of this text see in layers of one kind (:mod:`unfold.model.kinds`)."""
        if kind == "gist":
            return sight
        segments = torch.arange(self.levels + 1, device=self.device)[:, None]
        lo = sight.hi - (sight.segment == segments).long()  # of the gists themselves alone
        window = window_of(kind)
        lo[-1] = 0 if window is None else self.first_within(sight.position, window)
        sinks = torch.zeros_like(sight.sinks) if window is None else lo[-1].clamp(max=self.sink)
        return replace(sight, lo=lo, sinks=sinks, recalls=torch.zeros_like(sight.recalls))

    def unseen(self, window: int, items: int) -> int:
        """Of the first so many raw items how many behind the sinks later tokens never see, in layers with this window."""
        if self.levels:  # the open chunk may be taken off, to be folded
            items = min(items, int(self.ends[-1].rows[-1:].sum()))
        return max(0, items - window - self.sink)  # a gist that comes next looks from where the last raw token does

    def first_within(self, position: Tensor, window: int) -> Tensor:
        """The first raw item within the window of tokens at these positions."""
        return (position - window + 1).clamp(min=0)

    @property
    def borders(self) -> tuple[Tensor, ...]:
        """``ends`` as they are now; they stay so, for gists are never dropped."""
        return tuple(ends.rows for ends in self.ends)

    def children(self, segment: int, gists: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`children`."""
        return children(self.borders, self.sink, segment, gists)

    def _end_of(self, segment: int, gist: Tensor) -> Tensor:
        """[n]: the end of what each gist closed; 0 for those before the first."""
        ends = self.ends[segment].rows
        if not len(ends):
            return torch.zeros_like(gist)
        return ends[gist.clamp(min=0)] * (gist >= 0)


def children(ends: Sequence[Tensor], sink: int, segment: int, gists: Tensor) -> tuple[Tensor, Tensor]:
    """The items ``[lo, hi)`` of the segment below that gists of any shape closed; sinks are nobody's."""
    lo, hi = ends[segment][(gists - 1).clamp(min=0)] * (gists > 0), ends[segment][gists]
    if segment == len(ends) - 1:
        lo = lo.clamp(min=sink).minimum(hi)
    return lo, hi


def families(ends: Sequence[Tensor], sink: int, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Children ``[lo, hi)`` and parent of every item, by row where the segments stand one after another: three [T] int64.

    Raw tokens have no children; -1 is the parent of what no gist has closed. counts: items of each segment.
    """
    device = ends[0].device
    start = [sum(counts[:s]) for s in range(len(counts) + 1)]
    child_lo, child_hi = torch.zeros(2, start[-1], dtype=torch.int64, device=device)
    parent = torch.full_like(child_lo, -1)
    for s, borders in enumerate(ends):
        gists, below = slice(start[s], start[s + 1]), slice(start[s + 1], start[s + 2])
        lo, hi = children(ends, sink, s, torch.arange(counts[s], device=device))
        child_lo[gists], child_hi[gists] = lo + start[s + 1], hi + start[s + 1]
        above = torch.searchsorted(borders, torch.arange(counts[s + 1], device=device), right=True)
        parent[below] = torch.where(above < counts[s], above + start[s], -1)
    return child_lo, child_hi, parent
