"""What settings cost per step: runs with and without them take turns, step by step, in one process.

    python -m tests.benchmarks.step_cost --config launch/configs/tiny.yaml --variant "" --variant "lora.rank=8"

Processor seconds are told, which other work on the machine disturbs less than it does the clock; on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import statistics
import tempfile
import time
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], dest="common", metavar="KEY=VALUE", help="in every variant")
    parser.add_argument("--variant", action="append", required=True, help="overrides of one run, as in a shell; '' for none")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = [Variant(args.config, [*args.common, *shlex.split(text), "monitor.wandb=false"]) for text in args.variant]
    for _ in range(args.steps):
        for run in runs:
            run.step()
    base = statistics.median(runs[0].seconds[2:])
    print("| settings | s per step | against the first | optimizer state, MB | trained parameters |\n|---|---|---|---|---|")
    for text, run in zip(args.variant, runs):
        seconds = statistics.median(run.seconds[2:])
        state, trained = run.sizes()
        print(f"| `{text}` | {seconds:.3f} | {seconds / base:.3f} | {state / 1e6:.2f} | {trained:,} |")


class Variant:
    """A run, a step at a time."""

    def __init__(self, config: str, overrides: list[str]):
        from unfold.pretrain import parallel
        from unfold.pretrain.checkpoint.state import RunningAverage, fragments
        from unfold.pretrain.config import load_config
        from unfold.pretrain.monitor.norms import NormWatch
        from unfold.pretrain.train.engine import build_engine, set_learning_rate
        from unfold.pretrain.train.inputs import open_inputs

        self.inputs = open_inputs(load_config(config, overrides))
        self.config, self.parallel = self.inputs.config, parallel.initialize(self.inputs.config.parallel)
        self.engine = build_engine(self.config, self.parallel, self.inputs.tokenizer.reserved_ids)
        set_learning_rate(self.engine, self.config.optimizer.lr)
        self.batches = self.inputs.batches(0, lambda n: n, self.parallel)
        self.seconds: list[float] = []
        self.average = RunningAverage(self.config.checkpoint.average_decay)
        list(fragments(self.engine, self.parallel, self.average))  # which gives it its memory
        watched = self.config.model.layers, self.config.monitor.norms_every, self.config.train.clip
        self.norms = NormWatch(self.engine, self.parallel, *watched)
        self.folder = Path(tempfile.mkdtemp())

    def step(self) -> None:
        from unfold.pretrain.train.added import Added
        from unfold.pretrain.train.step import train_step

        batches = next(self.batches)
        clock = self._clock()
        with self.norms.over(len(self.seconds) + 1):
            result = train_step(
                self.engine, batches, self.parallel, self.config.model, self.config.folding, Added.of(self.config)
            )
        self.average.update()
        self.norms.metrics(result.grad_norm, result.skipped)
        self.seconds.append(self._clock() - clock)

    def _clock(self) -> float:
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
            return time.monotonic()
        return time.process_time()

    def sizes(self) -> tuple[int, int]:
        """Bytes of master weights and optimizer state; trained parameters."""
        zero = self.engine.optimizer
        states = [x for s in zero.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
        masters = [p for group in zero.optimizer.param_groups for p in group["params"]]
        trained = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        return sum(x.numel() * x.element_size() for x in [*states, *masters]), trained


if __name__ == "__main__":
    main()
