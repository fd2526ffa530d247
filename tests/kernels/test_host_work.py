"""What the host does for a layer that recalls on a GPU: tensor operations beside the kernels, and waits; in the interpreter."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from tests.kernels.interpreter import compute_like_a_gpu, in_the_interpreter
from tests.kernels.test_variants import micro_batch
from tests.waits import Waits
from unfold.kernels.select import SelectRule
from unfold.kernels.unfold import recall_attention


class Launches:
    """Counts launches; what they write to is on the GPU, and what the interpreter itself does is left out."""

    def __init__(self, waits: Waits, monkeypatch):
        self.count, self._waits, self._plain = 0, waits, interpreter.InterpretedFunction.run
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda f, *a, **k: self.run(f, *a, **k))

    def run(self, function, *args, **kwargs):
        self.count += 1
        with _disable_current_modes():
            result = self._plain(function, *args, **kwargs)
        for x in args:
            if isinstance(x, torch.Tensor):
                self._waits.mark(x)
        return result


@in_the_interpreter
def test_a_recalling_layer_reads_the_lengths_of_its_lists_alone(monkeypatch):
    """Once per level forward, once backward; everything else that has a size is known to the host."""
    compute_like_a_gpu(monkeypatch)
    waits = Waits(monkeypatch)
    launches = Launches(waits, monkeypatch)
    leaves, _, whole = micro_batch(np.random.default_rng(0), 1)
    counts = []
    for layer in range(2):  # the first one of a micro-batch also makes the plans that all share
        with waits:
            if layer == 0:
                tree = whole.to("cuda")
                for x in leaves:
                    waits.mark(x)
            waits.operations, launches.count = 0, 0
            waits.where.clear()
            out, _ = recall_attention(*leaves, tree, SelectRule(4, 4), backend="triton")
            forward = waits.operations, launches.count, sum(waits.where.values())
            waits.operations, launches.count = 0, 0
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            counts.append((*forward, waits.operations, launches.count, sum(waits.where.values()) - forward[2]))
        places = {place.split(":")[0] for _, place in waits.where}
        assert places == {"select/triton.py", "unfold/turn.py"}, waits.where
    assert all(forward == whole.levels and backward == 1 for _, _, forward, _, _, backward in counts), counts
    assert counts[1][0] <= 100 and counts[1][3] <= 75, counts
