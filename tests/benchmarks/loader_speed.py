"""How fast samples come: reading, insertion of gists and layout, on one core.

    python -m tests.benchmarks.loader_speed [--raw-tokens 8192] [--micro-batch 1 4] [--chunk-sizes 8 4] [--seconds 3]

Makes a shard of random ids in documents of 100 to 3,000 tokens, and prints raw tokens per second of processor time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from unfold.data_prep.format.shards import write_shard
from unfold.model.gist import GistConfig
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.tokenizer import RunTokenizer

VOCAB, DOCUMENTS = 32_000, 20_000


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
    args = parser.parse_args()
    torch.set_num_threads(1)
    starts = np.random.default_rng(1).random(VOCAB) < 0.6
    gist_ids = tuple(range(len(args.chunk_sizes)))
    tokenizer = RunTokenizer(
        kind="huggingface", vocab_size=VOCAB, gist_ids=gist_ids, gist_tokens=(), bos_id=None, eos_id=None, pad_id=None,
        hash="hash", directory=Path("tokenizer"), word_starts=starts,
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


def _speed(make: Callable[[int], object], size: int, args: argparse.Namespace) -> float:
    """Million raw tokens per second of processor time; make: of the sample numbers n .. n + size."""
    sample, begin = 0, time.process_time()
    while time.process_time() - begin < args.seconds:
        make(sample)
        sample += size
    return sample * args.raw_tokens / (time.process_time() - begin) / 1e6


if __name__ == "__main__":
    main()
