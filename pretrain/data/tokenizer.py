"""The tokenizer directory that data preparation wrote, as training and generation need it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

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
    """

    directory: Path
    vocab_size: int
    gist_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    hash: str
    word_starts: np.ndarray

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
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{setting}: {error.filename} does not exist; give a directory made by `python -m data_prep train-tokenizer` "
            "or `import-tokenizer`"
        ) from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{setting}: {directory} is damaged ({error}); make the tokenizer again") from None
    if starts.shape != (result.vocab_size,):
        raise UserError(f"{setting}: {directory}/word_starts.npy has shape {starts.shape}, expected ({result.vocab_size},)")
    if len(result.gist_ids) < gist_levels:
        raise UserError(
            f"gist.chunk_sizes: {gist_levels} levels, but the tokenizer {directory} has {len(result.gist_ids)} gist ids; "
            f"make it with --gist-levels {gist_levels}"
        )
    return result
