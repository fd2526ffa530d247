"""Running torchrun so that signals reach the ranks and not torchrun, which would end with an error after passing them on."""

from __future__ import annotations

import ctypes
import signal
import subprocess

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child: end when the parent is killed, and with it the ranks, which watch their launcher."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_torchrun(command: list[str], environment: dict[str, str]) -> int:
    """Run a torchrun command to its end; returns its exit code. SIGTERM and SIGUSR1 go to the ranks, which save and end."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)  # torchrun inherits it; the ranks set handlers of their own
    launcher = subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent)

    def forward(number: int, frame) -> None:
        try:
            for rank in psutil.Process(launcher.pid).children():
                rank.send_signal(number)
        except psutil.NoSuchProcess:  # it has just ended
            pass

    for number in FORWARDED:
        signal.signal(number, forward)
    while True:
        try:
            return launcher.wait()
        except KeyboardInterrupt:  # torchrun has it too, and ends its ranks
            continue
