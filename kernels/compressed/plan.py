"""What the tiled kernels work through, derived from the intervals by a few tensor operations, once per micro-batch.

*Rows* are query-head pairs of one KV head: row ``r`` of a sample is head ``r % G`` of the group at token ``r // G``. A tile
of rows therefore holds few tokens when the group is large, and what those tokens see spans few keys.

Forward and d_q go over blocks of rows (:class:`RowPlan`): full tiles of the top segment, then everything else laid side
by side in one list, so that short spans of several segments share a tile. d_k and d_v go over blocks of keys
(:class:`KeyPlan`), each against the rows that see it; a block seen by many tokens is split into several items, whose
sums are added afterwards in a fixed order. The kernels read their loop bounds from these tables and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unfold.kernels.intervals import Intervals

# Columns of RowPlan.table before its two columns per segment, and of the item and sum tables of KeyPlan.
ROW_HEAD = 3
ITEM_COLUMNS = 8
SUM_COLUMNS = 5
# A block of keys is split so that no item covers more than T / SPLITS tokens: enough items to fill a GPU at the top level,
# while the partial sums (at most SPLITS + 1 per top-level key) stay linear in T. Short items would be all overhead.
SPLITS = 16
SHORTEST_SPLIT = 512


@dataclass(frozen=True)
class RowPlan:
    """Keys that each block of ``tile_rows`` rows visits, in tiles of ``tile_keys``.

    ``table`` [B, blocks, 3 + 2 * S] int32 holds, per block: the first key row of the full tiles (top segment, every row of
    the block sees all of them), their number, the length of the list; then per segment where its part of the list starts,
    and what to add to a place in that part to get the key row.
    """

    table: Tensor
    tile_rows: int
    tile_keys: int

    def tiles(self) -> Tensor:
        """[B, blocks] int, key tiles of each block."""
        return self.table[..., 1] + -(-self.table[..., 2] // self.tile_keys)

    def tiled_keys(self) -> float:
        """Keys that a row is multiplied with, masked ones included, on average."""
        return float(self.tiles().double().mean()) * self.tile_keys


@dataclass(frozen=True)
class KeyItems:
    """Blocks of ``tile_keys`` keys against the tokens that see them.

    Attributes:
        items: [n, 8] int32: sample, segment, first key row, last + 1, first token, first token of the part in which every
            token sees every key, last token + 1, slot of the partial sum or -1 (then the item is all of its block).
        sums: [m, 5] int32, blocks with partial sums: sample, first key row, last + 1, first slot, number of slots.
        slots: number of partial sums.
        tile_keys: keys per block.
    """

    items: Tensor
    sums: Tensor
    slots: int
    tile_keys: int

    def tiles(self, group: int, tile_rows: int) -> int:
        """Row tiles of all items, for one KV head."""
        first, full, last = (self.items[:, i].long() * group for i in (4, 5, 6))
        return int((-(-(full - first) // tile_rows) - (-(last - full) // tile_rows)).sum())


@dataclass(frozen=True)
class KeyPlan:
    """Work of d_k and d_v: the sink copies, the top segment, the others; and copy_of [B, T] int32.

    ``copy_of`` gives, for each key row outside the sink segment, the number of the visible sink copy of its token, or -1.
    """

    sink: KeyItems
    top: KeyItems
    local: KeyItems
    copy_of: Tensor


def row_plan(intervals: Intervals, group: int, tile_rows: int, tile_keys: int) -> RowPlan:
    """The (memoised) plan of the forward and d_q kernels; ``group`` is the number of query heads per KV head."""
    make = lambda: RowPlan(_row_table(intervals, group, tile_rows, tile_keys), tile_rows, tile_keys)
    return intervals.memo(("row plan", group, tile_rows, tile_keys), make)


def key_plan(intervals: Intervals, sink_keys: int, top_keys: int, local_keys: int) -> KeyPlan:
    """The (memoised) plan of the d_k, d_v kernel with these block sizes. Its sizes are read."""
    key = ("key plan", sink_keys, top_keys, local_keys)
    return intervals.planned(key, lambda whole: _key_plan(whole, sink_keys, top_keys, local_keys))


def key_rows(intervals: Intervals) -> Tensor:
    """[B * R] int64, the (memoised) ``rows`` as indices into [B * T] tokens."""
    offset = lambda: torch.arange(intervals.batch, device=intervals.rows.device)[:, None] * intervals.tokens
    return intervals.memo("key rows", lambda: (intervals.rows + offset()).flatten())


def _row_table(intervals: Intervals, group: int, tile_rows: int, tile_keys: int) -> Tensor:
    lo, hi = intervals.lo, intervals.hi
    rows = intervals.tokens * group
    starts = torch.arange(0, rows, tile_rows, device=lo.device)  # [blocks]
    last = ((starts + tile_rows).clamp(max=rows) - 1) // group
    most = 1 + -(-(tile_rows - 1) // group)  # tokens that tile_rows consecutive rows can touch
    token = torch.minimum((starts // group)[:, None] + torch.arange(most, device=lo.device), last[:, None])
    lo, hi = lo[:, :, token], hi[:, :, token]  # [B, S, blocks, most]
    seen = hi > lo
    # An empty range must not widen its block's span, so it counts as (+inf, 0); where all are empty, the span is (0, 0).
    end = hi.masked_fill(~seen, 0).amax(-1)  # [B, S, blocks]
    first = lo.masked_fill(~seen, torch.iinfo(lo.dtype).max).amin(-1).masked_fill_(end == 0, 0)
    # Full tiles: where the lower bound is uniform, up to the smallest upper bound. An empty range is of both kinds: it
    # has either another lower bound, or an upper bound that leaves no full tile.
    uniform = lo[:, 0].amax(-1) == first[:, 0]
    full = ((hi[:, 0].amin(-1) - first[:, 0]) // tile_keys).clamp(min=0) * uniform
    first_full = first[:, 0].clone()
    first[:, 0] += full * tile_keys
    length = (end - first).clamp(min=0)
    after = length.cumsum(1, dtype=torch.int32)
    before = after - length
    pairs = torch.stack([before, first - before], -1).permute(0, 2, 1, 3).flatten(2)  # [B, blocks, 2 * S]
    return torch.cat([torch.stack([first_full, full, after[:, -1]], -1), pairs], -1).int().contiguous()


def _key_plan(intervals: Intervals, sink_keys: int, top_keys: int, local_keys: int) -> KeyPlan:
    sink = intervals.segments - 1
    search = TokenSearch(intervals)
    chunk = max(SHORTEST_SPLIT, -(-intervals.tokens // SPLITS))
    return KeyPlan(
        sink=key_items(intervals, search, range(sink, sink + 1), sink_keys, chunk, direct=False),
        top=key_items(intervals, search, range(1), top_keys, chunk, direct=True),
        local=key_items(intervals, search, range(1, sink), local_keys, chunk, direct=True),
        copy_of=_visible_copies(intervals),
    )


class TokenSearch:
    """First and last tokens that see a block of keys, by binary search over running extremes of the bounds."""

    def __init__(self, intervals: Intervals):
        lo, hi = intervals.lo.long(), intervals.hi.long()
        seen = hi > lo
        self.tokens = intervals.tokens
        # Values of one (sample, segment) lie above all values of those before, so one sorted array serves every search.
        self.step = intervals.rows.shape[1] + 1
        above = torch.arange(intervals.batch * intervals.segments, device=lo.device) * self.step
        above = above.view(intervals.batch, intervals.segments, 1)
        backward = lambda x: x.flip(2).cummin(2).values.flip(2)
        self.ends = (hi.masked_fill(~seen, 0).cummax(2).values + above).flatten()
        self.starts = (backward(lo.masked_fill(~seen, self.step - 1)) + above).flatten()
        self.least_ends = (backward(hi) + above).flatten()
        largest_starts = lo.cummax(2).values
        self.largest_starts = (largest_starts + above).flatten()
        # Where a range begins before an earlier one, as after the parts of linked contexts, a block may be seen from afar again.
        self.gaps = bool(((lo < largest_starts) & seen).any())
        self._lo, self._hi = lo.masked_fill(~seen, self.step), hi.masked_fill(~seen, 0)

    def __call__(self, pair: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of key blocks [first, last) of (sample, segment) number ``pair``: first, first of the full part, end."""
        find = lambda values, key, right: torch.searchsorted(values, key + pair * self.step, right=right)
        base = pair * self.tokens
        begin = find(self.ends, first, True)
        end = torch.maximum(find(self.starts, last, False), begin)
        full = find(self.least_ends, last, False)
        # From there on every range ends behind the block; all of them must begin before it, too.
        opened = self.largest_starts[(end - 1).clamp(min=0)] <= first + pair * self.step
        full = torch.where(opened, full.clamp(begin, end), end)
        return begin - base, full - base, end - base

    def seen(self, pair: Tensor, first: Tensor, last: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Bool: whether the ranges of tokens [start, stop), taken together, reach into the key block [first, last)."""
        least, most = self._lo.flatten(0, 1), self._hi.flatten(0, 1)  # of 2 ** k tokens from each one on
        length, reached = stop - start, torch.zeros_like(start, dtype=torch.bool)
        for k in range(int(length.max()).bit_length() if len(length) else 0):
            i = ((length >> k) == 1).nonzero().flatten()  # two spans of 2 ** k tokens cover these
            spans = (pair[i], start[i]), (pair[i], stop[i] - (1 << k))
            begin = torch.minimum(*(least[span] for span in spans))
            reached[i] = (begin < last[i]) & (torch.maximum(*(most[span] for span in spans)) > first[i])
            ahead = lambda x, empty, k=k: F.pad(x, (0, 1 << k), value=empty)[:, 1 << k :]
            least, most = torch.minimum(least, ahead(least, self.step)), torch.maximum(most, ahead(most, 0))
        return reached


def key_items(
    intervals: Intervals, search: TokenSearch, segments: range, tile_keys: int, chunk: int, *, direct: bool
) -> KeyItems:
    """Items of the blocks of some segments; ``direct``: a block of one item needs no partial sum.

    There may be more segments than ranges: segment ``i`` is then seen by the ranges of segment ``i % S``, which its items name.
    """
    bounds = intervals.segment_start[:, segments.start : segments.stop + 1].long()  # [B, segments + 1]
    blocks = -(-bounds.diff(dim=1).flatten() // tile_keys)  # of each (sample, segment)
    pair, number = expand(blocks)
    sample = torch.div(pair, max(len(segments), 1), rounding_mode="floor")
    segment = pair - sample * len(segments)
    first = bounds[sample, segment] + number * tile_keys
    last = torch.minimum(first + tile_keys, bounds[sample, segment + 1])
    segment = (segment + segments.start) % intervals.segments
    begin, full, end = search(sample * intervals.segments + segment, first, last)

    parts = (-(-(end - begin) // chunk)).clamp(min=1)
    block, part = expand(parts)
    step = -(-(end - begin) // parts)
    start = torch.minimum(begin[block] + part * step[block], end[block])
    stop = torch.minimum(start + step[block], end[block])
    if search.gaps:  # drop what lies between; a block that nobody sees keeps one item, which writes its zeros
        kept = search.seen((sample * intervals.segments + segment)[block], first[block], last[block], start, stop)
        kept |= (part == 0) & (torch.bincount(block[kept], minlength=len(parts)) == 0)[block]
        block, start, stop = block[kept], start[kept], stop[kept]
        parts = torch.bincount(block, minlength=len(parts))
        part = torch.arange(len(block), device=block.device) - (parts.cumsum(0) - parts)[block]

    summed = parts > (1 if direct else 0)
    slots = parts * summed
    first_slot = slots.cumsum(0) - slots
    sums = torch.stack([sample, first, last, first_slot, parts], 1)[summed]
    slot = torch.where(summed[block], first_slot[block] + part, -1)
    items = [sample[block], segment[block], first[block], last[block], start, full[block].clamp(start, stop), stop, slot]
    # The longest first: what is left for the end is short, so that no multiprocessor waits long for another.
    order = torch.argsort(stop - start, descending=True, stable=True)
    table = torch.stack(items, 1)[order]
    return KeyItems(table.int().contiguous(), sums.int().contiguous(), int(slots.sum()), tile_keys)


def expand(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """For counts [n]: index i repeated counts[i] times, and the running number within each i.

    ``total`` is the sum of the counts, where it is known: else it is read from the device.
    """
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    return index, torch.arange(len(index), device=counts.device) - (counts.cumsum(0) - counts)[index]


def _visible_copies(intervals: Intervals) -> Tensor:
    """copy_of of :class:`KeyPlan`: a copy that no query sees gets no gradient, and may stand for any token."""
    tokens = intervals.tokens
    lo, hi = intervals.lo[:, -1].long() - tokens, intervals.hi[:, -1].long() - tokens  # [B, T]
    copies = intervals.rows.shape[1] - tokens
    edges = torch.zeros(intervals.batch, copies + 1, dtype=torch.int32, device=lo.device)
    one = (hi > lo).int()
    edges.scatter_add_(1, lo.clamp(0, copies), one).scatter_add_(1, hi.clamp(0, copies), -one)
    visible = edges.cumsum(1)[:, :copies] > 0
    row = intervals.row_of.gather(1, intervals.rows[:, tokens:])
    copy_of = torch.full((intervals.batch, tokens + 1), -1, dtype=torch.int32, device=lo.device)
    number = torch.arange(copies, dtype=torch.int32, device=lo.device).expand_as(row)
    return copy_of.scatter_(1, row.masked_fill(~visible, tokens), number)[:, :tokens].contiguous()
