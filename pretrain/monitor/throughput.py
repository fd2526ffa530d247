"""What a run gets out of its devices: useful FLOPs of every step, MFU, memory."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil
import torch

from unfold.model.gist import Layout, recalls_in
from unfold.model.visibility import MicroBatch
from unfold.pretrain.config import RunConfig
from unfold.pretrain.parallel import Parallel
from unfold.pretrain.plan.hardware import GIB, GPUS
from unfold.pretrain.plan.work import FLOPS_FORMULA, count_flops, measure_sample
from unfold.pretrain.train.step import StepResult

SLOWER_VARIANTS = ("PCIE", "NVL")  # of a name's GPU, with another peak than the sheet's; but the A100's is the same


class RankUsage(NamedTuple):
    """Of one rank in one step: useful FLOPs of the samples that it read, most memory in GiB."""

    flops: float
    memory: float


def known_peak(name: str) -> float:
    """Dense bf16 FLOP/s of the GPU that PyTorch calls ``name``; 0 where it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    peaks = {gpu.peak for gpu in GPUS if gpu.name.split("-")[0] in words}
    if len(peaks) != 1 or words & set(SLOWER_VARIANTS) and "A100" not in words:
        return 0.0
    return peaks.pop()


class Usage:
    """Counts the useful FLOPs of steps where the devices' peak is given or known (useful: unfold.pretrain.plan.work)."""

    def __init__(self, config: RunConfig, parallel: Parallel, say: Callable[[str], None]):
        self._config, self._parallel = config, parallel
        self._peak = 1e12 * config.monitor.peak_tflops
        on_gpu = parallel.device.type == "cuda"
        if not self._peak and on_gpu and config.precision == "bf16":
            self._peak = known_peak(torch.cuda.get_device_name(parallel.device))
        if self._peak:
            # What recall adds is known step by step.
            forgetting = dataclasses.replace(config.gist, recall="none")
            self._shape = measure_sample(dataclasses.replace(config, gist=forgetting))
            say(f"mfu: ({FLOPS_FORMULA}) / (seconds x {parallel.world} devices x {self._peak / 1e12:g} TFLOP/s)")

    def of_step(self, batches: Sequence[MicroBatch], result: StepResult) -> RankUsage:
        """This rank's part; FLOPs are 0 where they are not counted."""
        return RankUsage(self._flops(batches, result) if self._peak else 0.0, self._memory())

    def metrics(self, ranks: Sequence[RankUsage], seconds: float) -> dict[str, float]:
        """``memory_gib``: the most of any rank; ``tflops`` (per device) and ``mfu`` where FLOPs are counted."""
        metrics = {"memory_gib": max(r.memory for r in ranks)}
        # Ranks that share samples (tensor, pipeline, context) each counted them.
        flops = sum(r.flops for r in ranks) * self._parallel.data_size / self._parallel.world
        if flops:
            per_device = flops / seconds / self._parallel.world
            metrics |= {"tflops": per_device / 1e12, "mfu": per_device / self._peak}
        return metrics

    def _flops(self, batches: Sequence[MicroBatch], result: StepResult) -> float:
        model = self._config.model
        total = 0.0
        for batch in batches:
            there = batch.layout.doc >= 0
            raw = int((there & (batch.layout.level < 0)).sum())
            pairs = visible_pairs(batch, model.layer_kinds)
            if batch.recall is not None:
                recalling = sum(recalls_in(n, batch.recall.first_layer, kind) for n, kind in enumerate(model.layer_kinds))
                pairs += _recalled_more(batch, result) * recalling / model.layers
            sample = dataclasses.replace(self._shape, raw=raw, tokens=int(there.sum()), keys=pairs)
            total += count_flops(model, sample, 1).total
        return total

    def _memory(self) -> float:
        if self._parallel.device.type != "cuda":
            return psutil.Process().memory_info().rss / GIB
        most = torch.cuda.max_memory_allocated(self._parallel.device)
        torch.cuda.reset_peak_memory_stats(self._parallel.device)
        return most / GIB


def visible_pairs(batch: MicroBatch, kinds: Sequence[str]) -> float:
    """(query, key) pairs that a layer computes while forgetting, padding aside: the mean over layers of these kinds."""
    return sum(count * _pairs(batch.layout, kind) for kind, count in Counter(kinds).items()) / len(kinds)


def _pairs(layout: Layout, kind: str) -> int:
    if kind == "dense" and layout.role is None and not bool((layout.level >= 0).any()):
        return sum((stop - start) * (stop - start + 1) // 2 for _, start, stop in layout.document_spans)
    intervals = layout.in_layer(kind).intervals
    seen = (intervals.hi - intervals.lo).sum(1, dtype=torch.int64)  # [B, T]
    return int(seen[layout.doc >= 0].sum())


def _recalled_more(batch: MicroBatch, result: StepResult) -> float:
    """Pairs that a recalling layer computes beyond those of forgetting: other gists, fewer of them, and unfolded tokens."""
    recalls, intervals = batch.recall.flags > 0, batch.layout.intervals
    gists = (intervals.hi - intervals.lo)[:, :-2].sum(1, dtype=torch.int64)[recalls].sum()
    return batch.recall.queries * (result.unfolded + result.selected) - float(gists)
