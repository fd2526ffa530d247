"""Recalling micro-batches that selection and unfolding are tested on, small enough for plain loops."""

from __future__ import annotations

import dataclasses

import torch

from tests import rules
from tests.kernels.cases import CASES, make_layout, random_qkv
from unfold.kernels.common.plans import moved as moved_to
from unfold.kernels.select import SelectRule, select_gists
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold import recall_stats, unfold_attention
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


def set_apart(tree: GistTree) -> tuple[GistTree, torch.Tensor]:
    """The tree with every chunk apart that lies in no query's window, the last one first; their tokens, [F] ``b * T + token``."""
    others, levels = tree.others, tree.levels
    child_lo, child_hi, apart = tree.child_lo.clone(), tree.child_hi.clone(), []
    for b in reversed(range(others.batch)):
        first, last = others.segment_start[b, levels - 1 : levels + 1].tolist()
        at = slice(*tree.splits[b : b + 2])
        for gist in reversed(range(first, last)):
            lo, hi = int(tree.child_lo[b, gist]), int(tree.child_hi[b, gist])
            if not ((tree.lo[levels, at] < hi) & (tree.hi[levels, at] > lo)).any():
                child_lo[b, gist] = (others.batch - b) * others.rows.shape[1] + len(apart)
                child_hi[b, gist] = child_lo[b, gist] + hi - lo
                apart += (others.rows[b, lo:hi] + b * others.tokens).tolist()
    return dataclasses.replace(tree, child_lo=child_lo, child_hi=child_hi), torch.tensor(apart, dtype=torch.int64)


def check_apart(name: str, backend: str, dim: int, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    """A case with chunks that stand apart, whose tokens then hold something else, against the same as it is."""
    layout, config, tree = make_recall(name)
    q, k, v, d_out = random_qkv(layout, 4, 2, dim, dtype)
    q, d_out = recalling(q.detach(), tree), recalling(d_out, tree)
    selection = select_gists(q, k, tree, make_rule("adaptive, small ratio", config, "head"), backend="cpu")
    moved, tokens = set_apart(tree)
    apart = [x.detach().flatten(0, 1)[tokens] for x in (k, v)]
    others = [x.detach().flatten(0, 1).index_fill(0, tokens, 3.0).view_as(x) for x in (k, v)]
    tree, moved, selection, tokens, d_out = moved_to((tree, moved, selection, tokens, d_out), device)
    whole, parts = ([x.detach().to(device).requires_grad_() for x in leaves] for leaves in ((q, k, v), (q, *others, *apart)))
    want = unfold_attention(*whole, tree, selection, backend=backend)
    got = unfold_attention(*parts[:3], moved, selection, apart=tuple(parts[3:]), backend=backend)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    grads = torch.autograd.grad(want, whole, d_out), torch.autograd.grad(got, parts, d_out)
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=tolerance, rtol=0)
    for x, here, there in zip(grads[0][1:], grads[1][1:3], grads[1][3:]):
        torch.testing.assert_close(here.flatten(0, 1).index_add(0, tokens, there), x.flatten(0, 1), atol=tolerance, rtol=0)
    if tree.queries and backend != "triton":
        assert recall_stats(moved, selection).unfolded == recall_stats(tree, selection).unfolded


def make_rule(name: str, config: GistConfig, share: str) -> SelectRule:
    return SelectRule(**(dict(ratio=config.ratio, chunk=config.chunk_sizes[0]) | RULES[name]), share=share)


def recalling(q: torch.Tensor, tree: GistTree) -> torch.Tensor:
    """[B, T, H, D] -> [N, H, D]"""
    return q.flatten(0, 1)[tree.tokens]


__all__ = [
    "CASES",
    "RULES",
    "SUFFIX_CASES",
    "check_apart",
    "make_recall",
    "make_rule",
    "random_qkv",
    "recalling",
    "suffix_layout",
]
