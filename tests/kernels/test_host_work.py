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
def test_a_recalling_layer_reads_nothing_and_does_little_beside_its_kernels(monkeypatch):
    """Sizes are known to the host; what the layers share is made in the first one of a micro-batch."""
    compute_like_a_gpu(monkeypatch)
    waits = Waits(monkeypatch)
    launches = Launches(waits, monkeypatch)
    leaves, _, whole = micro_batch(np.random.default_rng(0), 1)
    counts = []
    for layer in range(2):
        with waits:
            if layer == 0:
                tree = whole.to("cuda")
                for x in leaves:
                    waits.mark(x)
            waits.operations, waits.made, launches.count = 0, 0, 0
            out, _ = recall_attention(*leaves, tree, SelectRule(4, 4), backend="triton")
            forward = waits.operations, waits.made, launches.count
            waits.operations, waits.made, launches.count = 0, 0, 0
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            counts.append((*forward, waits.operations, waits.made, launches.count))
        assert not waits.where, waits.where
    operations, made, _, operations_back, made_back, _ = counts[1]  # a layer that is not the first
    assert operations + made <= 20 and operations_back + made_back <= 20, counts
