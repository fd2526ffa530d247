"""``python -m pretrain COMMAND``: see ``--help``. Nothing but this: a module is loaded under its name in ``unfold``, once."""

from unfold.pretrain.command import run

if __name__ == "__main__":
    run()
