"""``python -m data_prep COMMAND``: see ``--help``."""

from unfold.data_prep.command import run

if __name__ == "__main__":
    run()
