"""Corpus files as byte streams: decompressed on the way, in lines of bounded length."""

import gzip
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

BLOCK = 1 << 20
COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz"}


class Line(NamedTuple):
    """One line of a file."""

    raw: bytes  # with its end; empty where the line is too long
    number: int  # 1-based
    end: int  # offset of the byte after it, in the decompressed stream
    size: int


class Stream:
    """A file opened for reading, plain or compressed; `consumed` tells how far into the file itself it has come."""

    def __init__(self, path: str, compression: str):
        """compression: '', 'gz', 'zst' or 'xz'."""
        self.path, self.compression = path, compression
        self._file: BinaryIO = open(path, "rb")
        self.raw: BinaryIO = self._file if not compression else _decompress(self._file, compression)

    @property
    def consumed(self) -> int:
        """Bytes of the file read so far, for progress."""
        return self._file.tell()

    def skip_to(self, offset: int) -> None:
        """Go to an offset of the decompressed stream, forwards from its start."""
        if not self.compression:
            self._file.seek(offset)
            return
        while offset > 0 and (block := self.raw.read(min(BLOCK, offset))):
            offset -= len(block)

    def close(self) -> None:
        """Close both ends."""
        self.raw.close()
        self._file.close()


def _decompress(file: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gz":
        return gzip.open(file)
    if compression == "xz":
        return lzma.open(file)
    import pyarrow  # its zstd reports a file that was cut short, which other bindings take for its end

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def reading_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged compressed file may raise."""
    return (EOFError, OSError, lzma.LZMAError, ValueError)


@contextmanager
def open_stream(path: str, compression: str, offset: int = 0) -> Iterator[Stream]:
    """Open a file at an offset of its decompressed bytes."""
    stream = Stream(path, compression)
    try:
        stream.skip_to(offset)
        yield stream
    finally:
        stream.close()


@contextmanager
def open_seekable(path: str, compression: str) -> Iterator[BinaryIO]:
    """Open a file for formats that seek; a compressed one is first written out to a temporary file."""
    if not compression:
        with open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked, open_stream(path, compression) as stream:
        shutil.copyfileobj(stream.raw, unpacked, BLOCK)
        unpacked.seek(0)
        yield unpacked


def lines(stream: Stream, offset: int, number: int, limit: int) -> Iterator[Line]:
    """The lines from here on. Of a line beyond `limit` bytes only its size is told, so memory stays bounded.

    Args:
        offset: where the stream stands.
        number: number of the line that begins there.
    """
    readline = getattr(stream.raw, "readline", None)
    readline = readline if stream.compression != "zst" else _LineReader(stream.raw).readline
    while raw := readline(limit + 1):
        size = len(raw)
        if size > limit:
            while not raw.endswith(b"\n") and (raw := readline(BLOCK)):
                size += len(raw)
            raw = b""
        offset += size
        yield Line(raw, number, offset, size)
        number += 1


class _LineReader:
    """`readline` over a stream that only has `read` (pyarrow's has, but does not implement it)."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._held, self._at = stream, b"", 0

    def readline(self, limit: int) -> bytes:
        """Bytes up to a line end, or `limit` of them."""
        parts: list[bytes] = []
        while limit > 0:
            if self._at >= len(self._held):
                self._held, self._at = self._stream.read(BLOCK), 0
                if not self._held:
                    break
            cut = self._held.find(b"\n", self._at, self._at + limit) + 1 or min(self._at + limit, len(self._held))
            parts.append(self._held[self._at : cut])
            limit -= cut - self._at
            self._at = cut
            if parts[-1].endswith(b"\n"):
                break
        return b"".join(parts)


def count_lines(path: str, end: int) -> int:
    """Line ends among the first `end` bytes of a plain file."""
    found = 0
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(BLOCK, end))):
            found += block.count(b"\n")
            end -= len(block)
    return found


def unreadable(error: Exception, compression: str) -> str:
    """What to tell of a compressed file that broke off."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError):
        return f"cannot be opened ({error.strerror})"
    if not compression:
        return f"unreadable from here on ({reason})"
    return f"cut short or damaged as a .{compression} file ({reason}); what came after is lost: restore the file"


def not_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    """What to tell of bytes that are no UTF-8."""
    return f"not UTF-8 (byte 0x{raw[error.start]:02x}: {error.reason}); convert the file to UTF-8"
