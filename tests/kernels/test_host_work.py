"""What the host does for a layer that recalls on a GPU: tensor operations beside the kernels, and waits; in the interpreter."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime import interpreter

from tests.kernels.cases import padded
from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.recall_cases import make_layout, random_qkv
from tests.kernels.test_variants import micro_batch
from tests.waits import Waits
from unfold.kernels.select import SelectRule
from unfold.kernels.unfold import prepare_recall, recall_attention
from unfold.model.gist import Recall
from unfold.model.gist.recall import RECALLS, ROUTES
from unfold.model.parallel.context import ContextParallel
from unfold.model.parallel.tensor import Alone
from unfold.model.visibility import attention_for


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


class FirstOfTwo:
    """Stands for the group of two ranks of which only the first one runs; collectives of torch.distributed are made up."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


@in_the_interpreter
@pytest.mark.parametrize("routes", [False, True])
def test_ranks_that_share_a_sequence_wait_once_in_a_layer(routes, monkeypatch):
    """For how many tokens pass between them, late in forward; backward knows it. Here all chunks are wanted."""
    waits = Waits(monkeypatch)
    launches = Launches(waits, monkeypatch)
    for op in ("compressed", "select", "unfold"):
        monkeypatch.setattr(f"unfold.kernels.{op}.op.default_backend", lambda *_: "triton")
    passed, before_waiting = [], []
    fill = lambda out, *_, **__: out.fill_(1)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", fill)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", fill)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(
        torch.distributed, "all_to_all_single", lambda out, sent, *_, **__: passed.append(len(out)) or out.zero_()
    )
    read = waits.waits
    monkeypatch.setattr(waits, "waits", lambda what: before_waiting.append(launches.count) or read(what))

    layout, config = make_layout("two levels")
    layout = padded(layout, config, 2)
    flags = torch.full_like(layout.level, RECALLS | ROUTES * routes).int()
    leaves = [x.detach() for x in random_qkv(layout, 2, 1, 64, torch.float32)[:3]]
    recall = Recall.from_flags(layout, config, flags, route_scale=1.0)
    context = ContextParallel(FirstOfTwo(), Alone())
    attention_for("gist", layout, recall, context.of(layout)).prepare(1, *leaves[:2])
    counts = []
    with waits:
        here, recall = layout.to("cuda"), recall.to("cuda")
        part = context.of(here)
        attend = attention_for("gist", here, recall, part)
        own = [waits.mark(part.take(waits.mark(x), 1)).requires_grad_() for x in leaves]
        for layer in (1, 2):
            begun = launches.count, waits.operations
            out = attend(layer, *own)
            between = launches.count, waits.operations
            assert sum(waits.where.values()) == layer and begun[0] + 7 <= before_waiting[-1] < between[0]
            torch.autograd.grad(out, own, torch.ones_like(out))
            counts += [
                [b - a for a, b in zip(*ends)] for ends in ((begun, between), (between, (launches.count, waits.operations)))
            ]
    ((what, where),) = waits.where
    assert what == "tolist" and where.startswith("common/plans.py") and waits.where[what, where] == 2
    assert len(passed) == 4 and min(passed) > 0
    assert routes or all(operations <= 90 for _, operations in counts[2:]), counts
