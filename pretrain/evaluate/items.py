"""Questions of task files: LongBench's layout, RULER's, and questions on several documents, told apart by their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.metrics import FIRST_LINE, METRICS, Metric, StringMatch
from unfold.pretrain.evaluate.texts import read_rows

QUESTION_ANSWERING = "{context}\n\nAnswer the question on the text above in a few words.\nQuestion: {input}\nAnswer:"
SUMMARY = "{context}\n\nSummarize the text above. {input}\nSummary:"
CONTINUE = "{context}{input}"
DOCUMENTS = "{context}\n\nAnswer the question in a few words, by the documents above.\nQuestion: {input}\nAnswer:"


@dataclass(frozen=True)
class Kind:
    """How the questions of one data set are put and scored.

    Attributes:
        metrics: the first one is the score; all are reported.
        max_new_tokens: longest answer.
        prompt: with {context}, which is folded with what stands before it, and {input}.
    """

    metrics: tuple[Metric | StringMatch, ...]
    max_new_tokens: int
    prompt: str


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        place: 'FILE:LINE', for messages.
        dataset: what it is counted under.
        context, question: texts; the first is folded and closed, the second recalls.
        answers: any of them is right (for ``match_all``: all are asked for).
        classes: of a classification.
        kind: how it is scored.
    """

    place: str
    dataset: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    kind: Kind


def _kind(metric: str, tokens: int, prompt: str, first_line: bool = False) -> Kind:
    return Kind((FIRST_LINE[metric] if first_line else METRICS[metric],), tokens, prompt)


# LongBench's data sets in English and code, with its metrics, lengths and cuts at the first line; the prompts are ours.
LONGBENCH = {
    "narrativeqa": _kind("f1", 128, QUESTION_ANSWERING),
    "qasper": _kind("f1", 128, QUESTION_ANSWERING),
    "multifieldqa_en": _kind("f1", 64, QUESTION_ANSWERING),
    "hotpotqa": _kind("f1", 32, QUESTION_ANSWERING),
    "2wikimqa": _kind("f1", 32, QUESTION_ANSWERING),
    "musique": _kind("f1", 32, QUESTION_ANSWERING),
    "gov_report": _kind("rouge_l", 512, SUMMARY),
    "qmsum": _kind("rouge_l", 512, "{context}\n\nAnswer the question on the meeting above.\nQuestion: {input}\nAnswer:"),
    "multi_news": _kind("rouge_l", 512, SUMMARY),
    "trec": _kind("classification", 64, "{context}\n{input}"),
    "triviaqa": _kind("f1", 32, "{context}\n\n{input}", first_line=True),
    "samsum": _kind("rouge_l", 128, "{context}\n\n{input}", first_line=True),
    "passage_count": _kind("count", 32, "{context}\n\nHow many different paragraphs are there above? Their number is"),
    "passage_retrieval_en": _kind(
        "retrieval", 32, "{context}\n\nWhich paragraph does this abstract belong to?\n{input}\nThe number is: Paragraph"
    ),
    "lcc": _kind("code_similarity", 64, CONTINUE),
    "repobench-p": _kind("code_similarity", 64, CONTINUE),
}
GENERAL = _kind("f1", 64, QUESTION_ANSWERING)
RAG = Kind((METRICS["f1"], METRICS["exact_match"], METRICS["contains"]), 32, DOCUMENTS)
# RULER scores its questions on documents by any answer, all else by the share of the answers; lengths by its kinds of task.
RULER_LENGTHS = (("niah", 128), ("vt", 30), ("cwe", 120), ("fwe", 50), ("qa", 32))


def read_items(path: Path, prompts: Mapping[str, str], lengths: Mapping[str, int], metric: str | None) -> Iterator[Item]:
    """The questions of a jsonl file.

    Args:
        path: a layout per line is allowed, but a file usually has one.
        prompts: data set -> prompt, before the built-in ones.
        lengths: data set -> longest answer in tokens, before the built-in ones.
        metric: instead of the data set's own; None takes those.

    Raises:
        UserError: a line is no question of any of the layouts; names file and line.
    """
    empty = True
    for place, row in read_rows(path, "--tasks"):
        empty = False
        if "documents" in row:
            item = _rag_item(place, row, path, prompts)
        elif "outputs" in row:
            item = _ruler_item(place, row, path)
        elif "context" in row:
            item = _longbench_item(place, row, path, prompts)
        else:
            raise UserError(
                f"{place}: has the fields {', '.join(sorted(row)) or '(none)'}; expected LongBench's (input, context, answers), "
                "RULER's (input, outputs) or a question on documents (question, documents, answers)"
            )
        yield _with_choices(item, lengths, metric)
    if empty:
        raise UserError(f"--tasks {path}: holds no question")


def _longbench_item(place: str, row: dict, path: Path, prompts: Mapping[str, str]) -> Item:
    dataset = _text(place, row, "dataset", path.stem).removesuffix("_e")
    if dataset.endswith("_zh") or dataset in ("dureader", "vcsum", "lsht"):
        raise UserError(f"{place}: {dataset} is scored by Chinese words, which is not supported; leave the file out")
    kind = LONGBENCH.get(dataset, GENERAL)
    context, question = _fill(place, prompts.get(dataset, kind.prompt), _text(place, row, "context"), _text(place, row, "input"))
    classes = () if row.get("all_classes") is None else _texts(place, row, "all_classes")
    item = Item(place, dataset, context, question, _texts(place, row, "answers"), classes, kind)
    if kind is LONGBENCH["trec"] and not classes:
        raise UserError(f"{place}: has no all_classes, among which {dataset} is classified")
    return item


def _ruler_item(place: str, row: dict, path: Path) -> Item:
    dataset = _text(place, row, "task", path.parent.name if path.stem in ("validation", "test") else path.stem)
    text = _text(place, row, "input")
    # Needles are asked for in the last line; everything else from the last line that begins with 'Question:' on.
    at = -1 if dataset.startswith("niah") else text.rfind("\nQuestion:")
    at = text.rstrip().rfind("\n") if at < 0 else at
    if at < 0:
        raise UserError(f"{place}: input has one line; its question must begin a line, to be told from the context")
    context, question = text[:at], text[at:] + str(row.get("answer_prefix") or "")
    tokens = next((length for name, length in RULER_LENGTHS if dataset.startswith(name)), 128)
    kind = Kind((METRICS["match_part" if dataset.startswith("qa") else "match_all"],), tokens, "")
    return Item(place, dataset, context, question, _texts(place, row, "outputs"), (), kind)


def _rag_item(place: str, row: dict, path: Path, prompts: Mapping[str, str]) -> Item:
    dataset = _text(place, row, "dataset", path.stem)
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise UserError(f"{place}: documents is not a list with at least one entry")
    context = "\n\n".join(_document(place, number, document) for number, document in enumerate(documents, 1))
    context, question = _fill(place, prompts.get(dataset, RAG.prompt), context, _text(place, row, "question"))
    return Item(place, dataset, context, question, _texts(place, row, "answers"), (), RAG)


def _document(place: str, number: int, document: object) -> str:
    if isinstance(document, str):
        return f"Document {number}:\n{document}"
    if isinstance(document, dict) and isinstance(document.get("text"), str):
        return f"Document {number}: {document.get('title') or ''}\n{document['text']}"
    raise UserError(f"{place}: documents[{number - 1}] is neither a text nor an object with text (and title)")


def _fill(place: str, prompt: str, context: str, question: str) -> tuple[str, str]:
    """The text up to the end of the context, and what follows it."""
    before, mark, after = prompt.partition("{context}")
    if not mark:
        raise UserError(f"{place}: the prompt {prompt!r} has no {{context}}")
    return before.replace("{input}", question) + context, after.replace("{input}", question)


def _with_choices(item: Item, lengths: Mapping[str, int], metric: str | None) -> Item:
    kind = item.kind
    metrics = (METRICS[metric],) if metric else kind.metrics
    tokens = lengths.get(item.dataset, kind.max_new_tokens)
    if metrics[0].name == "retrieval" and not all(re.search(r"\d", answer) for answer in item.answers):
        raise UserError(f"{item.place}: the answers have no number, as retrieval asks for")
    return Item(
        item.place, item.dataset, item.context, item.question, item.answers, item.classes, Kind(metrics, tokens, kind.prompt)
    )


def _text(place: str, row: dict, name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected a text")
    return value


def _texts(place: str, row: dict, name: str) -> tuple[str, ...]:
    value = row.get(name)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected a list of texts")
    return tuple(value)
