"""The GPUs that a plan knows, and the cluster it is made for."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from unfold.pretrain.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class GpuKind:
    """One GPU, by its maker's data sheet.

    Attributes:
        memory: bytes that PyTorch reports as total.
        peak: dense bf16 FLOP/s of the matrix units, without sparsity; 0 where unknown.
        bandwidth: bytes/s of its memory.
        node_link: bytes/s that a GPU sends to another of its node (one direction).
        host_link: bytes/s between it and the host's memory (one direction).
    """

    name: str
    memory: float
    peak: float = 0.0
    bandwidth: float = 0.0
    node_link: float = 0.0
    host_link: float = 0.0


# Peaks, bandwidths and links are NVIDIA's (https://www.nvidia.com/en-us/data-center/ + a100, l40s, h100, h200, dgx-b200: the
# sheets print the peak with sparsity, twice the dense one, and NVLink's both directions together; PCIe 4.0 and 5.0 x16 are 32 and
# 64 GB/s one way); memory is torch's total_memory.
GPUS = (
    GpuKind("A100-40GB", 39.4 * GIB, 312e12, 1.555e12, 300e9, 32e9),
    GpuKind("A100-80GB", 79.1 * GIB, 312e12, 2.039e12, 300e9, 32e9),
    GpuKind("L40S", 44.4 * GIB, 362e12, 0.864e12, 32e9, 32e9),  # no NVLink: PCIe 4.0 x16
    GpuKind("H100-80GB", 79.1 * GIB, 989e12, 3.35e12, 450e9, 64e9),
    GpuKind("H200-141GB", 139.8 * GIB, 989e12, 4.8e12, 450e9, 64e9),
    GpuKind("B200-180GB", 178.3 * GIB, 2250e12, 7.7e12, 900e9, 64e9),
)
NETWORK = 50e9  # bytes/s: one port of 400 Gb/s for every GPU, as in a DGX H100


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for.

    Attributes:
        gpus: all of them; one rank runs on each.
        gpus_per_node: those that share a node.
        host_memory: bytes of one node's; 0 where unknown.
        network: bytes/s that each GPU can send to other nodes (one direction).
    """

    gpu: GpuKind
    gpus: int
    gpus_per_node: int
    host_memory: float = 0.0
    network: float = NETWORK

    def __post_init__(self):
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise UserError(f"--gpus {self.gpus}, --gpus-per-node {self.gpus_per_node}: both must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus {self.gpus}: is not a whole number of nodes of {self.gpus_per_node}; "
                f"{-(-self.gpus // self.gpus_per_node) * self.gpus_per_node} would do"
            )
        if self.host_memory < 0:
            raise UserError(f"--host-memory {self.host_memory / GIB:g}: is below 0")
        if self.network <= 0:
            raise UserError(
                f"--network {self.network / 1e9:g}: is not above 0; {NETWORK / 1e9:g} is one port of 400 Gb/s per GPU"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)


def find_gpu(name: str | None, memory_gb: float | None) -> GpuKind:
    """The GPU of a name (``--gpu``), with another memory where one is given (``--gpu-memory``, in GiB).

    Raises:
        UserError: the name is not known, or neither is given.
    """
    if memory_gb is not None and memory_gb <= 0:
        raise UserError(f"--gpu-memory {memory_gb}: is not above 0")
    if name is None:
        if memory_gb is None:
            raise UserError(f"--gpu: name one of {', '.join(g.name for g in GPUS)}, or give --gpu-memory GB")
        return GpuKind(f"GPU of {memory_gb:g} GiB", memory_gb * GIB)
    wanted = name.lower()
    matches = [g for g in GPUS if g.name.lower() == wanted] or [g for g in GPUS if g.name.lower().startswith(wanted + "-")]
    if len(matches) != 1:
        near = [g.name for g in matches] or difflib.get_close_matches(name.upper(), [g.name for g in GPUS], 1, 0.5)
        known = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(g.name for g in GPUS)}, or --gpu-memory GB"
        raise UserError(f"--gpu {name}: not known; {known}")
    gpu = matches[0]
    return gpu if memory_gb is None else dataclasses.replace(gpu, memory=memory_gb * GIB)
