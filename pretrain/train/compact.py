"""AdamW that keeps its moments in bf16 or in 8 bits between updates.

An update is PyTorch's own fused AdamW in fp32, a piece of the parameters at a time: the piece's moments are read out, updated and
stored again. Master weights stay fp32, so no small update is lost to them.

8 bits are those of 8-bit Adam (https://arxiv.org/abs/2110.02861): blocks of 256 elements that follow one another in a rank's flat
parameters, each with an fp32 scale, its largest magnitude, and codes that are dense near it and reach 6 decades below. Two things
differ. The codes are symmetric and hold both ends, so that what was read out and is stored again gives the same bytes: a run
resumes exactly. And of the second moment the root is stored, which spans half the decades, never rounded to zero: a second moment
of zero beside a first one above it would make an update of any size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BLOCK = 256  # elements that share a scale
# Elements that are updated at once: beside the state an update needs a few times 4 bytes of each, which on a CPU fits a cache.
PIECE = {"cpu": 2**18, "cuda": 2**22}
DECADES = 7
DROPPED_BITS = 15  # of a number's 32: numbers that have the others in common are within 1 part of 256
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ".scales"


def bytes_per_element(state: str) -> float:
    """Bytes that the two moments of one parameter take. state: as ``optimizer.state``."""
    return {"fp32": 8.0, "bf16": 4.0, "8bit": 2.0 * (1 + 4 / BLOCK)}[state]


class CodeBook:
    """The 255 values between -1 (or 0) and 1 that codes mean.

    The code of a number is found by its leading bits: they tell the one or two codes that it may have.

    Attributes:
        values: fp32 [255], rising: in every decade above zero twice as many as in the one below it.
        zero: the code of 0.
    """

    def __init__(self, signed: bool, device: torch.device | str = "cpu"):
        """signed: whether there are values below 0; else there are twice as many above it."""
        first = 1 if signed else 2
        decades = []
        for i in range(DECADES):
            edges = torch.linspace(0.1, 1, first * 2**i + 1, dtype=torch.float64)
            decades.append(10.0 ** (i + 1 - DECADES) * (edges[:-1] + edges[1:]) / 2)
        above = torch.cat([torch.zeros(1), *decades]).float()
        above[-1] = 1
        self._signed, self.zero = signed, len(above) - 1 if signed else 0
        self.values = torch.cat([-above[1:].flip(0), above] if signed else [above]).to(device)
        between = (above[1:] + above[:-1]) / 2
        first_key, last_key = (int(x.view(torch.int32)) >> DROPPED_BITS for x in (between[0], above[-1]))
        lowest = (torch.arange(first_key, last_key + 2, dtype=torch.int32) << DROPPED_BITS).view(torch.float32)
        low = torch.bucketize(lowest, between, out_int32=True)
        low[0] = 0  # what is smaller counts to it
        assert (low.diff() <= 1).all()  # so no two borders lie between numbers of the same leading bits
        self._first_key, self._low = first_key, low[:-1].to(device)
        self._between = torch.cat([between, torch.tensor([torch.inf])]).to(device)

    def nearest(self, numbers: Tensor) -> Tensor:
        """int32 [n], the codes of numbers of at most 1, fp32 [n]."""
        sizes = numbers.abs()
        keys = (sizes.view(torch.int32) >> DROPPED_BITS).sub_(self._first_key).clamp_(0, len(self._low) - 1)
        codes = self._low.index_select(0, keys)
        codes += sizes > self._between.index_select(0, codes)
        return torch.where(numbers < 0, self.zero - codes, self.zero + codes) if self._signed else codes


class PackedMoment:
    """One moment of a flat parameter in 8 bits."""

    def __init__(self, like: Tensor, root: bool):
        """Zeros. like: fp32 [n]; root: the moment is not below 0, and its root is stored."""
        self.codes = torch.empty(len(like), dtype=torch.uint8, device=like.device)
        self.scales = torch.zeros(-(-len(like) // BLOCK), device=like.device)
        self._root = root
        self._book = CodeBook(not root, like.device)
        self.codes.fill_(self._book.zero)
        self._written: Tensor | None = None

    def read(self, begin: int, end: int) -> Tensor:
        """Elements begin..end, fp32 [end - begin]."""
        first = begin // BLOCK
        scales = self.scales[first : -(-end // BLOCK)].repeat_interleave(BLOCK)[begin - first * BLOCK :][: end - begin]
        values = self._book.values.index_select(0, self.codes[begin:end].int()) * scales
        return values.square_() if self._root else values

    def store(self, begin: int, values: Tensor) -> None:
        """Store whole blocks: elements from ``begin``, a multiple of BLOCK, to a block's end or the last one. values: fp32."""
        assert begin % BLOCK == 0
        length, end = len(values), begin + len(values)
        assert length % BLOCK == 0 or end == len(self.codes)
        blocks = torch.nn.functional.pad(values.sqrt() if self._root else values, (0, -length % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        parts = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[:length]
        codes = self._book.nearest(parts)
        if self._root:
            codes = torch.maximum(codes, parts.gt(0).int())
        self.codes[begin:end] = codes.to(torch.uint8)
        self.scales[begin // BLOCK : -(-end // BLOCK)] = scales

    def write(self, begin: int, values: Tensor) -> None:
        """Elements from ``begin`` on are to be these; nothing is stored before :meth:`finish`, since blocks are stored whole."""
        if self._written is None:
            self._written = torch.cat([self.read(begin, end).cpu() for begin, end in in_pieces(self.codes)])
        self._written[begin : begin + len(values)].copy_(values)

    def finish(self) -> None:
        """Store what was written."""
        if self._written is not None:
            for begin, end in in_pieces(self.codes):
                self.store(begin, self._written[begin:end].to(self.codes.device))
        self._written = None


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over flat fp32 parameters, with moments in bf16 or in 8 bits.

    ``state`` holds of each ``step``, ``exp_avg`` and ``exp_avg_sq`` of its shape (bf16, or codes, uint8), and the codes' scales.
    """

    def __init__(self, groups: list[dict], state: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        """state: ``bf16`` or ``8bit``; the rest as of :class:`torch.optim.AdamW`."""
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._kind = state
        self._packed: dict[int, PackedMoment] = {}  # address of codes -> theirs

    def allocate(self, flat: Tensor) -> None:
        """Give a flat parameter its moments, zeros."""
        held = {"step": torch.zeros((), device=flat.device)}
        for name in MOMENTS:
            if self._kind == "bf16":
                held[name] = torch.zeros_like(flat, dtype=torch.bfloat16)
                continue
            packed = PackedMoment(flat.detach(), root=name == "exp_avg_sq")
            held |= {name: packed.codes, name + SCALES: packed.scales}
            self._packed[packed.codes.data_ptr()] = packed
        self.state[flat] = held

    def packed(self, values: Tensor) -> PackedMoment | None:
        """The moment that these are codes of, a part of its ``codes``; None for all other tensors."""
        return self._packed.get(values.untyped_storage().data_ptr()) if values.dtype == torch.uint8 else None

    def finish(self) -> None:
        """Store what was written into moments."""
        for packed in self._packed.values():
            packed.finish()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the parameters that have gradients. No closure is called."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                held = self.state[flat]
                for begin, end in in_pieces(flat):
                    moments = [self._read(held[name], begin, end) for name in MOMENTS]
                    adamw(
                        [flat[begin:end]],
                        [flat.grad[begin:end]],
                        *([moment] for moment in moments),
                        max_exp_avg_sqs=[],
                        state_steps=[held["step"].clone()],  # which this counts up
                        fused=True,
                        amsgrad=False,
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        lr=group["lr"],
                        weight_decay=group["weight_decay"],
                        eps=group["eps"],
                        maximize=False,
                    )
                    for name, moment in zip(MOMENTS, moments):
                        self._store(held[name], begin, moment)
                held["step"] += 1

    def _read(self, moment: Tensor, begin: int, end: int) -> Tensor:
        packed = self.packed(moment)
        return packed.read(begin, end) if packed else moment[begin:end].float()

    def _store(self, moment: Tensor, begin: int, values: Tensor) -> None:
        if packed := self.packed(moment):
            packed.store(begin, values)
        else:
            moment[begin : begin + len(values)].copy_(values)


def in_pieces(flat: Tensor) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of a flat tensor that are worked on at once: reading needs several times their memory."""
    size = PIECE[flat.device.type]
    return ((begin, min(begin + size, len(flat))) for begin in range(0, len(flat), size))
