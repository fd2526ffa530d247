"""``evaluate perplexity``: loss per raw token, by its place in the sequence, on the same raw tokens for every variant."""

from __future__ import annotations

import itertools
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.output import Written, cost_table, line_chart, make_output, table, write_json
from unfold.pretrain.evaluate.subject import Subject, Variant, add_subject_arguments, load_subject

if TYPE_CHECKING:
    from torch import Tensor

    from unfold.model.visibility import MicroBatchAttention

PACKED = 8192  # raw tokens that the model reads at a time, or one window where that is longer
HEAD_ROWS = 512  # positions whose logits are in memory at a time
FIRST_BUCKET = 64


@dataclass(frozen=True)
class Losses:
    """What one variant lost on the text.

    Attributes:
        nats: fp64 [longest window], sum of the losses of tokens at each position.
        unfolded: raw tokens that a recalling token unfolded in a layer and KV head, a mean.
        seconds: that it took.
        cost: as :meth:`unfold.model.decode.cost.Recorder.to_dict` gives it; nothing is written here.
    """

    nats: np.ndarray
    unfolded: float
    seconds: float
    cost: dict


def add_arguments(parser: ArgumentParser) -> None:
    """The sub-command's flags."""
    add_subject_arguments(parser)
    add_text_arguments(parser)


def add_text_arguments(parser: ArgumentParser) -> None:
    """Flags of the text that a model reads, and of its windows."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="D",
        help="prefixes of shards, text files, or .jsonl files with a text per line",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of .jsonl files (default text)")
    parser.add_argument(
        "--length", type=int, metavar="N", help="raw tokens of a window (default: of the model's training samples)"
    )
    parser.add_argument("--max-tokens", type=int, default=1_000_000, metavar="N", help="raw tokens at most (default 1000000)")


def perplexity(args: Namespace) -> Iterator[str]:
    """Measure and write; yields lines to print.

    Raises:
        UserError: the model, the data or a length cannot be used.
    """
    subject, length, windows = read_windows(args)
    counts = positions(windows, length)
    losses = {variant.name: measure(subject, variant, windows, length) for variant in subject.variants}
    edges = bucket_edges(length)
    results = [summary(variant, losses[variant.name], counts, edges) for variant in subject.variants]
    with Written(args.output) as written:
        write_json(
            args.output / "perplexity.json",
            {**subject.to_dict(), "data": args.data, "length": length, "windows": len(windows), "results": results},
        )
        draw(args.output / "perplexity.png", subject, results)
    yield f"{subject.name}: {int(counts.sum()):,} predicted raw tokens in {len(windows):,} windows of at most {length:,}"
    yield ""
    yield from table(*rows(results))
    yield ""
    yield from cost_table(results)
    yield ""
    yield written.files("perplexity.json", "perplexity.png")


def read_windows(args: Namespace) -> tuple[Subject, int, list[np.ndarray]]:
    """The model, the longest window and the windows of the command line. Raises UserError."""
    for name in ("length", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 2:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: is below 2; the first token is not predicted")
    make_output(args.output)
    subject = load_subject(args)
    length = args.length or min(subject.raw_tokens, subject.max_position)
    subject.check_length(length, f"--length {length}")
    from unfold.pretrain.evaluate.texts import documents

    windows = list(take_windows(documents(args.data, args.text_field, subject), length, args.max_tokens))
    if not windows:
        raise UserError(f"--data {' '.join(args.data)}: has no document of two tokens or more")
    return subject, length, windows


def take_windows(texts: Iterable[np.ndarray], length: int, most: int) -> Iterator[np.ndarray]:
    """Documents cut into windows of at most ``length`` raw tokens, each a document of its own, ``most`` tokens in all.

    A window of one token is left out: nothing in it is predicted.
    """
    left = most
    for text in texts:
        for start in range(0, len(text), length):
            window = text[start : start + min(length, left)]
            if len(window) >= 2:
                yield window
                left -= len(window)
            if left < 2:
                return


def positions(windows: list[np.ndarray], length: int) -> np.ndarray:
    """int64 [length]: how many predicted tokens stand at each position; none at 0."""
    ends = np.bincount([len(window) for window in windows], minlength=length + 1)
    counts = ends[::-1].cumsum()[::-1][1:]
    return np.concatenate([[0], counts[1:]])


def bucket_edges(length: int) -> list[int]:
    """Borders 1, 64, 128, 256, .., length: each bucket as long as all before it."""
    edges, edge = [1], FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def packs(windows: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Windows in groups of at most PACKED raw tokens, or of one."""
    group: list[np.ndarray] = []
    for window in windows:
        if group and sum(map(len, group)) + len(window) > PACKED:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def measure(subject: Subject, variant: Variant, windows: list[np.ndarray], length: int) -> Losses:
    """The losses of one variant; under ``recall`` every raw token recalls."""
    from unfold.model.decode.cost import Recorder

    began, recorder = time.monotonic(), Recorder(subject.model.head_weight.device)
    nats, unfolded = np.zeros(length), []
    for group in packs(windows):
        lost, read = pack_losses(subject, variant, group)
        at = np.concatenate([np.arange(1, len(window)) for window in group])
        nats += np.bincount(at, lost, minlength=length)
        unfolded += read
    mean = float(np.mean(unfolded)) if unfolded else 0.0
    return Losses(nats, mean, time.monotonic() - began, recorder.to_dict())


def run_pack(subject: Subject, variant: Variant, group: list[np.ndarray]) -> tuple[Tensor, MicroBatchAttention, np.ndarray]:
    """Windows through the model: (hidden states [T, hidden], who attended to whom, levels [T])."""
    import torch

    from unfold.model.gist import Recall, build_layout, interleave
    from unfold.model.visibility import MicroBatchAttention

    raw, lengths = np.concatenate(group), [len(window) for window in group]
    gist, tokenizer, device = variant.recalling("all"), subject.tokenizer, subject.model.head_weight.device
    if gist is None:
        ids, level, doc = raw, np.full(len(raw), -1, np.int32), np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    else:
        made = interleave(raw, lengths, tokenizer.word_starts, gist, tokenizer.gist_ids[: gist.levels])
        ids, level, doc = made.ids, made.level, made.doc
    row = lambda array: torch.from_numpy(array)[None]
    layout = build_layout(row(level), row(doc), gist)
    recall = None if gist is None else Recall.of(layout, gist)
    kinds = subject.model.config.kinds_with(gist is not None)
    attend = MicroBatchAttention(kinds, layout.to(device), recall and recall.to(device))
    with torch.no_grad():
        hidden = subject.model.run_layers(row(ids).to(device), attend.layout.position, attend)[:, 0]
    return hidden, attend, level


def pack_losses(subject: Subject, variant: Variant, group: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """(losses of every token but the first of each window, fp64 [sum of lengths - windows]; raw tokens unfolded, by layer)."""
    import torch
    import torch.nn.functional as F

    hidden, attend, level = run_pack(subject, variant, group)
    raw, lengths = np.concatenate(group), [len(window) for window in group]
    first = np.cumsum([0, *lengths[:-1]])
    target = np.delete(np.arange(len(raw)), first)
    places = np.flatnonzero(level < 0)[target - 1]  # of the raw token before each target
    lost = []
    with torch.no_grad():
        for begin in range(0, len(target), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            logits = subject.model.head_logits(hidden[torch.from_numpy(places[part]).to(hidden.device)]).float()
            wanted = torch.from_numpy(raw[target[part]]).to(hidden.device)
            lost.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu().numpy())
    read = [stats.unfolded.item() for stats in attend.recall.stats.values()] if attend.recall else []
    return np.concatenate(lost), read


def summary(variant: Variant, losses: Losses, counts: np.ndarray, edges: list[int]) -> dict:
    """A variant's entry in the results."""
    buckets = []
    for lo, hi in itertools.pairwise(edges):
        tokens = int(counts[lo:hi].sum())
        if tokens:
            nats = float(losses.nats[lo:hi].sum()) / tokens
            buckets.append({"from": lo, "to": hi, "tokens": tokens, "nats": nats, "perplexity": math.exp(nats)})
    tokens = int(counts.sum())
    nats = float(losses.nats.sum()) / tokens
    return {
        **variant.to_dict(),
        "tokens": tokens,
        "nats": nats,
        "perplexity": math.exp(nats),
        "unfolded": losses.unfolded,
        "seconds": round(losses.seconds, 3),
        "cost": losses.cost,
        "buckets": buckets,
    }


def rows(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: nats by position, then all."""
    spans = [f"{b['from']}-{b['to'] - 1}" for b in results[0]["buckets"]]
    head = ["nats per raw token at", *spans, "all", "perplexity", "unfolded"]
    cells = lambda r: [*(f"{b['nats']:.4f}" for b in r["buckets"]), f"{r['nats']:.4f}", f"{r['perplexity']:.2f}"]
    return head, [[r["name"], *cells(r), f"{r['unfolded']:.1f}" if r["mode"] == "recall" else "-"] for r in results]


def draw(path, subject: Subject, results: list[dict]) -> None:
    """Nats by position, a line per variant."""
    lines = {r["name"]: ([b["to"] for b in r["buckets"]], [b["nats"] for b in r["buckets"]]) for r in results}
    labels = (f"{subject.name}: loss by position", "raw tokens before (end of bucket)", "nats per raw token")
    line_chart(path, lines, [r["mode"] for r in results], labels)
