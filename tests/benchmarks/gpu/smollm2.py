r"""SmolLM2-135M's continued pretraining on one GPU in minutes: all arms of tests.benchmarks.smollm2_gists side by side.

    python -m tests.benchmarks.gpu.smollm2 --output DIR --calibrate                # what a step takes here; fills the caches
    python -m tests.benchmarks.gpu.smollm2 --output DIR --minutes 5                # trains and evaluates

DIR holds imported/ and text_train.*, text_valid.*, as smollm2_gists makes them there. Every arm is a process of its own; they
share the card. All take the same samples and the same number of steps: as many as the time allows by what the calibration found,
or --steps. An arm that runs ahead is paused, so that all come to a checkpoint at about the same time: should the time be up
before the last step, all arms are evaluated at the last checkpoint that each of them has. Calibration takes steps of models that
know nothing (it needs no weights) and evaluates them, each in small; where compiled pointwise functions fail it says so, and
the arms then run without.

Writes results.json (rates, curves, what was evaluated), table.md, log.txt and a log of each process in logs/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.gpu.runner import Runner
from tests.benchmarks.smollm2_gists import ARMS, USUAL, evaluations, findings, table, training
from unfold.pretrain.monitor.metrics import read_metrics

CALIBRATION_STEPS = 12
SPARE = 0.92  # of the time that calibration allows is planned for


class Course:
    """Processes beside each other, a clock and a log; none outlives it."""

    def __init__(self, output: Path, minutes: float):
        self.logs = output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._log = output / "log.txt"
        self.begin = time.monotonic()
        self.deadline = self.begin + 60 * minutes
        self._processes: list[subprocess.Popen] = []
        threads = str(max(1, (os.cpu_count() or 1) // 8))
        self._environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.begin:5.0f} s] {text}"
        print(line, flush=True)
        with open(self._log, "a") as file:
            file.write(line + "\n")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, name: str, arguments: list) -> subprocess.Popen:
        """Start ``pretrain`` with arguments, in a group of its own."""
        command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
        with open(self.logs / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        self._processes.append(process)
        return process

    def __enter__(self) -> Course:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            stop(process)

    def ended(self, name: str, process: subprocess.Popen) -> bool:
        """Whether it ended well; if it ended otherwise its last lines are told."""
        if process.poll():
            lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-12:]
            self.say("\n    ".join([f"{name}: exit {process.returncode}", *lines]))
        return process.poll() == 0


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ahead(done: dict[str, int], most: int) -> set[str]:
    """Arms that are to wait: ``most`` steps or more before the last one."""
    return {arm for arm, steps in done.items() if steps - min(done.values()) >= most}


def common_checkpoint(run_dirs: list[Path]) -> int:
    """The last step that every run has a whole checkpoint of; 0 where there is none."""
    steps = [{int(file.parent.name.split("-")[1]) for file in d.glob("checkpoints/step-*/manifest.json")} for d in run_dirs]
    return max(set.intersection(*steps), default=0) if steps else 0


def pace(moments: list[float]) -> float:
    """Seconds in which every arm does a step, from the moments at which all had done 0, 1, 2, .. of a calibration's: a mean over
    its three thirds of their medians, since the settings of arms change between steps, and then something compiles."""
    seconds = [after - before for before, after in zip(moments[1:], moments[2:])]
    edges = [round(i * len(seconds) / 3) for i in range(4)]
    return statistics.mean(statistics.median(seconds[lo:hi]) for lo, hi in itertools.pairwise(edges))


def planned_steps(calibration: dict, seconds: float, checkpoints: int) -> int:
    """Steps that all arms do in so many seconds, their start included; a multiple of the number of checkpoints."""
    steps = SPARE * (seconds - calibration["start_s"]) / calibration["step_s"]
    return max(checkpoints, int(steps) // checkpoints * checkpoints)


def train(course: Course, args: argparse.Namespace, until: float, **others) -> tuple[dict[str, int], list[float]]:
    """Train all arms until they end or the time is up; steps of those that did not fail, and when all had done 0, 1, .. steps."""
    for arm in args.arms:
        shutil.rmtree(args.output / "runs" / arm, ignore_errors=True)
    settings = {
        "train__micro_batch": args.micro_batch,
        "train__fuse_pointwise": str(args.fuse).lower(),
        "data__valid": "[]",
        "faults__hang_minutes": 0,
    }
    commands = {arm: training(args, arm, **settings, **others) for arm in args.arms}
    running = {arm: course.start(f"train-{arm}", command) for arm, command in commands.items()}
    done, moments, waiting, told = dict.fromkeys(running, 0), [time.monotonic()], set(), course.left()
    while any(process.poll() is None for process in running.values()) and time.monotonic() < until:
        time.sleep(0.1)
        for arm, process in list(running.items()):
            if process.poll():
                course.ended(f"train-{arm}", process)
                del running[arm], done[arm]
        for arm in running:
            metrics = args.output / "runs" / arm / "metrics.jsonl"
            done[arm] = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        moments += [time.monotonic()] * max(0, min(done.values(), default=0) + 1 - len(moments))
        should = ahead(done, args.ahead)
        for arm in should ^ waiting:
            if arm in running and running[arm].poll() is None:
                os.killpg(running[arm].pid, signal.SIGSTOP if arm in should else signal.SIGCONT)
        waiting = should
        if told - course.left() >= 15:
            told = course.left()
            course.say(f"steps: {', '.join(f'{arm} {steps}' for arm, steps in done.items())}")
    for process in running.values():
        stop(process)
    return done, moments


def start_evaluations(course: Course, args: argparse.Namespace, steps: dict[str, int]) -> dict[str, subprocess.Popen]:
    """Start all evaluations of arms' checkpoints at once (of step 0: of the imported model, whatever the arm)."""
    started = {}
    for arm, step in steps.items():
        name = f"{arm}-{step}" if step else "before"
        for kind, arguments in evaluations(args, arm, step, args.output / "evaluated" / name).items():
            started[f"{kind}-{name}"] = course.start(f"{kind}-{name}", arguments)
    return started


def await_all(course: Course, started: dict[str, subprocess.Popen]) -> bool:
    """Wait until processes end or the time is up; whether all ended well."""
    while any(process.poll() is None for process in started.values()) and course.left() > 0:
        time.sleep(0.1)
    late = [name for name, process in started.items() if process.poll() is None]
    for process in started.values():
        stop(process)
    if late:
        course.say(f"stopped, the time was up: {', '.join(late)}")
    return all([course.ended(name, process) for name, process in started.items() if name not in late]) and not late


def calibrate(course: Course, args: argparse.Namespace) -> dict:
    """What a step of all arms takes, measured with weights that are drawn; every kernel compiles meanwhile."""
    args.steps = CALIBRATION_STEPS
    for fuse in [True, False] if args.fuse else [False]:
        args.fuse = fuse
        done, moments = train(course, args, course.deadline, train__init_from='""', checkpoint__every=CALIBRATION_STEPS)
        if all(done.get(arm) == CALIBRATION_STEPS for arm in args.arms):
            break
        course.say(
            f"calibration with train.fuse_pointwise: {args.fuse} failed for {set(args.arms) - set(done) or 'want of time'}"
        )
    found = {"arms": list(done), "fuse": args.fuse, "steps": done, "device": device()}
    if len(moments) > 4:
        found |= {"start_s": moments[1] - moments[0], "step_s": pace(moments)}
    args.tokens = min(args.tokens, 4 * args.raw_tokens)
    trained = {arm: steps for arm, steps in done.items() if steps == CALIBRATION_STEPS}
    found["evaluated"] = await_all(course, start_evaluations(course, args, trained))
    found["memory_gib"] = {arm: max(line["memory_gib"] for line in curve(args, arm)) for arm in trained}
    shutil.rmtree(args.output / "runs", ignore_errors=True)
    shutil.rmtree(args.output / "evaluated", ignore_errors=True)
    return found


def curve(args: argparse.Namespace, arm: str) -> list[dict]:
    metrics = args.output / "runs" / arm / "metrics.jsonl"
    return read_metrics(metrics) if metrics.exists() else []


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def experiment(course: Course, args: argparse.Namespace) -> dict:
    """Train, evaluate, and write what was found."""
    calibration = args.output / "calibration.json"
    known = json.loads(calibration.read_text()) if calibration.exists() else {}
    args.fuse = known.get("fuse", args.fuse)
    until = course.deadline - args.evaluate_seconds
    if not args.steps:
        if "step_s" not in known:
            raise SystemExit(f"--steps: is needed, {calibration} does not tell what a step takes; or run with --calibrate first")
        args.steps = planned_steps(known, until - time.monotonic(), args.checkpoints)
    course.say(f"{args.steps} steps of {args.batch} x {args.raw_tokens} raw tokens, arms {', '.join(args.arms)}, {device()}")
    before = start_evaluations(course, args, {"dense": 0}) if args.before else {}
    done, moments = train(course, args, until, checkpoint__every=max(1, args.steps // args.checkpoints), checkpoint__keep=3)
    step = common_checkpoint([args.output / "runs" / arm for arm in done])
    course.say(f"trained: {done}; evaluated at step {step} of {args.steps}")
    await_all(course, before | (start_evaluations(course, args, dict.fromkeys(done, step)) if step else {}))
    results = {"before": findings(args.output / "evaluated" / "before")} if args.before else {}
    for arm in done:
        found = findings(args.output / "evaluated" / f"{arm}-{step}")
        results[f"{arm} {step}"] = {"arm": arm, "raw_tokens": step * args.batch * args.raw_tokens, **found}
    kept = ("steps", "batch", "micro_batch", "raw_tokens", "lr", "precision", "evaluation_dtype", "tokens", "fuse")
    names = (
        "step",
        "loss",
        "route_loss",
        "grad_norm",
        "lr",
        "unfolded_tokens",
        "selected_gists",
        "distill_logits",
        "raw_tokens_per_s",
    )
    curves = {arm: [{n: line[n] for n in names if n in line} for line in curve(args, arm)] for arm in done}
    text = {"device": device(), "settings": {n: getattr(args, n) for n in kept}, "calibration": known, "evaluated_step": step}
    seconds = {"start_s": moments[1] - moments[0] if len(moments) > 1 else None, "train_s": moments[-1] - moments[0]}
    last_lines = {arm: (curve(args, arm) or [{}])[-1] for arm in done}
    everything = text | seconds | {"results": results, "last_lines": last_lines, "curves": curves}
    (args.output / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    (args.output / "table.md").write_text("\n".join(table(results)) + "\n")
    return results


def step(runner: Runner, args: argparse.Namespace) -> None:
    """The step ``smollm2`` of tests.benchmarks.gpu, in the time that is left: a third calibrates, the rest trains and evaluates.

    DATA/smollm2 holds imported/ and the shards; where it does not, the step is left out. On a CPU a few small steps are taken.
    """
    source, output = args.data / "smollm2", runner.output / "smollm2"
    if not (source / "imported" / "config.yaml").exists():
        runner.say(f"smollm2: left out, {source} has no imported/ (python -m tests.benchmarks.smollm2_gists makes it)")
        return
    output.mkdir(exist_ok=True)
    for path in source.glob("*"):
        if path.name == "imported" or path.name.startswith("text_"):
            (output / path.name).symlink_to(path.resolve())
    command = [sys.executable, "-m", "tests.benchmarks.gpu.smollm2", "--output", str(output), "--before"]
    if not args.gpu:
        command += ["--arms", "dense", "recipe_8", "--batch", "1", "--micro-batch", "1", "--raw-tokens", "256", "--no-fuse"]
        command += ["--precision", "fp32", "--evaluation-dtype", "fp32", "--tokens", "512"]
    for name, more, part in (("smollm2-calibrate", ["--calibrate"], 0.33), ("smollm2", [], 1.0)):
        seconds = part * (runner.left() - 15)
        runner.run(name, [*command, *more, "--minutes", str(seconds / 60)], seconds + 10)


def main() -> int:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu.smollm2", description=__doc__, formatter_class=how)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="holds imported/ and text_*; all is written there"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="after which everything has ended")
    parser.add_argument("--calibrate", action="store_true", help="only measure what a step takes; no weights are needed")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=USUAL, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=0, help="of every arm; 0: what calibration allows")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples that are computed at a time")
    parser.add_argument("--raw-tokens", type=int, default=4096, help="of a sample, and of a window of the evaluation")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training")
    parser.add_argument("--evaluation-dtype", choices=("fp32", "bf16"), default="bf16", help="of weights and activations")
    parser.add_argument("--tokens", type=int, default=262144, help="held-out raw tokens that are evaluated on")
    parser.add_argument("--evaluate-seconds", type=float, default=80, help="kept for evaluation after training")
    parser.add_argument("--checkpoints", type=int, default=10, help="of every arm, at equal distances")
    parser.add_argument("--ahead", type=int, default=3, help="steps that an arm may be before the last one")
    parser.add_argument("--before", action="store_true", help="also evaluate the model as it was imported")
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="do not compile pointwise functions")
    args = parser.parse_args()
    args.output = args.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Course(args.output, args.minutes) as course:
        if args.calibrate:
            found = calibrate(course, args)
            (args.output / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
            course.say(f"calibration: {json.dumps(found)}")
        else:
            print("\n".join(table(experiment(course, args))), flush=True)
            course.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
