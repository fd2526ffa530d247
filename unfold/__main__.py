"""``unfold COMMAND``: every program of the project under one name; see ``--help``."""

from __future__ import annotations

import sys

PROGRAMS = {
    "prep": "corpora to tokenizers to token shards: see `unfold prep --help`",
    "launch": "start training here or on a SLURM cluster: see `unfold launch --help`",
}


def run() -> None:
    """Run a command and end the process with its exit status."""
    program, rest = sys.argv[1:2], sys.argv[2:]
    # Each program is imported when it is asked for: a look at a cluster needs no tokenizers.
    if program == ["prep"]:
        from unfold.data_prep.command import run as run_program

        run_program(rest, "unfold prep")
    elif program == ["launch"]:
        from unfold.launch.command import run as run_program

        run_program(rest, "unfold launch")
    else:
        from unfold.pretrain.command import run as run_program

        run_program(sys.argv[1:], "unfold", PROGRAMS)


if __name__ == "__main__":
    run()
