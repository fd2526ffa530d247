"""Decoding on GPUs: three launches per layer, whatever the length. Two runs are bit-equal: splits are combined in order.

The kernels read every number that changes from step to step out of device tables, and their scratch has sizes of buckets (powers
of two), so that a step can be captured in a CUDA graph and replayed while the sequences grow within the buckets
(:func:`run`; :class:`Tables` are then refilled in place, outside of the graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.compressed.tiles import HEAD_DIMS
from kernels.compressed.triton import DTYPES, INTERPRETED, LOG2_E, architecture, on_device
from kernels.decode import kernels
from kernels.decode.step import RowStore, Step
from kernels.select.selection import SelectRule

LARGEST_GROUP = 32  # query heads per KV head: one int32 of bits
LARGEST_ROW = 1 << 26
SPLITS = 64  # of one KV head at most
PICK, ATTEND, COMBINE = (8, 2), (8, 2), (4, 2)  # warps and stages of the kernels
SCORES = 8192  # scores, of all heads together, that one step of the search loads: 32 a thread
WIDTH = 8  # children of a gist that are written at once
PROGRAMS = 264  # that a split should make of all queries and KV heads: two for each of an H100's multiprocessors


@dataclass(frozen=True)
class Tables:
    """What a step reads, on the device: see kernels/decode/kernels.py.

    Attributes:
        ints: [N, 3 + 5 * L] int32.
        ends: an int64 tensor from which the places of ``ends`` count.
        candidates, listed: buckets: most candidates of a level, and most rows that a KV head selects and unfolds.
        rows: most rows that a KV head reads.
        sink: of the configuration.
        recalls: whether any query does.
    """

    ints: Tensor
    ends: Tensor
    candidates: int
    listed: int
    rows: int
    sink: int
    recalls: bool


def decode_attention_triton(
    q: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, rule: SelectRule | None, scale: float
) -> Tensor:
    """As :func:`kernels.decode.reference.decode_attention_reference`, on a GPU.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, layers, rule)
    if reason:
        raise ValueError(reason)
    q = q.contiguous()
    group = q.shape[1] // layers[0][-1].memory.shape[1]
    tables = step.memo(("tables", group, q.device), lambda: make_tables(step, rule, group, q.device))
    return run(q, tables, make_places(q, layers, step, tables.ends), scale, layers[0][-1].memory.shape[1], rule)


def why_not(q: Tensor, layers: Sequence[Sequence[RowStore]], rule: SelectRule | None) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do."""
    instead = "use backend='cpu', which runs on any device"
    group = q.shape[1] // layers[0][-1].memory.shape[1]
    if rule is not None and rule.top_p is not None:
        return f"top_p: {rule.top_p}; backend 'triton' selects by number, {instead}"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, {instead}"
    if q.shape[2] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[2]} is not one of {HEAD_DIMS}, {instead}"
    if group > LARGEST_GROUP:
        return f"q: {group} query heads per KV head, backend 'triton' serves {LARGEST_GROUP}; {instead}"
    if max(rows.memory.shape[2] for layer in layers for rows in layer) > LARGEST_ROW:
        return f"cache: more than {LARGEST_ROW} rows, {instead}"
    return None


def make_tables(step: Step, rule: SelectRule | None, group: int, device: torch.device) -> Tables:
    """The tables of a step, from what the CPU keeps of its sequences; one copy to the device."""
    levels, recalls = step.levels, step.recalls
    columns = [step.sinks, step.lo[-1], step.hi[-1]]
    listed, candidates = torch.zeros_like(step.span), torch.zeros_like(step.span)
    longest = torch.tensor([b.ends_on(device)[1] for b in step.borders], dtype=torch.int64).view(-1, levels).T  # [L, N]
    budget = torch.zeros_like(step.span)
    for s in range(levels):
        upto, tail = step.upto[s], step.tail[s]
        # Candidates: children of what was selected above, and the gists whose parent is open; never more than there are.
        reached = (group * budget * longest[s - 1] + upto - tail).minimum(upto) if s else upto
        candidates = torch.maximum(candidates, reached * recalls)
        budget = rule.budget(step.span, upto, group).minimum(upto) * recalls if rule else budget
        shown = torch.where(recalls, step.hi[s], step.lo[s])  # what a recalling token sees of gists is selected
        columns += [shown, step.hi[s], upto, tail, budget]
        listed = listed + (group * budget).minimum(upto)
    ranges = step.sinks + sum((columns[i + 1] - columns[i] for i in range(3, 3 + 5 * levels, 5)), step.hi[-1] - step.lo[-1])
    if levels:
        listed = listed + ((group * budget).minimum(step.upto[levels - 1]) * longest[levels - 1]).minimum(step.upto[levels])
    bucket = lambda x: triton.next_power_of_2(max(16, int(x.max())))
    ends = [end for b in step.borders for end in b.ends_on(device)[0]]
    return Tables(
        torch.stack(columns, 1).int().to(device, non_blocking=True),
        ends[0] if ends else torch.zeros(1, dtype=torch.int64, device=device),
        bucket(candidates),
        bucket(listed),
        int((ranges + listed).max()),
        step.borders[0].sink,
        bool(recalls.any()),
    )


def make_places(q: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, ends: Tensor) -> Tensor:
    """Where the rows of a layer's caches lie, [N, 2 * (L + 1) + L] int64, in elements from q and from ``ends``."""
    size, lines = q.element_size(), []
    for layer, borders in zip(layers, step.borders):
        line = [x for rows in layer for x in ((rows.memory.data_ptr() - q.data_ptr()) // size, rows.memory.shape[2])]
        line += [(end.data_ptr() - ends.data_ptr()) // ends.element_size() for end in borders.ends_on(q.device)[0]]
        lines.append(line)
    return torch.tensor(lines, dtype=torch.int64).to(q.device, non_blocking=True)


def run(q: Tensor, tables: Tables, places: Tensor, scale: float, kv_heads: int, rule: SelectRule | None) -> Tensor:
    """Launch the kernels: nothing here looks at the device, so that a CUDA graph can capture it. q: [N, H, D], contiguous."""
    architecture(q)
    queries, heads, dim = q.shape
    group, levels = heads // kv_heads, (places.shape[1] - 2) // 3
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=q.device)
    listed = new(queries, kv_heads, tables.listed)
    splits = triton.next_power_of_2(max(1, min(SPLITS, PROGRAMS // (queries * kv_heads), triton.cdiv(tables.rows, 64))))
    sizes = dict(
        H=heads, HKV=kv_heads, D=dim, BD=triton.next_power_of_2(dim), L=levels, BG=max(16, triton.next_power_of_2(group)),
        BN=attend_keys(dim, q.element_size()), UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    total = torch.zeros(queries, kv_heads, dtype=torch.int32, device=q.device)
    part = new(queries, heads, splits, dim, dtype=torch.float32)
    most, weight = new(2, queries, heads, splits, dtype=torch.float32)
    out = torch.empty_like(q)
    with on_device(q):
        if tables.recalls:
            rows = triton.next_power_of_2(group)
            score = new(queries, kv_heads, rows, tables.candidates)
            row, bits = new(2, queries, kv_heads, 2, tables.candidates)
            kernels.pick_kernel[queries, kv_heads](
                q, q, tables.ends, tables.ints, places, score, row, bits, listed, total, tables.sink, tables.candidates,
                tables.listed, **sizes, GS=rows, BS=SCORES // rows, BW=WIDTH, SHARED=rule.share == "group", **_options(PICK),
            )  # fmt: skip
        kernels.attend_kernel[splits, kv_heads, queries](
            q, q, tables.ints, places, listed, total, part, most, weight, scale * LOG2_E, tables.listed, **sizes,
            **_options(ATTEND),
        )  # fmt: skip
        kernels.combine_kernel[(queries * heads,)](
            part, most, weight, out, splits, D=dim, BD=sizes["BD"], BS=max(2, splits), **_options(COMBINE)
        )
    return out


def attend_keys(dim: int, item_size: int) -> int:
    """Keys of a tile: what fits the registers, rows standing anywhere."""
    return 32 if dim * item_size <= 256 else 16


def _options(launch: tuple[int, int]) -> dict[str, int]:
    return dict(num_warps=launch[0], num_stages=launch[1])
