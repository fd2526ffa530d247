"""Corpus to shards: documents in batches to worker processes, ids back in order.

Batches are cut by size alone and come back in the order they were read, so the files do not depend on the number of
workers. Whether a document is held out depends on its text alone: on no order, no file name, no other document.
"""

import hashlib
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.errors import DataError
from data_prep.readers import Document, Source, read_documents
from data_prep.shards import ShardInfo, ShardWriter
from data_prep.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class EncodeJob:
    """What a worker has to know."""

    tokenizer: str
    append_eos: bool
    valid_fraction: float | None


@dataclass(frozen=True)
class Part:
    """Documents of one batch for one output."""

    ids: np.ndarray  # int32 [sum of lengths]
    lengths: np.ndarray  # int64 [documents]


@dataclass(frozen=True)
class EncodedBatch:
    """What comes back: one part for each output."""

    parts: tuple[Part, ...]
    documents: int  # read, empty ones included
    empty: int
    text_bytes: int
    consumed: int  # bytes of the input files


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    shards: dict[str, ShardInfo]  # prefix -> sidecar
    documents: int
    empty: int
    text_bytes: int
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """Text per second, start-up included."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)


def tokenize_corpus(
    sources: list[Source],
    tokenizer: str | Path,
    prefix: str | Path,
    *,
    workers: int = 1,
    valid_fraction: float | None = None,
    append_eos: bool = True,
    overwrite: bool = False,
) -> Summary:
    """Turn a corpus into one shard, or two (PREFIX_train, PREFIX_valid) if a part is held out.

    Args:
        sources: the corpus (`readers.find_sources`).
        tokenizer: what `load_tokenizer` takes.
        workers: encoding processes; 1 encodes in this one. The files are the same for any number.
        valid_fraction: share of the documents to hold out, in (0, 1); None makes one shard.
        append_eos: end each document with the end-of-document id, if the tokenizer has one.

    Raises:
        DataError: any bad input; no output is left then.
    """
    begin = time.monotonic()
    encoder = load_tokenizer(tokenizer)
    job = EncodeJob(str(tokenizer), append_eos and encoder.info.eos_id is not None, valid_fraction)
    names = [str(prefix)] if valid_fraction is None else [f"{prefix}_train", f"{prefix}_valid"]
    documents = empty = text_bytes = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                ShardWriter(
                    name,
                    vocab_size=encoder.info.vocab_size,
                    tokenizer_hash=encoder.info.hash,
                    eos_appended=job.append_eos,
                    sources=[s.path for s in sources],
                    overwrite=overwrite,
                )
            )
            for name in names
        ]
        total = sum(Path(s.path).stat().st_size for s in sources)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None))
        batches = make_batches(read_documents(sources))
        encoded = _encode_here(job, encoder, batches) if workers == 1 else _encode_in_pool(job, batches, workers)
        for batch in encoded:
            for writer, part in zip(writers, batch.parts, strict=True):
                writer.append(part.ids, part.lengths)
            documents, empty = documents + batch.documents, empty + batch.empty
            text_bytes += batch.text_bytes
            bar.update(batch.consumed)
        _check_filled(writers, documents, empty, valid_fraction)
        shards = {writer.prefix: writer.finish() for writer in writers}
    return Summary(shards, documents, empty, text_bytes, time.monotonic() - begin)


def make_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents in order, by size."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def is_held_out(raw: bytes, fraction: float) -> bool:
    """Whether a document of these UTF-8 bytes belongs to the validation part."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") < fraction * 2**64


def encode_documents(job: EncodeJob, tokenizer: Tokenizer, documents: Sequence[Document]) -> EncodedBatch:
    """Encode one batch.

    Raises:
        DataError: a text that cannot be encoded; names its place.
    """
    raws = [_utf8(document) for document in documents]
    outputs: tuple[list[np.ndarray], ...] = ([],) if job.valid_fraction is None else ([], [])
    eos = np.array([tokenizer.info.eos_id] if job.append_eos else [], dtype=np.int32)
    for raw, ids in zip(raws, _encode(tokenizer, documents), strict=True):
        if ids.size:
            held_out = job.valid_fraction is not None and is_held_out(raw, job.valid_fraction)
            outputs[int(held_out)].append(np.concatenate((ids, eos)))
    parts = tuple(
        Part(np.concatenate(output) if output else np.zeros(0, np.int32), np.array([x.size for x in output], np.int64))
        for output in outputs
    )
    written = sum(len(part.lengths) for part in parts)
    return EncodedBatch(
        parts, len(documents), len(documents) - written, sum(map(len, raws)), sum(d.consumed for d in documents)
    )


def _encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Ids of each document; whitespace alone counts as empty, and gives none."""
    texts = ["" if document.text.isspace() else document.text for document in documents]
    try:
        return tokenizer.encode_batch(texts)
    except DataError:
        for text, document in zip(texts, documents, strict=True):  # which one was it?
            try:
                tokenizer.encode_batch([text])
            except DataError as e:
                raise DataError(f"{document.place}: {e}") from None
        raise


def _utf8(document: Document) -> bytes:
    try:
        return document.text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise DataError(
            f"{document.place}: holds half of a surrogate pair (\\u{ord(document.text[e.start]):04x}), "
            "which is not a character; correct the text"
        ) from None


def _encode_here(job: EncodeJob, tokenizer: Tokenizer, batches: Iterable[list[Document]]) -> Iterator[EncodedBatch]:
    return (encode_documents(job, tokenizer, batch) for batch in batches)


def _encode_in_pool(job: EncodeJob, batches: Iterable[list[Document]], workers: int) -> Iterator[EncodedBatch]:
    """Encode in processes, in turn, results in order; two batches ahead in each, so that memory stays bounded."""
    with ExitStack() as stack:
        pool = [stack.enter_context(_Worker(job)) for _ in range(workers)]
        ahead: deque[_Worker] = deque()
        for batch, worker in zip(batches, cycle(pool)):
            if len(ahead) == 2 * workers:
                yield ahead.popleft().receive()
            worker.send(batch)
            ahead.append(worker)
        while ahead:
            yield ahead.popleft().receive()


class _Worker:
    """An encoding process on a pipe of its own.

    Not a concurrent.futures pool: its workers share one pipe, and one that is killed in the middle of a result leaves
    the reader waiting for the rest for ever. Here the pipe ends with its process, on either side.
    """

    def __init__(self, job: EncodeJob):
        # Started afresh rather than forked: tokenizer libraries have threads, which a fork would break.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pipe.close()
        self._process.join()

    def send(self, batch: list[Document]) -> None:
        try:
            self._pipe.send(batch)
        except OSError:
            raise self._died() from None

    def receive(self) -> EncodedBatch:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(result, DataError):
            raise result
        return result

    def _died(self) -> DataError:
        self._process.join()
        return DataError(
            f"a worker process died (exit code {self._process.exitcode}: killed, or out of memory?); "
            "give fewer --workers, or more memory"
        )


def _work(pipe: Connection, job: EncodeJob) -> None:
    """A worker's life: batches in, results out, until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    received: queue.SimpleQueue[list[Document]] = queue.SimpleQueue()
    # Received in a thread, so that the parent never waits to send while this waits to send to it.
    threading.Thread(target=_receive, args=(pipe, received), daemon=True).start()
    tokenizer = load_tokenizer(job.tokenizer)
    while True:
        try:
            result: EncodedBatch | DataError = encode_documents(job, tokenizer, received.get())
        except DataError as e:
            result = e
        try:
            pipe.send(result)
        except OSError:
            return  # nobody is waiting for it any more


def _receive(pipe: Connection, received: queue.SimpleQueue) -> None:
    try:
        while True:
            received.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _check_filled(writers: list[ShardWriter], documents: int, empty: int, valid_fraction: float | None) -> None:
    """Raise DataError, before anything is given its name, if an output would stay empty."""
    if documents == empty:
        raise DataError(f"--input: not one document with text in it ({documents} documents, all empty)")
    for writer in writers:
        if writer.documents == 0:
            raise DataError(
                f"--valid-fraction {valid_fraction}: of {documents - empty} documents none falls to "
                f"{writer.prefix}; choose a fraction further from {0 if writer is writers[1] else 1}, "
                "or give more documents"
            )
