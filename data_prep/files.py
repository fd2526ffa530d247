"""Outputs that appear whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.errors import DataError

PARTIAL = ".partial"


def open_partial(target: Path) -> BinaryIO:
    """Open `target` + '.partial' for writing, held against other processes until it is closed.

    The lock dies with its process, so what a killed run left behind is reused and never stands in the way.

    Raises:
        DataError: another running process is writing the same output.
    """
    partial = target.with_name(target.name + PARTIAL)
    busy = DataError(f"{target}: another run is writing this output now; wait for it, or choose another --output")
    stream = open(partial, "ab")
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
    stream.truncate(0)
    stream.seek(0)
    return stream


def finish_partial(stream: BinaryIO, target: Path) -> None:
    """Put what was written to `open_partial(target)` in its place, on disk for good."""
    stream.flush()
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
