"""Random micro-batches that recall: layouts, recalling tokens, heads and rules that nobody thought of together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.kernels.cases import columns
from tests.kernels.route_cases import first_raw_rows
from unfold.kernels.route import Routed
from unfold.kernels.select import SelectRule
from unfold.kernels.tree import GistTree
from unfold.model.gist import Bundle, GistConfig, Layout, Role, build_layout, build_recall, interleave

LINKS = 2
GROUPS = (1, 1, 2, 3, 4, 5, 8, 9, 16)  # query heads per KV head


@dataclass(frozen=True)
class RandomCase:
    """A micro-batch of B samples, whose recalling tokens select by a rule; ``routed``: some of them, for the routing loss."""

    layout: Layout
    tree: GistTree
    routed: Routed
    rule: SelectRule
    heads: int
    kv_heads: int
    far: bool

    def draw(self, dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
        """q, k, v and an upstream gradient [B, T, heads, dim]; of odd seeds q, k and v are views with gaps."""
        shape, heads = self.layout.level.shape, (self.heads, self.kv_heads, self.kv_heads, self.heads)
        found = [whole_numbers((*shape, h, dim), 4 * seed + i, dtype) for i, h in enumerate(heads)]
        gap = lambda x: torch.nn.functional.pad(x, (0, 3, 0, 0, 0, 1))[:, :-1, :, :-3]
        return [gap(x) for x in found[:3]] + found[3:] if seed % 2 else found

    def tree_queries(self, q: Tensor) -> Tensor:
        """[B, T, H, D] -> [N, H, D], those that recall."""
        return q.flatten(0, 1)[self.tree.tokens]

    def routed_queries(self, q: Tensor) -> Tensor:
        """[B, T, H, D] -> [M, H, D], those that route."""
        return q.flatten(0, 1)[self.routed.tree.tokens]


def random_case(seed: int, dividing: int = 10**6, by_number: bool = False) -> RandomCase:
    """The case of a seed.

    Args:
        seed: of everything.
        dividing: most query heads per KV head.
        by_number: no top-p, which Triton does not serve.
    """
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]
    levels = pick(1, 2, 2, 3, 4)
    sizes = tuple(int(rng.integers(1 if rng.random() < 0.1 else 2, 10 if level == 0 else 5)) for level in range(levels))
    config = GistConfig(
        sizes, sink=int(rng.integers(0, 6)), n_prev=pick(0, 1, 2, 3, 9), own_group=bool(rng.random() < 0.3), links=LINKS
    )
    made = [_sample(rng, config) for _ in range(pick(1, 1, 2, 3))]
    level, doc, role, part = columns(made, extra=int(rng.integers(0, 4)))
    layout = build_layout(level, doc, config, role, part)
    tree = build_recall(layout, config, _recalling(rng, layout))
    sampled = torch.zeros_like(layout.level, dtype=torch.bool)
    sampled.view(-1)[tree.tokens[torch.from_numpy(rng.random(tree.queries) < 0.3)]] = True
    routing = build_recall(layout, config, sampled)
    rules = [dict(), dict(ratio=1), dict(ratio=1), dict(topk=int(rng.integers(1, 6))), dict(everything=True)]
    rules += [] if by_number else [dict(top_p=float(rng.uniform(0.1, 1)))]
    rule = SelectRule(**dict(ratio=config.ratio, chunk=sizes[0]) | pick(*rules), share=pick("head", "head", "group"))
    kv_heads, group = pick(1, 1, 2, 3), pick(*(g for g in GROUPS if g <= dividing))
    routed = Routed(routing, first_raw_rows(layout, routing.tokens))
    return RandomCase(layout, tree, routed, rule, kv_heads * group, kv_heads, bool(rng.random() < 0.5))


def _sample(rng: np.random.Generator, config: GistConfig):
    """Documents, contexts with a suffix and bundles of any length, one token too."""
    documents, bundles, contexts = [], [], []
    for _ in range(rng.integers(1, 5)):
        contexts.append(-1)
        if rng.random() < 0.25:
            parts = tuple(int(n) for n in rng.integers(1, 25, rng.integers(1, 4)))
            bundle = Bundle(int(rng.integers(0, 9)), parts)
            documents.append(bundle.context + int(rng.integers(1, 12)))
            bundles.append(bundle)
        else:
            documents.append(int(rng.choice([1, 2, 3, *rng.integers(1, 70, 4)])))
            bundles.append(None)
            if rng.random() < 0.3:
                contexts[-1] = int(rng.integers(0, documents[-1] + 1))
    words = rng.random(50) < rng.choice([0.3, 0.7, 1.0])
    gist_ids, link_ids = range(50, 50 + config.levels), range(60, 60 + LINKS)
    ids, close = rng.integers(0, 50, sum(documents)), bool(rng.random() < 0.5)
    return interleave(ids, documents, words, config, gist_ids, close, contexts, bundles, link_ids)


def _recalling(rng: np.random.Generator, layout: Layout) -> Tensor:
    """bool [B, T]: all, none, some here and there, those of one sample, what comes late in every sample, suffixes."""
    every = torch.ones_like(layout.level, dtype=torch.bool)
    some = torch.from_numpy(rng.random(tuple(layout.level.shape)) < rng.choice([0.02, 0.2, 0.5]))
    late = torch.arange(layout.level.shape[1]).expand_as(every) > layout.level.shape[1] * rng.random()
    one = (torch.arange(len(every)) == rng.integers(len(every)))[:, None].expand_as(every)
    suffix = every if layout.role is None else layout.role == Role.SUFFIX
    choices = [every, every, some, some & one, one, late, suffix, late & ~one, ~every]
    return choices[rng.integers(len(choices))].clone()


def whole_numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose products every order of sums gives exactly."""
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, leaves: list[Tensor], d_out: Tensor | None = None) -> list[Tensor]:
    """What a function gives, and its gradients; zeros where it does not depend on a leaf."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    if not out.requires_grad:
        return [out, *map(torch.zeros_like, leaves)]
    found = torch.autograd.grad(out, leaves, d_out, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found))]
