"""Layouts that every attention backend is tested on, small enough for the dense reference."""

from __future__ import annotations

import numpy as np
import torch

from unfold.model.gist import Bundle, GistConfig, Interleaved, Layout, Role, build_layout, interleave

LINKS = 2
# name: (chunk sizes, sink, n_prev, document lengths of each sample, fraction of pieces that start a word, close), then own_group.
# The length of a bundle is that of its prefix, of its parts, and of its suffix; it has LINKS links per part.
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
    "linked": ((4, 2), 3, 1, [[17, (5, (9, 2, 21), 6), 8], [(0, (14, 1, 3, 5), 9), (4, (30,), 3)]], 0.8, False),
    "linked, own group": ((3, 2, 2), 2, 2, [[(7, (13, 26), 5), 11]], 0.7, False, True),
}


def make_layout(name: str, seed: int = 0) -> tuple[Layout, GistConfig]:
    """The layout of a case; shorter samples are padded (document -1) to the longest, plus three."""
    chunk_sizes, sink, n_prev, samples, start_fraction, close, *own_group = CASES[name]
    config = GistConfig(chunk_sizes, sink=sink, n_prev=n_prev, own_group=own_group == [True], links=LINKS)
    rng = np.random.default_rng(seed)
    vocab = 50
    word_starts = rng.random(vocab) < start_fraction
    gist_ids = range(vocab, vocab + len(chunk_sizes))
    link_ids = range(60, 60 + LINKS)
    made = []
    for documents in samples:
        bundles = [None if isinstance(d, int) else Bundle(*d[:2]) for d in documents]
        lengths = [d if bundle is None else bundle.context + d[2] for d, bundle in zip(documents, bundles)]
        ids = rng.integers(0, vocab, sum(lengths))
        made.append(interleave(ids, lengths, word_starts, config, gist_ids, close, bundles=bundles, link_ids=link_ids))
    level, doc, role, part = columns(made, extra=3)
    return build_layout(level, doc, config, role, part), config


def columns(made: list[Interleaved], extra: int = 0) -> tuple:
    """level, doc, role, part of some samples, [B, T], padded to the longest plus ``extra``; the last two None without bundles."""
    length = max(len(s.ids) for s in made) + extra
    out = []
    for name, empty in (("level", -1), ("doc", -1), ("role", 0), ("part", 0)):
        values = [getattr(sample, name) for sample in made]
        if all(v is None for v in values):
            out.append(None)
            continue
        column = torch.full((len(made), length), empty)
        for row, v in zip(column, values):
            if v is not None:
                row[: len(v)] = torch.from_numpy(v)
        out.append(column)
    return tuple(out)


def padded(layout: Layout, config: GistConfig, multiple: int) -> Layout:
    """The layout padded to a multiple of so many tokens."""
    pad = lambda x, empty: x if x is None else torch.nn.functional.pad(x, (0, -x.shape[1] % multiple), value=empty)
    return build_layout(pad(layout.level, -1), pad(layout.doc, -1), config, pad(layout.role, 0), pad(layout.part, 0))


def together(layout: Layout) -> torch.Tensor:
    """bool [B, T, T], whether a query (dim 1) could see a key of that place: of its document; of a part its own part alone."""
    same = layout.doc[:, :, None] == layout.doc[:, None]
    if layout.role is not None:
        same &= (layout.role[:, :, None] != Role.PART) | (layout.part[:, :, None] == layout.part[:, None])
    return same


ROLES = {Role.TEXT: "text", Role.PREFIX: "prefix", Role.PART: "part", Role.LINK: "link", Role.SUFFIX: "suffix"}


def structure(layout: Layout, sample: int) -> tuple[list, ...]:
    """level, doc, role (as words) and part of one sample, as lists; the last two None where there are no bundles."""
    level, doc = layout.level[sample].tolist(), layout.doc[sample].tolist()
    if layout.role is None:
        return level, doc, None, None
    return level, doc, [ROLES[r] for r in layout.role[sample].tolist()], layout.part[sample].tolist()


def random_qkv(layout: Layout, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device="cpu", seed: int = 0):
    """Leaf tensors q, k, v and an upstream gradient for a layout."""
    g = torch.Generator().manual_seed(seed)
    batch, tokens = layout.level.shape
    shapes = [heads, kv_heads, kv_heads, heads]
    q, k, v, d_out = (torch.randn(batch, tokens, h, dim, generator=g, dtype=torch.float64) for h in shapes)
    leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    return (*leaves, d_out.to(device, dtype))
