"""Training runs on the GPU as users start them: arms, each a few steps, what they reached and where a step's time went."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.gpu.kernel_times import short
from tests.benchmarks.gpu.runner import Runner

PROFILED = 7  # the step that is traced; timed are those before it and after it
DENSE = "model.attention=dense"
ROUTED = ("gist.recall=all", "gist.route_loss=0.3", "gist.route_far=true", "gist.recall_from=2", "gist.own_group=true")
FUSED = "train.fuse_pointwise=true"
SELECTIVE = ("train.activation_checkpointing=selective", "train.mlp_tiles=4", FUSED)
LONGEST = ("train.activation_checkpointing=full", "train.offload_activations=true", "train.mlp_tiles=16", FUSED)


@dataclass(frozen=True)
class Arm:
    """A run: shards, changed settings, raw tokens of a sample (None: --train-raw), steps that are waited for.

    Shards ``suffix`` hold questions and answers, a tenth of each sample; ``long`` is one document.
    """

    shards: str
    changes: tuple[str, ...] = ()
    raw: int | None = None
    steps: int = 12

    @property
    def profiled(self) -> bool:
        return self.steps > PROFILED


ARMS = {
    "dense": Arm("sotu_train", (DENSE,)),
    "forgetting": Arm("sotu_train"),
    "recalling": Arm("sotu_train", ("gist.recall=all",)),
    "dense, fused": Arm("sotu_train", (DENSE, FUSED)),
    "forgetting, fused": Arm("sotu_train", (FUSED,)),
    "recalling, routed, fused": Arm("sotu_train", (*ROUTED, FUSED)),
    "suffix forgetting": Arm("suffix"),
    "suffix recalling": Arm("suffix", ("gist.recall=suffix",)),
    "128k": Arm("long", SELECTIVE, 131072, 5),
    "128k dense": Arm("long", (*SELECTIVE, DENSE), 131072, 3),
    "512k": Arm("long", LONGEST, 524288, 3),
}
CONFIG = dict(
    precision="bf16",
    model=dict(hidden_size=4096, layers=4, heads=32, kv_heads=8, head_dim=128, ffn_size=14336, max_position=524288),
    gist=dict(chunk_sizes=[8, 4]),
    train=dict(steps=1000, global_batch=1, valid_every=0),
    optimizer=dict(lr=1e-4),
    checkpoint=dict(every=1000),
    monitor=dict(wandb=False),
)
SMALL = dict(precision="fp32", model=dict(hidden_size=128, layers=3, heads=2, kv_heads=1, ffn_size=256, max_position=131072))


def start_training(runner: Runner, args: argparse.Namespace, name: str) -> tuple:
    """Start an arm of training."""
    arm = ARMS[name]
    raw = args.train_raw if arm.raw is None or not args.gpu else arm.raw
    data = dict(train=[str(args.data / "shards" / arm.shards)], tokenizer=str(args.data / "tokenizer"), raw_tokens=raw)
    run_dir = runner.output / f"run-{name.replace(',', '').replace(' ', '-')}"
    path = runner.output / f"{run_dir.name}.json"
    path.write_text(json.dumps(CONFIG | ({} if args.gpu else SMALL) | dict(data=data)))  # JSON is YAML
    changes = [*arm.changes, *([f"monitor.profile_steps=[{PROFILED},{PROFILED}]"] if arm.profiled else [])]
    sets = [x for change in changes for x in ("--set", change)]
    command = [sys.executable, "-m", "pretrain", "train", "--config", str(path), "--run-dir", str(run_dir), *sets]
    return *runner.start(run_dir.name, command, 300), run_dir


def steps_of(run_dir: Path) -> list[dict]:
    metrics = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def pause(started: tuple, seconds: float) -> None:
    """Let an arm come to its first steps, then stop it: its start need not take time of its own later."""
    until = time.perf_counter() + seconds
    while started[0].poll() is None and time.perf_counter() < until and len(steps_of(started[-1])) < 2:
        time.sleep(0.1)
    if started[0].poll() is None:
        os.killpg(started[0].pid, signal.SIGSTOP)


def train(runner: Runner, args: argparse.Namespace) -> None:
    """Every arm of args.arms in turn; ``train.json`` is written after each."""
    results = {}
    for name in args.arms:
        arm, started = ARMS[name], runner.paused.pop(name, None) or start_training(runner, args, name)
        process, *_, run_dir = started
        os.killpg(process.pid, signal.SIGCONT)
        until = time.perf_counter() + min(args.arm_seconds, runner.left())
        traced = lambda d=run_dir: not ARMS[name].profiled or list(d.glob("profile/steps-*"))  # noqa: B023
        # The last step would save 15 GB: enough has been seen before.
        while process.poll() is None and time.perf_counter() < until and not (len(steps_of(run_dir)) >= arm.steps and traced()):
            time.sleep(0.1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        runner.finish(started[:-1], 8)
        steps = steps_of(run_dir)
        timed = [s for i, s in enumerate(steps, 1) if i > 2 and not (arm.profiled and i == PROFILED)] or steps[1:]
        if timed:
            rate = statistics.median(s["raw_tokens_per_s"] for s in timed)
            results[name] = dict(raw_tokens_per_s=rate, loss=[s["loss"] for s in steps], last=steps[-1])
            runner.say(f"train, {name}: {rate:,.0f} raw tokens/s, loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}")
        for path in run_dir.glob("profile/steps-*"):
            results.setdefault(name, {})["profile"] = summary(path)
        shutil.rmtree(run_dir, ignore_errors=True)
        (runner.output / "train.json").write_text(json.dumps(dict(config=CONFIG, results=results), indent=1))


def summary(trace: Path) -> dict:
    """Of a traced step: ms from its first kernel to its last, ms in which one ran, and its costliest kernels [ms, launches]."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    spans, kernels = [], defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((event["ts"], event["ts"] + event["dur"]))
            total = kernels[short(event["name"])]
            total[0], total[1] = total[0] + event["dur"] / 1e3, total[1] + 1
    spans.sort()
    busy, end = 0.0, 0.0
    for first, last in spans:
        busy, end = busy + max(0.0, last - max(first, end)), max(end, last)
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
    wall = (end - spans[0][0]) / 1e3 if spans else 0.0
    costliest = {name: [round(ms, 3), n] for name, (ms, n) in ranked[:40]}
    return dict(wall_ms=wall, busy_ms=busy / 1e3, launches=len(spans), kernels=costliest)
