"""Small supervised data: who went where, asked after a context that tells it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.conftest import TinyData, module

NAMES = "Washington Adams Jefferson Madison Monroe Jackson Harrison Tyler Polk Taylor Pierce Lincoln Grant Hayes".split()
PLACES = "Boston Paris London Texas Ohio Maine Georgia Nevada".split()


def rows(number: int, seed: int = 0) -> list[dict]:
    """Contexts of 1 to 6 sentences with one or two questions each."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        names = draw.sample(NAMES, draw.randint(1, 6))
        places = [draw.choice(PLACES) for _ in names]
        context = " ".join(f"{a} went to {b} in the year {draw.randint(1790, 1900)}." for a, b in zip(names, places))
        asked = draw.sample(range(len(names)), min(len(names), draw.randint(1, 2)))
        turns = [{"question": f"Where did {names[i]} go?", "answer": places[i]} for i in asked]
        made.append({"context": context, "turns": turns})
    return made


def write_jsonl(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def make_shard(tiny: TinyData, prefix: Path, number: int = 120, seed: int = 0) -> Path:
    """A supervised shard of so many rows, made with the tiny tokenizer; returns its prefix."""
    file = write_jsonl(prefix.with_suffix(".jsonl"), rows(number, seed))
    module("data_prep", "tokenize-supervised", "--input", file, "--tokenizer", tiny.tokenizer, "--output", prefix, "--no-plot")
    return prefix
