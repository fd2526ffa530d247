"""The tokenizer directory that data preparation wrote, as training and generation need it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from unfold.data_prep.format.text import read_text
from unfold.data_prep.format.tokenizer import GENERATION_FILE, INFO_FILE, JSON_FILE, WORD_STARTS_FILE, ControlToken, TokenizerInfo
from unfold.pretrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunTokenizer(TokenizerInfo):
    """A tokenizer directory.

    Attributes:
        directory: where it lies.
        word_starts: [vocab_size] bool, whether a piece starts a word.
        stop_ids: every id that ends a generated text.
    """

    directory: Path
    word_starts: np.ndarray
    stop_ids: tuple[int, ...] = ()

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text and are never generated, those of gists first."""
        return (*self.gist_ids, *self.link_ids)

    def tokenizer(self) -> Tokenizer:
        """The encoder and decoder. As in shards, a control token that a text spells stays text."""
        tokenizer = Tokenizer.from_file(str(self.directory / JSON_FILE))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def control(self) -> dict[str, ControlToken]:
        """Tokens that stand for no text, by name: what is special in tokenizer.json, and the ends of documents and padding."""
        tokenizer, roles = self.tokenizer(), (self.bos_id, self.eos_id, self.pad_id)
        added = tokenizer.get_added_tokens_decoder()
        control = {t.content: ControlToken(i, t.lstrip, t.rstrip) for i, t in added.items() if t.special or i in roles}
        return control | {tokenizer.id_to_token(i): ControlToken(i) for i in roles if i is not None and i not in added}


def load_tokenizer(directory: str | Path, gist_levels: int, setting: str = "data.tokenizer") -> RunTokenizer:
    """Read a tokenizer directory.

    Raises:
        UserError: it is missing or damaged, or has fewer gist ids than the model has levels.
    """
    directory = Path(directory)
    for name in (INFO_FILE, WORD_STARTS_FILE):
        if not (directory / name).is_file():
            raise UserError(
                f"{setting}: {directory / name} does not exist; give a directory made by `python -m data_prep train-tokenizer` "
                "or `import-tokenizer`"
            )
    try:
        info = TokenizerInfo.from_file(directory / INFO_FILE)
        starts = np.load(directory / WORD_STARTS_FILE, allow_pickle=False)
        stop_ids = _stop_ids(directory, info.eos_id)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{setting}: {directory} is damaged ({error}); make the tokenizer again") from None
    if starts.shape != (info.vocab_size,):
        raise UserError(f"{setting}: {directory}/{WORD_STARTS_FILE} has shape {starts.shape}, expected ({info.vocab_size},)")
    if len(info.gist_ids) < gist_levels:
        raise UserError(
            f"gist.chunk_sizes: {gist_levels} levels, but the tokenizer {directory} has {len(info.gist_ids)} gist ids; "
            f"make it with --gist-levels {gist_levels}"
        )
    return RunTokenizer(**vars(info), directory=directory, word_starts=starts, stop_ids=stop_ids)


def generation_settings(directory: Path) -> dict:
    """What an imported model's ``generation_config.json`` said, kept beside its tokenizer; empty where there was none."""
    path = directory / GENERATION_FILE
    settings = json.loads(read_text(path)) if path.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{GENERATION_FILE} holds {type(settings).__name__}, expected an object")
    return settings


def ids_of(value: int | list[int] | None) -> list[int]:
    """Token ids as Hugging Face's files write them: one, several or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _stop_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """The end-of-document id first, then what else ends a text of an imported model."""
    return tuple(dict.fromkeys([*ids_of(eos_id), *ids_of(generation_settings(directory).get("eos_token_id"))]))
