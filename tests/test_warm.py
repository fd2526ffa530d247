"""Warm processes (tests/warm.py) are what Python and torchrun would have started, and none of them stays behind.

This file is the command, too: ``python -m tests.test_warm WORD ..``.
"""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from tests import warm

NAME = "tests.test_warm"


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_is_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("OF_THIS_TEST", "a b")
    done = warm.command(NAME, "tell", "OF_THIS_TEST", 3)
    pid, module, cwd, *words = done.stdout.splitlines()
    assert int(pid) != os.getpid() and (module, cwd) == ("__main__", str(warm.ROOT))
    assert words == ["tell OF_THIS_TEST 3", "a b"] and done.stderr == "told\n" and done.returncode == 0


def test_ranks_know_their_places():
    done = warm.command(NAME, "tell", "RANK", "LOCAL_RANK", "WORLD_SIZE", ranks=3)
    assert {line for line in done.stdout.splitlines() if line.isdigit() and len(line) == 1} == {"0", "1", "2", "3"}


def test_errors_are_those_of_python():
    done = warm.command(NAME, "raise", check=False)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: as told\n") and "Traceback" in done.stderr
    with pytest.raises(AssertionError, match="as told"):
        warm.command(NAME, "raise")


@pytest.mark.parametrize(
    "ranks,words,timeout,code", [(2, ["fail", 1], 300, 3), (1, ["sleep"], 1, -9)], ids=["a rank fails", "time is up"]
)
def test_nobody_is_waited_for_in_vain(ranks, words, timeout, code):
    start = time.monotonic()
    with warm.started(NAME, *words, ranks=ranks, timeout=timeout) as (pids, end):
        assert end().returncode == code
    assert time.monotonic() - start < 30 and all(map(ended, pids))


def test_one_runs_at_a_time_and_ends_with_its_block():
    with warm.started(NAME, "sleep") as (pids, _), pytest.raises(AssertionError, match="one at a time"):
        warm.command(NAME, "tell")
    assert all(map(ended, pids)) and warm.command(NAME, "tell").returncode == 0


if __name__ == "__main__":
    word, *rest = sys.argv[1:]
    if word == "tell":
        print(os.getpid(), __name__, os.getcwd(), " ".join(sys.argv[1:]), sep="\n")
        print(*(os.environ[name] for name in rest if name in os.environ), sep="\n")
        print("told", file=sys.stderr)
    elif word == "raise":
        raise ValueError("as told")
    elif word == "fail" and os.environ["RANK"] == rest[0]:
        sys.exit(3)
    else:
        time.sleep(60)
