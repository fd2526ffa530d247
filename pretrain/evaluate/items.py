"""Questions of task files: LongBench's layout, RULER's, and questions on several documents, told apart by their fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.longbench import EVEN, GENERAL, LONGBENCH, Kind
from unfold.pretrain.evaluate.metrics import METRICS
from unfold.pretrain.evaluate.texts import read_rows, text_of, texts_of


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        place: 'FILE:LINE', for messages.
        dataset: what it is counted under.
        context, question: texts; the first is folded and closed, the second recalls.
        opening: the answer's first words, which are given.
        answers: any of them is right (for ``match_all``: all are asked for).
        classes: of a classification.
        kind: how it is scored.
        words: of the context, by which the data sets of LongBench-E are scored in parts; None elsewhere.
    """

    place: str
    dataset: str
    context: str
    question: str
    opening: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    kind: Kind
    words: int | None = None


DOCUMENTS = "{context}\n\nAnswer the question in a few words, by the documents above.\nQuestion: {input}\nAnswer:"
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
    dataset = text_of(place, row, "dataset", path.stem)
    if path.stem.endswith(EVEN) and not dataset.endswith(EVEN):
        dataset += EVEN
    base = dataset.removesuffix(EVEN)
    kind = LONGBENCH.get(base, GENERAL)
    texts = [text_of(place, row, name) for name in ("context", "input")]
    context, question = _fill(place, prompts.get(base, kind.prompt), *texts)
    classes = () if row.get("all_classes") is None else texts_of(place, row, "all_classes")
    words = row.get("length") if dataset.endswith(EVEN) and isinstance(row.get("length"), int) else None
    item = Item(place, dataset, context, question, "", texts_of(place, row, "answers"), classes, kind, words)
    if kind.metrics[0].name == "classification" and not classes:
        raise UserError(f"{place}: has no all_classes, among which {dataset} is classified")
    return item


def _ruler_item(place: str, row: dict, path: Path) -> Item:
    dataset = text_of(place, row, "task", path.parent.name if path.stem in ("validation", "test") else path.stem)
    text = text_of(place, row, "input")
    # Needles are asked for in the last line; everything else from the last line that begins with 'Question:' on.
    at = -1 if dataset.startswith("niah") else text.rfind("\nQuestion:")
    at = text.rstrip().rfind("\n") if at < 0 else at
    if at < 0:
        raise UserError(f"{place}: input has one line; its question must begin a line, to be told from the context")
    tokens = next((length for name, length in RULER_LENGTHS if dataset.startswith(name)), 128)
    kind = Kind((METRICS["match_part" if dataset.startswith("qa") else "match_all"],), tokens, "")
    opening = str(row.get("answer_prefix") or "")
    return Item(place, dataset, text[:at], text[at:], opening, texts_of(place, row, "outputs"), (), kind)


def _rag_item(place: str, row: dict, path: Path, prompts: Mapping[str, str]) -> Item:
    dataset = text_of(place, row, "dataset", path.stem)
    documents = row["documents"]
    if not isinstance(documents, list) or not documents:
        raise UserError(f"{place}: documents is not a list with at least one entry")
    context = "\n\n".join(_document(place, number, document) for number, document in enumerate(documents, 1))
    context, question = _fill(place, prompts.get(dataset, RAG.prompt), context, text_of(place, row, "question"))
    return Item(place, dataset, context, question, "", texts_of(place, row, "answers"), (), RAG)


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
    metrics = (METRICS[metric],) if metric else item.kind.metrics
    tokens = lengths.get(item.dataset.removesuffix(EVEN), item.kind.max_new_tokens)
    if metrics[0].name == "retrieval" and not all(re.search(r"\d", answer) for answer in item.answers):
        raise UserError(f"{item.place}: the answers have no number, as retrieval asks for")
    return replace(item, kind=replace(item.kind, metrics=metrics, max_new_tokens=tokens))
