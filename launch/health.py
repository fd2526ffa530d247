"""``launch health``: one process on each node of a job, before the ranks start; says whether the node is fit.

Each node looks at itself, then sums a tensor with each of its two neighbours in turn. A node that fails with one neighbour
only is not to blame; one that fails with all is. The verdict goes into a file of the node's name, for the batch script.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path

from unfold.launch.node import disk_faults, gpu_faults, memory_faults
from unfold.pretrain.errors import UserError

PAIR_SECONDS = 45
STORE_SECONDS = 60
ELEMENTS = 1 << 22  # of the summed tensor: 16 MB


def rounds_of(node: int, nodes: int) -> list[tuple[int, int]]:
    """The pairs of a node, (lower, higher), one for each round: a ring taken in two steps, and its ends where nodes are odd.

    The same round never holds a node twice, so no pair waits for another.
    """
    partners = []
    for offset in (0, 1):
        place = (node - offset) % nodes
        partner = (place ^ 1) if (place ^ 1) < nodes else None
        if partner is not None and nodes > 1:
            other = (partner + offset) % nodes
            partners.append((min(node, other), max(node, other)))
    return list(dict.fromkeys(partners))


def sum_with(pair: tuple[int, int], node: int, store, on_gpu: bool) -> str:
    """One all-reduce between two nodes; '' when its result is right, else what is wrong."""
    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=PAIR_SECONDS)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    try:
        prefixed = dist.PrefixStore(f"pair-{pair[0]}-{pair[1]}", store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=prefixed, rank=pair.index(node), world_size=2, timeout=limit)
        tensor = torch.full((ELEMENTS,), float(node + 1), device=device)
        dist.all_reduce(tensor)
        wrong = tensor.ne(float(sum(pair) + 2)).any().item()
        return "sums wrongly" if wrong else ""
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0][:200]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def neighbour_verdict(node: int, names: list[str], head: str, port: int, on_gpu: bool, fit: bool) -> str:
    """'' when the node talks to a neighbour, or none is there to talk to; else ``bad REASON``, or ``cut REASON`` where
    the head does not answer.

    fit: whether this node found no fault in itself; neighbours are not held up by one that did.
    """
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=STORE_SECONDS)
    try:
        store = dist.TCPStore(head, port, is_master=node == 0, timeout=limit, wait_for_workers=False)
        store.set(f"fit-{node}", str(int(fit)))
        failures, tried = [], 0
        for pair in rounds_of(node, len(names)) if fit else []:
            other = sum(pair) - node
            if not _is_fit(store, other):
                continue  # it tells its own fault, by its verdict or by having none
            tried += 1
            if reason := sum_with(pair, node, store, on_gpu):
                failures.append(f"all-reduce with {names[other]} failed: {reason}")
        store.add("done", 1)
        deadline = time.monotonic() + STORE_SECONDS
        while node == 0 and store.add("done", 0) < len(names) and time.monotonic() < deadline:
            time.sleep(0.05)  # the store lives in this process
    except (RuntimeError, ValueError) as error:
        return f"cut cannot reach {head}:{port} ({str(error).splitlines()[0][:200]})"
    return f"bad {'; '.join(failures)}" if failures and len(failures) == tried else ""


def _is_fit(store, node: int) -> bool:
    try:
        return store.get(f"fit-{node}") == b"1"
    except RuntimeError:  # no sign of it within the store's time
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="where each node writes its verdict")
    parser.add_argument("--nodes", required=True, metavar="A,B,..", help="the job's nodes")
    parser.add_argument("--port", type=int, required=True, metavar="N", help="a free port of the first one")
    parser.add_argument("--gpus", type=int, required=True, metavar="G", help="GPUs that the node must have; 0: none")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="the run directory, which must be writable")


def run_health(args: argparse.Namespace) -> int:
    """Check this node; 0 when it is fit. Called by the batch script under srun, one task per node."""
    names = args.nodes.split(",")
    if "SLURM_NODEID" not in os.environ:
        raise UserError("launch health: runs inside a SLURM job, under srun; for this machine use `launch doctor`")
    node, began = int(os.environ["SLURM_NODEID"]), time.monotonic()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a neighbour that does not answer is an error, not an abort
    faults = disk_faults(args.run_dir) + memory_faults() + (gpu_faults(args.gpus) if args.gpus else [])
    verdict = f"bad {'; '.join(faults)}" if faults else ""
    if args.gpus or len(names) > 1:
        import torch

        if args.gpus and torch.version.cuda is None:
            print("unfold health: PyTorch is a CPU build: the ranks train on CPUs", flush=True)
        on_gpu = args.gpus > 0 and torch.cuda.is_available()
        if len(names) > 1:
            told = neighbour_verdict(node, names, names[0], args.port, on_gpu, fit=not faults)
            verdict = verdict or told
    text = verdict or "ok"
    print(f"unfold health: {names[node]}: {text} ({time.monotonic() - began:.1f} s)", flush=True)
    path = args.results / names[node]
    path.with_name(f".{path.name}").write_text(text + "\n")
    path.with_name(f".{path.name}").rename(path)
    return int(bool(verdict))
