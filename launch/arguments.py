"""The command line's options."""

from __future__ import annotations

import argparse
from pathlib import Path

from unfold.launch import health
from unfold.launch.profile import add_profile_arguments
from unfold.pretrain.config import add_overrides

SLURM_TEXT = """
The script and a copy of the configuration are written to RUN_DIR/launch/ and submitted. The job saves before its time limit
and requeues itself until the run is finished; docs/launch.md tells everything.
"""


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the run's configuration")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="where everything of the run is written")
    add_overrides(parser)


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would be run or submitted, and do nothing")


def _nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that train together")


def _add_doctor(commands) -> None:
    doctor = commands.add_parser("doctor", help="check this machine, or all nodes of an allocation")
    doctor.add_argument("--config", type=Path, metavar="YAML", help="also check what this configuration needs")
    add_overrides(doctor)
    doctor.add_argument("--ranks", type=int, metavar="N", help="ranks to check the layout for (default: the GPUs)")
    doctor.add_argument("--run-dir", type=Path, default=Path("."), metavar="DIR", help="a directory of the file system for runs")
    doctor.add_argument("--node-report", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # one node's part, under srun
    doctor.add_argument("--head", metavar="HOST:PORT", help=argparse.SUPPRESS)


NAME = "python -m launch"


def build_parser(name: str = NAME) -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog=name, description="Start training here or on a SLURM cluster.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    local = commands.add_parser("local", help="train on this machine, on all its GPUs")
    _run_arguments(local)
    local.add_argument("--ranks", type=int, metavar="N", help="ranks (default: one per GPU, or one)")
    _dry_run(local)

    slurm = commands.add_parser("slurm", help="submit training to SLURM", epilog=SLURM_TEXT)
    _run_arguments(slurm)
    _nodes(slurm)
    _dry_run(slurm)
    add_profile_arguments(slurm)

    array = commands.add_parser(
        "array",
        help="tokenise a corpus by an array of jobs",
        description="Tokenise a corpus in parts by an array of jobs; a further job merges the parts. Submit the same again to "
        "make what is missing.",
        usage=f"{name} array --parts N [--limit M] [options] -- ARGUMENTS OF data_prep tokenize",
    )
    array.add_argument("--parts", type=int, required=True, metavar="N", help="parts, each a job of the array")
    array.add_argument("--limit", type=int, default=0, metavar="M", help="parts that run at a time (default: all)")
    array.add_argument("--job-dir", type=Path, metavar="DIR", help="for scripts and logs (default: PREFIX.launch)")
    _dry_run(array)
    add_profile_arguments(array)
    array.add_argument("tokenize", nargs=argparse.REMAINDER, help="after --: what `python -m data_prep tokenize` takes")

    chain = commands.add_parser("chain", help="prepare, train, evaluate and export, job after job")
    _run_arguments(chain)
    _nodes(chain)
    command = {"action": "append", "default": [], "metavar": "COMMAND"}
    chain.add_argument("--prepare", **command, help="before training: what follows `python -m`, e.g. 'data_prep tokenize ..'")
    chain.add_argument("--evaluate", **command, help="after training: what follows `python -m`, e.g. 'pretrain report RUN_DIR'")
    chain.add_argument("--export", type=Path, metavar="DIR", help="at the end: a Hugging Face directory")
    _dry_run(chain)
    add_profile_arguments(chain)

    _add_doctor(commands)
    health.add_arguments(commands.add_parser("health", help="check this node of a job (batch scripts call it)"))
    return parser
