"""Token shards: PREFIX.bin and PREFIX.idx as megatron-core's IndexedDataset reads them, and the sidecar PREFIX.json.

One sequence per document. The files are written here rather than by megatron's builder (the tests compare the bytes):
its import takes seconds, it appends one document at a time, and ids beyond the dtype's range wrap in it unseen.
The index: magic, version, dtype code, number of sequences, number of document borders; then int32 lengths,
int64 byte offsets, int64 document borders.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import PARTIAL, finish_partial, open_partial
from data_prep.tokenizer import TokenizerInfo, read_json

FORMAT = 1
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
DTYPE_CODES = {"uint16": 8, "int32": 4}
MAX_LENGTH = 2**31 - 1  # of a document: its length is an int32
SUFFIXES = (".bin", ".idx", ".json")


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
    files: dict  # "bin" and "idx" -> {"bytes": int, "sha256": str}
    sources: list = field(default_factory=list)

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
        wrong = [
            f.name for f in fields(cls) if not isinstance(values[f.name], (int, float) if f.type is float else f.type)
        ]
        files = values["files"] if "files" not in wrong else {}
        if wrong or not all(_is_file_entry(files.get(kind)) for kind in ("bin", "idx")):
            raise DataError(f"{path}: has a wrong value for {', '.join(wrong) or 'files'}")
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def _is_file_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


@dataclass(frozen=True)
class Shard:
    """An open shard. `tokens` is a memory map: copy what must outlive the shard."""

    prefix: str
    info: ShardInfo
    lengths: np.ndarray  # int32 [documents]
    starts: np.ndarray  # int64 [documents], in tokens
    tokens: np.ndarray  # [tokens]

    def document(self, i: int) -> np.ndarray:
        """Ids of document i, a view [length]."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]


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


class ShardWriter:
    """Writes one shard under temporary names; only `finish` gives it its own.

    Used as a context manager: leaving it without `finish` removes what was written.
    """

    def __init__(
        self,
        prefix: str,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        eos_appended: bool,
        sources: Sequence[str] = (),
        overwrite: bool = False,
    ):
        """Claim PREFIX.

        Raises:
            DataError: it exists and may not be replaced, another run is writing it, or a prefix ends in '/'.
        """
        if not Path(prefix).name or prefix.endswith(("/", os.sep)) or Path(prefix).is_dir():
            raise DataError(f"{prefix}: is a directory; --output takes a prefix, such as {Path(prefix) / 'corpus'}")
        self.prefix = prefix
        self._given = {
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
            "eos_appended": eos_appended,
            "sources": list(sources),
        }
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._hash = hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._finished = False
        self._bin = open_partial(shard_path(prefix, ".bin"))
        try:
            refuse_existing(prefix, overwrite)
        except DataError:
            self._discard()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._finished:
            self._discard()

    @property
    def documents(self) -> int:
        """How many documents were written so far."""
        return sum(len(x) for x in self._lengths)

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            ids: integers [sum of lengths], all documents one after the other.
            lengths: integers [documents], each at least 1.

        Raises:
            DataError: an id that is not in the vocabulary, or an empty or overlong document. Nothing was written then.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, dtype=np.int64)
        if lengths.size == 0:
            return
        assert ids.ndim == 1 and ids.size == lengths.sum(), "ids and lengths disagree"
        if lengths.min() < 1 or lengths.max() > MAX_LENGTH:
            raise DataError(
                f"{self.prefix}: a document of {lengths.min() if lengths.min() < 1 else lengths.max()} tokens; "
                f"a shard takes 1 to {MAX_LENGTH}"
            )
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise DataError(
                f"{self.prefix}: token id {highest if highest >= self._vocab_size else lowest} does not fit the "
                f"vocabulary of {self._vocab_size}; nothing of it was written"
            )
        raw = ids.astype(self._dtype).tobytes()
        self._bin.write(raw)
        self._hash.update(raw)
        self._lengths.append(lengths.astype(np.int32))
        self._counts += np.bincount(ids, minlength=self._vocab_size)

    def finish(self) -> ShardInfo:
        """Write index and sidecar and give all files their names, the sidecar last.

        Raises:
            DataError: no document was written; an empty shard cannot be opened.
        """
        if not self._lengths:
            raise DataError(f"{self.prefix}: not one document to write; an empty shard cannot be opened")
        lengths = np.concatenate(self._lengths)
        index = index_bytes(lengths, self._dtype)
        with (
            open_partial(shard_path(self.prefix, ".idx")) as idx,
            open_partial(shard_path(self.prefix, ".json")) as sidecar,
        ):
            idx.write(index)
            info = ShardInfo(
                dtype=self._dtype.name,
                documents=len(lengths),
                tokens=int(self._counts.sum()),
                max_id=int(np.flatnonzero(self._counts)[-1]),
                unigram_entropy_nats=unigram_entropy(self._counts),
                files={
                    "bin": {"bytes": self._bin.tell(), "sha256": self._hash.hexdigest()},
                    "idx": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
                },
                **self._given,
            )
            sidecar.write(info.to_json().encode("utf-8"))
            # Without its sidecar a shard is not valid, so a run that dies from here on leaves nothing that looks whole.
            shard_path(self.prefix, ".json").unlink(missing_ok=True)
            finish_partial(self._bin, shard_path(self.prefix, ".bin"))
            finish_partial(idx, shard_path(self.prefix, ".idx"))
            finish_partial(sidecar, shard_path(self.prefix, ".json"))
        self._finished = True
        return info

    def _discard(self) -> None:
        for suffix in SUFFIXES:
            shard_path(self.prefix, suffix + PARTIAL).unlink(missing_ok=True)
        self._bin.close()


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise DataError if a file of the shard exists and may not be replaced."""
    existing = [str(p) for p in (shard_path(prefix, s) for s in SUFFIXES) if p.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: exists already; choose another --output, or give --overwrite to replace it")


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts [vocab] describe: the loss of a model that knows no context."""
    p = counts[counts > 0] / counts.sum()
    return math.fsum(-p * np.log(p))


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


def write_shard(
    prefix: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    tokenizer: TokenizerInfo | None = None,
    *,
    vocab_size: int | None = None,
    tokenizer_hash: str = "",
    eos_appended: bool = False,
    sources: Sequence[str] = (),
    overwrite: bool = False,
) -> ShardInfo:
    """Write documents that are already ids as one shard.

    Args:
        documents: ids of each document, integers [length]; nothing is added to them.
        tokenizer: gives vocabulary size and hash; or give these two.
        eos_appended: whether the documents end with the tokenizer's end-of-document id (recorded only).

    Raises:
        DataError: the output exists, an id does not fit, a document is empty, or there is none.
    """
    if (tokenizer is None) == (vocab_size is None):
        raise DataError("write_shard: give either a tokenizer's info or vocab_size (with tokenizer_hash)")
    size, digest = (tokenizer.vocab_size, tokenizer.hash) if tokenizer else (vocab_size, tokenizer_hash)
    with ShardWriter(
        str(prefix),
        vocab_size=size,
        tokenizer_hash=digest,
        eos_appended=eos_appended,
        sources=sources,
        overwrite=overwrite,
    ) as writer:
        pending: list[np.ndarray] = []  # many small documents go to the writer together
        for document in documents:
            pending.append(np.asarray(document, dtype=np.int64))
            if len(pending) >= 4096 or pending[-1].size >= 1 << 20:
                _flush(writer, pending)
        _flush(writer, pending)
        return writer.finish()


def _flush(writer: ShardWriter, pending: list[np.ndarray]) -> None:
    if pending:
        writer.append(np.concatenate(pending), np.array([ids.size for ids in pending]))
        pending.clear()


def open_shard(prefix: str | Path) -> Shard:
    """Open a shard after checking that index, token file and sidecar agree in structure.

    Raises:
        DataError: something is missing, cut short or contradictory; the message has one line per defect.
    """
    prefix = str(prefix)
    info = ShardInfo.from_file(shard_path(prefix, ".json"))
    lengths = read_index(prefix, info)
    starts = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
    tokens = np.memmap(shard_path(prefix, ".bin"), dtype=info.dtype, mode="r")
    return Shard(prefix, info, lengths, starts, tokens)


def read_index(prefix: str, info: ShardInfo) -> np.ndarray:
    """Lengths of the documents, int32 [documents], from an index whose every field was checked.

    Raises:
        DataError: at the first thing that is wrong.
    """
    idx, bin_ = shard_path(prefix, ".idx"), shard_path(prefix, ".bin")
    for path in (bin_, idx):
        if not path.is_file():
            raise DataError(f"{path}: missing; the shard is not complete: make it again")
    raw = idx.read_bytes()
    if len(raw) < HEADER.size:
        raise DataError(f"{idx}: cut short at {len(raw)} bytes, before the end of its header")
    magic, version, code, sequences, borders = HEADER.unpack_from(raw)
    if magic != MAGIC or version != 1:
        raise DataError(f"{idx}: not an index of a megatron-core IndexedDataset (version 1)")
    if sequences == 0:
        raise DataError(f"{idx}: holds no document")
    if code != DTYPE_CODES.get(info.dtype):
        raise DataError(f"{idx}: dtype code {code} is not that of {info.dtype}, which the sidecar names")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(raw) != expected:
        raise DataError(f"{idx}: {len(raw)} bytes, but its header calls for {expected}; cut short or altered")
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=HEADER.size)
    itemsize = np.dtype(info.dtype).itemsize
    if raw != index_bytes(lengths, np.dtype(info.dtype)) or lengths.min() < 1:
        raise DataError(f"{idx}: its offsets do not follow from its lengths, or a document is empty; altered")
    total = int(lengths.sum(dtype=np.int64))
    if (info.documents, info.tokens) != (sequences, total):
        raise DataError(
            f"{idx}: {sequences} documents and {total} tokens, but the sidecar names {info.documents} and {info.tokens}"
        )
    size = bin_.stat().st_size
    if size != total * itemsize:
        what = "cut short" if size < total * itemsize else "too long"
        raise DataError(f"{bin_}: {size} bytes, but its index calls for {total * itemsize}; {what}")
    return lengths


def blocks(shard: Shard, tokens: int = 1 << 23) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole shard in pieces of about so many tokens: (ids [n], lengths [documents]), documents never cut."""
    first = 0
    while first < len(shard.lengths):
        last = int(np.searchsorted(shard.starts, shard.starts[first] + tokens, "left"))
        last = max(last, first + 1)
        lengths = shard.lengths[first:last]
        begin = int(shard.starts[first])
        yield np.array(shard.tokens[begin : begin + int(lengths.sum(dtype=np.int64))]), lengths
        first = last
