"""The loss without logits against plain PyTorch in fp64: values and gradients, whole and split vocabularies, any chunks."""

import threading

import pytest
import torch
import torch.nn.functional as F

from unfold.model import loss as loss_module
from unfold.model.layers import BuildContext
from unfold.model.loss import Targets, _Losses, token_loss_sum
from unfold.model.visibility import IGNORED, AddedLosses

T, B, HIDDEN, VOCAB = 20, 3, 16, 48
SAMPLES = (0, 2)  # who has a teacher
TOLERANCE = 1e-10


def problem(dtype=torch.float64, seed=0):
    """hidden [T, B, hidden], weight, labels [B, T], the teacher's hidden [T, samples, hidden]."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, HIDDEN, generator=g, dtype=torch.float64) for s in ((T, B), (VOCAB,)))
    labels = torch.randint(0, VOCAB, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.3] = IGNORED
    teacher = torch.randn(T, len(SAMPLES), HIDDEN, generator=g, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, teacher.to(dtype)


def plain(hidden, weight, labels, teacher):
    """Sums of cross-entropies, squared log-partitions, divergences; the teacher's weight is no leaf."""
    has, chosen = labels != IGNORED, list(SAMPLES)
    logits = (hidden @ weight.t()).transpose(0, 1)  # [B, T, vocab]
    theirs = (teacher @ weight.detach().t()).transpose(0, 1)[has[chosen]].log_softmax(-1)
    ours = logits[chosen][has[chosen]].log_softmax(-1)
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    squared = logits[has].logsumexp(-1).square().sum()
    return F.cross_entropy(logits[has], labels[has], reduction="sum"), squared, divergence


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("z,divergence", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_values_and_gradients_are_those_of_plain_pytorch(monkeypatch, chunk, z, divergence):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    hidden, weight, labels, teacher = problem()
    added = AddedLosses(z=z, logits=divergence, samples=SAMPLES)
    loss = token_loss_sum(hidden, Targets.of(labels, SAMPLES), weight, BuildContext.alone(), added, teacher)
    cross_entropy, squared, kl = plain(hidden, weight, labels, teacher)
    torch.testing.assert_close(loss, cross_entropy, atol=TOLERANCE, rtol=TOLERANCE)
    assert added.sums.keys() == {name for name, weighs in (("z", z), ("logits", divergence)) if weighs}
    for name, want in (("z", squared), ("logits", kl)):
        if name in added.sums:
            torch.testing.assert_close(added.sums[name], want.detach(), atol=TOLERANCE, rtol=TOLERANCE)
    got = torch.autograd.grad(-3 * loss, (hidden, weight))
    want = torch.autograd.grad(-3 * (cross_entropy + z * squared + divergence * kl), (hidden, weight))
    for ours, exact in zip(got, want):
        torch.testing.assert_close(ours, exact, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_teacher_that_agrees_teaches_nothing():
    hidden, weight, labels, _ = problem(torch.float32)
    added = AddedLosses(logits=5.0, samples=SAMPLES)
    teacher = hidden.detach()[:, list(SAMPLES)]
    loss = token_loss_sum(hidden, Targets.of(labels, SAMPLES), weight, BuildContext.alone(), added, teacher)
    assert added.sums["logits"] == 0
    alone = token_loss_sum(hidden, Targets.of(labels), weight, BuildContext.alone())
    for got, want in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, alone))):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_16_bits_are_as_exact_as_plain_pytorch(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    exact = [x.double() for x in problem(torch.bfloat16)[:2]]
    hidden, weight, labels, _ = problem(torch.bfloat16)
    targets, has = labels.t()[labels.t() != IGNORED], labels.t() != IGNORED
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    entropy = lambda h, w: F.cross_entropy(wide(h[has] @ w.t()), targets, reduction="sum")
    exact = [x.detach().requires_grad_() for x in exact]
    true = torch.autograd.grad(entropy(*exact) / 3, exact)
    near = torch.autograd.grad(entropy(hidden, weight) / 3, (hidden, weight))
    ours = torch.autograd.grad(token_loss_sum(hidden, Targets.of(labels), weight, BuildContext.alone()) / 3, (hidden, weight))
    for got, other, want in zip(ours, near, true):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 2 * (other - want).norm()


class Rank:
    """One of two threads that play the ranks of a group."""

    def __init__(self, rank: int):
        self._rank = rank

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self._rank


def test_a_split_vocabulary_gives_the_same(monkeypatch):
    """Two ranks in threads: sums alike on both, gradients of rows add up, each has its rows of the weight's."""
    monkeypatch.setattr(loss_module, "CHUNK", 6)
    barrier, given = threading.Barrier(2), [None, None]

    def reduce(x, operation, group):
        given[group.rank()] = x.clone()
        barrier.wait()
        both = torch.stack(given)
        barrier.wait()
        x.copy_(both.amax(0) if operation == torch.distributed.ReduceOp.MAX else both.sum(0))

    hidden, weight, labels, teacher = problem()
    has = labels.t() != IGNORED
    rows, targets = hidden.detach()[has], labels.t()[has]
    taught = teacher[:, [0] * B][has][:11]
    run = lambda group, w: _loss_and_gradients(rows, w, targets, taught, group)
    whole = run(BuildContext.alone().tp_group, weight)
    monkeypatch.setattr(loss_module, "reduce_in_place", reduce)
    results = [None, None]
    part = lambda rank: results.__setitem__(rank, run(Rank(rank), weight.chunk(2)[rank]))
    threads = [threading.Thread(target=part, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (sums, d_rows, d_weight), (other_sums, other_rows, other_weight) = results
    assert torch.equal(sums, other_sums)
    for got, want in zip((sums, d_rows + other_rows, torch.cat([d_weight, other_weight])), whole):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def _loss_and_gradients(rows, weight, targets, taught, group):
    leaves = [x.detach().clone().requires_grad_() for x in (rows, weight)]
    sums = _Losses.apply(*leaves, targets, taught, (0.3, 0.7), group, (True, True), None)
    return torch.stack(sums).detach(), *torch.autograd.grad(sums[0], leaves)


def test_nothing_to_predict():
    hidden, weight, labels, _ = problem()
    loss = token_loss_sum(hidden, Targets.of(torch.full_like(labels, IGNORED)), weight, BuildContext.alone())
    assert loss == 0 and all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_without_gradients_none_is_made(monkeypatch):
    hidden, weight, labels, _ = problem()
    want = token_loss_sum(hidden, Targets.of(labels), weight, BuildContext.alone())
    monkeypatch.setattr(loss_module, "_add_product", lambda *a: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert token_loss_sum(hidden, Targets.of(labels), weight, BuildContext.alone()) == want
