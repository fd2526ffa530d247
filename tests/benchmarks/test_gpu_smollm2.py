"""The SmolLM2 benchmark on a GPU: how many steps are planned, who waits, which checkpoint is evaluated, what the commands say."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from tests.benchmarks.docs_questions import write_questions
from tests.benchmarks.gpu.smollm2 import Course, ahead, common_checkpoint, pace, planned_steps
from tests.benchmarks.smollm2_gists import ARMS, TASK, evaluations, findings, table, training
from unfold.pretrain.config import load_config
from unfold.pretrain.evaluate.items import read_items

ARGS = Namespace(
    output=Path("/out"), steps=30, raw_tokens=4096, precision="bf16", batch=8, lr=3e-4, tokens=100_000, evaluation_dtype="bf16"
)


def test_arms_that_run_ahead_wait():
    assert ahead({"a": 5, "b": 3, "c": 2}, 3) == {"a"}
    assert ahead({"a": 2, "b": 2}, 3) == ahead({}, 3) == set()


def test_evaluated_is_the_last_checkpoint_of_all(tmp_path):
    def saved(arm, *steps):
        for step in steps:
            directory = tmp_path / arm / "checkpoints" / f"step-{step:08d}"
            directory.mkdir(parents=True)
            (directory / "manifest.json").touch()
        return tmp_path / arm

    a, b = saved("a", 10, 20, 30), saved("b", 10, 20)
    (tmp_path / "b" / "checkpoints" / "step-00000030").mkdir()  # is being written
    assert common_checkpoint([a, b]) == 20 and common_checkpoint([a]) == 30
    assert common_checkpoint([a, tmp_path / "c"]) == common_checkpoint([]) == 0


def test_pace_passes_over_what_compiles():
    steps = [9, 1, 1, 1, 30, 2, 2, 2, 2, 3, 3, 3]  # the first step is not counted, its start is in it
    moments = [0.0]
    for seconds in steps:
        moments.append(moments[-1] + seconds)
    assert pace(moments) == pytest.approx((1 + 2 + 3) / 3)
    assert planned_steps({"start_s": 20, "step_s": 1.0}, 120, 10) == 90  # 0.92 of 100, in tens
    assert planned_steps({"start_s": 20, "step_s": 1.0}, 15, 10) == 10


def test_a_course_ends_what_it_started(tmp_path):
    with Course(tmp_path, 1) as course:
        good = course.start("good", ["--help"])
        bad = course.start("bad", ["train", "--config", "/nowhere.yaml", "--run-dir", "/nowhere"])
        assert good.wait(60) == 0 and course.ended("good", good)
        assert bad.wait(60) != 0 and not course.ended("bad", bad)
        late = course.start("late", ["train", "--help"])
    assert late.returncode is not None
    assert "/nowhere.yaml" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_run(tmp_path, arm):
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "config.yaml").write_text("model: {hidden_size: 64, layers: 3}\n")
    words = list(map(str, training(Namespace(**{**vars(ARGS), "output": tmp_path}), arm, train__micro_batch=2)))
    sets = [word for flag, word in zip(words, words[1:]) if flag == "--set"]
    config = load_config(tmp_path / "imported" / "config.yaml", sets)
    assert config.train.micro_batch == 2 and config.train.init_from == str(tmp_path / "imported")
    if arm == "dense":
        assert config.at(1).folding is None
    elif arm == "paper_8":
        assert [config.at(step).folding.recall for step in (1, 24, 25, 30)] == ["none", "none", "all", "all"]
    else:
        assert [config.at(step).folding.unfold_all for step in (1, 10, 11, 30)] == [True, True, False, False]
        assert config.at(1).folding.route_loss == 1.0 and config.at(30).folding.route_loss == 0.3


def test_what_is_evaluated(tmp_path):
    kinds = evaluations(ARGS, "recipe_4x4", 30, tmp_path)
    assert list(kinds) == ["perplexity", "routing", "passkey"]
    for arguments in kinds.values():
        at = arguments.index("--chunk-sizes")
        assert arguments[at + 1] == "4,4" and arguments[2:6] == ["--run-dir", Path("/out/runs/recipe_4x4"), "--step", 30]
    dense = evaluations(ARGS, "dense", 30, tmp_path)
    assert list(dense) == ["perplexity", "passkey"] and dense["perplexity"][-2:] == ["--mode", "dense"]
    before = evaluations(ARGS, "dense", 0, tmp_path)
    assert list(before) == list(kinds) and before["routing"][2:4] == ["--run-dir", Path("/out/imported")]


def test_questions_are_asked_of_pages_that_there_are(tmp_path):
    args = Namespace(**{**vars(ARGS), "output": tmp_path})
    assert write_questions([str(tmp_path)], tmp_path / TASK) == 0
    assert "tasks" not in evaluations(args, "recipe_8", 30, tmp_path)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "heapq.rst.txt").write_text("heapify makes a heap. " * 1000)
    assert write_questions([str(tmp_path)], tmp_path / TASK) == 1
    (item,) = read_items(tmp_path / TASK, {}, {}, None)
    assert item.answers == ("heapify",) and item.kind.metrics[0].name == "match_part" and len(item.context) == 3001
    assert item.question.startswith("\nQuestion: Which function") and item.opening == "Answer:"
    tasks = evaluations(args, "recipe_8", 30, tmp_path)["tasks"]
    assert tasks[tasks.index("--tasks") + 1] == tmp_path / TASK
    assert tasks[-5:] == ["dense", "forget", "recall", "--chunk-sizes", "8"]


def test_the_table_has_what_was_evaluated(tmp_path):
    bucket = {"from": 1, "to": 64, "nats": 1.5}
    entry = lambda name, mode, perplexity: {"name": name, "mode": mode, "perplexity": perplexity, "buckets": [bucket]}
    write = lambda kind, results: (tmp_path / f"{kind}.json").write_text(json.dumps({"results": results}))
    write("perplexity", [entry("recall 8", "recall", 6.0)])
    write("routing", [{"overall": {"far_coverage_0": 0.75}}])
    results = {
        "before": {},  # its time was up
        "dense 10": {"arm": "dense", "raw_tokens": 40, "perplexity": [entry("dense", "dense", 5.0)]},
        "recipe_8 10": {"arm": "recipe_8", "raw_tokens": 40, **findings(tmp_path)},
    }
    assert table(results)[2:] == [
        "| dense | 40 | dense | 5.000 | 1.000 | 1.500 | - |",
        "| recipe_8 | 40 | recall 8 | 6.000 | 1.200 | 1.500 | 0.750 |",
    ]
    assert table({"before": {}}) == ["nothing was evaluated"]
