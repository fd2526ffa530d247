"""What layers keep for backward, and what they compute again instead: checkpoints, their place in host memory, tiles.

A part of a layer that is computed again keeps its inputs alone. With ``full`` the part is the layer; with ``selective`` there are
two, before and after attention, which itself is not computed again: what its backward needs is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "full", "selective"]


class Again:
    """Whether a part is being computed for the second time; backward enters it. Then only what the part saves is of interest."""

    def __init__(self):
        self.now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *error) -> None:
        self.now = False


def computed_again(part: Callable, *inputs) -> Tensor | tuple[Tensor, ...]:
    """part(*inputs, again), of which nothing is kept but the inputs: backward computes it again. It draws no random numbers."""
    again = Again()
    contexts = lambda: (nullcontext(), again)
    return checkpoint(part, *inputs, again, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@dataclass(frozen=True)
class Recompute:
    """What the layers of a model compute again in backward.

    Attributes:
        checkpointing: 'none', 'full' (all of a layer) or 'selective' (all but attention).
        offload: keeps in host memory what checkpointed layers keep; None: it stays on the device.
        mlp_tiles: pieces of the sequence of which the feed-forward layer has one at a time; 1: it is not tiled.
    """

    checkpointing: Checkpointing = "none"
    offload: Offload | None = None
    mlp_tiles: int = 1

    def keeping(self, micro_batch: object):
        """Around the forward pass of a checkpointed layer. micro_batch: the same object for all layers that it passes."""
        return self.offload.layer(micro_batch) if self.offload else nullcontext()


class Offload:
    """Host memory for what layers keep: copied there in forward, brought back in backward, each before it is asked for.

    While a layer goes backward, what the layer before it keeps is on its way. Indices stay where they are: most are shared by all
    layers.
    """

    def __init__(self, copies: Copies | None = None):
        """copies: how tensors get there and back; None: what the device of the first one can do."""
        self._copies = copies
        self._latest: tuple[weakref.ref, weakref.ref] | None = None  # micro-batch, and its last layer so far

    @contextmanager
    def layer(self, micro_batch: object) -> Iterator[None]:
        """What is saved for backward within lies in host memory."""
        before = self._latest[1]() if self._latest and self._latest[0]() is micro_batch else None
        layer = _LayerStore(self.copies, before)
        self._latest = weakref.ref(micro_batch), weakref.ref(layer)
        with saved_tensors_hooks(layer.pack, layer.unpack):
            yield
        layer.packed.clear()

    def copies(self, device: torch.device) -> Copies:
        """How tensors of a device get to host memory and back."""
        if self._copies is None:
            self._copies = StreamCopies() if device.type == "cuda" else Copies()
        return self._copies


class Copies:
    """Copies that are complete when they return: of a device that has no streams, the CPU."""

    def to_host(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def bring(self, hosts: list[Tensor], device: torch.device) -> list[tuple[Tensor, torch.cuda.Event | None]]:
        """Begin to bring tensors back; with each, what tells that it has arrived."""
        return [(host, None) for host in hosts]

    def wait(self, arrived: torch.cuda.Event | None) -> None:
        """What is computed from here on finds the tensor there."""


class StreamCopies(Copies):
    """Copies of a CUDA device, from and to pinned memory, on a stream of their own beside the computation."""

    def __init__(self):
        self._stream = torch.cuda.Stream()

    def to_host(self, x: Tensor) -> Tensor:
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            host.copy_(x.detach(), non_blocking=True)
        x.record_stream(self._stream)  # its memory is not used again before it is copied
        return host

    def bring(self, hosts: list[Tensor], device: torch.device) -> list[tuple[Tensor, torch.cuda.Event | None]]:
        # Memory of the stream that computes: when that frees it, it has waited for the copy.
        backs = [torch.empty_like(host, device=device) for host in hosts]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for host, back in zip(hosts, backs):
                back.copy_(host, non_blocking=True)
            arrived = self._stream.record_event()
        return [(back, arrived) for back in backs]

    def wait(self, arrived: torch.cuda.Event | None) -> None:
        torch.cuda.current_stream().wait_event(arrived)


@dataclass
class _Stored:
    """A tensor in host memory. uses: how often it is still to be used; back: on the device, and what tells of its arrival."""

    host: Tensor
    device: torch.device
    uses: int = 0
    back: tuple[Tensor, torch.cuda.Event | None] | None = None


class _LayerStore:
    """What one layer keeps of one micro-batch."""

    def __init__(self, copies: Callable[[torch.device], Copies], before: _LayerStore | None):
        self._copies = copies
        self._before = weakref.ref(before) if before else lambda: None
        self._stored: list[_Stored] = []
        # What two operations save is stored once. The tensors are held for as long, lest another comes to lie there.
        self.packed: dict[tuple, tuple[Tensor, _Stored]] = {}

    def pack(self, x: Tensor) -> Tensor | _Stored:
        if not x.is_floating_point() or isinstance(x, nn.Parameter):
            return x
        key = (x.data_ptr(), x.dtype, x.shape, x.stride())
        if key not in self.packed:
            stored = _Stored(self._copies(x.device).to_host(x), x.device)
            self._stored.append(stored)
            self.packed[key] = x, stored
        stored = self.packed[key][1]
        stored.uses += 1
        return stored

    def unpack(self, stored: Tensor | _Stored) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        self._bring(always=stored)
        if before := self._before():
            before._bring()
        back, arrived = stored.back
        self._copies(stored.device).wait(arrived)
        stored.uses -= 1
        if stored.uses <= 0:
            stored.back = None
        return back

    def _bring(self, always: _Stored | None = None) -> None:
        """Bring back what is still to be used, and ``always`` in any case (a graph may go backward twice)."""
        wanted = [s for s in self._stored if s.back is None and (s.uses > 0 or s is always)]
        if wanted:
            device = wanted[0].device
            for stored, back in zip(wanted, self._copies(device).bring([s.host for s in wanted], device)):
                stored.back = back
