"""Scores of a written answer, each between 0 and 1, as LongBench and RULER define them."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# What LongBench drops from Chinese words besides (its list has no opening double angle mark).
PUNCTUATION_ZH = PUNCTUATION | str.maketrans(
    "",
    "",
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)
CODE_MARKS = ("`", "#", "//")  # of lines that are no code


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and superfluous blanks, as SQuAD compares answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that both have, counted as often as both have them."""
    return _common(normalized(prediction).split(), normalized(answer).split())


def _common(ours: Sequence[str], theirs: Sequence[str]) -> float:
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def exact_match(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Whether both are equal once normalised."""
    return float(normalized(prediction) == normalized(answer))


def contains(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Whether the prediction holds the answer, both normalised."""
    return float(normalized(answer) in normalized(prediction))


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L by the library ``rouge``, with which LongBench is scored."""
    from rouge import Rouge  # late: nothing else of this program needs it

    try:
        return Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no word on one side, or a sentence of a thousand: nothing, as LongBench counts it
        return 0.0


@cache
def _segmenter():
    """jieba's, with its own dictionary, which takes a second to read."""
    import jieba  # late, as rouge

    jieba.setLogLevel("WARNING")  # else it tells stderr of its dictionary
    return jieba.Tokenizer()


def words_zh(text: str) -> list[str]:
    """Chinese words of a text, as jieba cuts it; blanks and punctuation are words, too."""
    return list(_segmenter().cut(text, cut_all=False))


def f1_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of Chinese words, without punctuation and blanks, in lower case."""
    bare = lambda text: [word for word in ("".join(w.lower().translate(PUNCTUATION_ZH).split()) for w in words_zh(text)) if word]
    return _common(bare(prediction), bare(answer))


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L over Chinese words."""
    return rouge_l(" ".join(words_zh(prediction)), " ".join(words_zh(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 / number of the classes that the prediction names, if the answer is one; parts of the answer's name do not count."""
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the answer's ('Paragraph 12')."""
    return count(prediction, re.search(r"\d+", answer).group())


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer.strip()) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that is code to the answer; 2 * matching characters / all characters (difflib)."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in CODE_MARKS)), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def _found(prediction: str, answers: Sequence[str]) -> list[bool]:
    return [answer.lower() in prediction.lower() for answer in answers]


@dataclass(frozen=True)
class Metric:
    """How a written answer is scored.

    Attributes:
        name: as in results.
        score: (prediction, answer, classes) -> score; the best over the answers counts.
        first_line: only the first line that is written counts.
    """

    name: str
    score: Callable[[str, str, Sequence[str]], float]
    first_line: bool = False

    def __call__(self, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return max(self.score(prediction, answer, classes) for answer in answers)


@dataclass(frozen=True)
class StringMatch:
    """RULER's: answers found in the prediction, whatever their case.

    Attributes:
        name: as in results.
        all: the share of the answers that are found; else whether one is.
    """

    name: str
    all: bool

    def __call__(self, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
        found = _found(prediction, answers)
        return sum(found) / len(found) if self.all else float(any(found))


METRICS: dict[str, Metric | StringMatch] = {
    metric.name: metric
    for metric in (
        Metric("f1", f1),
        Metric("exact_match", exact_match),
        Metric("contains", contains),
        Metric("rouge_l", rouge_l),
        Metric("f1_zh", f1_zh),
        Metric("rouge_l_zh", rouge_l_zh),
        Metric("classification", classification, first_line=True),
        Metric("retrieval", retrieval),
        Metric("count", count),
        Metric("code_similarity", code_similarity),
        StringMatch("match_all", True),
        StringMatch("match_part", False),
    )
}
FIRST_LINE = {name: Metric(name, METRICS[name].score, first_line=True) for name in ("f1", "rouge_l")}
