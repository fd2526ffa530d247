"""The saver on its own: late and failing ranks, keeping, what a failed save leaves behind."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from unfold.pretrain.checkpoint import save as saves
from unfold.pretrain.checkpoint.manifest import Manifest, checkpoint_directories, newest_whole, step_of, superfluous
from unfold.pretrain.checkpoint.state import RunningAverage, adam_step
from unfold.pretrain.checkpoint.tensors import Chunk
from unfold.pretrain.config import CheckpointConfig
from unfold.pretrain.errors import UserError


def manifest(step: int) -> Manifest:
    return Manifest(step, step, step, step, {}, "hash", [], {}, 1, [], [], [])


class FakeStaging:
    """A state of one vector."""

    def __init__(self, *_):
        pass

    def copy(self) -> None:
        pass

    def files(self) -> dict:
        return {"shard-00001.safetensors": [Chunk("x", (0,), (3,), torch.float32, lambda: torch.arange(3.0))]}


@pytest.fixture
def make(tmp_path, monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(saves, "_Staging", FakeStaging)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    (tmp_path / "checkpoints").mkdir()

    def make(world=1, objection="", **settings):
        parallel = SimpleNamespace(rank=0, world=world, is_main=True)
        return saves.Saver(
            tmp_path, None, parallel, CheckpointConfig(**settings), lambda: objection, RunningAverage(0), set
        ), store

    return make


def save(saver, step: int) -> saves.SaveResult:
    saver.copy(manifest(step))
    saver.start()
    saver.wait()
    (result,) = saver.poll()
    return result


def steps(run_dir) -> list[int]:
    return [step_of(d) for d in checkpoint_directories(run_dir)]


def test_saves_and_keeps(make, tmp_path):
    saver, _ = make(keep=2, keep_every=3)
    assert [save(saver, step).error for step in range(1, 8)] == [""] * 7
    assert steps(tmp_path) == [7, 6, 3]
    assert newest_whole(tmp_path, print)[1].files["shard-00001.safetensors"]["bytes"] > 0
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing hidden is left"


def test_what_is_kept():
    directories = [SimpleNamespace(name=f"step-{step:08d}") for step in (9, 8, 6, 4, 2)]
    gone = lambda *rules: [step_of(d) for d in superfluous(directories, *rules)]
    assert gone(0, 0) == [] and gone(2, 0) == [6, 4, 2] and gone(1, 4) == [6, 2] and gone(9, 0) == []


def test_a_newer_damaged_checkpoint_does_not_push_out_good_ones(make, tmp_path):
    saver, _ = make(keep=1)
    save(saver, 3)
    (tmp_path / "checkpoints/step-00000009").mkdir()
    save(saver, 4)
    assert steps(tmp_path) == [9, 4] and newest_whole(tmp_path, lambda text: None)[1].step == 4


def test_a_late_rank_is_named(make, tmp_path):
    saver, store = make(world=3, deadline_minutes=0.005)
    store.set("unfold/save/1/2", json.dumps({"files": {}, "index": {}}))
    assert save(saver, 1).error == "rank 1 not done after checkpoint.deadline_minutes = 0.005"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failing_rank_is_named(make, tmp_path):
    saver, store = make(world=2)
    save_one = lambda number: store.set(f"unfold/save/{number}/1", json.dumps({"error": "No space left on device"}))
    save_one(1)
    assert save(saver, 1).error == "rank 1: No space left on device" and steps(tmp_path) == []
    store.set("unfold/save/2/1", json.dumps({"files": {}, "index": {}}))
    assert not save(saver, 2).error and steps(tmp_path) == [2], "the next save is not disturbed"


def test_a_write_of_the_main_rank_that_hangs_is_told_and_so_is_every_save_after_it(make, tmp_path, monkeypatch):
    """Not silently: the run would end well without its last checkpoints."""
    going = threading.Event()
    monkeypatch.setattr(saves, "GRACE_SECONDS", 0.05)
    files = FakeStaging.files
    monkeypatch.setattr(FakeStaging, "files", lambda self: going.wait(20) and files(self))
    saver, _ = make(deadline_minutes=1e-4)
    told = []
    for step in (1, 2, 3):
        saver.copy(manifest(step))
        saver.start()
        told += saver.poll()
    saver.wait()
    told += saver.poll()
    assert [(r.step, r.error) for r in told] == [
        (1, "rank 0 hangs in a write after checkpoint.deadline_minutes = 0.0001"),
        (2, "the save before hangs in a write"),
        (3, "the save before hangs in a write"),
    ]
    going.set()
    while saver._thread is not None:
        saver.wait()
    assert [r.step for r in saver.poll()] == [1]  # how it ended in the end
    monkeypatch.setattr(saves, "GRACE_SECONDS", 20)
    assert not save(saver, 4).error and steps(tmp_path)[0] == 4


def test_what_cannot_be_removed_does_not_fail_a_save(make, tmp_path, monkeypatch):
    """An evaluation may still read an older checkpoint (on NFS its files stay), or a user have removed it."""
    saver, _ = make(keep=1)
    save(saver, 1)

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr("shutil.rmtree", busy)
    assert not save(saver, 2).error and steps(tmp_path) == [2]
    listed, gone = saves.checkpoint_directories, tmp_path / "checkpoints/step-00000001"
    monkeypatch.setattr(saves, "checkpoint_directories", lambda run_dir: [*listed(run_dir), gone])
    assert not save(saver, 3).error and steps(tmp_path) == [3]


def test_a_manifest_without_hashes_is_damaged(make, tmp_path):
    save(make()[0], 1)
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    path.write_text(path.read_text().replace('"sha256"', '"sha257"'))
    said = []
    assert newest_whole(tmp_path, said.append) is None and "manifest.json: is damaged ('sha256')" in said[0]


def test_an_unwritable_directory_and_metrics_that_lag_fail_the_save(make, tmp_path):
    saver, _ = make()
    assert not save(saver, 1).error
    lagging, _ = make(objection="metrics.jsonl: cannot be written")
    assert save(lagging, 2).error == "metrics.jsonl: cannot be written"
    assert steps(tmp_path) == [1]
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("in the way")
    assert "File exists" in save(saver, 3).error or "Not a directory" in save(saver, 3).error


def test_manifests_of_other_formats_are_refused(make, tmp_path):
    save(make()[0], 1)
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1, "more": 2}))
    said = []
    assert newest_whole(tmp_path, said.append) is None and "is of format 1, this version reads format 2" in said[0]
    path.write_text("[]")
    with pytest.raises(UserError, match="manifest.json: is damaged"):
        from unfold.pretrain.checkpoint.manifest import read_manifest

        read_manifest(path.parent)


def test_the_count_of_updates_is_that_of_the_moment_of_the_copy():
    """It is written while training goes on: a later one would give the resumed run other corrections of its moments."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert adam_step(engine).tolist() == [0]
    copies = []
    for _ in range(3):
        weight.grad = torch.ones(3)
        optimizer.step()
        copies.append(adam_step(engine))
    assert [copy.tolist() for copy in copies] == [[1], [2], [3]]
