"""``launch doctor``: what must be mended before training here, or on the nodes of this allocation."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from unfold.launch.checks import gpu_findings, limits, machine_findings, network, versions
from unfold.launch.findings import Finding, lines, merged, note, ok, problem
from unfold.launch.fit import check_ranks, heads_between_nodes, missing_data
from unfold.launch.machine import query
from unfold.launch.training import installed_torch_has_cuda, visible_gpus
from unfold.pretrain.config import load_config
from unfold.pretrain.errors import UserError

MOST_SKEW = 1.0  # seconds between the clocks of two nodes
SEEN_SECONDS = 30  # for a file of one node to be seen by another
SRUN_SECONDS = 180


def configuration_findings(args: argparse.Namespace, nodes: int) -> list[Finding]:
    """What the configuration needs: data, tokenizer, a layout that the ranks fit."""
    try:
        config = load_config(args.config, args.overrides)
    except UserError as error:
        return [problem(str(error), "correct the configuration")]
    out = [problem(line, "make it with `python -m data_prep`, or correct the path") for line in missing_data(config)]
    here = visible_gpus() if installed_torch_has_cuda() else 0
    ranks = args.ranks or nodes * (here or 1)
    given = f"--ranks {ranks}" if args.ranks else f"{nodes} node(s) x {here or 1}"
    try:
        check_ranks(config, ranks, given)
    except UserError as error:
        out.append(problem(str(error), "change parallel.*, train.global_batch or the number of nodes"))
    if slow := heads_between_nodes(config, nodes, -(-ranks // nodes)):
        out.append(note(slow, "see docs/parallel.md, heads within a node"))
    if config.precision == "bf16" and not here:
        out.append(note("precision: bf16 without a GPU is slow", "set precision: fp32 for runs on CPUs"))
    return out or [ok(f"{args.config}: data and tokenizer are there, {ranks} rank(s) fit the layout")]


def serve_time(listener: socket.socket) -> None:
    """Answer every connection with this host's time, until the socket is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.sendall(repr(time.time()).encode())


def clock_difference(host: str, port: int) -> float:
    """Seconds by which this host's clock is ahead of another's; the shortest of five round trips counts."""
    best = None
    for _ in range(5):
        before = time.time()
        with socket.create_connection((host, port), timeout=10) as connection:
            theirs = float(connection.recv(64))
        after = time.time()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) / 2 - theirs)
    return best[1]


def node_findings(scratch: Path, head: str) -> list[Finding]:
    """One node's part, under srun: itself, its way to the head, and the shared file system as it sees it."""
    out = [*versions(), *gpu_findings(), *network(), *limits()]
    host, _, port = head.rpartition(":")
    try:
        ahead = clock_difference(host, int(port))
        if abs(ahead) > MOST_SKEW:
            out.append(problem(f"clock is {ahead:+.2f} s off that of {host}", "synchronise the clocks (chrony)"))
    except (OSError, ValueError) as error:
        remedy = "look at firewall, host names and interfaces between the nodes"
        out.append(problem(f"{head} cannot be reached ({error})", remedy))
    if not (scratch / "token").is_file():
        what = f"{scratch.parent} is not shared: files of {host} are not seen"
        return [*out, problem(what, "put --run-dir on a shared file system")]
    with open(scratch / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            what = f"{scratch.parent}: a lock that {host} holds is not seen"
            out.append(problem(what, "mount with locks (Lustre: -o flock; NFS: version 4)"))
        except BlockingIOError:
            out.append(ok(f"{scratch.parent}: files and locks of {host} are seen"))
        except OSError as error:
            out.append(note(f"{scratch.parent}: no locks ({error.strerror})", "take care that no two runs share a directory"))
    return out


def write_report(scratch: Path, head: str) -> int:
    """Under srun: write this node's findings where the head reads them."""
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    target = scratch if scratch.is_dir() else Path(tempfile.mkdtemp())
    (target / f"{name}.tmp").write_text(json.dumps([asdict(f) for f in node_findings(scratch, head)]))
    os.replace(target / f"{name}.tmp", target / f"{name}.json")
    return 0


def allocation_findings(directory: Path, nodes: list[str]) -> list[Finding]:
    """All nodes of the allocation this runs in, from its first node or from the login node (salloc)."""
    place = directory
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryDirectory(dir=place.resolve(), prefix=".launch-") as name, socket.create_server(("", 0)) as listener:
        scratch = Path(name)
        (scratch / "token").touch()
        threading.Thread(target=serve_time, args=(listener,), daemon=True).start()
        command = ["srun", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", sys.executable, "-m", "unfold.launch", "doctor",
                   "--node-report", str(scratch), "--head", f"{socket.gethostname()}:{listener.getsockname()[1]}"]  # fmt: skip
        with open(scratch / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass  # the nodes tell that there are no locks
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SRUN_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                return [problem(f"srun does not start on the nodes ({error})", "look at squeue and the nodes' state: sinfo -R")]
        by_node = _reports(scratch, nodes)
        told = "; ".join(line for line in done.stderr.splitlines() if "error" in line.lower())[:300]
    missing = [node for node in nodes if node not in by_node]
    out = merged(by_node)
    if missing:
        remedy = "is the file system shared, and this Python on every node?"
        out.append(problem(f"{', '.join(missing)}: no report {f'({told})' if told else ''}".rstrip(), remedy))
    return out


def _reports(scratch: Path, nodes: list[str]) -> dict[str, list[Finding]]:
    """Each node's report, as soon as this host sees it."""
    found: dict[str, list[Finding]] = {}
    deadline = time.monotonic() + SEEN_SECONDS
    while len(found) < len(nodes):
        for node in nodes:
            path = scratch / f"{node}.json"
            if node not in found and path.is_file():
                found[node] = [Finding(**f) for f in json.loads(path.read_text())]
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def run_doctor(args: argparse.Namespace) -> int:
    """``launch doctor``; 1 when something must be mended."""
    if args.node_report:
        return write_report(args.node_report, args.head)
    nodes = query("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]) if "SLURM_JOB_NODELIST" in os.environ else []
    print(f"this machine ({socket.gethostname()}):")
    findings = machine_findings(args.run_dir)
    print(*lines(findings), sep="\n", flush=True)
    if nodes:
        print(f"the {len(nodes)} node(s) of job {os.environ.get('SLURM_JOB_ID')}:")
        theirs = allocation_findings(args.run_dir, nodes)
        print(*lines(theirs), sep="\n", flush=True)
        findings += theirs
    if args.config:
        print("the configuration:")
        needs = configuration_findings(args, max(len(nodes), 1))
        print(*lines(needs), sep="\n")
        findings += needs
    problems = sum(finding.level == "problem" for finding in findings)
    print(f"{problems} problem(s) to mend" if problems else "nothing to mend")
    return int(problems > 0)
