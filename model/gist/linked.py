"""Linked contexts: documents that do not see each other, read one by one and joined (docs/method.md#linked-contexts).

A *bundle* is one document of a sample, made of a prefix, parts, links and a suffix, in this order. What its tokens are stands
in two integers per token, their role and their part; everything else follows from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Role(IntEnum):
    """What a token is in its sample."""

    TEXT = 0  # of an ordinary document (and padding)
    PREFIX = 1  # of a bundle, before its parts
    PART = 2
    LINK = 3
    SUFFIX = 4


@dataclass(frozen=True)
class Bundle:
    """How many raw tokens of a document are what: first its prefix, then its parts one after the other; the rest is its suffix.

    Links are not among them: :func:`unfold.model.gist.interleave` puts them in place, as it does gists.

    Attributes:
        prefix: raw tokens before the parts; 0: none.
        parts: raw tokens of each part, at least one each.

    Raises:
        ValueError: a part without a token, or a prefix of fewer than 0.
    """

    prefix: int
    parts: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(map(int, self.parts)))
        if self.prefix < 0:
            raise ValueError(f"prefix: {self.prefix} tokens; give 0 for none")
        if any(length < 1 for length in self.parts):
            empty = next(i for i, length in enumerate(self.parts) if length < 1)
            raise ValueError(f"parts: part {empty + 1} of {len(self.parts)} is empty; leave it out")

    @property
    def context(self) -> int:
        """Raw tokens before the suffix."""
        return self.prefix + sum(self.parts)


@dataclass(frozen=True)
class Runs:
    """The documents of a sample as runs of tokens, each to be given gists by itself. All arrays are [runs].

    Attributes:
        ids: int64 [R + links], raw and link tokens of all runs, back to back.
        length: tokens of each.
        end: those of them that are given gists; closes: whether they end with a gist of every level.
        doc: number of the document that it is in, origin: its first token's rotary position, role and part of its tokens.
    """

    ids: np.ndarray
    length: np.ndarray
    end: np.ndarray
    closes: np.ndarray
    doc: np.ndarray
    origin: np.ndarray
    role: np.ndarray
    part: np.ndarray


def linked_runs(
    ids: np.ndarray,
    lengths: np.ndarray,
    ends: np.ndarray,
    closes: np.ndarray,
    bundles: Sequence[Bundle | None],
    link_ids: Sequence[int],
) -> Runs:
    """Cut a sample into runs.

    Args:
        ids: int64 [R].
        lengths, ends, closes: [documents], of those that are no bundle; see :class:`Runs`.
        bundles: what each document is; None for an ordinary one.
        link_ids: of one part's links.

    Raises:
        ValueError: a bundle whose prefix and parts are longer than its document.
    """
    pieces: list[np.ndarray] = []
    table: list[tuple[int, ...]] = []  # length, end, closes, doc, origin, role, part
    links = np.asarray(link_ids, dtype=np.int64)
    first = 0
    for doc, (length, bundle) in enumerate(zip(lengths.tolist(), bundles, strict=True)):
        raw = ids[first : first + length]
        first += length
        if bundle is None:
            pieces.append(raw)
            table.append((length, int(ends[doc]), int(closes[doc]), doc, 0, Role.TEXT, 0))
            continue
        if bundle.context > length:
            raise ValueError(
                f"bundles: prefix and parts of document {doc} have {bundle.context} tokens, the document has {length}"
            )
        parts, n = bundle.parts, len(bundle.parts)
        own = [(bundle.prefix, Role.PREFIX, 0), *((part, Role.PART, j + 1) for j, part in enumerate(parts))]
        own += [(len(links), Role.LINK, j + 1) for j in range(n)] + [(length - bundle.context, Role.SUFFIX, n)]
        pieces += [raw[: bundle.context], np.tile(links, n), raw[bundle.context :]]
        origin = 0
        for size, role, part in own:
            is_part = role == Role.PART
            table.append((size, size * is_part, is_part, doc, origin, role, part))
            origin += size
    length, end, closed, *rest = np.ascontiguousarray(np.array(table, dtype=np.int64).reshape(-1, 7).T)
    return Runs(np.concatenate(pieces or [ids]), length, end, closed.astype(np.bool_), *rest)


def unit_of(doc: Tensor, role: Tensor | None, part: Tensor | None) -> Tensor:
    """[B, T] int, equal for neighbouring tokens of one unit: an ordinary document, or a bundle's prefix, one part, or the rest.

    Within a unit attention is that of an ordinary document; only the links and the suffix, one unit together, see others too.
    """
    if role is None:
        return doc
    within = part.long().masked_fill(role >= Role.LINK, -1)
    return doc.long() * (within.shape[1] + 2) + within  # fewer parts than tokens


@dataclass(frozen=True)
class Units:
    """The units of a micro-batch, numbered from 0 within each sample; U is the most that a sample has.

    Attributes:
        number: [B, T] int64, the unit of each token.
        first: [B, U] int64, the first token of each; 0 behind a sample's last unit.
        before: [B, S, U] int32, items of each segment (gist levels from the top, raw tokens) before that token.
    """

    number: Tensor
    first: Tensor
    before: Tensor

    def of_token(self, values: Tensor) -> Tensor:
        """[B, U] -> [B, T]"""
        return values.gather(1, self.number)


def sink_copies(units: Units, raw: Tensor, role: Tensor, sink: int) -> Tensor:
    """How many of each unit's first raw tokens have a sink copy: [B, U] int64. raw: [B] int32, raw tokens of each sample.

    A part's sinks and all of a prefix. The copies of a bundle stand side by side, so they are one range for who sees them all:
    none may stand for a token that is not there.
    """
    begin = units.before[:, -1].long()
    last = units.number[:, -1:]
    index = torch.arange(begin.shape[1], device=begin.device)
    after = torch.where(index < last, begin.roll(-1, 1), raw[:, None])
    of_unit = role.gather(1, units.first)
    room = torch.where(of_unit == Role.PREFIX, after - begin, (after - begin).clamp(max=sink))
    return room.masked_fill((of_unit >= Role.LINK) | (index > last), 0)


def see_parts(
    lo: Tensor, hi: Tensor, units: Units, doc_first: Tensor, role: Tensor, part: Tensor, start: Tensor, copies: Tensor
) -> None:
    """Let links and suffixes see what they read of their bundle's parts.

    Args:
        lo, hi: [B, S + 1, T] int32, the ranges of rows so far; changed in place. The last segment holds sink copies, the one
            before it raw tokens.
        units: of the micro-batch.
        doc_first: [B, T] int64, the first token of each token's document.
        role, part: [B, T] int.
        start: [B, S + 1] int32, the first row of each segment.
        copies: [B, U] int64, the row of each unit's first sink copy.
    """
    link = role == Role.LINK
    reads = link | (role == Role.SUFFIX)
    # The unit of the links and the suffix comes after that of the last part: a link of part j sees what stands before part j + 1.
    last_part = (units.of_token(units.first) - 1).clamp(min=0)
    upto = units.number - (part.gather(1, last_part) - part).masked_fill(~link, 0)
    begin = units.number.gather(1, doc_first)

    def see(segment: int, first: Tensor, last: Tensor) -> None:
        lo[:, segment] = torch.where(reads, first, lo[:, segment])
        hi[:, segment] = torch.where(reads, last, hi[:, segment])

    # Below the top level a suffix sees nothing. That is the level of the bundle's highest gists: where samples of several chunk
    # sizes share a micro-batch, theirs may be lower than others'.
    below = torch.zeros_like(link)
    for s in range(lo.shape[1] - 2):
        rows = units.before[:, s] + start[:, s, None]
        last = rows.gather(1, upto)
        first = rows.gather(1, begin)
        see(s, torch.where(below & ~link, last, first), last)
        below |= first < last
    see(-1, copies.gather(1, begin).int(), copies.gather(1, upto).int())
