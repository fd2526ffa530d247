"""Sentencepiece model -> Hugging Face `tokenizers` file that gives the same ids.

Built from the pieces: transformers' own loading of a .model file was seen to encode wrongly. What could not be made
to agree (normalisers other than identity, and a few rarely used options) is refused, and the result is compared with
sentencepiece itself on awkward strings before it is used.
"""

import random

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from unfold.data_prep.errors import DataError
from unfold.data_prep.tokenization.huggingface import NEVER
from unfold.data_prep.tokenization.word_starts import SPACE_MARK

AWKWARD = (
    "",
    " ",
    "a",
    " a",
    "  two  spaces  ",
    "tab\tand\nnewline\r\n\n\nend\n",
    "1234567 3.14 1,000",
    "naïve café ﬁ ① ½",
    "日本語テキスト 한국어 русский עברית العربية",
    "😀👩‍👩‍👧 ê e\u0302 \u200b \u00a0 \ufeff",
    "------ ===== .......... aaaaaaa ababababab",
    "</s><s><unk><pad><gist0><gist1><0x0A><|endoftext|>",
    f"{SPACE_MARK}mark{SPACE_MARK}{SPACE_MARK} x",
    "nul\x00 bell\x07",
    "def f(x):\n        return x  # code\n",
    "The people of the United States, in 1861, were 31,443,321.",
)


def to_huggingface(model, name: str) -> Tokenizer:
    """Convert a model, and compare it on awkward strings.

    Args:
        model: sentencepiece_model_pb2.ModelProto, BPE or unigram, identity normalisation.
        name: stands for the model in errors.

    Raises:
        DataError: an option that cannot be converted, or a string on which the two do not agree.
    """
    _check_convertible(model, name)
    pieces, kinds = model.pieces, model.SentencePiece
    unk = model.trainer_spec.unk_id
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        vocab = {p.piece: i for i, p in enumerate(pieces)}
        inner = models.BPE(
            vocab=vocab,
            merges=_merges(model, vocab),
            unk_token=pieces[unk].piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    else:
        scored = [(p.piece, p.score if p.type == kinds.NORMAL else NEVER) for p in pieces]
        inner = models.Unigram(scored, unk_id=unk, byte_fallback=model.trainer_spec.byte_fallback)
    tokenizer = Tokenizer(inner)
    steps = [normalizers.Replace(" ", SPACE_MARK)]
    back = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False, special=True) for p in pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    )
    # A user's symbol that has the space mark in it can only be found after spaces have become marks.
    tokenizer.add_tokens(
        [
            AddedToken(p.piece.replace(SPACE_MARK, " "), normalized=True)
            if SPACE_MARK in p.piece
            else AddedToken(p.piece, normalized=False)
            for p in pieces
            if p.type == kinds.USER_DEFINED
        ]
    )
    _compare(model, tokenizer, name)
    return tokenizer


def _check_convertible(model, name: str) -> None:
    norm, trainer = model.normalizer_spec, model.trainer_spec
    pieces = [p.piece for p in model.pieces]
    problems = {
        f"normalisation {norm.name!r} (only identity)": bool(norm.precompiled_charsmap),
        "remove_extra_whitespaces": norm.remove_extra_whitespaces,
        "escape_whitespaces off": not norm.escape_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "a model type other than BPE and unigram": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        # The prefix would come again after each symbol, where the text is cut before it is normalised.
        "add_dummy_prefix together with user-defined symbols": norm.add_dummy_prefix
        and any(p.type == model.SentencePiece.USER_DEFINED for p in model.pieces),
        "pieces that are there twice": len(set(pieces)) < len(pieces),
    }
    found = [what for what, is_so in problems.items() if is_so]
    if found:
        raise DataError(
            f"{name}: cannot be converted to tokenizer.json with the same ids, because it uses "
            f"{'; '.join(found)}; import its tokenizer.json, or train one with train-tokenizer"
        )


def _merges(model, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that sentencepiece would join, best score first.

    Sentencepiece joins any two neighbours whose concatenation is a normal piece; a merge list must name each way.
    """
    normal = {p.piece: p.score for p in model.pieces if p.type == model.SentencePiece.NORMAL}
    ways = [
        (-score, vocab[piece], vocab[piece[:cut]], piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _compare(model, tokenizer: Tokenizer, name: str) -> None:
    """Raise DataError unless both give the same ids for awkward strings and for shuffled pieces of the vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    kinds = model.SentencePiece
    plain = [p.piece.replace(SPACE_MARK, " ") for p in model.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    rng = random.Random(0)
    shuffled = ["".join(rng.choices(plain, k=12)) for _ in range(400)]
    own = [f"x{p.piece.replace(SPACE_MARK, ' ')}y" for p in model.pieces if p.type == kinds.USER_DEFINED]
    tokenizer.encode_special_tokens = True
    texts = [*AWKWARD, *shuffled, *own]
    for text, theirs, ours in zip(texts, processor.encode(texts, num_threads=1), tokenizer.encode_batch(texts), strict=True):
        if theirs != ours.ids:
            raise DataError(
                f"{name}: its conversion to tokenizer.json disagrees with it on {text!r}; import its own tokenizer.json instead"
            )
    tokenizer.encode_special_tokens = False
