"""The benchmark prints figures only for what computes the right thing."""

import json

import pytest
import torch

from tests.benchmarks.gpu import attention as bench
from tests.benchmarks.gpu import recall as bench_recall

SMALL = "--raw 96 --chunks 8,4 --heads 2 --kv-heads 1 --dim 16 --dtype float32 --seconds 0 --only".split()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shape is one for the CPU")


def run(tmp_path, *only):
    threads = torch.get_num_threads()
    try:
        status = bench.main([*SMALL, *only, "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    return status, json.loads((tmp_path / "compressed_cpu.json").read_text())["results"]


def test_figures_and_ratios(tmp_path):
    status, (dense, ours) = run(tmp_path, "dense SDPA", "ours")
    assert status == 0 and ours["forward_ms"] > 0 and ours["backward_ms"] > 0 and dense["forward_ms"] > 0
    assert "refused" not in (tmp_path / "compressed_cpu.md").read_text()


@pytest.mark.parametrize("wrong", ["out", "d_k"])
def test_a_wrong_contestant_gets_no_figures(tmp_path, monkeypatch, wrong):
    def almost(shape):
        right = bench.ours(shape)
        if wrong == "out":
            return lambda q, k, v: right(q, k, v) * (1 + 1e-4)
        return lambda q, k, v: right(q, k.detach(), v) + 0 * k.sum()

    monkeypatch.setitem(bench.CONTESTANTS, "ours", almost)
    status, (ours,) = run(tmp_path, "ours")
    assert status == 1 and ours["refused"].startswith(f"{wrong} is off by") and "forward_ms" not in ours
    assert "refused" in (tmp_path / "compressed_cpu.md").read_text()


RECALL = "--raw 96 --decode-raw 128 --chunks 8,4 --heads 2 --kv-heads 1 --dim 16 --dtype float32 --seconds 0 --ops unfold decode"


def run_recall(tmp_path):
    threads = torch.get_num_threads()
    try:
        status = bench.main([*RECALL.split(), "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    return status, json.loads((tmp_path / "recall_cpu.json").read_text())["results"]


def test_figures_of_recall(tmp_path):
    status, results = run_recall(tmp_path)
    assert status == 0 and all(r["forward_ms"] > 0 for r in results)
    names = [(r["op"], r["name"]) for r in results]
    assert names.count(("unfold", "unfold")) == 2
    assert names.count(("decode", "ours")) == names.count(("decode", "dense SDPA")) == 1
    assert "| dense SDPA |" in (tmp_path / "recall_cpu.md").read_text()


@pytest.mark.parametrize("wrong", ["unfold_attention", "decode_attention"])
def test_wrong_recall_gets_no_figures(tmp_path, monkeypatch, wrong):
    right = getattr(bench_recall, wrong)
    almost = lambda *a, **k: right(*a, **k) * (1 if k.get("backend") else 1 + 1e-3)
    monkeypatch.setattr(bench_recall, wrong, almost)
    status, results = run_recall(tmp_path)
    refused = [r for r in results if "refused" in r]
    assert status == 1 and {r["op"] for r in refused} == {wrong.split("_")[0]} and "off by" in refused[0]["refused"]
    assert all("forward_ms" not in r for r in refused)
