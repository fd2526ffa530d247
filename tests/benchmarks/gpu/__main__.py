r"""Everything that only a GPU can tell, by one command: right or wrong, how fast, where the time goes, and a real training run.

    python -m tests.benchmarks.gpu [--minutes 12] [--output DIR] [--data DIR] [--steps ..]

Steps, each in processes of its own, each with a share of the time, none keeping the others from running:

- ``check``: tests.benchmarks.gpu.smoke, the same under compute-sanitizer, tests/kernels in parallel processes, and what a
  training step waits for (tests.benchmarks.gpu.waits), all at once;
- ``times``: every kernel's own time in whole steps, and at several tile sizes (tests.benchmarks.gpu.kernel_times --sweep);
- ``decode``: a decoding step beside dense attention, and its kernels (tests.benchmarks.gpu.decode_times);
- ``generate``: whole models that generate, launched operation by operation and replayed from CUDA graphs
  (tests.benchmarks.gpu.generate_times);
- ``bench``: compressed attention beside dense and FlexAttention (python -m tests.benchmarks.gpu.attention);
- ``counters``: hardware counters of the main kernels, by Nsight Compute;
- ``train``: training a model of Llama-8B's width and four layers (tests.benchmarks.gpu.training): at 32k tokens dense, forgetting
  and recalling, and what --arms names beside, each with a profile of one step;
- ``smollm2``: a released model's continued pretraining in several ways (tests.benchmarks.gpu.smollm2), where DATA/smollm2 is.

Training reads DATA (tokenizer/ and shards/sotu_train, as launch/demo.sh makes them; shards/suffix, supervised, and shards/long,
one document, for the arms that name them).
DIR gets a log and a file per step. A machine without a network may lack packages: --wheels names a folder of wheels, which go on
the path first. Made where there is a network, for Python 3.12, torch 2.11, Triton 3.6 and transformers being there (9 MB):

    pip wheel --no-deps --no-build-isolation -w WHEELS deepspeed==0.19.8
    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d WHEELS megatron-core==0.16.1 hjson pydantic==2.14.3 \
        pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions orjson==3.13.0

On a machine without a GPU everything runs in small, kernels in Triton's interpreter: so no step is untried; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.gpu import smollm2
from tests.benchmarks.gpu.runner import Runner
from tests.benchmarks.gpu.training import ARMS, pause, start_training, train

HERE = "tests.benchmarks.gpu"


TESTED = ("compressed_triton", "select_triton", "unfold_triton", "route_triton", "decode", "frames", "variants")


def check(runner: Runner, args: argparse.Namespace) -> None:
    python = [sys.executable, "-m"]
    smoke = [*python, f"{HERE}.smoke"]
    if not args.gpu:
        small = ["--raw", "200", "--dim", "64", "--heads", "2", "--kv-heads", "1", "--dtypes", "float32"]
        runner.finish(runner.start("smoke", [*smoke, *small], args.check_seconds))
        files = [f"tests/kernels/test_{name}_triton.py" for name in ("compressed", "unfold")]
        tests = [*python, "pytest", "-q", "-m", "not long", "-k", "hidden"]
        runner.finish(runner.start("tests", [*tests, *files], args.check_seconds))
        runner.run("waits", [*python, f"{HERE}.waits"], args.check_seconds)
        return
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *smoke, "--raw", "300", "--once"]
    workers = str(args.workers or max(2, (os.cpu_count() or 2) - 3))
    tests = [*python, "pytest", "-v", "--tb=short", "-m", "not long", "-k", args.tests, "-n", workers, "-p", "no:cacheprovider"]
    files = [f"tests/kernels/test_{name}.py" for name in TESTED]
    started = [
        runner.start("smoke", smoke, args.check_seconds),
        runner.start("tests", [*tests, *files], args.check_seconds),
        runner.start("sanitizer", [*sanitizer, "--dtypes", "bfloat16"], args.check_seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        runner.start("waits", [*python, f"{HERE}.waits"], args.check_seconds),
    ]
    if "train" in args.steps:
        runner.paused |= {name: start_training(runner, args, name) for name in args.arms[: args.paused]}
    if "times" in args.steps:  # what is timed later compiles beside them
        warm = [*python, f"{HERE}.kernel_times", "--compile-only", *args.times_flags]
        started.append(runner.start("warm", warm, args.check_seconds))
    if "decode" in args.steps:
        warm = [*python, f"{HERE}.decode_times", "--seconds", "0", *args.decode_flags]
        started.append(runner.start("warm-decode", warm, args.check_seconds))
    if "generate" in args.steps:
        warm = [*python, f"{HERE}.generate_times", "--seconds", "0"]
        started.append(runner.start("warm-generate", warm, args.check_seconds))
    if "bench" in args.steps:
        for raw in BENCH_RAW:
            flex = [*python, *BENCH, "--raw", str(raw), "--only", "flex, sorted keys", "--seconds", "0"]
            started.append(runner.start(f"warm-flex-{raw}", [*flex, "--output", "/tmp"], args.check_seconds))
    for arm in runner.paused.values():
        pause(arm, args.check_seconds)
    for process in started:
        runner.finish(process, 60)


def times(runner: Runner, args: argparse.Namespace) -> None:
    seconds = min(args.times_seconds, runner.left())
    if not args.gpu:
        args.times_flags = ["--raw", "200", "--recall-up-to", "200", "--all-up-to", "0"]
    command = [sys.executable, "-m", f"{HERE}.kernel_times", "--output", str(runner.output / "kernel_times.json")]
    runner.run("times", [*command, "--seconds", str(seconds - 10), *args.times_flags], seconds, 60)


def decode(runner: Runner, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", f"{HERE}.decode_times", "--output", str(runner.output / "decode_times.json")]
    command += args.decode_flags
    if not args.gpu:
        command += ["--raw", "256", "--batch", "1", "--heads", "2", "--kv-heads", "1", "--dim", "64", "--only", "default"]
    runner.run("decode", [*command, "--seconds", str(args.decode_seconds)], args.decode_seconds + 10, 60)


def generate(runner: Runner, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", f"{HERE}.generate_times", "--output", str(runner.output / "generate_times.json")]
    if not args.gpu:
        command += ["--raw", "64", "--batch", "2", "--tokens", "3", "--vocab", "512", "--hidden", "128", "--ffn", "256"]
        command += ["--layers", "2", "--heads", "2", "--kv-heads", "1", "--dim", "64"]
    runner.run("generate", [*command, "--seconds", str(args.generate_seconds)], args.generate_seconds + 20, 60)


BENCH_RAW = (8192, 32768, 131072)
BENCH = ["tests.benchmarks.gpu.attention", "--chunks", "8,4"]


def bench(runner: Runner, args: argparse.Namespace) -> None:
    command = [sys.executable, "-m", *BENCH, "--raw", *map(str, BENCH_RAW)]
    if not args.gpu:
        runner.run("bench", [sys.executable, "-m", *BENCH, "--raw", "512", "--seconds", "0", "--output", str(runner.output)], 150)
        return
    flags = ["--seconds", "0.1", "--only", "dense SDPA", "dense cuDNN", "ours", "flex, sorted keys"]
    runner.run("bench", [*command, *flags, "--output", str(runner.output)], 150)


def counters(runner: Runner, args: argparse.Namespace) -> None:
    """Hardware counters of the kernels that take most of the time, by Nsight Compute where it is installed."""
    if not args.gpu or not shutil.which("ncu"):
        runner.say("counters: left out, there is no ncu here" if args.gpu else "counters: left out, there is no GPU here")
        return
    names = "regex:^(forward_kernel|d_query_kernel|d_key_kernel|unfold_kernel|score_kernel|bound_kernel)"
    ncu = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", names, "--launch-skip", "12", "--launch-count", "12"]
    command = [sys.executable, "-m", f"{HERE}.kernel_times", "--raw", "32768", "--no-dense", "--all-up-to", "0"]
    output = ["--output", str(runner.output / "counters_times.json")]
    runner.run("counters", [*ncu, "--log-file", str(runner.output / "counters.csv"), *command, *output], 120, 5)


STEPS = {
    "check": check,
    "times": times,
    "train": train,
    "decode": decode,
    "generate": generate,
    "bench": bench,
    "counters": counters,
    "smollm2": smollm2.step,
}


def install(wheels: Path, site: Path) -> None:
    """Put wheels where the steps' processes find them, and nowhere else."""
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {HERE}", description=__doc__, formatter_class=how)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data", type=Path, default=Path("demo"))
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:3])
    parser.add_argument("--paused", type=int, default=0, help="arms that start while everything is checked; each takes 55 GB")
    parser.add_argument("--train-raw", type=int, default=32768)
    parser.add_argument("--check-seconds", type=float, default=170)
    parser.add_argument("--times-seconds", type=float, default=130)
    parser.add_argument("--workers", type=int, default=0, help="processes of the tests; 0: by the number of cores")
    parser.add_argument("--decode-seconds", type=float, default=55)
    parser.add_argument("--generate-seconds", type=float, default=70)
    parser.add_argument("--arm-seconds", type=float, default=70, help="at most so long for an arm of training")
    parser.add_argument("--decode-flags", type=str.split, default=[], help="flags of decode_times, in one word")
    parser.add_argument("--tests", default="test", help="pytest's -k: which of the tests of kernels")
    parser.add_argument("--times-flags", type=str.split, default=["--sweep"], help="flags of kernel_times, in one word")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.wheels:
        install(args.wheels, args.output / "site")
    args.gpu = torch.cuda.is_available()
    if not args.gpu:
        args.train_raw = 256
        os.environ |= {"TRITON_INTERPRET": "1"}
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
