"""Corpus files as a stream of documents. Nothing is held beyond one document (or one batch of rows of a columnar file).

A document that cannot be read is an item with a `problem`, so that whoever reads can stop or go on. Every item tells
how to come back to the place behind it, which is what lets an interrupted run go on where it stopped.
"""

import json
from collections.abc import Callable, Iterator, Sequence

import orjson

from unfold.data_prep.corpus.columnar import read_arrow, read_hub, read_parquet
from unfold.data_prep.corpus.delimited import read_csv
from unfold.data_prep.corpus.items import BOM, Document, Position, text_of, too_long
from unfold.data_prep.corpus.sources import Source
from unfold.data_prep.corpus.streams import BLOCK, Line, Stream, lines, not_utf8, open_stream, reading_errors, unreadable
from unfold.data_prep.errors import DataError


def read_items(sources: Sequence[Source], start: Position | None = None) -> Iterator[Document]:
    """All documents of all sources from `start` on, in order, those that cannot be read among them.

    Nothing is raised for what a file holds; a file that breaks off is one item with a problem, and the next one follows.
    """
    start = start or Position()
    for index in range(start.source, len(sources)):
        at = start if index == start.source else Position(index)
        line, consumed = at.line, 0
        try:
            for item in READERS[sources[index].format](sources[index], at):
                line, consumed = item.after.line, item.consumed
                yield item
        except reading_errors() as e:
            reason = unreadable(e, sources[index].compression)
            yield Document("", index, line, Position(index + 1), consumed, reason)


def read_documents(sources: Sequence[Source], start: Position | None = None) -> Iterator[Document]:
    """All documents, in order, without those that a condition leaves out.

    Raises:
        DataError: a file that cannot be read as what it is; names file and line.
    """
    for item in read_items(sources, start):
        if item.problem:
            raise DataError(f"{sources[item.source].place(item.line)}: {item.problem}")
        if not item.filtered:
            yield item


def _read_txt(source: Source, at: Position) -> Iterator[Document]:
    with open_stream(source.path, source.compression, at.offset) as stream:
        offset, line = at.offset, at.line
        mark = (source.separator or "").encode("utf-8")
        windows = mark.replace(b"\n", b"\r\n") if b"\r" not in mark else mark  # the same with Windows' line ends
        for raw, size, line_ends in _pieces(stream, mark, source.limit):
            text = raw.removeprefix(BOM) if offset == 0 else raw
            first = line
            offset, line = offset + size + len(mark), line + line_ends + mark.count(b"\n")
            problem, decoded = "", ""
            if size > source.limit:
                problem = too_long(size, source.limit)
            elif windows != mark and windows in text + mark:
                problem = (
                    f"has line ends of Windows, among which --document-separator {source.separator!r} means nothing; convert the "
                    f"file (dos2unix), or give {windows.decode()!r}"
                )
            else:
                try:
                    decoded = text.decode("utf-8")
                except UnicodeDecodeError as e:
                    first += text[: e.start].count(b"\n")
                    problem = not_utf8(text, e)
            after = Position(at.source, offset, line) if mark else Position(at.source + 1)
            yield Document(decoded, at.source, first, after, stream.consumed, problem)


def _pieces(stream: Stream, mark: bytes, limit: int) -> Iterator[tuple[bytes, int, int]]:
    """The file's documents as (bytes, size, line ends); of one beyond the limit only the last two are right.

    Args:
        mark: what stands between documents; empty: the file is one.
    """
    held: list[bytes] = []  # blocks of the document that is not finished yet
    size = ends = 0  # its bytes and line ends so far, without `tail`
    tail = b""  # its last bytes, in which a separator may have begun
    while block := stream.raw.read(BLOCK):
        first, *others = (tail + block).split(mark) if mark else (block,)
        held.append(first)
        size, ends = size + len(first), ends + first.count(b"\n")
        for other in others:
            yield b"".join(held), size, ends
            held, size, ends = [other], len(other), other.count(b"\n")
        last = held.pop()
        cut = max(0, len(last) - (len(mark) - 1)) if mark else len(last)
        held.append(last[:cut])
        tail = last[cut:]
        size, ends = size - len(tail), ends - tail.count(b"\n")
        if size > limit:
            held = []
    if size + len(tail) or not mark:
        # Nothing after the last separator is no document; an empty file without separators is an empty one.
        yield b"".join(held) + tail, size + len(tail), ends + tail.count(b"\n")


def _read_jsonl(source: Source, at: Position) -> Iterator[Document]:
    begin = max(at.offset, source.begin - 1) if source.begin else at.offset
    with open_stream(source.path, source.compression, begin) as stream:
        rows = lines(stream, begin, at.line, source.limit)
        if source.begin and at.offset < source.begin:
            # The line that reaches into this range belongs to the range before. Lines are counted from the first byte of
            # the range, so the next one is the first only where the range begins with it.
            skipped = next(rows, Line(b"", 0, begin, 0))
            begin = skipped.end
            rows = lines(stream, begin, at.line + (skipped.size > 1), source.limit)
        end = source.end
        if end is not None and begin >= end:
            return
        for line in rows:
            text, problem, kept = _json_text(source, line, at)
            if text is not None or problem:
                after = Position(at.source, line.end, line.number + 1)
                consumed = stream.consumed if source.compression else line.end - source.begin
                yield Document(text or "", at.source, line.number, after, consumed, problem, not kept)
            if end is not None and line.end >= end:
                return


def _json_text(source: Source, line: Line, at: Position) -> tuple[str | None, str, bool]:
    """(text or None, problem, kept); neither text nor problem for a blank line."""
    if line.size > source.limit:
        return None, too_long(line.size, source.limit), True
    raw = line.raw.removeprefix(BOM)  # of the file, or of one that was joined to it
    if not (source.where or source.fields):  # where only a text is taken: orjson rounds integers beyond 64 bits
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError:
            row = None  # json takes more (NaN, halves of surrogate pairs), and says what is wrong
        if isinstance(row, dict):
            return text_of(row, source)
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        return None, not_utf8(raw, e), True
    if not decoded.strip():
        return None, "", True
    whole = line.end == line.size and decoded.lstrip().startswith("[")  # the file's first line
    is_array = "not valid JSON lines: the file is one array; write its entries one a line, as `jq -c '.[]'` does"
    try:
        row = json.loads(decoded)
    except (json.JSONDecodeError, RecursionError) as e:
        if whole and decoded.lstrip()[1:].lstrip()[:1] in ("", "{"):
            return None, is_array, True
        reason = e.msg if isinstance(e, json.JSONDecodeError) else "nested too deeply"
        return None, f"not valid JSON: {reason}; jsonl holds one JSON object per line", True
    except ValueError as e:  # an integer of thousands of digits
        return None, f"not valid JSON: {e}", True
    if whole and row and all(isinstance(entry, dict) for entry in row):
        return None, is_array, True
    if not isinstance(row, dict):
        return None, f"{type(row).__name__} instead of a JSON object; jsonl holds one object per line", True
    return text_of(row, source)


READERS: dict[str, Callable[[Source, Position], Iterator[Document]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hub": read_hub,
}
