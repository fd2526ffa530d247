"""``evaluate passkey``: a key hidden in a long text, asked for at its end; by length of the text and depth of the key."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unfold.pretrain.data.chat import add_chat_arguments
from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.answering import Reader, show_prompts
from unfold.pretrain.evaluate.output import Written, cost_table, heat_maps, make_output, table, write_json
from unfold.pretrain.evaluate.subject import Subject, Variant, add_subject_arguments, load_subject
from unfold.pretrain.parts import add_decoding_arguments

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it.\n"
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION, OPENING = "\nWhat is the pass key?", " The pass key is"
SPARE = 4  # tokens that may be written beyond those of the key


@dataclass(frozen=True)
class Trial:
    """One question, the same for every variant.

    Attributes:
        context, question: raw tokens.
        candidates: ids of the key, which comes first, and of the keys that it is weighed against.
        key: its digits.
    """

    context: list[int]
    question: list[int]
    candidates: list[list[int]]
    key: str


def add_arguments(parser: ArgumentParser) -> None:
    """The sub-command's flags."""
    add_subject_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="raw tokens, question and answer included (default: up to max_position)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="where the key stands: 0 is the beginning, 1 the end (default 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--trials", type=int, default=5, metavar="N", help="keys per length and depth (default 5)")
    parser.add_argument("--digits", type=int, default=5, metavar="N", help="of a key (default 5)")
    parser.add_argument("--candidates", type=int, default=10, metavar="K", help="keys that are weighed, the true one too (10)")
    parser.add_argument("--haystack", type=Path, nargs="+", metavar="FILE", help="texts to hide keys in (default: a filler)")
    parser.add_argument("--seed", type=int, default=0, help="of the keys and of where the texts begin")
    add_chat_arguments(parser)


def passkey(args: Namespace) -> Iterator[str]:
    """Measure and write; yields lines to print.

    Raises:
        UserError: the model, a text or a setting cannot be used.
    """
    _check(args)
    make_output(args.output)
    subject = load_subject(args)
    full = subject.max_position
    lengths = args.lengths or sorted({max(1, full // 4), max(1, full // 2), full})
    for length in lengths:
        subject.check_length(length, f"--lengths {length}")
    trials = {
        (length, depth): [make_trial(subject, hay, length, depth, args, n) for n in range(args.trials)]
        for hay in [_haystack(subject, args.haystack)]
        for length in lengths
        for depth in args.depths
    }
    if args.show_prompt:
        yield from show_prompts(subject, {f"{n} tokens, depth {d:g}": several[0] for (n, d), several in trials.items()})
        return
    results = [measure(subject, variant, trials) for variant in subject.variants]
    settings = {name: getattr(args, name) for name in ("trials", "digits", "candidates", "seed")}
    with Written(args.output) as written:
        write_json(
            args.output / "passkey.json",
            {**subject.to_dict(), **settings, "lengths": lengths, "depths": args.depths, "results": results},
        )
        for score, title in (("exact", "exact digits"), ("first", f"likeliest of {args.candidates}")):
            maps = [(f"{r['name']}: {title}", grid(r["cells"], score, lengths, args.depths)) for r in results]
            heat_maps(args.output / f"passkey_{score}.png", maps, lengths, args.depths, ("raw tokens", "depth of the key"))
    yield f"{subject.name}: {args.trials} keys per length and depth; `first` is by chance {1 / args.candidates:.2f}"
    yield ""
    yield from table(*rows(results, lengths))
    yield ""
    yield from cost_table(results)
    yield ""
    yield written.files("passkey.json", "passkey_exact.png", "passkey_first.png")


def _check(args: Namespace) -> None:
    for name, least in (("trials", 1), ("digits", 1), ("candidates", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: is below {least}")
    if args.candidates > 9 * 10 ** (args.digits - 1):
        raise UserError(f"--candidates {args.candidates}: there are not so many keys of {args.digits} digits; raise --digits")
    for length in args.lengths or ():
        if length < 1:
            raise UserError(f"--lengths {length}: is below 1")
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--depths {depth}: is not between 0 and 1")


def _haystack(subject: Subject, files: list[Path] | None) -> list[int]:
    """Raw tokens that repeat without end."""
    from unfold.pretrain.evaluate.texts import read_text

    text = "\n\n".join(read_text(path, "--haystack") for path in files) if files else FILLER
    ids = subject.encode(text)
    if not ids:
        raise UserError(f"--haystack {' '.join(map(str, files))}: has no token; give some text")
    return ids


def make_trial(subject: Subject, haystack: Sequence[int], length: int, depth: float, args: Namespace, number: int) -> Trial:
    """A text of exactly ``length`` raw tokens, question and what is written included, a key at ``depth`` in it.

    Raises:
        UserError: so short a text does not hold the key and its question.
    """
    draw = np.random.default_rng([args.seed, length, round(depth * 10**6), number])
    low = 10 ** (args.digits - 1) if args.digits > 1 else 1
    keys = [str(low + int(i)) for i in draw.choice(9 * 10 ** (args.digits - 1), args.candidates, replace=False)]
    head, question = subject.prompt(INTRODUCTION, QUESTION, OPENING)
    needle = subject.encode(NEEDLE.format(key=keys[0]))
    candidates = [subject.continuation(QUESTION + OPENING, f" {key}") for key in keys]
    longest = max(map(len, candidates))
    room = length - len(head) - len(needle) - len(question) - longest - SPARE
    if room < 0:
        raise UserError(f"--lengths {length}: key, question and answer take {length - room} raw tokens; give a greater length")
    begin = int(draw.integers(len(haystack)))
    hay = [haystack[(begin + i) % len(haystack)] for i in range(room)]
    at = round(depth * room)
    starts = subject.tokenizer.word_starts
    while 0 < at < room and not starts[hay[at]]:  # never within a word
        at -= 1
    return Trial([*head, *hay[:at], *needle, *hay[at:]], question, candidates, keys[0])


def measure(subject: Subject, variant: Variant, trials: dict[tuple[int, float], list[Trial]]) -> dict:
    """A variant's entry in the results."""
    reader = Reader(subject, variant)
    cells = []
    for (length, depth), several in trials.items():
        outcomes = [answer(reader, trial) for trial in several]
        exact, ranks = zip(*outcomes)
        cells.append(
            {
                "length": length,
                "depth": depth,
                "exact": sum(exact) / len(exact),
                "first": ranks.count(1) / len(ranks),
                "mean_rank": sum(ranks) / len(ranks),
                "first_token_s": sum(reader.recorder.first[-len(several) :]) / len(several),
            }
        )
    overall = {score: sum(cell[score] for cell in cells) / len(cells) for score in ("exact", "first", "mean_rank")}
    return {**variant.to_dict(), **overall, "cells": cells, "cost": reader.recorder.to_dict()}


def answer(reader: Reader, trial: Trial) -> tuple[bool, int]:
    """(whether the key was written, its rank by likelihood among the candidates; 1 is the likeliest, ties count against it)."""
    sequence = reader.read(trial.context, trial.question)
    longest = max(map(len, trial.candidates))
    written = reader.write(sequence, longest + SPARE)
    likelihoods = reader.weigh(sequence, trial.candidates)
    return written_key(written) == trial.key, sum(value >= likelihoods[0] for value in likelihoods)


def written_key(text: str) -> str:
    """The first digits in a text, whole; empty if there are none."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def grid(cells: list[dict], score: str, lengths: list[int], depths: list[float]) -> list[list[float]]:
    """A score of all cells, [depth][length]."""
    values = {(cell["length"], cell["depth"]): cell[score] for cell in cells}
    return [[values[length, depth] for length in lengths] for depth in depths]


def rows(results: list[dict], lengths: list[int]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: both scores over all depths, by length."""
    head = ["pass key found", "score", *map(str, lengths), "all"]
    body = []
    for result in results:
        for score in ("exact", "first", "mean_rank"):
            at = [[cell[score] for cell in result["cells"] if cell["length"] == length] for length in lengths]
            figures = [f"{sum(values) / len(values):.2f}" for values in at]
            body.append([result["name"], score, *figures, f"{result[score]:.2f}"])
    return head, body
