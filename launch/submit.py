"""Writing scripts beside a run and handing them to SLURM."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from unfold.pretrain.errors import UserError

JOBS = "jobs.jsonl"  # what was submitted for a run: one object per job


@dataclass(frozen=True)
class Job:
    """A submitted job. log: where its output goes, with the job's number filled in."""

    number: int
    script: Path
    log: str


def write_new(directory: Path, name: str, suffix: str, text: str) -> Path:
    """Write a file ``NAME-001SUFFIX``, with the first number that is free; nothing is ever overwritten."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1_000_000):
            path = directory / f"{name}-{number:03d}{suffix}"
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(text)
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written ({error.strerror})") from None
    raise UserError(f"{directory}: holds a million scripts; remove some")


def slurm(*command: str) -> subprocess.CompletedProcess:
    """Run a SLURM command. Raises UserError where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit from a login node of a cluster (--dry-run shows the script)") from None


def submit(script: Path, kind: str, log: Path) -> Job:
    """Hand a script to sbatch and note the job in ``jobs.jsonl`` beside it.

    Raises:
        UserError: sbatch refused it; with what sbatch said.
    """
    done = slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"sbatch refused {script}: {said or f'exit code {done.returncode}'}")
    number = int(done.stdout.strip().split(";")[0])
    named = log.with_name(log.name.replace("%j", str(number)).replace("%A", str(number)))
    job = Job(number, script, str(named))
    line = {"job": number, "kind": kind, "script": str(script), "log": job.log, "submitted": datetime.now(UTC).isoformat()}
    with open(script.parent / JOBS, "a") as file:
        file.write(json.dumps(line) + "\n")
    return job


def cancel(jobs: list[Job]) -> None:
    """Take back jobs of a chain whose later part was refused."""
    if jobs:
        slurm("scancel", *(str(job.number) for job in jobs))


def living_jobs(directory: Path, kind: str) -> list[tuple[int, str]]:
    """Jobs noted in a launch directory that SLURM still has, with their states."""
    try:
        lines = (directory / JOBS).read_text().splitlines()
    except OSError:
        return []
    numbers = [line["job"] for line in map(json.loads, filter(None, lines)) if line["kind"] == kind]
    living = []
    for number in numbers:
        done = slurm("squeue", "--noheader", "--jobs", str(number), "--format", "%T")
        if done.returncode == 0 and done.stdout.split():  # an unknown number is an error to squeue
            living.append((number, done.stdout.split()[0]))
    return living


def refuse_second_job(directory: Path, dependency: str) -> None:
    """Two jobs in one run directory would fight; one that waits for the other may be submitted.

    Raises:
        UserError: a job of this run is waiting or running.
    """
    living = living_jobs(directory, "train")
    if living and not dependency:
        number, state = living[-1]
        raise UserError(
            f"{directory.parent}: job {number} ({state}) has this run directory; cancel it (scancel {number}), submit one that "
            f"follows it (--dependency afterany:{number}), or name another --run-dir"
        )
