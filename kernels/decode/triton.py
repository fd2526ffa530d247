"""Decoding on GPUs: two launches per gist level and two more per layer, whatever the length. Two runs are bit-equal: no atomics.

The kernels read every number that changes from step to step out of device tables, and their scratch has sizes of buckets (powers
of two), so that a step can be captured in a CUDA graph and replayed while the sequences grow within the buckets
(:func:`keep` and :func:`run`; the tables are then refilled in place: model/decode/frame.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from unfold.kernels.common.launch import DTYPES, HEAD_DIMS, INTERPRETED, LOG2_E, architecture, on_device
from unfold.kernels.decode import attend, kernels
from unfold.kernels.decode.keep import keep_kernel
from unfold.kernels.decode.step import Borders, RowStore, Step
from unfold.kernels.decode.tiles import DecodeTiles, Launch, decode_tiles
from unfold.kernels.select.selection import SelectRule

LARGEST_GROUP = 32  # query heads per KV head
LARGEST_ROW = 1 << 26
INSTEAD = "use backend='cpu', which runs on any device"
UNIT = kernels.UNIT.value
HELD = 8192  # scores that a program of the search holds in registers
COMPARED = 256
WIDTH = 4  # places for the children of a gist are a multiple of this


@dataclass(frozen=True)
class Tables:
    """What a step reads, on the device: see kernels/decode/kernels.py.

    Attributes:
        ints: [N, 3 + 5 * L] int32.
        ends: an int64 tensor from which the places of ``ends`` count.
        candidates: buckets per level: most places for candidates of one selection.
        widths: buckets per level: most items that one of its gists closed.
        room: bucket: most gists of a level that one selection takes.
        rows: bucket: most places of rows that a KV head reads.
        recalls: whether any query does.
    """

    ints: Tensor
    ends: Tensor
    candidates: tuple[int, ...]
    widths: tuple[int, ...]
    room: int
    rows: int
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
    group = q.shape[1] // layers[0][-1].memory.shape[1]
    most = max(rows.memory.shape[2] for layer in layers for rows in layer)
    return why_not_shape(q.dtype, q.shape[2], group, rule) or why_not_rows(most)


def why_not_shape(dtype: torch.dtype, dim: int, group: int, rule: SelectRule | None) -> str | None:
    """The same, of a whole model. dim: of a head; group: query heads per KV head."""
    if rule is not None and rule.top_p is not None:
        return f"top_p: {rule.top_p}; backend 'triton' selects by number, {INSTEAD}"
    if dtype not in DTYPES:
        return f"q: dtype {dtype}; backend 'triton' serves fp16, bf16 and fp32, {INSTEAD}"
    if dim not in HEAD_DIMS:
        return f"q: head dimension {dim} is not one of {HEAD_DIMS}, {INSTEAD}"
    if group > LARGEST_GROUP:
        return f"q: {group} query heads per KV head, backend 'triton' serves {LARGEST_GROUP}; {INSTEAD}"
    return None


def why_not_rows(most: int) -> str | None:
    """The same, of caches with room for so many rows."""
    if most > LARGEST_ROW:
        return f"cache: more than {LARGEST_ROW} rows, {INSTEAD}"
    return None


def make_tables(step: Step, rule: SelectRule | None, group: int, device: torch.device) -> Tables:
    """The tables of a step, from what the CPU keeps of its sequences; one copy to the device."""
    tables = tables_of(step, rule, group, device)
    return replace(tables, ints=tables.ints.to(device, non_blocking=True))


def tables_of(step: Step, rule: SelectRule | None, group: int, device: torch.device, ahead: int = 0) -> Tables:
    """The same with ``ints`` on the CPU. ahead: its buckets hold until so many raw tokens more came to every sequence."""
    tables = _tables(step, rule, group, device)
    return replace(_tables(step.later(ahead), rule, group, device), ints=tables.ints) if ahead else tables


def _tables(step: Step, rule: SelectRule | None, group: int, device: torch.device) -> Tables:
    levels, recalls = step.levels, step.recalls
    columns = [step.sinks, step.lo[-1], step.hi[-1]]
    longest = torch.tensor([b.ends_on(device)[1] for b in step.borders], dtype=torch.int64).view(step.queries, levels).amax(0)
    widths = tuple(-(-max(1, w) // WIDTH) * WIDTH for w in longest.tolist())
    taken = selected = torch.zeros_like(step.span)  # most gists that one selection takes: of the level above, of all levels
    rooms, candidates = [], []
    for s in range(levels):
        upto, tail = step.upto[s], step.tail[s]
        # Candidates: children of what was taken above, and the gists whose parent is open.
        candidates.append(_bucket(taken * widths[s - 1] + (upto - tail) * recalls))
        taken = rule.budget(step.span, upto, group).minimum(upto) * recalls if rule else torch.zeros_like(upto)
        selected = selected + taken
        rooms.append(_bucket(taken))
        shown = torch.where(recalls, step.hi[s], step.lo[s])  # what a recalling token sees of gists is selected
        columns += [shown, step.hi[s], upto, tail, taken]
    ranges = step.sinks + sum((columns[i + 1] - columns[i] for i in range(3, 3 + 5 * levels, 5)), step.hi[-1] - step.lo[-1])
    unfolded = taken * widths[-1] if levels else taken
    ends = [end for b in step.borders for end in b.ends_on(device)[0]]
    return Tables(
        torch.stack(columns, 1).int(),
        ends[0] if ends else torch.zeros(1, dtype=torch.int64, device=device),
        tuple(candidates),
        widths,
        max(rooms, default=0),
        triton.next_power_of_2(max(1, int((ranges + (selected + unfolded) * searches_of(rule, group)).max()))),
        bool(recalls.any()),
    )


def _bucket(counts: Tensor) -> int:
    return triton.next_power_of_2(max(16, int(counts.max())))


def make_places(anchor: Tensor, layers: Sequence[Sequence[RowStore]], step: Step, ends: Tensor) -> Tensor:
    """Where rows of a layer's caches lie, [N, 2 * (L + 1) + L] int64, on the device of ``anchor``."""
    addresses = torch.tensor([[(rows.memory.data_ptr(), rows.memory.shape[2]) for rows in layer] for layer in layers])
    return places_of(anchor, ends, addresses, step.borders).to(anchor.device, non_blocking=True)


def places_of(anchor: Tensor, ends: Tensor, addresses: Tensor, borders: Sequence[Borders]) -> Tensor:
    """The same on the CPU, of any number of layers: [.., N, 2 * (L + 1) + L] int64.

    Args:
        anchor, ends: from where rows count, in units of UNIT elements, and from where borders do.
        addresses: [.., N, L + 1, 2] int64, of each segment where its rows begin in memory, in bytes, and the room for rows.
        borders: of each of the N.
    """
    begin, size = addresses[..., 0] - anchor.data_ptr(), anchor.element_size() * UNIT
    assert not (begin % size).any(), "rows and what they count from must begin at multiples of 8 elements"
    rows = torch.stack([begin // size, addresses[..., 1]], -1).flatten(-2)
    first, size = ends.data_ptr(), ends.element_size()
    own = [[(end.data_ptr() - first) // size for end in b.ends_on(anchor.device)[0]] for b in borders]
    return torch.cat([rows, torch.tensor(own, dtype=torch.int64).expand(*rows.shape[:-1], -1)], -1)


def keep(k: Tensor, v: Tensor, anchor: Tensor, places: Tensor, items: Tensor) -> None:
    """Write new tokens' keys and values into their sequences' caches; like :func:`run` it looks at nothing on the device.

    Args:
        k, v: [N, Hkv, D], of any strides but the last.
        anchor, places: as for :func:`run`.
        items: [N, 2] int64, segment of each token and its row there.
    """
    tokens, kv_heads, dim = k.shape
    assert k.stride(2) == v.stride(2) == 1, "keys and values of a head lie side by side"
    strides = dict(zip(("K_TOKEN", "K_HEAD", "V_TOKEN", "V_HEAD"), (*k.stride()[:2], *v.stride()[:2])))
    levels = (places.shape[1] - 2) // 3
    with on_device(k):
        keep_kernel[kv_heads, tokens](
            k, v, anchor, places, items, HKV=kv_heads, D=dim, BD=triton.next_power_of_2(dim), L=levels, **strides, num_warps=1
        )  # fmt: skip


def run(
    q: Tensor,
    tables: Tables,
    places: Tensor,
    scale: float,
    kv_heads: int,
    rule: SelectRule | None,
    anchor: Tensor | None = None,
    tiles: DecodeTiles | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Launch the kernels: nothing here looks at the device, so that a CUDA graph can capture it.

    Args:
        q: [N, H, D], contiguous.
        tables, places: what :func:`make_tables` and :func:`make_places` made for the step and the layer.
        anchor: from what the places count; q when None.
        tiles: others than the table's, for tests and measurements.
        pdl: whether a launch begins before the one before it ends (programmatic dependent launch); None: where the GPU can.
    """
    arch, anchor = architecture(q), q if anchor is None else anchor
    queries, heads, dim = q.shape
    group, levels, block_dim = heads // kv_heads, (places.shape[1] - 2) // 3, triton.next_power_of_2(dim)
    tiles = tiles or decode_tiles(block_dim, q.element_size())
    chain = Chain(arch not in ("interpreter", "sm_80") if pdl is None else pdl)
    searches = searches_of(rule, group)
    owners, rows = queries * kv_heads, triton.next_power_of_2(group)
    sizes = dict(H=heads, HKV=kv_heads, D=dim, BD=block_dim, L=levels, HS=searches)
    product = dict(BG=max(16, rows), UPCAST=INTERPRETED and q.dtype == torch.bfloat16)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q.device)
    # Of every list the gists, first and end of the items behind them, and again those gists that no head before took.
    lists = new(4, queries, kv_heads, levels, searches * tables.room, dtype=torch.int32)
    others = others_compared(searches, tables.room)
    with on_device(q):
        for s, capacity in enumerate(tables.candidates) if tables.recalls else ():
            score = new(queries, kv_heads, searches, capacity, dtype=torch.int32)
            launch, owned = (tiles.below, owners * searches) if s else (tiles.top, owners)
            splits = _splits(tiles.programs // owned, capacity, launch.keys)
            width = tables.widths[s - 1] if s else 1
            marking = triton.cdiv(tables.room, kernels.MARKED.value)
            if s:
                chain.launch(
                    kernels.score_below_kernel, (splits + marking, kv_heads * searches, queries), launch,
                    q, anchor, tables.ints, places, *lists, score, capacity, tables.room, marking,
                    **sizes, GS=rows, BN=launch.keys, BO=min(others, 128), W=width, LEVEL=s,
                )  # fmt: skip
            else:
                chain.launch(
                    kernels.score_top_kernel, (splits, kv_heads, queries), launch,
                    q, anchor, tables.ints, places, score, capacity, **sizes, **product, BN=launch.keys,
                )  # fmt: skip
            warps, held = searched(capacity, tiles)
            chain.launch(
                kernels.select_kernel, (searches, kv_heads, queries), Launch(0, warps, 1),
                tables.ends, tables.ints, places, score, *lists[:3], capacity, tables.room,
                HKV=kv_heads, L=levels, HS=searches, W=width, LEVEL=s, **held,
            )  # fmt: skip
        keys = tiles.attend.keys
        splits = _splits(min(tiles.splits, tiles.programs // owners), tables.rows, keys)
        part = new(queries, heads, splits, dim)
        most, weight = new(2, queries, heads, splits)
        out = torch.empty_like(q)
        width = tables.widths[-1] if levels else 1
        chain.launch(
            attend.attend_kernel, (splits, kv_heads, queries), tiles.attend,
            q, anchor, tables.ints, places, *lists, part, most, weight, scale * LOG2_E, tables.room,
            **sizes, **product, BN=keys, BO=others, W=width, RECALLS=tables.recalls,
        )  # fmt: skip
        width_of_part = min(tiles.part, block_dim)
        chain.launch(
            attend.combine_kernel, (triton.cdiv(dim, width_of_part), queries * heads), Launch(keys, tiles.combine_warps, 1),
            tables.ints, part, most, weight, out, splits,
            H=heads, D=dim, L=levels, HS=searches, BN=keys, W=width, BS=max(2, splits), BP=width_of_part,
        )  # fmt: skip
    return out


class Chain:
    """Launches one after another. With ``pdl`` each but the first, whose inputs others make, begins before the last ends."""

    def __init__(self, pdl: bool):
        self.pdl, self.first = pdl, True

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, int, int], launch: Launch, *arguments, **sizes) -> None:
        options = dict(num_warps=launch.warps, num_stages=launch.stages)
        if self.pdl and not self.first:
            options["launch_pdl"] = True
        kernel[grid](*arguments, **sizes, PDL=self.pdl, **options)
        self.first = False


def searches_of(rule: SelectRule | None, group: int) -> int:
    """Selections that the heads of a KV head make: one each, or one for all."""
    return 1 if rule is None or rule.share == "group" else group


def searched(capacity: int, tiles: DecodeTiles, most: int = 32 if INTERPRETED else HELD) -> tuple[int, dict[str, int | bool]]:
    """Warps of a program that searches so many scores, and its tile: all in registers, or half as many after one another.

    In the interpreter so few are held that the tests go both ways.
    """
    whole = capacity <= most
    size = capacity if whole else most // 2
    warps = tiles.search_warps(size)
    return warps, dict(WHOLE=whole, BS=size, C=min(size, 32 * warps))


def others_compared(searches: int, room: int, most: int = 32 if INTERPRETED else COMPARED) -> int:
    """Entries of other heads' lists that a tile's gists are compared with at once."""
    return min(most, triton.next_power_of_2(max(1, searches - 1) * room))


def _splits(programs: int, places: int, keys: int) -> int:
    """Splits of so many places: a tile each, up to so many programs; a power of two."""
    most = 1 << (max(1, programs).bit_length() - 1)
    return min(most, triton.next_power_of_2(triton.cdiv(places, keys)))
