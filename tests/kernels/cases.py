"""Layouts that every attention backend is tested on, small enough for the dense reference."""

from __future__ import annotations

import numpy as np
import torch

from unfold.model.gist import GistConfig, Layout, build_layout, interleave

# name: (chunk sizes, sink, n_prev, document lengths of each sample, fraction of pieces that start a word, close), then own_group
CASES = {
    "one level": ((8,), 3, 1, [[97]], 1.0, False),
    "two levels": ((4, 3), 3, 1, [[131]], 1.0, False),
    "three levels": ((3, 2, 2), 2, 1, [[150]], 1.0, False),
    "four levels": ((2, 2, 2, 2), 1, 2, [[90]], 0.6, False),
    "jittered chunks": ((8, 4), 3, 1, [[201]], 0.5, False),
    "packed documents": ((4, 2), 3, 1, [[40, 1, 63, 2, 30], [7, 90, 11]], 0.7, False),
    "shorter than the sink": ((4, 2), 5, 1, [[3, 2, 4, 1]], 1.0, False),
    "shorter than a chunk": ((32, 2), 3, 1, [[20, 17, 9]], 1.0, False),
    "no gist at all": ((64,), 3, 1, [[50]], 1.0, False),
    "no sink": ((4, 2), 0, 1, [[60, 20]], 0.8, False),
    "no neighbour": ((4, 2), 3, 0, [[70, 33]], 0.8, False),
    "wide window": ((4, 2), 3, 5, [[120]], 0.8, False),
    "closed context": ((4, 3, 2), 3, 1, [[61, 5, 2], [37, 20]], 0.7, True),
    "chunk of one": ((1, 2), 1, 1, [[40]], 1.0, False),
    "single token": ((4, 2), 3, 1, [[1]], 1.0, False),
    "own group, one level": ((6,), 3, 2, [[80, 19]], 0.7, False, True),
    "own group, closed context": ((4, 3, 2), 5, 1, [[75, 4, 9], [37, 20]], 0.7, True, True),
}


def make_layout(name: str, seed: int = 0) -> tuple[Layout, GistConfig]:
    """The layout of a case; shorter samples are padded (document -1) to the longest, plus three."""
    chunk_sizes, sink, n_prev, samples, start_fraction, close, *own_group = CASES[name]
    config = GistConfig(chunk_sizes, sink=sink, n_prev=n_prev, own_group=own_group == [True])
    rng = np.random.default_rng(seed)
    vocab = 50
    word_starts = rng.random(vocab) < start_fraction
    gist_ids = range(vocab, vocab + len(chunk_sizes))
    made = [interleave(rng.integers(0, vocab, sum(d)), d, word_starts, config, gist_ids, close) for d in samples]
    length = max(len(s.ids) for s in made) + 3
    level, doc = (torch.full((len(made), length), -1) for _ in range(2))
    for i, sample in enumerate(made):
        level[i, : len(sample.level)] = torch.from_numpy(sample.level)
        doc[i, : len(sample.doc)] = torch.from_numpy(sample.doc)
    return build_layout(level, doc, config), config


def random_qkv(layout: Layout, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device="cpu", seed: int = 0):
    """Leaf tensors q, k, v and an upstream gradient for a layout."""
    g = torch.Generator().manual_seed(seed)
    batch, tokens = layout.level.shape
    shapes = [heads, kv_heads, kv_heads, heads]
    q, k, v, d_out = (torch.randn(batch, tokens, h, dim, generator=g, dtype=torch.float64) for h in shapes)
    leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    return (*leaves, d_out.to(device, dtype))
