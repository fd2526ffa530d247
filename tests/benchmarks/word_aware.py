"""What chunks that end where words do cost: tokens that a growing text reads twice, and the time in which gists are put in.

    python -m tests.benchmarks.word_aware --tokenizer build/tokenizer --shard build/sotu_valid [--chunk-sizes 8,4 16 32]

Counted on the documents of a shard, each of which grows token by token as generation makes it. *Read twice*: raw tokens that are
taken off again because no word started in time, of all raw tokens. *Steps that take back*: those in which that happens, of all.
--unspaced takes no token for the start of a word, as in languages that are written without spaces.
*Insertion*: of the whole shard at once, one thread, the median of many runs that take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from unfold.data_prep.format.shards import open_shard
from unfold.model.gist import GistConfig, interleave
from unfold.model.gist.growing import GistPlacement
from unfold.pretrain.config.sizes import parse_sizes
from unfold.pretrain.data.tokenizer import load_tokenizer


def growing(documents: Sequence[np.ndarray], gist: GistConfig, starts: np.ndarray, gists: Sequence[int]) -> tuple[int, int]:
    """Raw tokens that are read twice where every document grows token by token, and steps in which some are."""
    again = steps = 0
    for ids in documents:
        placement = GistPlacement(gist, starts, gists)
        for token in ids.tolist():
            drop = placement.push([token]).drop
            again, steps = again + drop, steps + (drop > 0)
    return again, steps


def medians_in_turn(calls: Sequence[Callable[[], object]], rounds: int = 300) -> list[float]:
    """Median seconds of each of some calls that take turns, so that other work on the machine meets all of them."""
    times = []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        times.append(np.diff(marks))
    return np.median(times, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shard", required=True)
    parser.add_argument("--chunk-sizes", nargs="+", default=["8,4", "16", "32"])
    parser.add_argument("--unspaced", action="store_true")
    args = parser.parse_args()
    shard, tokenizer = open_shard(args.shard), load_tokenizer(args.tokenizer, 0)
    documents = [shard.document(i).astype(np.int64) for i in range(shard.info.documents)]
    ids, lengths = np.concatenate(documents), [len(document) for document in documents]
    starts = tokenizer.word_starts & (not args.unspaced)
    print(f"{len(ids):,} raw tokens in {len(documents)} documents, {starts[ids].mean():.0%} start a word")
    print("| chunk sizes | word_aware | raw tokens per level-0 gist | read twice | steps that take back | insertion, ms |")
    print("|---|---|---|---|---|---|")
    for text in args.chunk_sizes:
        both = [GistConfig(parse_sizes(text), word_aware=word_aware) for word_aware in (True, False)]
        gists = tokenizer.gist_ids[: both[0].levels]
        insert = lambda gist: interleave(ids, lengths, starts, gist, gists)  # noqa: B023
        for gist, seconds in zip(both, medians_in_turn([partial(insert, gist) for gist in both])):
            again, steps = growing(documents, gist, starts, gists)
            each = len(ids) / (insert(gist).level == 0).sum()
            shares = f"{again / len(ids):.3%} | {steps / len(ids):.3%}"
            print(f"| {text} | {str(gist.word_aware).lower()} | {each:.2f} | {shares} | {seconds * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    main()
