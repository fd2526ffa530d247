"""Kernels and bytes beside the matrix products and attention of one layer, counted without a GPU.

    python -m tests.benchmarks.pointwise --config launch/configs/llama-3.1-8b.yaml [--set train.fuse_pointwise=true ..]

A layer's forward and backward pass is run on tensors that have shapes but no memory; every operation that moves memory is one
kernel on a GPU, which reads its inputs and writes its outputs once. With train.fuse_pointwise PyTorch compiles the layer's small
functions for this machine's CPU; the kernels that it makes, with what each reads and writes, and how long that took stand beside
what was counted.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unfold.model.config import ModelConfig
from unfold.model.layers import BuildContext
from unfold.model.pointwise import Pointwise
from unfold.model.transformer import Layer
from unfold.pretrain.config import add_overrides, load_config
from unfold.pretrain.plan.fused import COUNTED
from unfold.pretrain.plan.moved import Moved
from unfold.pretrain.plan.pointwise import count_layer
from unfold.pretrain.plan.work import measure_sample

FUNCTIONS = ("rms_norm", "add_and_norm", "rotate", "swiglu")


def inputs(name: str, model: ModelConfig, tokens: int, dtype: torch.dtype) -> list:
    """Of the function with this name, as a layer calls it; for a norm, of the residual stream."""
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    if name == "rotate":
        angle = torch.rand(1, tokens, 1, model.head_dim // 2)
        return [draw(1, tokens, model.heads, model.head_dim), angle.cos(), angle.sin()]
    if name == "swiglu":
        return [draw(tokens, 1, 2 * model.ffn_size)]
    streams = 2 if name == "add_and_norm" else 1
    return [*(draw(tokens, 1, model.hidden_size) for _ in range(streams)), draw(model.hidden_size), model.norm_eps]


def results(function, arguments: list) -> list[Tensor]:
    """Outputs, then gradients."""
    out = function(*arguments)
    outs = out if isinstance(out, tuple) else (out,)
    given = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    return [x.detach() for x in (*outs, *torch.autograd.grad(outs, given, slopes))]


def as_counted(name: str, arguments: list) -> tuple[int, int]:
    """Kernels of a compiled function, forward and backward, and the bytes they move, as plans count them."""
    with Moved() as moved:
        results(getattr(COUNTED, name), arguments)
    ours = [kernel for kernel in moved.kernels if kernel.startswith("fused::")]
    return sum(moved.kernels[k] for k in ours), sum(moved.bytes[k] for k in ours)


def as_compiled(name: str, arguments: list) -> tuple[int, int]:
    """The same, of the kernels that inductor makes for this machine's CPU."""
    from torch._inductor import compile_fx, metrics

    torch._dynamo.reset()
    metrics.reset()
    log = compile_fx.inductor_metrics_log  # it counts where somebody reads it
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            results(getattr(Pointwise.compiled(), name), arguments)
    finally:
        log.setLevel(level)
        log.propagate = propagate
    kernels = [node.get_read_write_buffers_sizes() for node, _ in metrics.nodes_num_elem]
    return sum(size > 0 for size in kernels), metrics.num_bytes_accessed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    add_overrides(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    model, fused = config.model, config.train.fuse_pointwise
    length = measure_sample(config).length // config.parallel.context
    build = replace(BuildContext.alone(), pointwise=COUNTED if fused else Pointwise())
    with torch.device("meta"):
        layer = Layer(model, build, 0).to(torch.bfloat16)
        moved = count_layer(layer, model, 1, length)
    kernels, each = sum(moved.kernels.values()), moved.total / length
    print(f"{length:,} tokens: {kernels} kernels, {moved.total / 1e9:.1f} GB, {each:,.0f} bytes a token")
    print("| operation | kernels | GB |\n|---|---|---|")
    for name, size in moved.bytes.most_common():
        print(f"| {name} | {moved.kernels[name]} | {size / 1e9:.1f} |")
    if fused:
        tokens = 64
        print(f"\n| compiled, {tokens} tokens | kernels | of the compiler | bytes | of the compiler | seconds |")
        print("|---" * 6 + "|")
        for name in FUNCTIONS:
            arguments = inputs(name, model, tokens, torch.bfloat16)
            kernels, size = as_counted(name, arguments)
            began = time.monotonic()
            made, moving = as_compiled(name, arguments)
            print(f"| {name} | {kernels} | {made} | {size:,} | {moving:,} | {time.monotonic() - began:.0f} |")


if __name__ == "__main__":
    main()
