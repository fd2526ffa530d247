"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unfold.model.kinds import describe_kinds
from unfold.pretrain.config import RunStage
from unfold.pretrain.plan.hardware import GIB
from unfold.pretrain.plan.make import Plan
from unfold.pretrain.plan.ranks import rank_table
from unfold.pretrain.plan.trained import count_trained
from unfold.pretrain.plan.work import FLOPS_FORMULA, count_parameters

MEMORY = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "master weights and Adam"),
    ("activations", "activations"),
    ("working", "one layer backward, or the loss"),
    ("buffers", "communication buffers"),
    ("total", "total"),
)


def stage_table(stages: Sequence[RunStage], plans: Sequence[Plan], shown: RunStage) -> Iterator[str]:
    """Lines on every stage of a run. shown: the one whose plan comes after them."""
    yield f"{'stage':<24}{'steps':>18}{'raw tokens':>12}{'batch':>8}{'micro':>7}{'GiB':>8}{'s/step':>10}{'days':>9}"
    days = 0.0
    for stage, plan in zip(stages, plans):
        train, raw = stage.config.train, stage.config.data.raw_tokens
        seconds = plan.time.total if plan.time else None
        days += (seconds or 0.0) * stage.steps / 86400
        times = f"{seconds:>10,.2f}{seconds * stage.steps / 86400:>9,.2f}" if seconds else f"{'-':>10}{'-':>9}"
        steps = f"{stage.first:,} to {stage.last:,}"
        sizes = f"{raw:>12,}{train.global_batch:>8,}{train.micro_batch:>7}{plan.fullest.total / GIB:>8.1f}"
        yield f"{stage.title:<24}{steps:>18}{sizes}{times}"
    yield from packing_lines(stages)
    tokens = stages[-1].raw_tokens_after(stages[-1].last)
    yield f"all of them: {tokens:,} raw tokens{f', {days:,.2f} days' if days else ''}"
    yield f"stage {shown.title} needs the most memory; the rest of this plan is of its steps"
    yield ""


def packing_lines(stages: Sequence[RunStage]) -> Iterator[str]:
    """A line on every stage that says itself how documents become samples."""
    for stage in stages:
        if {"packing", "length_weights"} & set(stage.own):
            data = stage.config.data
            weights = f", length weights {[list(pair) for pair in data.length_weights]}" if data.length_weights else ""
            yield f"stage {stage.title}: documents packed as {data.packing}{weights}"


def report(name: str, plan: Plan, dense: Plan | None, usable: float, steps: int) -> Iterator[str]:
    """Lines. dense: the same run with dense attention, where there is one to compare with. steps: that are so."""
    cluster, division = plan.cluster, plan.division
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    yield f"{name} on {cluster.gpus} x {cluster.gpu.name} ({nodes}), {plan.config.precision}"
    parallel = plan.config.parallel
    if parallel.context_heads > 1:
        context = f" ({parallel.heads_ranks} neighbours trade heads, {parallel.gists_ranks} exchange gists)"
    else:
        context = ""
    yield (
        f"layout: pipeline {division.pipeline} x data {division.data} x context {division.context}{context} x "
        f"tensor {division.tensor}, ZeRO-{parallel.zero}; {division.micro_batches} micro-batch(es) of "
        f"{plan.config.train.micro_batch} sample(s) per step on every rank"
    )
    if plan.costliest:
        yield f"gist.choices: counted as if every sample drew the costliest, chunk_sizes {list(plan.costliest)}"
    if plan.config.model.layer_attention:
        yield f"layers: {describe_kinds(plan.config.model.layer_kinds)}; what is said of a layer below is the mean over them"
    yield ""
    yield from rank_table(division, cluster)
    yield ""
    yield from _parameters(plan)
    yield ""
    yield from _memory(plan, dense, usable)
    yield ""
    yield from _traffic(plan, dense)
    yield ""
    yield from _time(plan, dense, steps)


def _parameters(plan: Plan) -> Iterator[str]:
    whole = count_parameters(plan.config.model)
    stages = plan.division.pipeline
    largest = max(count_parameters(plan.config.model, plan.division.tensor, s, stages).total for s in range(stages))
    yield (
        f"parameters: {whole.total:,} (layers {whole.layers:,}, embedding {whole.embedding:,}, head {whole.head:,}, "
        f"norms and biases {whole.vectors:,}); at most {largest:,} on one GPU before ZeRO"
    )
    trained = [count_trained(plan.config, stage) for stage in range(stages)]
    if any(t.learning < t.held for t in trained):
        adapters = f", {max(t.adapters for t in trained):,} of them adapters" if plan.config.lora.rank else ""
        yield f"trained: at most {max(t.learning for t in trained):,} on one GPU before ZeRO{adapters}; the rest is frozen"


def _columns(title: str, *values: str) -> str:
    return f"{title:<34}" + "".join(f"{value:>14}" for value in values)


def _memory(plan: Plan, dense: Plan | None, usable: float) -> Iterator[str]:
    plans = [p for p in (plan, dense) if p]
    kind = "gist" if plan.config.model.attention == "gist" else "dense"
    yield _columns("peak memory of one GPU, GiB", kind, *(["dense"] if dense else []))
    for field, title in MEMORY:
        yield _columns(f"  {title}", *(f"{getattr(p.fullest, field) / GIB:.2f}" for p in plans))
    yield f"  usable: {usable / GIB:.1f} of {plan.cluster.gpu.memory / GIB:.1f}, the rest is for CUDA, NCCL and fragmentation"
    if plan.node_memory:
        yield f"  host memory of one node: {plan.node_memory / GIB:.1f} GiB"
    if len(plan.memory) > 1:
        yield f"  by pipeline stage: {', '.join(f'{m.total / GIB:.1f}' for m in plan.memory)} (the columns show the fullest)"
    yield from _recall_note(plan)


def _recall_note(plan: Plan) -> Iterator[str]:
    """What is taken of recall, where tokens recall."""
    recalls = [size.recall for _, _, size in plan.sample.by_kind("gist") if size.recall]
    if not recalls:
        return
    gist, found = plan.config.gist, recalls[0]
    layers = sum(size.recall is not None for _, size in plan.sample.layers) or plan.config.model.layers
    if found.part:
        which = "all raw tokens" if gist.recall == "all" else f"{plan.suffix:g} of the raw tokens (--suffix)"
        yield (
            f"  recall in {layers} layers: {which}; a query scores {found.scored:,.0f} gists and reads {found.read:,.0f} rows, "
            "as if heads selected by chance"
        )
    if gist.unfold_all or gist.unfold_share:
        part = "all samples" if gist.unfold_all else f"{gist.unfold_share:g} of the samples"
        yield f"  recall in {layers} layers: {part} unfold everything, which is counted as what is visible"


def _traffic(plan: Plan, dense: Plan | None) -> Iterator[str]:
    cluster = plan.cluster
    if not plan.traffic:
        yield "communication: none, one rank"
        return
    plans = [{t.kind: t for t in p.traffic} for p in (plan, dense) if p]
    header = ["gist"] if plan.config.model.attention == "gist" else ["dense"]
    yield _columns("sent by one GPU per step, GiB", *header, *(["dense"] if dense else []))
    for kind in dict.fromkeys(kind for kinds in plans for kind in kinds):
        traffic = next(kinds[kind] for kinds in plans if kind in kinds)
        inside = traffic.span <= cluster.gpus_per_node
        where = "in a node" if inside else "across nodes"
        if cluster.gpu.node_link:
            where += f", {traffic.sent / traffic.rate(cluster):.2g} s{' beside computation' if traffic.beside else ''}"
        sent = (kinds[kind].sent / GIB if kind in kinds else 0 for kinds in plans)
        yield _columns(f"  {kind}", *(f"{x:.2f}" for x in sent)) + f"   {where}"


def _parts(plans: list[Plan]) -> Iterator[str]:
    """Seconds of a step, part by part, and each part's share."""
    times = [p.time for p in plans]
    parts = (
        ("matrix products", lambda t: t.products.seconds), ("attention", lambda t: t.attention.seconds),
        ("  of which recall", lambda t: t.recall.seconds),
        ("bound by memory", lambda t: t.memory.seconds), ("communication, exposed", lambda t: t.exposed),
        ("waiting for pipeline stages", lambda t: t.idle),
    )  # fmt: skip
    for title, seconds in parts:
        if not any(map(seconds, times)) and title.startswith(" "):
            continue
        yield _columns(f"  {title}", *(f"{seconds(t):,.2f} {seconds(t) / t.total:>4.0%}" for t in times))
    yield _columns("  seconds", *(f"{t.total:,.2f} 100%" for t in times))
    yield _columns("    of which computed again", *(f"{t.again:,.2f} {t.again / t.total:>4.0%}" for t in times))
    yield _columns("  communication beside it", *(f"{t.hidden:,.2f}     " for t in times))


def _time(plan: Plan, dense: Plan | None, steps: int) -> Iterator[str]:
    plans = [p for p in (plan, dense) if p]
    train, raw = plan.config.train, plan.config.data.raw_tokens
    kind = "gist" if plan.config.model.attention == "gist" else "dense"
    yield _columns("one step", kind, *(["dense"] if dense else []))
    yield _columns("  raw tokens", *(f"{train.global_batch * raw:,}" for _ in plans))
    yield _columns("  raw tokens and gists", *(f"{train.global_batch * p.sample.tokens:,}" for p in plans))
    yield _columns("  visible keys per query, mean", *(f"{p.sample.keys / p.sample.tokens:,.0f}" for p in plans))
    if plan.division.context > 1:
        yield _columns("  busiest context rank over mean", *(f"{p.sample.imbalance:.3f}" for p in plans))
    yield _columns("  useful TFLOP", *(f"{p.flops.total / 1e12:,.2f}" for p in plans))
    yield _columns("    of which attention", *(f"{p.flops.attention / 1e12:,.2f}" for p in plans))
    if plan.time is None:
        yield "  the GPU's peak is not known: name a --gpu for times"
    else:
        yield from _parts(plans)
        seconds = [p.time.total for p in plans]
        if plan.mean_seconds:
            yield f"  mean over gist.choices, by their weights: {plan.mean_seconds:,.2f} seconds"
        yield _columns("  raw tokens/s", *(f"{train.global_batch * raw / s:,.0f}" for s in seconds))
        yield _columns("  useful FLOPs over the peak, MFU", *(f"{p.mfu:.0%}" for p in plans))
        yield _columns(f"  days for {steps:,} steps", *(f"{s * steps / 86400:,.2f}" for s in seconds))
    yield f"  useful FLOPs = {FLOPS_FORMULA}"
    yield "  padding and recomputation are not useful; a sample is taken as one document, the most that attention can cost"
