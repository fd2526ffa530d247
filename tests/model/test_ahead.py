"""Plans that are made ahead are those that a step asks for: none is left out, and none is made in vain."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from tests import warm
from tests.kernels.interpreter import in_the_interpreter
from tests.made import Made, make_batch, make_model, with_losses
from tests.waits import Waits
from unfold.model.ahead import Ahead
from unfold.model.gist import build_layout
from unfold.model.parallel.context import ContextParallel
from unfold.model.parallel.tensor import Alone
from unfold.model.visibility import MicroBatch

MIXED = ("gist", "window:4", "dense")
# Kinds of layers; what recalls; samples that dense attention teaches; what is checkpointed.
RUNS = {
    "forgetting": (("gist",), "", (), "none"),
    "recall": (("gist",), "some", (), "full"),
    "some unfold everything": (("gist",), "wide", (), "none"),
    "routing and distillation": (("gist",), "routed", (0, 1), "none"),
    "kinds": (MIXED, "", (), "full"),
    "kinds, recall and distillation": (MIXED, "routed", (1,), "none"),
    "one kind recalls nowhere": (("dense", "gist"), "some", (), "none"),
    "links": (MIXED, "some", (), "none"),
    "dense": (("dense",), "", (), "none"),
    "dense, window": (("dense", "window:4"), "", (), "none"),
}
TRITONS = (
    "row plan",
    "key plan",
    "room of lists",
    "query blocks of recall",
    "near items",
    "upper parts",
    "route plan",
    "key rows",
)


def micro_batch(run: str) -> MicroBatch:
    kinds, recall, distilled, _ = RUNS[run]
    if "gist" in kinds:
        return make_batch(recall, distilled, "linked" if run == "links" else "packed documents")
    doc = torch.tensor([[0] * 12 + [1] * 20 + [-1] * 2, [0] * 34])
    layout = build_layout(torch.full_like(doc, -1), doc, None)
    return MicroBatch(doc.clamp(min=0), doc.clamp(min=0), layout)


def model_of(run: str):
    kinds, _, _, checkpointing = RUNS[run]
    model = make_model(kinds, checkpointing)
    return model, Ahead.of(model, model.config, torch.device("cpu"), from_logits=bool(RUNS[run][2]))


def step(model, batch: MicroBatch) -> float:
    loss = model(with_losses(batch))
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("run", RUNS)
def test_what_a_step_asks_for_is_made_ahead_and_nothing_else(run, monkeypatch):
    model, ahead = model_of(run)
    batch, again = micro_batch(run), micro_batch(run)
    made = Made(monkeypatch)
    loss = step(model, batch)
    asked = made.take()
    ahead.prepare(again)
    assert made.take() == asked and asked
    ahead.prepare(again)
    assert step(model, again) == loss and made.take() == []
    assert not [key for key in asked if any(name in key for name in TRITONS)]


def as_on_a_gpu(monkeypatch) -> None:
    """Layers take Triton's way, whose kernels are launched and compute nothing: no size depends on what they write."""
    from triton.runtime import interpreter

    from unfold.kernels.compressed import op as compressed
    from unfold.kernels.route import op as route
    from unfold.kernels.select import op as select
    from unfold.kernels.unfold import op as unfold

    for module in (compressed, select, unfold, route):
        monkeypatch.setattr(module, "default_backend", lambda *_: "triton")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)


@in_the_interpreter
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("run", RUNS)
def test_on_a_gpu_plans_come_from_the_host(run, monkeypatch):
    as_on_a_gpu(monkeypatch)
    model, ahead = model_of(run)
    batch, again = micro_batch(run), micro_batch(run)
    made = Made(monkeypatch)
    step(model, batch)
    asked = made.take()
    ahead.prepare(again)
    assert made.take() == asked and asked
    with Waits(monkeypatch) as waits:
        for parameter in model.parameters():
            waits.mark(parameter)
        loss = model(with_losses(again.to("cuda")))
        loss.backward()
    assert made.take() == [] and not waits.where, (made.take(), waits.where)


def test_layers_of_other_stages_are_not_asked():
    """A stage without a layer that recalls, say."""
    model, whole = model_of("kinds, recall and distillation")
    batch = micro_batch("kinds, recall and distillation")
    Ahead(whole.config, (2,), whole.q, whole.k, predicts=False).prepare(batch)
    names = {key if isinstance(key, str) else key[0] for key in batch.layout.plans}
    assert "documents" in names and "targets" not in names and ("query blocks", 64) not in batch.layout.plans
    assert not batch.recall.tree.plans and not batch.recall.routing.routed.plans


class Second:
    """Stands for a process group of two."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def test_ranks_that_trade_heads_make_the_plans_of_whole_sequences(monkeypatch):
    """For the heads that each has then, and the targets of its own stretch."""
    model, whole = model_of("kinds, recall and distillation")
    context = ContextParallel(Alone(), Second(), model.config.kinds)
    batch, again = (make_batch("routed", (1,), multiple=2) for _ in range(2))
    made = Made(monkeypatch)
    whole.prepare(batch)
    asked = made.take()
    replace(whole, context=context).prepare(again)
    assert sorted([*asked, repr(("division", 1))]) == made.take()
    targets = (x.layout.plans["targets", (1,)].places for x in (batch, again))
    assert len(next(targets)) > len(next(targets)) > 0


def test_ranks_that_exchange_gists():
    """Layers that recall included: where fetched chunks stand is no plan."""
    done = warm.command("tests.model.ahead_ranks", 2)
    assert done.stdout.count("ALIKE") == 2, done.stdout
