"""One sequence of an exported model: what it reads and has read, keys and values. Shipped with exports; needs torch alone."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from unfold.model.gist.growing import Feed, GistPlacement, Outline, Sight
from unfold.model.gist.joining import JoinedOutline
from unfold.model.kinds import kind_of, objection


@dataclass(frozen=True)
class GistSettings:
    """The ``gist`` entry of config.json.

    Attributes:
        chunk_sizes: raw tokens per level-0 gist, level-0 gists per level-1 gist, ..
        token_ids: vocabulary id of each gist level; an entry may have more of them, for choices with more levels.
        reserved_ids: every id of the vocabulary of a gist or link; none of them is ever generated.
        word_starts: for each vocabulary id whether it starts a word: base64 of the zlib-compressed bitmap, lowest bit first;
            not looked at, and empty where the entry has none, without word_aware.
        sink: first raw tokens that all later tokens see.
        n_prev: closed neighbour groups that stay visible at every level.
        recall: which raw tokens unfold chunks: none | suffix | all.
        topk, top_p, budget_ratio: gists selected per level and head; the adaptive budget where the first two are None.
        share: head (each query head selects, its KV group reads the union) | group (one selection by summed scores).
        own_group: whether of the level below it a gist sees its own group alone.
        word_aware: whether chunks grow to where a word starts.
        recall_from: first layer in which tokens recall.
        unfold_all: whether they unfold everything before them, whatever the budget is.
        links, link_ids: how many link tokens a part of a linked context has, and their ids; none where the vocabulary has none.
        layer_attention: kinds of layers, repeated over them; empty: all are gist layers.
        choices: the chunk sizes that samples drew among in training, where there were several; others may be read with too.
    """

    chunk_sizes: tuple[int, ...]
    token_ids: tuple[int, ...]
    reserved_ids: tuple[int, ...]
    word_starts: str
    sink: int = 3
    n_prev: int = 1
    recall: str = "none"
    topk: int | None = None
    top_p: float | None = None
    budget_ratio: int | None = None
    share: str = "head"
    own_group: bool = False
    word_aware: bool = True
    recall_from: int = 1
    unfold_all: bool = False
    links: int = 0
    link_ids: tuple[int, ...] = ()
    layer_attention: tuple[str, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if self.unfold_all:  # no budget counts, and one selection serves all heads: they would make the same
            for name, value in (("topk", None), ("top_p", None), ("share", "group")):
                object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config, chunk_sizes: Sequence[int] | None = None) -> GistSettings:
        """Those of a model's configuration; ValueError if they cannot be read. chunk_sizes: in place of its own."""
        entry = getattr(config, "gist", None)
        if not isinstance(entry, dict):
            raise ValueError(f"config.gist: {entry!r}; gist attention needs the entry that an export writes")
        known = {f.name for f in fields(cls)}
        needed = {"chunk_sizes", "token_ids", "reserved_ids"} | ({"word_starts"} if entry.get("word_aware", True) else set())
        missing = needed - entry.keys()
        if missing or entry.keys() - known:
            raise ValueError(f"config.gist: lacks {sorted(missing)}, has unknown {sorted(entry.keys() - known)}; export again")
        ids, sizes = entry["token_ids"], entry["chunk_sizes"] if chunk_sizes is None else list(chunk_sizes)
        where = "config.gist" if chunk_sizes is None else f"gist_chunk_sizes: {sizes}"
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"{where}: chunk_sizes {sizes!r}; expected whole numbers above 0, one per level, such as [8, 4]")
        if len(ids) < len(sizes):
            raise ValueError(f"{where}: {len(ids)} token_ids for {len(sizes)} chunk_sizes; one per level")
        entry = {"word_starts": "", **entry, "chunk_sizes": sizes, "token_ids": ids[: len(sizes)]}
        settings = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        for name, allowed in (("recall", ("none", "suffix", "all")), ("share", ("head", "group"))):
            if getattr(settings, name) not in allowed:
                raise ValueError(f"config.gist: {name} {getattr(settings, name)!r} is not one of {', '.join(allowed)}")
        if wrong := next(filter(None, map(objection, settings.layer_attention)), ""):
            raise ValueError(f"config.gist: layer_attention {wrong}")
        return settings

    def kind(self, layer: int) -> str:
        """That of a layer."""
        return kind_of(self.layer_attention or "gist", layer)

    @property
    def levels(self) -> int:
        return len(self.chunk_sizes)

    def budget(self, span: Tensor, gists: Tensor, group: int) -> Tensor:
        """[n] gists to select. span, gists: [n] tokens up to the query, the level's gists before it; group: heads per KV head."""
        if self.unfold_all:
            return gists
        if self.topk is not None:
            return torch.full_like(span, self.topk)
        ratio = self.budget_ratio or prod(self.chunk_sizes)
        adaptive = span // (ratio * group * self.chunk_sizes[0]) + 1
        return adaptive.minimum((gists // 4).clamp(min=1))


def pack_word_starts(word_starts: Tensor) -> str:
    """[vocab] bool -> the text that config.json holds; :func:`unpack_word_starts` undoes it, up to a multiple of 8."""
    bits = torch.nn.functional.pad(word_starts.to(torch.uint8), (0, -len(word_starts) % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return base64.b64encode(zlib.compress(bytes(packed.tolist()), 9)).decode()


@lru_cache(maxsize=4)
def unpack_word_starts(text: str) -> bytes:
    """One byte per vocabulary id, 1 where it starts a word."""
    packed = torch.tensor(list(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8)
    return bytes(((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().tolist())


class SegmentRows:
    """Keys and values of one segment in one layer, in memory that doubles when it is full: two [Hkv, n, D]."""

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def put(self, at: int, keys: Tensor, values: Tensor) -> None:
        """Write rows [Hkv, m, D] from number ``at`` on; what stood there is replaced (a layer may be computed again)."""
        if torch.is_grad_enabled():
            if at:
                keys, values = (torch.cat([old[:, :at], new], 1) for old, new in ((self.keys, keys), (self.values, values)))
            self.keys, self.values = keys, values
            return
        end = at + keys.shape[1]
        self.keys, self.values = (self._write(old, at, end, x) for old, x in ((self.keys, keys), (self.values, values)))

    @staticmethod
    def _write(memory: Tensor | None, at: int, end: int, rows: Tensor) -> Tensor:
        if memory is None or end > memory.shape[1]:
            room = max(end, 2 * at, 16)
            grown = rows.new_empty(rows.shape[0], room, rows.shape[2])
            if at:
                grown[:, :at] = memory[:, :at]
            memory = grown
        memory[:, at:end] = rows
        return memory

    def copy(self) -> SegmentRows:
        other = SegmentRows()
        if self.keys is not None:
            other.keys, other.values = self.keys.clone(), self.values.clone()
        return other


class GistSequence:
    """One growing sequence: where its gists go, its outline, and every layer's keys and values."""

    def __init__(self, settings: GistSettings, device: torch.device, outline: Outline | None = None):
        self.settings, self.device = settings, device
        starts = unpack_word_starts(settings.word_starts) if settings.word_aware else None
        self.placement = GistPlacement(settings, starts, settings.token_ids)
        self.outline = Outline(settings, device) if outline is None else outline
        self.layers: dict[int, list[SegmentRows]] = {}
        self.closed_at: int | None = None  # raw tokens before which the context was closed on purpose

    def copy(self) -> GistSequence:
        """A sequence that goes on independently."""
        other = GistSequence.__new__(GistSequence)
        other.__dict__.update(self.__dict__)
        other.placement, other.outline = self.placement.copy(), self.outline.copy()
        other.layers = {index: [rows.copy() for rows in layer] for index, layer in self.layers.items()}
        return other

    def layer(self, index: int) -> list[SegmentRows]:
        """Keys and values of a layer, by segment."""
        return self.layers.setdefault(index, [SegmentRows() for _ in self.outline.counts])

    def read(self, tokens: list[int], query_start: int | None, grow: bool | None) -> Feed:
        """Enter raw tokens; they are to be read by the model as the result says.

        Args:
            tokens: in order.
            query_start: raw tokens of the context, counted from the sequence's start: it is closed there with a gist at every
                level, and what follows recalls. None: tokens before which nothing was read are context, later ones recall.
            grow: whether what follows a closed context gets gists as its chunks close; None: where no context was closed.

        Raises:
            ValueError: the context would end among tokens that were read before, or gists would come after parts.
        """
        if grow and isinstance(self.outline, JoinedOutline):
            raise ValueError("gist_grow: True, but what follows joined parts gets no gists; leave it out")
        recall, before = self.settings.recall, self.outline.counts[-1]
        if query_start is None:
            suffix = before > 0 or self.closed_at is not None
            grow = self.closed_at is None if grow is None else grow
            enter = self.placement.push if grow or not suffix else self.placement.leave
            return enter(tokens, recall == "all" or (suffix and recall != "none"))
        if before > query_start and self.closed_at != query_start:
            raise ValueError(
                f"gist_query_start: {query_start}, but {before} tokens were read already and the context was "
                f"{'not closed' if self.closed_at is None else f'closed at {self.closed_at}'}; give at least {before}"
            )
        cut = min(max(query_start - before, 0), len(tokens))
        ends = before + cut == query_start and self.closed_at != query_start
        feed = Feed()
        if cut or ends:
            feed = self.placement.push(tokens[:cut], recall == "all", close=ends)
        if ends:
            self.closed_at = query_start
        if cut < len(tokens):
            # A closed context leaves no open chunk, of which the suffix could drop anything: one of the two drops nothing.
            enter = self.placement.push if grow else self.placement.leave
            feed = feed.then(enter(tokens[cut:], recall != "none"))
        return feed

    def append(self, feed: Feed) -> Sight:
        """Enter what is read: borders and counts; keys and values follow layer by layer."""
        self.outline.drop(feed.drop)
        return self.outline.append(feed.level, feed.recalls)
