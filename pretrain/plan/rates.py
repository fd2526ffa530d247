"""How fast a GPU does each kind of work, as far as it was measured; docs/planning.md has the sources.

One H200 was measured (docs/performance.md). Other GPUs are taken to reach the same part of what their data sheets promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from unfold.pretrain.plan.hardware import GpuKind

MEASURED_PEAK = 989e12  # of that H200, bf16
PRODUCTS = 700e12 / MEASURED_PEAK  # of the peak: 8192 x 8192 x 8192 in bf16
MEMORY = 0.8  # of the bandwidth: 3.8 to 3.9 of 4.8 TB/s in sorting keys and values by level at 32,768 tokens
LINK = 0.8  # of a link: NCCL's bus bandwidth in a node of 8 H100 is 360 of 450 GB/s; taken for networks and hosts too
FP32_PRODUCTS = 989 / 67  # times slower than bf16, by the data sheet of H100 and H200; TF32 is not used
MEASURED_WIDTH = 32 * 128  # heads x head dimension of the attention that was measured


@dataclass(frozen=True)
class AttentionRate:
    """Time of one pass of an attention kernel: so much for each token, and so much for each visible pair.

    Attributes:
        token: seconds per token of MEASURED_WIDTH.
        flops: FLOP/s in useful FLOPs of visible pairs.
    """

    token: float
    flops: float

    def seconds(self, tokens: float, pairs: float, width: int, per_pair: int) -> float:
        """per_pair: useful FLOPs of a pair for each element of a head: 4 in a forward pass, 8 in a backward pass."""
        return tokens * self.token * width / MEASURED_WIDTH + per_pair * width * pairs / self.flops


# Least squares of relative errors over 8,192, 32,768 and 131,072 raw tokens of docs/benchmarks/gpu/h200_kernel_times.json at
# chunk sizes (8, 4), within 7 % of every time there. Dense: PyTorch's flash kernel at the slowest of them; tokens cost nothing.
GIST_FORWARD = AttentionRate(9.7e-9, 457e12)
GIST_BACKWARD = AttentionRate(50.2e-9, 331e12)
DENSE_FORWARD = AttentionRate(0.0, 320e12)
DENSE_BACKWARD = AttentionRate(0.0, 234e12)


@dataclass(frozen=True)
class RecallRate:
    """Time that a layer takes longer, both passes, where some of its tokens recall.

    Attributes:
        layer: seconds.
        token: seconds per token of MEASURED_WIDTH.
        query: seconds per recalling query of MEASURED_WIDTH.
        row: seconds per gist that is scored, and per gist or raw token that is attended to, by a query of MEASURED_WIDTH.
        forward: part of it that the forward pass takes, by the kernels' names where all of 32,768 tokens recall.
    """

    layer: float
    token: float
    query: float
    row: float
    forward: float

    def seconds(self, tokens: float, queries: float, rows: float, width: int) -> float:
        """rows: of a query, the mean."""
        return self.layer + (tokens * self.token + queries * (self.query + rows * self.row)) * width / MEASURED_WIDTH


# Four numbers from the four times of h200_kernel_times.json in which tokens recall, a tenth or all of 8,192 and 32,768, less the
# times in which none does. What they say of 131,072 tokens is held against a time that they were not made from.
RECALL = RecallRate(0.650e-3, 5.01e-8, 1.242e-7, 1.149e-9, 0.55)


@dataclass(frozen=True)
class Rates:
    """Of one GPU: FLOP/s of matrix products, bytes/s of memory, and how many times longer attention takes than where measured."""

    products: float
    memory: float
    attention: float

    @classmethod
    def of(cls, gpu: GpuKind, precision: str) -> Rates:
        """gpu: one whose peak is known."""
        slower = FP32_PRODUCTS if precision == "fp32" else 1
        return cls(gpu.peak * PRODUCTS / slower, gpu.bandwidth * MEMORY, slower * MEASURED_PEAK / gpu.peak)
