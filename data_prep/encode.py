"""Corpus to shards: documents in batches to worker processes, ids back in order, progress noted as it is made.

Batches are cut by size alone and come back in the order they were read, so the files do not depend on the number of
workers, nor on interruptions. Whether a document is held out depends on its text alone: on no order, no file name, no
other document.
"""

import errno
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from unfold.data_prep.batches import Batch, EncodedBatch, EncodeJob, Reject, make_batches
from unfold.data_prep.corpus.items import Document, Position
from unfold.data_prep.corpus.readers import read_items
from unfold.data_prep.corpus.sources import Source, split_sources
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.files import PARTIAL, Appended
from unfold.data_prep.format.index import ShardInfo
from unfold.data_prep.format.shards import ShardWriter
from unfold.data_prep.journal import Counts, Journal, Record, refuse_other_work
from unfold.data_prep.pool import encode_here, encode_in_pool
from unfold.data_prep.report import write_report
from unfold.data_prep.supervised import SupervisedJob, batch_encoder
from unfold.data_prep.tokenization.fast import SAMPLE_CHARACTERS, FastTokenizer, choose_backend
from unfold.data_prep.tokenization.load import load_tokenizer

COMMIT_SECONDS = 5.0  # at most this much work is lost to a kill
POOL_BYTES = 500_000_000  # of input, from which on processes pay for their start with the fast backend


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    shards: dict[str, ShardInfo]  # prefix -> sidecar
    counts: Counts
    seconds: float
    backend: str
    resumed: int  # documents that an earlier run had done
    resumed_bytes: int
    rejects: str | None  # the file that lists them
    files: list[str] = field(default_factory=list)  # report and picture

    @property
    def megabytes_per_second(self) -> float:
        """Text per second of this run, start-up included."""
        return (self.counts.text_bytes - self.resumed_bytes) / 1e6 / max(self.seconds, 1e-9)


def tokenize_corpus(
    sources: list[Source],
    tokenizer: str | Path,
    prefix: str | Path,
    *,
    workers: int = 1,
    valid_fraction: float | None = None,
    append_eos: bool = True,
    min_tokens: int = 0,
    max_tokens: int = 0,
    part: tuple[int, int] | None = None,
    on_error: str = "fail",
    backend: str = "auto",
    plot: bool = True,
    overwrite: bool = False,
    supervised: SupervisedJob | None = None,
    template: tuple[str, str] | None = None,
) -> Summary:
    """Turn a corpus into one shard, or two (PREFIX_train, PREFIX_valid) if a part is held out.

    A run that ends early, for whatever reason, keeps what it has done; the same call goes on there.

    Args:
        sources: the corpus (`sources.find_sources`).
        tokenizer: what `load_tokenizer` takes.
        workers: encoding processes; 1 encodes in this one (as the fast backend does where there is little to do). The
            files are the same for any number.
        valid_fraction: share of the documents to hold out, in (0, 1); None makes one shard.
        append_eos: end each document with the end-of-document id, if the tokenizer has one.
        min_tokens, max_tokens: documents of fewer or more tokens are left out and counted; 0: no bound.
        part: (i, n) makes the i-th of n parts, as PREFIX-0000i-of-0000n.
        on_error: 'fail', or 'skip': list documents that cannot be used, and go on.
        backend: 'auto', 'exact' or 'fast' (`fast.choose_backend`). The files are the same for any.
        plot: also draw the histogram of lengths.
        supervised: how rows become documents, where the sources give fields. A document of more than max_tokens then cannot be
            used, unless its context may be cut.
        template: (source, name) of what writes chats among the texts.

    Raises:
        DataError: any bad input; what was finished is kept.
    """
    begin = time.monotonic()
    encoder = load_tokenizer(tokenizer)
    corpus = sources
    if part:
        sources = split_sources(sources, *part)
        prefix = f"{prefix}-{part[0]:05d}-of-{part[1]:05d}"
    append_eos = append_eos and encoder.info.eos_id is not None
    job = EncodeJob(str(tokenizer), append_eos, valid_fraction, min_tokens, max_tokens, supervised=supervised, template=template)
    batch_encoder(job, encoder)  # refuses a bad template before anything is opened
    with ExitStack() as stack:
        settings = _settings(sources or corpus, job, encoder.info)
        run = _Run(stack, sources, str(prefix), job, encoder.info, on_error, overwrite, settings, may_be_empty=part is not None)
        items = read_items(sources, run.position)
        sample, items = _peek(items) if backend != "exact" else ([], items)
        encoder, backend_line = choose_backend(encoder, backend, sample)
        job = replace(job, fast=isinstance(encoder, FastTokenizer))
        if job.fast and sum(source.size for source in sources) < POOL_BYTES:
            workers = 1  # it is done before other processes would have begun
        batches = make_batches(items, stop_at_problem=on_error == "fail")
        encoded = encode_here(job, encoder, batches) if workers == 1 else encode_in_pool(job, batches, workers)
        run.consume(encoded)
        return run.finish(begin, backend_line, plot)


def _peek(items: Iterator[Document]) -> tuple[list[str], Iterator[Document]]:
    """Texts from the beginning, for the check of a fast backend, and the items with these still in front."""
    taken, characters = [], 0
    for item in items:
        taken.append(item)
        characters += len(item.text)
        if characters >= SAMPLE_CHARACTERS or len(taken) >= 4096:
            break
    return [item.text[:SAMPLE_CHARACTERS] for item in taken], itertools.chain(taken, items)


class _Run:
    """Outputs, journal and counts of one run."""

    def __init__(
        self,
        stack: ExitStack,
        sources: list[Source],
        prefix: str,
        job: EncodeJob,
        info,
        on_error: str,
        overwrite: bool,
        settings: dict,
        may_be_empty: bool,
    ):
        """Claim the outputs and go to where an earlier run stopped.

        Args:
            settings: what decides the bytes of the output.
            may_be_empty: an output without documents is one of many parts; whoever merges them judges the whole.
        """
        self.sources, self.prefix, self.job, self.on_error = sources, prefix, job, on_error
        self._may_be_empty = may_be_empty
        names = [prefix] if job.valid_fraction is None else [f"{prefix}_train", f"{prefix}_valid"]
        self.writers = [
            stack.enter_context(
                ShardWriter(
                    name,
                    vocab_size=info.vocab_size,
                    tokenizer_hash=info.hash,
                    eos_appended=job.append_eos,
                    sources=list(dict.fromkeys(s.path for s in sources)),
                    overwrite=overwrite,
                    resumable=True,
                    supervised=job.supervised is not None,
                )
            )
            for name in names
        ]
        self.counts, self.position = Counts(), Position()
        self._journal = Journal(prefix, settings, [s.fingerprint() for s in sources])
        stack.callback(self._journal.close)
        self._rejects = Appended(Path(f"{prefix}.rejects.jsonl"))
        stack.callback(self._rejects.close)
        self._take_up(overwrite)
        total = sum(s.size for s in sources)
        done = sum(s.size for s in sources[: self.position.source])
        self._bar = stack.enter_context(tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="tokenize", disable=None))
        self._named = False  # whether the outputs have their names
        stack.callback(self._leave)

    def _leave(self) -> None:
        """However the run ends: where nothing was finished, no trace stays."""
        if not (self._committed or self._named):
            self._drop()

    def _take_up(self, overwrite: bool) -> None:
        if self._journal.differing and not overwrite:
            for writer in self.writers:
                writer.leave()
            refuse_other_work(self._journal, self.prefix)
        record = self._journal.last([w.committed for w in self.writers], self._rejects.size)
        outputs = record.outputs if record else [(0, 0)] * len(self.writers)
        for writer, (size, documents) in zip(self.writers, outputs, strict=True):
            writer.cut(size, documents)
        self._rejects.cut(record.rejects if record else 0)
        self._journal.restart(record)
        if record:
            self.counts, self.position = record.counts, record.position
        self.resumed, self.resumed_bytes = self.counts.documents, self.counts.text_bytes
        self._committed, self._between_batches = record is not None, True

    def consume(self, encoded: Iterator[tuple[Batch, EncodedBatch]]) -> None:
        """Write what comes; whatever ends the run, note how far it has come."""
        begin = last = time.monotonic()
        try:
            for batch, result in encoded:
                self._take(batch, result)
                now = time.monotonic()
                if now - last >= COMMIT_SECONDS:
                    self._commit()
                    last = time.monotonic()
                tokens = sum(w.tokens for w in self.writers)
                self._bar.set_postfix_str(f"{tokens / (now - begin) / 1e6:.2f}M tokens/s", refresh=False)
                self._bar.update(batch.consumed)
        except OSError as e:
            self._keep()
            if e.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise DataError(
                    f"{self.prefix}: {e.strerror}; {self._kept_words()}: make room and run the same command again"
                ) from None
            raise
        except DataError as e:
            self._keep()
            raise DataError(f"{e} ({self._kept_words()})" if self._committed else str(e)) from None
        except BaseException:  # a signal
            self._keep()
            raise

    def _take(self, batch: Batch, result: EncodedBatch) -> None:
        self._between_batches = False
        rejects = [Reject(*batch.origins[i], reason) for i, reason in result.rejects] + batch.rejects
        rejects.sort(key=lambda reject: reject[:2])
        if rejects and self.on_error == "fail":
            first = rejects[0]
            self._between_batches = True  # nothing of this one was taken
            raise DataError(f"{self.sources[first.source].place(first.line)}: {first.reason}")
        for writer, part in zip(self.writers, result.parts, strict=True):
            writer.append(part.ids, part.lengths, part.spans)
        for reject in rejects:
            entry = {"place": self.sources[reject.source].place(reject.line), "reason": reject.reason}
            self._rejects.append((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        self.counts.add(result.counts)
        self.counts.add(Counts(documents=batch.documents, filtered=batch.filtered, rejected=len(rejects)))
        self.position = batch.after
        self._between_batches = True

    def _commit(self) -> None:
        self._rejects.sync()
        outputs = tuple(writer.commit() for writer in self.writers)
        self._journal.write(Record(self.position, self.counts, outputs, self._rejects.size))
        self._committed = True

    def _keep(self) -> None:
        """Commit if there is anything to keep."""
        # In the middle of a batch (a full disk, a signal) only the last commit holds.
        if self._between_batches and any(writer.documents for writer in self.writers):
            with suppress(OSError):
                self._commit()

    def _drop(self) -> None:
        for writer in self.writers:
            writer.discard()
        self._journal.remove()
        self._rejects.remove()

    def _kept_words(self) -> str:
        return f"{self.counts.documents:,} documents are done and kept" if self._committed else "nothing was written"

    def finish(self, begin: float, backend: str, plot: bool) -> Summary:
        """Give everything its name."""
        if not self._may_be_empty:
            try:
                _check_filled(self.writers, self.counts, self.job.valid_fraction)
            except DataError:
                self._committed = False  # going on would end here again
                raise
        shards = {writer.prefix: writer.finish(may_be_empty=self._may_be_empty) for writer in self.writers}
        self._named = True
        rejects = None
        if self._rejects.size:
            rejects = str(self._rejects.path).removesuffix(PARTIAL)
            self._rejects.close()
            self._rejects.path.replace(rejects)
        else:
            self._rejects.remove()
            Path(f"{self.prefix}.rejects.jsonl").unlink(missing_ok=True)
        self._journal.remove()
        seconds = time.monotonic() - begin
        summary = Summary(shards, self.counts, seconds, backend, self.resumed, self.resumed_bytes, rejects)
        lengths = {writer.prefix: writer.lengths for writer in self.writers}
        summary.files.extend(write_report(self.prefix, summary, lengths, plot))
        return summary


def _settings(sources: Sequence[Source], job: EncodeJob, info) -> dict:
    """What decides the bytes of the output, as JSON values."""
    first = sources[0]
    return {
        "tokenizer": info.hash,
        "end of document": job.append_eos,
        "--valid-fraction": job.valid_fraction,
        "--min-tokens": job.min_tokens,
        "--max-tokens": job.max_tokens,
        "--text-key": first.text_key,
        "--document-separator": first.separator,
        "--where": [str(condition) for condition in first.where],
        "--max-document-mb": first.limit,
        "input": first.path if len(sources) == 1 else None,
        "--template": job.template[0] if job.template and first.chats else None,
        "way to make supervised documents": asdict(job.supervised) if job.supervised else None,
    }


def _check_filled(writers: list[ShardWriter], counts: Counts, valid_fraction: float | None) -> None:
    """Raise DataError, before anything is given its name, if an output would stay empty."""
    left_out = {"empty": counts.empty, "filtered": counts.filtered, "too short": counts.short, "too long": counts.long,
                "rejected": counts.rejected}  # fmt: skip
    used = counts.documents - sum(left_out.values())
    if used == 0:
        why = ", ".join(f"{n} {name}" for name, n in left_out.items() if n) or "no document at all"
        raise DataError(f"--input: not one document with text in it ({counts.documents} documents: {why})")
    for writer in writers:
        if writer.documents == 0:
            raise DataError(
                f"--valid-fraction {valid_fraction}: of {used} documents none falls to "
                f"{writer.prefix}; choose a fraction further from {0 if writer is writers[1] else 1}, "
                "or give more documents"
            )
