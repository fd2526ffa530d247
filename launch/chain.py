"""``launch chain``: prepare -> train -> evaluate -> export, each a job that starts when the one before has succeeded."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from unfold.launch.fit import check_data
from unfold.launch.profile import Profile, read_profile
from unfold.launch.scripts import command_script, safe_name
from unfold.launch.submit import Job, cancel, refuse_second_job, submit, write_new
from unfold.launch.training import checked_config, note_cpu_build, submit_training
from unfold.pretrain.errors import UserError

PACKAGES = ("data_prep", "pretrain")


@dataclass(frozen=True)
class ChainStep:
    """A job of a chain: a ``python -m`` command, or the training itself (no words)."""

    name: str
    profile: Profile
    words: tuple[str, ...] = ()


def _words(flag: str, command: str) -> tuple[str, ...]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{flag} {command!r}: cannot be split into words ({error})") from None
    if not words or words[0] not in PACKAGES:
        raise UserError(f"{flag} {command!r}: expected what follows `python -m`, beginning with {' or '.join(PACKAGES)}")
    return (f"unfold.{words[0]}", *words[1:])  # found wherever the job runs, which the folders of a checkout are not


def _one_node(profile: Profile) -> Profile:
    """For a command that is one process and may use a GPU."""
    changes = {"gpus_per_node": min(profile.gpus_per_node, 1), "ranks_per_node": 1, "launcher": "torchrun"}
    return profile.with_changes(**changes)


def steps_of(args: argparse.Namespace, profile: Profile) -> list[ChainStep]:
    """The jobs in their order. Raises UserError for a command that is none."""
    cpu = profile.for_cpu_jobs()
    steps = [ChainStep("prepare", cpu, _words("--prepare", command)) for command in args.prepare]
    steps.append(ChainStep("train", profile))
    steps += [ChainStep("evaluate", _one_node(profile), _words("--evaluate", command)) for command in args.evaluate]
    if args.export:
        export = ("unfold.pretrain", "export", "--run-dir", str(args.run_dir.resolve()), "--output", str(args.export.resolve()))
        steps.append(ChainStep("export", cpu, export))
    return steps


def run_chain(args: argparse.Namespace) -> int:
    """``launch chain``: all jobs are submitted at once; if one is refused, those before it are taken back."""
    profile = read_profile(args)
    config = checked_config(args, profile)
    steps = steps_of(args, profile)
    if not args.prepare:
        check_data(config)  # else it is still to be made
    note_cpu_build(profile)
    run_dir = args.run_dir.resolve()
    directory = run_dir / "launch"
    if not args.dry_run:
        refuse_second_job(directory, profile.dependency)
    jobs: list[Job] = []
    try:
        for step in steps:
            job = _submit(args, step, config, directory, f"afterok:{jobs[-1].number}" if jobs else "")
            if job:
                jobs.append(job)
                print(f"job {job.number}: {step.name}; script: {job.script}; log: {job.log}", flush=True)
    except UserError:
        cancel(jobs)
        if jobs:
            print(f"note: cancelled {', '.join(str(job.number) for job in jobs)} again", file=sys.stderr)
        raise
    return 0


def _submit(args: argparse.Namespace, step: ChainStep, config, directory: Path, dependency: str) -> Job | None:
    if args.dry_run and step.name != "prepare":
        dependency = dependency or ("afterok:PREVIOUS" if args.prepare or step.name != "train" else "")
    if step.name == "train":
        job, script = submit_training(args, step.profile, config, dependency, own=False)
    else:
        run = safe_name(step.profile.job_name or args.run_dir.resolve().name)
        log = directory / f"{run}-{step.name}-%j.log"
        script = command_script(step.profile, f"{run}-{step.name}", log, list(step.words), [directory.parent.parent], dependency)
        job = None if args.dry_run else submit(write_new(directory, f"{run}-{step.name}", ".sbatch", script), step.name, log)
    if args.dry_run:
        print(script)
    return job
