"""Which plans of micro-batches are made, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import make_layout, padded
from unfold.kernels.common.plans import Planned
from unfold.model.config import ModelConfig
from unfold.model.gist import Recall
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.model.layers import BuildContext
from unfold.model.parallel.context import ContextParallel
from unfold.model.recompute import Recompute
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch

# Views of what is there, and one count of rows: neither is worth a copy.
TRIFLES = ("bounds of open gists", "every row")


class Made:
    """Notes whatever is made from here on, copies of what is on the host left out.

    Attributes:
        keys: of what was made, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.keys: list = []
        memo = Planned.memo

        def noting(record, key, make):
            ready = record.host is not None and key in record.host.plans
            if key not in record.plans and not ready and key not in TRIFLES:
                self.keys.append(key)
            return memo(record, key, make)

        monkeypatch.setattr(Planned, "memo", noting)

    def take(self) -> list[str]:
        """What was made since, sorted."""
        taken, self.keys[:] = sorted(map(repr, self.keys)), []
        return taken


def make_batch(
    recall: str = "", distilled: tuple[int, ...] = (), case: str = "packed documents", multiple: int = 1
) -> MicroBatch:
    """recall: '', 'some', 'routed' or 'wide' (some tokens unfold everything); case: of the layout."""
    layout, config = make_layout(case)
    layout = padded(layout, config, multiple)
    g = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 128, layout.level.shape, generator=g) for _ in range(2))
    drawn = torch.rand(layout.level.shape, generator=g)
    flags = (drawn < 0.6).int() * RECALLS
    if recall == "routed":
        flags += (drawn < 0.3).int() * ROUTES
    if recall == "wide":
        flags += (drawn < 0.2).int() * UNFOLDS_ALL
    found = Recall.from_flags(layout, config, flags, route_scale=0.1) if recall else None
    return MicroBatch(ids, labels.masked_fill(~layout.text, IGNORED), layout, found, distilled)


def with_losses(batch: MicroBatch) -> MicroBatch:
    """As a step has it."""
    return replace(batch, added=AddedLosses(logits=0.5, hidden=0.5, samples=batch.distilled)) if batch.distilled else batch


def make_model(kinds: tuple[str, ...], checkpointing: str = "none", context: ContextParallel | None = None) -> Transformer:
    """Three layers, heads of 64; two KV heads, so that two ranks can trade them."""
    attention = "gist" if "gist" in kinds else "dense"
    sizes = dict(hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=64, ffn_size=96)
    config = ModelConfig(128, **sizes, attention=attention, layer_attention=kinds if len(kinds) > 1 else ())
    build = replace(BuildContext.alone(3), recompute=Recompute(checkpointing), context=context)
    return Transformer(config, build).train()
