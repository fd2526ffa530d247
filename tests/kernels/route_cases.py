"""Sampled queries of small micro-batches that the routing loss is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.cases import CASES, padded, structure
from tests.kernels.recall_cases import SUFFIX_CASES, make_layout, random_qkv, suffix_layout
from unfold.kernels.route import Routed
from unfold.model.gist import Layout, build_recall

ALL = [*CASES, *SUFFIX_CASES]


def first_raw_rows(layout: Layout, tokens: Tensor) -> Tensor:
    """[M] int32, the row of the first token (it is raw) of what each token reads. tokens: [M] int64, sample * T + token."""
    first = []
    for sample, token in (divmod(t, layout.level.shape[1]) for t in tokens.tolist()):
        _, doc, role, part = structure(layout, sample)
        own = lambda j: role is None or role[token] == "suffix" or (role[j], part[j]) == (role[token], part[token])  # noqa: B023
        start = next(j for j in range(token + 1) if doc[j] == doc[token] and own(j))
        first.append(int(layout.intervals.row_of[sample, start]))
    return torch.tensor(first, dtype=torch.int32)


def make_routed(name: str, share: float = 0.3, multiple: int = 1, seed: int = 0) -> tuple[Layout, Routed]:
    """A case of either kind, padded to a multiple of tokens, of whose recalling queries about a share is sampled."""
    if name in SUFFIX_CASES:
        layout, config, recalls = suffix_layout(name)
    else:
        layout, config = make_layout(name)
        recalls = layout.doc >= 0
    layout = padded(layout, config, multiple)
    pad = lambda x, empty: torch.nn.functional.pad(x, (0, -x.shape[1] % multiple), value=empty)
    sampled = torch.rand(recalls.shape, generator=torch.Generator().manual_seed(seed)) < share
    tree = build_recall(layout, config, pad(recalls & sampled, False))
    return layout, Routed(tree, first_raw_rows(layout, tree.tokens))


def queries_and_keys(layout: Layout, routed: Routed, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
    """q [M, H, D], and k [B, T, Hkv, D] as a leaf."""
    q, k, *_ = random_qkv(layout, heads, kv_heads, dim, dtype, seed=seed)
    return 2 * q.detach().flatten(0, 1)[routed.tree.tokens], k
