"""Recalling micro-batches that selection and unfolding are tested on, small enough for plain loops."""

from __future__ import annotations

import dataclasses

import torch

from tests import rules
from tests.kernels.cases import CASES, make_layout, random_qkv
from unfold.kernels.select import SelectRule
from unfold.kernels.tree import GistTree
from unfold.model.gist import GistConfig, Layout, Role, build_layout, build_recall

# name: (chunk sizes, sink, n_prev, (context, suffix) tokens of each document of each sample)
SUFFIX_CASES = {
    "suffix": ((4, 2), 3, 1, [[(61, 12)]]),
    "suffixes of packed documents": ((3, 2, 2), 2, 1, [[(40, 7), (5, 3), (30, 9)], [(70, 20)]]),
    "suffix longer than a chunk": ((4,), 3, 1, [[(50, 30)]]),
    "suffix without context": ((4, 2), 3, 1, [[(0, 9), (0, 30), (20, 5)]]),
    "context shorter than a chunk": ((8, 2), 3, 1, [[(2, 9), (7, 4)]]),
    "context shorter than the sink": ((4, 2), 3, 0, [[(1, 12), (2, 1)]]),
    "short suffixes of two samples": ((3, 2), 2, 1, [[(20, 4), (9, 3)], [(14, 5)]]),
    "no suffix": ((4, 2), 3, 1, [[(30, 0), (20, 0)], [(51, 3)]]),
    "suffix of linked parts": "linked",  # of CASES
    "suffix of linked parts, three levels": "linked, own group",
}

RULES = {
    "adaptive": dict(),
    "adaptive, small ratio": dict(ratio=1),
    "fixed": dict(topk=2),
    "everything": dict(topk=10**6),
    "top-p": dict(top_p=0.6),
    "unfold all": dict(topk=1, everything=True),
}


def suffix_layout(name: str) -> tuple[Layout, GistConfig, torch.Tensor]:
    """A case of contexts closed at every level, each followed by a suffix without gists: layout, config, bool [B, T]."""
    if isinstance(SUFFIX_CASES[name], str):
        layout, config = make_layout(SUFFIX_CASES[name])
        return layout, dataclasses.replace(config, recall="suffix"), layout.role == Role.SUFFIX
    chunk_sizes, sink, n_prev, samples = SUFFIX_CASES[name]
    columns = []
    for documents in samples:
        level, doc, suffix = [], [], []
        for number, (context, after) in enumerate(documents):
            gists = list(range(len(chunk_sizes)))
            closed = rules.insert_gists([0] * context, [context], [True], chunk_sizes, sink, gists, close=True)[1]
            level += closed + [-1] * after
            doc += [number] * (len(closed) + after)
            suffix += [False] * len(closed) + [True] * after
        columns.append((level, doc, suffix))
    length = max(len(level) for level, _, _ in columns) + 2
    level, doc, suffix = (
        torch.tensor([c[i] + [empty] * (length - len(c[i])) for c in columns]) for i, empty in enumerate((-1, -1, False))
    )
    config = GistConfig(chunk_sizes, sink=sink, n_prev=n_prev, recall="suffix")
    return build_layout(level, doc, config), config, suffix


def make_recall(name: str) -> tuple[Layout, GistConfig, GistTree]:
    """A case of either kind: in those of plain text every raw token recalls."""
    if name in SUFFIX_CASES:
        layout, config, recalls = suffix_layout(name)
    else:
        layout, config = make_layout(name)
        recalls = torch.ones_like(layout.level, dtype=torch.bool)
    return layout, config, build_recall(layout, config, recalls)


def make_rule(name: str, config: GistConfig, share: str) -> SelectRule:
    return SelectRule(**(dict(ratio=config.ratio, chunk=config.chunk_sizes[0]) | RULES[name]), share=share)


def recalling(q: torch.Tensor, tree: GistTree) -> torch.Tensor:
    """[B, T, H, D] -> [N, H, D]"""
    return q.flatten(0, 1)[tree.tokens]


__all__ = ["CASES", "RULES", "SUFFIX_CASES", "make_recall", "make_rule", "random_qkv", "recalling", "suffix_layout"]
