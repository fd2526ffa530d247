"""Attention of dense and window layers: raw tokens see raw tokens, through flash attention; gists are taken care of apart."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.compressed import compressed_attention, prepare_compressed
from unfold.kernels.intervals import Intervals
from unfold.model.gist import Layout
from unfold.model.kinds import window_of


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch, of which dense attention makes sequences of their own. P pieces: documents and padding.

    Attributes:
        lengths: of all pieces, in the order of the tokens of all samples; where there are gists, of documents' raw tokens alone.
        real: which of them are documents.
        starts: int32 [documents + 1], where they begin when they stand side by side, and where the last one ends.
        longest: of them.
        places: int64 [tokens of documents], where these stand in the micro-batch, or in the order of ``gists``; None where there
            is nothing between them.
        gists: how these attend; None where there are none.
        first: of a sample with gists the place from which on its documents' raw tokens stand side by side; None: they do not.
    """

    lengths: tuple[int, ...]
    real: tuple[bool, ...]
    starts: Tensor
    longest: int
    places: Tensor | None
    gists: GistsApart | None = None
    first: int | None = None

    @classmethod
    def of(cls, layout: Layout) -> Documents:
        """Those of a layout, from which sizes are read."""
        if bool((layout.level >= 0).any()):
            return cls._beside_gists(layout)
        batch, tokens = layout.doc.shape
        lengths, real, done = [], [], 0
        for sample, start, stop in layout.document_spans:
            start, stop = sample * tokens + start, sample * tokens + stop
            if start > done:
                lengths, real = [*lengths, start - done], [*real, False]
            lengths, real, done = [*lengths, stop - start], [*real, True], stop
        if done < batch * tokens:
            lengths, real = [*lengths, batch * tokens - done], [*real, False]
        places = None if all(real) else (layout.doc >= 0).flatten().nonzero()[:, 0]
        return cls._with_lengths(layout, lengths, real, places)

    @classmethod
    def _beside_gists(cls, layout: Layout) -> Documents:
        raw = layout.level < 0
        lengths = [int(raw[sample, start:stop].sum()) for sample, start, stop in layout.document_spans]
        apart = GistsApart.of(layout)
        there = (raw & (layout.doc >= 0)).flatten()
        places = there.index_select(0, apart.order).nonzero()[:, 0]
        side_by_side = len(places) > 0 and int(places[-1] - places[0]) + 1 == len(places)
        first = int(places[0]) if side_by_side else None
        return cls._with_lengths(layout, lengths, [True] * len(lengths), places, apart, first)

    def raw(self, x: Tensor) -> Tensor:
        """Of [B * T, H, D] in the order of ``gists`` the raw tokens of documents: a view, if they stand side by side."""
        return x.index_select(0, self.places) if self.first is None else x.narrow(0, self.first, len(self.places))

    @classmethod
    def _with_lengths(cls, layout: Layout, lengths: list[int], real: list[bool], *rest) -> Documents:
        own = [n for n, is_real in zip(lengths, real) if is_real]
        starts = torch.tensor([0, *own]).cumsum(0).int()
        return cls(tuple(lengths), tuple(real), starts.to(layout.device), max(own, default=0), *rest)


@dataclass(frozen=True)
class GistsApart:
    """The tokens of a micro-batch in another order: of each sample first its gists, so that blocks of queries hold them alone.

    Attributes:
        order: int64 [B * T], the token in each place.
        found: int64 [B * T], where each token's output lies: in those of all places, then those of documents' raw tokens.
        intervals: of the samples in that order, where only gists see anything: raw tokens of their document before them, and
            themselves.
    """

    order: Tensor
    found: Tensor
    intervals: Intervals

    @classmethod
    def of(cls, layout: Layout) -> GistsApart:
        seen = layout.in_layer("dense").intervals
        batch, tokens = layout.level.shape
        order = (layout.level < 0).int().argsort(dim=1, stable=True)
        place = order.argsort(1)
        asks = (layout.level >= 0)[:, None]
        # Rows behind all others: there, who sees nothing keeps no block of keys from being seen by all who stand before.
        beyond = seen.rows.shape[1]
        bounds = (x.masked_fill(~asks, beyond) for x in (seen.lo, seen.hi))
        lo, hi = (x.gather(2, order[:, None].expand_as(x)).contiguous() for x in bounds)
        rows, row_of = place.gather(1, seen.rows), seen.row_of.gather(1, order)
        intervals = replace(seen, rows=rows, row_of=row_of, lo=lo, hi=hi, plans={}, host=None)
        first = torch.arange(batch, device=order.device)[:, None] * tokens
        flat, raw = (order + first).flatten(), ((layout.level < 0) & (layout.doc >= 0)).flatten()
        number = torch.empty_like(flat)
        number[flat] = raw[flat].cumsum(0) - 1  # among documents' raw tokens, in the order in which they attend
        return cls(flat, torch.where(raw, batch * tokens + number, (place + first).flatten()), intervals)


def raw_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, kind: str = "dense") -> Tensor:
    """Attention in layers of a kind that is not ``gist`` (:func:`unfold.model.gist.layout.raw_layout` tells who sees whom).

    Raw tokens of a document attend through PyTorch's flash attention: on a GPU in 16 bits all documents in one call. Gists attend
    over ranges of keys, as everywhere; so do bundles, whose links and suffixes see no square, and windows beside sinks.
    Args and result as :func:`unfold.kernels.compressed.compressed_attention`; what padding gets means nothing.
    """
    way = _way(q, layout, kind)
    if isinstance(way, Intervals):
        return compressed_attention(q, k, v, way)
    documents, at_once, window = way
    flat = [x.flatten(0, 1) for x in (q, k, v)]  # [B * T, H, D]
    attend = partial(_documents_at_once, window=window) if at_once else _document_by_document
    if documents.gists is None:
        return attend(*flat, documents).view_as(q)
    return _with_gists(*flat, documents, attend, q.shape)


def prepare_raw(q: Tensor, k: Tensor, layout: Layout, kind: str, *, backward: bool = True) -> None:
    """Make ahead the plans that :func:`raw_attention` will ask this layout for; arguments as of
    :func:`unfold.kernels.compressed.prepare_compressed`."""
    way = _way(q, layout, kind)
    if isinstance(way, Intervals):
        prepare_compressed(q, k, way, backward=backward)
    elif (apart := way[0].gists) is not None:
        prepare_compressed(q, k, apart.intervals, backward=backward)


def _way(q: Tensor, layout: Layout, kind: str) -> Intervals | tuple[Documents, bool, int | None]:
    """How layers of a kind attend: over ranges of keys, or by documents, whether by all at once, and with which window."""
    documents = layout.planned("documents", Documents.of)
    window = window_of(kind)
    if window is not None and documents.longest <= window:  # all of every document
        kind, window = "dense", None
    # Flash attention takes no batch without a document, and such heads only.
    at_once = q.is_cuda and q.element_size() == 2 and documents.longest and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if layout.role is not None or window is not None and (layout.sink or documents.gists or not at_once):
        return layout.in_layer(kind).intervals
    return documents, bool(at_once), window


def _with_gists(q: Tensor, k: Tensor, v: Tensor, documents: Documents, attend, shape: torch.Size) -> Tensor:
    """q, k, v: [B * T, H, D]; shape: [B, T, H, D], also that of the result."""
    apart = documents.gists
    q, k, v = (x.index_select(0, apart.order) for x in (q, k, v))
    batched = [x.view(*shape[:2], *x.shape[1:]) for x in (q, k, v)]
    out = compressed_attention(*batched, apart.intervals).flatten(0, 1)
    raw = attend(*map(documents.raw, (q, k, v)), replace(documents, places=None))
    return torch.cat([out, raw]).index_select(0, apart.found).view(shape)


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Through PyTorch's SDPA. The gradients of all documents are joined once (slices would each make a whole one)."""
    outs = []
    for is_real, *part in zip(documents.real, *(x.split(documents.lengths) for x in (q, k, v))):
        by_head = [x.transpose(0, 1)[None] for x in part]  # [1, H, n, D]
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        outs.append(attend(*by_head)[0].transpose(0, 1) if is_real else torch.zeros_like(part[0]))
    return torch.cat(outs)


def _documents_at_once(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """Through PyTorch's attention over sequences of several lengths, which takes 16 bits on a GPU.

    window: how many of the last tokens each sees, itself included; None: all.
    """
    from torch.nn.attention.varlen import varlen_attn  # here: a CPU run needs none of it

    shape, places = q.shape, documents.places
    if places is not None:
        q, k, v = (x.index_select(0, places) for x in (q, k, v))
    # Before 2.12 it takes fewer key heads without being told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    edges = (documents.starts, documents.starts, documents.longest, documents.longest)
    reach = -1 if window is None else window - 1  # tokens before its own
    out = varlen_attn(q, k, v, *edges, window_size=(reach, 0), **grouped)
    return out if places is None else out.new_zeros(shape).index_copy(0, places, out)
