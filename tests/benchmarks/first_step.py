"""Seconds from sbatch to the first step: ``python -m tests.benchmarks.first_step`` (root; two nodes of a cluster made for it).

Trains ``launch/configs/tiny.yaml`` on the demo's data (`make demo` makes it) over two nodes, on CPUs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.launch.cluster import Cluster, why_not
from unfold.pretrain.monitor.metrics import read_metrics


def measure(cluster: Cluster, run_dir: Path) -> None:
    """Submit, wait for the first line of metrics, print what came when."""
    began = time.monotonic()
    job = cluster.train(ROOT / "launch/configs/tiny.yaml", run_dir, 2, "--time", 20)
    metrics = run_dir / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and read_metrics(metrics), "the first step")
    seconds = time.monotonic() - began
    cluster.ask("scancel", str(job.number))
    print(f"from submission to the first step: {seconds:.1f} s; of these, from the ranks' start: "
          f"{read_metrics(metrics)[0]['startup_s']:.1f} s")  # fmt: skip
    print(*[line for line in job.ranks_log(0).splitlines() if "unfold health" in line], sep="\n")


def main() -> None:
    if reason := why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as directory:
        cluster = Cluster(Path(directory) / "cluster")
        try:
            if trouble := cluster.up():
                sys.exit(trouble)
            measure(cluster, Path(directory) / "run")
        finally:
            cluster.down()


if __name__ == "__main__":
    main()
