"""How fast samples come: reading, insertion of gists and layout, on one core.

    python -m tests.benchmarks.loader_speed [--raw-tokens 8192] [--micro-batch 1 4] [--chunk-sizes 8 4] [--seconds 3] [--parts 10]

Makes a shard of random ids in documents of 100 to 3,000 tokens, and prints raw tokens per second of processor time. With --parts
there are supervised documents besides: contexts of 2,000 tokens before 48 of question and answer, closed as one, and linked in so
many parts, also in an order that is drawn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unfold.data_prep.format.shards import ShardWriter, write_shard
from unfold.data_prep.format.spans import Spans
from unfold.model.gist import GistConfig
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.tokenizer import RunTokenizer

VOCAB, DOCUMENTS = 32_000, 20_000
CONTEXT, ANSWERED, SUPERVISED = 2000, 2048, 2000  # tokens of a supervised document's context and of all of it; documents


def documents() -> list[np.ndarray]:
    """Ids of documents of many lengths."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(100, 3000, DOCUMENTS).astype(np.int32)
    return np.split(draw.integers(0, VOCAB, int(lengths.sum()), dtype=np.uint16), np.cumsum(lengths)[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw-tokens", type=int, default=8192)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--parts", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    starts = np.random.default_rng(1).random(VOCAB) < 0.6
    gist_ids = tuple(range(len(args.chunk_sizes)))
    tokenizer = RunTokenizer(
        kind="huggingface", vocab_size=VOCAB, gist_ids=gist_ids, gist_tokens=(), bos_id=None, eos_id=None, pad_id=None,
        hash="hash", directory=Path("tokenizer"), word_starts=starts, link_ids=tuple(range(10, 15)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name) / "s", documents(), vocab_size=VOCAB, tokenizer_hash="hash")
        source = TokenSource([f"{name}/s"], args.raw_tokens, 1, tokenizer, "data.train")
        builder = BatchBuilder(source, GistConfig(tuple(args.chunk_sizes)), tokenizer)
        builder.build([0])
        read = lambda n: source.read(source.segments(n))
        print(f"reading: {_speed(read, 1, args):.1f}M raw tokens/s of one core")
        for size in args.micro_batch:
            build = lambda n: builder.build(range(n, n + size))  # noqa: B023
            print(f"micro-batches of {size}: {_speed(build, size, args):.1f}M raw tokens/s of one core")
        if args.parts:
            _measure_linked(Path(name), tokenizer, args)


def _measure_linked(root: Path, tokenizer: RunTokenizer, args: argparse.Namespace) -> None:
    """Supervised documents, whose contexts are closed as one, linked, and linked in an order that is drawn."""
    linked = np.linspace(0, CONTEXT, args.parts + 1).astype(int).tolist()
    for kind, edges, shuffle in (("one context", [], False), ("linked", linked, False), ("linked and shuffled", linked, True)):
        prefix = root / kind.replace(" ", "_")
        with ShardWriter(str(prefix), vocab_size=VOCAB, tokenizer_hash="hash", eos_appended=False, supervised=True) as writer:
            ids = np.random.default_rng(0).integers(0, VOCAB, SUPERVISED * ANSWERED)
            spans = Spans.of([(CONTEXT, [(ANSWERED - 8, ANSWERED)])] * SUPERVISED, [edges] * SUPERVISED)
            writer.append(ids, np.full(SUPERVISED, ANSWERED), spans)
            writer.finish()
        source = TokenSource([str(prefix)], args.raw_tokens, 1, tokenizer, "data.train")
        gist = GistConfig(tuple(args.chunk_sizes), recall="suffix")
        builder = BatchBuilder(source, gist, tokenizer, shuffle_parts=shuffle)
        builder.build([0])
        build = lambda n: builder.build([n])  # noqa: B023
        print(f"supervised, {kind}: {_speed(build, 1, args):.1f}M raw tokens/s of one core")


def _speed(make: Callable[[int], object], size: int, args: argparse.Namespace) -> float:
    """Million raw tokens per second of processor time; make: of the sample numbers n .. n + size."""
    sample, begin = 0, time.process_time()
    while time.process_time() - begin < args.seconds:
        make(sample)
        sample += size
    return sample * args.raw_tokens / (time.process_time() - begin) / 1e6


if __name__ == "__main__":
    main()
