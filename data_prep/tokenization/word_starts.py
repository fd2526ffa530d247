"""Which vocabulary entries start a word: the bitmap by which gists are placed (a chunk ends where a word ends).

It is made from the pieces themselves. Decoding token by token would lose leading spaces and turn half characters
into replacement marks. An entry starts a word if it begins with a space mark of any kind, with whitespace or with
punctuation (or a symbol), or if it is a special, control or added token. Continuations of words do not, nor do
pieces that begin inside a character, or with a part of one.
"""

import json
import re
import unicodedata

import numpy as np

SPACE_MARK = "\u2581"  # sentencepiece's visible space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def text_starts_word(text: str) -> bool:
    """Tell whether a piece of plain text (space mark or real spaces) starts a word."""
    if not text:
        return False
    first = text[0]
    kind = unicodedata.category(first)
    return first == SPACE_MARK or first.isspace() or kind[0] in "PSZ" or kind == "Cc"


def bytes_start_word(raw: bytes) -> bool:
    """Tell the same of a piece given as UTF-8 bytes, which may begin or end inside a character."""
    if not raw:
        return False
    lead = raw[0]
    length = 1 if lead < 0x80 else 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
    try:
        first = raw[:length].decode("utf-8")
    except UnicodeDecodeError:
        return False  # cut inside a character
    return text_starts_word(first)


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest is moved to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(moved)}


def sentencepiece_word_starts(model) -> np.ndarray:
    """Bitmap of a sentencepiece model.

    Args:
        model: sentencepiece_model_pb2.ModelProto.

    Returns:
        bool [vocab_size].
    """
    kinds = model.SentencePiece
    starts = np.zeros(len(model.pieces), dtype=bool)
    for i, piece in enumerate(model.pieces):
        if piece.type == kinds.BYTE:
            starts[i] = bytes_start_word(bytes.fromhex(piece.piece[3:5]))
        else:
            starts[i] = piece.type not in (kinds.NORMAL, kinds.UNUSED) or text_starts_word(piece.piece)
    return starts


def huggingface_word_starts(tokenizer_json: bytes, vocab: dict[str, int]) -> np.ndarray:
    """Bitmap of a Hugging Face fast tokenizer.

    Args:
        tokenizer_json: the bytes of its tokenizer.json.
        vocab: piece -> id, added tokens included.

    Returns:
        bool [highest id + 1].
    """
    spec = json.loads(tokenizer_json)
    model = spec["model"]
    parts = _component_types(spec.get("pre_tokenizer")) | _component_types(spec.get("decoder"))
    continuing = model.get("continuing_subword_prefix") if model["type"] in ("WordPiece", "BPE") else None
    alphabet = byte_alphabet() if "ByteLevel" in parts else None
    starts = np.zeros(max(vocab.values()) + 1, dtype=bool)
    for piece, i in vocab.items():
        byte = BYTE_PIECE.fullmatch(piece) if model.get("byte_fallback") else None
        if byte:
            starts[i] = bytes_start_word(bytes.fromhex(byte[1]))
        elif alphabet:
            starts[i] = all(c in alphabet for c in piece) and bytes_start_word(bytes(alphabet[c] for c in piece[:4]))
        elif continuing:
            starts[i] = not piece.startswith(continuing)
        else:
            starts[i] = text_starts_word(piece)
    for token in spec.get("added_tokens", []):
        starts[token["id"]] = True
    return starts


def _component_types(component: dict | None) -> set[str]:
    """Names of a pre-tokenizer's or decoder's parts, sequences unrolled."""
    if not component:
        return set()
    parts = component.get("pretokenizers") or component.get("decoders") or []
    return {component["type"]}.union(*(_component_types(part) for part in parts))
