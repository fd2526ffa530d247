"""Which rows of an imported vocabulary are which: the tokenizer of the source, ours with gists and links, what both agree on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

import unfold
from unfold.pretrain.data.tokenizer import RunTokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.hf.import_weights import EMBEDDING, HEAD, NewRows, WeightFiles


def adopt_tokenizer(source: Path, output: Path, gist_levels: int, links: int) -> None:
    """Make a tokenizer directory as ``python -m data_prep import-tokenizer`` does (data preparation is a program of its own).

    Raises:
        UserError: with the line that it ends with.
    """
    command = [sys.executable, "-m", "unfold.data_prep", "import-tokenizer", "--gist-levels", gist_levels, "--links", links]
    command += ["--input", source.resolve(), "--output", output.resolve()]
    root = Path(unfold.__file__).parent.parent  # from where `-m unfold` is found, installed or not
    done = subprocess.run([*map(str, command)], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise UserError(f"tokenizer of {source}: {lines[-1].removeprefix('data_prep: error: ')}; or give --tokenizer DIR")


def source_vocabulary(directory: Path) -> dict[str, int] | None:
    """Token -> id of a Hugging Face directory's tokenizer; None when it has none."""
    path = directory / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: is not a tokenizer ({error})") from None
    path = directory / "tokenizer.model"
    if path.exists():
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: is not a sentencepiece model") from None
        return {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    return None


def match_vocabulary(weights: WeightFiles, tokenizer: RunTokenizer, gist_rows: Path | None) -> tuple[NewRows, list[str]]:
    """What every row of the new vocabulary is.

    Args:
        weights: of the Hugging Face directory, which may hold a tokenizer too.
        tokenizer: ours, with gists and links.
        gist_rows: safetensors file with rows of the new gists, then of the new links; None takes the mean.

    Returns:
        The rows, and notes for the user.

    Raises:
        UserError: the tokenizers or the number of rows do not fit together.
    """
    source, rows = weights.directory, weights.shapes[EMBEDDING][0]
    theirs = source_vocabulary(source)
    if theirs is None:
        known = min(rows, tokenizer.vocab_size)
    else:
        known = max(theirs.values()) + 1
        if known > rows:
            raise UserError(f"{source}/config.json: vocab_size is {rows}, but the tokenizer beside it has {known} ids")
        _check_belongs(theirs, tokenizer, source)
    new = [i for i in tokenizer.reserved_ids if i >= known]
    if tokenizer.vocab_size - known != len(new):
        raise UserError(
            f"tokenizer {tokenizer.directory}: has {tokenizer.vocab_size} ids, {len(new)} of them new gists and links, but "
            f"{source} has {known}; it belongs to another model"
        )
    notes = []
    for kind, ids in (("gist", tokenizer.gist_ids), ("link", tokenizer.link_ids)):
        if old := [i for i in ids if i < known]:
            notes.append(f"{kind} ids {', '.join(map(str, old))} are in the vocabulary already; their rows are used")
        if added := [i for i in ids if i >= known]:
            how = f"rows of {gist_rows}" if gist_rows else "the mean of the rows before them"
            notes.append(f"{kind} ids {', '.join(map(str, added))} are new: {how}")
    if rows > tokenizer.vocab_size:
        notes.append(f"rows from {tokenizer.vocab_size} to {rows - 1} of the embedding have no token and are left out")
    given = _read_rows(gist_rows, len(new), weights) if gist_rows else {}
    return NewRows(known, tokenizer.vocab_size, given), notes


def _check_belongs(theirs: dict[str, int], tokenizer: RunTokenizer, source: Path) -> None:
    ours = tokenizer.tokenizer().get_vocab(with_added_tokens=True)
    wrong = next((token for token, i in theirs.items() if ours.get(token) != i), None)
    if wrong is not None:
        has = f"gives it {ours[wrong]}" if wrong in ours else "does not have it"
        raise UserError(
            f"tokenizer {tokenizer.directory}: does not belong to {source}: {wrong!r} has id {theirs[wrong]} there, it {has}; "
            f"make it with `python -m data_prep import-tokenizer --input {source}`"
        )


def _read_rows(path: Path, count: int, weights: WeightFiles) -> dict[str, Tensor]:
    names = {ours: theirs for ours, theirs in (("embedding", EMBEDDING), ("head", HEAD)) if theirs in weights.shapes}
    expected = [count, weights.shapes[EMBEDDING][1]]
    try:
        given = load_file(path)
    except Exception as error:  # SafetensorError, OSError and others
        raise UserError(f"--gist-rows {path}: cannot be read as safetensors ({error})") from None
    if sorted(given) != sorted(names):
        raise UserError(f"--gist-rows {path}: holds {', '.join(sorted(given)) or 'nothing'}, expected {', '.join(names)}")
    for name, rows in given.items():
        if list(rows.shape) != expected:
            shape = f"{name} is {list(rows.shape)}, expected {expected}"
            raise UserError(f"--gist-rows {path}: {shape}, one row per new gist and link")
    return {names[name]: rows for name, rows in given.items()}
