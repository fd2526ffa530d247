"""Rows of parquet and arrow files, and of Hugging Face datasets on disk or streamed from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from unfold.data_prep.corpus.fields import column_of
from unfold.data_prep.corpus.items import CHAT_KEYS, Document, Position, text_of, too_long
from unfold.data_prep.corpus.sources import HUB, Source
from unfold.data_prep.corpus.streams import open_seekable

ROWS = 256  # taken at a time, so that memory does not depend on the size of row groups


def read_parquet(source: Source, at: Position) -> Iterator[Document]:
    """The rows of a parquet file from row `at.offset` on; whole row groups before it are not read."""
    import pyarrow
    import pyarrow.parquet

    with open_seekable(source.path, source.compression) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw)
        except (pyarrow.ArrowException, OSError) as e:
            yield _lost(source, at, f"not a parquet file: {_first_line(e)}")
            return
        names = file.schema_arrow.names
        if problem := _missing(source, names):
            yield _lost(source, at, problem)
            return
        rows, groups = 0, []
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if rows + size <= at.offset and not groups:
                rows += size
            else:
                groups.append(group)
        batches = file.iter_batches(batch_size=ROWS, row_groups=groups, columns=_columns(source, names))
        yield from _rows(source, at, batches, rows, file.metadata.num_rows)


def read_arrow(source: Source, at: Position) -> Iterator[Document]:
    """The rows of an arrow file (stream format, as `datasets` writes it, or file format)."""
    import pyarrow

    with open_seekable(source.path, source.compression) as raw:
        try:
            batches = _arrow_batches(raw)
            names = next(batches)
        except (pyarrow.ArrowException, OSError) as e:
            yield _lost(source, at, f"not an arrow file: {_first_line(e)}")
            return
        if problem := _missing(source, names):
            yield _lost(source, at, problem)
            return
        picked = _columns(source, names)
        slices = (b.select(picked).slice(i, ROWS) for b in batches for i in range(0, max(b.num_rows, 1), ROWS))
        yield from _rows(source, at, slices, 0, 0)


def _arrow_batches(raw: BinaryIO) -> Iterator:
    """First the names of the columns, then the record batches."""
    import pyarrow

    if raw.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(raw)
        yield file.schema.names
        for i in range(file.num_record_batches):
            yield file.get_batch(i)
        return
    raw.seek(0)
    stream = pyarrow.ipc.open_stream(raw)
    yield stream.schema.names
    yield from stream


def read_hub(source: Source, at: Position) -> Iterator[Document]:
    """The rows of `hf:NAME[@CONFIG][:SPLIT]`, streamed (NAME: a dataset of the hub, or a local dataset directory)."""
    import datasets

    name, _, split = source.path.removeprefix(HUB).partition(":")
    name, _, config = name.partition("@")
    try:
        with _quiet(datasets):
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for number, row in enumerate(rows.skip(at.offset) if at.offset else rows, start=at.offset + 1):
                yield _document(row, source, at, number, 0)
    except GeneratorExit:
        raise
    except Exception as e:  # the library raises everything from OSError to its own classes
        yield _lost(source, at, f"the dataset cannot be read: {_first_line(e)}")


@contextmanager
def _quiet(datasets) -> Iterator[None]:
    """No bars of the library beside our own."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _rows(source: Source, at: Position, batches: Iterator, first: int, total: int) -> Iterator[Document]:
    """Documents of record batches that begin at row `first` of the file (rows before `at.offset` are passed over)."""
    import pyarrow

    size, number, bytes_seen = source.size, first, 0
    try:
        for batch in batches:
            bytes_seen += batch.nbytes
            if number + batch.num_rows <= at.offset:
                number += batch.num_rows
                continue
            for row in batch.to_pylist():
                number += 1
                if number > at.offset:
                    # Without a row count (arrow streams) the bytes of the batches tell how far the file is read.
                    consumed = size * number // total if total else min(bytes_seen, size)
                    yield _document(row, source, at, number, consumed)
    except (pyarrow.ArrowException, OSError) as e:
        after = Position(at.source + 1)
        yield Document("", at.source, number + 1, after, size, f"unreadable from here on: {_first_line(e)}")


def _document(row: dict, source: Source, at: Position, number: int, consumed: int) -> Document:
    text, problem, kept = text_of(row, source)
    if text and len(text) > source.limit:
        text, problem = None, too_long(len(text), source.limit)
    return Document(text or "", at.source, number, Position(at.source, number, number + 1), consumed, problem, not kept)


def _lost(source: Source, at: Position, problem: str) -> Document:
    """A file of which nothing can be read."""
    return Document("", at.source, at.line, Position(at.source + 1), source.size, problem)


def _missing(source: Source, names: list[str]) -> str:
    needed = () if source.fields or (source.chats and not {*CHAT_KEYS}.isdisjoint(names)) else source.columns
    keys = (*needed, *(condition.key for condition in source.where))
    if absent := [key for key in keys if column_of(key, names) not in names]:
        return f"no column {absent[0]!r}; name one of {names} by --text-key"
    twice = [name for name in _columns(source, names) if names.count(name) > 1]
    return f"two columns are called {twice[0]!r}; rename one, nobody can tell which is meant" if twice else ""


def _columns(source: Source, names: list[str]) -> list[str]:
    keys = (*source.columns, *(condition.key for condition in source.where), *(CHAT_KEYS if source.chats else ()))
    wanted = {column_of(key, names) for key in keys}
    return [name for name in names if name in wanted]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
