"""Sampled queries of small micro-batches that the routing loss is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.cases import CASES
from tests.kernels.recall_cases import SUFFIX_CASES, make_layout, random_qkv, suffix_layout
from unfold.kernels.route import Routed
from unfold.model.gist import Layout, build_layout, build_recall

ALL = [*CASES, *SUFFIX_CASES]


def first_raw_rows(layout: Layout, tokens: Tensor) -> Tensor:
    """[M] int32, the row of the first token (it is raw) of each token's document. tokens: [M] int64, sample * T + token."""
    doc = layout.doc
    index = torch.arange(doc.shape[1]).expand_as(doc)
    is_first = torch.ones_like(doc, dtype=torch.bool)
    is_first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    start = index.masked_fill(~is_first, 0).cummax(1).values
    return layout.intervals.row_of.gather(1, start).flatten()[tokens].int()


def make_routed(name: str, share: float = 0.3, multiple: int = 1, seed: int = 0) -> tuple[Layout, Routed]:
    """A case of either kind, padded to a multiple of tokens, of whose recalling queries about a share is sampled."""
    if name in SUFFIX_CASES:
        layout, config, recalls = suffix_layout(name)
    else:
        layout, config = make_layout(name)
        recalls = layout.doc >= 0
    pad = lambda x, empty: torch.nn.functional.pad(x, (0, -x.shape[1] % multiple), value=empty)
    layout = build_layout(pad(layout.level, -1), pad(layout.doc, -1), config)
    sampled = torch.rand(recalls.shape, generator=torch.Generator().manual_seed(seed)) < share
    tree = build_recall(layout, config, pad(recalls & sampled, False))
    return layout, Routed(tree, first_raw_rows(layout, tree.tokens))


def queries_and_keys(layout: Layout, routed: Routed, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
    """q [M, H, D], and k [B, T, Hkv, D] as a leaf."""
    q, k, *_ = random_qkv(layout, heads, kv_heads, dim, dtype, seed=seed)
    return 2 * q.detach().flatten(0, 1)[routed.tree.tokens], k
