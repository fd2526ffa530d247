"""Weights of a Hugging Face directory, read tensor by tensor, as the tensors of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unfold.data_prep.format.text import read_text
from unfold.model.config import ModelConfig
from unfold.model.hf.names import Entry, entries
from unfold.pretrain.checkpoint.tensors import DTYPES, Chunk, write_tensor_file
from unfold.pretrain.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = ("rotary_emb.inv_freq",)  # ends of names that old files hold and nobody reads
ROWS = 4096  # of a vocabulary matrix that are looked at together


class WeightFiles:
    """The tensors of a directory's safetensors files, in one file or sharded."""

    def __init__(self, directory: Path):
        """Raises UserError naming the file that is missing or damaged."""
        self.directory = directory
        places = self._places()
        self._files = {name: self._open(directory / name) for name in sorted(set(places.values()))}
        self._places_of = places
        self.shapes, self.dtypes = {}, {}
        codes = {code: dtype for dtype, code in DTYPES.items()}
        for name, file in places.items():
            if name not in self._files[file].keys():
                raise UserError(f"{directory / file}: lacks {name}, which {INDEX} says it holds")
            part = self._files[file].get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            if part.get_dtype() not in codes:
                raise UserError(f"{directory / file}: {name} is {part.get_dtype()}; supported are {', '.join(codes)}")
            self.dtypes[name] = codes[part.get_dtype()]

    def _places(self) -> dict[str, str]:
        """Tensor -> file."""
        directory = self.directory
        if (directory / INDEX).exists():
            try:
                places = dict(json.loads(read_text(directory / INDEX))["weight_map"])
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise UserError(f"{directory / INDEX}: is damaged ({error!r})") from None
            missing = sorted({file for file in places.values() if not (directory / file).is_file()})
            if missing:
                raise UserError(f"{directory}: {', '.join(missing)} of {INDEX} is missing; copy or download it again")
            return places
        if (directory / SINGLE).is_file():
            return dict.fromkeys(self._open(directory / SINGLE).keys(), SINGLE)
        others = [p.name for p in sorted(directory.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".gguf")]
        there = f"; {others[0]} cannot be read, save the model with save_pretrained" if others else ""
        raise UserError(f"{directory}: has neither {SINGLE} nor {INDEX}{there}")

    @staticmethod
    def _open(path: Path):
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is damaged ({error}); copy or download it again") from None

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._files[self._places_of[name]].get_tensor(name)

    def rows(self, name: str) -> Iterator[Tensor]:
        """A matrix in blocks of ROWS rows."""
        part = self._files[self._places_of[name]].get_slice(name)
        for first in range(0, self.shapes[name][0], ROWS):
            yield part[first : first + ROWS]

    def check(self, config: ModelConfig, rows: int) -> None:
        """Raises UserError unless exactly a model's tensors are there, in their shapes, with ``rows`` of vocabulary."""
        expected = {}
        for entry in entries(config):
            expected.update(zip(entry.theirs, entry.their_shapes(config)))
        expected.update({name: (rows, *expected[name][1:]) for name in (EMBEDDING, HEAD) if name in expected})
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            raise UserError(f"{self.directory}: lacks {_some(missing)}, which config.json asks for")
        tied = {HEAD} if config.tied_embeddings else set()
        surplus = [n for n in self.shapes if n not in expected and n not in tied and not n.endswith(IGNORED)]
        if surplus:
            raise UserError(f"{self.directory}: holds {_some(surplus)}, which a model of this architecture does not have")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(f"{self.directory}: {name} is {list(self.shapes[name])}, config.json asks for {list(shape)}")
        if tied & self.shapes.keys() and not self._equal(HEAD, EMBEDDING):
            raise UserError(f"{self.directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set false")

    def _equal(self, a: str, b: str) -> bool:
        return self.shapes[a] == self.shapes[b] and all(map(torch.equal, self.rows(a), self.rows(b)))


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class NewRows:
    """The vocabulary of the imported model: the first ``known`` rows are theirs, the others are those of new gists and links.

    Attributes:
        known: rows that have a token.
        size: of the new vocabulary.
        given: tensor name -> rows [size - known, hidden] of the new gists and links; where there are none, the mean of the known.
    """

    known: int
    size: int
    given: Mapping[str, Tensor]

    def extend(self, name: str, weights: WeightFiles) -> Tensor:
        """A vocabulary matrix [size, hidden], in the dtype that it is stored in."""
        result = torch.empty((self.size, weights.shapes[name][1]), dtype=weights.dtypes[name])
        total = torch.zeros(result.shape[1], dtype=torch.float64)
        for i, rows in enumerate(weights.rows(name)):
            rows = rows[: max(0, self.known - i * ROWS)]
            result[i * ROWS : i * ROWS + len(rows)] = rows
            total += rows.double().sum(0)
        result[self.known :] = self.given.get(name, total / self.known)
        return result


class _Converter:
    """Makes the checkpoint tensors of entries; those of one entry are asked for in a row, so the last one is kept."""

    def __init__(self, weights: WeightFiles, config: ModelConfig, rows: NewRows, dtype: torch.dtype | None):
        self._weights, self._config, self._rows, self._dtype = weights, config, rows, dtype
        self._last: tuple[str, list[Tensor]] = ("", [])

    def chunks(self, entry: Entry) -> list[Chunk]:
        shape = entry.shape(self._config)
        part = (shape[0] // entry.pieces, *shape[1:])
        dtype = self._dtype or common_type([self._weights.dtypes[name] for name in entry.theirs])
        make = lambda i: lambda: self._piece(entry, i)
        names = entry.piece_names()
        return [Chunk(f"model.{name}", (0,) * len(part), part, dtype, make(i)) for i, name in enumerate(names)]

    def _piece(self, entry: Entry, i: int) -> Tensor:
        if self._last[0] != entry.ours:
            self._last = ("", [])  # freed before the next one is read
            vocabulary = entry.theirs[0] in (EMBEDDING, HEAD)
            read = (lambda n: self._rows.extend(n, self._weights)) if vocabulary else self._weights.read
            whole = entry.join([read(name) for name in entry.theirs], self._config)
            self._last = (entry.ours, list(whole.chunk(entry.pieces)))
        piece = self._last[1][i]
        return piece if self._dtype is None else piece.to(self._dtype)


def common_type(dtypes: list[torch.dtype]) -> torch.dtype:
    """The type that holds all of these exactly."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def write_checkpoint_weights(
    weights: WeightFiles,
    config: ModelConfig,
    rows: NewRows,
    dtype: torch.dtype | None,
    directory: Path,
    file_bytes: int,
    say: Callable[[str], None],
) -> dict[str, dict]:
    """Write a checkpoint's weight files into a directory, a few tensors in memory at a time.

    Args:
        rows: of the vocabulary.
        dtype: of all tensors; None keeps each one's own.
        file_bytes: a file that is full gets no further tensor.
        say: told of each file.

    Returns:
        The manifest's ``files``.
    """
    converter = _Converter(weights, config, rows, dtype)
    groups: list[list[Chunk]] = [[]]
    for entry in entries(config):
        chunks = converter.chunks(entry)
        if groups[-1] and sum(c.bytes for c in groups[-1] + chunks) > file_bytes:
            groups.append([])
        groups[-1] += chunks
    files = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        files[name] = write_tensor_file(directory / name, group)
        say(f"{name}: {len(group)} tensors, {files[name]['bytes'] / 1e6:,.1f} MB")
    assert sum(math.prod(c.shape) for g in groups for c in g) == sum(e.numel(config) for e in entries(config))
    return files
