"""Plans: everything that follows from a configuration and a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from unfold.pretrain.config import RunConfig, with_vocab_size
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.fit import suggest, with_setting
from unfold.pretrain.plan.hardware import GIB, Cluster
from unfold.pretrain.plan.memory import RESERVED, Memory, offloaded, plan_memory
from unfold.pretrain.plan.ranks import Division
from unfold.pretrain.plan.recall import SUFFIX
from unfold.pretrain.plan.roofline import StepTime, step_time
from unfold.pretrain.plan.traffic import Traffic, plan_traffic
from unfold.pretrain.plan.work import Flops, SampleSize, count_flops, measure_sample


def with_known_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with the tokenizer's vocabulary size, where the tokenizer is there. Raises UserError without any."""
    if Path(config.data.tokenizer).is_dir():
        levels = config.folding.deepest if config.folding else 0
        return with_vocab_size(config, load_tokenizer(config.data.tokenizer, levels).vocab_size)
    if not config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: 0, and data.tokenizer ({config.data.tokenizer}) does not exist; give --set model.vocab_size=N"
        )
    return config


@dataclass(frozen=True)
class Plan:
    """A configuration on a cluster.

    Attributes:
        memory: of a rank of every pipeline stage.
        suffix: part of a sample that recalls, where that is not all of it or none.
        costliest: the chunk sizes that all samples are taken to have drawn; none where they draw none.
        mean_seconds: of a step, the mean over what samples may draw; None where they draw nothing.
    """

    config: RunConfig
    cluster: Cluster
    division: Division
    sample: SampleSize
    memory: list[Memory]
    traffic: list[Traffic]
    flops: Flops
    suffix: float = SUFFIX
    costliest: tuple[int, ...] = ()
    mean_seconds: float | None = None

    @cached_property
    def time(self) -> StepTime | None:
        """Of a step, part by part; None where the GPU's peak is not known."""
        if not self.cluster.gpu.peak:
            return None
        micro_batch = offloaded(self.config, self.sample)
        return step_time(self.config, self.cluster, self.division, self.sample, self.traffic, micro_batch)

    @property
    def mfu(self) -> float | None:
        """Useful FLOPs per second of a step over the peak of all GPUs."""
        return self.flops.total / self.time.total / self.cluster.gpus / self.cluster.gpu.peak if self.time else None

    @property
    def fullest(self) -> Memory:
        """Of the stage that needs most."""
        return max(self.memory, key=lambda m: m.total)

    @property
    def node_memory(self) -> int:
        """Bytes that offloading keeps in the host memory of a node, at most."""
        return max(m.host for m in self.memory) * min(self.cluster.gpus, self.cluster.gpus_per_node)


class Planner:
    """Makes plans for one cluster; a sample's layout is counted once for all that share it."""

    def __init__(self, cluster: Cluster, suffix: float = SUFFIX):
        """suffix: part of a sample's raw tokens that recall under ``gist.recall: suffix``."""
        self.cluster, self.suffix = cluster, suffix
        self._samples: dict[tuple, SampleSize] = {}

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that a plan may fill."""
        return self.cluster.gpu.memory * (1 - RESERVED)

    def plan(self, config: RunConfig) -> Plan:
        """Raises UserError where the ranks cannot be divided as configured; does not ask whether it fits.

        Where samples draw chunk sizes, all are taken to have drawn those that cost most: most FLOPs in what takes time, and most
        memory in what takes memory.
        """
        if config.folding is None or not config.gist.choices:
            return self._plan(config)
        several = [self._plan(replace(config, gist=variant)) for variant in config.gist.variants]
        costliest, fullest = max(several, key=lambda p: p.flops.total), max(several, key=lambda p: p.fullest.total)
        mean = None
        if costliest.time:
            weights = [choice.weight for choice in config.gist.choices]
            mean = sum(weight * p.time.total for weight, p in zip(weights, several)) / sum(weights)
        sizes = costliest.config.gist.chunk_sizes
        return replace(costliest, config=config, memory=fullest.memory, costliest=sizes, mean_seconds=mean)

    def _plan(self, config: RunConfig) -> Plan:
        division = Division.of(config, self.cluster.gpus)
        if config.folding and config.gist.recall != "none" and config.gist.top_p is not None:
            raise UserError(
                f"gist.top_p: {config.gist.top_p}; GPU kernels select by number; set gist.topk, or neither (the budget adapts)"
            )
        sample = self._sample(config)
        flops = count_flops(config.model, sample, config.train.global_batch)
        counts = division.replicas, division.micro_batches
        return Plan(
            config,
            self.cluster,
            division,
            sample,
            plan_memory(config, sample, *counts),
            plan_traffic(config, sample, *counts, division.ranks),
            flops,
            self.suffix,
        )

    def _sample(self, config: RunConfig) -> SampleSize:
        parallel, recalls = config.parallel, config.gist.recall != "none"
        key = (
            config.model, config.gist, config.data.raw_tokens, config.precision if recalls else "", parallel.context,
            parallel.heads_ranks, parallel.tensor if recalls or parallel.sequence else 1,
        )  # fmt: skip
        if key not in self._samples:
            self._samples[key] = measure_sample(config, suffix=self.suffix)
        return self._samples[key]

    def check_fits(self, plan: Plan, what: str = "", place: Callable[[str], str] = str) -> None:
        """Raises UserError, with settings that would do, where a pipeline stage needs more than a GPU has, or offloading than a
        node. what: stands before the message. place: of a setting, where it is to be set."""
        if plan.fullest.total <= self.usable:
            return self._check_host(plan, what)
        changes = suggest(plan.config, self.cluster.gpus_per_node, self.usable, self._peak)
        changes = [place(name) + sign + value for name, sign, value in (change.partition("=") for change in changes)]
        would_do = f"set {' '.join(changes)}" if changes else f"take more GPUs, or a smaller {place('data.raw_tokens')}"
        parts = {part.name: getattr(plan.fullest, part.name) for part in fields(Memory) if part.name != "host"}
        largest = max(parts, key=parts.get)
        raise UserError(
            f"{what}does not fit: {plan.fullest.total / GIB:.1f} GiB are needed on the fullest GPU ({largest}: "
            f"{parts[largest] / GIB:.1f}), {self.usable / GIB:.1f} of {self.cluster.gpu.name} are usable; {would_do}"
        )

    def _check_host(self, plan: Plan, what: str) -> None:
        host = self.cluster.host_memory
        if not host or plan.node_memory <= host:
            return
        less = (
            ("train", "activation_checkpointing", "full"), ("train", "offload_activations", False),
            ("parallel", "offload", "optimizer"), ("parallel", "offload", "none"),
        )  # fmt: skip
        would_do = "take more nodes, or fewer samples in train.micro_batch"
        for section, name, value in less:
            try:
                changed = self.plan(with_setting(plan.config, section, **{name: value}))
            except ValueError:
                continue  # the configuration refuses it: not a way out
            if changed.node_memory <= host and changed.fullest.total <= self.usable:
                would_do = f"set {section}.{name}={str(value).lower()}"
                break
        raise UserError(
            f"{what}does not fit: {plan.node_memory / GIB:.1f} GiB of host memory are needed on a node, {host / GIB:.1f} are "
            f"there (--host-memory); {would_do}"
        )

    def _peak(self, config: RunConfig) -> float:
        return self.plan(config).fullest.total

    def dense(self, config: RunConfig) -> Plan | None:
        """The same run with dense attention; None where no such layout exists (dense context parallelism is ulysses)."""
        try:
            if config.parallel.context > 1:
                config = with_setting(config, "parallel", context_method="ulysses", context_heads=1)
            return self.plan(with_setting(config, "model", attention="dense", layer_attention=()))
        except (ValueError, UserError):
            return None
