"""Sentencepiece models behind the `Tokenizer` interface."""

from collections.abc import Sequence

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.tokenizer import ControlToken, TokenizerInfo, find_gists, find_links, sha256
from unfold.data_prep.tokenization.word_starts import sentencepiece_word_starts

MANY = 1000  # characters: as a long line of prose, over which float32 sums were never seen to matter


def parse_model(raw: bytes, name: str):
    """Parse a .model file's bytes to a ModelProto.

    Raises:
        DataError: these are not the bytes of a sentencepiece model.
    """
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception:  # protobuf's own error class differs between its implementations
        model.Clear()
    if not model.pieces:
        raise DataError(
            f"{name}: not a sentencepiece model; --tokenizer takes a tokenizer directory, "
            "a sentencepiece .model or a tokenizer.json"
        )
    return model


class SentencePieceTokenizer:
    """A sentencepiece model. Its library never turns text into control ids, so nothing has to be guarded here."""

    def __init__(self, raw: bytes, name: str):
        """Load a model from its bytes; `name` stands for it in errors (DataError if it is no model)."""
        self._model = parse_model(raw, name)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as e:
            raise DataError(f"{name}: not a usable sentencepiece model: {str(e).strip().splitlines()[-1]}") from None
        self._by_line = _lines_are_independent(self._model)
        p = self._processor
        control = {x.piece: i for i, x in enumerate(self._model.pieces) if x.type == self._model.SentencePiece.CONTROL}
        self.control = {piece: ControlToken(i) for piece, i in control.items()}
        gists = find_gists(control)
        self.info = TokenizerInfo(
            kind="sentencepiece",
            vocab_size=len(self._model.pieces),
            gist_ids=tuple(control[g] for g in gists),
            link_ids=tuple(control[n] for n in find_links(control)),
            gist_tokens=tuple(gists),
            bos_id=_id_or_none(p.bos_id()),
            eos_id=_id_or_none(p.eos_id()),
            pad_id=_id_or_none(p.pad_id()),
            hash=sha256(raw),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n_i]."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int32 [sum of lengths], and their lengths, int64 [texts]."""
        if not self._by_line:
            return self._encode(texts)
        lines = [_lines(text) for text in texts]
        ids, lengths = self._encode([line for own in lines for line in own])
        ends = np.cumsum([0, *map(len, lines)])
        return ids, np.diff(np.concatenate(([0], np.cumsum(lengths)))[ends])

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """One thread: processes are how work is spread."""
        encoded = self._processor.encode(list(texts), return_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
        return ids.astype(np.int32, copy=False), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids stand for nothing."""
        return self._processor.decode([int(i) for i in ids])

    def word_starts(self) -> np.ndarray:
        """The word-start bitmap, bool [vocab_size]."""
        return sentencepiece_word_starts(self._model)


def _lines(text: str) -> list[str]:
    """The text cut at line ends, short lines together: each piece is one line, or at most MANY characters."""
    pieces, at = [], 0
    while at < len(text):
        cut = len(text)
        if cut - at > MANY:
            cut = text.rfind("\n", at, at + MANY) + 1 or text.find("\n", at + MANY) + 1 or cut
        pieces.append(text[at:cut])
        at = cut
    return pieces


def _lines_are_independent(model) -> bool:
    """Whether a unigram text may be encoded a line, or a few, at a time: the same pieces, but smaller sums.

    Sentencepiece adds scores in float32; over a whole document the sums grow until ties, and near ties, fall
    otherwise than in tokenizer.json (seen on 3 of 63 speeches, on none of their 13,780 lines).
    """
    trainer = model.trainer_spec
    return (
        trainer.model_type == trainer.UNIGRAM
        and trainer.byte_fallback  # else a line end is an unknown character, and joins with one beside it
        and not model.normalizer_spec.add_dummy_prefix  # it belongs before the text, not before each line
        and not any("\n" in p.piece for p in model.pieces)
    )


def _id_or_none(i: int) -> int | None:
    return None if i < 0 else i
