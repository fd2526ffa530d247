"""Global sample number -> packed raw tokens -> micro-batches.

The order of samples is a pure function of (seed, number): an epoch lays the documents in an order drawn from
(seed, epoch), cuts that stream into windows of R raw tokens and draws the order of the windows. The state of the data
is therefore one integer, and ranks, micro-batches and chunk sizes do not change what is seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from model.config import GistConfig
from model.gist import Recall, build_layout, interleave, max_interleaved_length
from model.transformer import IGNORED, MicroBatch
from pretrain.errors import UserError
from pretrain.tokenizer import TokenizerInfo


@dataclass(frozen=True)
class Segment:
    """A piece of one document within a sample: (document number over all shards, first token, number of tokens)."""

    document: int
    offset: int
    length: int


class TokenSource:
    """Documents of one or more shards as fixed windows of raw tokens, in a reproducible order.

    Raises:
        UserError: a shard is missing, cut short, of another tokenizer, or holds ids outside the vocabulary.
    """

    def __init__(self, prefixes: Sequence[str], raw_tokens: int, seed: int, tokenizer: TokenizerInfo, setting: str):
        """setting: the configuration key that named the prefixes, for messages."""
        self.raw_tokens, self.seed = raw_tokens, seed
        self.fingerprint = [_check_shard(prefix, tokenizer, setting) for prefix in prefixes]
        self._shards = [IndexedDataset(prefix) for prefix in prefixes]
        lengths = [np.asarray(shard.sequence_lengths, np.int64) for shard in self._shards]
        self._lengths = np.concatenate(lengths)
        self._shard_first = np.cumsum([0] + [len(x) for x in lengths])
        self.tokens = int(self._lengths.sum())
        self.samples_per_epoch = self.tokens // raw_tokens
        if not self.samples_per_epoch:
            raise UserError(
                f"{setting}: {', '.join(prefixes)} hold {self.tokens} tokens, less than one sample of "
                f"data.raw_tokens = {raw_tokens}"
            )
        self._epoch = -1

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        self._order = draw.permutation(len(self._lengths))
        self._ends = np.cumsum(self._lengths[self._order])
        self._windows = draw.permutation(self.samples_per_epoch)
        self._epoch = epoch

    def segments(self, sample: int) -> list[Segment]:
        """The pieces of documents that make up a global sample number; they sum to ``raw_tokens``."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        self._enter_epoch(epoch)
        at = int(self._windows[index]) * self.raw_tokens
        stop = at + self.raw_tokens
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces = []
        while at < stop:
            document = int(self._order[place])
            offset = int(self._lengths[document] - (self._ends[place] - at))
            length = min(stop, int(self._ends[place])) - at
            if length:
                pieces.append(Segment(document, offset, length))
            at += length
            place += 1
        return pieces

    def read(self, pieces: Sequence[Segment]) -> np.ndarray:
        """int64 [sum of lengths]; a copy, since views must not outlive the mapped file."""
        parts = []
        for piece in pieces:
            shard = int(np.searchsorted(self._shard_first, piece.document, side="right")) - 1
            local = piece.document - int(self._shard_first[shard])
            parts.append(self._shards[shard].get(local, piece.offset, piece.length))
        return np.concatenate(parts).astype(np.int64)


def _check_shard(prefix: str, tokenizer: TokenizerInfo, setting: str) -> str:
    """Check a shard against its sidecar and the tokenizer without reading its tokens; returns the hash of its tokens."""
    sidecar = Path(f"{prefix}.json")
    for suffix in (".bin", ".idx", ".json"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{setting}: {prefix}{suffix} does not exist; make the shard with `python -m data_prep tokenize`")
    try:
        meta = json.loads(sidecar.read_text())
        files, shard_hash, max_id = meta["files"], meta["tokenizer_hash"], meta["max_id"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: {sidecar} is damaged ({error}); make the shard again") from None
    for suffix in ("bin", "idx"):
        size, expected = os.path.getsize(f"{prefix}.{suffix}"), files[suffix]["bytes"]
        if size != expected:
            raise UserError(
                f"{setting}: {prefix}.{suffix} has {size} bytes, {expected} were written; restore it or make it again"
            )
    if shard_hash != tokenizer.hash:
        raise UserError(
            f"{setting}: {prefix} was made with another tokenizer (hash {shard_hash[:12]}, data.tokenizer "
            f"{tokenizer.directory} has {tokenizer.hash[:12]}); name the tokenizer it was made with, or tokenize again"
        )
    if max_id >= tokenizer.vocab_size:
        raise UserError(f"{setting}: {prefix} holds token id {max_id}, the vocabulary has {tokenizer.vocab_size} ids")
    return files["bin"]["sha256"]


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
