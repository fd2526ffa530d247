"""The tokenizer directory that data preparation wrote, as training and generation need it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from unfold.data_prep.format.text import read_text
from unfold.data_prep.format.tokenizer import GENERATION_FILE as GENERATION
from unfold.pretrain.errors import UserError


@dataclass(frozen=True)
class TokenizerInfo:
    """What a tokenizer directory says of its vocabulary.

    Attributes:
        directory: where it lies.
        vocab_size: number of ids, gists included.
        gist_ids: id of each gist level.
        bos_id, eos_id, pad_id: None where the tokenizer has none.
        hash: identifies the tokenizer; shards and checkpoints carry it.
        word_starts: [vocab_size] bool, whether a piece starts a word.
        link_ids: ids of link tokens, none for most.
        stop_ids: every id that ends a generated text.
    """

    directory: Path
    vocab_size: int
    gist_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    hash: str
    word_starts: np.ndarray
    link_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text and are never generated, those of gists first."""
        return (*self.gist_ids, *self.link_ids)

    def tokenizer(self) -> Tokenizer:
        """The encoder and decoder."""
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))


def load_tokenizer(directory: str | Path, gist_levels: int, setting: str = "data.tokenizer") -> TokenizerInfo:
    """Read a tokenizer directory.

    Raises:
        UserError: it is missing or damaged, or has fewer gist ids than the model has levels.
    """
    directory = Path(directory)
    try:
        info = json.loads((directory / "tokenizer_info.json").read_text())
        starts = np.load(directory / "word_starts.npy", allow_pickle=False)
        result = TokenizerInfo(
            directory,
            int(info["vocab_size"]),
            tuple(info["gist_ids"]),
            info["bos_id"],
            info["eos_id"],
            info["pad_id"],
            info["hash"],
            starts,
            tuple(info.get("link_ids", ())),
            _stop_ids(directory, info["eos_id"]),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{setting}: {error.filename} does not exist; give a directory made by `python -m data_prep train-tokenizer` "
            "or `import-tokenizer`"
        ) from None
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise UserError(f"{setting}: {directory} is damaged ({error}); make the tokenizer again") from None
    if starts.shape != (result.vocab_size,):
        raise UserError(f"{setting}: {directory}/word_starts.npy has shape {starts.shape}, expected ({result.vocab_size},)")
    if len(result.gist_ids) < gist_levels:
        raise UserError(
            f"gist.chunk_sizes: {gist_levels} levels, but the tokenizer {directory} has {len(result.gist_ids)} gist ids; "
            f"make it with --gist-levels {gist_levels}"
        )
    return result


def generation_settings(directory: Path) -> dict:
    """What an imported model's ``generation_config.json`` said, kept beside its tokenizer; empty where there was none."""
    path = directory / GENERATION
    settings = json.loads(read_text(path)) if path.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{GENERATION} holds {type(settings).__name__}, expected an object")
    return settings


def ids_of(value: int | list[int] | None) -> list[int]:
    """Token ids as Hugging Face's files write them: one, several or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _stop_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """The end-of-document id first, then what else ends a text of an imported model."""
    return tuple(dict.fromkeys([*ids_of(eos_id), *ids_of(generation_settings(directory).get("eos_token_id"))]))
