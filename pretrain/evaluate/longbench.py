"""LongBench: how the questions of each of its 21 data sets are put, answered and scored; the prompts are ours."""

from __future__ import annotations

from dataclasses import dataclass

from unfold.pretrain.evaluate.metrics import FIRST_LINE, METRICS, Metric, StringMatch

QUESTION_ANSWERING = "{context}\n\nAnswer the question on the text above in a few words.\nQuestion: {input}\nAnswer:"
QUESTION_ANSWERING_ZH = "{context}\n\n请根据上文简短回答问题。\n问题：{input}\n答案："
EVEN = "_e"  # ends the names of LongBench-E's data sets, whose contexts are spread evenly over three ranges of length
RANGES = (("0-4k", 4000), ("4-8k", 8000), ("8k+", None))  # below so many words
SUMMARY = "{context}\n\nSummarize the text above. {input}\nSummary:"
CONTINUE = "{context}{input}"


@dataclass(frozen=True)
class Kind:
    """How the questions of one data set are put and scored.

    Attributes:
        metrics: the first one is the score; all are reported.
        max_new_tokens: longest answer.
        prompt: with {context}, which is folded with what stands before it, and {input}.
        chat: whether a chat template may be used; examples and code to be continued are put as they are.
    """

    metrics: tuple[Metric | StringMatch, ...]
    max_new_tokens: int
    prompt: str
    chat: bool = True


def _kind(metric: str, tokens: int, prompt: str, first_line: bool = False, chat: bool = True) -> Kind:
    return Kind((FIRST_LINE[metric] if first_line else METRICS[metric],), tokens, prompt, chat)


# Metrics, lengths, cuts at the first line and exceptions from chat templates are LongBench's.
LONGBENCH = {
    "narrativeqa": _kind("f1", 128, QUESTION_ANSWERING),
    "qasper": _kind("f1", 128, QUESTION_ANSWERING),
    "multifieldqa_en": _kind("f1", 64, QUESTION_ANSWERING),
    "multifieldqa_zh": _kind("f1_zh", 64, QUESTION_ANSWERING_ZH),
    "hotpotqa": _kind("f1", 32, QUESTION_ANSWERING),
    "2wikimqa": _kind("f1", 32, QUESTION_ANSWERING),
    "musique": _kind("f1", 32, QUESTION_ANSWERING),
    "dureader": _kind("rouge_l_zh", 128, QUESTION_ANSWERING_ZH),
    "gov_report": _kind("rouge_l", 512, SUMMARY),
    "qmsum": _kind("rouge_l", 512, "{context}\n\nAnswer the question on the meeting above.\nQuestion: {input}\nAnswer:"),
    "multi_news": _kind("rouge_l", 512, SUMMARY),
    "vcsum": _kind("rouge_l_zh", 512, "{context}\n\n请总结以上会议。{input}\n总结："),
    "trec": _kind("classification", 64, "{context}\n{input}", chat=False),
    "triviaqa": _kind("f1", 32, "{context}\n\n{input}", first_line=True, chat=False),
    "samsum": _kind("rouge_l", 128, "{context}\n\n{input}", first_line=True, chat=False),
    "lsht": _kind("classification", 64, "{context}\n{input}", chat=False),
    "passage_count": _kind("count", 32, "{context}\n\nHow many different paragraphs are there above? Their number is"),
    "passage_retrieval_en": _kind(
        "retrieval", 32, "{context}\n\nWhich paragraph does this abstract belong to?\n{input}\nThe number is: Paragraph"
    ),
    "passage_retrieval_zh": _kind("retrieval", 32, "{context}\n\n下面的摘要出自哪一段？\n{input}\n编号是：段落"),
    "lcc": _kind("code_similarity", 64, CONTINUE, chat=False),
    "repobench-p": _kind("code_similarity", 64, CONTINUE, chat=False),
}
GENERAL = _kind("f1", 64, QUESTION_ANSWERING)


def length_range(words: int) -> str:
    """The range of LongBench-E that a context of so many words falls in."""
    return next(name for name, below in RANGES if below is None or words < below)
