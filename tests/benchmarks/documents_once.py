"""Time to the first token of a new question on documents: read for it, or read before and joined, on a CPU.

    python -m tests.benchmarks.documents_once [--documents 10] [--tokens 1000] [--questions 3] [--threads 1]

A model of random weights (4 layers, 8 heads, 2 KV heads of 64, c = (8, 4), 5 links a document); questions of 20 tokens recall.
Every question is put with the documents in another order. CPU seconds of this process, least of all questions:

- *all in place*: the documents' text as one context, folded and closed; then the question;
- *as parts, anew*: every document is read by itself, then all are joined; then the question;
- *read before*: the parts are there; they are joined; then the question. Also from files, as another process finds them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unfold.model.config import GistConfig, ModelConfig
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.gist.parts import Part
from unfold.model.transformer import build_model

WORDS = 500  # ids from here on are gists and links
QUESTION = 20  # raw tokens


@dataclass(frozen=True)
class Measured:
    """What one way of reading cost.

    Attributes:
        seconds: CPU time to the first token, least of the questions.
        tokens: that went through the model for one question, gists and links included.
    """

    seconds: float
    tokens: int


def make_decoder(positions: int) -> Decoder:
    """Random weights; every third piece starts a word, so that chunks are of uneven length."""
    shape = {"hidden_size": 256, "layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 64, "ffn_size": 704}
    model = build_model(ModelConfig(512, max_position=positions, **shape), seed=1).eval()
    gist = GistConfig((8, 4), recall="suffix")
    return Decoder(model, gist, range(WORDS, WORDS + 2), np.arange(512) % 3 == 0, link_ids=range(WORDS + 2, WORDS + 7))


def measure(documents: int, tokens: int, questions: int, directory: Path) -> dict[str, Measured]:
    """Every way of reading -> what it cost. directory: for the files of parts."""
    decoder = make_decoder(documents * (tokens + 5) + QUESTION + 64)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, WORDS, tokens).tolist() for _ in range(documents)]
    parts = [decoder.read_part(text) for text in texts]
    for number, part in enumerate(parts):
        part.save(directory / f"{number}.safetensors")
    asked = [(draw.permutation(documents).tolist(), draw.integers(0, WORDS, QUESTION).tolist()) for _ in range(questions)]

    def in_place(order: Sequence[int]):
        sequence = decoder.start()
        decoder.read_context(sequence, [token for i in order for token in texts[i]])
        return sequence

    load = lambda i: Part.load(directory / f"{i}.safetensors", decoder.identity)
    ways: dict[str, Callable] = {
        "all in place": in_place,
        "as parts, anew": lambda order: decoder.join([decoder.read_part(texts[i]) for i in order]),
        "read before, from files": lambda order: decoder.join([load(i) for i in order]),
        "read before": lambda order: decoder.join([parts[i] for i in order]),
    }
    return {name: first_token(decoder, way, asked) for name, way in ways.items()}


def first_token(decoder: Decoder, begin: Callable, asked: Sequence[tuple[list[int], list[int]]]) -> Measured:
    """begin: order of the documents -> the sequence that a question is put to."""
    passed: list[int] = []
    hook = decoder.model.embedding.register_forward_hook(lambda module, args, out: passed.append(args[0].numel()))
    times = []
    for order, question in asked:
        passed.clear()
        began = time.process_time()
        sequence = begin(order)
        decoder.read_suffix(sequence, question)
        next(decoder.stream([sequence], Sampling(1)))
        times.append(time.process_time() - began)
    hook.remove()
    return Measured(min(times), sum(passed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(args.documents, args.tokens, args.questions, Path(directory))
    print("| the documents are | seconds to the first token | times sooner | tokens through the model |\n|---|---|---|---|")
    whole = found["all in place"].seconds
    for name, cost in found.items():
        print(f"| {name} | {cost.seconds:.3f} | {whole / cost.seconds:.1f} | {cost.tokens:,} |")


if __name__ == "__main__":
    main()
