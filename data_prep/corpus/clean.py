"""Cleaning a corpus before it is tokenised: simple rules, exact and near duplicates, personal data. Each step is optional.

The result is a jsonl file; what was left out is listed beside it with its place and the reason. One process; exact
duplicates cost 16 bytes a document, near duplicates about 2 KB (datasketch's MinHash index, in memory).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from unfold.data_prep.corpus.readers import read_items
from unfold.data_prep.corpus.sources import Source
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import finish_partial, open_partial, write_all
from unfold.data_prep.format.text import encodable

WORD = re.compile(r"\w+")
EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
IP = re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b")
SHINGLE = 5  # words
PERMUTATIONS = 128
# Words that every longer text of the language has (a filter by language that needs no model).
STOP_WORDS = {
    "en": {"the", "be", "to", "of", "and", "that", "have", "with"},
    "de": {"der", "die", "und", "das", "nicht", "mit", "ist", "von"},
    "fr": {"le", "la", "les", "et", "des", "est", "que", "dans"},
    "es": {"el", "la", "los", "de", "que", "y", "en", "por"},
}


@dataclass(frozen=True)
class Rules:
    """What a document must be to stay; the defaults leave everything in."""

    min_words: int = 0
    max_words: int = 0  # 0: no bound
    quality: bool = False  # the rules of `quality_problem`
    language: str | None = None  # key of STOP_WORDS
    exact: bool = False
    near: float | None = None  # Jaccard similarity of word shingles from which two documents are the same
    mask_pii: bool = False


@dataclass(frozen=True)
class CleanSummary:
    """What a run did."""

    documents: int
    kept: int
    dropped: dict[str, int]  # reason -> documents
    masked: int  # documents in which something was masked


def quality_problem(text: str) -> str:
    """Why a text is no prose or code that a model should learn from, '' if it may be. After Gopher's rules (Rae et al. 2021)."""
    words = text.split()
    if not words:
        return "empty"
    if not 3 <= sum(map(len, words)) / len(words) <= 12:
        return "mean word length outside 3 to 12"
    if sum(any(c.isalpha() for c in word) for word in words) < 0.6 * len(words):
        return "fewer than 60 % of the words have a letter"
    if (text.count("#") + text.count("…") + text.count("...")) > 0.1 * len(words):
        return "more than one # or ellipsis in 10 words"
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) >= 5 and len(lines) - len(set(lines)) > 0.4 * len(lines):
        return "more than 40 % repeated lines"
    if len(lines) >= 5 and sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "more than 30 % of the lines end in an ellipsis"
    return ""


def mask_pii(text: str) -> str:
    """The text without e-mail addresses and IPv4 numbers."""
    return IP.sub("<ip>", EMAIL.sub("<email>", text))


class Cleaner:
    """Decides on documents one after the other; the first of equals stays."""

    def __init__(self, rules: Rules):
        """Raises DataError where a step needs a library that is not installed."""
        self._rules = rules
        self._seen: set[bytes] = set()
        self._index = None
        if rules.near is not None:
            if find_spec("datasketch") is None:
                raise DataError("--near: needs the package datasketch, which is not installed: pip install datasketch")
            from datasketch import MinHashLSH

            self._index = MinHashLSH(threshold=rules.near, num_perm=PERMUTATIONS)
        self._kept = 0

    def problem(self, text: str) -> str:
        """Why the text is left out, '' if it stays (and is remembered)."""
        rules = self._rules
        words = WORD.findall(text.lower())
        if not words:
            return "empty"
        if len(words) < rules.min_words:
            return f"fewer than {rules.min_words} words"
        if rules.max_words and len(words) > rules.max_words:
            return f"more than {rules.max_words} words"
        if rules.quality and (found := quality_problem(text)):
            return found
        if rules.language and len(STOP_WORDS[rules.language].intersection(words)) < 2:
            return f"not of language {rules.language}"
        if rules.exact:
            digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16).digest()
            if digest in self._seen:
                return "exact duplicate"
            self._seen.add(digest)
        if self._index is not None and self._is_near(words):
            return "near duplicate"
        self._kept += 1
        return ""

    def _is_near(self, words: list[str]) -> bool:
        from datasketch import MinHash

        shingles = {" ".join(words[i : i + SHINGLE]).encode("utf-8", "replace") for i in range(max(1, len(words) - SHINGLE + 1))}
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch(shingles)
        if self._index.query(signature):
            return True
        self._index.insert(self._kept, signature, check_duplication=False)
        return False


def clean_corpus(sources: list[Source], output: str | Path, rules: Rules, *, on_error: str = "fail", overwrite: bool = False):
    """Write the documents that stay to OUTPUT, and OUTPUT.dropped.jsonl.

    Raises:
        DataError: a document cannot be read and on_error is 'fail', the output exists, or nothing stays.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already; choose another --output, or give --overwrite to replace it")
    cleaner, dropped, masked, kept = Cleaner(rules), Counter(), 0, 0
    output.parent.mkdir(parents=True, exist_ok=True)
    listed = output.with_name(output.name + ".dropped.jsonl")
    with open_partial(output) as out, open_partial(listed) as drops:
        try:
            for text, place, unreadable in _documents(sources, on_error):
                problem = unreadable or cleaner.problem(text)
                if problem:
                    dropped["unreadable" if unreadable else problem] += 1
                    entry = {"place": place, "reason": problem}
                    write_all(drops, (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                    continue
                final = mask_pii(text) if rules.mask_pii else text
                masked += final != text
                kept += 1
                write_all(out, (json.dumps({"text": final}) + "\n").encode("ascii"))
            if not kept:
                raise DataError(f"--input: no document is left ({sum(dropped.values())} left out: {dict(dropped)})")
        except BaseException:
            for path in (output, listed):
                path.with_name(path.name + ".partial").unlink(missing_ok=True)
            raise
        finish_partial(drops, listed)
        finish_partial(out, output)
    return CleanSummary(kept + sum(dropped.values()), kept, dict(dropped), masked)


def _documents(sources: list[Source], on_error: str) -> Iterator[tuple[str, str, str]]:
    """(text, place, why it cannot be read)."""
    for item in read_items(sources):
        if item.filtered:
            continue
        place = sources[item.source].place(item.line)
        problem = item.problem or encodable(item.text)
        if problem and on_error == "fail":
            raise DataError(f"{place}: {problem}")
        yield item.text, place, problem
