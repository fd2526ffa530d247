"""Runs that are cut off: nothing finished is lost, and going on gives the bytes of a run that was never cut."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data_prep.texts import contents, write_jsonl
from unfold.data_prep import batches, encode
from unfold.data_prep.format.files import Appended

TEXTS = [f"document {i} " + "of the people " * (i % 40) for i in range(300)]


@pytest.fixture
def small(monkeypatch):
    """Batches of a few documents, each committed."""
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 17)
    monkeypatch.setattr(encode, "COMMIT_SECONDS", 0.0)


@pytest.fixture
def whole(bpe, tmp_path, run):
    """The bytes that an undisturbed run makes of TEXTS."""
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    assert run(*command(bpe, tmp_path, "whole"), "--no-plot")[0] == 0
    return {part: contents(f"{tmp_path / 'whole'}_{part}") for part in ("train", "valid")}


def command(tokenizer, directory, name):
    return ("tokenize", "--input", directory / "c.jsonl", "--tokenizer", tokenizer, "--output", directory / name,
            "--valid-fraction", 0.2)  # fmt: skip


def parts(directory, name):
    assert not list(directory.glob("*.partial"))
    return {part: contents(f"{directory / name}_{part}") for part in ("train", "valid")}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bad", ["{", '{"text": "half \\ud83d"}', '{"body": 1}'])
def test_after_a_bad_line_is_mended_the_run_goes_on(bpe, tmp_path, run, fails, small, whole, workers, bad):
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").unlink()
    for i in range(0, 300, 100):  # finished files stay finished when a later one is mended
        (tmp_path / f"c{i}.jsonl").write_text("\n".join(lines[i : i + 100]) + "\n")
    broken = tmp_path / "c200.jsonl"
    good = broken.read_text()
    broken.write_text(good.replace(lines[250], bad))
    options = ("tokenize", "--input", tmp_path / "c*.jsonl", "--tokenizer", bpe, "--valid-fraction", 0.2, "--workers", workers)
    err = fails(*options, "--output", tmp_path / "s", words=("c200.jsonl:51", "documents are done and kept"))
    assert "surrogate" in err or "not valid JSON" in err or "no key 'text'" in err
    broken.write_text(good)
    status, out, _ = run(*options, "--output", tmp_path / "s")
    assert status == 0 and "done by an earlier run" in out, out
    for part, files in parts(tmp_path, "s").items():
        assert files[".bin"] == whole[part][".bin"] and files[".idx"] == whole[part][".idx"]


def test_nothing_is_left_where_nothing_was_finished(bpe, tmp_path, fails):
    (tmp_path / "c.jsonl").write_text("{\n")
    fails(*command(bpe, tmp_path, "s"), words=("c.jsonl:1", "not valid JSON"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_any_loss_at_the_ends_of_the_files_is_made_good(bpe, tmp_path, run, small, whole, monkeypatch, after):
    """A machine that loses power may lose the ends of files; the newest state that all of them hold is taken."""
    taken = encode._Run._take
    for harm in ("s_train.bin", "s_valid.bin", "s_train.lengths", "s.journal"):
        left = iter(range(after))

        def take(self, batch, result, left=left):
            if next(left, None) is None:
                raise Stop
            taken(self, batch, result)

        with monkeypatch.context() as m, pytest.raises(Stop):
            m.setattr(encode._Run, "_take", take)
            run(*command(bpe, tmp_path, "s"))
        path = tmp_path / f"{harm}.partial"
        os.truncate(path, path.stat().st_size * 2 // 3)
    assert run(*command(bpe, tmp_path, "s"))[0] == 0
    assert parts(tmp_path, "s") == whole


def test_unfinished_work_of_another_command(bpe, unigram, tmp_path, run, fails, small, whole):
    path = tmp_path / "c.jsonl"
    path.write_text(path.read_text() + "{\n")
    fails(*command(bpe, tmp_path, "s"), words=("c.jsonl:301",))
    kept = {p.name: p.read_bytes() for p in tmp_path.glob("*.partial")}
    assert kept
    fails(*command(unigram, tmp_path, "s"), words=("unfinished run with another tokenizer", "--overwrite"))
    fails(*command(bpe, tmp_path, "s"), "--min-tokens", 3, words=("another --min-tokens",))
    assert kept == {p.name: p.read_bytes() for p in tmp_path.glob("*.partial")}
    write_jsonl(path, TEXTS)
    status, out, _ = run(*command(unigram, tmp_path, "s"), "--overwrite")
    assert status == 0 and "done by an earlier run" not in out
    status, out, _ = run(*command(bpe, tmp_path, "s"), "--overwrite")
    assert status == 0 and parts(tmp_path, "s") == whole


def test_a_file_that_changed_is_read_again(bpe, tmp_path, run, fails, small, whole):
    path = tmp_path / "c.jsonl"
    good = path.read_text()
    path.write_text(good.replace("document 5 ", "DOCUMENT 5 ") + "{\n")
    fails(*command(bpe, tmp_path, "s"), words=("c.jsonl:301",))
    path.write_text(good)
    status, out, _ = run(*command(bpe, tmp_path, "s"))
    assert status == 0 and "done by an earlier run" not in out and parts(tmp_path, "s") == whole


def test_parts_merge_to_the_whole(bpe, tmp_path, run, fails, whole):
    (tmp_path / "d.txt").write_text("a text file")
    both = ("--input", tmp_path / "d.txt", tmp_path / "c.jsonl", "--tokenizer", bpe, "--no-plot")
    assert run("tokenize", *both, "--output", tmp_path / "all")[0] == 0
    names = []
    for i in (1, 2, 3, 4, 5):
        assert run("tokenize", *both, "--output", tmp_path / "p", "--part", f"{i}/5")[0] == 0
        names.append(tmp_path / f"p-0000{i}-of-00005")
    assert run("merge", "--input", *names, "--output", tmp_path / "merged")[0] == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "all")
    fails("tokenize", *both, "--output", tmp_path / "p", "--part", "6/5", status=2, words=("6/5",))


def test_lines_in_parts_are_counted_from_the_file(bpe, tmp_path, fails):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    text = (tmp_path / "c.jsonl").read_text().splitlines()
    text[288] = "{" + " " * (len(text[288]) - 1)
    (tmp_path / "c.jsonl").write_text("\n".join(text))
    options = ("tokenize", "--input", tmp_path / "c.jsonl", "--tokenizer", bpe, "--output", tmp_path / "s")
    fails(*options, "--part", "4/4", words=("c.jsonl:289",))


def test_a_full_disk_keeps_what_is_finished(bpe, tmp_path, run, whole):
    code = (
        "import resource, sys; from unfold.data_prep import batches, encode; from unfold.data_prep.command import main;"
        "batches.BATCH_DOCUMENTS = 17; encode.COMMIT_SECONDS = 0.0;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(a) for a in command(bpe, tmp_path, "s")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "documents are done and kept" in done.stderr
    status, out, _ = run(*arguments)
    assert status == 0 and "done by an earlier run" in out and parts(tmp_path, "s") == whole
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4000


def test_an_appended_file_survives_short_writes(tmp_path):
    file = Appended(tmp_path / "x")
    data = np.arange(1000).tobytes()

    class Slow:
        def __init__(self, inner):
            self.inner = inner

        def write(self, data):
            return self.inner.write(data[:7])

    file._stream, inner = Slow(file._stream), file._stream
    file.append(data)
    inner.close()
    assert file.path.read_bytes() == data


@pytest.fixture(scope="module")
def large(bpe, tmp_path_factory, module_run):
    """A corpus that takes seconds, and the bytes of an undisturbed run."""
    directory = tmp_path_factory.mktemp("large")
    write_jsonl(directory / "c.jsonl", [f"{i} " + "the people of the United States " * 100 for i in range(8_000)])
    module_run("tokenize", "--input", directory / "c.jsonl", "--tokenizer", bpe, "--output", directory / "whole", "--no-plot")
    return directory / "c.jsonl", contents(directory / "whole")


@pytest.fixture(scope="module")
def module_run():
    """Run a command in a process of its own; it must go well."""

    def call(*arguments):
        subprocess.run([sys.executable, "-m", "data_prep", *map(str, arguments)], check=True, capture_output=True)

    return call


@pytest.fixture
def running(bpe, tmp_path, large):
    """A `tokenize` process with two workers in the middle of its work, in a process group of its own."""
    options = ["tokenize", "--input", large[0], "--tokenizer", bpe, "--output", tmp_path / "s", "--workers", "2", "--no-plot"]
    code = "import sys, signal; from unfold.data_prep import encode, command as m; encode.COMMIT_SECONDS = 0.2;"
    code += "signal.signal(signal.SIGTERM, m._terminated); sys.exit(m.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, options)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    process.options = options
    journal = tmp_path / "s.journal.partial"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2)
    yield process
    process.kill()
    process.wait()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Processes of a group that still run (zombies do not)."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            state, _, pgrp = open(f"/proc/{int(entry)}/stat").read().rsplit(")", 1)[1].split()[:3]
        except (ValueError, OSError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(entry))
    return found


def goes_on(process, tmp_path, run, large) -> None:
    wait_for(lambda: not members(process.pid))
    status, out, _ = run(*process.options)
    assert status == 0 and "were done by an earlier run" in out
    ours = contents(tmp_path / "s")
    assert ours == large[1] and json.loads(ours[".json"])["documents"] == 8_000
    assert sorted(p.name for p in tmp_path.glob("s.*")) == ["s.bin", "s.idx", "s.json", "s.report.json"]


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_loses_nothing_and_leaves_no_processes(running, tmp_path, run, large, sign, status):
    assert len(members(running.pid)) >= 3
    running.send_signal(sign)
    _, err = running.communicate(timeout=60)
    assert running.returncode == status
    assert sign == signal.SIGKILL or err.count("\n") == 1 and "run the same command again" in err
    goes_on(running, tmp_path, run, large)


@pytest.mark.parametrize("wait", [0.0, 0.13])
def test_a_killed_worker_is_named(running, tmp_path, run, large, wait):
    time.sleep(wait)  # wherever it is in its work
    workers = [p for p in members(running.pid) if "spawn_main" in open(f"/proc/{p}/cmdline").read()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1 and "worker process died" in err and err.count("\n") == 1, err
    goes_on(running, tmp_path, run, large)


def test_two_runs_into_one_output(running, tmp_path, fails):
    fails(*running.options, words=("another run is writing this output now",))
    assert running.poll() is None
