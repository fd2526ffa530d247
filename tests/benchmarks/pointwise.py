"""Kernels and bytes beside the matrix products and attention of one layer, counted without a GPU.

    python -m tests.benchmarks.pointwise --config launch/configs/llama-3.1-8b.yaml [--set data.raw_tokens=32768 ..]

A layer's forward and backward pass is run on tensors that have shapes but no memory; every operation that moves memory is one
kernel on a GPU, which reads its inputs and writes its outputs once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from unfold.model.layers import BuildContext
from unfold.model.transformer import Layer
from unfold.pretrain.config import add_overrides, load_config
from unfold.pretrain.plan.pointwise import count_layer
from unfold.pretrain.plan.work import measure_sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    add_overrides(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    length = measure_sample(config).length // config.parallel.context
    with torch.device("meta"):
        layer = Layer(config.model, BuildContext.alone(), 0).to(torch.bfloat16)
        moved = count_layer(layer, config.model, 1, length)
    kernels, each = sum(moved.kernels.values()), moved.total / length
    print(f"{length:,} tokens: {kernels} kernels, {moved.total / 1e9:.1f} GB, {each:,.0f} bytes a token")
    print("| operation | kernels | GB |\n|---|---|---|")
    for name, size in moved.bytes.most_common():
        print(f"| {name} | {moved.kernels[name]} | {size / 1e9:.1f} |")


if __name__ == "__main__":
    main()
