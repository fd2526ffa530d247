"""Who attends to whom in a block of recalling queries, as a sparse matrix with dense pieces (CPU path).

A row is a query of one KV head (with its ``r`` query heads side by side), and its keys come from two kinds of pieces:

- *local*: 64 neighbouring queries against their window, the sinks and the gists above level 0, masked;
- *chunks*: a key group is a level-0 gist with the raw tokens behind it, and the rows that selected it stand together in tiles
  of ``TILE``. So a chunk is read once for many queries, and nothing is multiplied that was not selected.

Attention and its gradients are then three products with that matrix: rows x keys at its entries (:meth:`Pattern.against`),
entries x keys (:meth:`Pattern.mix`) and entries transposed x rows (:meth:`Pattern.spread`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.intervals import QueryBlock
from kernels.select.selection import Selection
from kernels.tree import GistTree

# Rows per tile. A chunk's last tile is padded; larger tiles pad more, smaller ones read the chunk more often.
TILE = 16


@dataclass(frozen=True)
class Chunks:
    """The key groups of one sample: a level-0 gist, then the raw tokens behind it, padded to the longest.

    Attributes:
        first: row of the sample's first level-0 gist; G of them follow.
        index: [G, C] int64, rows of the level-sorted buffer; padding repeats the gist.
        empty: [G, C] bool, the padding.
        end: [G] int32, row after the group's last raw token.
    """

    first: int
    index: Tensor
    empty: Tensor
    end: Tensor


def chunks_of(tree: GistTree, sample: int) -> Chunks:
    """The chunks of a sample; made once per micro-batch."""
    return tree.others.memo(("chunks", sample), lambda: _chunks_of(tree, sample))


def _chunks_of(tree: GistTree, sample: int) -> Chunks:
    first, last = tree.others.segment_start[sample, tree.levels - 1 : tree.levels + 1].tolist()
    lo, hi = (x[sample, first:last, None].long() for x in (tree.child_lo, tree.child_hi))
    longest = int((hi - lo).max()) if last > first else 0
    raw = lo + torch.arange(longest)  # [G, C - 1]
    gist = torch.arange(first, last)[:, None]
    empty = torch.nn.functional.pad(raw >= hi, (1, 0))
    index = torch.cat([gist, raw.where(raw < hi, gist)], 1)
    return Chunks(first, index, empty, tree.child_hi[sample, first:last])


@dataclass(frozen=True)
class Keys:
    """Keys (or values, or their gradients) of one sample, as both kinds of pieces read them.

    Attributes:
        rows: [Hkv, R, D], level-sorted.
        chunks: [Hkv * G, C, D], by :class:`Chunks`.
    """

    rows: Tensor
    chunks: Tensor

    @classmethod
    def of(cls, x: Tensor, tree: GistTree, sample: int) -> Keys:
        """From x [T, Hkv, D], in at least fp32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = x.index_select(0, tree.others.rows[sample]).transpose(0, 1).contiguous()
        index = chunks_of(tree, sample).index
        return cls(rows, rows.index_select(1, index.flatten()).view(-1, index.shape[1], x.shape[2]))

    def of_heads(self, heads: slice) -> Keys:
        """Views of some KV heads: what is added to them is added here."""
        rows = self.rows[heads]
        return Keys(rows, self.chunks.unflatten(0, (len(self.rows), -1))[heads].flatten(0, 1))

    def zeros_like(self) -> Keys:
        return Keys(torch.zeros_like(self.rows), torch.zeros_like(self.chunks))

    def unsorted(self, tree: GistTree, sample: int) -> Tensor:
        """[T, Hkv, D], every key's contributions from both kinds of pieces summed: the transpose of :meth:`of`."""
        index = chunks_of(tree, sample).index.flatten()
        chunks = self.chunks.view(self.rows.shape[0], -1, self.rows.shape[2])
        by_row = self.rows.clone()
        for head, part in zip(by_row, chunks):
            head.index_add_(0, index, part)
        by_row = by_row.transpose(0, 1)
        tokens = tree.others.tokens
        out = by_row.index_select(0, tree.others.row_of[sample])
        return out.index_add_(0, tree.others.rows[sample, tokens:], by_row[tokens:])


@dataclass(frozen=True)
class Rows:
    """Queries (or gradients of outputs) of a block: by_row [Hkv, n, r, D], and as tiles [tiles, TILE * r, D]."""

    by_row: Tensor
    tiles: Tensor


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

    def keys(self, rows: Tensor) -> Tensor:
        """[Hkv, R, D] -> [Hkv, keys, D]"""
        return torch.cat([rows[:, first:last] for first, last in self.spans], 1)


class Pattern:
    """The matrix of some recalling queries of one sample and some KV heads (below: Hkv of them), Hkv * n rows.

    Args:
        tree, selection: as for unfolding.
        sample: to which the queries belong.
        blocks: consecutive blocks of queries; each is a local piece.
        heads: the KV heads.
        group: query heads per KV head, ``r``.
    """

    def __init__(self, tree: GistTree, selection: Selection, sample: int, blocks: list[QueryBlock], heads: slice, group: int):
        self.start, self.stop = blocks[0].start, blocks[-1].stop
        self.queries = self.stop - self.start
        self.heads, self.kv_heads, self.group = heads, heads.stop - heads.start, group
        self.at = (slice(self.start, self.stop), slice(heads.start * group, heads.stop * group))  # in [N, H, D]
        self.local = [_local(tree, selection, block, heads, self.start) for block in blocks]
        self._make_tiles(tree, selection, heads, chunks_of(tree, sample))

    def _make_tiles(self, tree: GistTree, selection: Selection, heads: slice, chunks: Chunks) -> None:
        """tile_chunk [tiles] (which chunk of which head), slot_row [tiles * TILE] (row, or one past the last), hidden."""
        groups = len(chunks.end)
        gist, query, head = _selected(selection, tree.levels - 1, slice(self.start, self.stop), heads)
        row = head * self.queries + query
        chunk = head * groups + (gist - chunks.first)
        order = chunk.int().argsort(stable=True)
        chunk, row = chunk[order], row[order]
        count = torch.bincount(chunk, minlength=self.kv_heads * groups)
        tiles = (count + TILE - 1) // TILE
        # Where a chunk's tiles begin among all slots, less where its pairs begin among all pairs.
        shift = (tiles.cumsum(0) - tiles) * TILE - (count.cumsum(0) - count)
        self.tile_chunk = torch.arange(len(tiles)).repeat_interleave(tiles)
        self.slot_row = torch.full((len(self.tile_chunk) * TILE,), self.kv_heads * self.queries)
        self.slot_row[torch.arange(len(chunk)) + shift[chunk]] = row
        # Of a chunk that lies in a query's window only the gist is new: the window begins where a chunk does.
        window = torch.nn.functional.pad(tree.lo[tree.levels, self.start : self.stop].repeat(self.kv_heads), (0, 1))
        group_of_tile = self.tile_chunk % max(groups, 1)
        near = chunks.end[group_of_tile][:, None] > window[self.slot_row].view(-1, TILE)
        raw = torch.arange(chunks.index.shape[1]) > 0
        self.hidden = chunks.empty[group_of_tile][:, None] | (near[..., None] & raw)  # [tiles, TILE, C]

    def by_row(self, x: Tensor) -> Tensor:
        """Its part of x [N, H, D], in at least fp32: [Hkv, n, r, D]."""
        x = x[self.at].to(torch.promote_types(x.dtype, torch.float32))
        return x.unflatten(1, (-1, self.group)).transpose(0, 1).contiguous()

    def by_query(self, by_row: Tensor) -> Tensor:
        """The reverse: [Hkv, n, r, D] -> [n, Hkv * r, D]."""
        return by_row.transpose(0, 1).flatten(1, 2)

    def rows(self, by_row: Tensor) -> Rows:
        """From [Hkv, n, r, D]."""
        tiles = self._padded(by_row.flatten(2)).index_select(0, self.slot_row)
        return Rows(by_row, tiles.view(-1, TILE * self.group, by_row.shape[3]))

    def against(self, rows: Rows, keys: Keys) -> Entries:
        """Products of rows and keys at the entries; hidden entries too."""
        keys = keys.of_heads(self.heads)
        part = lambda p: rows.by_row[:, p.start : p.stop].flatten(1, 2)
        local = [torch.bmm(part(p), p.keys(keys.rows).transpose(1, 2)) for p in self.local]
        return Entries(local, torch.bmm(rows.tiles, keys.chunks.index_select(0, self.tile_chunk).transpose(1, 2)))

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
        return self._add_tiles(local[..., None], entries.chunks.sum(-1, keepdim=True))[..., 0]

    def less_(self, entries: Entries, per_row: Tensor, padding: float = 0.0) -> None:
        """Subtract a number of each row, [Hkv, n, r], from its entries; ``padding`` from those of empty slots."""
        for x, p in zip(entries.local, self.local):
            x.sub_(per_row[:, p.start : p.stop].flatten(1)[..., None])
        entries.chunks.sub_(self._padded(per_row, padding).index_select(0, self.slot_row).view(-1, TILE * self.group, 1))

    def mix(self, entries: Entries, keys: Keys) -> Tensor:
        """Entries x keys: [Hkv, n, r, D]."""
        keys = keys.of_heads(self.heads)
        parts = [self._of_piece(torch.bmm(x, p.keys(keys.rows)), p) for x, p in zip(entries.local, self.local)]
        tiles = torch.bmm(entries.chunks, keys.chunks.index_select(0, self.tile_chunk))
        return self._add_tiles(torch.cat(parts, 1), tiles)

    def spread_(self, entries: Entries, rows: Rows, keys: Keys) -> None:
        """Add entries transposed x rows to ``keys``."""
        keys = keys.of_heads(self.heads)
        for x, p in zip(entries.local, self.local):
            part = torch.bmm(x.transpose(1, 2), rows.by_row[:, p.start : p.stop].flatten(1, 2))  # [Hkv, keys, D]
            at = 0
            for first, last in p.spans:
                keys.rows[:, first:last] += part[:, at : at + last - first]
                at += last - first
        keys.chunks.index_add_(0, self.tile_chunk, torch.bmm(entries.chunks.transpose(1, 2), rows.tiles))

    def _of_piece(self, x: Tensor, piece: Local) -> Tensor:
        """[Hkv, queries * r, ..] -> [Hkv, queries, r, ..]"""
        return x.unflatten(1, (piece.stop - piece.start, self.group))

    def _padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[Hkv, n, d] -> [Hkv * n + 1, d]: one more row, which the empty slots of tiles refer to."""
        return torch.cat([x.flatten(0, 1), x.new_full((1, x.shape[2]), value)])

    def _add_tiles(self, by_row: Tensor, tiles: Tensor) -> Tensor:
        """by_row [Hkv, n, r, d] plus what its rows have in tiles [tiles, TILE * r, d]."""
        padded = self._padded(by_row.flatten(2))
        return padded.index_add_(0, self.slot_row, tiles.reshape(-1, padded.shape[1]))[:-1].view(by_row.shape)


def _selected(selection: Selection, segment: int, queries: slice, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What some queries and KV heads selected in a segment: row, number of query, number of head, three [pairs] int64."""
    start = selection.start[segment]
    lists = lambda x: x.view(-1, selection.kv_heads)[queries, heads].flatten()
    first, count = lists(start[:-1]), lists(start.diff())
    owner = torch.arange(len(count)).repeat_interleave(count)
    place = torch.arange(len(owner)) + (first - (count.cumsum(0) - count))[owner]
    width = heads.stop - heads.start
    return selection.rows[segment].index_select(0, place).long(), owner // width, owner % width


def _local(tree: GistTree, selection: Selection, block: QueryBlock, heads: slice, origin: int) -> Local:
    """The local piece of one block of queries; ``origin`` is the first query of the pattern."""
    at, shape = slice(block.start, block.stop), (heads.stop - heads.start, block.stop - block.start)
    spans, hidden = [], []
    for s, first, last in block.spans:
        if s == tree.levels - 1:
            continue  # level-0 gists go with their chunks
        if s < tree.levels:
            rows, query, head = _selected(selection, s, at, heads)
            hide = torch.ones(*shape, last - first, dtype=torch.bool)
            hide[head, query, rows - first] = False
        else:
            row = torch.arange(first, last, dtype=torch.int32)
            hide = ((row < tree.lo[s, at, None]) | (row >= tree.hi[s, at, None])).expand(*shape, -1)
        spans.append((first, last))
        hidden.append(hide)
    return Local(block.start - origin, block.stop - origin, tuple(spans), torch.cat(hidden, 2))
