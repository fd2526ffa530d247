"""``pretrain status``: what it concludes from lock, heartbeats, metrics and checkpoints."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from unfold.pretrain.checkpoint.manifest import Manifest
from unfold.pretrain.command import main
from unfold.pretrain.errors import UserError
from unfold.pretrain.monitor.status import EXIT_CODES, SILENT_SECONDS, read_status, render

STEPS, TOKENS = 100, 4096
SPENT = {"training": 60.0, "data": 10.0, "startup": 10.0, "lost": 15.0, "down": 5.0, "saving": 0.0}


def write_checkpoint(run_dir: Path, step: int) -> None:
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(b"12345")
    manifest = Manifest(step, 0, 0, 0, {}, "", [], {}, 1, [], [], [], {"weights": {"bytes": 5, "sha256": ""}})
    (directory / "manifest.json").write_text(json.dumps(vars(manifest)))


def write_beat(run_dir: Path, rank: int, alive_ago: float = 1, progress_ago: float = 2, phase: str = "training", step: int = 41):
    now = time.time()
    beat = {"rank": rank, "host": f"node{rank}", "pid": 7, "step": step, "phase": phase,
            "progress": now - progress_ago, "alive": now - alive_ago}  # fmt: skip
    (run_dir / "heartbeat").mkdir(exist_ok=True)
    (run_dir / "heartbeat" / f"rank-{rank:05d}.json").write_text(json.dumps(beat))


def write_metrics(run_dir: Path, steps: int) -> None:
    rows = []
    for step in range(1, steps + 1):
        seconds = 60.0 if step == 1 else 2.0  # the first step compiles
        rows.append({"step": step, "loss": 5 - step / 100, "seconds": seconds, "raw_tokens_per_s": TOKENS / seconds})
    rows[30]["valid_loss"], rows[11]["skipped"] = 3.5, True
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_stage_of_the_last_step(run_dir):
    assert read_status(run_dir).stage == "" and not any(
        line.startswith("  stage") for line in render(read_status(run_dir), run_dir)
    )
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 41, "loss": 1.0, "stage": 2, "stage_name": "long"}) + "\n")
    assert "  stage       2 long" in render(read_status(run_dir), run_dir)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Of a run of two ranks on other hosts that is in step 41 of 100, saved at step 30."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": STEPS}, "faults": {"hang_minutes": 30.0}}))
    write_metrics(path, 40)
    write_checkpoint(path, 20)
    write_checkpoint(path, 30)
    for rank in (0, 1):
        write_beat(path, rank)
    return path


@pytest.fixture
def lock(run_dir):
    """The run's lock, held as by the main rank on this host."""
    with open(run_dir / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
        yield file


def test_a_run_under_way(run_dir, lock, capsys):
    status = read_status(run_dir)
    assert (status.state, status.step, status.steps, status.phase) == ("running", 40, 100, "training")
    assert (status.ranks, status.hosts) == (2, 2)
    assert status.raw_tokens_per_s == pytest.approx(TOKENS / 2) and status.left_s == pytest.approx(120)
    assert status.loss == pytest.approx(4.6) and (status.valid_loss, status.valid_step) == (3.5, 31)
    assert status.checkpoint_step == 30 and 0 <= status.checkpoint_age_s < 60
    assert 2 <= status.progress_s < 30 and (status.skipped, status.rollbacks) == (1, 0)
    assert main(["status", str(run_dir), "--once"]) == 0
    shown = capsys.readouterr().out
    for wanted in ("running, step 40 of 100 (40.0 %), 2 min left", "loss        4.6000, validation 3.5000 at step 31",
                   "2,048 raw tokens/s, 2 s per step", "2 ranks on 2 hosts", "checkpoint  step 30, "):  # fmt: skip
        assert wanted in shown, wanted


def test_a_lock_let_go_on_this_host_is_a_dead_run_at_once(run_dir, lock, capsys):
    fcntl.flock(lock, fcntl.LOCK_UN)
    status = read_status(run_dir)
    assert status.state == "dead" and "is gone" in status.why and status.phase is None
    with pytest.raises(SystemExit) as end:
        main(["status", str(run_dir)])  # it ends by itself: nothing more will come
    assert end.value.code == EXIT_CODES["dead"] == 4
    assert "DEAD, step 40 of 100" in capsys.readouterr().out


def test_heartbeats_decide_where_locks_do_not_reach(run_dir):
    (run_dir / ".lock").write_text("host elsewhere, pid 3\n")
    assert read_status(run_dir).state == "running"
    for rank in (0, 1):
        write_beat(run_dir, rank, alive_ago=SILENT_SECONDS + 5)
    status = read_status(run_dir)
    assert status.state == "dead" and "host node0" in status.why


def test_no_metrics_yet(run_dir, lock):
    (run_dir / "metrics.jsonl").unlink()
    status = read_status(run_dir)
    assert (status.state, status.step, status.loss, status.left_s) == ("starting", 0, None, None)


def test_stopped_and_finished(run_dir):
    for rank in (0, 1):
        write_beat(run_dir, rank, alive_ago=1000)
    write_checkpoint(run_dir, 40)
    assert read_status(run_dir).state == "stopped" and EXIT_CODES["stopped"] == 3
    write_metrics(run_dir, STEPS)
    assert read_status(run_dir).state == "dead"  # its last steps are not saved
    write_checkpoint(run_dir, STEPS)
    status = read_status(run_dir)
    assert (status.state, status.left_s, EXIT_CODES[status.state]) == ("finished", 0, 0)
    (run_dir / "checkpoints" / f"step-{STEPS:08d}" / "weights").write_bytes(b"1")
    assert read_status(run_dir).checkpoint_step == 40


def test_a_rank_that_does_not_get_on(run_dir, lock):
    write_beat(run_dir, 1, progress_ago=290)  # 20 steps are 40 s, but less than five minutes is no hang
    assert read_status(run_dir).state == "running"
    write_beat(run_dir, 1, progress_ago=310)
    status = read_status(run_dir)
    assert status.state == "hung" and "rank 1 (host node1) is in step 41 (training)" in status.why and EXIT_CODES["hung"] == 5
    write_beat(run_dir, 1, progress_ago=310, phase="validation")  # of unknown length: the watchdog's limit holds
    assert read_status(run_dir).state == "running"
    write_beat(run_dir, 1, progress_ago=1900, phase="validation")
    assert read_status(run_dir).state == "hung"


def test_a_rank_that_fell_silent_and_one_of_a_larger_start(run_dir, lock):
    write_beat(run_dir, 0, progress_ago=100)
    write_beat(run_dir, 1, alive_ago=60, progress_ago=100)
    status = read_status(run_dir)
    assert status.state == "hung" and "rank 1 (host node1) gives no sign of life" in status.why
    write_beat(run_dir, 1, alive_ago=5000, progress_ago=5000)  # left behind by a start with more ranks
    status = read_status(run_dir)
    assert (status.state, status.ranks) == ("running", 1)


def test_faults_are_told(run_dir, lock, capsys):
    rollback = {"step": 33, "reason": "loss spike", "first": 128, "stop": 132}
    (run_dir / "quarantine.json").write_text(json.dumps({"rollbacks": [rollback]}))
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 41, "loss": None, "checkpoint_s": 3.0, "checkpoint_error": "disk: full"}) + '\n{"step": 4')
    main(["status", str(run_dir), "--once"])
    shown = capsys.readouterr().out
    assert "loss        not finite" in shown and "the last save FAILED: disk: full" in shown
    assert "rollbacks   1, the last at step 33: loss spike, samples 128..131 left out" in shown


def test_what_is_no_run(run_dir, tmp_path, capsys):
    for path, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "is not a run directory (it has no config.yaml)")):
        assert main(["status", str(path), "--once"]) == 1
        assert message in capsys.readouterr().err
    (run_dir / "config.yaml").write_text("train: [")
    with pytest.raises(UserError, match="config.yaml: is damaged"):
        read_status(run_dir)
    assert main(["status", str(run_dir), "--once", "--every", "0"]) == 1


def test_the_command_is_light_and_its_json_whole(run_dir, lock):
    """Imports are what makes such a command slow; the process time of the rest is negligible."""
    code = ("import sys; from unfold.pretrain.command import main; code = main(['status', sys.argv[1], '--once', '--json']);"
            "sys.exit(99 if {'torch', 'deepspeed', 'pydantic', 'wandb'} & set(sys.modules) else code)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"] == "running" and told["step"] == 40


def test_it_follows_a_run_until_its_end(run_dir, lock):
    line = [sys.executable, "-m", "pretrain", "status", str(run_dir), "--json", "--every", "0.1"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as follower:
        assert json.loads(follower.stdout.readline())["state"] == "running"
        write_metrics(run_dir, STEPS)
        write_checkpoint(run_dir, STEPS)
        fcntl.flock(lock, fcntl.LOCK_UN)
        states = [json.loads(text)["state"] for text in follower.stdout]
        assert states[-1] == "finished" and set(states[:-1]) <= {"running"}
        assert follower.wait(60) == 0


def test_goodput_is_told(run_dir, capsys):
    assert read_status(run_dir).goodput is None
    ledger = {"began": 0.0, "seen": 100.0, "starts": 2, "spent": SPENT}
    (run_dir / "goodput.json").write_text(json.dumps(ledger))
    status = read_status(run_dir)
    assert (status.goodput, status.spent) == (0.6, SPENT)
    main(["status", str(run_dir), "--once"])
    rest = "work that was lost 15.0 %, starting 10.0 %, waiting for data 10.0 %, not running 5.0 %"
    assert f"60.0 % of the time trained; {rest}" in capsys.readouterr().out
    (run_dir / "goodput.json").write_text("{torn")
    assert read_status(run_dir).goodput is None
