"""Shards as training opens them: by the thousand, checked by sizes and headers alone, mapped when the first token is needed.

No file is written beside the shards, so any number of ranks may open the same ones at once. What `verify` finds beyond that
takes reading every byte: see `unfold.data_prep.format.shards.open_shard`.
"""

import hashlib
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.index import HEADER, ShardInfo, check_header, shard_path
from unfold.data_prep.format.spans import SUFFIX, MappedSpans, SpansHeader


class LazyShard:
    """One shard.

    Attributes:
        prefix: its files' names without their endings.
        info: its sidecar.
        lengths: int32 [documents].
        sha256: of the token file; of a supervised shard of its spans, too.
        linked: whether contexts may be linked documents.
    """

    def __init__(self, prefix: str, info: ShardInfo, lengths: np.ndarray, header: SpansHeader | None = None):
        """header: of a supervised shard's spans."""
        self.prefix, self.info, self.lengths = prefix, info, lengths
        self.sha256 = info.files["bin"]["sha256"]
        if info.supervised:
            self.sha256 = hashlib.sha256((self.sha256 + info.files["spans"]["sha256"]).encode()).hexdigest()
        self._starts: np.ndarray | None = None
        self._tokens: np.ndarray | None = None
        self._header, self._mapped = header, None
        self.linked = header is not None and header.linked

    def read(self, document: int, offset: int, out: np.ndarray) -> None:
        """Copy a document's tokens from ``offset`` on into out, int64 [length]."""
        if self._tokens is None:
            self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
            self._tokens = np.memmap(shard_path(self.prefix, ".bin"), self.info.dtype, mode="r")
        begin = int(self._starts[document]) + offset
        out[:] = self._tokens[begin : begin + len(out)]

    def spans(self, document: int) -> tuple[int, np.ndarray] | None:
        """(tokens of its context, its answers' tokens [begin, end), int32 [ranges, 2]); None unless supervised."""
        if not self.info.supervised:
            return None
        spans = self._spans
        return int(spans.context[document]), np.array(spans.ranges[spans.first[document] : spans.first[document + 1]])

    def edges(self, document: int) -> list[int]:
        """The tokens of a linked context before the end of its prefix and of each part; nothing of any other document."""
        if not self.linked:
            return []
        first = self._spans.first_edge
        return self._spans.edges[first[document] : first[document + 1]].tolist()

    @property
    def parts(self) -> np.ndarray:
        """int64 [documents], how many parts each linked context has; 0 for any other document."""
        if not self.linked:
            return np.zeros(len(self.lengths), np.int64)
        return np.maximum(np.diff(self._spans.first_edge) - 1, 0)

    @property
    def _spans(self) -> MappedSpans:
        if self._mapped is None:
            self._mapped = MappedSpans.of(shard_path(self.prefix, SUFFIX), self._header)
        return self._mapped


def open_lazily(prefix: str) -> LazyShard:
    """Open a shard without reading its tokens.

    Raises:
        DataError: a file is missing, of another size than was written, or not of this shard.
    """
    for suffix in (".bin", ".idx", ".json"):
        if not shard_path(prefix, suffix).is_file():
            raise DataError(f"{prefix}{suffix} does not exist; make the shard with `python -m data_prep tokenize`")
    sidecar = shard_path(prefix, ".json")
    try:
        info = ShardInfo.from_file(sidecar)
    except DataError as error:
        raise DataError(f"{sidecar} is damaged ({str(error).removeprefix(f'{sidecar}: ')}); make the shard again") from None
    for kind, entry in info.files.items():
        path = shard_path(prefix, f".{kind}")
        if not path.is_file():
            raise DataError(f"{path} does not exist; restore it or make the shard again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DataError(f"{path} has {size} bytes, {entry['bytes']} were written; restore it or make it again")
    lengths = _read_lengths(prefix, info)
    header = None
    if info.supervised:
        header = _spans_header(shard_path(prefix, SUFFIX), len(lengths), info.files["spans"]["bytes"])
    return LazyShard(prefix, info, lengths, header)


def _read_lengths(prefix: str, info: ShardInfo) -> np.ndarray:
    """int32 [documents]"""
    path = shard_path(prefix, ".idx")
    foreign = DataError(f"{path} does not belong to {prefix}.bin; restore it or make the shard again")
    with open(path, "rb") as file:
        try:
            sequences, _ = check_header(file.read(HEADER.size), path, info.dtype)
        except DataError:
            raise foreign from None
        lengths = np.frombuffer(file.read(4 * sequences), "<i4")
    tokens = int(lengths.sum(dtype=np.int64))
    if len(lengths) != sequences or tokens * np.dtype(info.dtype).itemsize != info.files["bin"]["bytes"]:
        raise foreign
    return lengths


def _spans_header(path: Path, documents: int, size: int) -> SpansHeader:
    foreign = DataError(f"{path} does not belong to the shard beside it; restore it or make the shard again")
    try:
        header = SpansHeader.from_file(path)
    except DataError:
        raise foreign from None
    if header.documents != documents or size != header.size:
        raise foreign
    return header
