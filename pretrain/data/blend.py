"""Which source a sample comes from: exact shares, computed for any sample number without what came before.

Sample numbers are dealt out by a tree of binary splits. At each, of the first n samples floor(n * share + 1/2) go left:
that grows by 0 or 1 with n, so every source's own counter grows by exactly one with each sample that it gives, and is
known for every n. A change of weights begins a new stage, whose counters go on where the stage before left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unfold.pretrain.data.shards import is_shard
from unfold.pretrain.errors import UserError

SCALE = 1 << 32  # weights become whole numbers, so that every machine computes the same


@dataclass(frozen=True)
class Stage:
    """Weights that hold from a global sample number on."""

    begin: int
    weights: tuple[int, ...]  # one for each source, 0 for one that gives nothing


class Blend:
    """Global sample number -> (source, number of the sample within the source)."""

    def __init__(self, stages: Sequence[Stage]):
        """stages: by rising ``begin``, the first from 0."""
        self._stages = list(stages)
        self._bases = [[0] * len(stages[0].weights)]  # counters at each stage's begin
        for stage, following in zip(stages, stages[1:]):
            base = self._bases[-1]
            self._bases.append([b + k for b, k in zip(base, _counts(following.begin - stage.begin, stage.weights))])

    def _stage(self, sample: int) -> int:
        return max(i for i, stage in enumerate(self._stages) if stage.begin <= sample)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a global sample number, and how many samples that source gave before it."""
        at = self._stage(sample)
        stage = self._stages[at]
        number, low, high = sample - stage.begin, 0, len(stage.weights)
        while high - low > 1:
            middle = (low + high) // 2
            left, total = sum(stage.weights[low:middle]), sum(stage.weights[low:high])
            before = _share(number, left, total)
            if _share(number + 1, left, total) > before:
                number, high = before, middle
            else:
                number, low = number - before, middle
        return low, self._bases[at][low] + number

    def counters(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples each source gives."""
        at = self._stage(samples)
        stage = self._stages[at]
        return [b + k for b, k in zip(self._bases[at], _counts(samples - stage.begin, stage.weights))]

    def weighs(self, source: int, begin: int, end: int | None) -> bool:
        """Whether a source has a weight anywhere among the samples from ``begin`` up to ``end`` (None: without end)."""
        last = len(self._stages) - 1 if end is None else self._stage(max(begin, end - 1))
        return any(stage.weights[source] for stage in self._stages[self._stage(begin) : last + 1])

    def history(self, samples: int) -> str:
        """The stages that decided the first ``samples`` samples, as text; sources without weight are not in it."""
        past = [stage for stage in self._stages if stage.begin < samples]
        used = [i for i in range(len(past[0].weights)) if any(stage.weights[i] for stage in past)] if past else []
        return str([(stage.begin, [stage.weights[i] for i in used]) for stage in past])

    def __repr__(self) -> str:
        return f"Blend({[(stage.begin, stage.weights) for stage in self._stages]})"


def _share(n: int, part: int, total: int) -> int:
    return (2 * n * part + total) // (2 * total)


def _counts(n: int, weights: Sequence[int]) -> list[int]:
    """How many of n samples each source gives."""
    if len(weights) == 1:
        return [n]
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    middle = len(weights) // 2
    left = _share(n, sum(weights[:middle]), total)
    return _counts(left, weights[:middle]) + _counts(n - left, weights[middle:])


@dataclass(frozen=True)
class SourceEntry:
    """One entry of ``data.train``: shards, and their weight from certain samples on (None: not weighted)."""

    pattern: str
    weights: tuple[tuple[int, float], ...] | None  # (global sample number, weight)


def parse_entry(text: str, setting: str) -> SourceEntry:
    """``PREFIX``, ``PREFIX weight=0.7``, or ``PREFIX weight=0.7,12000:0.2`` where the weight changes at a global sample.

    Raises:
        UserError: the weights cannot be read.
    """
    pattern, mark, given = text.rpartition(" weight=")
    if not mark or is_shard(text):  # a name may hold what would be a weight elsewhere
        return SourceEntry(text, None)
    pairs = []
    for part in given.split(","):
        first, colon, value = part.rpartition(":")
        try:
            pairs.append((int(first) if colon else 0, float(value)))
        except ValueError:
            raise UserError(f"{setting}: {text!r}: {part!r} is not WEIGHT or SAMPLE:WEIGHT") from None
    begins = [begin for begin, _ in pairs]
    if any(not 0 <= weight < 1e6 for _, weight in pairs) or begins != sorted(set(begins)) or begins[0] < 0:
        raise UserError(f"{setting}: {text!r}: weights must not be negative, and their samples must rise")
    return SourceEntry(pattern.rstrip(), tuple(pairs))


class Arranged(NamedTuple):
    """How documents to train on become samples: ``data.packing`` of text, and ``data.length_weights``."""

    packing: str = "windows"
    length_weights: tuple[tuple[int, float], ...] = ()


PLAIN = Arranged()


@dataclass(frozen=True)
class Stretch:
    """Neighbouring samples of a run that a stage of it reads.

    Attributes:
        begin: the first global sample number.
        planned: how many there are if none has to be left out; None: they go on without end.
        raw_tokens: of each.
        weights: of the entries, in their order; None: those that the entries name.
        arranged: how documents become samples; None: as the source was opened.
    """

    begin: int
    planned: int | None
    raw_tokens: int
    weights: tuple[float, ...] | None = None
    arranged: Arranged | None = None


def make_blend(entries: Sequence[SourceEntry], setting: str, stretches: Sequence[Stretch] = ()) -> Blend | None:
    """The blend of entries; None where none has a weight. stretches: whose weights take the place of the entries' own.

    Raises:
        UserError: only some have weights, or at some time all weights are 0.
    """
    weighted = [entry for entry in entries if entry.weights is not None]
    if not weighted:
        if any(stretch.weights for stretch in stretches):
            raise UserError(
                f"{setting}: {entries[0].pattern} has no weight, but train.stages have weights; give every entry one "
                "(`PREFIX weight=0.5`), which makes it a source of its own"
            )
        return None
    if len(weighted) < len(entries):
        bare = next(entry for entry in entries if entry.weights is None)
        raise UserError(f"{setting}: {bare.pattern} has no weight, but others have; give every entry one, or none")
    changes = {b.begin for a, b in zip(stretches, stretches[1:]) if a.weights != b.weights}
    begins = sorted({0} | changes | {begin for entry in weighted for begin, _ in entry.weights})
    stages = []
    for begin in begins:
        current = next((s.weights for s in reversed(stretches) if s.begin <= begin), None)
        current = current or [([0.0] + [w for first, w in entry.weights if first <= begin])[-1] for entry in weighted]
        stages.append(Stage(begin, tuple(round(w * SCALE) for w in current)))
        if not sum(stages[-1].weights):
            raise UserError(f"{setting}: from sample {begin} on every weight is 0")
    return Blend(stages)
