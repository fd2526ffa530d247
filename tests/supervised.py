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


def linked_rows(number: int, seed: int = 0) -> list[dict]:
    """2 to 4 documents with a title, each of 1 to 3 sentences, every third row with a prefix, and a question about one."""
    draw = random.Random(seed)
    made = []
    for row in range(number):
        names = draw.sample(NAMES, draw.randint(2, 4))
        places = [draw.choice(PLACES) for _ in names]
        more = [" It was in autumn." * draw.randint(0, 2) for _ in names]
        documents = [{"title": a, "text": f"{a} went to {b}.{c}"} for a, b, c in zip(names, places, more)]
        asked = draw.randrange(len(names))
        prefix = {"prefix": "Read the documents."} if row % 3 == 0 else {}
        made.append({"documents": documents, **prefix, "question": f"Where did {names[asked]} go?", "answer": places[asked]})
    return made


def add_links(tiny: TinyData, directory: Path, links: int = 3) -> Path:
    """The tiny tokenizer with link ids."""
    module("data_prep", "import-tokenizer", "--input", tiny.tokenizer, "--output", directory, "--links", links)
    return directory


def make_linked_shard(tokenizer: Path, prefix: Path, number: int = 60, seed: int = 0) -> Path:
    """A shard of so many rows of linked documents; returns its prefix."""
    file = write_jsonl(prefix.with_suffix(".jsonl"), linked_rows(number, seed))
    command = ("tokenize-supervised", "--linked", "--input", file, "--tokenizer", tokenizer, "--output", prefix, "--no-plot")
    module("data_prep", *command)
    return prefix
