"""Compressed attention beside dense and block-sparse attention, in one run.

    python -m tests.benchmarks.gpu.attention [--ops unfold decode]

On a CUDA machine: ours, PyTorch's SDPA (dense causal, on the raw tokens alone, as a model without gists computes), FlexAttention
on level-sorted keys (blocks straight from the intervals) and on the interleaved order. On a CPU machine the same, FlexAttention
forward only (it has no backward there). Every sparse contestant is first checked at that very shape, outputs and gradients, at
sampled tokens; where a check fails its numbers are withheld and the exit status is 1. Writes DIR/compressed_DEVICE.{json,md}.

Useful FLOPs count visible pairs: 4 D per pair and head forward, 10 D backward. ``bytes`` is what forward + backward must move at
least, sorting the keys included; ``sort bytes`` is that part alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tests.benchmarks.gpu.measures import matmul_peak, milliseconds, peak_bytes
from tests.benchmarks.gpu.recall import random_leaves
from tests.kernels.uniform import sampled_attention, uniform_intervals
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.compressed.plan import key_plan, row_plan
from unfold.kernels.intervals import Intervals

CHUNKS = ((8,), (16,), (32,), (8, 4), (4, 4), (8, 8, 4))
FLEX_BLOCK = 128
SAMPLES = 16
FP32_ROUNDING = 2e-6  # where plain PyTorch is exactly right, another order of fp32 sums need not be


class Shape:
    """One measured shape: intervals of one document, q, k, v, an upstream gradient, and functions to run them."""

    def __init__(self, raw: int, chunk_sizes: tuple[int, ...], args: argparse.Namespace):
        self.raw, self.chunk_sizes, self.args = raw, chunk_sizes, args
        level, self.intervals = uniform_intervals(raw, chunk_sizes, device=args.device)
        self.tokens = len(level)
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        leaves = random_leaves(args, *((1, self.tokens, h, args.dim) for h in heads))
        self.q, self.k, self.v, self.d_out = (x.detach() for x in leaves)
        self.detached = (self.q, self.k, self.v)
        self.q, self.k, self.v = (x.detach().requires_grad_() for x in self.detached)
        self.scale = 1 / math.sqrt(args.dim)

    @property
    def pairs(self) -> int:
        """Visible pairs of one head."""
        return int((self.intervals.hi - self.intervals.lo).sum())

    def bytes_moved(self) -> tuple[int, int]:
        """Least traffic of forward + backward, and of it sorting: each tensor once per pass, partial sums not counted."""
        size, stats = self.q.element_size(), 4 * self.tokens * self.args.heads
        query, key = self.q.numel() * size, self.k.numel() * size
        sort = 4 * key  # keys and values, read and written
        bounds = 2 * self.intervals.lo.numel() * 4
        forward = 2 * query + 2 * key + stats + bounds
        backward = 4 * query + 4 * key + 3 * stats + 2 * bounds  # q, out, d_out, d_q; k, v, d_k, d_v
        return sort + forward + backward, sort


def ours(shape: Shape):
    """Our operation with the default backend of the device."""
    return functools.partial(compressed_attention, intervals=shape.intervals)


def dense(shape: Shape, kernel: SDPBackend = SDPBackend.FLASH_ATTENTION):
    """SDPA, causal, over as many tokens as there are raw ones; on CUDA the named kernel or an error."""

    def run(q, k, v):
        q, k, v = (x[:, : shape.raw].transpose(1, 2) for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(kernel) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def flex_sorted(shape: Shape):
    """FlexAttention over level-sorted keys: the blocks that the intervals of a block of queries touch, all masked."""
    iv = shape.intervals
    lo, hi, rows = iv.lo[0].contiguous(), iv.hi[0].contiguous(), iv.rows[0]

    def mask(b, h, i, j):
        seen = (j >= lo[0, i]) & (j < hi[0, i])
        for s in range(1, iv.segments):
            seen = seen | ((j >= lo[s, i]) & (j < hi[s, i]))
        return seen

    touched = _touched_blocks(iv, len(rows))
    block_mask = _block_mask(touched, mask, (shape.tokens, len(rows)))
    attend = _compiled_flex()

    def run(q, k, v):
        k, v = (x.index_select(1, rows) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    return run


def flex_interleaved(shape: Shape):
    """FlexAttention over the tokens as they stand: nearly every causal block holds a top-level gist, so all are visited."""
    iv = shape.intervals
    lo, hi, row_of = iv.lo[0].contiguous(), iv.hi[0].contiguous(), iv.row_of[0]
    segment = (torch.searchsorted(iv.segment_start[0], row_of.int(), right=True) - 1).contiguous()
    # The sink copies are the first raw tokens, in order: copy number of each token, or one that no query sees.
    copy_row = torch.full_like(row_of, -1)
    copies = iv.rows[0, shape.tokens :]
    copy_row[copies] = torch.arange(len(copies), device=row_of.device) + shape.tokens
    sink = iv.segments - 1

    def mask(b, h, i, j):
        row, s = row_of[j], segment[j]
        in_segment = (row >= lo[s, i]) & (row < hi[s, i])
        return in_segment | ((copy_row[j] >= lo[sink, i]) & (copy_row[j] < hi[sink, i]))

    blocks = -(-shape.tokens // FLEX_BLOCK)
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=row_of.device).tril()
    block_mask = _block_mask(causal, mask, (shape.tokens, shape.tokens))
    attend = _compiled_flex()
    run = lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, enable_gqa=True)
    return lambda *x: run(*x).transpose(1, 2)


def _touched_blocks(iv: Intervals, keys: int) -> Tensor:
    """bool [query blocks, key blocks]: some range of a query of the block reaches into the key block."""
    blocks, key_blocks = -(-iv.tokens // FLEX_BLOCK), -(-keys // FLEX_BLOCK)
    query_block = (torch.arange(iv.tokens, device=iv.lo.device) // FLEX_BLOCK).expand(iv.segments, -1)
    seen = iv.hi[0] > iv.lo[0]
    edges = torch.zeros(blocks, key_blocks + 1, dtype=torch.int32, device=iv.lo.device)
    one = torch.ones((), dtype=torch.int32, device=iv.lo.device)
    edges.index_put_((query_block[seen], iv.lo[0][seen] // FLEX_BLOCK), one, accumulate=True)
    edges.index_put_((query_block[seen], (iv.hi[0][seen] - 1) // FLEX_BLOCK + 1), -one, accumulate=True)
    return edges.cumsum(1)[:, :-1] > 0


def _block_mask(touched: Tensor, mask, lengths: tuple[int, int]) -> BlockMask:
    counts = touched.sum(1, dtype=torch.int32)[None, None]
    order = touched.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=lengths)


def _compiled_flex():
    # Beyond a few recompilations PyTorch would run it uncompiled, T x T scores and all: begin anew for each shape.
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # its backward runs many times over one forward
    return torch.compile(flex_attention, dynamic=False)


CONTESTANTS = {
    "dense SDPA": dense,
    "dense cuDNN": functools.partial(dense, kernel=SDPBackend.CUDNN_ATTENTION),
    "ours": ours,
    "flex, sorted keys": flex_sorted,
    "flex, interleaved": flex_interleaved,
}
DENSE = ("dense SDPA", "dense cuDNN")  # they see no gists


def check(shape: Shape, attention, backward: bool) -> str | None:
    """What is wrong with a contestant at this shape: errors over twice plain PyTorch's at sampled tokens; None if nothing."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randperm(shape.tokens, generator=g)[:SAMPLES].sort().values
    tokens[-1] = shape.tokens - 1
    tokens = tokens.to(shape.q.device)
    leaves = (shape.q, shape.k, shape.v)
    d_out = torch.zeros_like(shape.d_out)
    d_out[:, tokens] = shape.d_out[:, tokens]

    def results(out, to_dtype):
        found = [out.detach()]
        if backward:
            found += torch.autograd.grad(out, leaves, d_out[0, tokens].to(to_dtype))
        return [x.double() for x in found]

    # fp64 leaves give fp64 gradients; the truth must not be rounded to the dtype under test.
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = sampled_attention(*wide, shape.intervals, tokens, shape.scale, torch.float64)
    exact = [out.detach()] + (list(torch.autograd.grad(out, wide, d_out[0, tokens].double())) if backward else [])
    plain = results(sampled_attention(*leaves, shape.intervals, tokens, shape.scale, shape.args.dtype), shape.args.dtype)
    out = attention(*(leaves if backward else shape.detached))
    got = [out[0, tokens].detach().double()]
    if backward:
        got += [x.double() for x in torch.autograd.grad(out, leaves, d_out)]
    for name, a, b, true in zip(("out", "d_q", "d_k", "d_v"), got, plain, exact):
        error, allowed = float((a - true).abs().max()), 2 * float((b - true).abs().max()) + FP32_ROUNDING
        if not error <= allowed:
            return f"{name} is off by {error:.2e}, plain PyTorch allows {allowed:.2e}"
    return None


def measure(shape: Shape, name: str, peak: float) -> dict:
    """One contestant at one shape: its figures, or why there are none."""
    args = shape.args
    attention = CONTESTANTS[name](shape)
    backward = args.device == "cuda" or not name.startswith("flex")
    result = dict(name=name, raw=shape.raw, tokens=shape.tokens, chunk_sizes=list(shape.chunk_sizes))
    if name not in DENSE:
        wrong = check(shape, attention, backward)
        if wrong:
            return result | dict(refused=wrong)
    leaves = (shape.q, shape.k, shape.v)
    forward_ms = milliseconds(lambda: attention(*shape.detached), args.device, args.seconds)
    pairs = shape.raw * (shape.raw + 1) // 2 if name in DENSE else shape.pairs
    flops = 4 * args.dim * args.heads * pairs
    result |= _speed("forward", forward_ms, flops, peak)
    if backward:
        out = attention(*leaves)
        d_out = shape.d_out[:, : out.shape[1]]
        step = lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        result |= _speed("backward", milliseconds(step, args.device, args.seconds), 2.5 * flops, peak)
        del out
        if args.device == "cuda":  # on CPU: tests.benchmarks.compressed_cpu, which takes a process for each
            result["peak_bytes"] = peak_bytes(lambda: torch.autograd.grad(attention(*leaves), leaves, d_out))
    if name == "ours":
        result["bytes"], result["sort_bytes"] = shape.bytes_moved()
        result |= plan_figures(shape)
    return result


def _speed(way: str, ms: float, flops: float, peak: float) -> dict:
    return {f"{way}_ms": ms, f"{way}_tflops": flops / ms / 1e9, f"{way}_of_peak": 1e3 * flops / ms / peak}


def plan_figures(shape: Shape) -> dict:
    """On CUDA: tiled keys per row of the forward kernel, and the time to plan once per micro-batch, from fresh intervals."""
    if shape.args.device != "cuda":
        return {}
    from unfold.kernels.common.launch import architecture
    from unfold.kernels.compressed.tiles import choose_tiles

    dim, group = 1 << (shape.args.dim - 1).bit_length(), shape.args.heads // shape.args.kv_heads
    tiles = choose_tiles(architecture(shape.q), dim, shape.q.element_size())

    def plan():
        fresh = shape.intervals.to(shape.args.device)
        key_plan(fresh, tiles.sink.keys, tiles.top.keys, tiles.local.keys)
        return row_plan(fresh, group, tiles.forward.rows, tiles.forward.keys)

    return dict(plan_ms=milliseconds(plan, shape.args.device, shape.args.seconds), tiled_keys=plan().tiled_keys())


COLUMNS = (
    "c",
    "raw",
    "what",
    "fwd ms",
    "bwd ms",
    "fwd TFLOP/s",
    "of peak",
    "bwd TFLOP/s",
    "of peak",
    "x dense fwd",
    "x dense bwd",
)
COLUMNS += ("peak MB", "MB moved", "of it sorting")


def table(results: list[dict]) -> list[str]:
    """The results as lines of a Markdown table; ratios are to dense SDPA at the same number of raw tokens."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    dense_at = {r["raw"]: r for r in results if r["name"] == "dense SDPA"}
    return lines + [_line(r, dense_at.get(r["raw"], {})) for r in results]


def _line(r: dict, other: dict) -> str:
    sizes = "-" if r["name"] in DENSE else "(" + ", ".join(map(str, r["chunk_sizes"])) + ")"
    cells = [sizes, str(r["raw"]), r["name"]]
    if "refused" in r:
        cells.append("refused: " + r["refused"])
    else:
        show = lambda x, form: "-" if x is None else format(x, form)
        ratio = lambda field: other[field] / r[field] if field in r and field in other else None
        cells += [show(r.get("forward_ms"), ".3g"), show(r.get("backward_ms"), ".3g")]
        for way in ("forward", "backward"):
            cells += [show(r.get(f"{way}_tflops"), ".3g"), show(r.get(f"{way}_of_peak"), ".0%")]
        cells += [show(ratio("forward_ms"), ".2f"), show(ratio("backward_ms"), ".2f")]
        cells += [show(r[f] / 1e6 if f in r else None, ".0f") for f in ("peak_bytes", "bytes", "sort_bytes")]
    return "| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    chunks = lambda text: tuple(int(c) for c in text.split(","))
    default_raw = [2**i for i in range(11, 18)] if cuda else [1024, 2048]
    parser.add_argument("--ops", nargs="+", choices=("compressed", "unfold", "decode"), default=["compressed"])
    parser.add_argument("--decode-raw", type=int, nargs="+", default=[2**i for i in range(13, 20)] if cuda else [8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64] if cuda else [1], help="sequences of a decoding step")
    parser.add_argument("--topk", type=int, help="gists that recall selects (default: the adaptive budget)")
    parser.add_argument("--raw", type=int, nargs="+", default=default_raw)
    parser.add_argument("--chunks", type=chunks, nargs="+", default=CHUNKS, help="e.g. 8,4 16")
    parser.add_argument("--heads", type=int, default=32 if cuda else 8)
    parser.add_argument("--kv-heads", type=int, default=8 if cuda else 2)
    parser.add_argument("--dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--dtype", type=lambda t: getattr(torch, t), default=torch.bfloat16 if cuda else torch.float32)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=0.5, help="time to repeat each measurement for")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(arguments)
    args.device = "cuda" if cuda else "cpu"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    processor = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "CPU")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor}, {args.threads} thread(s)"
    peak = matmul_peak(args)
    about = f"{device}, torch {torch.__version__}, {args.dtype}, {args.heads}/{args.kv_heads} heads, d {args.dim}, batch 1"
    print(f"{about}; matrix product {peak / 1e12:.3g} TFLOP/s", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    kind = re.sub(r"\W+", "_", torch.cuda.get_device_name() if args.device == "cuda" else "cpu").lower()
    refused = _recall(args, about, kind) if set(args.ops) & {"unfold", "decode"} else False
    if "compressed" in args.ops:
        refused |= _compressed(args, about, kind, peak)
    return 1 if refused else 0


def _recall(args: argparse.Namespace, about: str, kind: str) -> bool:
    """Measure unfolding and decoding and write ``recall_DEVICE``; whether anything was refused."""
    from tests.benchmarks.gpu import recall as bench_recall

    results = []
    for op, rows in (("unfold", bench_recall.unfold_rows), ("decode", bench_recall.decode_rows)):
        for result in rows(args) if op in args.ops else ():
            results.append(result)
            print(bench_recall.table(results)[-1], flush=True)
    command = f"`python -m tests.benchmarks.gpu.attention --ops {' '.join(args.ops)}`"
    lines = ["# Unfolding and decoding, measured", "", f"{command} on {about}. Medians; x dense: times faster than dense SDPA."]
    _write(args.output / f"recall_{kind}", lines + ["", *bench_recall.table(results)], dict(about=about, results=results))
    return any("refused" in r for r in results)


def _write(path: Path, lines: list[str], content: dict) -> None:
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _compressed(args: argparse.Namespace, about: str, kind: str, peak: float) -> bool:
    """Measure compressed attention and write ``compressed_DEVICE``; whether anything was refused."""
    results = []
    for chunk_sizes in args.chunks:
        for raw in args.raw:
            shape = Shape(raw, chunk_sizes, args)
            for name in args.only:
                if name in DENSE and (chunk_sizes != args.chunks[0] or (name == "dense cuDNN" and args.device != "cuda")):
                    continue  # once per length
                results.append(measure(shape, name, peak))
                print(table(results)[-1], flush=True)
    lines = ["# Compressed attention, measured", "", f"`python -m tests.benchmarks.gpu.attention` on {about};", ""]
    lines[2] += f" a matrix product reaches {peak / 1e12:.3g} TFLOP/s. Medians; x dense: how many times faster than dense SDPA."
    content = dict(about=about, matmul_flops=peak, results=results)
    _write(args.output / f"compressed_{kind}", lines + table(results), content)
    return any("refused" in r for r in results)


if __name__ == "__main__":
    sys.exit(main())
