"""Who sees whom: what a micro-batch says of it, what each kind of layer does with it, and which layers recall.

The kinds of layers (docs/method.md#which-tokens-and-layers-recall) stand here alone: ``gist`` and ``dense`` are served, each for
the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.compressed import compressed_attention
from unfold.kernels.route import routing_loss
from unfold.kernels.unfold import recall_attention
from unfold.model.gist import Layout, Recall, dense_layout, recalls_in
from unfold.model.parallel.context import ContextAttention, ContextParallel

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
class MicroBatch:
    """Packed interleaved samples, ready for the model.

    Attributes:
        ids: [B, T] int64 vocabulary ids; padding may hold any valid id.
        labels: [B, T] int64 next raw token at raw tokens, IGNORED elsewhere (gists, padding, a document's last token).
        layout: what follows from where the gists are.
        recall: which tokens unfold chunks, and how; None where none does.
        distilled: samples that learn from dense attention where that is asked for.
        added: what is learned beside the next token; None: nothing.
    """

    ids: Tensor
    labels: Tensor
    layout: Layout
    recall: Recall | None = None
    distilled: tuple[int, ...] = ()
    added: AddedLosses | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        move = lambda x: x.to(device, non_blocking=True)
        recall = self.recall and self.recall.to(device)
        return replace(self, ids=move(self.ids), labels=move(self.labels), layout=self.layout.to(device), recall=recall)


def attention_for(
    kind: str, layout: Layout, recall: Recall | None = None, context: ContextParallel | None = None
) -> Attend:
    """The attention of a model's layers in one micro-batch.

    Args:
        kind: of the layers, see :class:`MicroBatchAttention`.
        layout, recall: of the whole samples.
        context: how these are spread over ranks; None where every rank has all of them.
    """
    if context is None:
        return MicroBatchAttention(kind, layout, recall)
    return ContextAttention(context, partial(MicroBatchAttention, kind), layout, recall)


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


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document, through PyTorch's SDPA (flash where it can): the baseline.

    Of a bundle see :func:`unfold.model.gist.dense_layout`. Args and result as
    :func:`unfold.kernels.compressed.compressed_attention`; what padding gets means nothing.
    """
    if layout.role is not None:  # what links and suffixes see is no square
        seen = layout.intervals.memo("dense", lambda: dense_layout(layout).intervals)
        return compressed_attention(q, k, v, seen)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    out = torch.zeros_like(q)
    for sample, start, stop in layout.document_spans:
        part = [x[sample : sample + 1, :, start:stop] for x in (q, k, v)]
        out[sample, :, start:stop] = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0]
    return out.transpose(1, 2)
