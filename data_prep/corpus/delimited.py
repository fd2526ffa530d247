"""CSV files: the first line names the fields, a quoted field may hold line ends."""

import csv
import sys
from collections.abc import Iterator

from unfold.data_prep.corpus.fields import column_of
from unfold.data_prep.corpus.items import BOM, Document, Position, text_of, too_long
from unfold.data_prep.corpus.sources import Source
from unfold.data_prep.corpus.streams import Stream, lines, not_utf8, open_stream


def read_csv(source: Source, at: Position) -> Iterator[Document]:
    """The rows of a csv file from `at` on."""
    csv.field_size_limit(sys.maxsize)  # the library's bound is one for the process; _Rows keeps the source's own
    with open_stream(source.path, source.compression) as stream:
        rows = _Rows(stream, Position(at.source), source.limit)
        names, problem = next(rows, ([], ""))
        twice = [name for name in names if names.count(name) > 1 and name in _keys(source, names)]
        if twice and not problem:
            problem = f"two columns are called {twice[0]!r}; rename one, nobody can tell which is meant"
        if problem:
            yield Document("", at.source, 1, Position(at.source + 1), stream.consumed, problem)
            return
        first = rows.after
    start = at if at.offset else first
    with open_stream(source.path, source.compression, start.offset) as stream:
        rows = _Rows(stream, start, source.limit)
        for values, problem in rows:
            text, kept = None, True
            if not problem and not values:
                continue  # a blank line
            if not problem and len(values) != len(names):
                problem = f"{len(values)} fields, but the first line names {len(names)}; quote fields that hold commas"
            if not problem:
                text, problem, kept = text_of(dict(zip(names, values, strict=True)), source)
            yield Document(text or "", at.source, rows.first, rows.after, stream.consumed, problem, not kept)


def _keys(source: Source, names: list[str]) -> set[str]:
    return {column_of(key, names) for key in (*source.columns, *(condition.key for condition in source.where))}


class _BadLine(Exception):
    """A line that cannot be part of a row."""


class _Rows:
    """Rows as (fields, problem). `first` is the line on which the last row began, `after` the place behind it."""

    def __init__(self, stream: Stream, start: Position, limit: int):
        self._lines = _Lines(stream, start, limit)
        self._reader = csv.reader(self._lines, strict=True)
        self.first = start.line

    def __iter__(self) -> "_Rows":
        return self

    def __next__(self) -> tuple[list[str], str]:
        self.first, self._lines.size = self.after.line, 0
        try:
            return next(self._reader), ""
        except csv.Error as e:
            return [], f"not valid CSV: {e}"
        except _BadLine as e:
            return [], str(e)

    @property
    def after(self) -> Position:
        return self._lines.after


class _Lines:
    """The lines that csv.reader asks for, as many as make one row. (A generator would not survive a bad one.)"""

    def __init__(self, stream: Stream, start: Position, limit: int):
        self._lines, self._limit = lines(stream, start.offset, start.line, limit), limit
        self.after, self.size = start, 0  # size: bytes of the row so far

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.after = Position(self.after.source, line.end, line.number + 1)
        self.size += line.size
        if self.size > self._limit:
            raise _BadLine(too_long(self.size, self._limit))
        raw = line.raw.removeprefix(BOM) if line.number == 1 else line.raw
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise _BadLine(not_utf8(raw, e)) from None
