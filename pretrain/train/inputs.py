"""What a run reads: tokenizer and shards, opened and checked before anything heavy starts, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from unfold.kernels.common.plans import pinned
from unfold.model.parallel.context import ContextParallel
from unfold.model.visibility import MicroBatch
from unfold.pretrain.config import RunConfig, gist_at, with_vocab_size
from unfold.pretrain.data.samples import BatchBuilder, TokenSource, step_samples
from unfold.pretrain.data.tokenizer import RunTokenizer, load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.parallel import Parallel


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads. The configuration is the one given, with the tokenizer's vocabulary size."""

    config: RunConfig
    tokenizer: RunTokenizer
    train: BatchBuilder
    valid: BatchBuilder | None
    sources: dict[str, BatchBuilder] = field(default_factory=dict)

    def batches(self, done: int, number: Callable[[int], int], parallel: Parallel) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of every step after ``done`` steps. number: the n-th sample trained on -> which it is."""
        train = self.config.train
        for step in range(done, train.steps):
            indices = step_samples(step, train.global_batch, train.micro_batch, parallel.data_rank, parallel.data_size)
            numbers = [[number(i) for i in micro_batch] for micro_batch in indices]
            stage = gist_at(self.config, step + 1)
            made = (replace(self.train.build(n, stage), distilled=self._distilled(n)) for n in numbers)
            yield [self._ready(batch, parallel) for batch in made]

    def _ready(self, batch: MicroBatch, parallel: Parallel) -> MicroBatch:
        """With what can be worked out ahead of its step: who sends what to whom; for a GPU in pinned memory."""
        if parallel.context_group.size() > 1:
            context = ContextParallel(parallel.context_group, self.config.parallel.context_method, self.config.model.kinds)
            context.prepare(batch.layout, batch.recall)
        return pinned(batch) if parallel.device.type == "cuda" else batch

    def _distilled(self, numbers: list[int]) -> tuple[int, ...]:
        """Which samples of a micro-batch learn from dense attention: by their global numbers, so the same under every layout."""
        distill = self.config.distill
        return tuple(i for i, number in enumerate(numbers) if distill.active and number % distill.every == 0)

    def valid_batches(self, parallel: Parallel) -> list[MicroBatch]:
        """The same samples at every validation; ranks take turns, and a rank without one repeats none."""
        return _first_samples(self.valid, self.config.train.valid_samples, parallel)

    def source_batches(self, parallel: Parallel) -> Iterator[tuple[str, list[MicroBatch]]]:
        """The same of each held-out source of the evaluation, by its name."""
        for name, builder in self.sources.items():
            yield name, _first_samples(builder, self.config.evaluation.samples, parallel)

    def until(self, sample: int) -> dict:
        """What decided the samples before a global number: a source that joins the blend later changes nothing of it."""
        return {"tokenizer_hash": self.tokenizer.hash, "data": self.train.source.fingerprint_until(sample)}


def _first_samples(builder: BatchBuilder, most: int, parallel: Parallel) -> list[MicroBatch]:
    """This rank's of the first samples."""
    numbers = range(min(most, builder.source.samples_per_epoch))
    rounds = -(-len(numbers) // parallel.data_size)
    mine = [i * parallel.data_size + parallel.data_rank for i in range(rounds)]
    return [builder.build([n]) if n in numbers else builder.empty() for n in mine]


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and shards. Raises UserError for what is missing, damaged or does not belong together."""
    gist = config.folding
    tokenizer = load_tokenizer(config.data.tokenizer, gist.levels if gist else 0)
    config = with_vocab_size(config, tokenizer.vocab_size)

    length_multiple = config.parallel.length_multiple

    def builder(prefixes: tuple[str, ...], setting: str, shuffle_parts: bool = False) -> BatchBuilder:
        source = TokenSource(prefixes, config.data.raw_tokens, config.train.seed, tokenizer, setting, config.data.cache)
        source.check_positions(gist.links if gist else 0, config.model.max_position, setting)
        return BatchBuilder(source, gist, tokenizer, length_multiple, config.train.seed, shuffle_parts)

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
    return Inputs(config, tokenizer, train, valid, sources)
