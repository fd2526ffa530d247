"""Attention of a frame's step by plain loops in any dtype, from its tables alone: what the Triton kernels compute, slowly."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch
from torch import Tensor

from unfold.kernels.decode.reference import visible_items
from unfold.kernels.decode.triton import UNIT
from unfold.model.gist.growing import children


def memory_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers that lie there: a tensor that shares their memory."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.zeros(shape, dtype=dtype)
    size = count * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


def rows_at(anchor: Tensor, line: list[int], segment: int, kv_heads: int) -> Tensor:
    """Keys and values of a segment, [2, Hkv, capacity, D]."""
    begin, capacity = line[2 * segment : 2 * segment + 2]
    shape = 2, kv_heads, capacity, anchor.shape[-1]
    return memory_at(anchor.data_ptr() + begin * UNIT * anchor.element_size(), shape, anchor.dtype)


def keep(k: Tensor, v: Tensor, anchor: Tensor, places: Tensor, items: Tensor) -> None:
    """As kernels.decode.triton.keep."""
    for line, (segment, row), key, value in zip(places.tolist(), items.tolist(), k, v):
        memory = rows_at(anchor, line, segment, len(key))
        memory[0, :, row], memory[1, :, row] = key, value


def run(q: Tensor, tables, places: Tensor, scale: float, kv_heads: int, rule, anchor: Tensor | None = None) -> Tensor:
    """As kernels.decode.triton.run; and no list may be longer than its bucket."""
    outs, anchor = [], q if anchor is None else anchor
    for own, ints, line in zip(q, tables.ints.tolist(), places.tolist()):
        levels = (len(line) - 2) // 3
        sinks, window, end = ints[:3]
        shown, hi, upto, tail, taken = (ints[3 + i :: 5] for i in range(5))
        rows = [rows_at(anchor, line, s, kv_heads) for s in range(levels + 1)]
        begins = [tables.ends.data_ptr() + 8 * begin for begin in line[2 * (levels + 1) :]]
        ends = [memory_at(begin, (count,), torch.int64) for begin, count in zip(begins, upto)]
        check_buckets(tables, ends, sinks, window, taken, upto, tail)
        step = SimpleNamespace(
            lo=torch.tensor([*shown, window])[:, None], hi=torch.tensor([*hi, end])[:, None], sinks=torch.tensor([sinks]),
            recalls=torch.tensor([any(taken)]), levels=levels, tail=torch.tensor(tail)[:, None], span=torch.zeros(1),
            upto=torch.tensor([*upto, end])[:, None],
            borders=[SimpleNamespace(children=lambda s, g, ends=ends, sinks=sinks: children(ends, sinks, s, g))],
        )  # fmt: skip
        for h, heads in enumerate(own.unflatten(0, (kv_heads, -1))):
            budgets = iter(taken * len(heads))  # asked for head by head, level by level
            told = SimpleNamespace(share=rule and rule.share, top_p=None, budget=lambda *_, budgets=budgets: next(budgets))
            seen = visible_items(heads, [x[0, h, :n] for x, n in zip(rows, [*upto, end])], step, 0, told, scale)
            k, v = (torch.cat([x[which, h, sorted(items)] for x, items in zip(rows, seen)]) for which in (0, 1))
            outs.append((heads @ k.T * scale).softmax(-1) @ v)
    return torch.stack(outs).view_as(q)


def check_buckets(tables, ends, sinks, window, taken, upto, tail) -> None:
    """Raw tokens in the window are not unfolded."""
    above = 0
    for s, count in enumerate(taken):
        if count:
            assert count <= tables.room and tables.recalls
            assert above * tables.widths[s - 1] + upto[s] - tail[s] <= tables.candidates[s]
        if len(ends[s]):
            lo, hi = children(ends, sinks, s, torch.arange(len(ends[s])))
            hi = hi.clamp(max=window) if s == len(ends) - 1 else hi
            assert int((hi - lo).max()) <= tables.widths[s]
        above = count


def patch(monkeypatch) -> None:
    """In place of the Triton kernels, until the end of the test."""
    from unfold.kernels.decode import triton

    monkeypatch.setattr(triton, "keep", keep)
    monkeypatch.setattr(triton, "run", run)
