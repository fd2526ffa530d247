"""Tokens per second of whole models that generate, launched operation by operation and replayed from CUDA graphs.

    python -m tests.benchmarks.gpu.generate_times [--raw 32768 131072] [--batch 1 8] [--seconds 60] [--output FILE]

Layers as wide as Llama-3.1-8B's, four of them, random weights. Contexts are not read: caches are filled with random keys and
values. Contestants: *SDPA*, dense, PyTorch's flash decoding over caches of one fixed length in the same model, its step captured
in the same way; *dense*, *forgetting* and *recall* as ``generate`` runs them (Decoder.stream). ``ms`` is the time between rounds
of tokens, ``step_ms`` that of the step alone, replayed without the host's part. ``captured`` says whether graphs were captured
and did what the step does; ``same_tokens`` is the share of tokens that equal those of the first way, all where it is captured.
(Another backend, as in the way "as before" on a CPU, may choose otherwise where two logits of bf16 are nearly equal.) Kernels are
compiled first, in parallel processes. On a CPU machine (TRITON_INTERPRET=1 and small sizes) the same course, with times that mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.gpu.recall import sdpa
from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.generation import Decoder, LiveSequence, Sampling
from unfold.model.decode.replay import Replays
from unfold.model.decode.rounds import Frames
from unfold.model.layers import BuildContext
from unfold.model.transformer import Transformer

GIST = GistConfig((8, 4), recall="suffix")
CONTESTANTS = {"dense": None, "forgetting": replace(GIST, recall="none"), "recall": GIST}
WARM = 4  # rounds before the clock starts


def build_model(own: SimpleNamespace) -> Transformer:
    """Random weights, made where they are used."""
    config = ModelConfig(
        own.vocab, hidden_size=own.hidden, layers=own.layers, heads=own.heads, kv_heads=own.kv_heads, head_dim=own.dim,
        ffn_size=own.ffn, max_position=1 << 20,
    )  # fmt: skip
    model = Transformer(config, replace(BuildContext.alone(), blank=True)).to_empty(device=own.device).to(own.dtype).eval()
    generator = torch.Generator(own.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02 if weight.shape[1] > 512 else 0.1, generator=generator)
    return model


def levels_of(raw: int, sizes: Sequence[int], sink: int) -> np.ndarray:
    """Levels of a closed context of about so many raw tokens, all of whose chunks are full."""
    group = [-1] * sizes[0] + [0]
    for level, size in enumerate(sizes[1:], 1):
        group = group * size + [level]
    return np.array([-1] * sink + group * max(1, raw // int(np.prod(sizes))))


def filled(decoder: Decoder, raw: int, memory: Sequence[Sequence[Tensor]] | None = None) -> LiveSequence:
    """A sequence with random keys and values, at the beginning of an answer. memory: what rows lie in, to share it."""
    sequence = decoder.start()
    gist = decoder.gist
    level = np.append(levels_of(raw, gist.chunk_sizes, gist.sink) if gist else np.full(raw, -1), -1)
    sequence.ids, sequence.level = [1] * len(level), level.tolist()
    sequence.recalls = [False] * len(level)
    sequence.cache.outline.append(level)
    for index, layer in enumerate(sequence.cache.layers):
        for segment, (rows, count) in enumerate(zip(layer, sequence.cache.outline.counts)):
            if memory is not None:
                rows.buffer.memory, rows.buffer.length = memory[index][segment], count
                continue
            rows.buffer.reserve(count + (512 if rows is layer[-1] else 0))
            rows.buffer.memory.normal_()
            rows.buffer.length = count
    sequence.logits = torch.randn(decoder.model.config.vocab_size, device=decoder.device).to(decoder.dtype)
    return sequence


def rewind(sequence: LiveSequence, tokens: int, logits: Tensor) -> None:
    """Forget what was generated; tokens: those before it."""
    drop = len(sequence.ids) - tokens
    sequence.cache.drop(drop)
    del sequence.ids[tokens:], sequence.level[tokens:], sequence.recalls[tokens:]
    if sequence.placement is not None:
        sequence.placement.chunk.clear(), sequence.placement.chunk_recalls.clear()
    sequence.pending, sequence.logits = [], logits


def wait(own: SimpleNamespace) -> None:
    if own.device == "cuda":
        torch.cuda.synchronize()


def timed_stream(decoder: Decoder, sequences: list[LiveSequence], own: SimpleNamespace) -> tuple[list[int], float]:
    """The tokens, and milliseconds per round."""
    tokens, begin, batch = [], 0.0, len(sequences)
    for _, token in decoder.stream(sequences, Sampling(WARM + own.tokens)):
        tokens.append(token)
        if len(tokens) == WARM * batch:
            begin = time.perf_counter()
    return tokens, 1e3 * (time.perf_counter() - begin) / own.tokens


def step_milliseconds(run: Callable[[], object], own: SimpleNamespace, repeats: int = 40) -> float:
    repeats = repeats if own.device == "cuda" else 1
    run()
    wait(own)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(own)
    return 1e3 * (time.perf_counter() - begin) / repeats


def with_frames(decoder: Decoder, capture: bool) -> Decoder:
    """In the interpreter too, where a decoder has none by itself."""
    decoder.frames = Frames(decoder, capture)
    return decoder


def measure(name: str, model: Transformer, raw: int, batch: int, own: SimpleNamespace) -> list[dict]:
    """One contestant of ours, captured and not."""
    results, want, sequences = [], None, []
    for way in own.ways:
        decoder = Decoder(model, CONTESTANTS[name], [own.vocab - 1, own.vocab - 2], np.zeros(own.vocab, bool))
        if way == "as before":
            decoder.frames = None
        else:
            with_frames(decoder, way == "captured")
        if not sequences:
            sequences = [filled(decoder, raw) for _ in range(1 if own.shared else batch)]
            held = [[rows.memory for rows in layer] for layer in sequences[0].cache.layers]
            sequences += [filled(decoder, raw, held) for _ in range(batch - len(sequences))]
            kept = [(len(s.ids), s.logits) for s in sequences]
        for sequence, (count, logits) in zip(sequences, kept):
            rewind(sequence, count, logits)
        begin = time.perf_counter()
        tokens, ms = timed_stream(decoder, sequences, own)
        result = dict(name=name, way=way, raw=raw, batch=batch, ms=round(ms, 3), tokens_per_s=round(1e3 * batch / ms, 1))
        result["whole_s"] = round(time.perf_counter() - begin, 2)
        if decoder.frames:
            (frame,) = decoder.frames.made.values()
            result["graphs"], result["captured"] = len(decoder.frames.replays.graphs), decoder.frames.replays.capture
            if frame.left > 42:
                result["step_ms"] = round(step_milliseconds(frame.run, own), 3)
        want = want or tokens
        same = sum(a == b for a, b in zip(want, tokens)) / len(tokens)
        results.append(result | dict(same_tokens=round(same, 4)))
        if own.device == "cuda":
            results[-1]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return results


@dataclass
class SdpaStep:
    """A greedy step of a dense model over caches of one length, [layers][2, B, Hkv, rows, D], by PyTorch's SDPA.

    An unfold.model.decode.replay.Replayable.
    """

    model: Transformer
    caches: list[Tensor]
    ids: Tensor  # [B]
    position: Tensor  # [1]

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """An Attend: q [1, B, H, D], k, v [1, B, Hkv, D] -> [1, B, H, D]"""
        keys, values = self.caches[index]
        keys.index_copy_(2, self.position, k[0][:, :, None])
        values.index_copy_(2, self.position, v[0][:, :, None])
        return sdpa(q[0][:, :, None], keys, values)[:, :, 0][None]

    @torch.no_grad()
    def step(self) -> None:
        hidden = self.model.run_layers(self.ids[None], self.position.expand(1, len(self.ids)), self)[:, 0]
        self.ids.copy_(self.model.head_logits(hidden).argmax(1))

    def rest(self) -> None:
        """It may be stepped on from any state."""

    def kept(self) -> list[Tensor]:
        return [self.ids]

    def spoil(self) -> None:
        for cache in self.caches:
            cache.index_fill_(3, self.position, torch.nan)


def measure_sdpa(model: Transformer, raw: int, batch: int, own: SimpleNamespace) -> list[dict]:
    results = []
    shape = 2, batch, own.kv_heads, raw + 1, own.dim
    caches = [torch.randn(shape, device=own.device, dtype=own.dtype) for _ in range(own.layers)]
    for way in ("eager", "captured"):
        ids = torch.ones(batch, dtype=torch.int64, device=own.device)
        step = SdpaStep(model, caches, ids, torch.full((1,), raw, device=own.device))
        replays = Replays(torch.device(own.device), way == "captured")
        run = replays.prepare("sdpa", step)
        ms = step_milliseconds(run, own, own.tokens)
        result = dict(name="SDPA", way=way, raw=raw, batch=batch, step_ms=round(ms, 3), tokens_per_s=round(1e3 * batch / ms, 1))
        results.append(result | dict(captured=replays.capture))
    return results


def compile_one(job: tuple[str, int, int, SimpleNamespace]) -> str | None:
    """Compile what a contestant needs by running it with narrow layers and one cache; what went wrong, if anything."""
    name, raw, batch, own = job
    narrow = SimpleNamespace(**vars(own) | dict(hidden=256, ffn=256, layers=2, vocab=512, tokens=1, ways=["eager"], shared=True))
    try:
        measure(name, build_model(narrow), raw, batch, narrow)
    except Exception as error:
        return f"{name} {raw} {batch}: {type(error).__name__}: {error}".split("\n")[0][:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--raw", type=int, nargs="+", default=[32768, 131072])
    add("--batch", type=int, nargs="+", default=[1, 8])
    for flag, size in (("hidden", 4096), ("ffn", 14336), ("layers", 4), ("heads", 32), ("kv-heads", 8), ("dim", 128)):
        add(f"--{flag}", type=int, default=size)
    add("--vocab", type=int, default=32768)
    add("--tokens", type=int, default=64, help="rounds that are timed")
    add("--ways", nargs="+", default=["eager", "captured"])
    add("--only", nargs="+", help="names of contestants")
    add("--seconds", type=float, default=60, help="begin nothing after this")
    add("--output", type=Path, default=Path("generate_times.json"))
    args = parser.parse_args()
    begin, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    own = SimpleNamespace(**vars(args), device=device, dtype=torch.bfloat16, shared=False)
    names = [name for name in ("SDPA", *CONTESTANTS) if not args.only or name in args.only]
    shapes = [(raw, batch) for raw in args.raw for batch in args.batch]
    if device == "cuda":
        jobs = [(name, *shape, own) for shape in shapes for name in names if name != "SDPA"]
        with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            wrong = [w for w in pool.map(compile_one, jobs, chunksize=1) if w]
        print(f"compiled in {time.perf_counter() - begin:.0f} s; {wrong or 'all well'}", flush=True)
    model, results = build_model(own), []
    for raw, batch in shapes:
        for name in names:
            if time.perf_counter() - begin > args.seconds:
                print(f"{raw} {batch} {name}: left out, time is up", flush=True)
                continue
            try:
                new = measure_sdpa(model, raw, batch, own) if name == "SDPA" else measure(name, model, raw, batch, own)
            except Exception as error:
                new = [dict(name=name, raw=raw, batch=batch, refused=f"{type(error).__name__}: {error}".split("\n")[0][:300])]
            results += new
            for result in new:
                print(json.dumps(result), flush=True)
            args.output.write_text(json.dumps(results, indent=1))
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
