"""Where the gists of a growing sequence go, and what each of its tokens may read. Shipped with exports; needs torch alone.

A sequence is fed raw tokens; gists are put among them as its chunks close, so that a whole text has them where training
puts them. Its items are numbered per *segment*: 0 holds the gists of the top level, L - 1 those of level 0, L the raw tokens.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class GistSettings:
    """The ``gist`` entry of config.json.

    Attributes:
        chunk_sizes: raw tokens per level-0 gist, level-0 gists per level-1 gist, ..
        token_ids: vocabulary id of each gist level.
        reserved_ids: every id of the vocabulary of a gist or link; none of them is ever generated.
        word_starts: for each vocabulary id whether it starts a word: base64 of the zlib-compressed bitmap, lowest bit first.
        sink: first raw tokens that all later tokens see.
        n_prev: closed neighbour groups that stay visible at every level.
        recall: which raw tokens unfold chunks: none | suffix | all.
        topk, top_p, budget_ratio: gists selected per level and head; the adaptive budget where the first two are None.
        share: head (each query head selects, its KV group reads the union) | group (one selection by summed scores).
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

    @classmethod
    def of(cls, config) -> GistSettings:
        """Those of a model's configuration; ValueError if it has none or they cannot be read."""
        entry = getattr(config, "gist", None)
        if not isinstance(entry, dict):
            raise ValueError(f"config.gist: {entry!r}; gist attention needs the entry that an export writes")
        known = {f.name for f in fields(cls)}
        missing = {"chunk_sizes", "token_ids", "reserved_ids", "word_starts"} - entry.keys()
        if missing or entry.keys() - known:
            raise ValueError(f"config.gist: lacks {sorted(missing)}, has unknown {sorted(entry.keys() - known)}; export again")
        settings = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        if len(settings.token_ids) != settings.levels:
            raise ValueError(f"config.gist: {len(settings.token_ids)} token_ids for {settings.levels} chunk_sizes; one per level")
        for name, allowed in (("recall", ("none", "suffix", "all")), ("share", ("head", "group"))):
            if getattr(settings, name) not in allowed:
                raise ValueError(f"config.gist: {name} {getattr(settings, name)!r} is not one of {', '.join(allowed)}")
        return settings

    @property
    def levels(self) -> int:
        return len(self.chunk_sizes)

    def budget(self, span: Tensor, gists: Tensor, group: int) -> Tensor:
        """[n] gists to select. span, gists: [n] tokens up to the query, the level's gists before it; group: heads per KV head."""
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


@dataclass(frozen=True)
class Feed:
    """What a sequence reads next.

    Attributes:
        drop: raw tokens at its end that are read again, now with a gist among them.
        ids, level, recalls: of the tokens to read: vocabulary id, level (-1 is raw), whether it unfolds chunks.
    """

    drop: int
    ids: list[int]
    level: list[int]
    recalls: list[bool]


@dataclass(frozen=True)
class Sight:
    """What ``n`` new tokens of a sequence may read, in item numbers per segment. Tensors on the model's input device.

    Attributes:
        members: for each segment which of the new tokens are its items, [m] int64.
        start: for each segment the number of its first new item.
        ends: for each gist segment, how many items of the segment below stand before each gist, [gists] int64.
        lo, hi: [L + 1, n] int64, what a token sees while forgetting; empty where equal. hi is also the number of items up to
            and including the token.
        sinks: [n] int64, first raw tokens that it sees beside its raw range.
        tail: [L, n] int64, the first gist whose parent is not closed yet.
        recalls: [n] bool.
        position: [n] int64, rotary position.
    """

    members: list[Tensor]
    start: list[int]
    ends: list[Tensor]
    lo: Tensor
    hi: Tensor
    sinks: Tensor
    tail: Tensor
    recalls: Tensor
    position: Tensor

    def children(self, segment: int, gists: Tensor, sink: int) -> tuple[Tensor, Tensor]:
        """Items ``[lo, hi)`` of the segment below that gists closed, two [m] int64; sinks are nobody's children."""
        ends = self.ends[segment]
        lo, hi = ends[(gists - 1).clamp(min=0)] * (gists > 0), ends[gists]
        return (lo.clamp(min=sink).minimum(hi), hi) if segment == len(self.ends) - 1 else (lo, hi)


class Rows:
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

    def copy(self) -> Rows:
        other = Rows()
        if self.keys is not None:
            other.keys, other.values = self.keys.clone(), self.values.clone()
        return other


class GistSequence:
    """One growing sequence: its open groups, the borders of the closed ones, and every layer's keys and values."""

    def __init__(self, settings: GistSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.word_starts = unpack_word_starts(settings.word_starts)
        levels = settings.levels
        self.counts = [0] * (levels + 1)  # items of each segment
        self.ends = [torch.zeros(0, dtype=torch.int64, device=device) for _ in range(levels)]
        self.layers: dict[int, list[Rows]] = {}
        self.chunk: list[int] = []  # raw tokens since the last level-0 gist, and which of them recall
        self.chunk_recalls: list[bool] = []
        self.open = [0] * levels  # at l > 0: gists of level l - 1 since the last one of level l
        self.sinks_left = settings.sink  # sinks that the open chunk holds or will hold: they do not count
        self.closed_at: int | None = None  # raw tokens before which the context was closed on purpose

    def copy(self) -> GistSequence:
        """A sequence that goes on independently."""
        other = GistSequence.__new__(GistSequence)
        other.__dict__.update(self.__dict__)
        for name in ("counts", "ends", "chunk", "chunk_recalls", "open"):
            setattr(other, name, list(getattr(self, name)))
        other.layers = {index: [rows.copy() for rows in layer] for index, layer in self.layers.items()}
        return other

    def layer(self, index: int) -> list[Rows]:
        """Keys and values of a layer, by segment."""
        return self.layers.setdefault(index, [Rows() for _ in self.counts])

    def read(self, tokens: list[int], query_start: int | None, grow: bool | None) -> Feed:
        """Enter raw tokens; they are to be read by the model as the result says.

        Args:
            tokens: in order.
            query_start: raw tokens of the context, counted from the sequence's start: it is closed there with a gist at every
                level, and what follows recalls. None: tokens before which nothing was read are context, later ones recall.
            grow: whether what follows a closed context gets gists as its chunks close; None: where no context was closed.

        Raises:
            ValueError: the context would end among tokens that were read before.
        """
        recall, before = self.settings.recall, self.counts[-1]
        if query_start is None:
            suffix = before > 0
            grow = self.closed_at is None if grow is None else grow
            return self._push(tokens, recall == "all" or (suffix and recall != "none"), grow or not suffix)
        if before > query_start and self.closed_at != query_start:
            raise ValueError(
                f"gist_query_start: {query_start}, but {before} tokens were read already and the context was "
                f"{'not closed' if self.closed_at is None else f'closed at {self.closed_at}'}; give at least {before}"
            )
        cut = min(max(query_start - before, 0), len(tokens))
        ends = before + cut == query_start and self.closed_at != query_start
        context, suffix = Feed(0, [], [], []), Feed(0, [], [], [])
        if cut or ends:
            context = self._push(tokens[:cut], recall == "all", True, close=ends)
        if ends:
            self.closed_at = query_start
        if cut < len(tokens):
            suffix = self._push(tokens[cut:], recall != "none", bool(grow))
        # A closed context leaves no open chunk, of which the suffix could drop anything: one of the two drops nothing.
        parts = (a + b for a, b in zip(_lists(context), _lists(suffix)))
        return Feed(context.drop + suffix.drop, *parts)

    def _push(self, tokens: list[int], recalls: bool, fold: bool, close: bool = False) -> Feed:
        """Append raw tokens, with gists if ``fold``; with ``close`` they end a context."""
        known, flags = self.chunk + tokens, self.chunk_recalls + [recalls] * len(tokens)
        read = len(self.chunk)  # of ``known``; what was read before
        self.chunk, self.chunk_recalls = known, flags
        if not fold:
            return Feed(0, tokens, [-1] * len(tokens), flags[read:])
        drop, begin, ids, level = 0, 0, [], []
        while (end := self._chunk_end(known, begin, close)) is not None:
            if end < read:
                drop, read = read - end, end
            ids += known[read:end]
            level += [-1] * (end - read)
            self.sinks_left = max(0, self.sinks_left - (end - begin))
            read = begin = end
            self._close(ids, level)
        ids += known[read:]
        level += [-1] * (len(known) - read)
        raw = iter(flags[len(flags) - level.count(-1) :])
        self.chunk, self.chunk_recalls = known[begin:], flags[begin:]
        if close:
            self._close_everything(ids, level)
        return Feed(drop, ids, level, [l < 0 and next(raw) for l in level])

    def _chunk_end(self, known: list[int], begin: int, close: bool) -> int | None:
        """Where the chunk that begins at ``begin`` closes; None if it is cut short, or if its end depends on tokens to come."""
        size = self.settings.chunk_sizes[0]
        due = begin + self.sinks_left + size
        if due > len(known):
            return None
        for end in range(due, due + size // 2 + 1):
            if end == len(known):
                return due if close else None
            if self.word_starts[known[end]]:
                return end
        return due

    def _close(self, ids: list[int], level: list[int]) -> None:
        """A level-0 gist, and one of every level whose group it completes."""
        for l, gist in enumerate(self.settings.token_ids):
            ids.append(gist)
            level.append(l)
            if l + 1 == len(self.open):
                return
            self.open[l + 1] += 1
            if self.open[l + 1] < self.settings.chunk_sizes[l + 1]:
                return
            self.open[l + 1] = 0

    def _close_everything(self, ids: list[int], level: list[int]) -> None:
        """A gist at every level that was not just closed."""
        for l, gist in enumerate(self.settings.token_ids):
            if self.chunk if l == 0 else self.open[l]:
                ids.append(gist)
                level.append(l)
                if l + 1 < len(self.open):
                    self.open[l + 1] += 1
            self.open[l] = 0
        self.sinks_left = max(0, self.sinks_left - len(self.chunk))
        self.chunk, self.chunk_recalls = [], []

    def append(self, feed: Feed) -> Sight:
        """Enter what is read: borders and counts; keys and values follow layer by layer."""
        levels = len(self.ends)
        self.counts[-1] -= feed.drop
        start = list(self.counts)
        segments = torch.arange(levels + 1, device=self.device)[:, None]
        level = torch.tensor(feed.level, dtype=torch.int64, device=self.device)
        member = segments == levels - 1 - level  # [L+1, n]
        hi = member.cumsum(1) + torch.tensor(start, device=self.device)[:, None]
        before = hi - member.long()
        members = [which.nonzero()[:, 0] for which in member]
        lo, tail = torch.zeros_like(hi), torch.zeros_like(hi[:-1])
        for s in range(levels):
            if len(members[s]):
                self.ends[s] = torch.cat([self.ends[s], hi[s + 1][members[s]]])
            # The window below begins where the group ended that lies n_prev groups before the token's own.
            lo[s + 1] = _end_of(self.ends[s], before[s] - self.settings.n_prev - 1)
            if s + 1 < levels:
                tail[s + 1] = _end_of(self.ends[s], before[s] - 1)
        lo = torch.where(segments <= levels - level, lo, hi)  # a token of level q sees levels q - 1 and up
        self.counts = [at + len(which) for at, which in zip(start, members)]
        sinks = lo[-1].clamp(max=self.settings.sink)
        recalls = torch.tensor(feed.recalls, dtype=torch.bool, device=self.device)
        return Sight(members, start, list(self.ends), lo, hi, sinks, tail, recalls, hi[-1] - 1)


def _lists(feed: Feed) -> tuple[list[int], list[int], list[bool]]:
    return feed.ids, feed.level, feed.recalls


def _end_of(ends: Tensor, gist: Tensor) -> Tensor:
    """[n]: the end of what each gist closed; 0 for those before the first."""
    return ends[gist.clamp(min=0)] * (gist >= 0) if len(ends) else torch.zeros_like(gist)
