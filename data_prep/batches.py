"""Documents in batches, and what encoding makes of one. Nothing here depends on how many processes do it."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from unfold.data_prep.chats import ChatEncoder
from unfold.data_prep.corpus.fields import SupervisedFields
from unfold.data_prep.corpus.items import Document, Position
from unfold.data_prep.corpus.messages import ChatText
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.spans import Spans
from unfold.data_prep.format.text import encodable
from unfold.data_prep.format.tokenizer import Tokenizer
from unfold.data_prep.journal import Counts

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


class Reject(NamedTuple):
    """A document that could not be used."""

    source: int
    line: int
    reason: str


@dataclass
class Batch:
    """Documents that are encoded together, and where reading stands after them."""

    texts: list[str] = field(default_factory=list)
    origins: list[tuple[int, int]] = field(default_factory=list)  # of each text: source, line
    rejects: list[Reject] = field(default_factory=list)
    documents: int = 0  # read, with those that are no texts here
    filtered: int = 0
    after: Position = Position()
    consumed: int = 0  # bytes of the input files


@dataclass(frozen=True)
class SupervisedJob:
    """How rows become documents."""

    fields: SupervisedFields
    template: str  # its source
    template_name: str
    chat_context: str = "last-user"  # or first-user: before which user message a chat's context ends, if it names none
    allow_empty_context: bool = False
    max_question: int = 0  # tokens between a context or an answer and the next answer; 0: no bound
    truncate: str = ""  # what of a context that is too long is left out: "start", "middle"; "" refuses it
    linked: bool = False  # the documents of a row are read one by one, not joined to one context
    document_template: str = ""  # how a linked document is written (`format.documents`)


@dataclass(frozen=True)
class EncodeJob:
    """What a worker has to know."""

    tokenizer: str
    append_eos: bool
    valid_fraction: float | None = None
    min_tokens: int = 0  # a document of fewer is left out
    max_tokens: int = 0  # a document of more is left out; 0: no bound
    fast: bool = False  # use the fast backend, which the parent has checked
    supervised: SupervisedJob | None = None  # the texts are rows of supervised data
    template: tuple[str, str] | None = None  # source and name of what writes chats among the texts


@dataclass(frozen=True)
class Part:
    """Documents of one batch for one output."""

    ids: np.ndarray  # int32 [sum of lengths]
    lengths: np.ndarray  # int64 [documents]
    spans: Spans | None = None  # of a supervised job


@dataclass(frozen=True)
class EncodedBatch:
    """What comes back: one part for each output."""

    parts: tuple[Part, ...]
    counts: Counts
    rejects: tuple[tuple[int, str], ...]  # index in the batch, reason


def make_batches(items: Iterable[Document], stop_at_problem: bool) -> Iterator[Batch]:
    """Group documents in order, by size.

    Args:
        stop_at_problem: end with the first document that cannot be read, in a batch of its own.
    """
    batch, characters, source, done = Batch(), 0, -1, 0
    for item in items:
        if item.problem and stop_at_problem and batch.documents:
            yield batch
            batch, characters = Batch(), 0
        if item.source != source:
            source, done = item.source, 0
        batch.consumed += max(item.consumed - done, 0)
        done = max(item.consumed, done)
        batch.documents += 1
        batch.after = item.after
        if item.problem:
            batch.rejects.append(Reject(item.source, item.line, item.problem))
            if stop_at_problem:
                break
        elif item.filtered:
            batch.filtered += 1
        else:
            batch.texts.append(item.text)
            batch.origins.append((item.source, item.line))
            characters += len(item.text)
        if characters >= BATCH_CHARACTERS or batch.documents >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = Batch(), 0
    if batch.documents:
        yield batch


def is_held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document of these UTF-8 bytes belongs to the validation part."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") < fraction * 2**64


def encode_batch(job: EncodeJob, tokenizer: Tokenizer, texts: Sequence[str], chats: ChatEncoder | None = None) -> EncodedBatch:
    """Encode one batch; a text that cannot be encoded is told by its index. chats: of the texts that are chats."""
    counts, rejects = Counts(), []
    usable: list[str] = []
    held_out = np.zeros(len(texts), dtype=bool)
    for i, text in enumerate(texts):
        if not text or text.isspace():
            text = ""
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            rejects.append((i, encodable(text)))
            raw, text = b"", ""
        usable.append(text)
        counts.text_bytes += len(raw)
        if job.valid_fraction is not None:
            held_out[i] = is_held_out(raw, job.valid_fraction)
    own = {i: text for i, text in enumerate(usable) if isinstance(text, ChatText)}
    ids, lengths = _encode(tokenizer, ["" if i in own else text for i, text in enumerate(usable)], rejects)
    if own:
        ids, lengths = _with_chats(job, tokenizer, chats, own, ids, lengths, rejects)
    counts.empty = int((lengths == 0).sum()) - len(rejects)
    if job.append_eos:
        ids, lengths = with_end(ids, lengths, tokenizer.info.eos_id)
    short, long = (lengths > 0) & (lengths < job.min_tokens), lengths > (job.max_tokens or np.inf)
    counts.short, counts.long = int(short.sum()), int(long.sum())
    used = (lengths > 0) & ~short & ~long
    masks = (used,) if job.valid_fraction is None else (used & ~held_out, used & held_out)
    return EncodedBatch(tuple(_part(ids, lengths, mask) for mask in masks), counts, tuple(rejects))


def _encode(tokenizer: Tokenizer, texts: list[str], rejects: list[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all texts and their lengths; a text that the tokenizer refuses gives none, and is added to `rejects`."""
    try:
        return tokenizer.encode_flat(texts)
    except DataError:
        pass  # which one was it?
    for i, text in enumerate(texts):
        try:
            tokenizer.encode_flat([text])
        except DataError as e:
            rejects.append((i, str(e)))
            texts[i] = ""
    return tokenizer.encode_flat(texts)


def _with_chats(job, tokenizer, chats, own: dict[int, str], ids, lengths, rejects) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths of all texts, those of chats put in their places; a chat that cannot be written is added to ``rejects``."""
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    for i, text in own.items():
        try:
            documents[i] = chats.encode(text)
        except DataError as e:
            rejects.append((i, str(e)))
            continue
        if job.append_eos and len(documents[i]) and documents[i][-1] == tokenizer.info.eos_id:
            documents[i] = documents[i][:-1]  # the template has written it already
    return np.concatenate(documents), np.array([len(document) for document in documents], dtype=np.int64)


def with_end(ids: np.ndarray, lengths: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """The same documents, each that has a token ended by `eos`.

    Args:
        ids: int32 [sum of lengths].
        lengths: int64 [documents].
    """
    longer = lengths + (lengths > 0)
    ends = np.cumsum(longer)[lengths > 0] - 1
    ended = np.empty(int(longer.sum()), dtype=np.int32)
    is_token = np.ones(len(ended), dtype=bool)
    is_token[ends] = False
    ended[is_token] = ids
    ended[ends] = eos
    return ended, longer


def _part(ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray) -> Part:
    """The documents that a mask, bool [documents], picks."""
    if mask[lengths > 0].all():
        return Part(ids, lengths[mask])
    return Part(ids[np.repeat(mask, lengths)], lengths[mask])
