"""What a run reads: tokenizer and shards, opened and checked before anything heavy starts, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from unfold.kernels.common.plans import pinned
from unfold.model.ahead import Ahead
from unfold.model.config import sizes_name
from unfold.model.visibility import MicroBatch
from unfold.pretrain.config import RunConfig, RunStage, with_vocab_size
from unfold.pretrain.data.blend import PLAIN, Arranged, Stretch
from unfold.pretrain.data.samples import BatchBuilder, TokenSource, step_samples
from unfold.pretrain.data.stretches import stretch_of, stretches_of
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads. The configuration is the one given, with the tokenizer's vocabulary size.

    Attributes:
        choices: held-out samples as ``valid`` has them, with each of the other chunk sizes that are validated, by their names.
        sources: of the evaluation in the loop, by their names.
    """

    config: RunConfig
    tokenizer: RunTokenizer
    train: BatchBuilder
    valid: BatchBuilder | None
    sources: dict[str, BatchBuilder] = field(default_factory=dict)
    choices: dict[str, BatchBuilder] = field(default_factory=dict)

    def batches(
        self, done: int, number: Callable[[int], int], parallel: Parallel, ahead: Ahead | None = None
    ) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of every step after ``done`` steps; for a GPU in pinned memory.

        number: the n-th sample trained on -> which it is; ahead: makes their plans, None: those are made when they are asked for.
        """
        stretches = stretches_of(self.config, number)
        for stage in self.config.stages:
            train, gist = stage.config.train, stage.config.folding
            if stage.last <= done:
                continue
            builder = self.train.along(stretches, stage.number - 1)
            for step in range(max(done + 1, stage.first), stage.last + 1):  # counted from 1
                first = stage.samples_after(step - 1)
                indices = step_samples(first, train.global_batch, train.micro_batch, parallel.data_rank, parallel.data_size)
                numbers = [[number(i) for i in micro_batch] for micro_batch in indices]
                made = (replace(builder.build(n, gist), distilled=self._distilled(n)) for n in numbers)
                yield [_ready(batch, parallel, ahead) for batch in made]

    def _distilled(self, numbers: list[int]) -> tuple[int, ...]:
        """Which samples of a micro-batch learn from dense attention: by their global numbers, so the same under every layout."""
        distill = self.config.distill
        return tuple(i for i, number in enumerate(numbers) if distill.active and number % distill.every == 0)

    def valid_batches(self, parallel: Parallel, step: int) -> list[MicroBatch]:
        """The same samples at every validation of a stage, of the length that it has; ranks take turns, and a rank without one
        repeats none."""
        return self._first_samples(self.valid, self.config.train.valid_samples, parallel, step)

    def choice_batches(self, parallel: Parallel, step: int) -> Iterator[tuple[str, list[MicroBatch]]]:
        """The same samples with each of the other chunk sizes, by the name of these."""
        for name, builder in self.choices.items():
            yield name, self._first_samples(builder, self.config.train.valid_samples, parallel, step)

    def source_batches(self, parallel: Parallel, step: int) -> Iterator[tuple[str, list[MicroBatch]]]:
        """The same of each held-out source of the evaluation, by its name."""
        for name, builder in self.sources.items():
            yield name, self._first_samples(builder, self.config.evaluation.samples, parallel, step)

    def _first_samples(self, builder: BatchBuilder, most: int, parallel: Parallel, step: int) -> list[MicroBatch]:
        """This rank's of the first samples, of the length that they have in a step (counted from 1)."""
        builder = builder.along([Stretch(0, None, self.config.at(step).data.raw_tokens)])
        numbers = range(min(most, builder.source.samples_per_epoch))
        rounds = -(-len(numbers) // parallel.data_size)
        mine = [i * parallel.data_size + parallel.data_rank for i in range(rounds)]
        return [builder.build([n]) if n in numbers else builder.empty() for n in mine]

    def source_samples(self, samples: int, number: Callable[[int], int]) -> list[int]:
        """How many samples before a global number came from each source."""
        return self._along(number).counters(samples)

    def packing_of(self, stage: RunStage) -> str:
        """A line on the samples that documents make in a stage."""
        source = self.train.source.along([stretch_of(stage.config.data)])
        documents, samples, padding, cut = source.shares()
        return (
            f"data.train: {documents:,} documents, {samples:,} samples of {source.raw_tokens:,} raw tokens an epoch "
            f"({stage.config.data.packing}): {padding:.2%} padding, {cut:.2%} of the documents cut"
        )

    def until(self, sample: int, number: Callable[[int], int]) -> dict:
        """What decided the samples before a global number: a source that joins the blend later changes nothing of it."""
        return {"tokenizer_hash": self.tokenizer.hash, "data": self._along(number).fingerprint_until(sample)}

    def _along(self, number: Callable[[int], int]) -> TokenSource:
        return self.train.source.along(stretches_of(self.config, number))


def _ready(batch: MicroBatch, parallel: Parallel, ahead: Ahead | None) -> MicroBatch:
    if ahead is not None:
        ahead.prepare(batch)
    return pinned(batch) if parallel.device.type == "cuda" else batch


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and shards. Raises UserError for what is missing, damaged or does not belong together."""
    gist = config.folding
    tokenizer = load_tokenizer(config.data.tokenizer, gist.deepest if gist else 0)
    config = with_vocab_size(config, tokenizer.vocab_size)

    length_multiple, stages = config.parallel.length_multiple, config.stages
    lengths = {stage.config.data.raw_tokens for stage in stages}

    def builder(prefixes: tuple[str, ...], setting: str, shuffle_parts: bool = False) -> BatchBuilder:
        raw_tokens = stages[-1].config.data.raw_tokens
        # Validation is of windows, however training arranges documents, and has no choices of chunk sizes: so losses compare.
        trains = setting == "data.train"
        own = gist if gist is None or trains else gist.with_sizes(gist.chunk_sizes)
        arranged = Arranged(config.data.packing, config.data.length_weights) if trains else PLAIN
        seed, cache = config.train.seed, config.data.cache
        source = TokenSource(prefixes, raw_tokens, seed, tokenizer, setting, cache, arranged, checked=not trains)
        if trains:
            source.along(stretches_of(config)).check(len(stages))
        source.check_positions(gist.links if gist else 0, min(s.config.model.max_position for s in stages), setting)
        if not trains:
            for length in lengths - {raw_tokens}:
                source.along([Stretch(0, None, length)]).check()
        one_length = config.parallel.pipeline > 1  # a pipeline learns its shapes once
        return BatchBuilder(source, own, tokenizer, length_multiple, config.train.seed, shuffle_parts, one_length)

    train = builder(config.data.train, "data.train", config.data.shuffle_parts)
    if config.data.shuffle_parts and not train.source.linked:
        raise UserError(
            "data.shuffle_parts: true, but no shard of data.train has linked contexts; make shards with "
            "`python -m data_prep tokenize-supervised --linked`, or leave it out"
        )
    if gist and gist.recall == "suffix" and not train.source.supervised:
        raise UserError(
            "gist.recall: suffix, but no shard of data.train says where a suffix begins; make shards with "
            "`python -m data_prep tokenize-supervised`, or set recall to all or none"
        )
    valid = builder(config.data.valid, "data.valid") if config.data.valid else None
    sources = {name: builder(prefixes, f"evaluation.sources: {name}") for name, prefixes in config.evaluation.by_name.items()}
    others = [v.chunk_sizes for v in gist.variants if v.chunk_sizes != gist.chunk_sizes] if config.train.valid_choices else []
    choices = {sizes_name(sizes): valid.folding(gist.with_sizes(sizes)) for sizes in others}
    return Inputs(config, tokenizer, train, valid, sources, choices)
