"""Runs the steps' commands until a deadline and keeps one log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Runner:
    """Runs commands until a deadline and keeps one log; ``paused`` holds training runs that were started ahead, by name."""

    output: Path
    deadline: float
    begin: float
    paused: dict[str, tuple] = field(default_factory=dict)

    def say(self, text: str) -> None:
        line = f"[{time.perf_counter() - self.begin:5.0f} s] {text}"
        print(line, flush=True)
        with open(self.output / "log.txt", "a") as file:
            file.write(line + "\n")

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def start(self, name: str, arguments: list[str], seconds: float, **environment: str) -> tuple:
        path = self.output / f"{name}.log"
        process = subprocess.Popen(
            arguments, stdout=open(path, "w"), stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        return process, path, time.perf_counter() + min(seconds, self.left()), name

    def finish(self, started: tuple, lines: int = 30) -> str:
        """Wait for a process or for its time to be up; the last lines of what it printed go to the log."""
        process, path, until, name = started
        try:
            status = process.wait(max(0.1, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # a test run then still says what has failed
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            status = "stopped, its time was up"
        text = path.read_text(errors="replace")
        self.say(f"{name}: exit {status}")
        print("\n".join(text.splitlines()[-lines:]), flush=True)
        return text

    def run(self, name: str, arguments: list[str], seconds: float, lines: int = 30) -> str:
        return self.finish(self.start(name, arguments, seconds), lines)
