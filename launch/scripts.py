"""Batch scripts, from the templates in ``templates/``. Every value is quoted for the shell, or for sbatch, where it stands."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from unfold.launch.profile import Profile
from unfold.launch.values import memory, one_line, seconds, signal_lead
from unfold.pretrain.config import RunConfig
from unfold.pretrain.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
DEFAULT_LIMIT = 3600  # seconds; what the signal's lead is reckoned from where only the partition knows the limit


def for_sbatch(text: str) -> str:
    """A value on an ``#SBATCH`` line: sbatch splits these itself and knows double quotes and backslashes."""
    if re.fullmatch(r"[\w@%+=:,./\[\]*&|()-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def safe_name(text: str) -> str:
    """A name as part of file names."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "run"


def log_pattern(path: Path) -> str:
    """A log file's path for sbatch, whose ``%`` it would expand; the part after the last slash is a pattern already."""
    parent = str(path.parent)
    if "\\" in parent:
        raise UserError(f"{parent}: sbatch cannot write logs into a directory with a backslash in its name")
    return f"{parent.replace('%', '%%')}/{path.name}"


def environment(profile: Profile) -> dict[str, str]:
    """Variables that a job exports: the profile's, and what the ranks need where it says nothing."""
    return {"OMP_NUM_THREADS": str(profile.cpus_per_rank or 1), "PYTHONUNBUFFERED": "1", **profile.environment}


def python_of(profile: Profile) -> str:
    """The Python that a job runs: the one that runs now, unless a virtual environment or a container brings its own."""
    return profile.python or ("python" if profile.venv or profile.container.runtime != "none" else sys.executable)


def _gpu_option(profile: Profile) -> list[str]:
    how, _, kind = profile.gpu_request.partition(":")
    if not profile.gpus_per_node or how == "none":
        return []
    count = f"{kind}:{profile.gpus_per_node}" if kind else str(profile.gpus_per_node)
    return [f"--gpus-per-node={count}" if how == "gpus-per-node" else f"--gres=gpu:{count}"]


def sbatch_options(profile: Profile, name: str, log: Path, nodes: int, cwd: Path, dependency: str = "") -> list[str]:
    """The options that every job has, each quoted for its ``#SBATCH`` line."""
    tasks = profile.ranks if profile.launcher == "srun" else 1
    cpus = profile.cpus_per_rank * (profile.ranks // tasks)
    given = {
        "job-name": name,
        "output": log_pattern(log),
        "chdir": str(cwd),
        "nodes": str(nodes),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(cpus) if cpus else "",
        "mem": memory("--memory", profile.memory) if profile.memory else "",
        "time": profile.time,
        "dependency": ",".join(filter(None, (dependency, profile.dependency))),
        "mail-type": profile.mail_type,
        "mail-user": profile.mail_user,
        **{n: getattr(profile, n)
           for n in ("account", "partition", "qos", "constraint", "nodelist", "exclude", "reservation")},
    }  # fmt: skip
    options = [f"--{name}={for_sbatch(one_line('--' + name, value))}" for name, value in given.items() if value]
    options += _gpu_option(profile)
    options += ["--exclusive"] if profile.exclusive else []
    # A job whose dependency failed would wait for ever.
    return [*options, "--open-mode=append", "--kill-on-invalid-dep=yes", *profile.sbatch]


@dataclass(frozen=True)
class ContainerWords:
    """How the commands of a job get into the container."""

    srun: str  # options of srun, each with a blank before it
    prefix: str  # what stands before the command, with a blank after it

    @classmethod
    def of(cls, profile: Profile, inside: list[Path]) -> ContainerWords:
        """inside: directories that the container sees, whatever the profile says."""
        container = profile.container
        mounts = [*container.mounts, *(f"{path}:{path}" for path in dict.fromkeys(inside))]
        more = list(container.arguments)
        if container.runtime == "pyxis":
            words = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}",
                     f"--container-workdir={inside[0]}", *more]  # fmt: skip
            return cls(" " + shlex.join(words), "")
        if container.runtime == "apptainer":
            gpus = ["--nv"] if profile.gpus_per_node else []
            words = ["apptainer", "exec", *gpus, "--bind", ",".join(mounts), "--pwd", str(inside[0]), *more, container.image]
            return cls("", shlex.join(words) + " ")
        return cls("", "")


def render(template: str, profile: Profile, options: list[str], cwd: Path, inside: list[Path], **values) -> str:
    """A script of ``templates/NAME.sh.j2``."""
    frame = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        comment_start_string="{##",  # ${#array[@]} is shell
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    frame.filters["q"] = lambda value: shlex.quote(str(value))
    words = ContainerWords.of(profile, [cwd, *inside])
    return frame.get_template(f"{template}.sh.j2").render(
        profile=profile,
        container=profile.container,
        container_srun=words.srun,
        container_prefix=words.prefix,
        options=options,
        environment=environment(profile),
        python=python_of(profile),
        cwd=cwd,
        made_by=re.sub(r"[\x00-\x1f\x7f]", "?", shlex.join(["python", "-m", "launch", *sys.argv[1:]])),
        **values,
    )


def training_script(
    profile: Profile, config: RunConfig, config_file: Path, overrides: list[str], run_dir: Path, nodes: int, dependency: str = ""
) -> str:
    """The script of a training job, which looks after itself until the run is finished.

    config_file: the copy of the configuration that belongs to the job, so that later edits of the user's file do not reach it.
    """
    cwd = Path.cwd()
    name = profile.job_name or run_dir.name
    limit = seconds("--time", profile.time) if profile.time else DEFAULT_LIMIT
    lead = signal_lead(profile.signal_lead, limit)
    options = sbatch_options(profile, name, run_dir / "launch" / f"{safe_name(name)}-%j.log", nodes, cwd, dependency)
    options += [f"--signal=B:USR1@{lead}", "--requeue" if profile.requeue else "--no-requeue"]
    settings = [part for item in overrides for part in ("--set", item)]
    return render(
        "train",
        profile,
        options,
        cwd,
        [run_dir.parent],
        config=config,
        run_dir=run_dir,
        name=safe_name(name),
        # SLURM may signal a minute early, never late; what remains after the save is for the requeue.
        save_seconds=max(lead - min(30, lead // 4), 1),
        train_words=["--config", str(config_file), "--run-dir", str(run_dir), *settings],
    )


def command_script(profile: Profile, name: str, log: Path, words: list[str], inside: list[Path], dependency: str = "") -> str:
    """The script of a job that is one ``python -m`` command."""
    options = sbatch_options(profile, name, log, 1, Path.cwd(), dependency)
    return render("command", profile, options, Path.cwd(), inside, words=words)
