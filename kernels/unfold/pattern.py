"""Who attends to whom in a block of recalling queries, as a sparse matrix with dense pieces (CPU path).

A row is a query of one KV head (with its ``r`` query heads side by side), and its keys come from two kinds of pieces:

- *local*: 64 neighbouring queries against their window, the sinks and the gists above level 0, masked;
- *chunks*: a key group is a level-0 gist with the raw tokens behind it, and the rows that selected it stand together in tiles
  of ``TILE``. So a chunk is read once for many queries, and nothing is multiplied that was not selected.

Attention and its gradients are then three products with that matrix: rows x keys at its entries (:meth:`Pattern.against`),
entries x keys (:meth:`Pattern.mix`) and entries transposed x rows (:meth:`Pattern.spread_`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.intervals import QueryBlock
from unfold.kernels.select.selection import Selection
from unfold.kernels.tree import GistTree

# Rows per tile. A chunk's last tile is padded; larger tiles pad more, smaller ones read the chunk more often.
TILE = 16
# Numbers (slots * r * D) that one copy of rows in tiles may hold: it must stay in the cache, or each product waits for memory.
NUMBERS = 2**19


@dataclass(frozen=True)
class Chunks:
    """The key groups of a micro-batch: a level-0 gist, then the raw tokens behind it, padded to the longest.

    Attributes:
        gist: [G] int64, rows of the level-sorted buffers of all samples, back to back.
        at: [G] int64, where the tree has that gist's children.
        origin: [G] int64, the first row of its sample.
        empty: [G, C] bool, the padding.
        shift: [B] int64; the gist in row i of sample b has the group i + shift[b].
    """

    gist: Tensor
    at: Tensor
    origin: Tensor
    empty: Tensor
    shift: Tensor

    def keys(self, groups: Tensor, tree: GistTree) -> Tensor:
        """[n, C] int64, where the keys of some groups stand; padding repeats the gist."""
        gist = self.gist[groups][:, None]
        raw = (tree.child_lo.flatten()[self.at[groups]] + self.origin[groups])[:, None] + torch.arange(self.empty.shape[1]) - 1
        keys = raw.where(~self.empty[groups], gist)
        keys[:, :1] = gist
        return keys

    def ends(self, groups: Tensor, tree: GistTree) -> Tensor:
        """[n] int32, the row of its sample after each group's last raw token; 0 for one that stands apart, in no window."""
        end = tree.child_hi.flatten()[self.at[groups]]
        return torch.where(end > tree.others.tokens, 0, end)


def chunks_of(tree: GistTree) -> Chunks:
    """The chunks of a micro-batch; made once."""
    return tree.planned("chunks", _chunks_of)


def _chunks_of(tree: GistTree) -> Chunks:
    first, last = tree.others.segment_start[:, tree.levels - 1 : tree.levels + 1].long().unbind(1)
    count = last - first
    before = count.cumsum(0) - count
    sample = torch.arange(len(count)).repeat_interleave(count)
    gist = torch.arange(len(sample)) + (first - before)[sample]
    width = (tree.child_hi - tree.child_lo)[sample, gist][:, None]  # [G, 1]
    longest = int(width.max()) if len(gist) else 0
    empty = torch.nn.functional.pad(torch.arange(longest) >= width, (1, 0))
    origin = sample * tree.others.rows.shape[1]
    return Chunks(gist + origin, gist + sample * tree.others.tokens, origin, empty, before - first)


def sort_keys(x: Tensor, apart: Tensor | None, tree: GistTree) -> Tensor:
    """[B, T, Hkv, D] and [F, Hkv, D] -> [Hkv, B * R + F, D] in at least fp32: level-sorted samples back to back, then those."""
    rows = tree.others.rows + torch.arange(len(x))[:, None] * x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1).index_select(0, rows.flatten())
    return (x if apart is None else torch.cat([x, apart.to(x.dtype)])).transpose(0, 1).contiguous()


def apart_keys(x: Tensor, tree: GistTree) -> Tensor:
    """The part of :func:`sort_keys` that stands apart, [F, Hkv, D]."""
    return x[:, tree.others.rows.numel() :].transpose(0, 1)


def unsort_keys(x: Tensor, tree: GistTree) -> Tensor:
    """The transpose of :func:`sort_keys` for the rest: [B, T, Hkv, D]; sink copies are added to their tokens."""
    intervals = tree.others
    batch, tokens = intervals.batch, intervals.tokens
    by_row = x[:, : intervals.rows.numel()].transpose(0, 1)
    sample = torch.arange(batch)[:, None]
    row_of = intervals.row_of + sample * intervals.rows.shape[1]
    out = by_row.index_select(0, row_of.flatten())
    sinks = by_row.unflatten(0, (batch, -1))[:, tokens:].flatten(0, 1)
    out.index_add_(0, (intervals.rows[:, tokens:] + sample * tokens).flatten(), sinks)
    return out.unflatten(0, (batch, tokens))


@dataclass(frozen=True)
class Entries:
    """Values at the matrix' entries: per local piece [Hkv, queries * r, keys], and for chunks [tiles, TILE * r, C]."""

    local: list[Tensor]
    chunks: Tensor

    def map(self, function, *others: Entries) -> Entries:
        """``function`` of each piece, together with the same piece of ``others``."""
        local = [function(*parts) for parts in zip(self.local, *(o.local for o in others))]
        return Entries(local, function(self.chunks, *(o.chunks for o in others)))


@dataclass(frozen=True)
class Local:
    """One local piece: queries ``[start, stop)`` of the block, spans of rows, hidden entries [Hkv, queries, keys]."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]
    hidden: Tensor

    def rows(self, by_row: Tensor) -> Tensor:
        """[Hkv, n, r, ..] -> [Hkv, queries * r, ..]"""
        return by_row[:, self.start : self.stop].flatten(1, 2)

    def keys(self, rows: Tensor) -> Tensor:
        """[Hkv, rows, D] -> [Hkv, keys, D]"""
        return torch.cat([rows[:, first:last] for first, last in self.spans], 1)


class Pattern:
    """The matrix of some recalling queries: ``n`` queries, Hkv * n rows.

    Args:
        tree, selection: as for unfolding.
        blocks: samples and their blocks of queries, consecutive; each is a local piece.
        group: query heads per KV head, ``r``.
        rows: of the buffers of keys that it is used with, per KV head.
    """

    def __init__(self, tree: GistTree, selection: Selection, blocks: list[tuple[int, QueryBlock]], group: int, rows: int):
        self.at = slice(blocks[0][1].start, blocks[-1][1].stop)  # in [N, H, D]
        self.queries = self.at.stop - self.at.start
        self.kv_heads, self.group = selection.kv_heads, group
        self.local = [_local(tree, selection, *block, self.at.start) for block in blocks]
        self._make_tiles(tree, selection, chunks_of(tree), rows)

    def _make_tiles(self, tree: GistTree, selection: Selection, chunks: Chunks, rows: int) -> None:
        """Fill the tiles.

        tile_keys: [tiles, C] int64, the keys, counted over the level-sorted rows of all heads.
        slot_row: [tiles * TILE] int64, the row in each slot, or one past the last in an empty slot.
        hidden: [tiles, TILE, C] bool, what a row does not attend to.
        """
        groups = len(chunks.gist)
        gist, query, head = _selected(selection, tree.levels - 1, self.at)
        row = head * self.queries + query
        sample = tree.tokens[self.at] // tree.others.tokens  # [n]
        chunk = head * groups + gist + chunks.shift[sample][query]
        order = chunk.int().argsort(stable=True)
        chunk, row = chunk[order], row[order]
        count = torch.bincount(chunk, minlength=self.kv_heads * groups)
        tiles = (count + TILE - 1) // TILE
        # Where a chunk's tiles begin among all slots, less where its pairs begin among all pairs.
        shift = (tiles.cumsum(0) - tiles) * TILE - (count.cumsum(0) - count)
        tile_chunk = torch.arange(len(tiles)).repeat_interleave(tiles)
        tile_head = tile_chunk // max(groups, 1)
        tile_group = tile_chunk - tile_head * groups
        self.tile_keys = chunks.keys(tile_group, tree) + (tile_head * rows)[:, None]
        self.slot_row = torch.full((len(tile_chunk) * TILE,), self.kv_heads * self.queries)
        self.slot_row[torch.arange(len(chunk)) + shift[chunk]] = row
        # Of a chunk that lies in a query's window only the gist is new: the window begins where a chunk does.
        window = torch.nn.functional.pad(tree.lo[tree.levels, self.at].repeat(self.kv_heads), (0, 1))
        near = chunks.ends(tile_group, tree)[:, None] > window[self.slot_row].view(-1, TILE)
        raw = torch.arange(chunks.empty.shape[1]) > 0
        self.hidden = chunks.empty[tile_group][:, None] | (near[..., None] & raw)  # [tiles, TILE, C]

    def by_row(self, x: Tensor) -> Tensor:
        """Its part of x [N, H, D], in at least fp32: [Hkv, n, r, D]."""
        x = x[self.at].to(torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(1, (-1, self.group)).transpose(0, 1).contiguous()

    def by_query(self, by_row: Tensor) -> Tensor:
        """The reverse: [Hkv, n, r, D] -> [n, Hkv * r, D]."""
        return by_row.transpose(0, 1).flatten(1, 2)

    def against(self, by_row: Tensor, keys: Tensor) -> Entries:
        """Products of rows [Hkv, n, r, D] and keys [Hkv, rows, D] at the entries; hidden entries too."""
        local = [torch.bmm(p.rows(by_row), p.keys(keys).transpose(1, 2)) for p in self.local]
        rows = self._padded(by_row.flatten(2))
        chunks = by_row.new_empty(len(self.tile_keys), TILE * self.group, self.tile_keys.shape[1])
        for tiles in self._slices(by_row.shape[3]):
            torch.bmm(self._in_tiles(rows, tiles), self._keys_of(tiles, keys).transpose(1, 2), out=chunks[tiles])
        return Entries(local, chunks)

    def hide_(self, entries: Entries) -> None:
        """Set the entries of keys that a row does not attend to to -inf."""
        for piece, x in zip(self.local, entries.local):
            self._of_piece(x, piece).masked_fill_(piece.hidden[:, :, None], -torch.inf)
        entries.chunks.unflatten(1, (TILE, self.group)).masked_fill_(self.hidden[:, :, None], -torch.inf)

    def maximum(self, entries: Entries) -> Tensor:
        """The largest entry of each row: [Hkv, n, r]."""
        local = torch.cat([self._of_piece(x.amax(-1), p) for x, p in zip(entries.local, self.local)], 1)
        padded = self._padded(local)
        tiles = entries.chunks.amax(-1).view(-1, self.group)
        padded.scatter_reduce_(0, self.slot_row[:, None].expand_as(tiles), tiles, "amax")
        return padded[:-1].view_as(local)

    def total(self, entries: Entries) -> Tensor:
        """The sum of each row's entries: [Hkv, n, r]."""
        local = torch.cat([self._of_piece(x.sum(-1), p) for x, p in zip(entries.local, self.local)], 1)
        padded = self._padded(local)
        padded.index_add_(0, self.slot_row, entries.chunks.sum(-1).view(-1, self.group))
        return padded[:-1].view_as(local)

    def less_(self, entries: Entries, per_row: Tensor, padding: float = 0.0) -> None:
        """Subtract a number of each row, [Hkv, n, r], from its entries; ``padding`` from those of empty slots."""
        for x, p in zip(entries.local, self.local):
            x.sub_(p.rows(per_row)[..., None])
        entries.chunks.sub_(self._padded(per_row, padding).index_select(0, self.slot_row).view(-1, TILE * self.group, 1))

    def mix(self, entries: Entries, keys: Tensor) -> Tensor:
        """Entries x keys [Hkv, rows, D]: [Hkv, n, r, D]."""
        parts = [self._of_piece(torch.bmm(x, p.keys(keys)), p) for x, p in zip(entries.local, self.local)]
        by_row = torch.cat(parts, 1)
        rows = self._padded(by_row.flatten(2))
        for tiles in self._slices(by_row.shape[3]):
            part = torch.bmm(entries.chunks[tiles], self._keys_of(tiles, keys))
            rows.index_add_(0, self.slot_row[self._slots(tiles)], part.view(-1, rows.shape[1]))
        return rows[:-1].view(by_row.shape)

    def spread_(self, entries: Entries, by_row: Tensor, keys: Tensor) -> None:
        """Add entries transposed x rows [Hkv, n, r, D] to ``keys`` [Hkv, rows, D], contiguous."""
        for x, p in zip(entries.local, self.local):
            part = torch.bmm(x.transpose(1, 2), p.rows(by_row))  # [Hkv, keys, D]
            at = 0
            for first, last in p.spans:
                keys[:, first:last] += part[:, at : at + last - first]
                at += last - first
        rows = self._padded(by_row.flatten(2))
        for tiles in self._slices(by_row.shape[3]):
            part = torch.bmm(entries.chunks[tiles].transpose(1, 2), self._in_tiles(rows, tiles))
            keys.flatten(0, 1).index_add_(0, self.tile_keys[tiles].flatten(), part.flatten(0, 1))

    def _of_piece(self, x: Tensor, piece: Local) -> Tensor:
        """[Hkv, queries * r, ..] -> [Hkv, queries, r, ..]"""
        return x.unflatten(1, (piece.stop - piece.start, self.group))

    def _slices(self, dim: int) -> Iterator[slice]:
        """The tiles, as many at a time as fit the cache."""
        tiles = len(self.tile_keys)
        step = max(1, NUMBERS // (TILE * self.group * dim))
        return (slice(i, min(i + step, tiles)) for i in range(0, tiles, step))

    def _slots(self, tiles: slice) -> slice:
        return slice(tiles.start * TILE, tiles.stop * TILE)

    def _keys_of(self, tiles: slice, keys: Tensor) -> Tensor:
        """[Hkv, rows, D] -> [tiles, C, D]"""
        index = self.tile_keys[tiles]
        return keys.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)

    def _in_tiles(self, rows: Tensor, tiles: slice) -> Tensor:
        """Padded rows [Hkv * n + 1, r * D] -> [tiles, TILE * r, D]."""
        picked = rows.index_select(0, self.slot_row[self._slots(tiles)])
        return picked.view(tiles.stop - tiles.start, TILE * self.group, -1)

    def _padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[Hkv, n, d] -> [Hkv * n + 1, d]: one more row, which the empty slots of tiles refer to."""
        return torch.cat([x.flatten(0, 1), x.new_full((1, x.shape[2]), value)])


def _selected(selection: Selection, segment: int, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What some queries selected in a segment: row, number of query, KV head, three [pairs] int64."""
    ends = selection.start[segment][queries.start * selection.kv_heads : queries.stop * selection.kv_heads + 1]
    rows = selection.rows[segment][int(ends[0]) : int(ends[-1])].long()
    owner = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())
    query = owner // selection.kv_heads
    return rows, query, owner - query * selection.kv_heads


def local_keys(tree: GistTree, block: QueryBlock) -> int:
    """Keys of the local piece of a block of queries; level-0 gists go with their chunks."""
    return sum(last - first for s, first, last in block.spans if s != tree.levels - 1)


def _local(tree: GistTree, selection: Selection, sample: int, block: QueryBlock, origin: int) -> Local:
    """The local piece of one block of queries; ``origin`` is the first query of the pattern."""
    at, shape = slice(block.start, block.stop), (selection.kv_heads, block.stop - block.start)
    offset = sample * tree.others.rows.shape[1]
    spans, hidden = [], []
    for s, first, last in block.spans:
        if s == tree.levels - 1:
            continue  # level-0 gists go with their chunks
        if s < tree.levels:
            rows, query, head = _selected(selection, s, at)
            hide = torch.ones(*shape, last - first, dtype=torch.bool)
            hide[head, query, rows - first] = False
        else:
            row = torch.arange(first, last, dtype=torch.int32)
            hide = ((row < tree.lo[s, at, None]) | (row >= tree.hi[s, at, None])).expand(*shape, -1)
        spans.append((first + offset, last + offset))
        hidden.append(hide)
    return Local(block.start - origin, block.stop - origin, tuple(spans), torch.cat(hidden, 2))
