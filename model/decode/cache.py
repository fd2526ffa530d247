"""What a sequence has computed so far: per layer, keys and values of raw tokens and, compact, of every gist level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unfold.model.config import ModelConfig
from unfold.model.gist.growable import Growable
from unfold.model.gist.growing import Outline, Sight
from unfold.model.gist.joining import JoinedOutline
from unfold.model.kinds import kind_of, window_of


@dataclass
class Reads:
    """Rows of the cache that attention has read, over all layers and KV heads; padding of gathers counts as read."""

    keys: int = 0
    values: int = 0


class Rows:
    """Keys and values of one segment (a gist level, or the raw tokens) in one layer. Every read is counted.

    Args:
        kv_heads, head_dim: shape of a row.
        dtype, device: of keys and values.
        reads: the sequence's count.
        on_host: keep the rows in host memory; what is read of them is brought to the device. For a GPU the memory is pinned, so
            that kernels may read rows in place.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, reads: Reads, on_host: bool = False
    ):
        held = torch.device("cpu") if on_host else device
        reader = device if on_host and device.type == "cuda" else None
        self.buffer = Growable([2, kv_heads, 0, head_dim], 2, dtype, held, reader)
        self.reads, self.device, self.on_host = reads, device, on_host

    def append(self, k: Tensor, v: Tensor) -> None:
        """k, v: [n, Hkv, D]"""
        self.buffer.append(torch.stack([k, v]).transpose(1, 2))

    def put(self, k: Tensor, v: Tensor) -> None:
        """As :meth:`append`, of k, v [Hkv, n, D]."""
        self.buffer.append(torch.stack([k, v]))

    @property
    def memory(self) -> Tensor:
        """What the rows lie in, [2, Hkv, capacity, D], perhaps on the host; kernels that read it in place are not counted."""
        return self.buffer.memory

    def keys(self, lo: int, hi: int) -> Tensor:
        """Rows ``[lo, hi)`` on the device: [Hkv, hi - lo, D], a view where they lie there."""
        self.reads.keys += (hi - lo) * self.buffer.memory.shape[1]
        return self.buffer.memory[0, :, lo:hi].to(self.device)

    def values(self, lo: int, hi: int) -> Tensor:
        """As :meth:`keys`."""
        self.reads.values += (hi - lo) * self.buffer.memory.shape[1]
        return self.buffer.memory[1, :, lo:hi].to(self.device)

    def keys_at(self, rows: Tensor) -> Tensor:
        """Rows of each KV head, [Hkv, n] int64 -> [Hkv, n, D]."""
        self.reads.keys += rows.numel()
        return self._at(0, rows)

    def values_at(self, rows: Tensor) -> Tensor:
        """As :meth:`keys_at`."""
        self.reads.values += rows.numel()
        return self._at(1, rows)

    def _at(self, which: int, rows: Tensor) -> Tensor:
        memory = self.buffer.memory[which]  # [Hkv, capacity, D]
        rows = rows.to(memory.device)
        first = torch.arange(memory.shape[0], device=rows.device)[:, None] * memory.shape[1]
        return memory.flatten(0, 1).index_select(0, (rows + first).flatten()).view(*rows.shape, -1).to(self.device)


class OnDevices:
    """Mixed into an outline, which is on the CPU: its borders on the devices of the kernels that read them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._mirrors: dict[torch.device, list[Growable]] = {}
        self._longest = [0] * self.levels  # most items behind a gist, as far as the mirrors know

    def ends_on(self, device: torch.device) -> tuple[list[Tensor], list[int]]:
        """``ends`` of each segment on a device, brought up to date by what came since; and the most items behind one gist."""
        if device not in self._mirrors:
            self._mirrors[device] = [Growable([0], 0, torch.int64, device) for _ in self.ends]
        mirrors = self._mirrors[device]
        for s, (mirror, ends) in enumerate(zip(mirrors, self.ends)):
            if mirror.length < ends.length:  # gists are never dropped
                lo, hi = self.children(s, torch.arange(mirror.length, ends.length))
                self._longest[s] = max(self._longest[s], int((hi - lo).max()))
                mirror.append(ends.rows[mirror.length :].to(device))
        return [mirror.memory for mirror in mirrors], self._longest


class CachedOutline(OnDevices, Outline):
    """The outline of a cached sequence."""


class CachedJoinedOutline(OnDevices, JoinedOutline):
    """The outline of a cached sequence that was joined of parts."""


class SequenceCache:
    """The state of one sequence: its outline and, per layer and segment, its keys and values.

    A layer keeps what its kind can still read: gist layers everything, dense layers all raw tokens, layers with a window the last
    of them and the sinks. Of gists the latter two keep those that were read last, which see themselves.

    Args:
        model: shape of the layers, and their kinds.
        outline: of the sequence.
        dtype, device: of keys and values.
        raw_on_host: keep those of raw tokens of gist layers in host memory, see :class:`Rows`.
        whole: layers with a window keep all raw tokens, too: for a part, behind which others may come to stand.
    """

    def __init__(
        self,
        model: ModelConfig,
        outline: CachedOutline | CachedJoinedOutline,
        dtype: torch.dtype,
        device: torch.device,
        raw_on_host: bool = False,
        whole: bool = False,
    ):
        self.outline, self.reads, self.whole = outline, Reads(), whole
        kinds = model.kinds_with(outline.levels > 0)
        self.kinds = [kind_of(kinds, index) for index in range(model.layers)]
        # Of each kind how many items of every segment its layers have forgotten; of raw tokens those behind the sinks.
        self.forgotten = {kind: [0] * len(outline.counts) for kind in dict.fromkeys(self.kinds)}
        of_host = lambda kind, s: raw_on_host and kind == "gist" and s == outline.levels
        make = lambda kind, s: Rows(model.kv_heads, model.head_dim, dtype, device, self.reads, of_host(kind, s))
        self.layers = [[make(kind, s) for s in range(len(outline.counts))] for kind in self.kinds]  # [layer][segment]
        self._addresses = torch.zeros(len(self.layers), len(outline.counts), 2, dtype=torch.int64)
        self._moves = [-1] * self._addresses[..., 0].numel()  # of every row's memory, when its address was looked up

    def views(self, sight: Sight) -> dict[str, Sight]:
        """By kind of layer what new tokens see, in numbers of the rows that the layers keep.

        To be asked for once, before the tokens' keys and values come: layers forget here what nobody sees any more.
        """
        views = {}
        for kind, forgotten in self.forgotten.items():
            seen = self.outline.in_layer(kind, sight)
            if kind != "gist":
                self._forget(kind, forgotten, sight.start)
                gone = torch.tensor(forgotten)[:, None]
                seen = replace(seen, lo=seen.lo - gone, hi=seen.hi - gone, number=seen.number - gone[seen.segment, 0])
            views[kind] = seen
        return views

    def _forget(self, kind: str, forgotten: list[int], start: tuple[int, ...]) -> None:
        """start: items of each segment before what is read next."""
        layers = [layer for layer, own in zip(self.layers, self.kinds) if own == kind]
        for s, items in enumerate(start[:-1]):
            forgotten[s] = items
            for layer in layers:
                layer[s].buffer.truncate(0)
        window = window_of(kind)
        if window is None or self.whole:
            return
        more = self.outline.unseen(window, start[-1]) - forgotten[-1]
        if more > 0 and 2 * more >= start[-1] - forgotten[-1]:  # what stays is moved: each row once, in the mean
            forgotten[-1] += more
            for layer in layers:
                layer[-1].buffer.forget(self.outline.sink, more)

    def held(self, segment: int) -> list[int]:
        """The layers that keep all items of a segment."""
        raw = segment == len(self.outline.counts) - 1
        return [index for index, kind in enumerate(self.kinds) if raw or kind == "gist"]

    def append(self, layer: int, segment: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep new tokens' k, v [n, Hkv, D] in one layer; segment: [n] int64."""
        if len(segment) == 1:  # the usual step: no search, no copy
            self.layers[layer][int(segment)].append(k, v)
            return
        for s, rows in enumerate(self.layers[layer]):
            which = (segment == s).nonzero()[:, 0].to(k.device)
            if len(which):
                rows.append(k[which], v[which])

    def begins(self, kind: str, position: Tensor) -> Tensor:
        """In layers of a kind with a window, the first row that raw tokens at these rotary positions see behind the sinks."""
        return self.outline.first_within(position, window_of(kind)) - self.forgotten[kind][-1]

    def settle(self, ahead: int) -> None:
        """Take the tokens that the outline holds for kept: kernels write them. With room for ``ahead`` raw ones more."""
        for layer, kind in zip(self.layers, self.kinds):
            for rows, count, gone in zip(layer, self.outline.counts, self.forgotten[kind]):
                rows.buffer.reserve(count - gone + (ahead if rows is layer[-1] else 0))
                rows.buffer.length = count - gone

    def addresses(self) -> Tensor:
        """Where the rows of each layer and segment begin in memory, in bytes, and the room for rows: [layers, L + 1, 2] int64.

        Not to be written to; of what has not moved since this was asked for last, nothing is looked up again.
        """
        held = [rows.buffer for layer in self.layers for rows in layer]
        moves = [buffer.moves for buffer in held]
        if moved := [i for i, (now, before) in enumerate(zip(moves, self._moves)) if now != before]:
            found = [(held[i].memory.data_ptr(), held[i].memory.shape[2]) for i in moved]
            self._addresses.view(-1, 2)[moved] = torch.tensor(found)
            self._moves = moves
        return self._addresses

    def append_raw(self) -> None:
        """Enter a raw token that kernels have written, within the room that :meth:`settle` made."""
        self.outline.append_raw(1)
        for layer in self.layers:
            layer[-1].buffer.length += 1

    def drop(self, tokens: int) -> None:
        """Forget the last tokens, which must be raw."""
        if tokens:
            self.outline.drop(tokens)
            for layer in self.layers:
                layer[-1].buffer.truncate(layer[-1].buffer.length - tokens)
