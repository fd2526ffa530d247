"""``python -m launch COMMAND``: see ``--help``."""

from unfold.launch.command import run

if __name__ == "__main__":
    run()
