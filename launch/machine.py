"""What this machine has: GPUs and network interfaces, as the system's own tools tell."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import psutil

VIRTUAL = ("lo", "docker", "veth", "virbr", "br-", "cni", "flannel", "tun", "tap")


def query(*command: str) -> list[str]:
    """Lines that a command prints; none where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells; memory in MiB."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    driver: str
    uncorrected: str  # ECC errors since the last reset; a word where the GPU does not count them


def gpus() -> list[Gpu]:
    """All GPUs of the machine, visible to this process or not."""
    fields = "index,uuid,name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"
    rows = [line.split(", ") for line in query("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")]
    return [Gpu(int(r[0]), r[1], r[2], int(r[3]), int(r[4]), r[5], r[6]) for r in rows if len(r) == 7]


def gpus_in_use() -> dict[int, str]:
    """Processes on each GPU that is used, as a readable list."""
    index_of = {gpu.uuid: gpu.index for gpu in gpus()}
    users: dict[int, list[str]] = {}
    for line in query("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader"):
        uuid, pid, name = (line.split(", ", 2) + ["", ""])[:3]
        if uuid in index_of:
            users.setdefault(index_of[uuid], []).append(f"pid {pid} ({name})")
    return {index: ", ".join(names) for index, names in users.items()}


def interfaces() -> dict[str, str]:
    """IPv4 addresses of interfaces that are up and lead to other machines, by name."""
    stats, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        ipv4 = [a.address for a in addresses if a.family.name == "AF_INET"]
        if ipv4 and name in stats and stats[name].isup and not name.startswith(VIRTUAL):
            found[name] = ipv4[0]
    return found
