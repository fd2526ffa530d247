"""``python -m launch COMMAND``: local, slurm, array, chain, doctor."""

from __future__ import annotations

import argparse
import os
import sys

from launch.arguments import build_parser
from pretrain.errors import UserError


def dispatch(args: argparse.Namespace) -> int:
    """Run a command; its modules are imported late, so that --help and usage errors come at once."""
    if args.command == "health":
        from launch.health import run_health as command
    elif args.command == "doctor":
        from launch.doctor import run_doctor as command
    elif args.command == "array":
        from launch.data_jobs import run_array as command
    elif args.command == "chain":
        from launch.chain import run_chain as command
    elif args.command == "local":
        from launch.training import run_local as command
    else:
        from launch.training import run_slurm as command
    return command(args)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone: nothing to report to
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
