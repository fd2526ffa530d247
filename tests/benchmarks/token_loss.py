"""The loss of hidden states without logits beside one that makes them all: time and peak memory of forward + backward.

    python -m tests.benchmarks.token_loss [--vocab 49152 131072] [--rows 8192] [--hidden 576] [--dtype fp32]

Each figure comes from a process of its own. "with logits" is what was trained with before: the product with the head, then
megatron-core's cross-entropy, which keeps the softmax in fp32. Memory is the peak beyond inputs, gradients included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Pieces

from tests.benchmarks.compressed_cpu import resident_mb
from unfold.model import loss as loss_module
from unfold.model.layers import BuildContext
from unfold.model.loss import Targets, token_loss_sum
from unfold.model.visibility import AddedLosses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _WithLogits(torch.autograd.Function):
    """The cross-entropy of one process as it was, of megatron-core's pieces."""

    @staticmethod
    def forward(ctx, logits, targets):
        logits, most = Pieces.calculate_logits_max(logits)
        elsewhere, own, predicted, total, exponentials = Pieces.calculate_predicted_logits(
            logits, targets, most, 0, logits.shape[-1]
        )
        softmax, losses = Pieces.calculate_cross_entropy_loss(exponentials, predicted, total)
        ctx.save_for_backward(softmax, elsewhere, own)
        return losses

    @staticmethod
    def backward(ctx, grad):
        softmax, elsewhere, own = ctx.saved_tensors
        rows, number, update, out = Pieces.prepare_gradient_calculation_operands(softmax, elsewhere)
        return Pieces.calculate_gradients(rows, number, own, update, out, grad), None


def measure(way: str, vocab: int, rows: int, hidden: int, dtype: torch.dtype) -> tuple[float, float]:
    """CPU seconds, which other users of the machine disturb least, and peak memory in MB."""
    torch.manual_seed(0)
    states = torch.randn(rows, 1, hidden).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, hidden)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (1, rows))
    added, teacher = None, None
    if way == "distilled":
        added, teacher = AddedLosses(logits=1.0, samples=(0,)), states.detach().roll(1, 0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the current size
    before, start = resident_mb("VmRSS"), time.process_time()
    if way == "with logits":
        loss = _WithLogits.apply((states[:, 0] @ weight.t()).float(), labels[0]).sum()
    else:
        loss = token_loss_sum(
            states, Targets.of(labels, added.samples if added else ()), weight, BuildContext.alone(), added, teacher
        )
    (loss / rows).backward()
    return time.process_time() - start, resident_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 131072])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--chunk", type=int, default=loss_module.CHUNK)
    parser.add_argument("--way", help="only measure this one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way:
        loss_module.CHUNK = args.chunk
        print(*measure(args.way, args.vocab[0], args.rows, args.hidden, DTYPES[args.dtype]))
        return
    print(f"{args.rows} rows, hidden size {args.hidden}, {args.dtype}, chunks of {args.chunk}, one thread")
    print("| vocabulary | loss | CPU seconds | peak, MB | time, ratio | memory, ratio |\n|---|---|---|---|---|---|")
    same = [f"--{name}={getattr(args, name)}" for name in ("rows", "hidden", "dtype", "chunk")]
    for vocab in args.vocab:
        base = None
        for way in ("with logits", "without", "distilled"):
            command = [sys.executable, "-m", __spec__.name, "--vocab", str(vocab), "--way", way, *same]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            base = base or (seconds, peak)
            ratios = f"{seconds / base[0]:.2f} | {peak / base[1]:.2f}"
            print(f"| {vocab} | {way} | {seconds:.1f} | {peak:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
