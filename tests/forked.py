"""Ranks of a process group on this machine, for tests of what they exchange."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable


def run_ranks(rank_main: Callable[[int, int, str], None], size: int) -> int:
    """Call ``rank_main(rank, size, store)`` in so many processes; 0 where all of them ended well.

    They are forked from a process that has imported everything, which takes longer than the rest.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=rank_main, args=(r, size, f"{folder}/store"), daemon=True) for r in range(size)]
        for process in ranks:
            process.start()
        while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
            ranks[0].join(0.1)
        for process in ranks:  # one that failed leaves the others waiting for it
            process.terminate()
            process.join()
    return max(abs(p.exitcode) for p in ranks)
