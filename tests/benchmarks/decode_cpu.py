"""Decoding over a long cache on CPU: keys read per step, counted where they are read, and time per token.

    python -m tests.benchmarks.decode_cpu [--counts 1024 .. 1048576] [--times 2048 .. 131072] [--threads 1]

One document of c = (8, 8, 8, 8) with fixed k; the cache is filled with random keys and values, since what is read does not
depend on where they come from. Counts are those of a layer that recalls, per KV head. Times are the least CPU seconds of
this process over some steps of a whole model (8 heads, 2 KV heads of 64).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.generation import Decoder, LiveSequence
from unfold.model.decode.step import NewTokens, StepAttention
from unfold.model.gist.growing import raw_feed
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer

WORDS = 500  # ids from here on are gists
SIZES = (8, 8, 8, 8)
COUNTS = [2**n for n in range(10, 21)]
TIMES = [2**n for n in range(11, 18)]


def decoder(build: BuildContext, gist: GistConfig | None, layers: int = 4, head_dim: int = 64) -> Decoder:
    """A model with random weights. Every third piece starts a word, so that chunks are of uneven length."""
    config = ModelConfig(
        512, hidden_size=256, layers=layers, heads=8, kv_heads=2, head_dim=head_dim, attention="gist" if gist else "dense"
    )
    return Decoder(Transformer(config, build).eval(), gist, range(WORDS, 512), np.arange(512) % 3 == 0)


def filled(decoder: Decoder, raw: int) -> LiveSequence:
    """A sequence whose context of ``raw`` tokens was closed, with random keys and values."""
    sequence, generator = decoder.start(), torch.Generator().manual_seed(raw)
    tokens = torch.randint(WORDS, (raw,), generator=generator).tolist()
    sequence.take(sequence.placement.push(tokens, close=True) if decoder.gist else raw_feed(tokens, False))
    outline = sequence.cache.outline
    outline.append(sequence.level)
    for layer in sequence.cache.layers:
        for rows, count in zip(layer, outline.counts):
            shape = count, decoder.model.config.kv_heads, decoder.model.config.head_dim
            rows.append(*(torch.randn(shape, generator=generator, dtype=decoder.dtype) for _ in range(2)))
    return sequence


def keys_read(decoder: Decoder, sequence: LiveSequence, layer: int) -> float:
    """Keys that one new token reads in one layer, per KV head, counted by the cache."""
    config, cache = decoder.model.config, sequence.cache
    recalls = [decoder.rule is not None]
    attend = StepAttention([NewTokens(cache, cache.outline.append([-1], recalls))], decoder.rule, decoder.first)
    before = cache.reads.keys
    draw = torch.Generator().manual_seed(layer)
    widths = (config.heads, config.kv_heads, config.kv_heads)
    q, k, v = (torch.randn(1, 1, heads, config.head_dim, generator=draw) for heads in widths)
    attend(layer, q, k, v)
    return (cache.reads.keys - before) / config.kv_heads


def seconds_per_token(decoder: Decoder, raw: int, steps: int = 12) -> float:
    """Least CPU time of a step."""
    sequence = filled(decoder, raw)
    times = []
    for token in range(steps):
        sequence.pending = [token]
        start = time.process_time()
        decoder.step([sequence])
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--times", type=int, nargs="*", default=TIMES)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build = BuildContext.alone(1)
    recall, forget = GistConfig(SIZES, recall="suffix", topk=args.topk), GistConfig(SIZES)
    print("| raw tokens | keys read, recall | of these top gists | forgetting | dense |\n|---|---|---|---|---|")
    for raw in args.counts:
        small = decoder(build, recall, layers=2, head_dim=8)
        sequence = filled(small, raw)
        recalled, forgotten = (keys_read(small, sequence, layer) for layer in (1, 0))
        top = sequence.cache.outline.counts[0]
        print(f"| {raw} | {recalled:.0f} | {top} | {forgotten:.0f} | {raw + 1} |", flush=True)
    print("\n| raw tokens | ms per token, recall | forgetting | dense | dense / recall |\n|---|---|---|---|---|")
    for raw in args.times:
        times = [1e3 * seconds_per_token(decoder(build, gist), raw) for gist in (recall, forget, None)]
        print(f"| {raw} | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} | {times[2] / times[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
