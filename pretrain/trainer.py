"""``python -m pretrain train``: reads from top to bottom."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch.distributed as dist
import yaml

from model.transformer import MicroBatch
from pretrain import parallel as parallel_groups
from pretrain.checkpoint import Manifest, load_checkpoint, newest_whole, save_checkpoint, write_atomically
from pretrain.config import RunConfig, changes_on_resume, with_vocab_size
from pretrain.data import BatchBuilder, TokenSource, step_samples
from pretrain.engine import accumulation_steps, build_engine, learning_rate, set_learning_rate
from pretrain.errors import UserError
from pretrain.monitor import MetricsFile, Progress, WandbLog
from pretrain.parallel import Parallel
from pretrain.prefetch import prefetch
from pretrain.step import NonFiniteLoss, train_step, validation_loss
from pretrain.tokenizer import TokenizerInfo, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked before anything heavy starts."""

    config: RunConfig
    tokenizer: TokenizerInfo
    train: BatchBuilder
    valid: BatchBuilder | None


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and shards. Raises UserError for what is missing, damaged or does not belong together."""
    gist = config.gist if config.model.attention == "gist" else None
    tokenizer = load_tokenizer(config.data.tokenizer, gist.levels if gist else 0)
    config = with_vocab_size(config, tokenizer.vocab_size)

    def builder(prefixes: tuple[str, ...], setting: str) -> BatchBuilder:
        source = TokenSource(prefixes, config.data.raw_tokens, config.train.seed, tokenizer, setting)
        return BatchBuilder(source, gist, tokenizer)

    train = builder(config.data.train, "data.train")
    valid = builder(config.data.valid, "data.valid") if config.data.valid else None
    return Inputs(config, tokenizer, train, valid)


def train(config: RunConfig, run_dir: Path) -> None:
    """Train, or go on training, in ``run_dir``. Every rank calls it."""
    inputs = open_inputs(config)
    config = inputs.config
    _check_run_dir(run_dir, config)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    parallel = parallel_groups.initialize(config.parallel)
    try:
        accumulation_steps(config, parallel.data_size)  # refuses before the model is built
        _train(inputs, run_dir, parallel)
    finally:
        parallel_groups.shutdown()


def _train(inputs: Inputs, run_dir: Path, parallel: Parallel) -> None:
    config = inputs.config
    if parallel.is_main:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.yaml", config.to_yaml())
        _copy_tokenizer(inputs.tokenizer, run_dir / "tokenizer")
    engine = build_engine(config, parallel)
    done = _resume(inputs, run_dir, engine, parallel)
    outputs = _Outputs(config, run_dir, done) if parallel.is_main else None
    say = outputs.progress.say if outputs else _silent
    if done:
        say(f"resumed at step {done}")
    batches = prefetch(_train_batches(inputs, parallel, done))
    waited = time.monotonic()
    for step in range(done, config.train.steps):
        try:
            micro_batches = next(batches)
        except StopIteration:
            raise AssertionError("the batches end with the steps") from None
        ready = time.monotonic()
        rate = learning_rate(step, config.train.steps, config.optimizer.lr, config.schedule)
        set_learning_rate(engine, rate)
        try:
            result = train_step(engine, micro_batches, parallel)
        except NonFiniteLoss as bad:
            raise UserError(
                f"step {step + 1}: the loss is {bad}; stopped before the update. The newest checkpoint is untouched; "
                "lower optimizer.lr or look at samples "
                f"{step * config.train.global_batch}..{(step + 1) * config.train.global_batch - 1}"
            ) from None
        now = time.monotonic()
        metrics = _metrics(config, step, result, rate, ready - waited, now - waited)
        waited = now
        last = step + 1 == config.train.steps
        if inputs.valid and (last or config.train.valid_every and (step + 1) % config.train.valid_every == 0):
            metrics["valid_loss"] = validation_loss(engine, _valid_batches(inputs, parallel), parallel)
            say(f"step {step + 1}: validation loss {metrics['valid_loss']:.4f}")
            waited = time.monotonic()
        if outputs:
            outputs.write(metrics)
        if last or (step + 1) % config.checkpoint.every == 0:
            save_checkpoint(run_dir, engine, parallel, _manifest(inputs, step + 1), config.checkpoint.keep)
            waited = time.monotonic()
    if outputs:
        outputs.close()


def _copy_tokenizer(tokenizer: TokenizerInfo, target: Path) -> None:
    """The run carries its tokenizer along: export and generation need no other directory."""
    if target.exists() or target.resolve() == tokenizer.directory.resolve():
        return
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer.directory, partial)
    partial.rename(target)


def _silent(text: str) -> None:
    pass


class _Outputs:
    """Where the main rank writes."""

    def __init__(self, config: RunConfig, run_dir: Path, done: int):
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", done)
        self._wandb = WandbLog(config.monitor, config.to_dict(), run_dir) if config.monitor.wandb else None
        self.progress = Progress(config.train.steps, done)

    def write(self, metrics: dict) -> None:
        self._metrics.write(metrics)
        if self._wandb:
            self._wandb.write(metrics)
        self.progress.step(metrics)

    def close(self) -> None:
        self.progress.close()
        self._metrics.close()
        if self._wandb:
            self._wandb.close()


def _metrics(config: RunConfig, step: int, result, rate: float, data_wait: float, seconds: float) -> dict:
    samples = (step + 1) * config.train.global_batch
    raw = config.train.global_batch * config.data.raw_tokens
    return {
        "step": step + 1,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": rate,
        "raw_tokens": samples * config.data.raw_tokens,
        "samples": samples,
        "loss_tokens": result.loss_tokens,
        "raw_tokens_per_s": raw / seconds,
        "seconds": seconds,
        "data_wait_s": data_wait,
    } | ({} if result.unfolded is None else {"unfolded_tokens": result.unfolded})


def _train_batches(inputs: Inputs, parallel: Parallel, done: int) -> Iterator[list[MicroBatch]]:
    train = inputs.config.train
    for step in range(done, train.steps):
        samples = step_samples(step, train.global_batch, train.micro_batch, parallel.data_rank, parallel.data_size)
        yield [inputs.train.build(numbers, recall=step >= train.recall_after) for numbers in samples]


def _valid_batches(inputs: Inputs, parallel: Parallel) -> list[MicroBatch]:
    """The same samples at every validation; ranks take turns, and a rank without one repeats none."""
    numbers = range(min(inputs.config.train.valid_samples, inputs.valid.source.samples_per_epoch))
    rounds = -(-len(numbers) // parallel.data_size)
    mine = [i * parallel.data_size + parallel.data_rank for i in range(rounds)]
    return [inputs.valid.build([n]) if n in numbers else inputs.valid.empty() for n in mine]


def _manifest(inputs: Inputs, step: int) -> Manifest:
    config = inputs.config
    samples = step * config.train.global_batch
    names = ("torch", "deepspeed", "megatron-core", "numpy")
    return Manifest(
        step=step,
        samples=samples,
        raw_tokens=samples * config.data.raw_tokens,
        config=config.to_dict(),
        tokenizer_hash=inputs.tokenizer.hash,
        data=inputs.train.source.fingerprint,
        versions={name: importlib.metadata.version(name) for name in names},
    )


def _resume(inputs: Inputs, run_dir: Path, engine, parallel: Parallel) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps done."""
    found = [newest_whole(run_dir, _complain) if parallel.is_main else None]
    dist.broadcast_object_list(found, src=0)  # one rank decides, so that all load the same
    if found[0] is None:
        return 0
    directory, manifest = found[0]
    fresh = _manifest(inputs, manifest.step)
    differing = [n for n in ("tokenizer_hash", "data") if getattr(manifest, n) != getattr(fresh, n)]
    if differing:
        raise UserError(f"--run-dir {run_dir}: the run was made with another {' and '.join(differing)}; use a new run directory")
    load_checkpoint(directory, engine, parallel)
    return manifest.step


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_run_dir(run_dir: Path, config: RunConfig) -> None:
    """Refuse a directory that is no run, and a configuration that would change what the run learns."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file")
    saved = run_dir / "config.yaml"
    if not saved.exists():
        if run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(f"--run-dir {run_dir}: is not empty and holds no run (no config.yaml); name another directory")
        return
    try:
        old = yaml.safe_load(saved.read_text())
        changes = changes_on_resume(old, config.to_dict())
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        raise UserError(f"{saved}: is damaged; restore it from the manifest of a checkpoint") from None
    if changes and any((run_dir / "checkpoints").glob("step-*")):
        raise UserError(
            f"--run-dir {run_dir}: holds a run with other settings, which would change what is learned: {'; '.join(changes)}. "
            "Use the run's settings, or a new run directory"
        )


