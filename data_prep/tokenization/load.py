"""Loading a tokenizer, whichever of the two kinds it is."""

from dataclasses import fields, replace
from pathlib import Path

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.text import no_file
from unfold.data_prep.format.tokenizer import INFO_FILE, JSON_FILE, MODEL_FILE, Tokenizer, TokenizerInfo, locate


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer directory, or a bare sentencepiece .model or Hugging Face tokenizer.json.

    Raises:
        DataError: nothing there, unreadable, or the directory's files do not agree.
    """
    kind, found = locate(Path(path))
    if kind != "directory":
        return _load_file(kind, found)
    info = TokenizerInfo.from_file(found / INFO_FILE)
    tokenizer = _load_file(info.kind, found / (MODEL_FILE if info.kind == "sentencepiece" else JSON_FILE))
    if not info.link_ids:
        info = replace(info, link_ids=tokenizer.info.link_ids)
    if tokenizer.info != info:
        differing = [f.name for f in fields(info) if getattr(info, f.name) != getattr(tokenizer.info, f.name)]
        raise DataError(
            f"{found / INFO_FILE}: disagrees with the tokenizer beside it in {', '.join(differing)}; "
            "a file was changed or mixed up: make the directory again"
        )
    return tokenizer


def _load_file(kind: str, path: Path) -> Tokenizer:
    # Late imports: each backend is loaded only where it is used.
    if not path.is_file():
        raise DataError(f"{path}: {no_file(path)}")
    if kind == "sentencepiece":
        from unfold.data_prep.tokenization.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path.read_bytes(), str(path))
    from unfold.data_prep.tokenization.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer.from_file(path)
