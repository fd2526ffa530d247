"""PyTorch's flight recorder: which collectives each rank began and ended, to look at after a hang."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from unfold.pretrain.safety.alive import STACKS

COLLECTIVES = "collectives-rank-"  # begins the names of the files, which the rank's number ends


def record_collectives(entries: int, run_dir: Path) -> None:
    """Have PyTorch keep the last ``entries`` collectives of each rank, and NCCL's own watchdog write them when one times out.

    To be called before process groups are made: they read the environment. What is set there already stays.
    """
    if not entries:
        return
    (run_dir / STACKS).mkdir(parents=True, exist_ok=True)
    prefix = str((run_dir / STACKS / COLLECTIVES).resolve())  # PyTorch appends the rank
    settings = {
        "TORCH_FR_BUFFER_SIZE": str(entries),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def write_collectives(rank: int, run_dir: Path) -> Path | None:
    """Write what this rank's recorder holds: for ``torchfrtrace``, which reads what NCCL did, and as JSON for people.

    None where nothing is recorded or the disk refuses.
    """
    try:
        recorder = torch._C._distributed_c10d
        told = recorder._dump_fr_trace_json()
        if not json.loads(told).get("entries"):
            return None
        (run_dir / STACKS / f"calls-rank-{rank}.json").write_bytes(told)
        path = run_dir / STACKS / f"{COLLECTIVES}{rank}"
        path.write_bytes(recorder._dump_fr_trace())
        return path
    except (AttributeError, RuntimeError, OSError, ValueError):  # another version of PyTorch; a full disk
        return None
