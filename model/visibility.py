"""Who sees whom: what a micro-batch says of it, what each kind of layer does with it, and which layers recall.

The kinds of layers (docs/method.md#which-tokens-and-layers-recall) stand here alone: ``gist`` and ``dense`` are served, each for
the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.route import routing_loss
from unfold.kernels.unfold import recall_attention
from unfold.model.gist import Layout, Recall, dense_layout, recalls_in
from unfold.model.parallel.context import ContextAttention, ContextPart

IGNORED = -100  # label of a position that has no target

# (layer index, q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, D]) -> [B, T, H, D]; rotary applied to q and k.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AddedLosses:
    """What is learned from a micro-batch beside the next token; a weight is that against one token's cross-entropy.

    Attributes:
        z: of the squared log-partition at a token with a target.
        logits: of the divergence of next-token distributions under dense attention from those of the model as it is, at a token
            of ``samples`` with a target (see :mod:`unfold.model.distill`).
        hidden: of the smooth-L1 between layers' outputs under both, per element of a raw token of ``samples``.
        samples: whom dense attention teaches, in order; none: it is not computed.
        sums: each of these losses (without weight), summed over what the rank holds; filled by the forward pass.
    """

    z: float = 0.0
    logits: float = 0.0
    hidden: float = 0.0
    samples: tuple[int, ...] = ()
    sums: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def note(self, name: str, value: Tensor) -> None:
        """Add to one of the sums."""
        self.sums[name] = self.sums.get(name, 0) + value.detach()


@dataclass(frozen=True)
class MicroBatch(Planned):
    """Packed interleaved samples, ready for the model.

    Attributes:
        ids: [B, T] int64 vocabulary ids; padding may hold any valid id.
        labels: [B, T] int64 next raw token at raw tokens, IGNORED elsewhere (gists, padding, a document's last token).
        layout: what follows from where the gists are.
        recall: which tokens unfold chunks, and how; None where none does.
        distilled: samples that learn from dense attention where that is asked for.
        added: what is learned beside the next token; None: nothing.
        host: the same on the host, where this was copied from it.
    """

    ids: Tensor
    labels: Tensor
    layout: Layout
    recall: Recall | None = None
    distilled: tuple[int, ...] = ()
    added: AddedLosses | None = None
    host: MicroBatch | None = field(default=None, repr=False, compare=False)

    @property
    def plans(self) -> dict[Hashable, Any]:
        return self.layout.plans

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on a device: this one, if it is there. Nothing waits for a copy from pinned memory."""
        ids = to_device(self.ids, device)
        if ids is self.ids:
            return self
        labels, layout = to_device(self.labels, device), self.layout.to(device)
        recall, host = self.recall and self.recall.to(device), self if self.device.type == "cpu" else None
        return replace(self, ids=ids, labels=labels, layout=layout, recall=recall, host=host)


def attention_for(kind: str, layout: Layout, recall: Recall | None = None, part: ContextPart | None = None) -> Attend:
    """The attention of a model's layers in one micro-batch.

    Args:
        kind: of the layers, see :class:`MicroBatchAttention`.
        layout, recall: of the whole samples.
        part: of these, what this rank holds; None where every rank has all of them.
    """
    if part is None:
        return MicroBatchAttention(kind, layout, recall)
    return ContextAttention(part, partial(MicroBatchAttention, kind), layout, recall)


@dataclass(frozen=True)
class MicroBatchAttention:
    """Attention among the tokens of one micro-batch, as in training; an :data:`Attend`.

    Attributes:
        kind: of the layers: 'gist' or 'dense'.
        layout: of the micro-batch.
        recall: who unfolds what, None where nothing does.
    """

    kind: str
    layout: Layout
    recall: Recall | None = None

    def recall_in(self, index: int) -> Recall | None:
        """Who unfolds what in one layer."""
        if self.kind != "gist" or self.recall is None or not recalls_in(index, self.recall.first_layer):
            return None
        return self.recall

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "dense":
            return dense_attention(q, k, v, self.layout)
        recall = self.recall_in(index)
        if recall is None:
            return compressed_attention(q, k, v, self.layout.intervals)
        out, read = recall_attention(q, k, v, recall.tree, recall.rule)
        recall.note(index, read)
        routing = recall.routing
        if routing is None or not torch.is_grad_enabled():
            return out
        asking = q.detach().flatten(0, 1).index_select(0, routing.routed.tree.tokens)
        return routing.take(index, routing_loss(asking, k, routing.routed, far=routing.far), out)


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch, of which dense attention makes sequences of their own. P pieces: documents and padding.

    Attributes:
        lengths: of all pieces, in the order of the tokens of all samples.
        real: which of them are documents.
        starts: int32 [documents + 1], where they begin when they stand side by side, and where the last one ends.
        longest: of them.
        places: int64 [tokens of documents], where these stand in the micro-batch; None where there is no padding.
    """

    lengths: tuple[int, ...]
    real: tuple[bool, ...]
    starts: Tensor
    longest: int
    places: Tensor | None

    @classmethod
    def of(cls, layout: Layout) -> Documents:
        """Those of a layout, from which sizes are read."""
        batch, tokens = layout.doc.shape
        lengths, real, done = [], [], 0
        for sample, start, stop in layout.document_spans:
            start, stop = sample * tokens + start, sample * tokens + stop
            if start > done:
                lengths, real = [*lengths, start - done], [*real, False]
            lengths, real, done = [*lengths, stop - start], [*real, True], stop
        if done < batch * tokens:
            lengths, real = [*lengths, batch * tokens - done], [*real, False]
        own = [n for n, is_real in zip(lengths, real) if is_real]
        starts = torch.tensor([0, *own]).cumsum(0).int()
        places = None if all(real) else (layout.doc >= 0).flatten().nonzero()[:, 0]
        return cls(tuple(lengths), tuple(real), starts.to(layout.device), max(own, default=0), places)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document: the baseline. On a GPU in 16 bits one call of PyTorch's flash attention.

    Of a bundle see :func:`unfold.model.gist.dense_layout`. Args and result as
    :func:`unfold.kernels.compressed.compressed_attention`; what padding gets means nothing.
    """
    if layout.role is not None:  # what links and suffixes see is no square
        return compressed_attention(q, k, v, layout.planned("dense", lambda whole: dense_layout(whole).intervals))
    documents = layout.planned("documents", Documents.of)
    flat = [x.flatten(0, 1) for x in (q, k, v)]  # [B * T, H, D]
    # Flash attention takes no batch without a document, and such heads only.
    at_once = q.is_cuda and q.element_size() == 2 and documents.longest and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    attend = _documents_at_once if at_once else _document_by_document
    return attend(*flat, documents).view_as(q)


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Through PyTorch's SDPA. The gradients of all documents are joined once (slices would each make a whole one)."""
    outs = []
    for is_real, *part in zip(documents.real, *(x.split(documents.lengths) for x in (q, k, v))):
        by_head = [x.transpose(0, 1)[None] for x in part]  # [1, H, n, D]
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        outs.append(attend(*by_head)[0].transpose(0, 1) if is_real else torch.zeros_like(part[0]))
    return torch.cat(outs)


def _documents_at_once(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Through PyTorch's attention over sequences of several lengths, which takes 16 bits on a GPU."""
    from torch.nn.attention.varlen import varlen_attn  # here: a CPU run needs none of it

    shape, places = q.shape, documents.places
    if places is not None:
        q, k, v = (x.index_select(0, places) for x in (q, k, v))
    # Before 2.12 it takes fewer key heads without being told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    edges = (documents.starts, documents.starts, documents.longest, documents.longest)
    out = varlen_attn(q, k, v, *edges, window_size=(-1, 0), **grouped)
    return out if places is None else out.new_zeros(shape).index_copy(0, places, out)
