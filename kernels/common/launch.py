"""What the launchers of all ops share: which GPUs and dtypes are served, tables that kernels can read, the current device."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from unfold.kernels.common import tl as shared
from unfold.kernels.common.tiles import Tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # those with tiles
# TRITON_INTERPRET=1 was set when the kernels were decorated: they run on CPU tensors, one program after another.
INTERPRETED = not isinstance(shared.dot, triton.JITFunction)
LOG2_E = math.log2(math.e)


def architecture(x: Tensor) -> str:
    """The row of the tile table for the device of x."""
    if INTERPRETED:
        return "interpreter"
    if x.device.type != "cuda" or torch.version.hip:
        raise ValueError(f"q: on {x.device}; backend 'triton' needs an NVIDIA GPU, use backend='cpu' or 'reference'")
    major, minor = torch.cuda.get_device_capability(x.device)
    name = f"sm_{major}0"
    if name not in ARCHITECTURES:
        raise ValueError(
            f"q: on a GPU of compute capability {major}.{minor}; backend 'triton' has tiles for {', '.join(ARCHITECTURES)}; "
            "use backend='reference'"
        )
    return name


def launch_options(tile: Tile) -> dict[str, int]:
    return dict(BM=tile.rows, BN=tile.keys, num_warps=tile.warps, num_stages=tile.stages)


def check_flat(**tables: Tensor) -> None:
    """The kernels index tables flat: one that is a view with gaps would be read wrongly, and silently."""
    for name, table in tables.items():
        assert table.is_contiguous(), f"{name}: {tuple(table.shape)} with strides {table.stride()} is not contiguous"


def on_device(x: Tensor):
    """Triton launches on the current device: make it the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
