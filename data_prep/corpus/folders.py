"""Which files of a directory are corpus: not what tools and people leave beside it. What is passed over is told."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unfold.data_prep.corpus.streams import COMPRESSIONS, open_stream, reading_errors

# What describes a data set, not what is in it: dataset cards, licences, what `datasets` and tokenizers write beside data.
ABOUT = re.compile(
    r"((readme|licen[cs]e)([._-].*)?|copying|notice|authors|citation|changelog|contributing|code_of_conduct|requirements)"
    r"(\.(md|txt|text|rst|cff))?"
    r"|(dataset_infos?|dataset_dict|state|config|tokenizer|tokenizer_config|tokenizer_info|special_tokens_map"
    r"|generation_config|croissant|package)\.json",
    re.IGNORECASE,
)
SHOWN = 3  # names of each kind


@dataclass
class PassedOver:
    """Files of a directory that were not taken, by reason."""

    directory: Path
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        self.names.setdefault(reason, []).append(str(path.relative_to(self.directory)))

    def text(self) -> str:
        """One line that counts and names them; empty where nothing was passed over."""
        parts = []
        for reason, names in self.names.items():
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{len(names)} {reason} ({', '.join(sorted(names)[:SHOWN])}{more})")
        return f"{self.directory}: passed over {'; '.join(parts)}" if parts else ""


def corpus_files(directory: Path, kind_of, every_file: bool) -> tuple[list[str], PassedOver]:
    """Files below a directory that are corpus, in order, and those that are not.

    Args:
        kind_of: name -> (format or None, compression).
        every_file: take files of unknown kind, too.
    """
    found, passed = [], PassedOver(directory)
    for path in _files(directory):
        if any(part.startswith(".") for part in path.relative_to(directory).parts):
            passed.add("hidden", path)
        elif ABOUT.fullmatch(path.name):
            passed.add("about the data", path)
        elif not (every_file or kind_of(path.name)[0]):
            passed.add("of unknown kind", path)
        elif not every_file and path.suffix.lower() == ".json" and not _is_lines(path):
            passed.add("not one JSON object per line", path)
        else:
            found.append(str(path))
    return sorted(found), passed


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _is_lines(path: Path) -> bool:
    """Whether a .json file begins with a line that is an object, as jsonl does, and is no sidecar of a shard."""
    if path.with_suffix(".idx").exists() or path.name.endswith(".report.json"):
        return False
    try:
        with open_stream(str(path), COMPRESSIONS.get(path.suffix.lower(), "")) as stream:
            first = stream.raw.readline(1 << 20)
        return len(first) == 1 << 20 or isinstance(json.loads(first), dict)
    except (*reading_errors(), RecursionError):
        return False
