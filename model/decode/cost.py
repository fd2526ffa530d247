"""What reading and writing cost: seconds to the first token, seconds for each token after it, and the most memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class Recorder:
    """Measures answers from the first token read for them to the last one written, and the most memory meanwhile.

    ``with recorder.reading(): ..`` around what is read for some answers, then ``recorder.writing(decoder.stream(..))`` in place
    of the stream; as often as there are answers. What lies between the two is not counted.

    Args:
        device: where the model is. On a GPU memory is what PyTorch had allocated there, weights included; else it is what the
            process had resident. Both count from here on (where the system lets no process forget its peak: from its start).

    Attributes:
        first: for every answer the seconds from the beginning of its reading to its first token.
        after: for every token after an answer's first one the seconds since the one before.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.first: list[float] = []
        self.after: list[float] = []
        self._read, self._began = 0.0, 0.0
        self._last: dict[int, float] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the current size

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around all that is read for the answers that are written next."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._read = time.perf_counter() - began

    def begin(self) -> None:
        """Answers begin to be written; :meth:`token` tells of their tokens."""
        self._began, self._read = time.perf_counter() - self._read, 0.0
        self._last = {}

    def token(self, number: int = 0) -> None:
        """An answer, by its number among those that are written together, has got its next token."""
        now = time.perf_counter()
        if number in self._last:
            self.after.append(now - self._last[number])
        else:
            self.first.append(now - self._began)
        self._last[number] = now

    def writing(self, tokens: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The same (number of the answer, token), each noted as it comes."""
        self.begin()
        for number, token in tokens:
            self.token(number)
            yield number, token

    @property
    def peak(self) -> int:
        """Bytes, the most so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    def to_dict(self) -> dict:
        """``first_token_s`` and ``token_s``, means in seconds, None where nothing was written; ``peak_memory_bytes``."""
        mean = lambda times: sum(times) / len(times) if times else None
        return {"first_token_s": mean(self.first), "token_s": mean(self.after), "peak_memory_bytes": self.peak}

    def describe(self) -> str:
        """The same as one line for people."""
        figures = describe_cost(self.to_dict())
        return f"first token after {figures[0]} s, {figures[1]} s for each token after it, at most {figures[2]} GiB of memory"


COST_TITLES = ("seconds to first token", "seconds per token", "peak memory, GiB")


def describe_cost(cost: dict) -> list[str]:
    """The figures of :meth:`Recorder.to_dict` under COST_TITLES."""
    seconds = lambda value: "-" if value is None else f"{value:.4f}"
    return [seconds(cost["first_token_s"]), seconds(cost["token_s"]), f"{cost['peak_memory_bytes'] / 2**30:.2f}"]
