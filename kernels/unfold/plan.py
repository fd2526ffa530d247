"""What the Triton kernels of unfolding work through, by vectorised tensor operations.

Per layer, since every layer selects for itself: for d_k and d_v the lists of a selection turned round, from chunks to the queries
that selected them and from groups of gists above level 0 to the blocks that visit them (:func:`turned_lists`), each by one
stable sort: no atomics, the same order in every run. Per micro-batch: the keys of windows and sinks against the queries that
see them (:func:`near_items`), in the tables of compressed attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.compressed.plan import SHORTEST_SPLIT, SPLITS, KeyItems, TokenSearch, expand, key_items
from unfold.kernels.intervals import Intervals
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.tree import GistTree

# A group of keys that many blocks visit, or a chunk that many queries selected, is split into parts of at most this many visits
# or queries, or of so many that the partial sums hold no more numbers than d_k and d_v.
SHORTEST_PART = 64
SHORTEST_LIST = 512


@dataclass(frozen=True)
class Parts:
    """Groups of keys and what each gets its d_k and d_v from.

    Attributes:
        table: [n, 6] int32: sample, KV head, first key row, first entry of its list, last + 1, slot of the partial sum or -1
            (then the part is all of its group). The longest come first.
        sums: [k, 5] int32, groups with partial sums: sample, KV head, first key row, first slot, number of slots.
        slots: number of partial sums.
    """

    table: Tensor
    sums: Tensor
    slots: int


@dataclass(frozen=True)
class Visits:
    """Groups of gists above level 0 and the blocks that visit them.

    Attributes:
        parts: with lists of visits.
        visits: [m, 3] int32: block, first item, last + 1.
        row, bits: the items in the order of the visits.
    """

    parts: Parts
    visits: Tensor
    row: Tensor
    bits: Tensor


@dataclass(frozen=True)
class ChunkItems:
    """Chunks and the queries that selected them, as items of (block, bits).

    Attributes:
        parts: with lists of queries.
        bits, block: [items] int32, by chunk, then by block.
        end: [items] int64, where the queries of each item end in the list of all.
        queries: its length.
    """

    parts: Parts
    bits: Tensor
    block: Tensor
    end: Tensor
    queries: int


def longest_chunk(tree: GistTree) -> int:
    """Most raw tokens behind a level-0 gist (memoised: one sync per micro-batch)."""
    return tree.others.memo("longest chunk", lambda: int(((tree.child_hi - tree.child_lo) * _of_level_0(tree)).amax()))


def _of_level_0(tree: GistTree) -> Tensor:
    """bool [B, T], the rows of level-0 gists."""
    row = torch.arange(tree.others.tokens, device=tree.tokens.device)
    start = tree.others.segment_start[:, tree.levels - 1 : tree.levels + 1]
    return (row >= start[:, :1]) & (row < start[:, 1:])


def _gist_rows(tree: GistTree) -> int:
    """Rows that all gists of a sample stand in, at least one (memoised: one sync per micro-batch)."""
    return tree.others.memo("gist rows", lambda: max(1, int(tree.others.segment_start[:, tree.levels].amax())))


def turned_lists(tree: GistTree, lists: BlockLists, chunk_keys: int, upper_keys: int) -> tuple[ChunkItems, Visits]:
    """The lists turned round: what each chunk (a level-0 gist and the raw tokens behind it, at most ``chunk_keys``) and each
    group of ``upper_keys`` neighbouring gists above level 0 is selected by. One synchronisation, for the lengths of both.
    """
    _, block, head = lists.owners()
    sample = lists.blocks.table[block, 2]
    bottom = slice(sum(lists.sizes[:-1]), None)
    above = slice(0, bottom.start)
    chunks = _Sorted.of(tree, lists, block[bottom], head[bottom], sample[bottom], lists.row[bottom], 1)
    upper = _Sorted.of(tree, lists, block[above], head[above], sample[above], lists.row[above], upper_keys)
    takers, bits, row = lists.takers[bottom][chunks.order], lists.bits[bottom][chunks.order], lists.row[above][upper.order]
    end = takers.cumsum(0)
    # A visit is what one block has of one group: its items are neighbours in the sorted order.
    new = _begins(upper.group) | _begins(upper.block)
    visit = new.cumsum(0)
    chunk_lists, upper_lists = (_ends_at(x, s.last) for x, s in ((end, chunks), (visit, upper)))
    about = [
        _Splitting.of(chunk_lists, _longest(tree, lists, SHORTEST_LIST, chunk_keys, chunk_lists)),
        _Splitting.of(upper_lists, _longest(tree, lists, SHORTEST_PART, upper_keys, upper_lists)),
    ]
    lengths = torch.stack([x for s in about for x in (s.parts.sum(), s.slots.sum(), s.split.sum(), s.ends[-1])]).tolist()
    # Tables hold int32: at recall on every one of 512k tokens a layer's selections are more.
    assert max(lengths) < 2**31, f"{lengths[3]} selections of chunks, {lengths[7]} visits in one layer; use smaller micro-batches"
    parts = [_parts(tree, s, x, lengths[4 * i : 4 * i + 3]) for i, (s, x) in enumerate(zip(about, (chunks, upper)))]
    first = _places_of(new, lengths[7])
    visits = torch.stack([upper.block[first], first, _ends(first, len(new))], 1).int()
    items = ChunkItems(parts[0], bits, chunks.block.int(), end, lengths[3])
    return items, Visits(parts[1], visits, row, lists.bits[above][upper.order])


@dataclass(frozen=True)
class _Sorted:
    """Items by group of keys, those of a group in the order of their blocks.

    Attributes:
        group, order, block: [items] int64. last: [groups] int64, the items of the groups up to and including each.
        width: rows of a group; per_sample: groups of one KV head of a sample.
    """

    group: Tensor
    order: Tensor
    block: Tensor
    last: Tensor
    width: int
    per_sample: int

    @classmethod
    def of(cls, tree: GistTree, lists: BlockLists, block, head, sample, row: Tensor, width: int) -> _Sorted:
        per_sample = -(-_gist_rows(tree) // width)
        groups = lists.kv_heads * tree.others.batch * per_sample
        group = (head * tree.others.batch + sample) * per_sample + torch.div(row, width, rounding_mode="floor")
        if groups < 2**31:
            group = group.int()  # half the passes of a radix sort
        group, order = group.sort(stable=True)
        every = torch.arange(groups, device=row.device, dtype=group.dtype)
        return cls(group, order, block[order], torch.searchsorted(group, every, right=True), width, per_sample)


@dataclass(frozen=True)
class _Splitting:
    """How lists are cut into parts of at most ``longest``: all [groups] int64, ``longest`` a scalar.

    ``ends`` is where each list ends; ``parts`` how many it has, ``slots`` how many partial sums, ``split`` whether any.
    """

    ends: Tensor
    parts: Tensor
    slots: Tensor
    split: Tensor
    longest: Tensor

    @classmethod
    def of(cls, ends: Tensor, longest: Tensor) -> _Splitting:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        parts = torch.div(counts + longest - 1, longest, rounding_mode="floor")
        split = parts > 1
        return cls(ends, parts, parts * split, split, longest)


def _parts(tree: GistTree, how: _Splitting, items: _Sorted, lengths: list[int]) -> Parts:
    """The parts and partial sums of lists; lengths: how many parts, slots, and lists that are split."""
    device, batch = how.ends.device, tree.others.batch
    index, part = expand(how.parts, lengths[0])
    first_slot = how.slots.cumsum(0) - how.slots
    per_sample = items.per_sample
    group = torch.arange(len(how.ends), device=device)
    about = torch.stack([group // per_sample % batch, group // per_sample // batch, group % per_sample * items.width], 1)
    start = torch.nn.functional.pad(how.ends[:-1], (1, 0))[index]
    first = start + part * how.longest
    last = torch.minimum(first + how.longest, how.ends[index])
    slot = torch.where(how.split[index], first_slot[index] + part, -1)
    table = torch.cat([about[index], torch.stack([first, last, slot], 1)], 1)
    table = table[torch.argsort(last - first, descending=True, stable=True)]
    split = _places_of(how.split, lengths[2])
    sums = torch.cat([about[split], torch.stack([first_slot, how.parts], 1)[split]], 1)
    return Parts(table.int().contiguous(), sums.int().contiguous(), lengths[1])


def _begins(x: Tensor) -> Tensor:
    """bool [n]: an entry is the first or another than the one before it."""
    begins = torch.ones_like(x, dtype=torch.bool)
    begins[1:] = x[1:] != x[:-1]
    return begins


def _ends(starts: Tensor, end: int) -> Tensor:
    """Where runs end that begin at ``starts``, the last one at ``end``."""
    return torch.cat([starts[1:], starts.new_full((min(1, len(starts)),), end)])


def _ends_at(running: Tensor, last: Tensor) -> Tensor:
    """What running sums over items have come to behind each group; last: [groups], items up to and including the group."""
    return torch.nn.functional.pad(running, (1, 0))[last]


def _places_of(mask: Tensor, count: int) -> Tensor:
    """int64 [count], where a mask [n] holds, which it does ``count`` times: nonzero without asking the device."""
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    found = place.new_empty(count + 1)
    return found.scatter_(0, place, torch.arange(len(mask), device=mask.device))[:count]


def _longest(tree: GistTree, lists: BlockLists, shortest: int, keys: int, ends: Tensor) -> Tensor:
    """Longest part of a list: ``shortest``, or so much that the partial sums hold no more numbers than d_k and d_v."""
    rows = max(1, tree.others.rows.numel() * lists.kv_heads)
    return torch.div(ends[-1] * keys + rows - 1, rows, rounding_mode="floor").clamp(min=shortest)


def near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    """What windows and sinks mean for d_k and d_v, as attention of one sample of N tokens over the B * R rows of all samples.

    Returns:
        lo, hi [S, N] int32 with S = 3 * B segments (gists, which nobody sees by range; raw tokens; sinks; of sample 0, ..), and
        the items of all rows, so that the rows of gists are written too (as zero). Memoised.
    """
    return tree.others.memo(("near items", tile_keys), lambda: _near_items(tree, tile_keys))


def _near_items(tree: GistTree, tile_keys: int) -> tuple[Tensor, Tensor, KeyItems]:
    others, level = tree.others, tree.levels
    batch, rows, queries = others.batch, others.rows.shape[1], tree.queries
    sample = tree.tokens // others.tokens
    offset = torch.arange(batch, device=sample.device) * rows
    lo, hi = torch.zeros(2, batch, 3, queries, dtype=torch.int32, device=sample.device)
    index = torch.arange(queries, device=sample.device)
    for x, ranges in ((lo, tree.lo), (hi, tree.hi)):
        x[sample, 1, index] = ranges[level] + offset[sample].int()
        x[sample, 2, index] = ranges[level + 1] + offset[sample].int()
    starts = others.segment_start[:, [level, level + 1]] + offset[:, None]
    bounds = torch.cat([torch.cat([offset[:, None], starts], 1).flatten(), offset.new_full((1,), batch * rows)])
    every = torch.arange(batch * rows, device=sample.device)[None]
    flat = Intervals(every, every, lo.flatten(0, 1)[None], hi.flatten(0, 1)[None], bounds[None].int())
    chunk = max(SHORTEST_SPLIT, -(-queries // SPLITS))
    items = key_items(flat, TokenSearch(flat), range(3 * batch), tile_keys, chunk, direct=True)
    return flat.lo[0], flat.hi[0], items
