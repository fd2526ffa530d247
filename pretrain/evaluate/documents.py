"""Questions on retrieved documents, in the layouts of NQ-open with contexts, TriviaQA, HotpotQA, 2WikiMultihopQA and MuSiQue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.metrics import normalized
from unfold.pretrain.evaluate.texts import read_rows, text_of, texts_of


@dataclass(frozen=True)
class Document:
    """A document of a question.

    Attributes:
        gold: whether the answer follows from it, as far as the file says; None: it does not say.
    """

    title: str
    text: str
    gold: bool | None


@dataclass(frozen=True)
class DocumentQuestion:
    """A question on documents.

    Attributes:
        place: 'FILE:LINE', for messages.
        dataset: what it is counted under.
        answers: any of them is right.
    """

    place: str
    dataset: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]


def read_questions(path: Path, most: int | None, gold_at: int | None) -> Iterator[DocumentQuestion]:
    """The questions of a jsonl file; a line's fields tell its layout.

    Args:
        most: documents of each question; gold ones stay, then the first of the others, in the order of the file.
        gold_at: place of the first gold document, the others of them right behind it; 0 is the first. None: as in the file.

    Raises:
        UserError: a line is no question of any of the layouts, or has no gold document to be moved; names file and line.
    """
    empty = True
    for place, row in read_rows(path, "--data"):
        empty = False
        read = next((read for field, read in LAYOUTS.items() if field in row), None)
        if read is None:
            raise UserError(
                f"{place}: has the fields {', '.join(sorted(row)) or '(none)'}; expected documents as NQ-open (ctxs), TriviaQA "
                "(entity_pages, search_results), HotpotQA and 2WikiMultihopQA (context), MuSiQue (paragraphs), or documents"
            )
        documents = read(place, row)
        if not documents:
            raise UserError(f"{place}: has no document")
        if blank := next((n for n, document in enumerate(documents, 1) if not document.text.strip()), None):
            raise UserError(f"{place}: document {blank} is empty; leave it out")
        name = text_of(place, row, "dataset", path.stem)
        asked = text_of(place, row, "question")
        item = DocumentQuestion(place, name, asked, _answers(place, row), tuple(documents))
        yield _arranged(item, most, gold_at)
    if empty:
        raise UserError(f"--data {path}: holds no question")


def _answers(place: str, row: dict) -> tuple[str, ...]:
    """NQ's ``answers``, TriviaQA's object, or one ``answer`` with MuSiQue's aliases."""
    if "answers" in row:
        return texts_of(place, row, "answers")
    answer = row.get("answer")
    if isinstance(answer, dict):
        found = [answer.get("value"), *(answer.get("aliases") or ())]
    else:
        found = [answer, *(row.get("answer_aliases") or ())]
    return texts_of(place, {"answer": [text for text in dict.fromkeys(found) if text != ""]}, "answer")


def _flat(place: str, row: dict, field: str, text: str, gold: tuple[str, ...]) -> list[Document]:
    """A list of objects with a title, a text and perhaps a field that says whether one is gold."""
    documents = []
    for number, entry in enumerate(_list(place, row, field)):
        if isinstance(entry, str):
            entry = {text: entry}
        if not isinstance(entry, dict) or not isinstance(entry.get(text), str):
            raise UserError(f"{place}: {field}[{number}] is neither a text nor an object with {text}")
        told = [bool(entry[name]) for name in gold if entry.get(name) is not None]
        documents.append(Document(str(entry.get("title") or ""), entry[text], told[0] if told else None))
    return documents


def _hotpot(place: str, row: dict) -> list[Document]:
    """``context`` as [[title, [sentence, ..]], ..], or as columns; ``supporting_facts`` name titles."""
    context, facts = (_parsed(place, row, name) for name in ("context", "supporting_facts"))
    if isinstance(context, dict):
        context = list(zip(context.get("title") or (), context.get("sentences") or context.get("content") or ()))
    named = facts.get("title") if isinstance(facts, dict) else [fact[0] for fact in facts or ()]
    documents = []
    for number, entry in enumerate(context if isinstance(context, list) else ()):
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], list)):
            raise UserError(f"{place}: context[{number}] is no pair of a title and its sentences")
        title, sentences = entry
        documents.append(Document(title, "".join(sentences).strip(), title in named if named else None))
    return documents


def _trivia(place: str, row: dict) -> list[Document]:
    """Columns of Wikipedia's pages and of what a search found; gold is what holds an answer, as nothing else is told."""
    answers = [normalized(answer) for answer in _answers(place, row)]
    documents = []
    for field, text in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        columns = row.get(field) or {}
        if not isinstance(columns, dict):
            raise UserError(f"{place}: {field} is no object with title and {text}")
        for title, content in zip(columns.get("title") or (), columns.get(text) or ()):
            if isinstance(content, str) and content.strip():
                plain = normalized(content)
                documents.append(Document(title, content.strip(), any(answer in plain for answer in answers)))
    return documents


# The field that tells a layout -> its documents.
LAYOUTS: dict[str, Callable[[str, dict], list[Document]]] = {
    "documents": lambda place, row: _flat(place, row, "documents", "text", ("gold", "is_supporting")),
    "ctxs": lambda place, row: _flat(place, row, "ctxs", "text", ("isgold", "has_answer", "hasanswer")),
    "paragraphs": lambda place, row: _flat(place, row, "paragraphs", "paragraph_text", ("is_supporting",)),
    "context": _hotpot,
    "entity_pages": _trivia,
    "search_results": _trivia,
}


def _arranged(item: DocumentQuestion, most: int | None, gold_at: int | None) -> DocumentQuestion:
    documents = list(item.documents)
    gold = [document for document in documents if document.gold]
    if most is not None and len(documents) > most:
        room = most - len(gold)
        if room < 0:
            raise UserError(f"{item.place}: has {len(gold)} gold documents; --documents {most} leaves no room for them")
        others = iter(range(room))
        documents = [d for d in documents if d.gold or next(others, None) is not None]
    if gold_at is not None:
        if not gold:
            raise UserError(f"{item.place}: says of no document that it is gold, so none can be moved; leave --gold-at out")
        others = [document for document in documents if not document.gold]
        if gold_at > len(others):
            raise UserError(f"{item.place}: --gold-at {gold_at}: has {len(others)} other documents only; give a smaller place")
        documents = [*others[:gold_at], *gold, *others[gold_at:]]
    return replace(item, documents=tuple(documents))


def _list(place: str, row: dict, field: str) -> list:
    if not isinstance(row[field], list):
        raise UserError(f"{place}: {field} is {row[field]!r:.60}, expected a list")
    return row[field]


def _parsed(place: str, row: dict, field: str):
    """A value; some copies of these data sets hold it as a text of JSON."""
    value = row.get(field)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise UserError(f"{place}: {field} is a text that is not JSON; expected pairs of a title and its sentences") from None
