"""Does every operation work at all: against fp64 at sampled tokens, and two runs bit-equal. A few seconds each on a GPU.

    python -m tests.benchmarks.gpu.smoke [--raw 2048] [--dtypes bfloat16 float32] [--once]

Each line is one operation: what it took, and ``ok`` or what is wrong. Exit status 1 where something is. ``--once`` leaves out the
second run: for compute-sanitizer, under which everything is a hundred times slower.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.gpu import attention as bench
from tests.benchmarks.gpu import recall as bench_recall
from tests.kernels.uniform import uniform_tree
from unfold.kernels.compressed import compressed_attention
from unfold.kernels.decode import decode_attention
from unfold.kernels.route import Routed, routing_loss
from unfold.kernels.select import select_gists
from unfold.kernels.unfold import recall_attention, unfold_attention
from unfold.model.gist import GistConfig, build_layout, interleave
from unfold.model.raw_attention import raw_attention

CHUNKS = (8, 4)


def compressed(args: SimpleNamespace) -> tuple[str | None, list[Tensor]]:
    """Compressed attention, forward and backward: what is wrong, and the results."""
    shape = bench.Shape(args.raw, CHUNKS, args)
    attend = lambda *x: compressed_attention(*x, shape.intervals, backend="triton")
    wrong = bench.check(shape, attend, True)
    leaves = (shape.q, shape.k, shape.v)
    out = attend(*leaves)
    return wrong, [out.detach(), *torch.autograd.grad(out, leaves, shape.d_out)]


def recall(args: SimpleNamespace) -> tuple[str | None, list[Tensor]]:
    """Selection against the CPU path's tensor operations, unfolding against fp64, and a whole layer with gradients."""
    tree = uniform_tree(args.raw, CHUNKS, args.raw // 4, device=args.device)
    tokens, rule = tree.others.tokens, bench_recall.rule_for(CHUNKS, None)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    leaves = bench_recall.random_leaves(args, *((1, tokens, h, args.dim) for h in heads))
    q = leaves[0].detach()[0, tree.tokens]
    k, v = (x.detach() for x in leaves[1:])
    got = select_gists(q, k, tree, rule, backend="triton")
    # Rounded to whole numbers every order of sums gives the same scores, so that the selections must be equal.
    whole = [(x.float() * 2).round().to(x.dtype) for x in (q, k)]
    pair = [select_gists(*whole, tree, rule, backend=b) for b in ("triton", "cpu")]
    if not all(torch.equal(a, b) for a, b in zip(*(s.start + s.rows for s in pair))):
        return "the selection differs from the CPU path's", []
    wrong = bench_recall.wrong_unfold(lambda *x: unfold_attention(*x, tree, got, backend="triton"), [q, k, v], tree, got)
    out, stats = recall_attention(*leaves, tree, rule, backend="triton")
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    finite = all(bool(x.isfinite().all()) for x in (out, *gradients))
    return wrong or (None if finite else "not finite"), [out.detach(), *gradients, stats.unfolded]


def decode(args: SimpleNamespace) -> tuple[str | None, list[Tensor]]:
    """One new token of two sequences, against the CPU path in fp64."""
    case = bench_recall.decode_case(args.raw, 2, CHUNKS, args)
    out = decode_attention(case.q, case.layers, case.step, case.rule, backend="triton")
    error, bound = case.error(out), bench_recall.DECODE_BOUNDS[args.dtype]
    return None if error <= bound else f"off by {error:.2e}, allowed {bound:.0e}", [out]


def route(args: SimpleNamespace) -> tuple[str | None, list[Tensor]]:
    """The routing loss and its gradient against the CPU path in fp64: see tests/kernels/test_route_triton.py for the bounds."""
    tree = uniform_tree(args.raw, CHUNKS, args.raw // 8, device=args.device)
    tokens = tree.others.tokens
    q, k = bench_recall.random_leaves(args, (len(tree.tokens), args.heads, args.dim), (1, tokens, args.kv_heads, args.dim))
    routed = Routed(tree, torch.zeros_like(tree.span) + tree.others.segment_start[0, tree.levels])
    found = {}
    for backend, dtype in (("triton", args.dtype), ("cpu", args.dtype), ("cpu", torch.float64)):
        own = k.detach().to(dtype).requires_grad_()
        loss = routing_loss(q.detach().to(dtype), own, routed, backend=backend)
        found[backend, dtype] = loss.detach(), torch.autograd.grad(loss, own)[0]
    want = found["cpu", torch.float64]
    off = lambda got: [float((a.double() - b).abs().amax() / b.abs().amax()) for a, b in zip(got, want)]
    ours, plain = off(found["triton", args.dtype]), off(found["cpu", args.dtype])
    wrong = [f"{a:.1e} against {b:.1e}" for a, b in zip(ours, plain) if not a <= 2 * b + torch.finfo(args.dtype).eps]
    return f"off by {', '.join(wrong)}" if wrong else None, list(found["triton", args.dtype])


def kinds(args: SimpleNamespace) -> tuple[str | None, list[Tensor]]:
    """Dense and window layers of two documents, with gists and without, forward and backward, against ranges of keys in fp64."""
    lengths, wrong, results = [args.raw // 4, args.raw - args.raw // 4], [], []
    made = interleave(np.zeros(args.raw, np.int64), lengths, np.ones(1, bool), GistConfig(CHUNKS), range(1, 1 + len(CHUNKS)))
    raw = made.level < 0
    for level, doc, gist in ((made.level, made.doc, GistConfig(CHUNKS)), (made.level[raw], made.doc[raw], None)):
        whole = build_layout(torch.from_numpy(level)[None], torch.from_numpy(doc)[None], gist)
        layout = whole.to(args.device)
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        *leaves, d_out = bench_recall.random_leaves(args, *((1, len(level), h, args.dim) for h in heads))
        for kind in ("dense", "window:100"):
            intervals = whole.in_layer(kind).intervals
            by_ranges = lambda *x: compressed_attention(*x, intervals, backend="cpu")  # noqa: B023
            got = _with_gradients(lambda *x: raw_attention(*x, layout, kind), leaves, d_out)  # noqa: B023
            plain, want = (_with_gradients(by_ranges, [x.cpu().to(d) for x in leaves], d_out.cpu().to(d))
                           for d in (args.dtype, torch.float64))  # fmt: skip
            off = lambda x: [float((a.double().cpu() - b).abs().amax() / b.abs().amax()) for a, b in zip(x, want)]  # noqa: B023
            bound = 2 * torch.finfo(args.dtype).eps
            wrong += [f"{kind} {a:.1e} against {b:.1e}" for a, b in zip(off(got), off(plain)) if not a <= 2 * b + bound]
            # In 16 bits gradients come from PyTorch's flash attention, which adds them in any order.
            results += got if args.dtype == torch.float32 else got[:1]
    return f"off by {', '.join(wrong)}" if wrong else None, results


def _with_gradients(attend: Callable, leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.detach())]


OPERATIONS: dict[str, Callable] = {"compressed": compressed, "recall": recall, "route": route, "decode": decode, "kinds": kinds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    bad = 0
    for dtype in args.dtypes:
        for name, operation in OPERATIONS.items():
            begin = time.perf_counter()
            try:
                own = SimpleNamespace(**vars(args) | dict(dtype=getattr(torch, dtype)))
                wrong, first = operation(own)
                if not wrong and not args.once:
                    _, again = operation(own)
                    equal = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
                    wrong = None if equal else "two runs differ"
            except Exception as error:  # one operation that fails must not hide the others
                traceback.print_exc()
                wrong = f"{type(error).__name__}: {error}"
            bad += wrong is not None
            print(f"{name:<12} {dtype:<10} {time.perf_counter() - begin:6.1f} s  {wrong or 'ok'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
