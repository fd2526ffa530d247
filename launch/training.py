"""``launch slurm`` and ``launch local``: one training run on a cluster, or on this machine."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

from unfold.launch.fit import check_data, check_ranks, check_resume, heads_between_nodes
from unfold.launch.forward import run_torchrun
from unfold.launch.profile import Profile, read_profile
from unfold.launch.scripts import python_of, safe_name, training_script
from unfold.launch.submit import Job, refuse_second_job, submit, write_new
from unfold.launch.values import one_line
from unfold.pretrain.config import RunConfig, load_config
from unfold.pretrain.errors import UserError


def checked_config(args: argparse.Namespace, profile: Profile) -> RunConfig:
    """The run's configuration, if so many nodes can train it. Raises UserError."""
    if args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}: is below 1")
    config = load_config(args.config, args.overrides)
    how = "--ranks-per-node" if profile.ranks_per_node or not profile.gpus_per_node else "--gpus-per-node"
    check_ranks(config, args.nodes * profile.ranks, f"--nodes {args.nodes} x {how} {profile.ranks}")
    check_run_dir(args.run_dir)
    check_resume(config, args.run_dir)
    if slow := heads_between_nodes(config, args.nodes, profile.ranks):
        print(f"note: {slow}", file=sys.stderr)
    return config


def check_run_dir(run_dir: Path) -> None:
    """Raises UserError where no run can be."""
    one_line("--run-dir", str(run_dir))
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file")


def installed_torch_has_cuda() -> bool | None:
    """Whether this environment's PyTorch is a CUDA build, read without loading it; None where it cannot be told."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    except OSError:
        return None
    values = {}
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
            values[target.id] = node.value.value
    return values["cuda"] is not None if "cuda" in values else None


def note_cpu_build(profile: Profile) -> None:
    """Say it before a job waits days for GPUs that its PyTorch cannot use."""
    if profile.gpus_per_node and python_of(profile) == sys.executable and installed_torch_has_cuda() is False:
        print("note: this environment's PyTorch is a CPU build: the ranks will train on CPUs, over gloo", file=sys.stderr)


def submit_training(
    args: argparse.Namespace, profile: Profile, config: RunConfig, dependency: str = "", own: bool = True
) -> tuple[Job | None, str]:
    """Write and submit the training job; with --dry-run only make its script. Returns the job and the script.

    own: refuse where another job of this run waits or runs.
    """
    run_dir = args.run_dir.resolve()
    directory, name = run_dir / "launch", safe_name(profile.job_name or run_dir.name)
    if args.dry_run:
        shown = directory / f"{name}-NNN.yaml"
        return None, training_script(profile, config, shown, args.overrides, run_dir, args.nodes, dependency)
    if own:
        refuse_second_job(directory, profile.dependency)
    config_file = write_new(directory, name, ".yaml", args.config.read_text())
    script = training_script(profile, config, config_file, args.overrides, run_dir, args.nodes, dependency)
    path = write_new(directory, name, ".sbatch", script)
    return submit(path, "train", directory / f"{name}-%j.log"), script


def run_slurm(args: argparse.Namespace) -> int:
    """``launch slurm``."""
    profile = read_profile(args)
    config = checked_config(args, profile)
    check_data(config)
    job, script = submit_training(args, profile, config)
    note_cpu_build(profile)
    if job is None:
        print(script, end="")
        return 0
    print(f"job {job.number}: {args.nodes} node(s) x {profile.ranks} rank(s), {config.train.steps} steps in {args.run_dir}")
    print(f"script: {job.script}")
    print(f"log: {job.log}  (ranks: {job.log.removesuffix('.log')}-rN.log, N: number of the restart)")
    return 0


def visible_gpus() -> int:
    """GPUs that this machine shows to this process."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([part for part in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if part.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_local(args: argparse.Namespace) -> int:
    """``launch local``: one rank in this process' place, or torchrun."""
    config = load_config(args.config, args.overrides)
    gpus = visible_gpus()
    ranks = args.ranks if args.ranks is not None else (gpus if gpus and installed_torch_has_cuda() else 1)
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: is below 1")
    if args.ranks is None and gpus and not installed_torch_has_cuda():
        print(f"note: {gpus} GPU(s) here, but PyTorch is a CPU build: one rank on CPUs", file=sys.stderr)
    check_ranks(config, ranks, "--ranks" if args.ranks is not None else "the machine's GPUs")
    check_run_dir(args.run_dir)
    check_data(config)
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", "--shutdown-timeout", "10", "-m"]
    command += ["unfold.pretrain", "train", "--config", str(args.config), "--run-dir", str(args.run_dir)]
    command += [part for item in args.overrides for part in ("--set", item)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    if args.dry_run:
        print(f"OMP_NUM_THREADS={threads} {shlex.join(command)}")
        return 0
    sys.stdout.flush()
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    if ranks > 1:
        return run_torchrun(command, environment)
    os.execve(command[0], command, environment)
