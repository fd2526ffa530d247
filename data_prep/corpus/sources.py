"""What `--input` names: files of many kinds, directories, globs, Hugging Face datasets; and how they are split in parts."""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unfold.data_prep.corpus.conditions import Condition
from unfold.data_prep.corpus.fields import SupervisedFields
from unfold.data_prep.corpus.folders import corpus_files
from unfold.data_prep.corpus.streams import COMPRESSIONS, count_lines
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.text import no_file, read_text

SUFFIXES = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as C4 and Dolma name theirs
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("txt", "jsonl", "csv", "parquet", "arrow")
HUB = "hf:"
LIST = "@"
MAX_DOCUMENT_BYTES = 32 << 20


@dataclass(frozen=True)
class Source:
    """One corpus file (or dataset) and how it is read."""

    path: str
    format: str  # one of FORMATS, or "hub"
    text_key: str = "text"
    fields: SupervisedFields | None = None  # supervised: a document is these fields of a row, as JSON text
    chats: bool = False  # a row's text may be a list of messages, too
    separator: str | None = None  # txt: what stands between documents; None: the file is one
    compression: str = ""  # "gz" | "zst" | "xz"
    where: tuple[Condition, ...] = ()
    limit: int = MAX_DOCUMENT_BYTES  # bytes of a line or document; beyond it is an error
    begin: int = 0  # jsonl, plain: only lines that begin at bytes begin <= b < end
    end: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of a row that its text is made of; of supervised ones a row need not have all."""
        return self.fields.columns if self.fields else (self.text_key,)

    def place(self, number: int) -> str:
        """Where document or line `number` stands, for messages; counts the lines before `begin` only now."""
        if self.format in ("parquet", "arrow", "hub"):
            return f"{self.path}, row {number}"
        return f"{self.path}:{number + (count_lines(self.path, self.begin) if self.begin else 0)}"

    @property
    def size(self) -> int:
        """Bytes of the file that are to be read; 0 where nobody knows."""
        if self.format == "hub":
            return 0
        return (os.path.getsize(self.path) if self.end is None else self.end) - self.begin

    def fingerprint(self) -> list:
        """What tells whether the file is still the one that was read."""
        if self.format == "hub":
            return [self.path, 0, 0, 0]
        found = os.stat(self.path)
        return [self.path, found.st_size, found.st_mtime_ns, self.begin]


def find_sources(
    inputs: Sequence[str],
    *,
    text_key: str = "text",
    fields: SupervisedFields | None = None,
    chats: bool = False,
    separator: str | None = None,
    format: str | None = None,
    where: Sequence[Condition] = (),
    limit: int = MAX_DOCUMENT_BYTES,
    say: Callable[[str], None] = lambda text: None,
) -> list[Source]:
    """Files named by paths, directories (searched through, known suffixes), globs, `hf:` names and `@` lists; each file once.

    Args:
        chats: whether the texts may be lists of messages.
        say: told what was passed over in directories.

    Raises:
        DataError: something names no file, or a file of unknown kind.
    """
    paths: dict[str, None] = {}
    for name in _listed(inputs):
        named = Path(name).is_file() or (name.startswith(HUB) and not Path(name).exists())
        found = [name] if named else _search(name, format is not None, say)
        paths.update(dict.fromkeys(found))
    common = dict(text_key=text_key, fields=fields, chats=chats, separator=separator, where=tuple(where), limit=limit)
    sources = []
    for path in paths:
        hub = path.startswith(HUB) and not Path(path).exists()
        kind, compression = ("hub", "") if hub else kind_of(path, format)
        if kind is None:
            raise DataError(
                f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)} (each also with "
                f"{', '.join(COMPRESSIONS)}), or say --format {'|'.join(FORMATS)}"
            )
        if fields and kind == "txt":
            raise DataError(f"{path}: a text file has no fields; supervised data is jsonl, csv, parquet, arrow or a dataset")
        sources.append(Source(path, kind, compression=compression, **common))
    if separator is not None and not any(s.format == "txt" for s in sources):
        raise DataError(f"--document-separator {separator!r}: none of the inputs is a text file")
    if where and all(s.format == "txt" for s in sources):
        raise DataError(f"--where {where[0]}: text files have no fields; it works on jsonl, csv, parquet and datasets")
    return sources


def _listed(inputs: Sequence[str]) -> Iterator[str]:
    """The inputs, with each `@LIST` replaced by what it names: one input a line; empty lines and those with # do not count.

    Raises:
        DataError: a list cannot be read or names nothing, or a line of it names no file.
    """
    for name in inputs:
        if not name.startswith(LIST) or Path(name).exists():
            yield name
            continue
        path = Path(name[len(LIST) :])
        try:
            lines = [line.strip() for line in read_text(path).splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: list of inputs cannot be read ({getattr(e, 'strerror', None) or e})") from None
        named = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not named:
            raise DataError(f"{path}: list of inputs names nothing; write one path a line")
        for number, line in named:
            if not (line.startswith(HUB) or Path(line).exists() or glob.has_magic(line)):
                raise DataError(f"{path}:{number}: {line}: no such file")
            yield line


def kind_of(path: str, format: str | None = None) -> tuple[str | None, str]:
    """Format (None if unknown) and compression that a file's name tells."""
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix.lower(), "")
    inner = os.path.splitext(stem)[1] if compression else suffix
    return format or SUFFIXES.get(inner.lower()), compression


def _search(name: str, every_file: bool, say: Callable[[str], None]) -> list[str]:
    path = Path(name)
    if path.is_dir():
        if saved := _saved_dataset(path):
            return saved
        found, passed = corpus_files(path, kind_of, every_file)
        if not found:
            others = f"; {passed.text()}" if passed.text() else ""
            raise DataError(f"{name}: no file in this directory has a known suffix ({', '.join(SUFFIXES)}){others}")
        if passed.text():
            say(passed.text())
        return found
    found = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(f"{name}: {no_file(name)}" + (" (the pattern matches nothing)" if glob.has_magic(name) else ""))
    return found


def _saved_dataset(path: Path) -> list[str]:
    """Files of a directory that `datasets.save_to_disk` wrote, in its order; none if it is no such directory."""
    if (path / "dataset_dict.json").is_file():
        raise DataError(f"{path}: a saved DatasetDict; name one of its splits, such as {path / 'train'}")
    state = path / "state.json"
    if not (state.is_file() and (path / "dataset_info.json").is_file()):
        return []
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        files = [str(path / entry["filename"]) for entry in values["_data_files"]]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{state}: not readable as the state of a saved dataset ({e!r})") from None
    if values.get("_indices_files"):
        raise DataError(f"{path}: a saved dataset with an indices mapping; save it after flatten_indices()")
    return files


def split_sources(sources: Sequence[Source], part: int, parts: int) -> list[Source]:
    """What part `part` of `parts` (counted from 1) reads: a run of bytes of the whole list, cut inside plain jsonl files.

    The parts in order are the whole corpus in order; a file that cannot be cut belongs to the part in which it begins. Nothing
    may fall to a part.
    """
    sizes = [max(s.size, 1) for s in sources]
    total = sum(sizes)
    low, high = total * (part - 1) // parts, total * part // parts
    mine, start = [], 0
    for source, size in zip(sources, sizes, strict=True):
        stop = start + size
        if source.format == "jsonl" and not source.compression:
            if low < stop and start < high:
                cut = replace(source, begin=max(low - start, 0), end=min(high, stop) - start)
                mine.append(source if cut.begin == 0 and cut.end == size else cut)
        elif low <= start < high:
            mine.append(source)
        start = stop
    return mine
