"""Worker processes that encode batches, results in order."""

import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection

from data_prep.batches import Batch, EncodedBatch, EncodeJob
from data_prep.errors import DataError
from data_prep.fast import open_tokenizer
from data_prep.supervised import batch_encoder
from data_prep.tokenizer import Tokenizer


def encode_here(job: EncodeJob, tokenizer: Tokenizer, batches: Iterable[Batch]) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Encode in this process."""
    encode = batch_encoder(job, tokenizer)
    return ((batch, encode(batch.texts)) for batch in batches)


def encode_in_pool(job: EncodeJob, batches: Iterable[Batch], workers: int) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Encode in processes, in turn, results in order; two batches ahead in each, so that memory stays bounded."""
    with ExitStack() as stack:
        pool = [stack.enter_context(_Worker(job)) for _ in range(workers)]
        ahead: deque[tuple[Batch, _Worker]] = deque()

        def finished() -> tuple[Batch, EncodedBatch]:
            batch, worker = ahead.popleft()
            return batch, worker.receive()

        for batch, worker in zip(batches, cycle(pool)):
            if len(ahead) == 2 * workers:
                yield finished()
            worker.send(batch.texts)
            batch.texts = []  # they live on in the worker
            ahead.append((batch, worker))
        while ahead:
            yield finished()


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

    def send(self, texts: list[str]) -> None:
        try:
            self._pipe.send(texts)
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
    received: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    # Received in a thread, so that the parent never waits to send while this waits to send to it.
    threading.Thread(target=_receive, args=(pipe, received), daemon=True).start()
    encode = batch_encoder(job, open_tokenizer(job.tokenizer, job.fast))
    while True:
        try:
            result: EncodedBatch | DataError = encode(received.get())
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
