"""What can be told about one node, each fault as a line that says what is wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from unfold.launch.machine import gpus_in_use

LEAST_DISK = 1 << 30  # bytes that a directory which is written to must have free
LEAST_MEMORY = 0.1  # part of the memory that must be available
FREE_GPU = 0.9  # part of a GPU's memory that must be free: a process left over from another job holds more


def disk_faults(directory: Path) -> list[str]:
    """Whether files can be written and read back there, and room is left."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".launch-") as file:
            file.write(b"x" * 65536)
            file.flush()
            os.fsync(file.fileno())
            if len(Path(file.name).read_bytes()) != 65536:
                return [f"{directory}: what was written is not what is read"]
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return [f"{directory}: cannot be written ({error.strerror})"]
    return [f"{directory}: only {free / 1e9:.1f} GB free"] if free < LEAST_DISK else []


def memory_faults() -> list[str]:
    """Whether enough of the machine's memory is available."""
    sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(sizes[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    if available < LEAST_MEMORY * total:
        return [f"only {available / 1e6:.1f} of {total / 1e6:.1f} GB memory available"]
    return []


def gpu_faults(wanted: int) -> list[str]:
    """Whether so many GPUs are visible, empty, and compute."""
    import torch  # seconds; a node without GPUs needs it only to talk to its neighbours

    if not wanted or torch.version.cuda is None:
        return []
    found = torch.cuda.device_count()
    if found < wanted:
        return [f"{found} of {wanted} GPUs visible"]
    faults = []
    for index in range(wanted):
        try:
            free, total = torch.cuda.mem_get_info(index)
            if free < FREE_GPU * total:
                users = gpus_in_use().get(index, "a process that is not visible here")
                faults.append(f"GPU {index}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB in use by {users}")
                continue
            square = torch.full((1024, 1024), 2.0, device=f"cuda:{index}")
            if (square @ square)[0, 0].item() != 4096.0:
                faults.append(f"GPU {index}: computes wrongly")
        except RuntimeError as error:
            faults.append(f"GPU {index}: {str(error).splitlines()[0]}")
    return faults
