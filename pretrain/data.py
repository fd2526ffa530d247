"""Global sample number -> packed raw tokens -> micro-batches.

The order of samples is a pure function of (seed, number): an epoch lays the documents in an order drawn from
(seed, epoch), cuts that stream into windows of R raw tokens and draws the order of the windows. The state of the data
is therefore one integer, and ranks, micro-batches and chunk sizes do not change what is seen. Where sources have weights,
each is such a stream of its own, and `pretrain.blend` tells which one gives a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.config import GistConfig
from model.gist import Recall, build_layout, interleave, max_interleaved_length
from model.transformer import IGNORED, MicroBatch
from pretrain.blend import make_blend, parse_entry
from pretrain.errors import UserError
from pretrain.shards import Shard, open_shards
from pretrain.tokenizer import TokenizerInfo

GROUPS = 1 << 20  # documents are shuffled in at most so many runs, so that entering an epoch takes milliseconds


@dataclass(frozen=True)
class Segment:
    """A piece of one document within a sample: (document number over all shards, first token, number of tokens)."""

    document: int
    offset: int
    length: int


class TokenSource:
    """Documents of shards as fixed windows of raw tokens, in a reproducible order, from one source or a blend of several.

    Raises:
        UserError: a shard is missing, cut short, of another tokenizer, or holds ids outside the vocabulary; weights that
            cannot be; a source with less than one sample.
    """

    def __init__(
        self,
        entries: Sequence[str],
        raw_tokens: int,
        seed: int,
        tokenizer: TokenizerInfo,
        setting: str,
        cache: str | Path = "",
    ):
        """Open the shards.

        Args:
            entries: prefixes, globs of prefixes or URLs, each with an optional weight (`blend.parse_entry`).
            setting: the configuration key that named them, for messages.
            cache: directory for remote shards.
        """
        self.raw_tokens = raw_tokens
        parsed = [parse_entry(entry, setting) for entry in entries]
        self._blend = make_blend(parsed, setting)
        groups = [[entry.pattern for entry in parsed]] if self._blend is None else [[entry.pattern] for entry in parsed]
        self._shards: list[Shard] = []
        self._streams: list[_Stream] = []
        for number, patterns in enumerate(groups):
            shards = open_shards(patterns, tokenizer, setting, cache)
            first = sum(len(shard.lengths) for shard in self._shards)
            self._shards += shards
            # One source alone is drawn by the seed itself; further ones must not share its draws.
            key = [seed, 0] if self._blend is None else [seed, number + 1]
            self._streams.append(_Stream(shards, first, raw_tokens, key, f"{setting}: {', '.join(patterns)}"))
        self._shard_first = np.cumsum([0] + [len(shard.lengths) for shard in self._shards])
        self.tokens = sum(stream.tokens for stream in self._streams)
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in self._streams)

    @property
    def fingerprint(self) -> list[str]:
        """What decides the samples: the hash of each source's tokens and, in a blend, its weights."""
        return [stream.fingerprint for stream in self._streams] + ([] if self._blend is None else [repr(self._blend)])

    def fingerprint_until(self, samples: int) -> list[str]:
        """What decided the first ``samples`` samples: a source or a change of weights that comes later is not in it."""
        if self._blend is None:
            return self.fingerprint
        counters = self._blend.counters(samples)
        given = [f"{s.fingerprint} {n}" for s, n in zip(self._streams, counters) if n]
        return [*given, self._blend.history(samples)]

    def counters(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples came from each source."""
        return [samples] if self._blend is None else self._blend.counters(samples)

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that make up a global sample number; they sum to ``raw_tokens``."""
        source, number = (0, sample) if self._blend is None else self._blend.locate(sample)
        return self._streams[source].segments(number)

    def read(self, pieces: Sequence[Segment]) -> np.ndarray:
        """int64 [sum of lengths]; a copy, since views must not outlive the mapped file."""
        out = np.empty(sum(piece.length for piece in pieces), np.int64)
        at = 0
        shards = np.searchsorted(self._shard_first, [piece.document for piece in pieces], side="right") - 1
        for piece, shard in zip(pieces, shards.tolist()):
            local = piece.document - int(self._shard_first[shard])
            self._shards[shard].read(local, piece.offset, out[at : at + piece.length])
            at += piece.length
        return out


class _Stream:
    """The windows of one source."""

    def __init__(self, shards: list[Shard], first_document: int, raw_tokens: int, key: list[int], name: str):
        """first_document: number of its first document over all shards. key: two integers that choose its order."""
        self._first, self._raw_tokens, self._key = first_document, raw_tokens, key
        self._lengths = np.concatenate([shard.lengths for shard in shards])
        self._run = -(-len(self._lengths) // GROUPS)  # neighbouring documents that stay together: 1 below GROUPS documents
        self._run_starts = np.arange(0, len(self._lengths), self._run)
        self._run_tokens = np.add.reduceat(self._lengths, self._run_starts, dtype=np.int64)
        self.tokens = int(self._run_tokens.sum())
        self.samples_per_epoch = self.tokens // raw_tokens
        hashes = "".join(shard.sha256 for shard in shards)
        self.fingerprint = shards[0].sha256 if len(shards) == 1 else hashlib.sha256(hashes.encode()).hexdigest()
        self._epoch = -1
        if not self.samples_per_epoch:
            raise UserError(
                f"{name} hold {self.tokens} tokens, less than one sample of data.raw_tokens = {raw_tokens}"
            )

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        seed, source = self._key
        draw = np.random.Generator(np.random.Philox(key=[seed, epoch + (source << 40)]))
        self._order = draw.permutation(len(self._run_tokens))
        self._ends = np.cumsum(self._run_tokens[self._order])
        self._rounds = [int(x) for x in draw.integers(1, 1 << 62, 4)]
        self._epoch = epoch

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of this source's sample number ``sample``."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        self._enter_epoch(epoch)
        at = shuffled(index, self.samples_per_epoch, self._rounds) * self._raw_tokens
        stop = at + self._raw_tokens
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces: list[Segment] = []
        while at < stop:
            run = int(self._order[place])
            end = int(self._ends[place])
            position = end - int(self._run_tokens[run])  # of the document, in the epoch's stream
            first = run * self._run
            for document in range(first, min(first + self._run, len(self._lengths))):
                following = position + int(self._lengths[document])
                if following > at and at < stop:
                    length = min(stop, following) - at
                    pieces.append(Segment(self._first + document, at - position, length))
                    at += length
                position = following
            place += 1
        return pieces


def shuffled(index: int, size: int, rounds: Sequence[int]) -> int:
    """The place of ``index`` in a permutation of range(size), which is nowhere written down.

    A Feistel network over the next power of 4, walked until it falls into the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in rounds:
            mixed = ((right + key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        index = left << half | right
        if index < size:
            return index


class BatchBuilder:
    """Turns global sample numbers into micro-batches of one fixed shape."""

    def __init__(
        self, source: TokenSource, gist: GistConfig | None, tokenizer: TokenizerInfo, length_multiple: int = 1
    ):
        """gist: None for dense attention (no gists). length_multiple: the padded length is a multiple of it."""
        self.source, self.tokenizer, self.gist = source, tokenizer, gist
        longest = source.raw_tokens if gist is None else max_interleaved_length(source.raw_tokens, gist.chunk_sizes)
        self.length = -(-longest // length_multiple) * length_multiple
        # Dense attention needs document spans and positions only; any gist configuration yields them.
        self._layout_config = gist or GistConfig((source.raw_tokens,))

    def build(self, samples: Sequence[int], recall: bool = True) -> MicroBatch:
        """The micro-batch of these global sample numbers, on CPU: ids, labels and layout [len(samples), length].

        recall: False leaves recall out whatever the configuration says (the forgetting stage of a run).
        """
        shape = (len(samples), self.length)
        ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        level, doc = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        for row, sample in enumerate(samples):
            pieces = self.source.segments(sample)
            raw = self.source.read(pieces)
            lengths = [piece.length for piece in pieces]
            targets = np.append(raw[1:], IGNORED)
            targets[np.cumsum(lengths) - 1] = IGNORED  # the last token of a document predicts nothing
            if self.gist is None:
                used = len(raw)
                ids[row, :used], doc[row, :used] = raw, np.repeat(np.arange(len(lengths)), lengths)
                labels[row, :used] = targets
                continue
            made = interleave(
                raw, lengths, self.tokenizer.word_starts, self.gist, self.tokenizer.gist_ids[: self.gist.levels]
            )
            used = len(made.ids)
            ids[row, :used], level[row, :used], doc[row, :used] = made.ids, made.level, made.doc
            labels[row, :used][made.level < 0] = targets
        return self._micro_batch(ids, labels, level, doc, recall)

    def empty(self) -> MicroBatch:
        """One sample of padding without any target, for a rank that has nothing to do but must take part."""
        shape = (1, self.length)
        nowhere = np.full(shape, -1, np.int32)
        return self._micro_batch(np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64), nowhere, nowhere, False)

    def _micro_batch(self, ids: np.ndarray, labels: np.ndarray, level: np.ndarray, doc: np.ndarray, recall: bool) -> MicroBatch:
        layout = build_layout(torch.from_numpy(level), torch.from_numpy(doc), self._layout_config)
        recalled = Recall.of(layout, self._layout_config) if recall else None
        return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), layout, recalled)


def step_samples(step: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int) -> list[list[int]]:
    """Global sample numbers of this rank's micro-batches in a step (counted from 0).

    Every layout sees the samples ``step * global_batch .. + global_batch`` in that step.
    """
    first = step * global_batch
    per_rank = global_batch // data_size
    mine = range(first + data_rank * per_rank, first + (data_rank + 1) * per_rank)
    return [list(mine[i : i + micro_batch]) for i in range(0, per_rank, micro_batch)]
