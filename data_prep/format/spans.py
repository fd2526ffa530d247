"""Which tokens of a supervised document are its context and which are answers: PREFIX.spans, beside the token file.

All little-endian: a header (magic, version, documents D, answer ranges N), int64 [D + 1] the number of each document's
first range, int32 [D] the tokens of its context, int32 [N, 2] ranges [begin, end) of the tokens that are to be predicted.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import Appended

MAGIC = b"UNFSPANS"
VERSION = 1
HEADER = struct.Struct("<8sQQQ")
SUFFIX = ".spans"


@dataclass(frozen=True)
class Spans:
    """Contexts and answers of some documents.

    Attributes:
        context: int32 [documents], tokens of the context, which come first; 0 where there is none.
        counts: int32 [documents], answer ranges of each document, at least 1.
        ranges: int32 [sum of counts, 2], tokens [begin, end) of the document that are answers; ascending, apart, after the
            context, and never the document's first token, which nothing predicts.
    """

    context: np.ndarray
    counts: np.ndarray
    ranges: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> "Spans":
        """From (context, ranges) of each document."""
        ranges = [r for _, own in documents for r in own]
        return cls(
            np.array([context for context, _ in documents], dtype=np.int32),
            np.array([len(own) for _, own in documents], dtype=np.int32),
            np.array(ranges, dtype=np.int32).reshape(-1, 2),
        )

    @classmethod
    def concatenated(cls, parts: Sequence["Spans"]) -> "Spans":
        """Several, one after the other."""
        parts = parts or [cls.of([])]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("context", "counts", "ranges")))

    @property
    def first(self) -> np.ndarray:
        """Number of each document's first range, and of the one after the last: int64 [documents + 1]."""
        return np.concatenate(([0], np.cumsum(self.counts, dtype=np.int64)))

    @property
    def loss_tokens(self) -> int:
        """Tokens of all answers."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum(dtype=np.int64))

    def __getitem__(self, documents: slice | np.ndarray) -> "Spans":
        """Those of a run of documents, or of those that a mask, bool [documents], picks."""
        picked = np.zeros(len(self.context), dtype=bool)
        picked[documents] = True
        return Spans(self.context[picked], self.counts[picked], self.ranges[np.repeat(picked, self.counts)])

    def defect(self, lengths: np.ndarray) -> str:
        """What is wrong with these spans for documents of these lengths, int [documents]; '' if nothing is."""
        if len(lengths) != len(self.context):
            return f"spans of {len(self.context)} documents, but there are {len(lengths)}"
        owner = np.repeat(np.arange(len(lengths)), self.counts)
        begin, end = self.ranges[:, 0], self.ranges[:, 1]
        bad = (begin < np.maximum(self.context[owner], 1)) | (end <= begin) | (end > lengths[owner])
        bad[1:] |= (owner[1:] == owner[:-1]) & (begin[1:] < end[:-1])
        wrong = np.concatenate((owner[bad], np.flatnonzero((self.counts < 1) | (self.context < 0))))
        if wrong.size:
            return f"document {wrong.min()}: its answers do not lie one after the other between its context and its end"
        return ""

    def to_bytes(self) -> bytes:
        """The content of the file."""
        header = HEADER.pack(MAGIC, VERSION, len(self.context), len(self.ranges))
        parts = (self.first.astype("<i8"), self.context.astype("<i4"), self.ranges.astype("<i4"))
        return b"".join((header, *(part.tobytes() for part in parts)))

    @classmethod
    def from_file(cls, path: Path) -> "Spans":
        """Read a file. The arrays are memory maps.

        Raises:
            DataError: it is missing, cut short, or no such file.
        """
        documents, ranges = read_header(path)
        if (size := path.stat().st_size) != (expected := HEADER.size + 12 * documents + 8 + 8 * ranges):
            raise DataError(f"{path}: {size} bytes, but its header calls for {expected}; cut short or altered")
        first, context, found = map_spans(path, documents)
        counts = np.diff(first)
        if first[0] != 0 or first[-1] != ranges or (counts < 0).any():
            raise DataError(f"{path}: its numbers of ranges contradict each other; altered")
        return cls(context, counts.astype(np.int32), found)


def read_header(path: Path) -> tuple[int, int]:
    """(documents, answer ranges) that a file names. Raises DataError where it is missing or no such file."""
    if not path.is_file():
        raise DataError(f"{path}: missing; the shard is not complete: make it again")
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    magic, version, documents, ranges = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path}: not the spans of a supervised shard (version {VERSION})")
    return documents, ranges


def map_spans(path: Path, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of each document's first range, int64 [documents + 1]; contexts, int32 [documents]; ranges, int32 [N, 2]."""
    raw = np.memmap(path, np.uint8, mode="r")
    at = HEADER.size + 8 * (documents + 1)
    context = raw[at : at + 4 * documents].view("<i4")
    return raw[HEADER.size : at].view("<i8"), context, raw[at + 4 * documents :].view("<i4").reshape(-1, 2)


class SpansWriter:
    """The spans of a shard that is being made; kept on disk where a run may go on."""

    def __init__(self, target: Path, resumable: bool):
        """target: PREFIX.spans. resumable: keep them beside it until `remove`."""
        self._parts: list[Spans] = []
        names = ("documents", "ranges") if resumable else ()
        self._files = [Appended(target.with_name(f"{target.name}.{name}")) for name in names]
        self.documents = 0  # how many the files on disk cover, however the writer before ended
        if resumable:
            per_document, ranges = self._read()
            needed = np.cumsum(per_document[:, 1], dtype=np.int64)
            self.documents = int(np.searchsorted(needed, len(ranges), side="right"))

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [documents, 2] context and number of ranges; int32 [ranges, 2]. A last entry that was cut off is left out."""
        raw = (np.frombuffer(file.path.read_bytes(), np.uint8) for file in self._files)
        return tuple(data[: len(data) // 8 * 8].view("<i4").reshape(-1, 2) for data in raw)

    def cut(self, documents: int) -> None:
        """Take up the first `documents` documents of an earlier writer; drop the rest."""
        per_document, ranges = (array.copy() for array in self._read())
        per_document = per_document[:documents]
        ranges = ranges[: int(per_document[:, 1].sum(dtype=np.int64))]
        for file, kept in zip(self._files, (per_document, ranges), strict=True):
            file.cut(kept.nbytes)
        self._parts = [Spans(per_document[:, 0], per_document[:, 1], ranges)]
        self.documents = documents

    def append(self, spans: Spans) -> None:
        """Add those of further documents."""
        self._parts.append(spans)
        self.documents += len(spans.context)
        if self._files:
            per_document = np.stack((spans.context, spans.counts), 1)
            for file, values in zip(self._files, (per_document, spans.ranges), strict=True):
                file.append(values.astype("<i4").tobytes())

    def sync(self) -> None:
        """Put on disk for good."""
        for file in self._files:
            file.sync()

    def all(self) -> Spans:
        """Everything so far."""
        return Spans.concatenated(self._parts)

    def close(self) -> None:
        """Close; the files stay."""
        for file in self._files:
            file.close()

    def remove(self) -> None:
        """Close and delete what lies beside the target."""
        for file in self._files:
            file.remove()
