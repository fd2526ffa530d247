"""AdamW with compact moments: what the codes are, that an update is AdamW's, and that what is stored again stays as it was."""

from __future__ import annotations

import pytest
import torch

from unfold.pretrain.checkpoint.state import Fragment
from unfold.pretrain.config import parse_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.compact import BLOCK, PIECE, CodeBook, CompactAdamW, PackedMoment, bytes_per_element

NUMBERS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def moment(n: int, root: bool) -> torch.Tensor:
    """Numbers over five decades, some of them 0."""
    values = torch.randn(n) * 10 ** (-5 * torch.rand(n)) * (torch.rand(n) > 0.1)
    return values.square() if root else values


def packed_of(values: torch.Tensor, root: bool) -> PackedMoment:
    packed = PackedMoment(values, root)
    packed.write(0, values)
    packed.finish()
    return packed


@pytest.mark.parametrize("root", [False, True])
def test_what_is_read_is_the_nearest_code_of_the_block(root):
    """Against a search over all codes, in float64, block by block; 1000 elements end in a block that is not whole."""
    values = moment(1000, root)
    values[512:768] = 0
    got, book = packed_of(values, root).read(0, 1000).double(), CodeBook(not root).values.double()
    for begin in range(0, 1000, BLOCK):
        part = (values[begin : begin + BLOCK].sqrt() if root else values[begin : begin + BLOCK]).double()
        scale = part.abs().max()
        near = (part[:, None] / scale.clamp_min(1e-30) - book).abs().min(1)
        want = book[near.indices] * scale
        if root:  # nothing above 0 becomes 0
            want = torch.where(part > 0, want.clamp_min(float(book[1]) * scale), want).square()
        assert torch.allclose(got[begin : begin + BLOCK], want, rtol=1e-6, atol=0)
        assert got[begin : begin + BLOCK].abs().max() == pytest.approx(float(values[begin : begin + BLOCK].abs().max()), rel=1e-6)


@pytest.mark.parametrize("root", [False, True])
def test_what_was_read_and_is_stored_again_is_the_same(root):
    first = packed_of(moment(5000, root), root)
    again = packed_of(first.read(0, 5000), root)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)


def test_moments_are_saved_and_loaded_a_piece_at_a_time(monkeypatch):
    """At once it would need more memory than 8 bits save, and a run that fits could not be resumed."""
    monkeypatch.setitem(PIECE, "cpu", 2 * BLOCK)
    sizes, read = [], PackedMoment.read
    monkeypatch.setattr(PackedMoment, "read", lambda self, a, b: sizes.append(b - a) or read(self, a, b))
    values = moment(5000, False)
    packed = packed_of(values, False)
    fragment = Fragment("exp_avg.x", (0,), (4000,), (4000,), True, packed.codes[700:4700], packed)
    saved = torch.empty(4000)
    fragment.copy_to(saved)
    assert max(sizes) == 2 * BLOCK
    whole = read(packed, 0, 5000)
    assert torch.equal(saved, whole[700:4700]) and torch.allclose(whole, values, atol=0.05 * float(values.abs().max()))
    plain = Fragment("model.x", (0,), (5,), (5,), True, values[3:8])
    plain.copy_to(saved[:5])
    assert torch.equal(saved[:5], values[3:8])


def test_codes():
    signed, roots = CodeBook(True).values, CodeBook(False).values
    assert len(signed) == len(roots) == 255 and torch.equal(signed, -signed.flip(0))
    for book in (signed, roots):
        assert (book.diff() > 0).all() and book[-1] == 1 and (book == 0).sum() == 1
    assert signed[signed > 0][0] < 1e-6 and roots[1] < 1e-6


@pytest.mark.parametrize("signed", [False, True])
def test_the_code_of_a_number_is_the_nearest(signed):
    """Against a search, for what lies on borders and a unit of the last place beside them too."""
    book = CodeBook(signed)
    between = (book.values[1:] + book.values[:-1]) / 2
    beside = [torch.nextafter(between, torch.full_like(between, end)) for end in (-2.0, 2.0)]
    spread = 10 ** (-9 * torch.rand(20000)) * (torch.randint(2, (20000,)) * 2 - 1 if signed else 1)
    for numbers in (*beside, spread, book.values):
        assert torch.equal(book.nearest(numbers), torch.bucketize(numbers, between, out_int32=True))


def kept(optimizer: CompactAdamW, flat: torch.Tensor, name: str) -> torch.Tensor:
    """A moment as the next update will read it, fp64."""
    values = optimizer.state[flat][name]
    packed = optimizer.packed(values)
    return (packed.read(0, len(flat)) if packed else values).double()


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_an_update_is_adamw_from_the_kept_moments(state, monkeypatch):
    """In pieces, of which the last ends within a block, against the formula in float64."""
    monkeypatch.setitem(PIECE, "cpu", 2 * BLOCK)
    flat = torch.nn.Parameter(torch.randn(3 * BLOCK + 100))
    optimizer = CompactAdamW([{"params": [flat]}], state, **NUMBERS)
    optimizer.allocate(flat)
    (b1, b2), rate = NUMBERS["betas"], NUMBERS["lr"]
    for step in range(1, 6):
        flat.grad = torch.randn(len(flat)) * 10 ** (-3 * torch.rand(len(flat)))
        p, g = flat.detach().double(), flat.grad.double()
        m = b1 * kept(optimizer, flat, "exp_avg") + (1 - b1) * g
        v = b2 * kept(optimizer, flat, "exp_avg_sq") + (1 - b2) * g * g
        optimizer.step()
        p = p * (1 - rate * NUMBERS["weight_decay"])
        p -= rate * m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + NUMBERS["eps"])
        assert torch.allclose(flat.detach().double(), p, rtol=1e-5, atol=1e-6)
        for name, want in (("exp_avg", m), ("exp_avg_sq", v.sqrt())):
            got = kept(optimizer, flat, name)
            got = got.sqrt() if name == "exp_avg_sq" else got
            most = [x.abs().max() for x in want.split(BLOCK)]
            for x, y, scale in zip(got.split(BLOCK), want.split(BLOCK), most):
                bound = y.abs() / 2**8 if state == "bf16" else 0.008 * scale  # half of what codes differ by, at most
                assert ((x - y).abs() <= bound + 1e-7 * scale).all()
    assert optimizer.state[flat]["step"] == 5
    states = [x for n, x in optimizer.state[flat].items() if n != "step"]
    size = sum(x.numel() * x.element_size() for x in states)
    assert size == pytest.approx(bytes_per_element(state) * len(flat), rel=0.01)


def test_near_roots_of_zero_no_update_is_large():
    """Weights whose gradients ended long ago beside one that has large ones: no second moment vanishes under its first."""
    flat = torch.nn.Parameter(torch.zeros(BLOCK))
    optimizer = CompactAdamW([{"params": [flat]}], "8bit", **NUMBERS)
    optimizer.allocate(flat)
    for step in range(40):
        flat.grad = torch.zeros(BLOCK)
        flat.grad[0] = 1.0
        flat.grad[1:] = 1e-5 if step == 0 else 0.0
        before = flat.detach().clone()
        optimizer.step()
        assert (flat.detach() - before).abs().max() <= 2 * NUMBERS["lr"]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"state": "8bit", "kind": "muon"}, "state: 8bit needs kind: adamw"),
        ({"state": "bf16", "beta2": 0.999}, "beta2: 0.999 decays a moment by less than state: bf16"),
        ({"state": "int8"}, "state: 'int8' is not one of fp32, bf16, 8bit"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        parse_config({"data": {"train": ["x"], "tokenizer": "t"}, "optimizer": settings})
