"""Commands and training runs in processes that are forked from one that has imported everything.

``python -m pretrain ..`` spends most of its time on importing PyTorch, DeepSpeed, Megatron and transformers; what it does with a
tiny model takes a second. :func:`command` runs the same module as ``__main__`` with the same arguments in a process of its own,
which begins with these libraries in memory. That commands start by themselves is what tests with real processes show: those that
use ``tests.conftest.module`` and ``tests.integration.runs.command``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "deepspeed",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.pipe.engine",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "safetensors.torch",
    "unfold.pretrain.command",
    "unfold.pretrain.train.trainer",
    "unfold.pretrain.hf.export",
    "unfold.pretrain.evaluate.command",
    "unfold.pretrain.generate",
    "unfold.pretrain.checkpoint.command",
)
PORTS = range(15_000, 32_000)  # the system gives these to nobody who asks for any port
GRACE_S = 2  # one rank has failed: how long the others have to end themselves


def command(name: str, *arguments, ranks: int = 1, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess:
    """``python -m name arguments`` from the project's root, under torchrun where there are several ranks; output captured.

    The exit code is that of the first rank that failed, or 0.
    """
    with started(name, *arguments, ranks=ranks, timeout=timeout) as (_, end):
        done = end()
    assert not check or done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@contextlib.contextmanager
def started(
    name: str, *arguments, ranks: int = 1, timeout: float = 300
) -> Iterator[tuple[list[int], Callable[[], subprocess.CompletedProcess]]]:
    """The same, while it runs: process ids of the ranks, and what waits for their end. They are killed where the block ends.

    There can be one at a time.
    """
    words = [name, *map(str, arguments)]
    _, lines, free = _connection()
    assert free.acquire(blocking=False), "another command runs in warm processes; there can be one at a time"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, stream) for stream in ("out", "err")]
        for file in files:
            file.touch()
        request = {"argv": words, "files": [str(f) for f in files], "timeout": timeout, "ranks": _environments(ranks)}
        print(json.dumps(request), file=lines, flush=True)
        pids = _answer(lines)

        @functools.cache
        def end() -> subprocess.CompletedProcess:
            return subprocess.CompletedProcess(words, _answer(lines), *(f.read_text(errors="replace") for f in files))

        try:
            yield pids, end
        finally:
            for pid in [] if end.cache_info().currsize else pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            end()
            free.release()


def _answer(lines: TextIO):
    answer = lines.readline()
    assert answer, "the server of tests/warm.py has ended; what it printed stands above"
    return json.loads(answer)


def _environments(ranks: int) -> list[dict[str, str]]:
    """The environment of every rank, as torchrun sets it."""
    mine = dict(os.environ)
    if ranks == 1:
        return [mine]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    return [{k: str(v) for k, v in (mine | world | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(ranks)]


def _free_port() -> int:
    draw = random.SystemRandom()  # tests seed the others alike, and run side by side
    while True:
        port = draw.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


@functools.cache
def _connection():
    """To a server that lives as long as this process."""
    ours, theirs = socket.socketpair()
    line = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    silent = subprocess.DEVNULL
    server = subprocess.Popen(line, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=silent, stdout=silent, start_new_session=True)
    theirs.close()
    return server, ours.makefile("rw"), threading.Lock()


def _serve(connection: socket.socket) -> dict | None:
    """Answer requests until nobody asks any more; in a forked process, what it is to run."""
    with connection, connection.makefile("rw") as lines:
        while request := lines.readline():
            request = json.loads(request)
            children = []
            for environment in request["ranks"]:
                if not (child := os.fork()):
                    return request | {"environment": environment}
                os.setpgid(child, child)  # with what it will start itself
                children.append(child)
            print(children, file=lines, flush=True)
            print(_end_of(children, time.monotonic() + request["timeout"], connection), file=lines, flush=True)
    return None


def _end_of(children: list[int], deadline: float, connection: socket.socket) -> int:
    """Wait for all; the code of the first that failed, after which the others have little time. Nobody is left behind."""
    failed = 0
    while children:
        gone, status = os.waitpid(-1, os.WNOHANG)
        if gone:
            children.remove(gone)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code, min(deadline, time.monotonic() + GRACE_S)
        elif time.monotonic() > deadline or select.select([connection], [], [], 0.01)[0]:  # or whoever asked has gone
            failed = failed or -signal.SIGKILL
            for child in children:
                os.killpg(child, signal.SIGKILL)
            deadline = float("inf")
    return failed


def _become(request: dict) -> NoReturn:
    """Make this forked process what it would be had it been started, and run the module to the end.

    It ends without taking apart, page by page of shared memory, all that was imported; Python would, which takes long.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    for stream, path in enumerate(request["files"], 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.argv[:] = request["argv"]
    code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log goes where stdout was when it was imported
        for module in IMPORTED:
            importlib.import_module(module)
    from unfold.pretrain.data.packing import pack

    pack(np.ones(1, np.int64), 1, 1)  # Numba imports most of itself, and packages that extend it, for its first function
    gc.collect()
    gc.freeze()  # collections in forked processes leave this memory alone, which they share
    if found := _serve(socket.socket(fileno=int(sys.argv[1]))):
        _become(found)
