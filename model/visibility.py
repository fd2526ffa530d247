"""Who sees whom: what a micro-batch says of it, what each kind of layer does with it, and which layers recall."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unfold.kernels.common.plans import Planned, to_device
from unfold.kernels.compressed import compressed_attention, prepare_compressed
from unfold.kernels.route import prepare_routing, routing_loss
from unfold.kernels.unfold import prepare_recall, recall_attention
from unfold.model.gist import Layout, Recall, recalls_in
from unfold.model.kinds import Kinds, kind_of
from unfold.model.parallel.context import ContextAttention, ContextPart
from unfold.model.raw_attention import prepare_raw, raw_attention

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
        apart: under which name each sample's cross-entropy is summed apart, as ``loss.NAME``, and its tokens with a target are
            counted, as ``tokens.NAME``; none: nothing is.
        sums: each of these losses (without weight), summed over what the rank holds; filled by the forward pass.
    """

    z: float = 0.0
    logits: float = 0.0
    hidden: float = 0.0
    samples: tuple[int, ...] = ()
    apart: tuple[str, ...] = ()
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
        drawn: the chunk sizes that each sample drew, as metrics name them; none where nothing was drawn.
        added: what is learned beside the next token; None: nothing.
        host: the same on the host, where this was copied from it.
    """

    ids: Tensor
    labels: Tensor
    layout: Layout
    recall: Recall | None = None
    distilled: tuple[int, ...] = ()
    drawn: tuple[str, ...] = ()
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


def attention_for(
    kinds: Kinds, layout: Layout, recall: Recall | None = None, part: ContextPart | None = None
) -> MicroBatchAttention | ContextAttention:
    """The attention of a model's layers in one micro-batch.

    Args:
        kinds: of the layers, see :class:`MicroBatchAttention`.
        layout, recall: of the whole samples.
        part: of these, what this rank holds; None where every rank has all of them.
    """
    if part is None:
        return MicroBatchAttention(kinds, layout, recall)
    # Where keys are exchanged a layer's layout is that of its kind already.
    here = "gist" if part.context.exchanges else kinds
    return ContextAttention(part, partial(MicroBatchAttention, here), layout, recall, kinds)


@dataclass(frozen=True)
class MicroBatchAttention:
    """Attention among the tokens of one micro-batch, as in training; an :data:`Attend`.

    Attributes:
        kinds: of the layers (:mod:`unfold.model.kinds`).
        layout: of the micro-batch.
        recall: who unfolds what, None where nothing does.
    """

    kinds: Kinds
    layout: Layout
    recall: Recall | None = None

    def recall_in(self, index: int) -> Recall | None:
        """Who unfolds what in one layer."""
        kind, recall = kind_of(self.kinds, index), self.recall
        return recall if recall is not None and recalls_in(index, recall.first_layer, kind) else None

    def layout_in(self, index: int) -> Layout:
        """What the tokens see in one layer, those that recall aside."""
        return self.layout.in_layer(kind_of(self.kinds, index))

    def prepare(self, index: int, q: Tensor, k: Tensor, *, backward: bool = True) -> None:
        """Make ahead the plans that a layer will ask for, on the host of the GPU that it runs on, say.

        q, k: [.., H, D] and [.., Hkv, D] of any number of tokens, on the layer's device; backward: whether in a training step.
        """
        kind, recall = kind_of(self.kinds, index), self.recall_in(index)
        if kind != "gist":
            prepare_raw(q, k, self.layout, kind, backward=backward)
        elif recall is None:
            prepare_compressed(q, k, self.layout.intervals, backward=backward)
        else:
            prepare_recall(q, k, recall.tree, recall.rule)
            if recall.routing is not None:
                prepare_routing(q, k, recall.routing.routed)

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = kind_of(self.kinds, index)
        if kind != "gist":
            return raw_attention(q, k, v, self.layout, kind)
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
