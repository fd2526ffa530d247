"""Hugging Face directories -> checkpoints -> Hugging Face directories, and what is refused on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import module, run
from tests.integration.hugging_face import TEXT, write_directory, write_model, write_tokenizer
from tests.integration.runs import run_to_end, train
from tests.model.families import MODELS
from tests.versions import NEWEST, OLDEST, environment_of
from unfold.model.gist import build_layout
from unfold.model.visibility import MicroBatchAttention
from unfold.pretrain.checkpoint.load import find_run, load_model, load_run
from unfold.pretrain.checkpoint.tensors import TensorDirectory
from unfold.pretrain.command import main
from unfold.pretrain.config import load_config
from unfold.pretrain.hf.export_weights import write_weights
from unfold.pretrain.hf.import_weights import WeightFiles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def no_gists(tmp_path_factory) -> Path:
    """The tokenizer of the tests' models as a tokenizer directory of ours, nothing appended."""
    return _adopted(tmp_path_factory.mktemp("none"), 0)


@pytest.fixture(scope="module")
def four_gists(tmp_path_factory) -> Path:
    return _adopted(tmp_path_factory.mktemp("four"), 4)


def _adopted(root: Path, levels: int) -> Path:
    write_tokenizer(root / "hf")
    module("data_prep", "import-tokenizer", "--input", root / "hf", "--output", root / "ours", "--gist-levels", levels)
    return root / "ours"


def import_model(source: Path, output: Path, *options) -> Path:
    assert main(["import", "--input", str(source), "--output", str(output), *map(str, options)]) == 0
    return output


def dense_logits(model, ids: torch.Tensor) -> torch.Tensor:
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), None)
    attend = MicroBatchAttention(model.config.kinds_with(gists=False), layout)
    with torch.no_grad():
        return model.head_logits(model.run_layers(ids, layout.position, attend)).transpose(0, 1)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(directory)
    return {name: files.read(name) for name in files.shapes}


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_keeps_every_bit_and_the_logits(name, no_gists, tmp_path):
    theirs = write_directory(tmp_path / "hf", name)
    run_dir = import_model(tmp_path / "hf", tmp_path / "run", "--tokenizer", no_gists, "--gist-levels", 0)
    found = find_run(run_dir, None)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 90), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = theirs(ids).logits
        # fp32 rounds in proportion to the logits: the bound is that of an export's proof.
        assert (dense_logits(load_model(found), ids) - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    (tmp_path / "back").mkdir()
    write_weights(TensorDirectory(found.directory), found.config.model, torch.float32, tmp_path / "back", "30KB")
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("name", ["llama", "qwen 2"])
def test_new_gists_get_the_mean_and_spare_rows_go(name, four_gists, tmp_path, capsys):
    """Rows beyond the tokenizer's ids, as Qwen has them, were never trained: they count for nothing."""
    theirs = write_directory(tmp_path / "hf", name, spare=30)
    run_dir = import_model(tmp_path / "hf", tmp_path / "run", "--tokenizer", four_gists, "--chunk-sizes", "4,2")
    said = capsys.readouterr().err
    known = theirs.config.vocab_size - 30
    assert f"gist ids {known}, {known + 1}, {known + 2}, {known + 3} are new: the mean" in said
    assert f"rows from {known + 4} to {known + 29} of the embedding have no token and are left out" in said
    loaded = load_run(run_dir, None)
    assert loaded.config.model.vocab_size == known + 4 and loaded.config.gist.chunk_sizes == (4, 2)
    ours = {"embedding.weight": EMBEDDING} | ({} if loaded.config.model.tied_embeddings else {"head.weight": HEAD})
    for our_name, their_name in ours.items():
        rows, source = dict(loaded.model.named_parameters())[our_name].detach(), theirs.state_dict()[their_name]
        assert torch.equal(rows[:known], source[:known])
        assert torch.allclose(rows[known : known + 4], source[:known].mean(0).expand(4, -1), atol=1e-6)
        assert not rows[known + 4 :].any()


def test_new_links_get_the_mean_too(tmp_path, capsys):
    theirs = write_directory(tmp_path / "hf", "qwen 2")
    run_dir = import_model(tmp_path / "hf", tmp_path / "run", "--chunk-sizes", "4,2", "--links", 3)
    known = theirs.config.vocab_size
    assert f"link ids {known + 4}, {known + 5}, {known + 6} are new: the mean" in capsys.readouterr().err
    loaded = load_run(run_dir, None)
    assert loaded.tokenizer.link_ids == (known + 4, known + 5, known + 6) and loaded.config.gist.links == 3
    rows = loaded.model.embedding.weight[known : known + 7].detach()
    assert torch.allclose(rows, theirs.state_dict()[EMBEDDING].mean(0).expand(7, -1), atol=1e-6)
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "x"), "--links", "-1"]) == 1
    assert "--links -1: is below 0" in capsys.readouterr().err


def test_given_rows_of_gists(four_gists, tmp_path, capsys):
    write_directory(tmp_path / "hf", "qwen 2")
    rows = {name: torch.randn(4, 48) for name in ("embedding", "head")}
    save_file(rows, tmp_path / "rows.safetensors")
    options = ("--tokenizer", four_gists, "--gist-rows", tmp_path / "rows.safetensors")
    model = load_run(import_model(tmp_path / "hf", tmp_path / "run", *options), None).model
    size = model.config.vocab_size
    assert torch.equal(model.embedding.weight[size - 4 : size], rows["embedding"])
    assert torch.equal(model.head.weight[size - 4 : size], rows["head"])
    save_file({"embedding": rows["embedding"]}, tmp_path / "rows.safetensors")
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "x"), *map(str, options)]) == 1
    assert "holds embedding, expected embedding, head" in capsys.readouterr().err
    save_file({"embedding": rows["embedding"][:2], "head": rows["head"]}, tmp_path / "rows.safetensors")
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "x"), *map(str, options)]) == 1
    assert "embedding is [2, 48], expected [4, 48], one row per new gist" in capsys.readouterr().err


def test_gists_of_published_models_are_used(tmp_path, capsys):
    """The vocabulary holds trained gists under the names of earlier models; the tokenizer is adopted on the way."""
    theirs = write_directory(tmp_path / "hf", "llama", gists=("<gist>", "<Gist>"))
    run_dir = import_model(tmp_path / "hf", tmp_path / "run", "--gist-levels", 2)
    size = theirs.config.vocab_size
    assert f"gist ids {size - 2}, {size - 1} are in the vocabulary already; their rows are used" in capsys.readouterr().err
    loaded = load_run(run_dir, None)
    assert loaded.tokenizer.gist_ids == (size - 2, size - 1) and loaded.config.model.vocab_size == size
    assert torch.equal(loaded.model.embedding.weight[:size], theirs.state_dict()[EMBEDDING])


def test_weights_keep_their_type_and_the_configuration_is_ready(four_gists, tmp_path):
    theirs = write_directory(tmp_path / "fp32", "qwen 3, biases, yarn")
    theirs.bfloat16().save_pretrained(tmp_path / "hf")
    run_dir = import_model(tmp_path / "hf", tmp_path / "run", "--tokenizer", four_gists)
    names = TensorDirectory(run_dir / "checkpoints" / "step-00000000")
    assert {names.dtype(name) for name in names.shapes} == {torch.bfloat16}
    config = load_config(run_dir / "config.yaml", ["data.train=[x]"])
    assert config.train.init_from == str(run_dir) and config.data.tokenizer == str(run_dir / "tokenizer")
    assert config.model == find_run(run_dir, None).config.model and config.gist.chunk_sizes == (8, 4)
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["model"]["qk_norm"] is True and written["gist"] == {"chunk_sizes": [8, 4]}
    wide = import_model(tmp_path / "hf", tmp_path / "wide", "--tokenizer", four_gists, "--dtype", "fp32")
    names = TensorDirectory(wide / "checkpoints" / "step-00000000")
    assert {names.dtype(name) for name in names.shapes} == {torch.float32}


@pytest.fixture(scope="module")
def imported(tiny, tmp_path_factory) -> Path:
    """A Qwen3 with the tokenizer of the tiny shards."""
    root = tmp_path_factory.mktemp("imported")
    shutil.copytree(tiny.tokenizer, root / "hf")
    write_model(root / "hf", "qwen 3, biases, yarn", 512, num_hidden_layers=4)
    return import_model(root / "hf", root / "run", "--tokenizer", tiny.tokenizer, "--chunk-sizes", "4,2")


LAYOUTS = {
    "tp2 sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2 pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=1"]),
    "zero3": (2, ["parallel.zero=3"]),
    "pp2": (2, ["parallel.pipeline=2", "parallel.zero=1"]),
}


@pytest.fixture(scope="module")
def alone(tiny, imported, tmp_path_factory) -> list[dict]:
    """The losses of one process that goes on from the imported weights."""
    return train(imported / "config.yaml", tmp_path_factory.mktemp("alone") / "run", 1, *_settings(tiny))


def _settings(tiny) -> list[str]:
    # The steps are large enough to show in the second loss; the first one is that of the imported weights.
    return [f"data.train=[{tiny.train}]", "data.raw_tokens=64", "train.steps=2", "train.global_batch=2", "precision=fp32",
            "optimizer.lr=1e-3", "monitor.wandb=false"]  # fmt: skip


@pytest.mark.parametrize("layout", ["tp2 sequence", *(pytest.param(n, marks=pytest.mark.long) for n in list(LAYOUTS)[1:])])
def test_every_layout_goes_on_from_it(layout, tiny, imported, alone, tmp_path):
    ranks, settings = LAYOUTS[layout]
    metrics = train(imported / "config.yaml", tmp_path / "run", ranks, *_settings(tiny), *settings)
    for got, want in zip(metrics, alone, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * want["loss"]
        assert abs(got["grad_norm"] - want["grad_norm"]) <= 1e-5 * want["grad_norm"]


def test_the_first_loss_is_that_of_the_imported_weights(imported, alone):
    """Fresh weights know nothing: their loss is ln 512 = 6.2."""
    model = load_run(imported, None)
    weights = dict(model.model.named_parameters())
    source = tensors(imported.parent / "hf")
    assert torch.equal(weights["embedding.weight"][:512], source[EMBEDDING])
    assert torch.equal(weights["layers.3.attention.q_norm.weight"], source["model.layers.3.self_attn.q_norm.weight"])
    assert alone[0]["loss"] > math.log(512) + 0.5, "these weights are confidently wrong, fresh ones are not"


def test_a_run_is_not_begun_in_the_imported_directory(tiny, imported):
    done = run_to_end(imported / "config.yaml", imported, 1, *_settings(tiny), check=False)
    assert done.returncode == 1 and "use a new run directory" in done.stderr and "Traceback" not in done.stderr


def _edit(name: str, **changes):
    def edit(directory: Path) -> None:
        keys = json.loads((directory / name).read_text())
        keys |= changes
        (directory / name).write_text(json.dumps(keys))

    return edit


def _rewrite(change):
    def rewrite(directory: Path) -> None:
        state = tensors(directory)
        for path in directory.glob("model*"):
            path.unlink()
        change(state)
        save_file(state, directory / "model.safetensors")

    return rewrite


def _truncate(directory: Path) -> None:
    path = next(directory.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-100])


def _only_bin(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").touch()


REFUSED = {
    "missing shard": (lambda d: next(d.glob("model-00002*")).unlink(), "model.safetensors.index.json is missing; copy"),
    "cut shard": (_truncate, "model-00002-of-"),
    "no safetensors": (_only_bin, "neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin cannot be read"),
    "damaged index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json: is damaged (KeyError"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read"),
    "experts": (_edit("config.json", architectures=["MixtralForCausalLM"]), "'MixtralForCausalLM'] is not supported; supported"),
    "window": (_edit("config.json", sliding_window=16), "sliding_window: 16, but a llama has none; set it to null"),
    "shape": (_edit("config.json", intermediate_size=44), "mlp.gate_proj.weight is [40, 48], config.json asks for [44, 48]"),
    "layers": (_edit("config.json", num_hidden_layers=3), "lacks model.layers.2.input_layernorm.weight and 8 more"),
    "surplus": (_rewrite(lambda s: s.update({"model.layers.0.mlp.experts.0.w1.weight": torch.zeros(2)})),
                "holds model.layers.0.mlp.experts.0.w1.weight, which a model of this architecture does not have"),
    "not tied": (_rewrite(lambda s: s.update({HEAD: s[EMBEDDING] + 1})), "but lm_head.weight differs from model.embed_tokens"),
    "type": (_rewrite(lambda s: s.update({"model.norm.weight": s["model.norm.weight"].double()})), "model.norm.weight is F64"),
    "vocabulary": (_edit("config.json", vocab_size=400), "embed_tokens.weight is [280, 48], config.json asks for [400, 48]"),
    "unfinished": (lambda d: (d / "UNFINISHED").touch(), "was not written to its end"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "hf"
    write_directory(directory)
    return directory


@pytest.mark.parametrize("case", REFUSED)
def test_bad_directories_are_refused_in_one_line(case, sound, four_gists, tmp_path, capsys):
    change, message = REFUSED[case]
    shutil.copytree(sound, tmp_path / "hf")
    change(tmp_path / "hf")
    code = main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--tokenizer", str(four_gists)])
    said = capsys.readouterr().err.strip()
    assert code == 1 and said.startswith("error: ") and "\n" not in said and message in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"], "nothing is left behind"


def test_tokenizers_that_do_not_fit_are_refused(sound, four_gists, tiny, tmp_path, capsys):
    def refused(*options, source=sound) -> str:
        assert main(["import", "--input", str(source), "--output", str(tmp_path / "out"), *map(str, options)]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "does not belong to" in refused("--tokenizer", tiny.tokenizer)
    assert "has 4 gist ids; make it with --gist-levels 5" in refused("--tokenizer", four_gists, "--gist-levels", 5)
    assert "--chunk-sizes 8,4: 2 levels, but --gist-levels is 1" in refused("--chunk-sizes", "8,4", "--gist-levels", 1)
    assert "--chunk-sizes 8;4: expected numbers such as 8,4" in refused("--chunk-sizes", "8;4")
    write_directory(tmp_path / "short", spare=-10)
    short = refused("--tokenizer", four_gists, source=tmp_path / "short")
    assert "vocab_size is 270, but the tokenizer beside it has 280 ids" in short
    shutil.copytree(sound, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    assert "holds neither tokenizer.json nor tokenizer.model; or give --tokenizer" in refused(source=tmp_path / "bare")
    assert "it belongs to another model" in refused("--tokenizer", tiny.tokenizer, source=tmp_path / "bare")
    (tmp_path / "out").mkdir()
    assert "out: exists; name a new directory" in refused()


READ = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
text, tokens = json.loads(sys.argv[2])
for name, directory in json.loads(sys.argv[1]).items():
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    how = dict(trust_remote_code=True, attn_implementation="gist", dtype=torch.float32)
    gist = AutoModelForCausalLM.from_pretrained(directory, **how)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        np.savez(directory + ".npz", version=transformers.__version__, ids=tokenizer.encode(text), dense=model(ids).logits,
                 gist=gist(ids, gist_query_start=40).logits, kind=type(model).__name__)
"""


@pytest.mark.long
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_other_versions_of_transformers_give_the_same(version, four_gists, tmp_path):
    """Every family, exported here, is read by others than the pinned one: the same ids and logits, dense and with gists."""
    other = environment_of(version)
    exports = {}
    for i, name in enumerate(MODELS):
        write_directory(tmp_path / f"hf{i}", name)
        run_dir = import_model(tmp_path / f"hf{i}", tmp_path / f"run{i}", "--tokenizer", four_gists, "--chunk-sizes", "4,2")
        assert main(["export", "--run-dir", str(run_dir), "--output", str(tmp_path / f"out{i}"), "--dtype", "fp32"]) == 0
        exports[name] = str(tmp_path / f"out{i}")
    tokens = np.random.default_rng(1).integers(0, 270, 60).tolist()
    arguments = [json.dumps(exports), json.dumps([TEXT, tokens])]
    results = {}
    for who, environment in (("other", other), ("pinned", os.environ)):
        done = run(sys.executable, "-c", READ, *arguments, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        results[who] = {name: dict(np.load(f"{directory}.npz")) for name, directory in exports.items()}
    assert {str(r["version"]) for r in results["other"].values()} != {str(r["version"]) for r in results["pinned"].values()}
    for name in exports:
        old, new = results["other"][name], results["pinned"][name]
        assert old["kind"] == new["kind"] and old["ids"].tolist() == new["ids"].tolist()
        for what in ("dense", "gist"):
            assert np.abs(old[what] - new[what]).max() <= 1e-5, (name, what)
