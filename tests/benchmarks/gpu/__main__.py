"""Everything that only a GPU can tell, by one command: right or wrong, how fast, where the time goes, and a real training run.

    python -m tests.benchmarks.gpu [--minutes 11] [--output DIR] [--data DIR] [--steps ..]

Steps, each in processes of its own, each with a share of the time, none keeping the others from running:

- ``check``: tests.benchmarks.gpu.smoke, the same under compute-sanitizer, and tests/kernels in parallel processes, all at once;
- ``times``: every kernel's own time in whole steps, and at several tile sizes (tests.benchmarks.gpu.kernel_times --sweep);
- ``decode``: a decoding step beside dense attention, and its kernels (tests.benchmarks.gpu.decode_times);
- ``bench``: compressed attention beside dense and FlexAttention (python -m unfold.kernels.bench);
- ``train``: training a model of Llama-8B's width and four layers at 32k tokens: dense, forgetting, recalling.

Training reads DATA (tokenizer/ and shards/sotu_{train,valid}, as launch/demo.sh makes them). DIR gets a log and a file per step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = "tests.benchmarks.gpu"


@dataclass
class Runner:
    """Runs commands until a deadline and keeps one log."""

    output: Path
    deadline: float
    begin: float

    def say(self, text: str) -> None:
        line = f"[{time.perf_counter() - self.begin:5.0f} s] {text}"
        print(line, flush=True)
        with open(self.output / "log.txt", "a") as file:
            file.write(line + "\n")

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def start(self, name: str, arguments: list[str], seconds: float, **environment: str) -> tuple:
        path = self.output / f"{name}.log"
        process = subprocess.Popen(
            arguments, stdout=open(path, "w"), stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        return process, path, time.perf_counter() + min(seconds, self.left()), name

    def finish(self, started: tuple, lines: int = 30) -> str:
        """Wait for a process or for its time to be up; the last lines of what it printed go to the log."""
        process, path, until, name = started
        try:
            status = process.wait(max(0.1, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # a test run then still says what has failed
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            status = "stopped, its time was up"
        text = path.read_text(errors="replace")
        self.say(f"{name}: exit {status}")
        print("\n".join(text.splitlines()[-lines:]), flush=True)
        return text

    def run(self, name: str, arguments: list[str], seconds: float, lines: int = 30) -> str:
        return self.finish(self.start(name, arguments, seconds), lines)


def check(runner: Runner, args: argparse.Namespace) -> None:
    python = [sys.executable, "-m"]
    smoke = [*python, f"{HERE}.smoke"]
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *smoke, "--raw", "300", "--once"]
    workers = str(max(2, (os.cpu_count() or 2) - 3))
    tests = [*python, "pytest", "-v", "--tb=short", "-m", "not long", "-k", args.tests, "-n", workers, "-p", "no:cacheprovider"]
    files = [f"tests/kernels/test_{name}.py" for name in ("compressed_triton", "select_triton", "unfold_triton", "decode")]
    started = [
        runner.start("smoke", smoke, args.check_seconds),
        runner.start("tests", [*tests, *files], args.check_seconds),
        runner.start("sanitizer", [*sanitizer, "--dtypes", "bfloat16"], args.check_seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    ]
    if "times" in args.steps:  # what is timed later compiles beside them
        warm = [*python, f"{HERE}.kernel_times", "--compile-only", *args.times_flags]
        started.append(runner.start("warm", warm, args.check_seconds))
        started.append(runner.start("warm-decode", [*python, f"{HERE}.decode_times", "--seconds", "0"], args.check_seconds))
    for process in started:
        runner.finish(process, 60)


def times(runner: Runner, args: argparse.Namespace) -> None:
    seconds = min(args.times_seconds, runner.left())
    command = [sys.executable, "-m", f"{HERE}.kernel_times", "--output", str(runner.output / "kernel_times.json")]
    runner.run("times", [*command, "--seconds", str(seconds - 10), *args.times_flags], seconds, 60)


def decode(runner: Runner, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", f"{HERE}.decode_times", "--output", str(runner.output / "decode_times.json")]
    runner.run("decode", [*command, "--seconds", str(args.decode_seconds)], args.decode_seconds + 10, 60)


def bench(runner: Runner, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "unfold.kernels.bench", "--chunks", "8,4", "--raw", "8192", "32768", "131072"]
    flags = ["--seconds", "0.2", "--only", "dense SDPA", "dense cuDNN", "ours", "flex, sorted keys"]
    runner.run("bench", [*command, *flags, "--output", str(runner.output)], 150)


TRAIN_STEPS = 10
ARMS = {"dense": ["model.attention=dense"], "forgetting": [], "recalling": ["gist.recall=all"]}
CONFIG = dict(
    precision="bf16",
    model=dict(hidden_size=4096, layers=4, heads=32, kv_heads=8, head_dim=128, ffn_size=14336, max_position=131072),
    gist=dict(chunk_sizes=[8, 4]),
    train=dict(steps=1000, global_batch=1, valid_every=0, valid_samples=1),
    optimizer=dict(lr=1e-4),
    checkpoint=dict(every=1000),
    monitor=dict(wandb=False),
)


def train(runner: Runner, args: argparse.Namespace) -> None:
    shards = {name: [str(args.data / "shards" / f"sotu_{name}")] for name in ("train", "valid")}
    config = CONFIG | dict(data=shards | dict(tokenizer=str(args.data / "tokenizer"), raw_tokens=args.train_raw))
    path = runner.output / "train.json"
    path.write_text(json.dumps(config))  # JSON is YAML
    results = {}
    for name, changes in ARMS.items():
        run_dir = runner.output / f"run-{name}"
        sets = [x for change in changes for x in ("--set", change)]
        command = [sys.executable, "-m", "pretrain", "train", "--config", str(path), "--run-dir", str(run_dir), *sets]
        started = runner.start(f"train-{name}", command, 70)
        metrics, steps = run_dir / "metrics.jsonl", []
        # The last step would save 15 GB: enough has been seen before.
        while started[0].poll() is None and time.perf_counter() < started[2] and len(steps) < TRAIN_STEPS:
            time.sleep(0.2)
            steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        if started[0].poll() is None:
            os.killpg(started[0].pid, signal.SIGKILL)
        runner.finish(started, 8)
        if len(steps) > 2:
            rate = statistics.median(s["raw_tokens_per_s"] for s in steps[2:])
            results[name] = dict(raw_tokens_per_s=rate, loss=[s["loss"] for s in steps], last=steps[-1])
            runner.say(f"train, {name}: {rate:,.0f} raw tokens/s, loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}")
    path.write_text(json.dumps(dict(config=config, results=results), indent=1))


STEPS = {"check": check, "times": times, "decode": decode, "train": train, "bench": bench}


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {HERE}", description=__doc__, formatter_class=how)
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data", type=Path, default=Path("demo"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--train-raw", type=int, default=32768)
    parser.add_argument("--check-seconds", type=float, default=170)
    parser.add_argument("--times-seconds", type=float, default=130)
    parser.add_argument("--decode-seconds", type=float, default=55)
    parser.add_argument("--tests", default="test", help="pytest's -k: which of the tests of kernels")
    parser.add_argument("--times-flags", type=str.split, default=["--sweep"], help="flags of kernel_times, in one word")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    runner = Runner(args.output, begin + 60 * args.minutes, begin)
    for name in args.steps:
        if runner.left() < 15:
            runner.say(f"{name}: left out, time is up")
            continue
        runner.say(f"== {name}")
        try:
            STEPS[name](runner, args)
        except Exception as error:
            runner.say(f"{name}: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
