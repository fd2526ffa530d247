"""Norms of gradients, updates and weights, by layer and kind of parameter, every so many steps.

Taken around the step of the optimizer that DeepSpeed wraps, on the part of the fp32 weights that each rank holds: three fused
norms over views of it, and one sum over the ranks of a few numbers. Whatever the parallel layout, each element counts once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor

from unfold.pretrain.checkpoint.state import Fragment, fragments
from unfold.pretrain.parallel import Parallel

KINDS = ("attention", "mlp", "norms", "adapters")  # of parameters within a layer
OUTSIDE = ("embedding", "head", "final_norm")
GRADIENT, UPDATE, WEIGHT = range(3)
NAMES = ("grad_norms", "update_norms", "weight_norms")


def slot_of(name: str, layers: int) -> int:
    """The number of what a parameter of this canonical name counts to: parts outside the layers, then kinds layer by layer."""
    found = re.match(r"layers\.(\d+)\.(.+)", name)
    if not found:
        return OUTSIDE.index(name.split(".")[0])
    part = found[2]
    kind = 3 if "lora_" in part else 2 if "norm" in part else 0 if part.startswith("attention") else 1
    return len(OUTSIDE) + int(found[1]) * len(KINDS) + kind


@dataclass(frozen=True)
class _Part:
    """Elements of a flat tensor of the optimizer that count to one slot."""

    slot: int
    start: int
    stop: int
    muon: bool


class NormWatch:
    """Measures the steps that are a multiple of ``every``; costs nothing in the others.

    It needs memory for a copy of what one call of the inner optimizer changes: this rank's fp32 weights, under ZeRO-3 those of a
    group of parameters at a time.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, parallel: Parallel, layers: int, every: int, clip: float):
        """layers: of the whole model; clip: largest gradient norm, 0 for none."""
        self._engine, self._parallel, self._layers, self._every, self._clip = engine, parallel, layers, every, clip
        self._held: list[tuple[Fragment, bool]] | None = None  # this rank's, and whether Muon updates it

    @contextlib.contextmanager
    def over(self, step: int) -> Iterator[None]:
        """The step (counted from 1) is made within."""
        self._squares = None
        if not self._every or step % self._every:
            yield
            return
        optimizer = self._engine.optimizer.optimizer
        slots = len(OUTSIDE) + self._layers * len(KINDS)
        self._squares = torch.zeros(3, slots, dtype=torch.float64, device=self._parallel.device)
        self._before: dict[int, Tensor] = {}
        hooks = [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def metrics(self, grad_norm: float, skipped: bool) -> dict:
        """The step's ``grad_norms`` (before clipping), ``update_norms``, ``weight_norms``; a collective where it is measured."""
        if self._squares is None or skipped:
            return {}
        torch.distributed.all_reduce(self._squares)
        roots = self._squares.sqrt()
        if self._clip and grad_norm > self._clip:
            roots[GRADIENT] *= (grad_norm + 1e-6) / self._clip  # as DeepSpeed divided it
        return {name: self._named(row.tolist()) for name, row in zip(NAMES, roots)}

    def _named(self, values: list[float]) -> dict:
        named = {name: value for name, value in zip(OUTSIDE, values) if value}
        by_layer = values[len(OUTSIDE) :]
        for i, kind in enumerate(KINDS):
            if any(those := by_layer[i :: len(KINDS)]):
                named[kind] = those
        return named

    def _before_step(self, optimizer, *_) -> None:
        for flat, parts in self._stepping(optimizer):
            # What Muon is given is no gradient any more, but what it made of one.
            self._add(GRADIENT, [p for p in parts if not p.muon], flat.grad)
            self._before[id(flat)] = flat.detach().clone()

    def _after_step(self, optimizer, *_) -> None:
        for flat, parts in self._stepping(optimizer):
            before = self._before.pop(id(flat))
            self._add(WEIGHT, parts, flat.detach())
            self._add(UPDATE, parts, torch.sub(flat.detach(), before, out=before))

    def _stepping(self, optimizer) -> Iterator[tuple[Tensor, list[_Part]]]:
        """The flat tensors that this call of the optimizer changes, with their parts."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is not None and (parts := self._parts_of(flat)):
                    yield flat, parts

    def _add(self, what: int, parts: list[_Part], flat: Tensor) -> None:
        if not parts:
            return
        norms = torch.stack(torch._foreach_norm([flat[p.start : p.stop] for p in parts])).double().square()
        slots = torch.tensor([p.slot for p in parts], device=norms.device)
        self._squares[what].index_add_(0, slots.to(self._squares.device), norms.to(self._squares.device))

    def _parts_of(self, flat: Tensor) -> list[_Part]:
        if self._held is None:  # once: the optimizer's tensors stay where they are
            held = list(fragments(self._engine, self._parallel))
            muon = {f.name.partition(".")[2] for f in held if f.name.startswith("momentum_buffer.")}
            mine = [f for f in held if f.name.startswith("model.") and f.writes and f.values.numel()]
            self._held = [(f, f.name.partition(".")[2] in muon) for f in mine]
        size = flat.element_size()
        begin, end = flat.data_ptr(), flat.data_ptr() + flat.numel() * size
        found = []
        for fragment, muon in self._held:
            at = fragment.values.data_ptr()
            if begin <= at < end:
                start = (at - begin) // size
                slot = slot_of(fragment.name.removeprefix("model."), self._layers)
                found.append(_Part(slot, start, start + fragment.values.numel(), muon))
        return found
