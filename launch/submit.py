"""Writing scripts beside a run and handing them to SLURM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from unfold.pretrain.errors import UserError

OF_SLURM = ("SLURM_", "SBATCH_", "SRUN_")  # variables that an allocation sets, or that stand for options
KEPT_OF_SLURM = ("SLURM_CONF",)  # where the cluster's configuration lies
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


def slurm(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a SLURM command. Raises UserError where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit from a login node of a cluster (--dry-run shows the script)") from None


def job_environment() -> dict[str, str]:
    """This process' environment without what an allocation that it runs in would pass on to a job of its own: sbatch takes
    options from such variables, and srun in the job does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_SLURM) or name in KEPT_OF_SLURM}
    asked = sorted(name for name in os.environ.keys() - kept.keys() if name.startswith("SBATCH_"))
    if asked:
        print(f"note: {', '.join(asked)}: not passed on; say it by a flag or in the cluster's profile", file=sys.stderr)
    return kept


def submit(script: Path, kind: str, log: Path) -> Job:
    """Hand a script to sbatch and note the job in ``jobs.jsonl`` beside it.

    Raises:
        UserError: sbatch refused it; with what sbatch said.
    """
    done = slurm("sbatch", "--parsable", str(script), environment=job_environment())
    said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip())
    number = job_number(done.stdout) if not done.returncode else None
    if number is None:  # a controller that answers late may have queued it all the same; some wrappers say no number
        number = queued_as(script)
    if number is None and done.returncode:
        raise UserError(f"sbatch refused {script}: {said or f'exit code {done.returncode}'}")
    if number is None:
        _note(script, kind, None, str(log))
        raise UserError(
            f"sbatch took {script}, but gave no job number (it said {done.stdout.strip()[:200]!r}), and squeue does not show "
            "the job yet; look for it with `squeue --me` before you submit again"
        )
    if done.returncode:
        print(f"note: sbatch reported an error ({said}), but job {number} is in the queue", file=sys.stderr)
    named = log.with_name(log.name.replace("%j", str(number)).replace("%A", str(number)))
    _note(script, kind, number, str(named))
    return Job(number, script, str(named))


def job_number(said: str) -> int | None:
    """The number in what ``sbatch --parsable`` wrote: a line ``NUMBER`` or ``NUMBER;CLUSTER``, among those of submit filters."""
    found = [match[1] for line in said.splitlines() if (match := re.fullmatch(r"\s*(\d+)(;\S*)?\s*", line))]
    return int(found[-1]) if found else None


def queued_as(script: Path) -> int | None:
    """The number of the job that runs a script, whose name no other job has; None where squeue shows none."""
    try:
        done = slurm("squeue", "--noheader", "--format", "%A|%o")
    except UserError:
        return None
    jobs = [line.strip().partition("|") for line in done.stdout.splitlines()]
    return next((int(number) for number, _, command in jobs if command == str(script) and number.isdecimal()), None)


def _note(script: Path, kind: str, number: int | None, log: str) -> None:
    """number: None where sbatch said none."""
    line = {"job": number, "kind": kind, "script": str(script), "log": log, "submitted": datetime.now(UTC).isoformat()}
    path = script.parent / JOBS
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(line) + "\n")


def cancel(jobs: list[Job]) -> None:
    """Take back jobs of a chain whose later part was refused."""
    if jobs:
        slurm("scancel", *(str(job.number) for job in jobs))


def living_jobs(directory: Path, kind: str) -> list[tuple[int, str]]:
    """Jobs noted in a launch directory that SLURM still has, with their states."""
    living = []
    for line in _noted(directory / JOBS):
        number = line["job"] if line["job"] is not None else queued_as(Path(line["script"]))
        if line["kind"] != kind or number is None:
            continue
        done = slurm("squeue", "--noheader", "--jobs", str(number), "--format", "%T")
        if done.returncode == 0 and done.stdout.split():  # an unknown number is an error to squeue
            living.append((number, done.stdout.split()[0]))
    return living


def _noted(path: Path) -> list[dict]:
    """What was submitted; a line that was torn by a crash is told and passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text) if text.strip() else None
            if line is not None:
                found.append({"job": line["job"], "kind": line["kind"], "script": line["script"]})
        except (ValueError, KeyError, TypeError):
            note = f"note: {path}:{number}: is damaged and passed over; `squeue --me` shows a job that it may have named"
            print(note, file=sys.stderr)
    return found


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
