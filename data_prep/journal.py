"""How far a run has come, on disk, so that the next one goes on there.

One line of JSON per commit. The first line says what is made of which files; a run with other settings must not go on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unfold.data_prep.corpus.items import Position
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import Appended


@dataclass
class Counts:
    """What became of the documents that were read."""

    documents: int = 0  # read in all
    empty: int = 0  # whitespace alone
    filtered: int = 0  # left out by a condition
    short: int = 0  # fewer tokens than --min-tokens
    long: int = 0  # more tokens than --max-tokens
    truncated: int = 0  # supervised: contexts that were cut to --max-tokens
    rejected: int = 0  # could not be read, --on-error skip
    text_bytes: int = 0  # of the documents that were encoded

    def add(self, other: "Counts") -> None:
        """Add up."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Record:
    """The state after some batch."""

    position: Position
    counts: Counts
    outputs: tuple[tuple[int, int], ...]  # of each output: bytes of tokens, documents
    rejects: int  # bytes of the list of rejects


class Journal:
    """The journal of one output, `PREFIX.journal.partial`."""

    def __init__(self, prefix: str, settings: dict, files: Sequence[list]):
        """Open it, and find what may be kept.

        Args:
            settings: what decides the content of the output, as JSON values.
            files: of each source, what tells whether it is unchanged.
        """
        self._settings, self._files = settings, list(files)
        self._file = Appended(Path(f"{prefix}.journal"))
        self._kept: list[Record] = []
        self.differing = ""  # the setting in which unfinished work of another command differs
        header, *records = self._lines() or [{}]
        if header:
            changed = [k for k in settings if header.get("settings", {}).get(k) != settings[k]]
            self.differing = ", ".join(changed)
            if not changed:
                self._kept = [r for r in records if self._unchanged(r.position, header["files"])]

    @property
    def unfinished(self) -> bool:
        """Whether there is earlier work at all."""
        return self._file.size > 0

    def last(self, present: Sequence[tuple[int, int]], rejects: int) -> Record | None:
        """The newest state that the files still hold: `present` bytes and documents of each output."""
        for record in reversed(self._kept):
            sizes = zip(record.outputs, present, strict=True)
            if record.rejects <= rejects and all(b <= have_b and d <= have_d for (b, d), (have_b, have_d) in sizes):
                return record
        return None

    def restart(self, record: Record | None) -> None:
        """Begin the journal anew from a record."""
        self._file.cut(0)
        self._write({"settings": self._settings, "files": self._files})
        if record:
            self.write(record)

    def write(self, record: Record) -> None:
        """Note a state whose files are on disk."""
        self._write(asdict(record))
        self._file.sync()

    def close(self) -> None:
        """Close; the journal stays."""
        self._file.close()

    def remove(self) -> None:
        """Throw it away: the output is finished, or nothing is worth keeping."""
        self._file.remove()

    def _write(self, values: dict) -> None:
        self._file.append((json.dumps(values) + "\n").encode("utf-8"))

    def _lines(self) -> list:
        """The header and the records; a last line that was cut off, or is not ours, ends them."""
        found: list = []
        for raw in self._file.path.read_bytes().split(b"\n")[:-1]:
            try:
                values = json.loads(raw)
                found.append(_record(values) if found else {"settings": values["settings"], "files": values["files"]})
            except (ValueError, KeyError, TypeError):
                break
        return found

    def _unchanged(self, position: Position, files: list) -> bool:
        """Whether everything that was read up to there is as it was."""
        read = position.source + (position.offset > 0)
        return files[:read] == self._files[:read] and read <= len(self._files)


def _record(values: dict) -> Record:
    return Record(
        position=Position(*values["position"]),
        counts=Counts(**values["counts"]),
        outputs=tuple((size, documents) for size, documents in values["outputs"]),
        rejects=values["rejects"],
    )


def refuse_other_work(journal: Journal, prefix: str) -> None:
    """Raise DataError where unfinished work of another command stands in the way."""
    if journal.differing:
        raise DataError(
            f"{prefix}: holds an unfinished run with another {journal.differing}; finish it with the same command, "
            "give --overwrite to throw it away, or choose another --output"
        )
