"""How Megatron-LM's tools/preprocess_data.py works, for comparison: a pool, one line at a time, IndexedDatasetBuilder.

    python -m tests.benchmarks.megatron_way --input F.jsonl --tokenizer FILE --output PREFIX --workers N

The same steps as there: an initializer makes each process its tokenizer, `pool.imap(encode, lines, 32)`, the ids of each
document pickled back as a list, `add_document` in the parent. Its transformers wrapper is left out, in its favour.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


class Encoder:
    """Megatron's own class of this name, for one json key and without sentence splitting."""

    def __init__(self, path: str):
        self.path = path

    def initializer(self) -> None:
        """Each process loads the tokenizer."""
        if self.path.endswith(".model"):
            import sentencepiece

            Encoder.processor = sentencepiece.SentencePieceProcessor(model_file=self.path)
            Encoder.tokenize, Encoder.eod = Encoder.processor.encode, Encoder.processor.eos_id()
            return
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(self.path)
        Encoder.tokenize = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        Encoder.eod = tokenizer.token_to_id("<|endoftext|>")

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """One line to (ids, lengths, characters)."""
        ids = list(Encoder.tokenize(json.loads(line)["text"]))
        if ids:
            ids.append(Encoder.eod)
        return ids, [len(ids)], len(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--input", "--tokenizer", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    encoder = Encoder(args.tokenizer)
    builder = IndexedDatasetBuilder(f"{args.output}.bin", dtype=np.uint16)
    with open(args.input, encoding="utf-8") as lines, multiprocessing.Pool(args.workers, encoder.initializer) as pool:
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            if ids:
                builder.add_document(torch.IntTensor(ids), lengths)
    builder.finalize(f"{args.output}.idx")
    print(Path(f"{args.output}.bin").stat().st_size, file=sys.stderr)


if __name__ == "__main__":
    main()
