"""Generation from a Hugging Face directory that is not whole: one line, no traceback."""

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.integration.hugging_face import write_directory
from unfold.pretrain.command import main
from unfold.pretrain.hf.directory import UNFINISHED


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "hf"
    directory.mkdir()
    write_directory(directory, shard_size="10MB")
    return directory


def test_a_whole_one_is_continued(whole, capsys):
    assert main(["generate", "--model", str(whole), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize(
    "damage,message",
    [
        ("unfinished", "was not written to its end"),
        ("config", "config.json: cannot be read"),
        ("kind", "transformers cannot load its model .*nonsense"),
        ("tokenizer", "holds no tokenizer.json, nor another tokenizer"),
        ("words", "transformers cannot load its tokenizer"),
        ("weights", "transformers cannot load its model .*no file named"),
        ("cut", "transformers cannot load its model .*incomplete"),
        ("lacking", "its files hold no model.norm.weight as config.json describes it"),
    ],
)
def test_a_damaged_export_is_told_in_one_line(whole, tmp_path, damage, message, capsys):
    hf = shutil.copytree(whole, tmp_path / "hf")
    weights, config = hf / "model.safetensors", hf / "config.json"
    match damage:
        case "unfinished":
            (hf / UNFINISHED).touch()
        case "config":
            config.write_text("{")
        case "kind":
            config.write_text(config.read_text().replace('"llama"', '"nonsense"'))
        case "tokenizer":
            for name in ("tokenizer.json", "tokenizer.model"):
                (hf / name).unlink(missing_ok=True)
        case "words":
            (hf / "tokenizer.json").write_text("{")
        case "weights":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:10000])
        case "lacking":
            tensors = load_file(weights)
            del tensors["model.norm.weight"]
            save_file(tensors, weights, {"format": "pt"})
    assert main(["generate", "--model", str(hf), "--prompt", "a", "--max-new-tokens", "2"]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and str(hf) in told and re.search(message, told)
