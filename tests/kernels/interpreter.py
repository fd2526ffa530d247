"""Where Triton's interpreter computes otherwise than a GPU, made equal, so that error bounds mean the same on both.

- Products: a GPU adds up in fp32 in the order of the inner dimension, whatever the tile; numpy's BLAS changes the order with the
  tile's shape, so that two kernels would disagree on the same score. And it multiplies the raw bits of bf16.
- fp32 -> bf16: a GPU rounds to nearest; the interpreter cuts the lower bits off.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from unfold.kernels.common.launch import INTERPRETED

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"


def needs_runs(test):
    """A test of kernels: on a GPU where there is one, else in Triton's interpreter, which is chosen when kernels are made."""
    reason = "no GPU here; `make test` runs it with TRITON_INTERPRET=1, in Triton's interpreter"
    return pytest.mark.interpreted(pytest.mark.skipif(not (GPU or INTERPRETED), reason=reason)(test))


def in_the_interpreter(test):
    """A test that looks into the interpreter."""
    reason = "it looks into Triton's interpreter; `make test` runs it with TRITON_INTERPRET=1"
    return pytest.mark.interpreted(pytest.mark.skipif(not INTERPRETED, reason=reason)(test))


def compute_like_a_gpu(monkeypatch) -> None:
    """Patch the interpreter until the end of the test."""
    convert = interpreter._convert_float

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (_fp32(x) for x in (a, b))
        products = left[:, :, None] * right  # numpy adds up an outer axis one after another
        return interpreter.TensorHandle(d.data + np.add.reduce(products, axis=1), d.dtype.scalar)

    def convert_float(x, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy().reshape(x.shape)
        return convert(x, source, target, rounding_mode)

    def _fp32(x):
        bits_of_bf16 = x.dtype.scalar == tl.bfloat16
        return convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32) if bits_of_bf16 else x.data.astype(np.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
