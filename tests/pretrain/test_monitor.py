"""Where figures go: TensorBoard and W&B continue over resumes and rollbacks; traces; what is counted as use."""

import gzip
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import record_function

from unfold.model.config import GistConfig
from unfold.model.gist import Recall, build_layout, interleave
from unfold.pretrain.config import MonitorConfig, parse_config
from unfold.pretrain.errors import UserError
from unfold.pretrain.monitor.metrics import Outputs, WandbLog, read_metrics
from unfold.pretrain.monitor.profiler import StepProfiler
from unfold.pretrain.monitor.throughput import RankUsage, Usage, known_peak


def configuration(**sections):
    tree = {"data": {"train": ["shard"], "tokenizer": "there", "raw_tokens": 128}, "train": {"steps": 10}}
    tree["monitor"] = {"wandb": False}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return parse_config(tree)


def line(step: int, loss: float) -> dict:
    mass = {"gist_0": 0.25, "raw": 0.75}
    return {"step": step, "loss": loss, "raw_tokens_per_s": 10.0, "sample_range": "0-4", "skipped": True, "attention_mass": mass}


def write(config, run_dir, done: int, steps, loss: float) -> None:
    outputs = Outputs(config, run_dir, done)
    for step in steps:
        outputs.write(line(step, loss))
    outputs.close()


def test_tensorboard_continues_the_same_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configuration(monitor={"tensorboard": True})
    write(config, tmp_path, 0, range(1, 7), 6.0)
    outputs = Outputs(config, tmp_path, 3)  # a resume from step 3
    outputs.write(line(4, 5.0))
    outputs.write(line(5, 5.0))
    outputs.reopen(4)  # a rollback to step 4
    outputs.write(line(5, 4.0))
    outputs.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 6.0), (2, 6.0), (3, 6.0), (4, 5.0), (5, 4.0)]
    assert [e.value for e in events.Scalars("attention_mass/gist_0")] == [0.25] * 5
    assert sorted(events.Tags()["scalars"]) == ["attention_mass/gist_0", "attention_mass/raw", "loss", "raw_tokens_per_s"]


def wandb_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    records, at, parts = [], 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break
        if room < 7 or not kind:  # the rest of a block is too short for a record
            at += room
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def whole_wandb_run(path) -> list:
    """The records of a .wandb file that has its last one, else none."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in wandb_records(path.read_bytes())]
    return records if any(r.HasField("exit") for r in records) else []


def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = configuration(monitor={"wandb": True})
    write(config, tmp_path, 0, (1, 2, 3), 6.0)
    write(config, tmp_path, 2, (3, 4), 5.0)  # step 3 again: W&B must not drop it
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(files) == 2
    records = []
    for path in files:
        deadline = time.monotonic() + 60
        while not (own := whole_wandb_run(path)):  # its process may still be writing
            assert time.monotonic() < deadline
            time.sleep(0.1)
        records += own
    ids = {r.run.run_id for r in records if r.HasField("run")}
    steps_of = {(r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField("metric")}
    found = []
    for record in records:
        if record.HasField("history"):
            values = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append((values["step"], values["loss"], values["attention_mass.raw"]))
    assert ids == {(tmp_path / "wandb_id").read_text()}
    assert found == [(1, 6.0, 0.75), (2, 6.0, 0.75), (3, 6.0, 0.75), (3, 5.0, 0.75), (4, 5.0, 0.75)]
    assert ("*", "step") in steps_of


def test_wandb_out_of_reach_is_said_and_logged_offline(tmp_path, monkeypatch, capfd):
    """A key is set and nothing answers: the figures go on, to a file that can be sent later."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # refused at once
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    write(configuration(monitor={"wandb": True}), tmp_path, 0, (1, 2), 6.0)
    said = capfd.readouterr().err
    assert "error: Weights & Biases (online) cannot be used: " in said and f"`wandb sync {tmp_path}/wandb/offline-run-*`" in said
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_dead_wandb_ends_no_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = WandbLog(MonitorConfig(), {}, tmp_path)

    def broken(*arguments):
        raise BrokenPipeError("the service has died")

    log._run = SimpleNamespace(log=broken, finish=broken)
    for step in (1, 2):
        log.write({"step": step})
    log.close()
    assert capfd.readouterr().err.count("takes no more figures (the service has died)") == 1


@pytest.mark.parametrize("content", ["", "\0\0\0", "not an id", "x" * 200])
def test_a_torn_wandb_id_is_made_anew(tmp_path, monkeypatch, content):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "wandb_id").write_text(content)
    WandbLog(MonitorConfig(), {}, tmp_path).close()
    assert len((tmp_path / "wandb_id").read_text()) == 8


ALONE = SimpleNamespace(rank=0, world=1, data_size=1, device=torch.device("cpu"))


def trace(tmp_path, steps, done, said) -> None:
    profiler = StepProfiler(steps, done, tmp_path, ALONE, said.append)
    for step in range(done + 1, 8):
        profiler.begin(step)
        with record_function(f"work of step {step}"):
            torch.ones(4).sum()
        profiler.end(step)
    profiler.close()


def test_a_trace_holds_the_chosen_steps(tmp_path):
    said = []
    trace(tmp_path, (3, 5), 0, said)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-3-5-rank-00000.json.gz"
    names = {e.get("name") for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {n for n in names if n and n.startswith("work of")} == {f"work of step {n}" for n in (3, 4, 5)}
    assert "aten::sum" in names and len(said) == 1


def test_traces_on_resume(tmp_path):
    said = []
    trace(tmp_path / "none", (), 0, said)
    assert not said and not (tmp_path / "none").exists()
    trace(tmp_path / "past", (1, 2), 2, said)
    assert "lies before step 2" in said[0] and not (tmp_path / "past").exists()
    trace(tmp_path / "within", (1, 4), 2, said)
    assert [p.name for p in (tmp_path / "within/profile").iterdir()] == ["steps-3-4-rank-00000.json.gz"]
    (tmp_path / "file").write_text("")
    trace(tmp_path / "file", (1, 1), 0, said)  # cannot be written: said, and nothing more
    assert said[-1].startswith("error: ") and "cannot be written" in said[-1]


@pytest.mark.parametrize(
    "monitor,message",
    [
        ({"profile_steps": [0, 3]}, r"monitor.profile_steps: \[0, 3\] is not \[first, last\] with 1 <= first <= last"),
        ({"profile_steps": [5]}, r"monitor.profile_steps: \[5\] is not \[first, last\]"),
        ({"profile_steps": [4, 3]}, r"monitor.profile_steps: \[4, 3\] is not"),
        ({"profile_steps": [8, 11]}, r"monitor.profile_steps: \[8, 11\] goes beyond train.steps \(10\)"),
        ({"profile_steps": [1, 101]}, r"monitor.profile_steps: \[1, 101\] are 101 steps, more than 100"),
        ({"peak_tflops": -1}, "monitor.peak_tflops: -1.0 is below 0"),
    ],
)
def test_settings_out_of_range_are_refused(monitor, message):
    with pytest.raises(UserError, match=message):
        configuration(monitor=monitor)


def test_peaks_by_the_names_that_pytorch_tells():
    assert known_peak("NVIDIA H100 80GB HBM3") == known_peak("NVIDIA H200") == 989e12
    assert known_peak("NVIDIA A100-SXM4-40GB") == known_peak("NVIDIA A100 80GB PCIe") == 312e12
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA L4", "NVIDIA GeForce RTX 4090"):
        assert known_peak(name) == 0


@pytest.mark.parametrize("recall,first", [("none", 1), ("all", 1), ("all", 2)])
def test_mfu_is_useful_flops_counted_pair_by_pair(recall, first):
    gist = GistConfig((4, 2), recall=recall, recall_from=first)
    made = interleave(np.zeros(100, np.int64), [70, 30], np.ones(1, bool), gist, [900, 901])
    pad = lambda x: torch.from_numpy(np.pad(x, (0, 7), constant_values=-1))[None]
    layout = build_layout(pad(made.level), pad(made.doc), gist)
    batch = SimpleNamespace(layout=layout, recall=Recall.of(layout, gist))
    config = configuration(
        monitor={"peak_tflops": 2.0}, gist={"chunk_sizes": [4, 2], "recall": recall, "recall_from": first},
        model={"vocab_size": 512, "hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_size": 96},
    )  # fmt: skip
    said = []
    usage = Usage(config, ALONE, said.append)
    assert "x 2 TFLOP/s" in said[0]
    used = usage.of_step([batch, batch], SimpleNamespace(unfolded=6.5, selected=3.0))

    mask = layout.intervals.dense_mask()[0]
    forgetting = int(mask[: len(made.ids)].sum())
    recalling = forgetting
    if recall == "all":  # every raw token gives up its gists, reads the selected ones and what they unfold
        raw = [t for t in range(len(made.ids)) if made.level[t] < 0]
        recalling += len(raw) * (6.5 + 3.0) - int(mask[raw][:, layout.level[0] >= 0].sum())
    matrices = 3 * (64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 3 * 64 * 96)
    flops = 2 * (6 * matrices * len(made.ids) + 6 * 512 * 64 * 100 + 12 * 4 * 16 * (first * forgetting + (3 - first) * recalling))
    assert used.flops == pytest.approx(flops, rel=1e-12) and 0 < used.memory < 100
    ranks = [RankUsage(used.flops, 3.0), RankUsage(used.flops, 5.0)]
    two = Usage(config, SimpleNamespace(rank=0, world=2, data_size=1, device=ALONE.device), said.append)
    metrics = two.metrics(ranks, 0.5)  # two ranks that share the samples
    assert metrics["memory_gib"] == 5.0 and metrics["mfu"] == pytest.approx(flops / 0.5 / 2 / 2e12)
    assert metrics["tflops"] == pytest.approx(flops / 0.5 / 2 / 1e12)


def test_without_a_peak_there_is_no_mfu():
    usage = Usage(configuration(), ALONE, lambda text: pytest.fail(text))
    assert set(usage.metrics([usage.of_step([], None)], 1.0)) == {"memory_gib"}
