"""The commands of ``python -m launch``: local, slurm, array, chain, doctor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from unfold.launch.arguments import NAME, build_parser
from unfold.pretrain.errors import UserError, check_flags


def dispatch(args: argparse.Namespace) -> int:
    """Run a command; its modules are imported late, so that --help and usage errors come at once."""
    if args.command == "health":
        from unfold.launch.health import run_health as command
    elif args.command == "doctor":
        from unfold.launch.doctor import run_doctor as command
    elif args.command == "array":
        from unfold.launch.data_jobs import run_array as command
    elif args.command == "chain":
        from unfold.launch.chain import run_chain as command
    elif args.command == "local":
        from unfold.launch.training import run_local as command
    else:
        from unfold.launch.training import run_slurm as command
    return command(args)


def main(argv: Sequence[str] | None = None, name: str = NAME) -> int:
    """Run a command; returns the exit status."""
    args = build_parser(name).parse_args(argv)
    try:
        check_flags(args)
        return dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone: nothing to report to
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:
        return 130


def run(argv: Sequence[str] | None = None, name: str = NAME) -> NoReturn:
    """Run a command as the whole of this process."""
    sys.exit(main(argv, name))
