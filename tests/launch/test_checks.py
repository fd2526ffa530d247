"""Health check and doctor, with faults made for them."""

import argparse
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT, TinyData
from unfold.launch import checks, doctor, health
from unfold.launch.findings import lines, merged, note, ok, problem


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("nodes", range(1, 10))
def test_every_node_has_neighbours_and_no_round_has_a_node_twice(nodes):
    pairs = [health.rounds_of(node, nodes) for node in range(nodes)]
    for node, mine in enumerate(pairs):
        assert bool(mine) == (nodes > 1)
        for low, high in mine:
            assert low < high and node in (low, high) and (low, high) in pairs[high] and (low, high) in pairs[low]
    assert len({pair for mine in pairs for pair in mine}) == {1: 0, 2: 1}.get(nodes, nodes - nodes % 2)
    if nodes > 3:  # who fails with all neighbours is told from who fails with one
        assert sum(len(mine) == 2 for mine in pairs) >= nodes - 2


def test_an_unfit_neighbour_is_not_waited_for_and_a_missing_head_is_told(monkeypatch):
    monkeypatch.setattr(health, "STORE_SECONDS", 20)
    names, port = ["a", "b", "c"], free_port()
    told = lambda node, fit: health.neighbour_verdict(node, names, "127.0.0.1", port, False, fit)
    with ThreadPoolExecutor() as pool:  # the fit ones have unfit neighbours only
        verdicts = list(pool.map(told, range(3), (True, False, True)))
    assert verdicts == ["", "", ""]
    monkeypatch.setattr(health, "STORE_SECONDS", 1)
    assert told(1, True).startswith(f"cut cannot reach 127.0.0.1:{port} (")


def test_two_nodes_sum_and_verdicts_are_written(tmp_path):
    """As the batch script starts them, but for SLURM: two fit nodes, and one alone whose run directory is missing."""
    results = tmp_path / "results"
    results.mkdir()
    port = str(free_port())

    def start(node: int, names: str, run_dir):
        line = [sys.executable, "-m", "launch", "health", "--results", results, "--nodes", names]
        line += ["--port", port, "--gpus", "0", "--run-dir", run_dir]
        environment = {**os.environ, "SLURM_NODEID": str(node), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    processes = [start(node, "127.0.0.1,second", tmp_path) for node in range(2)] + [start(0, "alone", tmp_path / "gone")]
    codes = [process.wait(120) for process in processes]
    assert codes == [0, 0, 1], [process.stdout.read() for process in processes]
    verdicts = {path.name: path.read_text() for path in results.iterdir()}
    assert verdicts.pop("alone") == f"bad {tmp_path}/gone: cannot be written (No such file or directory)\n"
    assert verdicts == {"127.0.0.1": "ok\n", "second": "ok\n"}


def test_health_belongs_into_a_job(capsys, monkeypatch, tmp_path):
    from unfold.launch.command import main

    monkeypatch.delenv("SLURM_NODEID", raising=False)
    words = ["health", "--results", str(tmp_path), "--nodes", "a", "--port", "1", "--gpus", "0", "--run-dir", str(tmp_path)]
    assert main(words) == 1 and "runs inside a SLURM job" in capsys.readouterr().err


def levels(findings) -> set[str]:
    return {finding.level for finding in findings}


def test_versions_are_compared(monkeypatch, tmp_path):
    assert levels(checks.versions()) == {"ok"}
    monkeypatch.setattr(checks, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert levels(checks.versions()) == {"note"}
    checks.REQUIREMENTS.write_text("torch==1.0\npytest==9.2.0\nno-such-library==3\n")
    (finding,) = checks.versions()
    assert finding.level == "problem" and "(1.0 wanted)" in finding.what and "no-such-library missing (3 wanted)" in finding.what


def test_network_settings_must_name_interfaces(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert any(f.level == "problem" and "nosuch0: no such interface" in f.what for f in checks.network())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^nosuch0")
    assert not any("nosuch0" in f.what for f in checks.network())


def test_gpus(monkeypatch):
    from unfold.launch.machine import Gpu

    monkeypatch.setattr(checks, "gpus", list)
    assert levels(checks.gpu_findings()) == {"note"}
    found = [Gpu(0, "a", "H100", 81559, 100, "550", "0"), Gpu(1, "b", "H100", 81559, 60000, "550", "2")]
    monkeypatch.setattr(checks, "gpus", lambda: found)
    monkeypatch.setattr(checks, "installed_torch_has_cuda", lambda: False)
    told = lines(checks.gpu_findings())
    assert any("PyTorch is a CPU build" in line for line in told)
    assert any("GPU 1: 60000 of 81559 MiB in use" in line for line in told)
    assert any("GPU 1: 2 uncorrected memory errors" in line for line in told) and not any("GPU 0" in line for line in told)


def test_file_system(monkeypatch, tmp_path):
    assert levels(checks.file_system(tmp_path / "not" / "yet")) == {"ok"}
    monkeypatch.setattr("unfold.launch.node.LEAST_DISK", 1 << 60)
    assert levels(checks.file_system(tmp_path)) == {"problem"}
    monkeypatch.undo()
    monkeypatch.setattr(checks, "LOCK_HOLDER", "")  # another process that gets the lock too
    assert any("do not exclude" in f.what for f in checks.file_system(tmp_path))


def test_clocks_and_ports_of_the_nodes(tmp_path, monkeypatch):
    """A node's part of the check in an allocation, with a head whose clock is 100 s ahead."""
    (tmp_path / "token").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener, open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        head = f"127.0.0.1:{listener.getsockname()[1]}"
        real = time.time
        monkeypatch.setattr(doctor, "time", argparse.Namespace(time=real))
        threading.Thread(target=doctor.serve_time, args=(listener,), daemon=True).start()
        assert abs(doctor.clock_difference(*head.split(":"))) < 0.5
        found = doctor.node_findings(tmp_path, head)
        assert any("files and locks of 127.0.0.1 are seen" in f.what for f in found) and not any("clock" in f.what for f in found)
        monkeypatch.setattr(doctor, "clock_difference", lambda host, port: 100.0)
        assert any("clock is +100.00 s off that of 127.0.0.1" in f.what for f in doctor.node_findings(tmp_path, head))
        monkeypatch.undo()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert any("a lock that 127.0.0.1 holds is not seen" in f.what for f in doctor.node_findings(tmp_path, head))
    found = doctor.node_findings(tmp_path / "elsewhere", head)
    assert any("cannot be reached" in f.what for f in found) and any("is not shared" in f.what for f in found)


def test_findings_of_nodes_are_merged():
    by_node = {"n1": [ok("same"), problem("bad", "mend")], "n2": [ok("same")], "n3": [ok("same"), note("odd", "look")]}
    assert lines(merged(by_node)) == [
        "     ok  all nodes: same",
        "problem  n1: bad",
        "         -> mend",
        "   note  n3: odd",
        "         -> look",
    ]


def test_doctor_on_this_machine(tmp_path):
    """The whole command; what the configuration needs and lacks makes its exit code."""
    data = TinyData(tmp_path / "data")
    config = data.config(tmp_path / "tiny.yaml", train={"global_batch": 4})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    line = [sys.executable, "-m", "launch", "doctor", "--config", config, "--run-dir", tmp_path, "--ranks", "3"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for told in ("data.train: ", "data.tokenizer: ", "--ranks 3 = 3 rank(s): train.global_batch: 4", "to mend"):
        assert told in done.stdout, told
    data.tokenizer.mkdir(parents=True)
    for prefix in (data.train, data.valid):
        prefix.with_suffix(".bin").touch()
    args = argparse.Namespace(config=config, overrides=[], ranks=2)
    assert levels(doctor.configuration_findings(args, 1)) == {"ok"}
    args = argparse.Namespace(config=tmp_path / "no.yaml", overrides=[], ranks=2)
    assert levels(doctor.configuration_findings(args, 1)) == {"problem"}
    assert json.dumps([f.what for f in doctor.configuration_findings(args, 1)]).count("cannot be read") == 1
