"""Decoding on GPUs: a launch per gist level and two more per layer, whatever the length. Two runs are bit-equal: no atomics.

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

from unfold.kernels.compressed.tiles import HEAD_DIMS
from unfold.kernels.compressed.triton import DTYPES, INTERPRETED, LOG2_E, architecture, on_device
from unfold.kernels.decode import kernels
from unfold.kernels.decode.step import RowStore, Step
from unfold.kernels.select.selection import SelectRule

LARGEST_GROUP = 32  # query heads per KV head: one int32 of bits
LARGEST_ROW = 1 << 26
UNIT = kernels.UNIT.value
SPLITS = 64  # of one KV head at most, where it attends
TOP, SCORE, ATTEND, COMBINE = (4, 2), (8, 2), (8, 2), (4, 2)  # warps and stages: scoring at the top, below it, ..
HELD = 16384  # scores, of all heads together, that a program holds at once: 64 a thread
WIDTH = 4  # places for the children of a gist are a multiple of this
# That splits should make of all queries and KV heads, on an H100 with 132 multiprocessors: programs that search (they fill
# the registers of one), and those that only score the top level.
PROGRAMS, TOP_PROGRAMS = 132, 1056


@dataclass(frozen=True)
class Tables:
    """What a step reads, on the device: see kernels/decode/kernels.py.

    Attributes:
        ints: [N, 3 + 5 * L] int32.
        ends: an int64 tensor from which the places of ``ends`` count.
        candidates: buckets per level: most places for candidates.
        widths: buckets per level: most items that one of its gists closed.
        room: bucket: most gists of a level that a KV head selects.
        rows: most rows that a KV head reads.
        sink: of the configuration.
        recalls: whether any query does.
    """

    ints: Tensor
    ends: Tensor
    candidates: tuple[int, ...]
    widths: tuple[int, ...]
    room: int
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
    longest = torch.tensor([b.ends_on(device)[1] for b in step.borders], dtype=torch.int64).view(-1, levels).amax(0)
    widths = tuple(-(-max(1, w) // WIDTH) * WIDTH for w in longest.tolist())
    items = selected = torch.zeros_like(step.span)  # most gists that a KV head selects: of the level above, of all levels
    rooms, candidates = [], []
    for s in range(levels):
        upto, tail = step.upto[s], step.tail[s]
        # Candidates: children of what was selected above, and the gists whose parent is open.
        candidates.append(_bucket(items * widths[s - 1] + (upto - tail) * recalls))
        budget = rule.budget(step.span, upto, group).minimum(upto) * recalls if rule else torch.zeros_like(upto)
        items = (group * budget).minimum(upto)
        selected = selected + items
        rooms.append(_bucket(items))
        shown = torch.where(recalls, step.hi[s], step.lo[s])  # what a recalling token sees of gists is selected
        columns += [shown, step.hi[s], upto, tail, budget]
    ranges = step.sinks + sum((columns[i + 1] - columns[i] for i in range(3, 3 + 5 * levels, 5)), step.hi[-1] - step.lo[-1])
    unfolded = items * widths[-1] if levels else items
    ends = [end for b in step.borders for end in b.ends_on(device)[0]]
    return Tables(
        torch.stack(columns, 1).int().to(device, non_blocking=True),
        ends[0] if ends else torch.zeros(1, dtype=torch.int64, device=device),
        tuple(candidates),
        widths,
        max(rooms, default=0),
        int((ranges + selected + unfolded).max()),
        step.borders[0].sink,
        bool(recalls.any()),
    )


def _bucket(counts: Tensor) -> int:
    return triton.next_power_of_2(max(16, int(counts.max())))


def make_places(q: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, ends: Tensor) -> Tensor:
    """Where rows of a layer's caches lie, [N, 2 * (L + 1) + L] int64: from q in units of UNIT elements, from ``ends``."""
    size, lines = q.element_size() * UNIT, []
    for layer, borders in zip(layers, step.borders):
        begins = [rows.memory.data_ptr() - q.data_ptr() for rows in layer]
        assert not any(begin % size for begin in begins), "rows and queries must begin at multiples of 8 elements"
        line = [x for begin, rows in zip(begins, layer) for x in (begin // size, rows.memory.shape[2])]
        line += [(end.data_ptr() - ends.data_ptr()) // ends.element_size() for end in borders.ends_on(q.device)[0]]
        lines.append(line)
    return torch.tensor(lines, dtype=torch.int64).to(q.device, non_blocking=True)


def run(q: Tensor, tables: Tables, places: Tensor, scale: float, kv_heads: int, rule: SelectRule | None) -> Tensor:
    """Launch the kernels: nothing here looks at the device, so that a CUDA graph can capture it. q: [N, H, D], contiguous."""
    architecture(q)
    queries, heads, dim = q.shape
    group, levels = heads // kv_heads, (places.shape[1] - 2) // 3
    new = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device=q.device)
    rows = triton.next_power_of_2(group)
    sizes = dict(
        H=heads, HKV=kv_heads, D=dim, BD=triton.next_power_of_2(dim), L=levels, BG=max(16, rows), GS=rows,
        BN=attend_keys(dim, q.element_size()), UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    item, bits = new(2, queries, kv_heads, levels, tables.room)
    taken, count = new(2, queries, kv_heads, levels)
    score = row = new(0)  # nothing is read of them above the top
    capacity = 0
    with on_device(q):
        for s, above_and_own in enumerate(zip((0, *tables.candidates), tables.candidates)) if tables.recalls else ():
            above, capacity = above_and_own
            above_score, above_row = score, row
            score, row = new(queries, kv_heads, rows, capacity), new(queries, kv_heads, capacity)
            programs, launch = (PROGRAMS, SCORE) if s else (TOP_PROGRAMS, TOP)
            splits = _splits(programs, queries * kv_heads, triton.cdiv(capacity, sizes["BN"]))
            kernels.score_kernel[splits, kv_heads, queries](
                q, q, tables.ends, tables.ints, places, above_score, above_row, score, row, item, bits, taken, count,
                above, capacity, tables.room, **sizes, **searched(above, rows), W=tables.widths[s - 1] if s else 1,
                LEVEL=s, SHARED=rule.share == "group", **_options(launch),
            )  # fmt: skip
        splits = _splits(PROGRAMS, queries * kv_heads, min(SPLITS, triton.cdiv(tables.rows, 64)))
        part = new(queries, heads, splits, dim, dtype=torch.float32)
        most, weight = new(2, queries, heads, splits, dtype=torch.float32)
        out = torch.empty_like(q)
        kernels.attend_kernel[splits, kv_heads, queries](
            q, q, tables.ends, tables.ints, places, score, row, item, bits, taken, count, part, most, weight, scale * LOG2_E,
            tables.sink, capacity, tables.room, **sizes, **searched(capacity, rows), W=tables.widths[-1] if levels else 1,
            RECALLS=tables.recalls, **_options(ATTEND),
        )  # fmt: skip
        kernels.combine_kernel[(queries * heads,)](
            part, most, weight, out, splits, D=dim, BD=sizes["BD"], BS=max(2, splits), **_options(COMBINE)
        )
    return out


def searched(capacity: int, rows: int, most: int = 128 if INTERPRETED else HELD) -> dict[str, int | bool]:
    """How a program goes through a level's scores, of so many rows: all in registers, or half as many after one another.

    In the interpreter so few are held that the tests go both ways.
    """
    whole = capacity * rows <= most
    return dict(WHOLE=whole, BS=max(16, capacity) if whole else max(16, most // rows // 2))


def _splits(programs: int, owners: int, most: int) -> int:
    """A power of two of splits for each of so many queries and KV heads: about so many programs, at least one split."""
    wanted = max(1, min(programs // owners, most))
    return 1 << (wanted.bit_length() - 1)


def attend_keys(dim: int, item_size: int) -> int:
    """Keys of a tile: what fits the registers, rows standing anywhere."""
    return 32 if dim * item_size <= 256 else 16


def _options(launch: tuple[int, int]) -> dict[str, int]:
    return dict(num_warps=launch[0], num_stages=launch[1])
