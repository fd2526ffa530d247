"""The format of token shards: sidecar, index bytes, names.

The index: magic, version, dtype code, number of sequences, number of document borders; then int32 lengths,
int64 byte offsets, int64 document borders.
"""

import json
import math
import os
import struct
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.tokenizer import read_json

FORMAT = 1
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
DTYPE_CODES = {"uint16": 8, "int32": 4}
MAX_LENGTH = 2**31 - 1  # of a document: its length is an int32
SUFFIXES = (".bin", ".idx", ".json", ".spans")


@dataclass(frozen=True)
class ShardInfo:
    """The sidecar of a shard."""

    tokenizer_hash: str
    vocab_size: int
    dtype: str  # "uint16" | "int32"
    documents: int
    tokens: int
    max_id: int
    eos_appended: bool
    unigram_entropy_nats: float
    files: dict  # "bin", "idx" and, where the shard is supervised, "spans" -> {"bytes": int, "sha256": str}
    sources: list = field(default_factory=list)

    @property
    def supervised(self) -> bool:
        """Whether it says of each document what is context and what are answers."""
        return "spans" in self.files

    def to_json(self) -> str:
        """Return the text of the sidecar."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "ShardInfo":
        """Read a sidecar.

        Raises:
            DataError: missing, not JSON, of another format, or with keys missing.
        """
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path}: not the sidecar of a shard (format {FORMAT})")
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing:
            raise DataError(f"{path}: misses {', '.join(missing)}")
        wrong = [f.name for f in fields(cls) if not isinstance(values[f.name], (int, float) if f.type is float else f.type)]
        files = values["files"] if "files" not in wrong else {}
        if wrong or not all(_is_file_entry(files.get(kind)) for kind in {"bin", "idx", *files}):
            raise DataError(f"{path}: has a wrong value for {', '.join(wrong) or 'files'}")
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def _is_file_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def shard_path(prefix: str, suffix: str) -> Path:
    """PREFIX + suffix. (Path.with_suffix would cut a prefix that has a dot in it.)"""
    return Path(f"{prefix}{suffix}")


def clean_prefix(name: str) -> str:
    """The prefix of a shard that may have been named by one of its files."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in SUFFIXES and not shard_path(name, ".idx").exists() else name


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts [vocab] describe: the loss of a model that knows no context."""
    p = counts[counts > 0] / counts.sum()
    return math.fsum(-p * np.log(p))


def check_header(raw: bytes, path: Path, dtype: str) -> tuple[int, int]:
    """(sequences, document borders) of an index that begins with `raw`. Raises DataError unless it is one of this dtype."""
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: cut short at {len(raw)} bytes, before the end of its header")
    magic, version, code, sequences, borders = HEADER.unpack_from(raw)
    if magic != MAGIC or version != 1:
        raise DataError(f"{path}: not an index of a megatron-core IndexedDataset (version 1)")
    if code != DTYPE_CODES.get(dtype):
        raise DataError(f"{path}: dtype code {code} is not that of {dtype}, which the sidecar names")
    return sequences, borders


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The index file of documents of these lengths, int32 [documents], each a sequence of its own."""
    n = len(lengths)
    pointers = np.zeros(n, dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], n, n + 1)
    return b"".join(
        (
            header,
            lengths.astype("<i4").tobytes(),
            (pointers * dtype.itemsize).astype("<i8").tobytes(),
            np.arange(n + 1, dtype="<i8").tobytes(),
        )
    )
