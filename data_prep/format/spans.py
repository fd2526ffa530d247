"""Which tokens of a supervised document are its context and which are answers: PREFIX.spans, beside the token file.

All little-endian: a header (magic, version, documents D, answer ranges N), int64 [D + 1] the number of each document's
first range, int32 [D] the tokens of its context, int32 [N, 2] ranges [begin, end) of the tokens that are to be predicted.

Where contexts may be linked documents (version 2) the header goes on with the number of edges E, and there follow int64
[D + 1] the number of each document's first edge and int32 [E] edges: where the prefix and then each part ends, in tokens.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import Appended

MAGIC = b"UNFSPANS"
PLAIN, LINKED = 1, 2  # versions
HEADER = struct.Struct("<8sQQQ")
EDGES = struct.Struct("<Q")
SUFFIX = ".spans"


@dataclass(frozen=True)
class Spans:
    """Contexts and answers of some documents.

    Attributes:
        context: int32 [documents], tokens of the context, which come first; 0 where there is none.
        counts: int32 [documents], answer ranges of each document, at least 1.
        ranges: int32 [sum of counts, 2], tokens [begin, end) of the document that are answers; ascending, apart, after the
            context, and never the document's first token, which nothing predicts, nor the first one after a linked context.
        edge_counts: int32 [documents], one more than the parts of a linked context; 0 of any other.
        edges: int32 [sum of edge_counts], the tokens of a linked context before the end of its prefix and of each part.
    """

    context: np.ndarray
    counts: np.ndarray
    ranges: np.ndarray
    edge_counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[tuple[int, Sequence[tuple[int, int]]]], edges: Sequence[Sequence[int]] = ()) -> "Spans":
        """From (context, ranges) of each document, and its edges; without these none is linked."""
        ranges = [r for _, own in documents for r in own]
        edges = edges or [()] * len(documents)
        return cls(
            np.array([context for context, _ in documents], dtype=np.int32),
            np.array([len(own) for _, own in documents], dtype=np.int32),
            np.array(ranges, dtype=np.int32).reshape(-1, 2),
            np.array([len(own) for own in edges], dtype=np.int32),
            np.array([edge for own in edges for edge in own], dtype=np.int32),
        )

    @classmethod
    def concatenated(cls, parts: Sequence["Spans"]) -> "Spans":
        """Several, one after the other."""
        parts = parts or [cls.of([])]
        return cls(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(cls)))

    @property
    def loss_tokens(self) -> int:
        """Tokens of all answers."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum(dtype=np.int64))

    @property
    def parts(self) -> int:
        """Parts of all linked contexts."""
        return len(self.edges) - int((self.edge_counts > 0).sum())

    def __getitem__(self, documents: slice | np.ndarray) -> "Spans":
        """Those of a run of documents, or of those that a mask, bool [documents], picks."""
        picked = np.zeros(len(self.context), dtype=bool)
        picked[documents] = True
        return Spans(
            self.context[picked],
            self.counts[picked],
            self.ranges[np.repeat(picked, self.counts)],
            self.edge_counts[picked],
            self.edges[np.repeat(picked, self.edge_counts)],
        )

    def defect(self, lengths: np.ndarray) -> str:
        """What is wrong with these spans for documents of these lengths, int [documents]; '' if nothing is."""
        if len(lengths) != len(self.context):
            return f"spans of {len(self.context)} documents, but there are {len(lengths)}"
        owner = np.repeat(np.arange(len(lengths)), self.counts)
        begin, end = self.ranges[:, 0], self.ranges[:, 1]
        first = np.maximum(self.context + (self.edge_counts > 0), 1)
        bad = (begin < first[owner]) | (end <= begin) | (end > lengths[owner])
        bad[1:] |= (owner[1:] == owner[:-1]) & (begin[1:] < end[:-1])
        wrong = np.concatenate((owner[bad], np.flatnonzero((self.counts < 1) | (self.context < 0))))
        if wrong.size:
            return f"document {wrong.min()}: its answers do not lie one after the other between its context and its end"
        owner = np.repeat(np.arange(len(lengths)), self.edge_counts)
        last = np.ones(len(owner), bool)
        last[:-1] = owner[1:] != owner[:-1]
        bad = self.edges < 0
        bad |= last & (self.edges != self.context[owner])
        bad[1:] |= ~last[:-1] & (self.edges[1:] <= self.edges[:-1])
        wrong = np.concatenate((owner[bad], np.flatnonzero(self.edge_counts == 1)))
        if wrong.size:
            return f"document {wrong.min()}: the parts of its linked context do not make up what stands before its question"
        return ""

    def to_bytes(self) -> bytes:
        """The content of the file."""
        documents, linked = len(self.context), len(self.edges) > 0
        header = HEADER.pack(MAGIC, LINKED if linked else PLAIN, documents, len(self.ranges))
        parts = [_first(self.counts).astype("<i8"), self.context.astype("<i4"), self.ranges.astype("<i4")]
        if linked:
            header += EDGES.pack(len(self.edges))
            parts += [_first(self.edge_counts).astype("<i8"), self.edges.astype("<i4")]
        return b"".join((header, *(part.tobytes() for part in parts)))

    @classmethod
    def from_file(cls, path: Path) -> "Spans":
        """Read a file. The arrays are memory maps.

        Raises:
            DataError: it is missing, cut short, or no such file.
        """
        header = SpansHeader.from_file(path)
        if (size := path.stat().st_size) != header.size:
            raise DataError(f"{path}: {size} bytes, but its header calls for {header.size}; cut short or altered")
        found = MappedSpans.of(path, header)
        for first, total in ((found.first, header.ranges), (found.first_edge, header.edges)):
            if first[0] != 0 or first[-1] != total or (np.diff(first) < 0).any():
                raise DataError(f"{path}: its numbers of ranges contradict each other; altered")
        count = lambda first: np.diff(first).astype(np.int32)
        return cls(found.context, count(found.first), found.ranges, count(found.first_edge), found.edges)


def _first(counts: np.ndarray) -> np.ndarray:
    """Number of each document's first item, and of the one after the last: int64 [documents + 1]."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


@dataclass(frozen=True)
class SpansHeader:
    """How much a file holds; linked: whether it says where the parts of contexts end."""

    documents: int
    ranges: int
    edges: int
    linked: bool

    @property
    def begin(self) -> int:
        """Bytes before the first array."""
        return HEADER.size + EDGES.size * self.linked

    @property
    def size(self) -> int:
        """Bytes of the file."""
        linked = 8 * (self.documents + 1) + 4 * self.edges
        return self.begin + 8 * (self.documents + 1) + 4 * self.documents + 8 * self.ranges + linked * self.linked

    @classmethod
    def from_file(cls, path: Path) -> "SpansHeader":
        """Read it. Raises DataError where it is missing or no such file."""
        if not path.is_file():
            raise DataError(f"{path}: missing; the shard is not complete: make it again")
        with open(path, "rb") as stream:
            head = stream.read(HEADER.size)
            more = stream.read(EDGES.size)
        magic, version, documents, ranges = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0)
        linked = version == LINKED and len(more) == EDGES.size
        if magic != MAGIC or not (linked or version == PLAIN):
            raise DataError(f"{path}: not the spans of a supervised shard (version {PLAIN} or {LINKED})")
        return cls(documents, ranges, EDGES.unpack(more)[0] if linked else 0, linked)


@dataclass(frozen=True)
class MappedSpans:
    """What a file holds, as memory maps: numbers of each document's first range and first edge, int64 [documents + 1];
    the others as :class:`Spans` has them."""

    first: np.ndarray
    context: np.ndarray
    ranges: np.ndarray
    first_edge: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, path: Path, header: SpansHeader) -> "MappedSpans":
        """Map a file of the size that its header calls for."""
        raw, at = np.memmap(path, np.uint8, mode="r"), header.begin

        def take(count: int, kind: str) -> np.ndarray:
            nonlocal at
            begin, at = at, at + count * np.dtype(kind).itemsize
            return raw[begin:at].view(kind)

        documents = header.documents
        plain = take(documents + 1, "<i8"), take(documents, "<i4"), take(2 * header.ranges, "<i4").reshape(-1, 2)
        if not header.linked:
            return cls(*plain, np.zeros(documents + 1, np.int64), np.zeros(0, np.int32))
        return cls(*plain, take(documents + 1, "<i8"), take(header.edges, "<i4"))


class SpansWriter:
    """The spans of a shard that is being made; kept on disk where a run may go on."""

    def __init__(self, target: Path, resumable: bool):
        """target: PREFIX.spans. resumable: keep them beside it until `remove`."""
        self._parts: list[Spans] = []
        names = ("documents", "ranges", "edges") if resumable else ()
        self._files = [Appended(target.with_name(f"{target.name}.{name}")) for name in names]
        self.documents = 0  # how many the files on disk cover, however the writer before ended
        if resumable:
            per_document, ranges, edges = self._read()
            covered = [
                np.searchsorted(np.cumsum(per_document[:, column], dtype=np.int64), len(items), side="right")
                for column, items in ((1, ranges), (2, edges))
            ]
            self.documents = int(min(covered))

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int32 [documents, 3] context and numbers of ranges and edges; int32 [ranges, 2]; int32 [edges, 1].

        A last entry that was cut off is left out.
        """
        whole = []
        for file, columns in zip(self._files, (3, 2, 1), strict=True):
            data = np.frombuffer(file.path.read_bytes(), np.uint8)
            whole.append(data[: len(data) // (4 * columns) * 4 * columns].view("<i4").reshape(-1, columns))
        return tuple(whole)

    def cut(self, documents: int) -> None:
        """Take up the first `documents` documents of an earlier writer; drop the rest."""
        per_document, ranges, edges = (array.copy() for array in self._read())
        per_document = per_document[:documents]
        context, counts, edge_counts = per_document.T
        ranges, edges = ranges[: int(counts.sum(dtype=np.int64))], edges[: int(edge_counts.sum(dtype=np.int64))]
        for file, kept in zip(self._files, (per_document, ranges, edges), strict=True):
            file.cut(kept.nbytes)
        self._parts = [Spans(context, counts, ranges, edge_counts, edges[:, 0])]
        self.documents = documents

    def append(self, spans: Spans) -> None:
        """Add those of further documents."""
        self._parts.append(spans)
        self.documents += len(spans.context)
        if self._files:
            per_document = np.stack((spans.context, spans.counts, spans.edge_counts), 1)
            for file, values in zip(self._files, (per_document, spans.ranges, spans.edges), strict=True):
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
