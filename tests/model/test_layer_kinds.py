"""Dense and window layers beside gist layers: who sees whom, against brute force in fp64, gradients included."""

import itertools

import numpy as np
import pytest
import torch

from tests.kernels.cases import structure
from tests.model.layer_kinds import sees
from tests.model.test_linked import layout_of, make
from unfold.model.gist import GistConfig, build_layout, interleave
from unfold.model.raw_attention import raw_attention

KINDS = ["dense", "window:1", "window:5", "window:16", "window:1000"]
SIZES = [(3,), (4, 2), (2, 3, 2)]


def documents(sizes, sink, own_group=False, padding=3):
    """A micro-batch of two samples of several documents each, with gists and padding; its layout."""
    config = GistConfig(sizes, sink=sink, own_group=own_group)
    rng = np.random.default_rng(len(sizes) + sink)
    level, doc = [], []
    for lengths in ([17, 1, 22], [40]):
        starts = rng.random(30) < 0.6
        made = interleave(rng.integers(0, 30, sum(lengths)), lengths, starts, config, range(30, 30 + len(sizes)))
        level.append(torch.from_numpy(made.level))
        doc.append(torch.from_numpy(made.doc))
    length = max(map(len, level)) + padding
    pad = lambda x: torch.stack([torch.nn.functional.pad(y, (0, length - len(y)), value=-1) for y in x])
    return build_layout(pad(level), pad(doc), config)


def by_mask(mask, q, k, v):
    """mask: bool [B, T, T]"""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[3] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)


def check(layout, kind, sink):
    """raw_attention and its gradients, against masks; of what is no padding."""
    batch, tokens = layout.level.shape
    masks = []
    for sample in range(batch):
        if layout.role is None:
            masks.append(sees(layout.level[sample].tolist(), layout.doc[sample].tolist(), kind, sink))
        else:
            level, doc, role, part = structure(layout, sample)
            masks.append(sees(level, doc, kind, sink, role, part))
    mask = torch.from_numpy(np.stack(masks))
    assert torch.equal(layout.in_layer(kind).intervals.dense_mask(), mask)
    leaves = [torch.randn(batch, tokens, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    there = (layout.doc >= 0)[..., None, None]
    got, want = (x * there for x in (raw_attention(*leaves, layout, kind), by_mask(mask, *leaves)))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    d_out = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(x, leaves, d_out) for x in (got, want))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "sink"), itertools.product(SIZES, (0, 3)), ids=str)
def test_packed_documents(sizes, sink, kind):
    check(documents(sizes, sink, own_group=len(sizes) == 2), kind, sink)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_without_gists_have_no_sinks(kind):
    doc = torch.tensor([[0] * 12 + [1] * 20 + [-1] * 2, [0] * 34])
    check(build_layout(torch.full_like(doc, -1), doc, None), kind, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [GistConfig((3,), sink=2, links=0), GistConfig((4, 2), sink=3, links=2)], ids=["3", "4, 2"])
def test_bundles(config, kind):
    rng = np.random.default_rng(config.links)
    for _ in range(3):
        check(layout_of([make(rng, config)[0] for _ in range(2)], config), kind, config.sink)
