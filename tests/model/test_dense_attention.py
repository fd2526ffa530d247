"""Dense attention of packed documents: against a mask, document by document and in one call, padding included."""

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F

from tests.live_memory import LiveMemory
from unfold.model.gist import build_layout
from unfold.model.raw_attention import Documents, _documents_at_once, raw_attention

# Per sample the document of each token; -1 is padding.
SAMPLES = {
    "padded": [[0] * 5 + [1] * 3 + [-1] * 2, [0] * 4 + [-1] * 6],
    "full": [[0] * 3 + [1] * 7, [0] * 10],
    "padding alone": [[-1] * 10, [0] * 9 + [-1]],
}


def problem(name: str):
    doc = torch.tensor(SAMPLES[name])
    layout = build_layout(torch.full_like(doc, -1), doc, None)
    shapes = [(*doc.shape, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, d_out = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    return layout, [q, k, v], d_out.detach()


def by_mask(layout, q, k, v):
    doc, index = layout.doc, torch.arange(layout.doc.shape[1])
    seen = (doc[:, :, None] == doc[:, None]) & (index[:, None] >= index) & (doc >= 0)[:, :, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 8**0.5
    weights = scores.masked_fill(~seen[:, None], -1e30).softmax(-1) * seen[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2))


def assert_same(got, want, leaves, d_out):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad(x, leaves, d_out) for x in (got, want))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SAMPLES)
def test_documents_see_themselves_alone(name):
    layout, leaves, d_out = problem(name)
    assert_same(raw_attention(*leaves, layout), by_mask(layout, *leaves), leaves, d_out)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", SAMPLES)
def test_one_call_is_given_every_document(name, told, monkeypatch):
    """A stand-in for PyTorch's kernel, which runs on GPUs alone; versions differ in whether they are told of fewer key heads."""
    layout, leaves, d_out = problem(name)
    calls = []

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        calls.append((cu_seq_q, max_q))
        assert window_size == (-1, 0) and cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k and max_q == max_k
        parts = zip(*(x.split(cu_seq_q.diff().tolist()) for x in (query, key, value)))
        by_head = [[x.transpose(0, 1)[None] for x in part] for part in parts]
        outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0] for part in by_head]
        return torch.cat([out.transpose(0, 1) for out in outs])

    def attend_told(*args, enable_gqa, **kwargs):
        assert enable_gqa
        return attend(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", attend_told if told else attend)
    flat = [x.flatten(0, 1) for x in leaves]
    got = _documents_at_once(*flat, Documents.of(layout)).view_as(leaves[0])
    assert_same(got, by_mask(layout, *leaves), leaves, d_out)
    ((starts, longest),) = calls
    assert longest == int(starts.diff().max()) and int(starts[-1]) == int((layout.doc >= 0).sum())


def test_no_gradient_is_made_once_per_document():
    """Backward of 64 documents needs as little memory at a time as that of four."""
    peaks = []
    for documents in (4, 64):
        doc = torch.arange(documents).repeat_interleave(256 // documents)[None]
        layout = build_layout(torch.full_like(doc, -1), doc, None)
        leaves = [torch.randn(1, 256, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        with LiveMemory() as memory:
            out = raw_attention(*leaves, layout)
            before, memory.peak = memory.now, 0
            out.sum().backward()
        peaks.append(memory.peak - before)
    whole = sum(x.nbytes for x in leaves)
    assert peaks[1] <= peaks[0] <= 4 * whole
