"""``evaluate tasks``: questions on long contexts of local files, answered and scored, every variant beside the others."""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.pretrain.data.chat import add_chat_arguments
from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.answering import Reader, show_prompts
from unfold.pretrain.evaluate.longbench import RANGES, length_range
from unfold.pretrain.evaluate.metrics import METRICS
from unfold.pretrain.evaluate.output import Written, bar_chart, cost_table, make_output, table, write_json
from unfold.pretrain.evaluate.subject import Subject, add_subject_arguments, load_subject
from unfold.pretrain.parts import add_decoding_arguments

if TYPE_CHECKING:
    from unfold.pretrain.evaluate.items import Item

TOTAL = "mean of data sets"


@dataclass(frozen=True)
class Prompt:
    """One question as raw tokens, the same for every variant.

    Attributes:
        left_out: tokens that were cut from the middle of the context.
    """

    item: Item
    context: list[int]
    question: list[int]
    left_out: int


def add_arguments(parser: ArgumentParser) -> None:
    """The sub-command's flags."""
    add_subject_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--tasks",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="questions in the layout of LongBench or RULER, or on several documents",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON: data set -> prompt (LongBench's dataset2prompt.json)")
    parser.add_argument("--answer-lengths", type=Path, metavar="FILE", help="JSON: data set -> tokens (its dataset2maxlen.json)")
    parser.add_argument("--metric", choices=tuple(METRICS), help="instead of each data set's own")
    parser.add_argument("--max-length", type=int, metavar="N", help="raw tokens, answer included (default: max_position)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each file at most (default: all)")
    add_chat_arguments(parser)


def tasks(args: Namespace) -> Iterator[str]:
    """Answer, score and write; yields lines to print.

    Raises:
        UserError: the model, a file or a setting cannot be used; names file and line.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: is below 1")
    items = _read(args)  # wrong files are told before the model is loaded
    make_output(args.output)
    subject = load_subject(args)
    longest = args.max_length or subject.max_position
    subject.check_length(longest, f"--max-length {longest}")
    prompts = [make_prompt(subject, item, longest) for item in items]
    if args.show_prompt:
        first: dict[str, Prompt] = {}
        for prompt in prompts:
            first.setdefault(prompt.item.dataset, prompt)
        yield from show_prompts(subject, {f"{prompt.item.place}, {name}": prompt for name, prompt in first.items()})
        return
    answers, results = {}, []
    for variant in subject.variants:
        reader = Reader(subject, variant)
        answers[variant.name] = answer_all(reader, prompts)
        cost = reader.recorder.to_dict()  # before another variant's memory counts
        results.append({**variant.to_dict(), **summary(prompts, answers[variant.name]), "cost": cost})
    truncated = sum(bool(prompt.left_out) for prompt in prompts)
    counts = {"chat": subject.chat is not None, "max_length": longest, "questions": len(prompts), "truncated": truncated}
    with Written(args.output) as written:
        write_predictions(args.output / "predictions.jsonl", prompts, answers)
        write_json(
            args.output / "tasks.json", {**subject.to_dict(), "chat": subject.chat is not None, **counts, "results": results}
        )
        groups = [*results[0]["datasets"], TOTAL]
        bars = {r["name"]: [*(d["score"] for d in r["datasets"].values()), r["score"]] for r in results}
        bar_chart(args.output / "tasks.png", groups, bars, (f"{subject.name}: tasks", "score, percent"))
    yield f"{subject.name}: {len(prompts)} questions; {truncated} contexts were cut in the middle to {longest:,} raw tokens"
    yield ""
    yield from table(*rows(results))
    yield ""
    yield from cost_table(results)
    yield ""
    yield written.files("tasks.json", "tasks.png", "predictions.jsonl")


def _read(args: Namespace) -> list[Item]:
    from unfold.pretrain.evaluate.items import read_items

    prompts = _map(args.prompts, "--prompts", str)
    lengths = _map(args.answer_lengths, "--answer-lengths", int)
    items = []
    for path in args.tasks:
        of_file = list(read_items(path, prompts, lengths, args.metric))
        items += of_file[: args.limit]
    return items


def _map(path: Path | None, flag: str, kind: type) -> dict:
    """A JSON object whose values are of one kind; empty when there is no file."""
    if path is None:
        return {}
    from unfold.pretrain.evaluate.texts import read_text

    try:
        content = json.loads(read_text(path, flag))
    except ValueError as error:
        raise UserError(f"{flag} {path}: is not JSON ({error})") from None
    if not isinstance(content, dict) or not all(type(value) is kind and value for value in content.values()):
        raise UserError(f"{flag} {path}: expected an object of data sets, each with {'a text' if kind is str else 'a number'}")
    return content


def make_prompt(subject: Subject, item: Item, longest: int) -> Prompt:
    """A question as raw tokens: of a context that is too long, beginning and end stay in equal parts, as LongBench cuts.

    Raises:
        UserError: question and answer alone are too long.
    """
    try:
        context, question = subject.prompt(item.context, item.question, item.opening, item.kind.chat)
    except UserError as error:
        raise UserError(f"{item.place}: {error}") from None
    room = longest - len(question) - item.kind.max_new_tokens
    if room < 1 or not question:
        what = "has no token" if not question else f"takes {len(question)} raw tokens, its answer {item.kind.max_new_tokens}"
        raise UserError(f"{item.place}: the question {what}; with a context they must fit into {longest} (--max-length)")
    left_out = max(0, len(context) - room)
    if left_out:
        half = room // 2
        context = context[: room - half] + context[len(context) - half :]
    return Prompt(item, context, question, left_out)


def answer_all(reader: Reader, prompts: Sequence[Prompt]) -> list[str]:
    """What is written after each prompt."""
    answers = []
    for prompt in prompts:
        sequence = reader.read(prompt.context, prompt.question)
        answers.append(reader.write(sequence, prompt.item.kind.max_new_tokens))
    return answers


def scores(item: Item, answer: str) -> dict[str, float]:
    """Metric -> percent; the item's own metric first."""
    return {metric.name: 100 * metric(answer, item.answers, item.classes) for metric in item.kind.metrics}


def summary(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict:
    """A variant's results: by data set, and the mean of these."""
    found: dict[str, list[tuple[Prompt, dict[str, float]]]] = {}
    for prompt, answer in zip(prompts, answers):
        found.setdefault(prompt.item.dataset, []).append((prompt, scores(prompt.item, answer)))
    datasets = {}
    for name, several in found.items():
        metrics = list(several[0][1])
        means = {metric: statistics.fmean(values[metric] for _, values in several if metric in values) for metric in metrics}
        truncated = sum(bool(prompt.left_out) for prompt, _ in several)
        datasets[name] = {"score": means[metrics[0]], "metrics": means, "questions": len(several), "truncated": truncated}
        if parts := _by_length(several):
            datasets[name]["by_length"] = parts
    return {"score": statistics.fmean(entry["score"] for entry in datasets.values()), "datasets": datasets}


def _by_length(several: Sequence[tuple[Prompt, dict[str, float]]]) -> dict[str, dict]:
    """Scores of the ranges of length, where a data set is scored by them (LongBench-E)."""
    found: dict[str, list[float]] = {}
    for prompt, values in several:
        if prompt.item.words is not None:
            found.setdefault(length_range(prompt.item.words), []).append(next(iter(values.values())))
    scored = [(name, found[name]) for name, _ in RANGES if name in found]
    return {name: {"score": statistics.fmean(values), "questions": len(values)} for name, values in scored}


def write_predictions(path: Path, prompts: Sequence[Prompt], answers: dict[str, list[str]]) -> None:
    """A line per question: what every variant wrote, and how it scores."""
    with path.open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            item = prompt.item
            written = {name: {"text": several[i], **scores(item, several[i])} for name, several in answers.items()}
            line = {
                "place": item.place,
                "dataset": item.dataset,
                "answers": item.answers,
                "context_tokens": len(prompt.context),
                "left_out": prompt.left_out,
                "written": written,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def rows(results: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: data sets and metrics down, variants across."""
    head = ["data set", "metric", "questions", "truncated", *(r["name"] for r in results)]
    body = []
    for name, entry in results[0]["datasets"].items():
        for metric in entry["metrics"]:
            figures = [f"{r['datasets'][name]['metrics'][metric]:.2f}" for r in results]
            body.append([name, metric, str(entry["questions"]), str(entry["truncated"]), *figures])
        for part, of_part in entry.get("by_length", {}).items():
            figures = [f"{r['datasets'][name]['by_length'][part]['score']:.2f}" for r in results]
            body.append([f"{name} {part}", next(iter(entry["metrics"])), str(of_part["questions"]), "", *figures])
    totals = [f"{r['score']:.2f}" for r in results]
    return head, [*body, [TOTAL, "", "", "", *totals]]
