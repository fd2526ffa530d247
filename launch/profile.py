"""A cluster's settings: written once into a YAML file (``--cluster``), each of them also a flag that overrides the file."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path

from unfold.launch.values import memory, one_line, seconds
from unfold.pretrain.config import read_settings, read_yaml
from unfold.pretrain.errors import UserError


def option(default, doc: str, metavar: str = "VALUE"):
    """A field that is a key of the profile; with a metavar also a flag."""
    metadata = {"doc": doc, "metavar": metavar}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Container:
    """The image that the ranks run in; batch scripts run outside."""

    runtime: str = option("none", "none, pyxis (srun --container-image) or apptainer")
    image: str = option("", "image: what the runtime takes, e.g. nvcr.io#nvidia/pytorch:25.06-py3 or /images/unfold.sif")
    mounts: tuple[str, ...] = option((), "FROM:TO; working directory and run directory are mounted without being named")
    arguments: tuple[str, ...] = option((), "more options of the runtime, e.g. --container-writable")

    def __post_init__(self):
        if self.runtime not in ("none", "pyxis", "apptainer"):
            raise ValueError(f"runtime: {self.runtime!r} is not one of none, pyxis, apptainer")
        if (self.runtime == "none") != (self.image == ""):
            raise ValueError(f"image: {self.image!r} with runtime: {self.runtime}; give both, or neither")


@dataclass(frozen=True)
class Profile:
    """Everything about a cluster and a job that is no setting of the training itself."""

    job_name: str = option("", "job name (default: the run directory's name)", "NAME")
    account: str = option("", "account that is charged", "NAME")
    partition: str = option("", "partition (default: the cluster's)", "NAME")
    qos: str = option("", "quality of service", "NAME")
    time: str = option("", "time limit: MINUTES, H:MM:SS or DAYS-HOURS (default: the partition's)", "T")
    gpus_per_node: int = option(1, "GPUs of a node; 0 trains on CPUs (default: 1)", "G")
    gpu_request: str = option(
        "gpus-per-node", "how GPUs are asked for: gpus-per-node (default), gpus-per-node:TYPE, gres, gres:TYPE, none", "HOW"
    )
    ranks_per_node: int = option(0, "ranks of a node (default: one per GPU, or one)", "R")
    cpus_per_rank: int = option(0, "CPU cores of a rank (default: the cluster's)", "N")
    memory: str = option("", "memory of a node, e.g. 480G; 0 is all of it (default: the cluster's)", "SIZE")
    constraint: str = option("", "features that nodes must have", "EXPR")
    nodelist: str = option("", "nodes that must be among the job's", "NODES")
    exclude: str = option("", "nodes that the job must not get", "NODES")
    reservation: str = option("", "reservation", "NAME")
    exclusive: bool = option(False, "share no node with another job")
    mail_type: str = option("", "when SLURM sends mail, e.g. END,FAIL,REQUEUE", "TYPES")
    mail_user: str = option("", "whom SLURM sends mail", "ADDRESS")
    dependency: str = option("", "start after other jobs, e.g. afterany:1234", "EXPR")
    signal_lead: int = option(0, "seconds before the time limit to save at (default: a fifth of it, at most 600)", "S")
    requeue: bool = option(True, "go on in the same job after a time limit, a preemption or a fault (default: yes)")
    max_restarts: int = option(100, "restarts of one job (default: 100)", "N")
    max_stalled: int = option(3, "restarts in a row that bring no new checkpoint, after which the job ends (default: 3)", "N")
    health_check: bool = option(True, "check every node before the ranks start (default: yes)")
    launcher: str = option("torchrun", "torchrun: one task per node (default); srun: one task per rank", "WHICH")
    modules: tuple[str, ...] = option((), "environment modules to load; a flag may be repeated", "NAME")
    venv: str = option("", "virtual environment to activate", "DIR")
    python: str = option("", "Python to run (default: this one; with a venv or a container: python)", "FILE")
    setup: tuple[str, ...] = option((), "further shell lines, before anything starts", "LINE")
    sbatch: tuple[str, ...] = option((), "further sbatch options, e.g. --comment=x", "OPTION")
    srun: tuple[str, ...] = option((), "further srun options of the ranks, e.g. --cpu-bind=cores", "OPTION")
    environment: dict[str, str] = option({}, "environment variables, e.g. NCCL_SOCKET_IFNAME: ib0", "NAME=VALUE")
    container: Container = option(Container(), "container: runtime, image, mounts, arguments", "")
    cpu_jobs: dict[str, typing.Any] = option(
        {}, "settings that differ for jobs without GPUs (array, prepare, export), e.g. partition: cpu", ""
    )

    def __post_init__(self):
        errors = []
        for name, low in (("gpus_per_node", 0), ("ranks_per_node", 0), ("cpus_per_rank", 0), ("signal_lead", 0),
                          ("max_restarts", 0), ("max_stalled", 0)):  # fmt: skip
            if getattr(self, name) < low:
                errors.append(f"{name}: {getattr(self, name)} is below {low}")
        if self.gpu_request.partition(":")[0] not in ("gpus-per-node", "gres", "none"):
            errors.append(f"gpu_request: {self.gpu_request!r} is not gpus-per-node, gres (either also with :TYPE) or none")
        if self.launcher not in ("torchrun", "srun"):
            errors.append(f"launcher: {self.launcher!r} is not one of torchrun, srun")
        for name in self.environment:
            if not name.isidentifier():
                errors.append(f"environment: {name!r} is no name of a variable")
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def with_changes(self, **changes) -> Profile:
        """The profile with some settings replaced; checked as any other."""
        return _parse({**_plain(self), **changes}, "flags")

    def for_cpu_jobs(self) -> Profile:
        """The profile of jobs that need no GPU."""
        alone = {"gpus_per_node": 0, "ranks_per_node": 1, "launcher": "torchrun", "cpu_jobs": {}}
        return _parse({**_plain(self), **alone, **self.cpu_jobs}, "cpu_jobs")


def _plain(profile: Profile) -> dict:
    return {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}


def _flags() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Profile) if f.metadata["metavar"]]


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """``--cluster`` and a flag for every setting."""
    group = parser.add_argument_group("cluster settings", "each is also a key of the --cluster file, with _ for -")
    group.add_argument("--cluster", type=Path, metavar="YAML", help="profile of the cluster; flags override it")
    hints = typing.get_type_hints(Profile)
    for field in _flags():
        name, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        common = {"dest": f"profile_{field.name}", "default": None, "help": field.metadata["doc"].replace("%", "%%")}
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        elif kind in (int, str):
            group.add_argument(name, type=kind, metavar=field.metadata["metavar"], **common)
        else:
            group.add_argument(name, action="append", metavar=field.metadata["metavar"], **common)
    group.add_argument("--container-image", metavar="IMAGE", help="image of the ranks' container (container: in the file)")
    group.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="default: pyxis")
    group.add_argument("--container-mounts", metavar="FROM:TO,..", help="what the container sees")


def read_profile(args: argparse.Namespace) -> Profile:
    """The profile that the ``--cluster`` file and the flags give. Raises UserError with every error."""
    tree = _read(args.cluster) if args.cluster else {}
    for field in _flags():
        given = getattr(args, f"profile_{field.name}")
        if given is None:
            continue
        if field.name == "environment":
            given = {**tree.get("environment", {}), **dict(_assignment(item) for item in given)}
        elif isinstance(given, list):
            given = [*tree.get(field.name, ()), *given]
        tree[field.name] = given
    container = {"image": args.container_image, "runtime": args.container_runtime,
                 "mounts": args.container_mounts.split(",") if args.container_mounts else None}  # fmt: skip
    if any(container.values()):
        before = tree.get("container") or {"runtime": "pyxis"}
        tree["container"] = {**before, **{name: value for name, value in container.items() if value}}
    profile = _parse(tree, str(args.cluster or "flags"))
    profile.for_cpu_jobs()  # its errors too are told now
    return profile


def _assignment(item: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not sign:
        raise UserError(f"--environment {item}: expected NAME=VALUE, e.g. --environment NCCL_DEBUG=INFO")
    return name, value


def _read(path: Path) -> dict:
    # Every value is read as text: YAML would make 14400 of `time: 4:00:00`, which SLURM takes for minutes.
    tree = read_yaml(path, "--cluster", texts=True)
    if not isinstance(tree, dict):
        raise UserError(f"--cluster {path}: holds {type(tree).__name__}, expected keys such as `partition:`")
    return {key: value for key, value in tree.items() if value not in ("", "null", "~")}


def _lists(tree: dict, kind: type) -> dict:
    """Where a list of texts is meant, a text stands for its lines: `setup: |` and `modules: cuda/12` read as meant."""
    hints = typing.get_type_hints(kind)
    many = lambda name, value: hints.get(name) == tuple[str, ...] and isinstance(value, str)
    return {name: value.splitlines() if many(name, value) else value for name, value in tree.items()}


def _parse(tree: dict, source: str) -> Profile:
    profile = read_settings(Profile, _lists(tree, Profile), source)
    _check_texts(profile)
    return profile


def _check_texts(profile: Profile) -> None:
    for name, value in _plain(profile).items():
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, tuple) else value.values() if name == "environment" else (value,)
        for text in values:
            if isinstance(text, str):
                one_line(flag, text)
    if profile.time:
        seconds("--time", profile.time)
    if profile.memory:
        memory("--memory", profile.memory)
