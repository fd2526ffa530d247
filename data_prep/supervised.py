"""Rows of supervised data to token documents: a context, then questions and answers, of which the answers are learned."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from unfold.data_prep.batches import EncodedBatch, EncodeJob, Part, SupervisedJob, encode_batch, is_held_out
from unfold.data_prep.chats import ChatEncoder, check_calls
from unfold.data_prep.corpus.fields import DOCUMENTS, SupervisedFields
from unfold.data_prep.corpus.messages import read_messages
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.documents import DocumentTemplate
from unfold.data_prep.format.spans import Spans
from unfold.data_prep.format.templates import (
    ANSWER,
    ANSWER_END,
    CONTEXT_END,
    PART,
    SEPARATOR,
    ChatTemplate,
    ControlText,
    Piece,
    insert_context,
    special_tokens,
)
from unfold.data_prep.format.text import encodable
from unfold.data_prep.format.tokenizer import Tokenizer
from unfold.data_prep.journal import Counts

CONTEXT_ROLES = ("context", DOCUMENTS)


@dataclass
class TokenDocument:
    """One row as tokens."""

    ids: list[int]
    context: int  # tokens
    ranges: list[tuple[int, int]]  # of the answers
    edges: list[int] = field(default_factory=list)  # tokens before each part of a linked context, and before its end


def batch_encoder(job: EncodeJob, tokenizer: Tokenizer) -> Callable[[Sequence[str]], EncodedBatch]:
    """What encodes the texts of a batch; for a supervised job each is a row's fields as JSON."""
    if job.supervised is None:
        chats = ChatEncoder(job.template, tokenizer) if job.template else None
        return lambda texts: encode_batch(job, tokenizer, texts, chats)
    return SupervisedEncoder(job, job.supervised, tokenizer)


class SupervisedEncoder:
    """Encodes batches of rows."""

    def __init__(self, job: EncodeJob, supervised: SupervisedJob, tokenizer: Tokenizer):
        self._job, self._how, self._tokenizer = job, supervised, tokenizer
        self._template = ChatTemplate(
            supervised.template, supervised.template_name, special_tokens(tokenizer.control, tokenizer.info)
        )
        self._control = ControlText(tokenizer.control)
        self._documents = DocumentTemplate(supervised.document_template)

    def __call__(self, rows: Sequence[str]) -> EncodedBatch:
        """rows: the fields of each as JSON text. A row that cannot be used is told by its index."""
        counts, rejects = Counts(), []
        parsed: list[tuple[int, list[Piece], bool]] = []  # index, pieces, whether it is held out
        for i, row in enumerate(rows):
            try:
                if problem := encodable(row):
                    raise DataError(problem)
                raw = row.encode("utf-8")
                counts.text_bytes += len(raw)
                parsed.append((i, *self._parse(json.loads(row), raw)))
            except DataError as e:
                rejects.append((i, str(e)))
        outputs: list[list[TokenDocument]] = [[]] if self._job.valid_fraction is None else [[], []]
        for (i, pieces, held_out), ids in zip(parsed, self._encode([pieces for _, pieces, _ in parsed]), strict=True):
            try:
                if isinstance(ids, DataError):
                    raise ids
                document = self._assemble(pieces, ids)
                counts.truncated += self._shorten(document)
                outputs[held_out].append(document)
            except DataError as e:
                rejects.append((i, str(e)))
        return EncodedBatch(tuple(map(_part, outputs)), counts, tuple(rejects))

    def _parse(self, row: dict, raw: bytes) -> tuple[list[Piece], bool]:
        """The pieces of a row's text, and whether it is held out: rows on one context are, together."""
        fraction = self._job.valid_fraction
        if self._how.linked:
            parts, messages = read_linked_row(row, self._how.fields, self._documents)
            held_out = fraction is not None and is_held_out("".join(parts).encode("utf-8"), fraction)
            return self._render(messages, None, [*map(self._control.checked, parts)]), held_out
        context, messages, first = read_row(row, self._how, self._documents)
        held_out = fraction is not None and is_held_out(context.encode("utf-8") if context else raw, fraction)
        return self._render(messages, first, context), held_out

    def _render(self, messages: list[dict], first: int | None, context: str | list[str] | None) -> list[Piece]:
        """The pieces of messages and what they are asked about: a text, or parts of a linked context. first: see `read_row`."""
        messages = [{**message, "content": self._control.escape(message["content"])} for message in messages]
        parts = context if isinstance(context, list) else []
        if parts:  # only their places go through the template, so that it alters none of them
            insert_context(messages, PART * len(parts), self._template.takes_context)
        elif context is not None:
            insert_context(messages, self._control.escape(context), self._template.takes_context)
        elif first is not None:
            messages[first]["content"] = CONTEXT_END + messages[first]["content"]
        learned = messages if first is None else messages[first:]
        for message in learned:
            if "tool_calls" in message:
                raise DataError("calls a tool after its context, where only texts can be learned; plain `tokenize` takes it")
            if message["role"] == "assistant":
                message["content"] = ANSWER + message["content"] + ANSWER_END
        rendered = self._template.render_marked(messages)
        check_calls(messages, rendered, self._template.name)
        pieces, texts = [], iter(parts)
        for piece in self._control.pieces(rendered):
            pieces += [piece, Piece(text=next(texts))] if piece.mark == PART else [piece]
        return pieces

    def _encode(self, documents: list[list[Piece]]) -> list[list[np.ndarray] | DataError]:
        """Of each document the ids of its texts, in order."""
        texts = [[piece.text for piece in pieces if piece.text] for pieces in documents]
        try:
            encoded = iter(self._tokenizer.encode_batch([text for own in texts for text in own]))
            return [[next(encoded) for _ in own] for own in texts]
        except DataError:
            pass  # which one was it?
        found: list[list[np.ndarray] | DataError] = []
        for own in texts:
            try:
                found.append(self._tokenizer.encode_batch(own))
            except DataError as e:
                found.append(e)
        return found

    def _assemble(self, pieces: list[Piece], texts: list[np.ndarray]) -> TokenDocument:
        """Put ids and marks together; ends with the last answer. Raises DataError for a row that is no use."""
        document, encoded = TokenDocument([], 0, []), iter(texts)
        begin, ending = 0, False  # ending: an answer's text has ended; the control token that ends its turn is part of it
        for piece in pieces:
            if piece.mark == PART:
                document.edges.append(len(document.ids))
            elif piece.mark == CONTEXT_END:
                document.context = len(document.ids)
                document.edges += [document.context] if document.edges else []
            elif piece.mark == ANSWER:
                begin, ending = len(document.ids), False
            elif piece.mark == ANSWER_END:
                document.ranges.append((begin, len(document.ids)))
                ending = True
            elif piece.control is not None:
                document.ids.append(piece.control)
                if ending:
                    document.ranges[-1] = (begin, len(document.ids))
                ending = False
            else:
                document.ids += next(encoded).tolist()
                ending = ending and piece.text.isspace()
        del document.ids[document.ranges[-1][1] :]  # nothing would learn from it
        eos = self._tokenizer.info.eos_id
        if self._job.append_eos and document.ids[-1] != eos:
            document.ids.append(eos)
            document.ranges[-1] = (document.ranges[-1][0], len(document.ids))
        self._check_question(document)
        return document

    def _check_question(self, document: TokenDocument) -> None:
        after = [document.context, *(end for _, end in document.ranges)]
        longest = max(begin - end for end, (begin, _) in zip(after, document.ranges))
        if self._how.max_question and longest > self._how.max_question:
            raise DataError(f"a question of {longest:,} tokens, more than --max-question {self._how.max_question}; shorten it")
        if document.ranges[0][0] < 1:
            raise DataError("its answer begins with the first token, which nothing could predict; give it a question")
        if document.edges and document.ranges[0][0] == document.context:
            raise DataError("its answer comes right after the documents, of which no token could predict it; give it a question")

    def _shorten(self, document: TokenDocument) -> bool:
        """Cut the context until the document fits; whether that was needed. Raises DataError if it cannot be."""
        limit, how = self._job.max_tokens, self._how.truncate
        over = len(document.ids) - limit if limit else 0
        if over <= 0:
            return False
        if not how:
            size = f"{len(document.ids):,} tokens, more than --max-tokens {limit}"
            way = "give it fewer documents" if document.edges else "shorten it, or give --truncate middle"
            raise DataError(f"{size}; {way}")
        kept = document.context - over
        if kept < 1:
            raise DataError(
                f"{len(document.ids) - document.context:,} tokens after the context, which leave nothing of it within "
                f"--max-tokens {limit}; shorten them"
            )
        head = 0 if how == "start" else (kept + 1) // 2
        del document.ids[head : head + over]
        document.context = kept
        document.ranges = [(begin - over, end - over) for begin, end in document.ranges]
        return True


def _part(documents: list[TokenDocument]) -> Part:
    ids = [i for document in documents for i in document.ids]
    spans = Spans.of([(document.context, document.ranges) for document in documents], [d.edges for d in documents])
    return Part(np.array(ids, dtype=np.int32), np.array([len(d.ids) for d in documents], dtype=np.int64), spans)


def read_row(row: dict, how: SupervisedJob, template: DocumentTemplate) -> tuple[str | None, list[dict], int | None]:
    """(context, messages, first) of a row's fields. template: of documents that are objects.

    Where the row gives no context, messages before the number `first` are it; None: there is none.

    Raises:
        DataError: something is missing, empty or of another type; the reason alone.
    """
    fields = how.fields
    context = _context(row, fields, template)
    if fields.messages in row:
        messages, inner = _messages(row[fields.messages], fields.messages)
        if context is not None and inner is not None:
            raise DataError(f"a context under {fields.context!r} and one among {fields.messages!r}; leave one out")
        context = inner if context is None else context
    else:
        messages = _turns(row, fields)
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise DataError(f"{fields.messages!r} has no user message, so nothing is asked")
    first = None
    if context is None:
        first = (users[-1] if how.chat_context == "last-user" else users[0]) or None
    elif not context.strip():
        context = None
    if context is None and first is None and not how.allow_empty_context:
        raise DataError("an empty context: nothing stands before the question; give one, or --allow-empty-context")
    if not any(message["role"] == "assistant" for message in messages[first or 0 :]):
        raise DataError("no answer after the context; the last user message needs an assistant message after it")
    return context, messages, first


def read_linked_row(row: dict, fields: SupervisedFields, template: DocumentTemplate) -> tuple[list[str], list[dict]]:
    """(texts of the documents, messages) of a row whose context is linked documents; a prefix is the first, a system message.

    Raises:
        DataError: something is missing, empty or of another type; the reason alone.
    """
    documents = row.get(DOCUMENTS)
    if fields.context in row:
        raise DataError(f"a context under {fields.context!r}, but --linked takes a list under {DOCUMENTS!r}; leave one out")
    if not isinstance(documents, list) or not documents:
        raise DataError(f"no list of documents under {DOCUMENTS!r}, which --linked asks for")
    parts = _rendered(documents, template)
    if fields.messages in row:
        messages, inner = _messages(row[fields.messages], fields.messages)
        if inner is not None:
            raise DataError(f"documents under {DOCUMENTS!r} and a context among {fields.messages!r}; leave one out")
    else:
        messages = _turns(row, fields)
    if prefix := _text(row.get(fields.prefix, ""), fields.prefix, may_be_empty=True):
        if messages[0]["role"] == "system":
            raise DataError(f"a prefix under {fields.prefix!r} and a system message; leave one out")
        messages.insert(0, {"role": "system", "content": prefix})
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise DataError("no question with an answer after it, so nothing is learned")
    if "assistant" in roles[: roles.index("user")]:
        raise DataError("an answer before the first question, where the documents come; leave it out")
    return parts, messages


def _rendered(documents: list, template: DocumentTemplate) -> list[str]:
    return [template.render(document, f"document {i} of {len(documents)}") for i, document in enumerate(documents, 1)]


def _context(row: dict, fields: SupervisedFields, template: DocumentTemplate) -> str | None:
    """A context, and documents: texts with empty lines between them, or objects as the template writes them, end to end."""
    texts = [_text_or_list(row[fields.context], fields.context)] if fields.context in row else []
    documents = row.get(DOCUMENTS)
    if isinstance(documents, list) and any(isinstance(document, dict) for document in documents):
        texts.append("".join(_rendered(documents, template)))
    elif DOCUMENTS in row:
        texts.append(_text_or_list(documents, DOCUMENTS))
    return SEPARATOR.join(text for text in texts if text) if texts else None


def _text_or_list(value: object, key: str) -> str:
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return SEPARATOR.join(value)
    return _text(value, key, may_be_empty=True)


def _text(value: object, key: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {'null' if value is None else type(value).__name__}, not text; correct the file")
    if not (may_be_empty or value.strip()):
        raise DataError(f"{key!r} is empty")
    return value


def _turns(row: dict, fields: SupervisedFields) -> list[dict]:
    turns = row.get(fields.turns, [row])
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{fields.turns!r} is not a list of objects with {fields.question!r} and {fields.answer!r}")
    messages = []
    for turn in turns:
        for key, role in ((fields.question, "user"), (fields.answer, "assistant")):
            if not isinstance(turn, dict) or key not in turn:
                raise DataError(f"{fields.turns!r} holds an entry without {key!r}")
            messages.append({"role": role, "content": _text(turn[key], key)})
    return messages


def _messages(value: object, key: str) -> tuple[list[dict], str | None]:
    """The messages without the one that is the context, and that one's content."""
    messages, context = [], None
    for number, message in enumerate(read_messages(value, key)):
        role = message["role"]
        if role not in CONTEXT_ROLES:
            may_be_empty = role == "system" or "tool_calls" in message
            messages.append({**message, "content": _text(message["content"], f"{key}[{number}].content", may_be_empty)})
            continue
        if context is not None or any(m["role"] in ("user", "assistant") for m in messages):
            raise DataError(f"{key!r}: message {number} is a second context, or stands after a question; one comes first")
        context = _text_or_list(message["content"], f"{key}[{number}].content")
    return messages, context
