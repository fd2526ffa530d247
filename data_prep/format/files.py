"""Outputs that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from unfold.data_prep.errors import DataError

PARTIAL = ".partial"


def open_partial(target: Path, keep: bool = False) -> BinaryIO:
    """Open `target` + '.partial' for writing, held against other processes until it is closed.

    The lock dies with its process, so what a killed run left behind is reused and never stands in the way. Unbuffered:
    a full disk is met where the bytes are written, and nowhere else (use `write_all`).

    Args:
        keep: leave what the file already holds.

    Raises:
        DataError: another running process is writing the same output.
    """
    partial = target.with_name(target.name + PARTIAL)
    busy = DataError(f"{target}: another run is writing this output now; wait for it, or choose another --output")
    stream = open(partial, "ab", buffering=0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock the other run may have finished and renamed this very file.
        if not os.path.samestat(os.fstat(stream.fileno()), os.stat(partial)):
            raise busy
    except (BlockingIOError, FileNotFoundError):
        stream.close()
        raise busy from None
    except DataError:
        stream.close()
        raise
    except OSError:
        pass  # a file system without locks: nothing protects two runs from each other there
    if not keep:
        stream.truncate(0)
    stream.seek(0, os.SEEK_END)
    return stream


def write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of it to an unbuffered file, which may take a part at a time."""
    left = memoryview(data).cast("B")
    while left:
        left = left[stream.write(left) :]


class Appended:
    """A file that grows beside an output while it is being made: `target` + '.partial', kept between runs."""

    def __init__(self, target: Path):
        self.path = target.with_name(target.name + PARTIAL)
        self._stream = open(self.path, "ab", buffering=0)
        self._stream.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._stream.tell()

    def cut(self, size: int) -> None:
        """Throw away what comes after the first `size` bytes."""
        self._stream.truncate(size)
        self._stream.seek(0, os.SEEK_END)

    def append(self, data: bytes) -> None:
        """Write at the end."""
        write_all(self._stream, data)

    def sync(self) -> None:
        """Put on disk for good."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close; the file stays."""
        self._stream.close()

    def remove(self) -> None:
        """Close and delete."""
        self._stream.close()
        self.path.unlink(missing_ok=True)


def finish_partial(stream: BinaryIO, target: Path) -> None:
    """Put what was written to `open_partial(target)` in its place, on disk for good."""
    os.fsync(stream.fileno())
    os.replace(target.with_name(target.name + PARTIAL), target)
    stream.close()


@contextmanager
def new_directory(target: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """Give a temporary directory that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        mark: name of a file that every such directory holds; --overwrite removes only a directory that has it.

    Raises:
        DataError: `target` exists and is not an empty directory, and may not be replaced.
    """
    check_new_directory(target, overwrite, mark)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{PARTIAL}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_directory(target: Path, overwrite: bool, mark: str) -> None:
    """Refuse at once, before any work, an output directory that `new_directory` would refuse.

    Raises:
        DataError: see `new_directory`.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"{target}: exists and is not a directory; choose another --output")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{target}: exists already; choose another --output, or give --overwrite to replace it")
    if not (target / mark).exists():
        raise DataError(f"{target}: will not be replaced, because it is not a tokenizer directory (no {mark} in it)")
