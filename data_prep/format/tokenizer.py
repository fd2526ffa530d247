"""Tokenizers: what a tokenizer directory says of itself, and one small interface over the two kinds.

A tokenizer directory holds `tokenizer.json` (always), `tokenizer.model` (sentencepiece), `word_starts.npy`,
`tokenizer_config.json` (for transformers) and `tokenizer_info.json`, the fields of `TokenizerInfo`.

The hash that ties shards to a tokenizer is the sha256 of `tokenizer.model` for sentencepiece, else of `tokenizer.json`.
Gists appended to a sentencepiece model are written into the model itself, as control pieces at its end; so the hash
always covers the gists, and a model that is imported without new gists keeps its bytes and its hash.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.text import read_text

INFO_FILE = "tokenizer_info.json"
JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
WORD_STARTS_FILE = "word_starts.npy"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"  # of an imported model: how its texts end and are sampled
MORE_TEMPLATES = "additional_chat_templates"  # a folder of more
INFO_FORMAT = 1


@dataclass(frozen=True)
class TokenizerInfo:
    """What a shard's reader and a model need to know of a tokenizer. Every id is below `vocab_size`, gists included."""

    kind: str  # "sentencepiece" | "huggingface"
    vocab_size: int
    gist_ids: tuple[int, ...]  # one id per level, level 0 first
    gist_tokens: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    hash: str
    link_ids: tuple[int, ...] = ()  # directories that were made before there were any do not say

    def to_json(self) -> str:
        """Return the text of tokenizer_info.json."""
        return json.dumps({"format": INFO_FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "TokenizerInfo":
        """Read a tokenizer_info.json.

        Raises:
            DataError: it cannot be read, or is of another format.
        """
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != INFO_FORMAT:
            raise DataError(f"{path}: not a tokenizer_info.json of format {INFO_FORMAT}")
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise DataError(f"{path}: misses {', '.join(missing)}; make the directory again")
        picked = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in picked.items()})


class ControlToken(NamedTuple):
    """A token that stands for no text."""

    id: int
    lstrip: bool = False  # takes white space before it along, where a template writes it
    rstrip: bool = False


class Tokenizer(Protocol):
    """Text to ids and back. Control ids (bos, eos, pad, gists, ..) never come out of a text, whatever it says."""

    info: TokenizerInfo
    control: Mapping[str, ControlToken]  # by name

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n_i], with nothing added before or after."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same as one array: ids, int32 [sum of lengths], and lengths, int64 [texts]."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids stand for nothing."""

    def word_starts(self) -> np.ndarray:
        """The word-start bitmap, bool [vocab_size]."""


def sha256(data: bytes) -> str:
    """Hash as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def read_json(path: Path) -> object:
    """Parse a JSON file.

    Raises:
        DataError: missing, not UTF-8, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValueError as e:
        raise DataError(f"{path}: not valid JSON: {e}") from None


# The names of each level's gist: ours, and those of the models that the method's authors published.
GIST_NAMES = (("<gist0>", "<gist>"), ("<gist1>", "<Gist>"), ("<gist2>", "<MGist>"))
LINK_NAME = re.compile(r"<link[1-9]\d*>")


def find_gists(ids: Mapping[str, int]) -> list[str]:
    """Gist tokens among a tokenizer's control tokens, level 0 first, up to the first level that has none.

    Recognised are `<gistN>` for level N and the names of published gist models: `<gist>`, `<Gist>` and `<MGist>` for the
    levels 0, 1 and 2.
    """
    found: list[str] = []
    while name := next((n for n in gist_names(len(found)) if n in ids), None):
        found.append(name)
    return found


def gist_names(level: int) -> tuple[str, ...]:
    """What a level's gist may be called."""
    return GIST_NAMES[level] if level < len(GIST_NAMES) else (f"<gist{level}>",)


def find_links(ids: Mapping[str, int]) -> list[str]:
    """Link tokens (`<link1>`, `<link2>`, ..) among a tokenizer's control tokens, in the order of their numbers."""
    return sorted((n for n in ids if LINK_NAME.fullmatch(n)), key=lambda n: int(n[5:-1]))


def missing_tokens(ids: Mapping[str, int], gist_levels: int, links: int) -> list[str]:
    """The gists and links that a tokenizer's control tokens lack, in the order in which they are appended."""
    gists = [f"<gist{level}>" for level in range(len(find_gists(ids)), gist_levels)]
    return gists + [name for name in (f"<link{number}>" for number in range(1, links + 1)) if name not in ids]


def check_gists(ids: Mapping[str, int], name: str) -> None:
    """Raise DataError where a vocabulary's gists cannot be told apart, or one would be passed over without a word."""
    found = find_gists(ids)
    levels = [[n for n in gist_names(level) if n in ids] for level in range(max(len(found) + 1, len(GIST_NAMES)))]
    for level, names in enumerate(levels):
        if len(names) > 1:
            raise DataError(f"{name}: {' and '.join(names)} are both names of the gist of level {level}; remove one of them")
        if names and level > len(found):
            raise DataError(
                f"{name}: has {names[0]}, the gist of level {level}, but none of level {len(found)} "
                f"({' or '.join(gist_names(len(found)))}); add that one, or rename {names[0]}"
            )


def locate(path: Path) -> tuple[str, Path]:
    """Tell what `--tokenizer` or `--input` names: ("directory" | "sentencepiece" | "huggingface", the path to load).

    A file inside a tokenizer directory stands for its directory; a foreign directory for its tokenizer.json, else
    its tokenizer.model.

    Raises:
        DataError: there is no tokenizer there.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file or directory; --tokenizer takes a tokenizer directory, "
            "a sentencepiece .model or a tokenizer.json"
        )
    directory = path if path.is_dir() else path.parent
    if (directory / INFO_FILE).exists() and (path.is_dir() or path.name in (JSON_FILE, MODEL_FILE)):
        return "directory", directory
    if path.is_dir():
        for name in (JSON_FILE, MODEL_FILE):
            if (path / name).exists():
                return locate(path / name)
        raise DataError(f"{path}: holds neither {JSON_FILE} nor {MODEL_FILE}")
    return ("huggingface" if path.suffix == ".json" else "sentencepiece"), path
