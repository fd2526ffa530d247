"""What the host does for a layer that recalls on a GPU: tensor operations beside the kernels, and waits; in the interpreter."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime import interpreter

from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.test_variants import micro_batch
from tests.waits import Waits
from unfold.kernels.select import SelectRule
from unfold.kernels.unfold import prepare_recall, recall_attention


class Launches:
    """Counts launches, which compute nothing: no size depends on what they write. That is on the GPU."""

    def __init__(self, waits: Waits, monkeypatch):
        self.count, self._waits = 0, waits
        monkeypatch.setattr(interpreter.InterpretedFunction, "run", self.run)

    def run(self, *args, **kwargs):
        self.count += 1
        for x in args:
            if isinstance(x, torch.Tensor):
                self._waits.mark(x)


@in_the_interpreter
@pytest.mark.parametrize("ahead", [True, False])
def test_a_recalling_layer_reads_nothing_and_does_little_beside_its_kernels(ahead, monkeypatch):
    """Sizes are known to the host; what the layers share is made in the first one of a micro-batch, or copied if it is there."""
    waits = Waits(monkeypatch)
    launches = Launches(waits, monkeypatch)
    leaves, _, whole = micro_batch(np.random.default_rng(0), 1)
    rule, counts = SelectRule(4, 4), []
    if ahead:
        prepare_recall(*leaves[:2], whole, rule, backend="triton")
    take = lambda: (waits.operations, waits.made, waits.copies, launches.count)
    for layer in range(2):
        with waits:
            if layer == 0:
                tree = whole.to("cuda")
                for x in leaves:
                    waits.mark(x)
            before = take()
            out, _ = recall_attention(*leaves, tree, rule, backend="triton")
            middle = take()
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            counts += [[b - a for a, b in zip(*ends)] for ends in ((before, middle), (middle, take()))]
        assert not waits.where, waits.where
    for operations, made, copies, _ in counts[2:]:  # a layer that is not the first, forward and backward
        assert operations + made <= 20 and not copies, counts
    for operations, made, copies, _ in counts[:2] if ahead else ():
        assert operations + made <= 22 and copies <= 30, counts
