"""``evaluate rag``: questions on retrieved documents of local files, every way of reading the documents beside the others."""

from __future__ import annotations

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unfold.data_prep.format.documents import DocumentTemplate
from unfold.data_prep.format.templates import SEPARATOR
from unfold.data_prep.format.text import spelled
from unfold.pretrain.data.chat import add_chat_arguments, shown_parts
from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.answering import Reader
from unfold.pretrain.evaluate.documents import DocumentQuestion, read_questions
from unfold.pretrain.evaluate.metrics import METRICS, Metric
from unfold.pretrain.evaluate.output import Written, bar_chart, cost_table, make_output, table, write_json
from unfold.pretrain.evaluate.subject import Subject, Variant, add_subject_arguments, load_subject
from unfold.pretrain.evaluate.tasks import TOTAL
from unfold.pretrain.parts import add_decoding_arguments

# Of a text that is no chat. In a chat nothing introduces the documents but a system message, and the question is put as it is.
INTRODUCTION = "Answer the question by the documents.\n\n"
QUESTION = "\nQuestion: {question}\nAnswer:"
SUBSPAN = Metric("subspan_em", METRICS["contains"].score)  # the best over the answers: 'best-subspan exact match'
SCORES = (SUBSPAN, METRICS["f1"])
READ = {"tokens_read": "tokens read", "tokens_reused": "reused", "documents_s": "seconds to read documents"}


@dataclass(frozen=True)
class RagPrompt:
    """One question as raw tokens, the same for every arm.

    Attributes:
        prefix: what stands before the documents.
        parts: the documents.
        question: what follows them.
    """

    item: DocumentQuestion
    prefix: list[int]
    parts: list[list[int]]
    question: list[int]

    @property
    def context(self) -> list[int]:
        """The joined text before the question."""
        return [*self.prefix, *(token for part in self.parts for token in part)]

    def shown(self, subject: Subject) -> Iterator[str]:
        """Lines for ``--show-prompt``."""
        documents = [(f"document {n}", part, "folded and closed; linked: by itself") for n, part in enumerate(self.parts, 1)]
        before = ("before the documents", self.prefix, "folded with them; linked: read as it is")
        yield from shown_parts(subject.show, [before, *documents, ("question", self.question, "recalls")])


@dataclass(frozen=True)
class Answer:
    """What was written, and what was read for it.

    Attributes:
        tokens_read: gists included, that went through the model for this question.
        tokens_reused: of documents that were read before.
        documents_s: seconds that reading them took, where they had to be; before the first token's time begins.
    """

    text: str
    tokens_read: int
    tokens_reused: int = 0
    documents_s: float = 0.0


class JoinedReader(Reader):
    """Reads the documents as one text, for every question anew."""

    def answer(self, prompt: RagPrompt, most: int) -> Answer:
        """What is written."""
        sequence = self.read(prompt.context, prompt.question)
        return Answer(self.write(sequence, most), len(sequence.ids))


class LinkedReader(Reader):
    """Reads every document once, by itself, and starts from what was read in whatever order."""

    def __init__(self, subject: Subject, variant: Variant):
        from unfold.model.decode.store import PartStore

        super().__init__(subject, variant)
        self._store = PartStore(self.decoder)

    def answer(self, prompt: RagPrompt, most: int) -> Answer:
        """What is written."""
        import torch  # late: this module is imported by every command

        began = time.perf_counter()
        parts = [self._store.get(part) for part in prompt.parts]
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        seconds = time.perf_counter() - began
        with self.recorder.reading():
            sequence = self.decoder.join(parts, prompt.prefix)
            self.decoder.read_suffix(sequence, prompt.question)
        reused = sum(map(len, parts))
        return Answer(self.write(sequence, most), len(sequence.ids) - reused, reused, seconds)


def add_arguments(parser: ArgumentParser) -> None:
    """The sub-command's flags."""
    add_subject_arguments(parser, linked=True)
    add_decoding_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE.jsonl",
        help="questions with documents as NQ-open, TriviaQA, HotpotQA, 2WikiMultihopQA or MuSiQue have them",
    )
    parser.add_argument("--documents", type=int, metavar="N", help="of each question at most; gold ones stay (default: all)")
    parser.add_argument("--document-tokens", type=int, metavar="N", help="cut longer documents (default: as they are)")
    parser.add_argument("--gold-at", type=int, metavar="N", help="place of the gold document, 0 the first (default: as it is)")
    parser.add_argument("--introduction", type=spelled, metavar="TEXT", help="stands before the documents (with --chat: nothing)")
    parser.add_argument(
        "--document-template",
        type=spelled,
        default="",
        metavar="TEXT",
        help="of {title} and {text}, as for tokenize-supervised (default: '{title}\\n{text}\\n', or '{text}\\n')",
    )
    parser.add_argument(
        "--question-template",
        type=spelled,
        metavar="TEXT",
        help="follows the documents (default: '\\nQuestion: {question}\\nAnswer:'; with --chat: '{question}')",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default 32)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each file at most (default: all)")
    add_chat_arguments(parser)


def rag(args: Namespace) -> Iterator[str]:
    """Answer, score and write; yields lines to print.

    Raises:
        UserError: the model, a file or a setting cannot be used; names file and line.
    """
    _check(args)
    items = []
    for path in args.data:  # wrong files are told before the model is loaded
        items += list(read_questions(path, args.documents, args.gold_at))[: args.limit]
    make_output(args.output)
    subject = load_subject(args)
    prompts = [make_prompt(subject, item, args) for item in items]
    if args.show_prompt:
        first: dict[str, RagPrompt] = {}
        for prompt in prompts:
            first.setdefault(prompt.item.dataset, prompt)
        for name, prompt in first.items():
            yield f"--- {prompt.item.place}, {name}"
            yield from prompt.shown(subject)
        return
    answers, results = {}, []
    for variant in subject.variants:
        kind = LinkedReader if variant.linked else JoinedReader
        kind(subject, variant).answer(prompts[0], 2)  # what is compiled when it first runs is no question's cost
        reader = kind(subject, variant)
        answers[variant.name] = [reader.answer(prompt, args.max_new_tokens) for prompt in prompts]
        cost = reader.recorder.to_dict()  # before another arm's memory counts
        results.append({**variant.to_dict(), **summary(prompts, answers[variant.name]), "cost": cost})
    settings = {name: getattr(args, name) for name in ("documents", "document_tokens", "gold_at", "max_new_tokens")}
    counts = {"chat": subject.chat is not None, **settings, "questions": len(prompts)}
    with Written(args.output) as written:
        write_predictions(args.output / "predictions.jsonl", prompts, answers)
        write_json(args.output / "rag.json", {**subject.to_dict(), **counts, "results": results})
        groups = [*results[0]["datasets"], TOTAL]
        bars = {r["name"]: [*(d[SUBSPAN.name] for d in r["datasets"].values()), r[SUBSPAN.name]] for r in results}
        bar_chart(args.output / "rag.png", groups, bars, (f"{subject.name}: documents", "best-subspan exact match, percent"))
    yield f"{subject.name}: {len(prompts)} questions on {_counted(prompts)} documents each"
    yield ""
    yield from table(*rows(results))
    yield ""
    yield from cost_table(results)
    yield ""
    yield written.files("rag.json", "rag.png", "predictions.jsonl")


def _check(args: Namespace) -> None:
    for name, least in (("limit", 1), ("documents", 1), ("document_tokens", 1), ("gold_at", 0), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: is below {least}")
    if args.question_template is not None and "{question}" not in args.question_template:
        raise UserError(f"--question-template {args.question_template!r}: has no {{question}}")
    try:
        DocumentTemplate(args.document_template)
    except ValueError as error:
        raise UserError(str(error)) from None


def _counted(prompts: Sequence[RagPrompt]) -> str:
    counts = sorted({len(prompt.parts) for prompt in prompts})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def make_prompt(subject: Subject, item: DocumentQuestion, args: Namespace) -> RagPrompt:
    """A question as raw tokens. Documents are encoded one by one, so that one has the same tokens wherever it stands.

    Raises:
        UserError: the question and its documents are too long for the model, or the chat template does not take it.
    """
    chat = subject.chat
    introduction = args.introduction if args.introduction is not None else "" if chat else INTRODUCTION
    question = (args.question_template or ("{question}" if chat else QUESTION)).replace("{question}", item.question)
    try:
        prefix, asked = subject.prompt(introduction, question, separator=SEPARATOR)
        template = DocumentTemplate(args.document_template)
        documents = [{"title": document.title, "text": document.text} for document in item.documents]
        texts = [template.render(d, f"document {n} of {len(documents)}") for n, d in enumerate(documents, 1)]
    except (UserError, ValueError) as error:
        raise UserError(f"{item.place}: {error}") from None
    encode = chat.encode if chat else subject.encode
    parts = [encode(text)[: args.document_tokens] for text in texts]
    prompt = RagPrompt(item, prefix, parts, asked)
    links = max((variant.gist.links for variant in subject.variants if variant.linked), default=0) * len(parts)
    length = len(prompt.context) + links + len(asked) + args.max_new_tokens
    subject.check_length(length, f"{item.place}: its {len(parts)} documents (see --documents, --document-tokens)")
    return prompt


def scores(item: DocumentQuestion, text: str) -> dict[str, float]:
    """Metric -> percent."""
    return {metric.name: 100 * metric(text, item.answers) for metric in SCORES}


def summary(prompts: Sequence[RagPrompt], answers: Sequence[Answer]) -> dict:
    """An arm's results: by data set, and the mean of these."""
    found: dict[str, list[tuple[dict[str, float], Answer]]] = {}
    for prompt, given in zip(prompts, answers):
        found.setdefault(prompt.item.dataset, []).append((scores(prompt.item, given.text), given))
    datasets = {}
    for name, several in found.items():
        means = {metric.name: statistics.fmean(values[metric.name] for values, _ in several) for metric in SCORES}
        datasets[name] = {**means, "questions": len(several), **_read([given for _, given in several])}
    means = {metric.name: statistics.fmean(entry[metric.name] for entry in datasets.values()) for metric in SCORES}
    return {**means, **_read(answers), "datasets": datasets}


def _read(answers: Sequence[Answer]) -> dict[str, float]:
    """Means of what was read."""
    return {name: statistics.fmean(getattr(given, name) for given in answers) for name in READ}


def write_predictions(path: Path, prompts: Sequence[RagPrompt], answers: dict[str, list[Answer]]) -> None:
    """A line per question: what every arm wrote, and how it scores."""
    with path.open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            item = prompt.item
            written = {}
            for name, several in answers.items():
                given = several[i]
                written[name] = {"text": given.text, **scores(item, given.text), **_read([given])}
            gold = [place for place, document in enumerate(item.documents) if document.gold]
            line = {"place": item.place, "dataset": item.dataset, "question": item.question, "answers": item.answers}
            sizes = {"gold": gold, "document_tokens": [len(part) for part in prompt.parts]}
            file.write(json.dumps({**line, **sizes, "written": written}, ensure_ascii=False) + "\n")


def rows(results: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: arms down, data sets and scores across."""
    datasets = results[0]["datasets"]
    head = ["documents", *(f"{name}: {metric.name}" for name in [*datasets, "mean"] for metric in SCORES), *READ.values()]
    body = []
    for result in results:
        entries = [*result["datasets"].values(), result]
        figures = [f"{entry[metric.name]:.2f}" for entry in entries for metric in SCORES]
        body.append([result["name"], *figures, *(f"{result[name]:.{3 * (name == 'documents_s')}f}" for name in READ)])
    return head, body
