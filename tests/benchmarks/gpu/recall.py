"""Unfolding and decoding beside dense attention: the rows of ``python -m tests.benchmarks.gpu.attention --ops unfold decode``

*Unfold*: forward and backward of one layer's recalling queries (selection apart and together) against PyTorch's SDPA (dense
causal; on CUDA the flash kernel or an error) and, where it is installed and serves the heads, flash-linear-attention's NSA
reading as many selected tokens. *Decode*: one new token per sequence against SDPA over all raw tokens; on CUDA both are replayed
from CUDA graphs. What is timed of ours is first checked at that very shape, at sampled queries, and withheld where it is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.gpu.measures import milliseconds
from tests.kernels.uniform import uniform_tree
from unfold.kernels.decode import Step, decode_attention
from unfold.kernels.select import SelectRule, select_gists
from unfold.kernels.unfold import unfold_attention
from unfold.kernels.unfold.reference import visible_tokens

SAMPLES = 8
SINK = 3


def rule_for(chunk_sizes: tuple[int, ...], topk: int | None) -> SelectRule:
    """The adaptive budget of a configuration, or a fixed one."""
    return SelectRule(math.prod(chunk_sizes), chunk_sizes[0], topk=topk)


def unfold_rows(args: argparse.Namespace) -> Iterator[dict]:
    """One result per number of raw tokens, share of recalling tokens and contestant."""
    for raw in args.raw:
        for share, recalling in (("all", raw), ("tenth", max(1, raw // 10))):
            yield from _unfold(raw, share, recalling, args)
        dense = random_leaves(args, (1, raw, args.heads, args.dim), *((1, raw, args.kv_heads, args.dim),) * 2)
        attend = lambda q, k, v: sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        yield dict(op="unfold", name="dense SDPA", raw=raw) | _times(attend, dense, args)


def _unfold(raw: int, share: str, recalling: int, args: argparse.Namespace) -> Iterator[dict]:
    chunk_sizes = args.chunks[0]
    tree, rule = uniform_tree(raw, chunk_sizes, recalling, SINK, args.device), rule_for(chunk_sizes, args.topk)
    tokens = tree.others.tokens
    leaves = random_leaves(args, (recalling, args.heads, args.dim), *((1, tokens, args.kv_heads, args.dim),) * 2)
    leaves[0] = alike(leaves[0])
    selection = select_gists(*leaves[:2], tree, rule)
    about = dict(op="unfold", raw=raw, recalling=share, selected=len(selection.rows[-1]) / recalling / args.kv_heads)
    attend = lambda q, k, v: unfold_attention(q, k, v, tree, selection)
    wrong = wrong_unfold(attend, leaves, tree, selection)
    if wrong:
        yield about | dict(name="unfold", refused=wrong)
        return
    select = lambda: select_gists(leaves[0].detach(), leaves[1].detach(), tree, rule)
    yield about | dict(name="select", forward_ms=milliseconds(select, args.device, args.seconds))
    yield about | dict(name="unfold") | _times(attend, leaves, args)
    if share == "all" and importlib.util.find_spec("fla") is not None:
        yield about | dict(name="NSA (fla)") | _nsa(raw, int(about["selected"] * chunk_sizes[0]), args)


def wrong_unfold(attend: Callable, leaves: list[Tensor], tree, selection) -> str | None:
    """What is wrong with the output at sampled queries, against fp64 and measured by plain PyTorch; None if nothing is."""
    q, k, v = (x.detach() for x in leaves)
    out, kv_heads = attend(q, k, v), k.shape[2]
    for n in torch.linspace(0, len(q) - 1, SAMPLES).long().tolist():
        for h in range(kv_heads):
            seen = sorted(visible_tokens(tree, selection, n, h))
            own, keys, values = q[n].unflatten(0, (kv_heads, -1))[h], k[0, seen, h], v[0, seen, h]
            exact, plain = (_softmax_attention(own.to(t), keys.to(t), values.to(t)) for t in (torch.float64, q.dtype))
            error = float((out[n].unflatten(0, (kv_heads, -1))[h] - exact).abs().max())
            allowed = 2 * float((plain - exact).abs().max()) + 2e-6
            if not error <= allowed:
                return f"query {n}, KV head {h} is off by {error:.2e}, plain PyTorch allows {allowed:.2e}"
    return None


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.T / math.sqrt(q.shape[-1])).to(torch.promote_types(q.dtype, torch.float32))
    return scores.softmax(-1).to(q.dtype) @ v


def _nsa(raw: int, selected: int, args: argparse.Namespace) -> dict:
    """flash-linear-attention's selected attention over blocks of 16 tokens before each query, as many tokens as ours unfolds."""
    from fla.ops.nsa import parallel_nsa

    blocks = max(1, selected // 16)
    before = (torch.arange(raw, device=args.device) // 16 + 1)[None, :, None, None]
    drawn = torch.rand(1, raw, args.kv_heads, blocks, device=args.device)
    leaves = random_leaves(args, (1, raw, args.heads, args.dim), *((1, raw, args.kv_heads, args.dim),) * 2)
    gate = torch.ones(1, raw, args.heads, dtype=args.dtype, device=args.device)
    attend = lambda q, k, v: parallel_nsa(
        q, k, v, g_slc=gate, g_swa=gate, block_indices=(drawn * before).long(), block_counts=blocks, block_size=16, window_size=0
    )
    try:
        return _times(attend, leaves, args)
    except (AssertionError, TypeError, ValueError) as error:  # it wants groups of 16 heads, and its arguments have changed before
        return dict(refused=f"{type(error).__name__}: {error}")


def random_leaves(args: argparse.Namespace, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random numbers made where they are used: at 128k tokens the CPU would take longer to make them than the GPU to attend."""
    g = torch.Generator(args.device).manual_seed(0)
    make = lambda shape: torch.randn(shape, generator=g, device=args.device, dtype=torch.float32).to(args.dtype)
    return [make(shape).requires_grad_() for shape in shapes]


def alike(q: Tensor, run: int = 16, share: float = 0.7) -> Tensor:
    """Queries [N, H, D] of which ``run`` neighbours share that part of their variance.

    Independent queries would select as no model's do: neighbours select much alike (docs/kernels.md).
    """
    common = q.detach()[::run].repeat_interleave(run, 0)[: len(q)].roll(1, 1)
    return (share**0.5 * common + (1 - share) ** 0.5 * q.detach()).to(q.dtype).requires_grad_()


def _times(attend: Callable, leaves: list[Tensor], args: argparse.Namespace) -> dict:
    detached = [x.detach() for x in leaves]
    result = dict(forward_ms=milliseconds(lambda: attend(*detached), args.device, args.seconds))
    out = attend(*leaves)
    d_out = torch.randn_like(out)
    step = lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    return result | dict(backward_ms=milliseconds(step, args.device, args.seconds))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """SDPA over [B, H, T, D], on CUDA the flash kernel or an error."""
    if q.is_cuda:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)


class UniformBorders:
    """Borders (kernels.decode.step) of a closed document whose groups are all full."""

    def __init__(self, counts: list[int], chunk_sizes: tuple[int, ...]):
        self.levels, self.sink = len(chunk_sizes), SINK
        self.sizes = chunk_sizes[::-1]
        self.ends = [torch.arange(1, n + 1) * size for n, size in zip(counts, self.sizes)]

    def children(self, segment: int, gists: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = gists * self.sizes[segment], (gists + 1) * self.sizes[segment]
        return (lo.clamp(min=SINK).minimum(hi), hi) if segment == self.levels - 1 else (lo, hi)

    def ends_on(self, device: torch.device) -> tuple[list[Tensor], list[int]]:
        self.ends = [x.to(device) for x in self.ends]
        return self.ends, list(self.sizes)


@dataclasses.dataclass(frozen=True)
class PlainRows:
    """A RowStore (kernels.decode.step) of random rows."""

    memory: Tensor

    def keys(self, lo: int, hi: int) -> Tensor:
        return self.memory[0, :, lo:hi]

    def values(self, lo: int, hi: int) -> Tensor:
        return self.memory[1, :, lo:hi]

    def keys_at(self, rows: Tensor) -> Tensor:
        return self.memory[0].gather(1, rows[..., None].expand(-1, -1, self.memory.shape[3]))

    def values_at(self, rows: Tensor) -> Tensor:
        return self.memory[1].gather(1, rows[..., None].expand(-1, -1, self.memory.shape[3]))


def decode_rows(args: argparse.Namespace) -> Iterator[dict]:
    """One result per length, batch and contestant. All sequences of a batch share one cache's memory: each is read anew."""
    for raw in args.decode_raw:
        for batch in args.batch:
            yield from _decode(raw, batch, args)


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One new token for each sequence of a batch after a closed context: queries [N, H, D], caches of one layer."""

    q: Tensor
    layers: list[list[PlainRows]]
    step: Step
    first: Step  # of the first sequence alone
    rule: SelectRule

    def error(self, out: Tensor) -> float:
        """Largest error of the first sequence's output against fp64."""
        wide = [[PlainRows(rows.memory.double()) for rows in self.layers[0]]]
        exact = decode_attention(self.q[:1].double(), wide, self.first, self.rule, backend="cpu")
        return float((out[:1] - exact).abs().max())


# Largest error of a decoding step: outputs are means of values of size one.
DECODE_BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def decode_case(raw: int, batch: int, chunk_sizes: tuple[int, ...], args: argparse.Namespace, shared: bool = False) -> DecodeCase:
    """A case of about ``raw`` tokens, so that every group is full; ``shared``: all sequences read one cache."""
    counts, items = [], raw
    for size in chunk_sizes:
        items //= size
        counts.insert(0, items)
    raw = counts[0] * math.prod(chunk_sizes)
    step, first = (_uniform_step(counts, raw, chunk_sizes, n) for n in (batch, 1))
    shape = lambda rows: (2, args.kv_heads, rows, args.dim)
    make = lambda: [PlainRows(x.detach()) for x in random_leaves(args, *(shape(n) for n in counts), shape(raw + 1))]
    layers = [make()] * batch if shared else [make() for _ in range(batch)]
    (q,) = (x.detach() for x in random_leaves(args, (batch, args.heads, args.dim)))
    return DecodeCase(q, layers, step, first, rule_for(chunk_sizes, getattr(args, "topk", None)))


def _decode(raw: int, batch: int, args: argparse.Namespace) -> Iterator[dict]:
    about = dict(op="decode", raw=raw, batch=batch)
    try:
        case = decode_case(raw, batch, args.chunks[0], args)
        keys, values = (torch.stack([layer[-1].memory[i] for layer in case.layers]) for i in (0, 1))
    except torch.OutOfMemoryError as error:
        yield about | dict(name="ours", refused=str(error).split(".")[0])
        return
    ours = prepared(case)
    error, bound = case.error(ours()), DECODE_BOUNDS[args.dtype]
    if not error <= bound:
        yield about | dict(name="ours", refused=f"off by {error:.2e}, allowed {bound:.0e}")
    else:
        yield about | dict(name="ours", forward_ms=milliseconds(captured(ours, args), args.device, args.seconds))
    dense = lambda: sdpa(case.q[:, :, None], keys, values)
    yield about | dict(name="dense SDPA", forward_ms=milliseconds(captured(dense, args), args.device, args.seconds))


def _uniform_step(counts: list[int], raw: int, chunk_sizes: tuple[int, ...], batch: int) -> Step:
    """The token after a closed context of ``raw`` tokens, for every sequence."""
    levels = len(counts)
    column = lambda values: torch.tensor(values)[:, None].repeat(1, batch)
    upto = column([*counts, raw + 1])
    tail = column([0, *counts[1:]])
    lo = column([0, *(max(0, (counts[s - 1] - 1) * chunk_sizes[levels - s]) for s in range(1, levels + 1))])
    borders = [UniformBorders(counts, chunk_sizes) for _ in range(batch)]
    span = torch.full((batch,), sum(counts) + raw + 1)
    return Step(borders, lo, upto, torch.full((batch,), SINK), upto, tail, span, torch.ones(batch, dtype=torch.bool))


def prepared(case: DecodeCase) -> Callable[[], Tensor]:
    """A step of ours; on CUDA with its tables on the device, so that it can be captured."""
    q, layers, step, rule = case.q, case.layers, case.step, case.rule
    if not q.is_cuda:
        return lambda: decode_attention(q, layers, step, rule)
    return launched(case)


def launched(case: DecodeCase, **how) -> Callable[[], Tensor]:
    """A step of ours on the Triton backend, its tables made; ``how``: further arguments of kernels.decode.triton.run."""
    from unfold.kernels.decode import triton as backend

    q, layers, step, rule = case.q, case.layers, case.step, case.rule
    tables = backend.make_tables(step, rule, q.shape[1] // layers[0][0].memory.shape[1], q.device)
    places = backend.make_places(q, layers, step, tables.ends)
    return lambda: backend.run(q, tables, places, 1 / math.sqrt(q.shape[2]), layers[0][0].memory.shape[1], rule, **how)


def captured(step: Callable[[], Tensor], args: argparse.Namespace) -> Callable[[], object]:
    """On CUDA the step as a graph's replay."""
    if args.device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def table(results: list[dict]) -> list[str]:
    """Lines of a Markdown table; ratios are to dense SDPA at the same raw tokens and batch."""
    names = ("op", "raw", "batch", "recalling", "selected", "what", "fwd ms", "bwd ms", "x dense fwd", "x dense bwd")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    dense = {(r["op"], r["raw"], r.get("batch")): r for r in results if r["name"] == "dense SDPA"}
    show = lambda x, form: "" if x is None else format(x, form)
    for r in results:
        other = dense.get((r["op"], r["raw"], r.get("batch")), {})
        cells = [r["op"], str(r["raw"]), str(r.get("batch", 1)), r.get("recalling", ""), show(r.get("selected"), ".0f")]
        cells.append(r["name"])
        if "refused" in r:
            cells.append("refused: " + r["refused"])
        else:
            cells += [show(r.get(f), ".3g") for f in ("forward_ms", "backward_ms")]
            cells += [show(other[f] / r[f] if f in r and f in other else None, ".2f") for f in ("forward_ms", "backward_ms")]
        lines.append("| " + " | ".join(cells + [""] * (len(names) - len(cells))) + " |")
    return lines
