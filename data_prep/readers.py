"""Corpus files as a stream of documents: txt, jsonl and parquet. Nothing is held beyond one document (or row group)."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import DataError

SUFFIXES = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One corpus file and how it is read."""

    path: str
    format: str  # "txt" | "jsonl" | "parquet"
    text_key: str = "text"
    separator: str | None = None  # txt: what stands between documents; None: the file is one


@dataclass(frozen=True)
class Document:
    """One text, exactly as the file has it, and where it came from."""

    text: str
    place: str  # "FILE:LINE" or "FILE, row N"
    consumed: int  # bytes of the file that it stands for, for progress


def find_sources(
    inputs: list[str], *, text_key: str = "text", separator: str | None = None, format: str | None = None
) -> list[Source]:
    """Files named by paths, directories (searched through, known suffixes) and globs: in this order, each file once.

    Raises:
        DataError: something names no file, or a file of unknown kind.
    """
    paths: dict[str, None] = {}
    for name in inputs:
        found = [name] if Path(name).is_file() else _search(name, every_file=format is not None)
        paths.update(dict.fromkeys(found))
    sources = []
    for path in paths:
        kind = format or SUFFIXES.get(Path(path).suffix.lower())
        if kind is None:
            raise DataError(
                f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}, or say --format txt|jsonl|parquet"
            )
        sources.append(Source(path, kind, text_key, separator))
    if separator is not None and not any(s.format == "txt" for s in sources):
        raise DataError(f"--document-separator {separator!r}: none of the inputs is a text file")
    return sources


def _search(name: str, every_file: bool) -> list[str]:
    path = Path(name)
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        found = sorted(str(p) for p in files if every_file or p.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"{name}: no file in this directory has a known suffix ({', '.join(SUFFIXES)})")
        return found
    found = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(f"{name}: no such file" + (" (the pattern matches nothing)" if glob.has_magic(name) else ""))
    return found


def read_documents(sources: list[Source]) -> Iterator[Document]:
    """All documents of all sources, in order.

    Raises:
        DataError: a file that cannot be read as what it is; names file and line.
    """
    for source in sources:
        if source.format == "jsonl":
            yield from _read_jsonl(source)
        elif source.format == "parquet":
            yield from _read_parquet(source)
        else:
            yield from _read_txt(source)


def _read_txt(source: Source) -> Iterator[Document]:
    line = 1
    for i, raw in enumerate(_split_file(source)):
        text = raw.removeprefix(BOM) if i == 0 else raw
        yield Document(_decode(text, source.path, line), f"{source.path}:{line}", len(raw))
        line += raw.count(b"\n") + (source.separator or "").count("\n")


def _split_file(source: Source) -> Iterator[bytes]:
    """The file's documents as bytes; a separator is searched in blocks, so the file need not fit into memory."""
    with open(source.path, "rb") as stream:
        if source.separator is None:
            yield stream.read()
            return
        mark = source.separator.encode("utf-8")
        held: list[bytes] = []  # blocks of the document that is not finished yet
        tail = b""  # its last bytes, in which a separator may have begun
        while block := stream.read(BLOCK):
            first, *others = (tail + block).split(mark)
            held.append(first)
            for other in others:
                yield b"".join(held)
                held = [other]
            last = held.pop()
            cut = max(0, len(last) - (len(mark) - 1))
            held.append(last[:cut])
            tail = last[cut:]
        if last := b"".join(held) + tail:
            yield last  # nothing after the last separator is no document


def _decode(raw: bytes, path: str, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = first_line + raw[: e.start].count(b"\n")
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[e.start]:02x}: {e.reason}); convert the file to UTF-8"
        ) from None


def _read_jsonl(source: Source) -> Iterator[Document]:
    with open(source.path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = _decode(raw.removeprefix(BOM) if number == 1 else raw, source.path, number)
            if not line.strip():
                continue
            place = f"{source.path}:{number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as e:
                reason = e.msg if isinstance(e, json.JSONDecodeError) else "nested too deeply"
                raise DataError(f"{place}: not valid JSON: {reason}; jsonl holds one JSON object per line") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{place}: {type(row).__name__} instead of a JSON object; jsonl holds one object per line"
                )
            yield Document(_text_of(row, source.text_key, place), place, len(raw))


def _read_parquet(source: Source) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source.path)
    except pyarrow.ArrowException as e:
        raise DataError(f"{source.path}: not a parquet file: {str(e).splitlines()[0]}") from None
    with file:
        columns = file.schema_arrow.names
        if source.text_key not in columns:
            raise DataError(f"{source.path}: no column {source.text_key!r}; name one of {columns} by --text-key")
        share = Path(source.path).stat().st_size / max(1, file.metadata.num_rows)
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[source.text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    place = f"{source.path}, row {row}"
                    yield Document(_text_of({source.text_key: value}, source.text_key, place), place, round(share))
        except (pyarrow.ArrowException, OSError) as e:
            raise DataError(f"{source.path}, after row {row}: unreadable: {str(e).splitlines()[0]}") from None


def _text_of(row: dict, key: str, place: str) -> str:
    if key not in row:
        raise DataError(f"{place}: no key {key!r}; name one of {sorted(row)} by --text-key")
    if not isinstance(row[key], str):
        kind = "null" if row[key] is None else type(row[key]).__name__
        raise DataError(f"{place}: {key!r} is {kind}, not text; correct the file, or name another key by --text-key")
    return row[key]
