"""Tensors on disk: sharded safetensors, the pickle-free format of torch.distributed.checkpoint.

Every file holds rectangles of tensors; the header says where in its whole tensor each begins (``DCP_SHARDING_INFO``), so
``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads these directories too. Written here rather than by
torch's writer because that one needs all ranks to talk to each other while it saves, holds the interpreter's lock, keeps
the whole file in memory twice and hashes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unfold.pretrain.errors import UserError

SUFFIX = ".safetensors"
INDEX = "tensors.json"
SHARDING = "DCP_SHARDING_INFO"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
_DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}
PIECE = 16 * 2**20  # bytes hashed and written at once; both let other threads run meanwhile
HASHED_BEHIND = 2  # pieces that wait for the hash at most; each keeps the tensor that it is of in memory


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, to be written.

    Attributes:
        name: the whole tensor's.
        offsets, shape: of the rectangle within it.
        dtype: of its elements.
        read: makes the values, on CPU; called when they are written.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _NewFile:
    """A file that is hashed in a thread beside the writing, and goes to the disk while it grows rather than at its end."""

    def __init__(self, path: Path):
        self._file, self._digest = open(path, "wb"), hashlib.sha256()
        self._pieces: queue.Queue = queue.Queue(HASHED_BEHIND)
        self._thread = threading.Thread(target=self._hash, daemon=True, name="hash")
        self._thread.start()

    def _hash(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)

    def _end_hash(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, *_) -> None:
        self._end_hash()
        self._file.close()

    def write(self, data) -> None:
        """data: bytes, or a uint8 array that does not change until the file is finished."""
        self._pieces.put(data)
        self._file.write(data)
        if len(data) == PIECE:  # begins to write the dirty pages, and does not wait for it
            os.posix_fadvise(self._file.fileno(), self._file.tell() - PIECE, PIECE, os.POSIX_FADV_DONTNEED)

    def finish(self) -> dict:
        """Everything is on the disk; returns ``{"bytes", "sha256"}``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._end_hash()
        return {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}


def write_tensor_file(path: Path, chunks: Iterable[Chunk], parts: bool = True) -> dict:
    """Write a safetensors file through to the disk; returns its ``{"bytes", "sha256"}``. Names must be unique.

    parts: say where in its whole tensor each begins; without, every chunk is a whole tensor.
    """
    chunks = sorted(chunks, key=lambda c: -c.dtype.itemsize)  # keeps every tensor aligned
    header: dict = {"__metadata__": {"format": "pt"}}
    if parts:
        sharding = {c.name: {"saved_offsets": list(c.offsets)} for c in chunks}
        header["__metadata__"] |= {SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0"}
    end = 0
    for chunk in chunks:
        begin, end = end, end + chunk.bytes
        header[chunk.name] = {"dtype": DTYPES[chunk.dtype], "shape": list(chunk.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with _NewFile(path) as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for chunk in chunks:
            flat = chunk.read().contiguous().reshape(-1).view(torch.uint8)
            assert len(flat) == chunk.bytes, chunk.name
            for piece in flat.split(PIECE):
                file.write(piece.numpy())
        return file.finish()


@dataclass(frozen=True)
class _Place:
    file: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def index_entries(chunks: Iterable[Chunk]) -> dict[str, list]:
    """What the index says of one file: {tensor: [dtype, offsets, shape]}."""
    return {c.name: [DTYPES[c.dtype], list(c.offsets), list(c.shape)] for c in chunks}


def write_index(directory: Path, entries: dict[str, dict[str, list]]) -> dict:
    """Write the index of a directory, {file: its entries}, through to the disk; returns its ``{"bytes", "sha256"}``."""
    with _NewFile(directory / INDEX) as file:
        file.write(json.dumps(entries, separators=(",", ":"), sort_keys=True).encode())
        return file.finish()


class TensorDirectory:
    """The tensors of a directory of such files, whole or in parts, whoever wrote which part.

    Where the directory has an index, a file is opened when something of it is read: of a thousand ranks that resume, each opens
    the few files that it needs. Otherwise all headers are read.
    """

    def __init__(self, directory: Path):
        """Raises UserError when the index is damaged, or a file whose header is read is no safetensors file."""
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._places: dict[str, list[_Place]] = {}
        index = directory / INDEX
        try:
            entries = json.loads(index.read_text()) if index.exists() else None
            named = entries or {path.name: self._header(path.name) for path in sorted(directory.glob(f"*{SUFFIX}"))}
            for file, tensors in named.items():
                for name, (code, offsets, shape) in tensors.items():
                    self._places.setdefault(name, []).append(_Place(file, _DTYPE_OF[code], tuple(offsets), tuple(shape)))
            self.shapes = {name: self._whole_shape(name) for name in self._places}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is damaged ({error})") from None

    def _open(self, name: str):
        """A file, opened once. Raises UserError when it cannot be."""
        if name not in self._files:
            try:
                self._files[name] = safe_open(self._directory / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self._directory / name}: is damaged ({error})") from None
        return self._files[name]

    def _header(self, name: str) -> dict[str, list]:
        """What the index would say of a file."""
        file = self._open(name)
        try:
            sharding = json.loads(file.metadata()[SHARDING])
            slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}
            return {t: [s.get_dtype(), sharding[t]["saved_offsets"], s.get_shape()] for t, s in slices.items()}
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._directory / name}: is damaged ({error})") from None

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        places = self._places[name]
        shape = tuple(max(p.offsets[i] + p.shape[i] for p in places) for i in range(len(places[0].shape)))
        held = sum(math.prod(p.shape) for p in places)
        if held != math.prod(shape):
            raise UserError(f"{self._directory}: holds {held} of the {math.prod(shape)} elements of {name}")
        return shape

    def check_headers(self) -> None:
        """Open every file. Raises UserError where one is no safetensors file, or does not hold what the index says of it."""
        said: dict[str, dict[str, list]] = {}
        for name, places in self._places.items():
            for p in places:
                said.setdefault(p.file, {})[name] = [DTYPES[p.dtype], list(p.offsets), list(p.shape)]
        for file in sorted(said.keys() | {path.name for path in self._directory.glob(f"*{SUFFIX}")}):
            held, named = self._header(file), said.get(file, {})
            differing = sorted(name for name in held.keys() | named.keys() if held.get(name) != named.get(name))
            if differing:
                name = differing[0]
                words = f"{name} {held.get(name, 'is missing')}, {INDEX} says {named.get(name, 'nothing of it')}"
                raise UserError(f"{self._directory / file}: does not hold what {INDEX} says ({len(differing)} tensors; {words})")

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name][0].dtype

    def expect(self, name: str, shape: Sequence[int]) -> None:
        """Raises UserError unless there is a tensor of this name and whole shape."""
        if name not in self.shapes:
            other = "another model" if name.startswith("model.") else "a run with another optimizer.kind, or that trains less"
            raise UserError(f"{self._directory}: holds no tensor {name}; it is of {other}")
        if self.shapes[name] != tuple(shape):
            raise UserError(f"{self._directory}: {name} is {list(self.shapes[name])}, this model needs {list(shape)}")

    def read(self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A rectangle of a tensor, by default all of it."""
        shape = self.shapes[name] if shape is None else shape
        offsets = (0,) * len(shape) if offsets is None else offsets
        result = torch.empty(tuple(shape), dtype=self.dtype(name))
        for place in self._places[name]:
            begin = [max(a, b) for a, b in zip(offsets, place.offsets)]
            stop = [min(a + n, b + m) for a, n, b, m in zip(offsets, shape, place.offsets, place.shape)]
            if any(a >= b for a, b in zip(begin, stop)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(begin, stop, place.offsets))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(begin, stop, offsets))
            try:
                held = self._open(place.file).get_slice(name)
                if held.get_dtype() != DTYPES[place.dtype]:
                    raise ValueError(f"it is {held.get_dtype()}, not {DTYPES[place.dtype]}")
                result[target] = held[source]
            except (SafetensorError, RuntimeError, ValueError) as error:  # the index is of another file
                raise UserError(f"{self._directory / place.file}: does not hold what {INDEX} says of {name} ({error})") from None
        return result
