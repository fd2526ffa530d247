"""Raw tokens -> interleaved sequence: where the gists of a packed sample go (docs/method.md#where-gists-go)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from unfold.model.config import GistConfig
from unfold.model.gist.growing import NEEDS_WORD_STARTS
from unfold.model.gist.linked import Bundle, Role, linked_runs


@dataclass(frozen=True)
class Interleaved:
    """A packed sample with its gists in place. All arrays are [T].

    Attributes:
        ids: int64, vocabulary ids, gist ids included.
        level: int32, -1 for raw tokens, 0 .. L-1 for gists.
        doc: int32, number of the document within the sample.
        position: int64, rotary position: a raw token's index among its document's raw tokens; a gist has the position
            of the raw token before it. In a bundle positions count on over raw tokens and links.
        role: int32, what each token is (:class:`unfold.model.gist.linked.Role`); gists have that of what they close. None
            where no document is a bundle.
        part: int32, of tokens of a bundle's part and of a part's links its number, from 1; of a suffix the number of parts;
            else 0. None like ``role``.
    """

    ids: np.ndarray
    level: np.ndarray
    doc: np.ndarray
    position: np.ndarray
    role: np.ndarray | None = None
    part: np.ndarray | None = None

    @property
    def raw(self) -> np.ndarray:
        """bool, the tokens that were given: neither gists nor links."""
        return self.level < 0 if self.role is None else (self.level < 0) & (self.role != Role.LINK)


def max_interleaved_length(raw_tokens: int, chunk_sizes: Sequence[int], closed: int = 0, links: int = 0) -> int:
    """The most tokens that ``raw_tokens`` raw ones can become: R + R // c0 + R // (c0 * c1) + ..

    closed: how many documents' contexts, or parts, are closed on purpose; each adds at most one gist per level.
    links: link tokens of all parts.
    """
    length, group = raw_tokens + closed * len(chunk_sizes) + links, 1
    for size in chunk_sizes:
        group *= size
        length += raw_tokens // group
    return length


def interleave(
    ids: np.ndarray,
    doc_lengths: Sequence[int],
    word_starts: np.ndarray | None,
    config: GistConfig,
    gist_ids: Sequence[int],
    close: bool = False,
    contexts: Sequence[int] | None = None,
    bundles: Sequence[Bundle | None] | None = None,
    link_ids: Sequence[int] = (),
) -> Interleaved:
    """Put the gists of one packed sample in place.

    Args:
        ids: [R] int64, raw tokens of the documents, back to back.
        doc_lengths: raw tokens of each document; they sum to R.
        word_starts: [vocab] bool, whether a piece starts a word; not looked at, and may be None, without ``config.word_aware``.
        config: chunk sizes, sink and whether chunks grow to where a word starts.
        gist_ids: one vocabulary id per gist level.
        close: give the end of every document a gist at each level that was not just closed (a context before its question).
        contexts: raw tokens of each document that are a context: it is closed, and what follows is a suffix without gists;
            -1 for a document that is all text. None: every document is.
        bundles: of each document how it is made of prefix, parts and suffix; None for an ordinary one. Every part is given
            gists as a document of its own and closed; after the last one come the links of all parts.
        link_ids: ``config.links`` vocabulary ids, those of one part's links; needed where there are bundles.

    Returns:
        The interleaved sample.

    Raises:
        ValueError: lengths that do not sum to R, a context or bundle longer than its document, a wrong number of gist or
            link ids, a token outside ``word_starts``, or no ``word_starts`` where they are needed.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    lengths = np.asarray(doc_lengths, dtype=np.int64)
    levels = len(config.chunk_sizes)
    if lengths.sum() != len(ids) or (lengths < 0).any():
        raise ValueError(f"doc_lengths: they sum to {lengths.sum()}, the sample has {len(ids)} tokens")
    context = np.full(len(lengths), -1) if contexts is None else np.asarray(contexts)
    if context.shape != lengths.shape or (context > lengths).any():
        raise ValueError(f"contexts: {contexts}, for documents of {lengths.tolist()} tokens; give each one of at most its length")
    ends, closes = np.where(context < 0, lengths, context), close | (context >= 0)
    if len(gist_ids) != levels:
        raise ValueError(f"gist_ids: {len(gist_ids)} ids for {levels} gist levels; give one id per level")
    starts = _checked_starts(ids, word_starts, config)
    if bundles is None or not any(bundles):
        return _fill(ids, lengths, ends, closes, starts, config, gist_ids)
    if len(link_ids) != config.links:
        raise ValueError(f"link_ids: {len(link_ids)} ids for gist.links = {config.links}; give one id per link of a part")
    runs = linked_runs(ids, lengths, ends, closes, bundles, link_ids)
    made = _fill(runs.ids, runs.length, runs.end, runs.closes, starts, config, gist_ids)
    doc, origin, role, part = (x[made.doc] for x in (runs.doc, runs.origin, runs.role, runs.part))
    narrow = lambda x: x.astype(np.int32)
    return Interleaved(made.ids, made.level, narrow(doc), made.position + origin, narrow(role), narrow(part))


def _checked_starts(ids: np.ndarray, word_starts: np.ndarray | None, config: GistConfig) -> np.ndarray:
    """Where words start, [vocab] bool, or nothing where nobody asks. Raises ValueError as :func:`interleave` does."""
    if config.word_aware and word_starts is None:
        raise ValueError(NEEDS_WORD_STARTS)
    starts = np.ascontiguousarray(() if word_starts is None else word_starts, dtype=np.bool_)
    vocabulary = np.inf if word_starts is None else len(starts)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        bad = ids.max() if ids.max() >= vocabulary else ids.min()
        raise ValueError(f"ids: token id {bad} is outside the vocabulary{f' of {len(starts)} pieces' if len(starts) else ''}")
    return starts


def without_gists(ids: np.ndarray, doc_lengths: Sequence[int], bundles: Sequence[Bundle | None] | None = None) -> Interleaved:
    """A packed sample for a model without gists, which has no links either: arguments as for :func:`interleave`."""
    lengths = np.asarray(doc_lengths, dtype=np.int64)
    nothing = np.zeros(len(lengths), np.int64)
    runs = linked_runs(ids, lengths, nothing, nothing, bundles or [None] * len(lengths), ())
    spread = lambda x: np.repeat(x, runs.length).astype(np.int32)
    first = np.repeat(np.cumsum(runs.length) - runs.length - runs.origin, runs.length)
    linked = (spread(runs.role), spread(runs.part)) if bundles is not None and any(bundles) else (None, None)
    return Interleaved(ids, np.full(len(ids), -1, np.int32), spread(runs.doc), np.arange(len(ids)) - first, *linked)


def _fill(
    ids: np.ndarray,
    lengths: np.ndarray,
    ends: np.ndarray,
    closes: np.ndarray,
    starts: np.ndarray,
    config: GistConfig,
    gist_ids: Sequence[int],
) -> Interleaved:
    """Gists in place, every document by itself. ends, closes: see :func:`_interleave`."""
    room = max_interleaved_length(len(ids), config.chunk_sizes, int(closes.sum()))
    out = Interleaved(np.empty(room, np.int64), np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int64))
    length = _interleave(
        ids,
        lengths,
        ends,
        closes,
        starts,
        config.chunk_sizes[0] // 2 if config.word_aware else 0,
        np.asarray(config.chunk_sizes, np.int64),
        config.sink,
        np.asarray(gist_ids, np.int64),
        out.ids,
        out.level,
        out.doc,
        out.position,
    )
    return Interleaved(out.ids[:length], out.level[:length], out.doc[:length], out.position[:length])


@numba.njit(cache=True, nogil=True)
def _chunk_end(ids, starts, growth, begin, stop, size):
    """Where a chunk that begins at ``begin`` closes, given the document's end ``stop``; ``stop + 1`` when cut short.

    growth: by how much it may grow; without any, word starts are not read.
    """
    due = begin + size
    if due > stop:
        return stop + 1
    if growth == 0:
        return due
    for end in range(due, min(due + growth, stop - 1) + 1):
        if starts[ids[end]]:
            return end
    return due


@numba.njit(cache=True, nogil=True)
def _interleave(ids, lengths, ends, closes, starts, growth, sizes, sink, gist_ids, out_ids, out_level, out_doc, out_position):
    """Fill the output arrays; returns the interleaved length. One pass over the tokens, for any number of levels.

    ends: where, in tokens of the document, its gists end; what follows is a suffix. closes: whether all is closed there.
    """
    levels = len(sizes)
    open_gists = np.zeros(levels, np.int64)  # at l: level-(l-1) gists since the last level-l gist; slot 0 is unused
    at = 0
    first = 0
    for doc in range(len(lengths)):
        stop = first + ends[doc]
        open_gists[:] = 0
        end = _chunk_end(ids, starts, growth, first + sink, stop, sizes[0])
        chunk_empty = True
        for i in range(first, stop):
            out_ids[at], out_level[at], out_doc[at], out_position[at] = ids[i], -1, doc, i - first
            at += 1
            chunk_empty = False
            if i + 1 != end:
                continue
            level = 0
            while True:
                out_ids[at], out_level[at], out_doc[at], out_position[at] = gist_ids[level], level, doc, i - first
                at += 1
                level += 1
                if level == levels:
                    break
                open_gists[level] += 1
                if open_gists[level] < sizes[level]:
                    break
                open_gists[level] = 0
            end = _chunk_end(ids, starts, growth, end, stop, sizes[0])
            chunk_empty = True
        if closes[doc] and stop > first:
            for level in range(levels):
                if chunk_empty if level == 0 else open_gists[level] == 0:
                    continue
                out_ids[at], out_level[at], out_doc[at], out_position[at] = gist_ids[level], level, doc, stop - 1 - first
                at += 1
                if level + 1 < levels:
                    open_gists[level + 1] += 1
        after = first + lengths[doc]
        for i in range(stop, after):
            out_ids[at], out_level[at], out_doc[at], out_position[at] = ids[i], -1, doc, i - first
            at += 1
        first = after
    return at
