"""Models with windows from Hugging Face and back, with gists and without; every export proves itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.hugging_face import write_directory
from unfold.pretrain.checkpoint.load import find_run
from unfold.pretrain.command import main
from unfold.pretrain.config import load_config


def command(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


def keys_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "hf"
    write_directory(directory, "qwen 3, windows")
    return directory


def test_windows_without_gists_come_back_as_the_same_keys(source, tmp_path):
    command("import", "--input", source, "--output", tmp_path / "run", "--gist-levels", 0)
    model = find_run(tmp_path / "run", None).config.model
    assert (model.attention, model.layer_attention) == ("dense", ("window:20", "window:20", "dense"))
    command("export", "--run-dir", tmp_path / "run", "--output", tmp_path / "back")
    before, after = keys_of(source), keys_of(tmp_path / "back")
    for name in ("sliding_window", "use_sliding_window", "layer_types"):
        assert after[name] == before[name], name


def test_gists_beside_windows_come_back_with_their_kinds(source, tmp_path, capsys):
    command("import", "--input", source, "--output", tmp_path / "run", "--chunk-sizes", "4,2")
    assert "the others keep their window (window:20), and see sinks (gist.sink)" in capsys.readouterr().err
    kinds = ("window:20", "window:20", "gist")
    assert find_run(tmp_path / "run", None).config.model.layer_attention == kinds
    assert load_config(tmp_path / "run" / "config.yaml").model.layer_attention == kinds
    command("export", "--run-dir", tmp_path / "run", "--output", tmp_path / "back")
    keys = keys_of(tmp_path / "back")
    assert keys["gist"]["layer_attention"] == list(kinds) and keys["sliding_window"] is None
    command("import", "--input", tmp_path / "back", "--output", tmp_path / "again")
    assert find_run(tmp_path / "again", None).config.model == find_run(tmp_path / "run", None).config.model
    keys["gist"]["layer_attention"] = ["gists"]
    (tmp_path / "back" / "config.json").write_text(json.dumps(keys))
    assert main(["import", "--input", str(tmp_path / "back"), "--output", str(tmp_path / "bad")]) == 1
    assert "gist.layer_attention: 'gists' is not one of gist, dense, window:N" in capsys.readouterr().err


def test_where_every_layer_has_a_window_all_become_gist_layers(tmp_path, capsys):
    write_directory(tmp_path / "hf", "mistral, window")
    command("import", "--input", tmp_path / "hf", "--output", tmp_path / "run")
    assert "every layer has a window (window:9); all become gist layers" in capsys.readouterr().err
    assert find_run(tmp_path / "run", None).config.model.layer_kinds == ["gist", "gist"]
