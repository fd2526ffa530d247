"""Steps captured in CUDA graphs: the one place that captures and replays."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

_log = logging.getLogger(__name__)
MOST = 32  # graphs of one decoder; what was replayed longest ago goes first


class Replays:
    """Runs steps: on a GPU from CUDA graphs, captured when they are first run; else, or without ``capture``, as they are.

    A step is a function of nothing that reads and writes tensors at fixed addresses, whose intermediate results nobody looks at
    after it. So all graphs share the memory of these (one pool), whatever the order in which they are replayed.

    Args:
        device: of the steps.
        capture: whether to capture.
    """

    def __init__(self, device: torch.device, capture: bool = True):
        self.device, self.capture = device, capture and device.type == "cuda"
        self.graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self.stream = torch.cuda.Stream(device) if self.capture else None
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None

    def prepare(self, key: Hashable, step: Callable[[], object], rest: Callable[[], object]) -> Callable[[], object]:
        """What runs a step: its graph, captured now if there is none with this key.

        Args:
            key: names all in which the step differs from other steps, sizes included.
            step: is run once before it is captured, so that kernels are compiled and libraries have their memory.
            rest: puts what the step reads into a state that may be stepped on from; called before capturing.
        """
        if self.capture and key not in self.graphs:
            rest()
            try:
                self.graphs[key] = self._captured(step)
            except RuntimeError as error:
                self.capture = False
                reason = str(error).strip().split("\n")[0]
                _log.warning("generation: steps run without CUDA graphs, slower, since one could not be captured (%s)", reason)
        if not self.capture:
            return step
        self.graphs.move_to_end(key)
        while len(self.graphs) > MOST:
            self.graphs.popitem(last=False)
        return self.graphs[key].replay

    def _captured(self, step: Callable[[], object]) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                step()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: what they do does not spoil the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                step()
        return graph
