"""A faster encoder for byte-level BPE, used only after it has given the tokenizer's own ids on a sample.

gigatoken (optional) reads the same tokenizer.json. It is compared with the tokenizers library on strings made to be
awkward, on the vocabulary's own pieces and on the beginning of the corpus before any of its output is used, and on a
short stretch of every batch after that.
"""

import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.tokenizer import Tokenizer
from unfold.data_prep.tokenization.load import load_tokenizer

BACKENDS = ("auto", "exact", "fast")
SAMPLE_CHARACTERS = 50_000  # of the corpus, in the first check
STRETCH = 500  # characters of each batch that are checked in passing
CACHE_BYTES = 256 << 20  # of text after which a new encoder starts: gigatoken's cache of words never forgets
AWKWARD = (
    *("", " ", "a", "  two  spaces  ", "tab\tand\nnewline\r\n\n\nend\n", "it's I'LL don't 'S", "naïve café ﬁ ① ½"),
    *("1234567 3.14 1,000", "日本語テキスト 한국어 עברית العربية", "😀👩\u200d👩 e\u0302 \u200b \u00a0 \ufeff \u2028 \x85"),
    *("nul\x00 bell\x07", "------ ===== .......... aaaaaaa ababababab", "</s><s><unk><|endoftext|><|im_start|><pad>", "x" * 3000),
    *("def f(x):\n        return x  # code\n", " \n \n\n  \t x", "ſ ﬀ İ ǅ \U0001d7d8 Ⅷ", "\u0300\u0301 \ud7ff\ue000\U0010ffff"),
)


class FastTokenizer:
    """A Hugging Face byte-level tokenizer with gigatoken in front of it."""

    def __init__(self, exact: Tokenizer):
        """exact: the tokenizer that it must agree with.

        Raises:
            DataError: gigatoken is not installed, or does not take this tokenizer.
        """
        self.exact, self.info, self.control = exact, exact.info, exact.control
        spec = json.loads(exact.plain_json()) if hasattr(exact, "plain_json") else None
        if spec is None or spec["model"]["type"] != "BPE" or not _byte_level(spec):
            raise DataError("it speeds up byte-level BPE only")
        if find_spec("gigatoken") is None:
            raise DataError("the package gigatoken is not installed: pip install gigatoken")
        # Control tokens in a text are text: without them in its list, gigatoken cannot see them.
        spec["added_tokens"] = [t for t in spec.get("added_tokens", []) if not t["special"]]
        self._spec, self._encoded = json.dumps(spec), 0
        self._start()

    def _start(self) -> None:
        from gigatoken import Tokenizer as Gigatoken

        try:
            self._inner = Gigatoken.from_json(self._spec)
        except Exception as e:  # it raises bare Exceptions for what it does not support
            raise DataError(f"gigatoken does not take this tokenizer ({str(e).splitlines()[0]})") from None

    def _fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._inner.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(encoded.offsets, dtype=np.int64)
        ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]]
        return ids.astype(np.int32), np.diff(offsets)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int32 [sum of lengths], and their lengths, int64 [texts].

        Raises:
            DataError: a control id came out, or the two encoders disagree on a stretch of these texts.
        """
        longest = max(texts, key=len, default="")
        middle = len(longest) // 2
        self._compare([longest[middle : middle + STRETCH]])
        size = sum(map(len, texts))
        if self._encoded + size > CACHE_BYTES:
            self._start()
            self._encoded = 0
        self._encoded += size
        ids, lengths = self._fast(texts)
        self.exact.refuse_control(ids)
        return ids, lengths

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n_i]."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids stand for nothing."""
        return self.exact.decode(ids)

    def word_starts(self) -> np.ndarray:
        """The word-start bitmap, bool [vocab_size]."""
        return self.exact.word_starts()

    def check(self, corpus: Sequence[str]) -> int:
        """Compare on awkward strings, on shuffled pieces and on the given texts; returns how many were compared.

        Raises:
            DataError: the two disagree.
        """
        draw = random.Random(0)
        pieces = [self.exact.decode([draw.randrange(self.info.vocab_size)]) for _ in range(1800)]
        shuffled = ["".join(pieces[i : i + 12]) for i in range(0, len(pieces), 12)]
        texts = [*AWKWARD, *shuffled, *corpus]
        self._compare(texts)
        return len(texts)

    def _compare(self, texts: list[str]) -> None:
        texts = [text for text in texts if _encodable(text)]
        ours, theirs = self._fast(texts), self.exact.encode_flat(texts)
        if not (np.array_equal(ours[1], theirs[1]) and np.array_equal(ours[0], theirs[0])):
            bad = next(t for t in texts if not np.array_equal(self._fast([t])[0], self.exact.encode_flat([t])[0]))
            raise DataError(
                f"gigatoken gives other ids than the tokenizer for {bad[:80]!r}; use --backend exact, with --overwrite"
            )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _byte_level(spec: dict) -> bool:
    """Whether a tokenizer.json splits a text into bytes, every one of which has an entry."""
    return '"ByteLevel"' in json.dumps(spec.get("pre_tokenizer")) and '"ByteLevel"' in json.dumps(spec.get("decoder"))


def open_tokenizer(path: str | Path, fast: bool = False) -> Tokenizer:
    """Load a tokenizer, with the fast encoder in front if it was found good before."""
    tokenizer = load_tokenizer(path)
    return FastTokenizer(tokenizer) if fast else tokenizer


def choose_backend(tokenizer: Tokenizer, wanted: str, sample: Sequence[str]) -> tuple[Tokenizer, str]:
    """The tokenizer to use, and one line that says which backend it is and why.

    Args:
        wanted: 'exact', 'fast', or 'auto': fast where it works.
        sample: the beginning of the corpus.

    Raises:
        DataError: 'fast' was asked for and cannot be had.
    """
    library = "sentencepiece" if tokenizer.info.kind == "sentencepiece" else "tokenizers"
    if wanted == "exact":
        return tokenizer, library
    try:
        fast = FastTokenizer(tokenizer)
        compared = fast.check(sample)
    except DataError as e:
        if wanted == "fast":
            raise DataError(f"--backend fast: {e}") from None
        return tokenizer, f"{library} ({e})" if "other ids" in str(e) or "not installed" in str(e) else library
    return fast, f"gigatoken (same ids as {library} on {compared} sample texts)"
