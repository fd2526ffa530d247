"""Learning from dense attention against a plain computation of it, fp64: who sees whom, losses, gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cases import CASES, make_layout, together
from unfold.model.config import ModelConfig
from unfold.model.gist import build_layout, raw_layout
from unfold.model.layers import BuildContext
from unfold.model.recompute import Recompute
from unfold.model.transformer import Transformer
from unfold.model.visibility import IGNORED, AddedLosses, MicroBatch, MicroBatchAttention

CONFIG = ModelConfig(128, hidden_size=32, layers=3, heads=4, kv_heads=2, ffn_size=48, tied_embeddings=False)
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", CASES)
def test_raw_tokens_see_all_raw_tokens_and_gists_themselves(name):
    layout, _ = make_layout(name)
    raw = (layout.level < 0) & (layout.doc >= 0)
    token = torch.arange(raw.shape[1])
    causal = (token[:, None] >= token) & together(layout)
    want = causal & raw[:, :, None] & raw[:, None] | torch.eye(len(token), dtype=torch.bool)
    dense = raw_layout(layout, gists=False)
    assert torch.equal(dense.intervals.dense_mask(), want)
    last = torch.tensor([len(raw) - 1])
    assert torch.equal(raw_layout(layout, samples=last, gists=False).intervals.dense_mask(), want[-1:])


def make_batch(name="packed documents", **kwargs) -> MicroBatch:
    layout, _ = make_layout(name)
    g = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 128, layout.level.shape, generator=g) for _ in range(2))
    raw = (layout.level < 0) & (layout.doc >= 0)
    has = raw & (torch.rand(raw.shape, generator=g) < 0.8)
    return MicroBatch(ids, labels.masked_fill(~has, IGNORED), layout, **kwargs)


def make_model(checkpointing=False, tied=False) -> Transformer:
    config = replace(CONFIG, tied_embeddings=tied)
    recompute = Recompute("full" if checkpointing else "none")
    return Transformer(config, replace(BuildContext.alone(3), recompute=recompute)).double().train()


def outputs(model, batch, attend) -> list[torch.Tensor]:
    """[T, B, hidden] behind every layer, then after the final norm."""
    found = []
    hooks = [layer.register_forward_hook(lambda module, inputs, out: found.append(out)) for layer in model.layers]
    final = model.run_layers(batch.ids, batch.layout.position, attend)
    for hook in hooks:
        hook.remove()
    return [*found, final]


def masked_attention(mask):
    """Attention under a bool [B, T, T], by PyTorch."""

    def attend(index, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True).transpose(1, 2)

    return attend


def plain_losses(model, batch, samples):
    """Cross-entropy, divergence and distance as sums, the teacher under a dense mask that is made literally."""
    layout, chosen = batch.layout, list(samples)
    raw = (layout.level < 0) & (layout.doc >= 0)
    token = torch.arange(raw.shape[1])
    seen = (token[:, None] >= token) & (layout.doc[:, :, None] == layout.doc[:, None]) & raw[:, :, None] & raw[:, None]
    with torch.no_grad():
        *teacher, last = outputs(model, batch, masked_attention(seen | torch.eye(len(token), dtype=torch.bool)))
        theirs = model.head_logits(last).transpose(0, 1)
    *student, mine = outputs(model, batch, masked_attention(layout.intervals.dense_mask()))
    logits = model.head_logits(mine).transpose(0, 1)
    has = batch.labels != IGNORED
    cross_entropy = F.cross_entropy(logits[has], batch.labels[has], reduction="sum")
    pick = lambda x: x[chosen][has[chosen]].log_softmax(-1)
    divergence = F.kl_div(pick(logits), pick(theirs), log_target=True, reduction="sum")
    at = lambda x: x.transpose(0, 1)[chosen][raw[chosen]]
    distance = sum(F.smooth_l1_loss(at(x), at(t), reduction="sum") for x, t in zip(student, teacher))
    return cross_entropy, divergence, distance


@pytest.mark.parametrize("checkpointing,tied", [(False, False), (True, True)])
@pytest.mark.parametrize("samples", [(0, 1), (1,)])
def test_losses_and_gradients_are_those_of_a_plain_computation(samples, checkpointing, tied):
    model = make_model(checkpointing, tied)
    added = AddedLosses(logits=0.7, hidden=0.4, samples=samples)
    batch = make_batch(added=added)
    loss = model(batch)
    cross_entropy, divergence, distance = plain_losses(model, batch, samples)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)
    close(loss, cross_entropy)
    close(added.sums["logits"], divergence.detach())
    close(added.sums["hidden"], distance.detach())
    parameters = list(model.parameters())
    want = torch.autograd.grad(cross_entropy + 0.7 * divergence + 0.4 * distance, parameters)
    for ours, exact in zip(torch.autograd.grad(loss, parameters), want):
        close(ours, exact)


def test_the_teacher_is_the_dense_model():
    """What raw tokens get is what a model without gists makes of the text alone."""
    model, batch = make_model(), make_batch()
    teacher = outputs(model, batch, MicroBatchAttention("gist", raw_layout(batch.layout, gists=False)))
    for sample in range(len(batch.ids)):
        raw = (batch.layout.level[sample] < 0) & (batch.layout.doc[sample] >= 0)
        ids, doc = batch.ids[sample, raw][None], batch.layout.doc[sample, raw][None]
        text = MicroBatch(ids, ids, build_layout(torch.full_like(doc, -1), doc, None))
        dense = outputs(model, text, MicroBatchAttention("dense", text.layout))
        for got, want in zip(teacher, dense):
            torch.testing.assert_close(got[raw, sample], want[:, 0], atol=TOLERANCE, rtol=TOLERANCE)


def test_without_samples_nothing_is_computed():
    model, calls = make_model(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    plain = model(make_batch())
    assert torch.equal(model(make_batch(added=AddedLosses())), plain) and len(calls) == 2 * CONFIG.layers
    added = AddedLosses(logits=1.0, hidden=1.0, samples=(0,))
    torch.testing.assert_close(model(make_batch(added=added)), plain)  # its rows are summed in another order
    assert len(calls) == 4 * CONFIG.layers
    company = AddedLosses(samples=(0,))
    assert torch.equal(model(make_batch(added=company)), plain) and not company.sums


def test_the_bend_of_the_distance_lies_at_one():
    """Differences on both sides of it: a freshly made model has small ones only."""
    from unfold.model.distill import _Distance

    g = torch.Generator().manual_seed(0)
    x, teacher = (2 * torch.randn(9, 2, 5, generator=g, dtype=torch.float64) for _ in range(2))
    raw = torch.rand(9, 2, 1, generator=g) < 0.6
    x.requires_grad_()
    got = _Distance.apply(x, teacher, raw)
    want = F.smooth_l1_loss(x[raw[..., 0]], teacher[raw[..., 0]], reduction="sum")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (got, want)))
