"""Worker processes that encode batches, results in order."""

import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from unfold.data_prep.batches import Batch, EncodedBatch, EncodeJob
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.tokenizer import Tokenizer
from unfold.data_prep.supervised import batch_encoder
from unfold.data_prep.tokenization.fast import open_tokenizer

HELD = 2  # batches that a worker has: the one it encodes, and the next
AHEAD = 8  # batches for each worker, at most, that were read and not written


def encode_here(job: EncodeJob, tokenizer: Tokenizer, batches: Iterable[Batch]) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Encode in a thread of this process, while the next batch is read and the last one written: tokenizer libraries release
    Python's lock."""
    encode = batch_encoder(job, tokenizer)
    with ThreadPoolExecutor(1) as thread:
        ahead: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
        for batch in batches:
            ahead.append((batch, thread.submit(encode, batch.texts)))
            if len(ahead) > HELD:
                batch, result = ahead.popleft()
                yield batch, result.result()
        for batch, result in ahead:
            yield batch, result.result()


def encode_in_pool(job: EncodeJob, batches: Iterable[Batch], workers: int) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Encode in processes, results in order. A batch goes to the worker that has least to do, so that one of long documents
    keeps no other waiting; results that wait for an earlier one are bounded in number, so that memory is."""
    with ExitStack() as stack:
        pool = [stack.enter_context(_Worker(job)) for _ in range(workers)]
        ahead: deque[_Task] = deque()
        for batch in batches:
            while len(ahead) == AHEAD * workers or all(len(worker.tasks) == HELD for worker in pool):
                _collect(pool)
                yield from _finished(ahead)
            task = _Task(batch)
            min(pool, key=lambda worker: len(worker.tasks)).send(task)
            ahead.append(task)
        while ahead:
            _collect(pool)
            yield from _finished(ahead)


@dataclass
class _Task:
    """A batch, and what became of it."""

    batch: Batch
    result: EncodedBatch | DataError | None = None


def _collect(pool: "list[_Worker]") -> None:
    """Wait until a worker is done with a batch, and take what all that are have to give."""
    for pipe in wait([worker.pipe for worker in pool if worker.tasks]):
        next(worker for worker in pool if worker.pipe is pipe).receive()


def _finished(ahead: deque[_Task]) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Take the batches from the front that are encoded."""
    while ahead and ahead[0].result is not None:
        task = ahead.popleft()
        if isinstance(task.result, DataError):
            raise task.result
        yield task.batch, task.result


class _Worker:
    """An encoding process on a pipe of its own.

    Not a concurrent.futures pool: its workers share one pipe, and one that is killed in the middle of a result leaves
    the reader waiting for the rest for ever. Here the pipe ends with its process, on either side.
    """

    def __init__(self, job: EncodeJob):
        # Started afresh rather than forked: tokenizer libraries have threads, which a fork would break.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.tasks: deque[_Task] = deque()  # sent and not yet received, in order
        self._process = context.Process(target=_work, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.pipe.close()
        self._process.join()

    def send(self, task: _Task) -> None:
        try:
            self.pipe.send(task.batch.texts)
        except OSError:
            raise self._died() from None
        task.batch.texts = []  # they live on in the worker
        self.tasks.append(task)

    def receive(self) -> None:
        """Wait for the result of the first batch that was sent."""
        try:
            self.tasks.popleft().result = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None

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
