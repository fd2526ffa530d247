"""Steps captured in CUDA graphs: the one place that captures and replays. A graph is trusted once it did what the step does."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
MOST = 32  # graphs of one decoder; what was replayed longest ago goes first
ROUNDING = 16  # times the dtype's epsilon times the largest number: results that differ by no more are the same


class Replayable(Protocol):
    """A step that reads and writes tensors at fixed addresses, whose intermediate results nobody looks at after it."""

    def step(self) -> None:
        """Run it, operation by operation. From the same numbers it makes the same ones."""

    def rest(self) -> None:
        """Put what it reads into a state that may be stepped on from."""

    def kept(self) -> Sequence[Tensor]:
        """What it leaves behind for somebody, the state that it reads and advances included."""

    def spoil(self) -> None:
        """Overwrite what it leaves behind, but not what it reads, so that a step that writes nothing is found out."""


class Replays:
    """Runs steps: on a GPU from CUDA graphs, captured when they are first run; else, or without ``capture``, as they are.

    All graphs share the memory of intermediate results (one pool), whatever the order in which they are replayed. A graph is
    compared with the step itself when it is first replayed, and again at its 4th, 16th, 64th .. replay: what was captured as
    a constant may be right at first. Where that, or capturing, goes wrong, one line of the log says so, and from then on every
    step runs as it is.

    Args:
        device: of the steps.
        capture: whether to capture.
    """

    def __init__(self, device: torch.device, capture: bool = True):
        self.device, self.capture = device, capture and device.type == "cuda"
        self.graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self.stream = torch.cuda.Stream(device) if self.capture else None
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None

    def prepare(self, key: Hashable, step: Replayable) -> Replay:
        """What runs a step: its graph, captured now if there is none with this key.

        Args:
            key: names all in which the step differs from other steps, sizes included.
            step: is run once before it is captured, so that kernels are compiled and libraries have their memory.
        """
        if self.capture and key not in self.graphs:
            step.rest()
            try:
                self.graphs[key] = Replay(self, step, self._captured(step.step))
            except RuntimeError as error:
                self.distrust(f"one could not be captured ({_first_line(error)})")
        if not self.capture:
            return Replay(self, step, None)
        self.graphs.move_to_end(key)
        while len(self.graphs) > MOST:
            self.graphs.popitem(last=False)
        return self.graphs[key]

    def distrust(self, reason: str) -> None:
        """No graph is replayed any more."""
        self.capture = False
        self.graphs.clear()
        _log.warning("generation: steps run without CUDA graphs, slower, since %s", reason)

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                step()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: what they do does not spoil the capture.
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    step()
            finally:  # a capture that fails as it ends leaves its own stream current
                torch.cuda.set_stream(here)
        return graph


class Replay:
    """Runs one step, from its graph if it has one and all graphs are trusted."""

    def __init__(self, replays: Replays, step: Replayable, graph: torch.cuda.CUDAGraph | None):
        self.replays, self.step, self.graph = replays, step, graph
        self.runs, self.next_check = 0, 1

    def __call__(self) -> None:
        if self.graph is None or not self.replays.capture:
            self.step.step()
            return
        self.runs += 1
        if self.runs == self.next_check:
            self.next_check *= 4
            self._check()
        else:
            self.graph.replay()

    def _check(self) -> None:
        """The step and its graph from the same state. What is left behind is right, whatever the graph did."""
        kept = self.step.kept()
        before = [x.clone() for x in kept]
        self.step.step()
        want = [x.clone() for x in kept]
        self._restore(before)
        self.step.spoil()
        try:
            self.graph.replay()
            wrong = None if all(map(_same, kept, want)) else f"replay {self.runs} of one differed from the step itself"
        except RuntimeError as error:
            wrong = f"one could not be replayed ({_first_line(error)})"
        if wrong is not None:
            self.replays.distrust(wrong)
            self._restore(before)
            self.step.step()

    def _restore(self, numbers: Sequence[Tensor]) -> None:
        for x, number in zip(self.step.kept(), numbers):
            x.copy_(number)


def _same(got: Tensor, want: Tensor) -> bool:
    """Whole numbers equal, others to rounding: a library may choose another order of sums while a graph is captured."""
    if torch.equal(got, want):
        return True
    if not want.is_floating_point():
        return False
    allowed = ROUNDING * torch.finfo(want.dtype).eps * float(want.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(got, want, rtol=0, atol=allowed, equal_nan=True)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n")[0]
