"""Token shards: PREFIX.bin and PREFIX.idx as megatron-core's IndexedDataset reads them, and the sidecar PREFIX.json.

One sequence per document; of supervised ones PREFIX.spans says what is context and what are answers. The files are
written here rather than by megatron's builder (the tests compare the bytes): its import takes seconds, it appends one
document at a time, and ids beyond the dtype's range wrap in it unseen.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import PARTIAL, Appended, finish_partial, open_partial, write_all
from unfold.data_prep.format.index import (
    HEADER,
    MAX_LENGTH,
    SUFFIXES,
    ShardInfo,
    check_header,
    index_bytes,
    shard_path,
    token_dtype,
    unigram_entropy,
)
from unfold.data_prep.format.spans import SUFFIX, Spans, SpansWriter
from unfold.data_prep.format.tokenizer import TokenizerInfo


@dataclass(frozen=True)
class Shard:
    """An open shard. `tokens` is a memory map: copy what must outlive the shard."""

    prefix: str
    info: ShardInfo
    lengths: np.ndarray  # int32 [documents]
    starts: np.ndarray  # int64 [documents], in tokens
    tokens: np.ndarray  # [tokens]
    spans: Spans | None = None  # where the shard is supervised

    def document(self, i: int) -> np.ndarray:
        """Ids of document i, a view [length]."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]


class ShardWriter:
    """Writes one shard under temporary names; only `finish` gives it its own.

    Used as a context manager: leaving it without `finish` removes what was written, unless `commit` was called.
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
        resumable: bool = False,
        supervised: bool = False,
    ):
        """Claim PREFIX.

        Args:
            supervised: every document comes with its spans.
            resumable: keep what an earlier writer has committed, until `cut` says how much of it holds.

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
        self.documents = 0
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._finished = self._kept = False
        self._bin = open_partial(shard_path(prefix, ".bin"), keep=resumable)
        self._lengths_file = Appended(shard_path(prefix, ".lengths")) if resumable else None
        self._spans = SpansWriter(shard_path(prefix, SUFFIX), resumable) if supervised else None
        self._notes = [notes for notes in (self._lengths_file, self._spans) if notes]  # what lies beside the tokens meanwhile
        try:
            refuse_existing(prefix, overwrite)
        except DataError:
            if resumable and self._bin.tell():  # another command's unfinished work
                self._close()
            else:
                self.discard()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._finished:
            return
        if self._kept:
            self._close()
        else:
            self.discard()

    @property
    def committed(self) -> tuple[int, int]:
        """What lies in the temporary files: (bytes of tokens, documents)."""
        documents = self._lengths_file.size // 4 if self._lengths_file else 0
        return self._bin.tell(), min(documents, self._spans.documents) if self._spans else documents

    def cut(self, size: int, documents: int) -> None:
        """Take up the first `documents` documents, `size` bytes of tokens, of an earlier writer; drop the rest."""
        assert self._lengths_file and self.documents == 0, "only a fresh resumable writer can take up"
        self._bin.truncate(size)
        self._bin.seek(0, os.SEEK_END)
        self._lengths_file.cut(documents * 4)
        if self._spans:
            self._spans.cut(documents)
        self._kept = documents > 0
        if not documents:
            return
        with open(shard_path(self.prefix, ".bin" + PARTIAL), "rb") as stream:
            while raw := stream.read(1 << 24):
                self._hash.update(raw)
                self._counts += np.bincount(np.frombuffer(raw, self._dtype), minlength=self._vocab_size)
        self._lengths = [np.fromfile(self._lengths_file.path, dtype=np.int32)]
        self.documents = documents

    def leave(self) -> None:
        """Touch nothing: what lies here is the work of another command."""
        self._kept = True

    @property
    def tokens(self) -> int:
        """How many tokens were written so far."""
        return self._bin.tell() // self._dtype.itemsize

    def commit(self) -> tuple[int, int]:
        """Put all that was appended on disk, to be kept if the run ends here; returns what `cut` needs."""
        os.fsync(self._bin.fileno())
        for notes in self._notes:
            notes.sync()
        self._kept = True
        return self.committed

    def append(self, ids: np.ndarray, lengths: np.ndarray, spans: Spans | None = None) -> None:
        """Append documents.

        Args:
            ids: integers [sum of lengths], all documents one after the other.
            lengths: integers [documents], each at least 1.
            spans: of these documents, where the shard is supervised.

        Raises:
            DataError: an id that is not in the vocabulary, an empty or overlong document, or spans that do not fit. Nothing
                was written then.
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
        assert (spans is None) == (self._spans is None), "spans come with every document or with none"
        if spans and (defect := spans.defect(lengths)):
            raise DataError(f"{self.prefix}: {defect}")
        raw = ids.astype(self._dtype).tobytes()
        write_all(self._bin, raw)
        self._lengths.append(lengths.astype(np.int32))
        if self._lengths_file:
            self._lengths_file.append(self._lengths[-1].tobytes())
        if spans:
            self._spans.append(spans)
        self._hash.update(raw)
        self._counts += np.bincount(ids, minlength=self._vocab_size)
        self.documents += len(lengths)

    def finish(self, may_be_empty: bool = False) -> ShardInfo:
        """Write index and sidecar and give all files their names, the sidecar last.

        Args:
            may_be_empty: it is one of many parts, of which some may hold no document.

        Raises:
            DataError: no document was written; an empty shard cannot be opened.
        """
        if not (self.documents or may_be_empty):
            raise DataError(f"{self.prefix}: not one document to write; an empty shard cannot be opened")
        beside = {"idx": index_bytes(self.lengths, self._dtype)}
        if self._spans:
            beside["spans"] = self._spans.all().to_bytes()
        files = {"bin": {"bytes": self._bin.tell(), "sha256": self._hash.hexdigest()}}
        files |= {kind: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for kind, raw in beside.items()}
        info = ShardInfo(
            dtype=self._dtype.name,
            documents=self.documents,
            tokens=int(self._counts.sum()),
            max_id=int(np.flatnonzero(self._counts)[-1]) if self.documents else -1,
            unigram_entropy_nats=unigram_entropy(self._counts) if self.documents else 0.0,
            files=files,
            **self._given,
        )
        beside["json"] = info.to_json().encode("utf-8")
        with ExitStack() as stack:
            streams = {kind: stack.enter_context(open_partial(shard_path(self.prefix, f".{kind}"))) for kind in beside}
            for kind, stream in streams.items():
                write_all(stream, beside[kind])
            # Without its sidecar a shard is not valid, so a run that dies from here on leaves nothing that looks whole.
            shard_path(self.prefix, ".json").unlink(missing_ok=True)
            if not self._spans:  # those of a shard that is replaced
                shard_path(self.prefix, SUFFIX).unlink(missing_ok=True)
            for kind, stream in {"bin": self._bin, **streams}.items():
                finish_partial(stream, shard_path(self.prefix, f".{kind}"))
        for notes in self._notes:
            notes.remove()
        self._finished = True
        return info

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the documents so far, int32 [documents]."""
        return np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)

    def discard(self) -> None:
        """Remove what was written."""
        if self._finished:
            return
        for suffix in SUFFIXES:
            shard_path(self.prefix, suffix + PARTIAL).unlink(missing_ok=True)
        for notes in self._notes:
            notes.remove()
        self._bin.close()
        self._finished = True  # nothing is left to do

    def _close(self) -> None:
        for suffix in (".idx", ".json", SUFFIX):
            shard_path(self.prefix, suffix + PARTIAL).unlink(missing_ok=True)
        for notes in self._notes:
            notes.close()
        self._bin.close()


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raise DataError if a file of the shard exists and may not be replaced."""
    existing = [str(p) for p in (shard_path(prefix, s) for s in SUFFIXES) if p.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: exists already; choose another --output, or give --overwrite to replace it")


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


def open_shard(prefix: str | Path, may_be_empty: bool = False) -> Shard:
    """Open a shard after checking that index, token file and sidecar agree in structure.

    Args:
        may_be_empty: take a part that holds no document, too.

    Raises:
        DataError: something is missing, cut short or contradictory; the message has one line per defect.
    """
    prefix = str(prefix)
    info = ShardInfo.from_file(shard_path(prefix, ".json"))
    lengths = read_index(prefix, info)
    if not len(lengths):
        if may_be_empty:
            spans = _read_spans(prefix, info, lengths)
            return Shard(prefix, info, lengths, np.zeros(0, np.int64), np.zeros(0, info.dtype), spans)
        raise DataError(f"{prefix}: holds no document; it is a part of a corpus to which none fell")
    starts = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
    tokens = np.memmap(shard_path(prefix, ".bin"), dtype=info.dtype, mode="r")
    return Shard(prefix, info, lengths, starts, tokens, _read_spans(prefix, info, lengths))


def _read_spans(prefix: str, info: ShardInfo, lengths: np.ndarray) -> Spans | None:
    """The spans of a supervised shard, checked against the documents' lengths. Raises DataError."""
    if not info.supervised:
        return None
    path = shard_path(prefix, SUFFIX)
    spans = Spans.from_file(path)
    if defect := spans.defect(lengths):
        raise DataError(f"{path}: {defect}; altered")
    return spans


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
    sequences, borders = check_header(raw, idx, info.dtype)
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(raw) != expected:
        raise DataError(f"{idx}: {len(raw)} bytes, but its header calls for {expected}; cut short or altered")
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=HEADER.size)
    itemsize = np.dtype(info.dtype).itemsize
    if raw != index_bytes(lengths, np.dtype(info.dtype)) or (lengths < 1).any():
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
