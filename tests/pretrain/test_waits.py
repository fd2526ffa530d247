"""A step waits for the GPU once, at its end, however many micro-batches it has; counted without a GPU."""

import json
import re

import torch

from tests import warm
from tests.waits import Waits
from unfold.kernels.common.plans import pinned
from unfold.model.gist import GistConfig, Recall, build_layout
from unfold.model.visibility import MicroBatch

# DeepSpeed's own reading of the norm and of overflows, once per update; and what the CPU's operations of recall read of a layer's
# selection (those of a GPU are counted in tests/kernels).
DEEPSPEED = ("runtime/", "zero/")
OF_THE_CPU = ("select/", "unfold/", "route/")


def test_a_step_waits_once_and_at_its_end():
    done = warm.command("tests.pretrain.step_waits")
    found = json.loads(re.search(r"RESULT (.*)", done.stdout)[1])
    assert len(found) == 5
    for way, counts in found.items():
        by_place = {key.split()[-1]: n for key, n in counts.items()}
        theirs = {place: n for place, n in by_place.items() if place.startswith(DEEPSPEED)}
        # ZeRO-3 makes sure in its first step that the ranks agree. The rest is as much with one micro-batch.
        assert sum(n for place, n in theirs.items() if place.split(":")[0] != "zero/utils.py") <= 8, (way, theirs)
        ours = by_place.keys() - theirs.keys()
        if way == "recall":
            ours = {place for place in ours if not place.startswith(OF_THE_CPU)}
        (place,) = ours
        assert place.startswith("train/step.py") and by_place[place] == 1, (way, by_place)


def test_what_goes_to_a_gpu_is_pinned_once(monkeypatch):
    """Plans that were made ahead included; what stands in several places is one tensor afterwards too."""
    config = GistConfig((4, 2), recall="all")
    level = torch.tensor([[-1, -1, -1, -1, 0] * 6])
    layout = build_layout(level, torch.zeros_like(level), config)
    ids = torch.zeros_like(level)
    batch = MicroBatch(ids, ids, layout, Recall.of(layout, config))
    assert batch.layout.document_spans == [(0, 0, 30)]
    batch.planned("something", lambda whole: (whole.ids, {"more": whole.labels}))
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: copies.append(x.clone()) or copies[-1])
    held = pinned(batch)
    assert held.ids is held.labels is held.plans["something"][0] is held.plans["something"][1]["more"] is not ids
    assert held.layout.intervals.rows is held.recall.tree.others.rows and len({id(x) for x in copies}) == len(copies)
    assert torch.equal(held.recall.tree.child_lo, batch.recall.tree.child_lo) and held.layout.document_spans == [(0, 0, 30)]
    assert held.recall.rule == batch.recall.rule and held.host is None


def test_everything_that_waits_is_counted(monkeypatch):
    """And what does not wait is not: the same on tensors of the host."""
    numbers, mask = torch.arange(4), torch.tensor([True, False, True, True])

    def read(x, m):
        x.sum().item()
        x.tolist(), x.numpy(), x.cpu()
        bool(m.any())
        m.nonzero()
        x[m]
        x.repeat_interleave(x)
        x.repeat_interleave(x, output_size=6)
        x.unique()
        x.index_select(0, x)

    with Waits(monkeypatch) as waits:
        read(numbers, mask)
        assert not waits.where and not waits.operations
        read(waits.to_device(numbers), waits.to_device(mask))
        assert sum(waits.where.values()) == 9
        torch.tensor([1.0], device="cpu")
        assert sum(waits.where.values()) == 10
