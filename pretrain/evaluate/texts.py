"""Documents to evaluate on, as raw tokens: of shards, text files and jsonl files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unfold.data_prep.format import text as text_files
from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.subject import Subject


def read_text(path: Path, flag: str) -> str:
    """A file's text. Raises UserError naming flag and file."""
    try:
        return text_files.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read as text ({error})") from None


def read_rows(path: Path, flag: str) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line of a jsonl file that is not blank; the place is 'FILE:LINE', for messages.

    Raises:
        UserError: the file cannot be read, or a line holds no JSON object.
    """
    for number, line in enumerate(read_text(path, flag).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: is not JSON ({error}); expected one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: holds {type(row).__name__}, expected an object")
        if problem := text_files.encodable(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{place}: {problem}")
        yield place, row


def text_of(place: str, row: dict, name: str, default: str | None = None) -> str:
    """A field that is a text. Raises UserError naming the place."""
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected a text")
    return value


def texts_of(place: str, row: dict, name: str) -> tuple[str, ...]:
    """A field that is a text or a list of at least one. Raises UserError naming the place."""
    value = row.get(name)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected a list of texts")
    return tuple(value)


def documents(entries: list[str], field: str, subject: Subject) -> Iterator[np.ndarray]:
    """Every document of files and shards, in order: int64 [raw tokens].

    Args:
        entries: a ``.jsonl`` file has a document per line, any other file that exists is one document, and what is no file is
            the prefix (or a glob of prefixes) of shards.
        field: of a line's object, its text.

    Raises:
        UserError: an entry cannot be read, or its shards are of another tokenizer.
    """
    for entry in entries:
        path = Path(entry)
        if path.is_dir() and not path.with_name(f"{path.name}.bin").exists():
            raise UserError(f"--data {entry}: is a directory; name files in it, or the prefix of shards")
        if not path.exists() or path.is_dir() or path.suffix in (".bin", ".idx"):
            yield from _shard_documents(entry, subject)
        elif path.suffix == ".jsonl":
            for place, row in read_rows(path, "--data"):
                if not isinstance(row.get(field), str):
                    raise UserError(f"{place}: has no text in {field!r}; name the field with --text-field")
                yield np.array(subject.encode(row[field]), np.int64)
        else:
            yield np.array(subject.encode(read_text(path, "--data")), np.int64)


def _shard_documents(entry: str, subject: Subject) -> Iterator[np.ndarray]:
    from unfold.pretrain.data.shards import open_shards

    for shard in open_shards([entry], subject.tokenizer, "--data"):
        for document, length in enumerate(shard.lengths.tolist()):
            out = np.empty(length, np.int64)
            shard.read(document, 0, out)
            yield out
