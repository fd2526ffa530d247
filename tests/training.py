"""Training runs in ranks that a server forks, which has imported everything: a run takes a second or two, not ten."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

from tests.conftest import ROOT
from unfold.pretrain.monitor.metrics import read_metrics

NEEDED = ["deepspeed", "unfold.pretrain.train.trainer", "unfold.pretrain.config", "transformers"]


def train_ranks(config: Path, run_dir: Path, ranks: int, *overrides: str) -> list[dict]:
    """Train to the end, as :func:`tests.integration.runs.train`; returns the metrics. A rank's error fails the test."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(NEEDED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".log")
    started = [server.Process(target=_rank, args=(r, ranks, port, config, run_dir, overrides, log)) for r in range(ranks)]
    for process in started:
        process.start()
    while any(p.is_alive() for p in started) and not any(p.exitcode for p in started):
        started[0].join(0.05)
    for process in started:  # one that failed leaves the others waiting for it
        process.join(2 if any(p.exitcode for p in started) else None)
        process.terminate()
        process.join()
    assert not any(p.exitcode for p in started), log.read_text()[-4000:]
    return read_metrics(run_dir / "metrics.jsonl")


def _rank(rank: int, ranks: int, port: int, config: Path, run_dir: Path, overrides: tuple[str, ...], log: Path) -> None:
    os.chdir(ROOT)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    with open(log, "a") as out, contextlib.suppress(SystemExit):
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        code = 1
        try:
            import torch

            from unfold.pretrain.config import load_config
            from unfold.pretrain.train.trainer import train

            torch.set_num_threads(1)
            train(load_config(config, list(overrides)), run_dir)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
