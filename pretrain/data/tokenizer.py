"""The tokenizer directory that data preparation wrote, as training and generation need it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from unfold.data_prep.format.tokenizer import INFO_FILE, JSON_FILE, WORD_STARTS_FILE, TokenizerInfo
from unfold.pretrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunTokenizer(TokenizerInfo):
    """A tokenizer directory.

    Attributes:
        directory: where it lies.
        word_starts: [vocab_size] bool, whether a piece starts a word.
    """

    directory: Path
    word_starts: np.ndarray

    def tokenizer(self) -> Tokenizer:
        """The encoder and decoder."""
        return Tokenizer.from_file(str(self.directory / JSON_FILE))


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
    except (ValueError, OSError) as error:
        raise UserError(f"{setting}: {directory} is damaged ({error}); make the tokenizer again") from None
    if starts.shape != (info.vocab_size,):
        raise UserError(f"{setting}: {directory}/{WORD_STARTS_FILE} has shape {starts.shape}, expected ({info.vocab_size},)")
    if len(info.gist_ids) < gist_levels:
        raise UserError(
            f"gist.chunk_sizes: {gist_levels} levels, but the tokenizer {directory} has {len(info.gist_ids)} gist ids; "
            f"make it with --gist-levels {gist_levels}"
        )
    return RunTokenizer(**vars(info), directory=directory, word_starts=starts)
