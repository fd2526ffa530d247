"""Hugging Face -> ours -> Hugging Face, and once more by way of transformers: nothing is forgotten on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.integration.hugging_face import TEXT, write_directory, write_model
from tests.integration.test_export import generated
from tests.versions import NEWEST, OLDEST, environment_of
from unfold.model.config import GistConfig
from unfold.model.decode.generation import Decoder, Sampling
from unfold.model.hf import remote
from unfold.pretrain.checkpoint.load import find_run, load_run
from unfold.pretrain.checkpoint.resume import prepare_run_dir
from unfold.pretrain.command import main
from unfold.pretrain.hf.directory import read_gists
from unfold.pretrain.hf.exportable import export_objections

ENDS = ("<|endoftext|>", "<|eom|>", "<|eot|>")
GISTS = {"recall": "all", "sink": 5, "topk": 2, "share": "group", "own_group": True, "recall_from": 2}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}


def json_of(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


def edit(directory: Path, name: str, **changes) -> None:
    path = directory / name
    (path).write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def command(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model as published ones are: in bf16, several tokens that end a text, sampling settings, chat templates."""
    directory = tmp_path_factory.mktemp("source") / "hf"
    torch.manual_seed(0)
    model = write_directory(directory, "llama", gists=ENDS[1:], num_hidden_layers=3)
    (directory / "model.safetensors.index.json").unlink()
    model.bfloat16().save_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ENDS]
    edit(directory, "generation_config.json", eos_token_id=ids, **SAMPLING)
    edit(directory, "config.json", eos_token_id=ids)
    names = ["input_ids", "attention_mask"]
    edit(directory, "tokenizer_config.json", extra_special_tokens=[ENDS[2]], model_input_names=names, padding_side="left")
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0].content }}")
    return directory


@pytest.fixture(scope="module")
def exported(source) -> Path:
    """Imported, with gist settings that are no defaults, and exported."""
    root = source.parent
    command("import", "--input", source, "--output", root / "run", "--chunk-sizes", "4,2")
    for path in (root / "run" / "checkpoints").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["config"]["gist"] |= GISTS
        path.write_text(json.dumps(manifest))
    command("export", "--run-dir", root / "run", "--output", root / "exported")
    return root / "exported"


def test_what_a_source_says_stands_in_the_export(source, exported):
    ends = json_of(source, "generation_config.json")["eos_token_id"]
    generation, config = json_of(exported, "generation_config.json"), json_of(exported, "config.json")
    assert generation["eos_token_id"] == config["eos_token_id"] == ends and len(ends) == 3
    assert {key: generation[key] for key in SAMPLING} == SAMPLING
    assert config["dtype"] == config["torch_dtype"] == "bfloat16", "the export of what was not trained keeps its type"
    settings = json_of(exported, "tokenizer_config.json")
    assert settings["extra_special_tokens"] == [ENDS[2]] and settings["padding_side"] == "left"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (exported / name).read_text() == (source / name).read_text()
    hashes = json_of(exported, "export_proof.json")["files"]
    assert {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()} == {*hashes, "export_proof.json"}
    from transformers import AutoTokenizer

    chats = AutoTokenizer.from_pretrained(exported)
    message = [{"role": "user", "content": "a"}]
    assert chats.apply_chat_template(message, chat_template="tool_use", tokenize=False) == "tools: a"


def test_an_export_comes_back_with_its_gists(exported, tmp_path):
    command("import", "--input", exported, "--output", tmp_path / "run")
    gist = find_run(tmp_path / "run", None).config.gist
    assert gist == GistConfig((4, 2), **GISTS)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["gist"]
    assert written == {"chunk_sizes": [4, 2], **GISTS}
    command("export", "--run-dir", tmp_path / "run", "--output", tmp_path / "again")
    assert json_of(tmp_path / "again", "config.json")["gist"] == json_of(exported, "config.json")["gist"]
    older = json_of(exported, "config.json")["gist"]
    for name in ("own_group", "recall_from", "unfold_all"):  # as exports were written before there were these settings
        del older[name]
    shutil.copytree(exported, tmp_path / "older")
    edit(tmp_path / "older", "config.json", gist=older)
    kept = {name: value for name, value in GISTS.items() if name in older}
    assert read_gists(tmp_path / "older", json_of(tmp_path / "older", "config.json")) == GistConfig((4, 2), **kept)
    command("import", "--input", exported, "--output", tmp_path / "other", "--chunk-sizes", "8")
    gist = find_run(tmp_path / "other", None).config.gist
    assert (gist.chunk_sizes, gist.recall, gist.sink) == ((8,), "all", 5), "only what was asked for is another"


def test_chunks_of_one_length_come_back(exported, tmp_path):
    """Such an export has no bitmap of word starts, and says so; others say nothing of it, as they always did."""
    command("import", "--input", exported, "--output", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["config"]["gist"]["word_aware"] = False
        path.write_text(json.dumps(manifest))
    command("export", "--run-dir", tmp_path / "run", "--output", tmp_path / "exact")
    plain, exact = (json_of(directory, "config.json")["gist"] for directory in (exported, tmp_path / "exact"))
    assert "word_aware" not in plain
    del plain["word_starts"]
    assert exact == plain | {"word_aware": False}
    command("import", "--input", tmp_path / "exact", "--output", tmp_path / "again")
    again = find_run(tmp_path / "again", None)
    assert again.config.gist == GistConfig((4, 2), **GISTS, word_aware=False) and len(again.tokenizer.word_starts)


@pytest.mark.parametrize(
    "name,changes,message",
    [
        ("config.json", {"gist": {"chunk_sizes": [4, 2], "magic": 1}}, "magic: not known to this version of unfold"),
        ("config.json", {"gist": {"chunk_sizes": [0]}}, "is no gist setting"),
        ("config.json", {"gist": {"chunk_sizes": [4, 2], "token_ids": [1, 2]}}, "gist.token_ids is [1, 2], but the tokenizer's"),
        ("generation_config.json", {"eos_token_id": [3, 9999]}, "generation_config.json: eos_token_id 9999 is not an id"),
    ],
)
def test_what_does_not_fit_is_refused(exported, tmp_path, capsys, name, changes, message):
    shutil.copytree(exported, tmp_path / "hf")
    edit(tmp_path / "hf", name, **changes)
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said


def test_generate_stops_at_every_end(source, tmp_path):
    command("import", "--input", source, "--output", tmp_path / "run", "--chunk-sizes", "4,2")
    run = load_run(tmp_path / "run", None)
    assert len(run.tokenizer.stop_ids) == 3 and run.tokenizer.stop_ids[0] == run.tokenizer.eos_id
    decoder = Decoder(run.model, run.config.gist, run.tokenizer.reserved_ids, run.tokenizer.word_starts, grow=True)
    sequence = decoder.start()
    decoder.read_context(sequence, run.tokenizer.tokenizer().encode(TEXT, add_special_tokens=False).ids, close=False)
    ((_, first),) = decoder.stream([sequence], Sampling(1))
    edit(tmp_path / "run" / "tokenizer", "generation_config.json", eos_token_id=[5, first])
    assert generated("--run-dir", tmp_path / "run", "--prompt", TEXT, "--max-new-tokens", 6) == TEXT


def saved_with_gists(exported: Path, target: Path) -> None:
    loaded(exported, trust_remote_code=True, attn_implementation="gist").save_pretrained(target)


def saved_dense(exported: Path, target: Path) -> None:
    """Its config.json still names code, which is not there: the page on Hugging Face says what to copy."""
    loaded(exported).save_pretrained(target)


def saved_with_lora_merged(exported: Path, target: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = loaded(exported, trust_remote_code=True, attn_implementation="gist")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload().save_pretrained(target)


def loaded(directory: Path, **how):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **how)


@pytest.mark.parametrize("save", [saved_with_gists, saved_dense, saved_with_lora_merged], ids=lambda f: f.__name__)
def test_saved_again_by_transformers(save, exported, tmp_path, capsys):
    """Import and evaluation take what a fine-tuning with transformers leaves."""
    from transformers import AutoTokenizer

    tuned = tmp_path / "tuned"
    save(exported, tuned)
    AutoTokenizer.from_pretrained(exported).save_pretrained(tuned)
    assert (tuned / "modeling_gist.py").exists() == (save is not saved_dense)
    assert json_of(tuned, "config.json")["architectures"] == ["LlamaForCausalLM"]
    command("import", "--input", tuned, "--output", tmp_path / "run")
    before, after = find_run(exported.parent / "run", None), find_run(tmp_path / "run", None)
    assert after.config.gist == before.config.gist and after.config.model == before.config.model
    assert after.tokenizer.gist_ids == before.tokenizer.gist_ids and after.tokenizer.stop_ids == before.tokenizer.stop_ids
    weights = [load_run(root / "run", None).model.layers[0].attention.qkv.weight for root in (exported.parent, tmp_path)]
    assert torch.equal(*weights) == (save is not saved_with_lora_merged)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT * 12}) + "\n")
    what = ("--data", tmp_path / "text.jsonl", "--length", 64, "--mode", "forget", "--output", tmp_path / "out")
    command("evaluate", "perplexity", "--model", tuned, *what)
    assert "forget 4,2" in capsys.readouterr().out


# What a family's own tokenizer class would alter: composed characters, its way to split numbers and words.
AWKWARD = ("e\u0301 \ufb01", "it's 1234", "don't DON'T", "  two\n\n x")
READ = """
import json, sys
from tokenizers import Tokenizer
from transformers import AutoTokenizer
ours, texts = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json"), json.loads(sys.argv[2])
want = [ours.encode(text, add_special_tokens=False).ids for text in texts]
for trust in (False, True):
    theirs = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)
    assert len(theirs) == ours.get_vocab_size(), len(theirs)
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == want
"""


@pytest.fixture(scope="module")
def bytes_as_qwen(tmp_path_factory) -> Path:
    """An export as Qwen2 whose tokenizer is byte-level, has no unknown token, and is not Qwen's."""
    root = tmp_path_factory.mktemp("bytes")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    write_model(root / "hf", "qwen 2", tokenizer.get_vocab_size())
    tokenizer.save(str(root / "hf" / "tokenizer.json"))
    edit(root / "hf", "tokenizer_config.json", eos_token="<|end|>")
    command("import", "--input", root / "hf", "--output", root / "run", "--chunk-sizes", "4,2")
    command("export", "--run-dir", root / "run", "--output", root / "out")
    return root / "out"


@pytest.mark.parametrize("version", ["pinned", OLDEST, NEWEST])
def test_a_tokenizer_is_read_as_it_was_written(bytes_as_qwen, version, tmp_path):
    assert json_of(bytes_as_qwen, "config.json")["architectures"] == ["Qwen2ForCausalLM"]
    environment = os.environ | {"HF_HOME": str(tmp_path)} if version == "pinned" else environment_of(version)
    command = [sys.executable, "-c", READ, str(bytes_as_qwen), json.dumps(AWKWARD)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_would_make_an_export_impossible_is_told_before_training(exported, tmp_path, capsys):
    run = find_run(exported.parent / "run", None)
    config, info = run.config, run.tokenizer
    assert export_objections(config.model, config.gist, info) == []
    shutil.copytree(info.directory, tmp_path / "tok")
    edit(tmp_path / "tok", "tokenizer_config.json", extra_special_tokens=["<|of another vocabulary|>"])
    info = dataclasses.replace(info, directory=tmp_path / "tok")
    prepare_run_dir(tmp_path / "new", config, info)
    said = capsys.readouterr().err
    assert f"note: this run could not be exported: the reloaded tokenizer has {info.vocab_size + 1} ids" in said
    prepare_run_dir(tmp_path / "new", config, info)
    assert "exported" not in capsys.readouterr().err, "once is enough"


def test_gist_settings_that_exports_do_not_know_are_not_left_out(monkeypatch, exported):
    """A setting that this version trains with and the shipped code would not follow."""
    run = find_run(exported.parent / "run", None)
    old = dataclasses.make_dataclass("Old", ["chunk_sizes", *GISTS.keys() - {"sink"}])
    monkeypatch.setattr(remote, "GistSettings", old)
    assert remote.unknown_settings(run.config.gist) == ["sink"]
    said = export_objections(run.config.model, run.config.gist, run.tokenizer)
    assert said == ["gist.sink: the code that exports ship does not know it"]
    with pytest.raises(ValueError, match="gist.sink: 5; the code that exports ship does not know it"):
        remote.config_entries("LlamaForCausalLM", run.config.gist, (1, 2), (1, 2), run.tokenizer.word_starts)


def test_an_adapter_alone_is_named(exported, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["import", "--input", str(tmp_path / "adapter"), "--output", str(tmp_path / "run")]) == 1
    assert "holds an adapter (adapter_config.json), not a model; save it merged" in capsys.readouterr().err


@pytest.mark.parametrize("kind,name", [("GistLlamaForCausalLM", "llama"), ("GistQwen2ForCausalLM", "qwen 2")])
def test_published_gist_models(kind, name, tmp_path, capsys):
    """Their architecture is that of the stock model, their gists are levels 0, 1 and 2, their links are never generated."""
    names = ("<gist>", "<Gist>", "<MGist>", "<link2>", "<link1>")
    theirs = write_directory(tmp_path / "hf", name, gists=names)
    edit(tmp_path / "hf", "config.json", architectures=[kind])
    command("import", "--input", tmp_path / "hf", "--output", tmp_path / "run", "--gist-levels", 3)
    size = theirs.config.vocab_size
    assert f"gist ids {size - 5}, {size - 4}, {size - 3} are in the vocabulary already; their rows" in capsys.readouterr().err
    tokenizer = find_run(tmp_path / "run", None).tokenizer
    assert tokenizer.gist_ids == (size - 5, size - 4, size - 3) and tokenizer.link_ids == (size - 1, size - 2)
    command("export", "--run-dir", tmp_path / "run", "--output", tmp_path / "out")
    assert json_of(tmp_path / "out", "config.json")["architectures"] == [kind.removeprefix("Gist")]
    suppressed = json_of(tmp_path / "out", "generation_config.json")["suppress_tokens"]
    reserved = [*tokenizer.gist_ids, *tokenizer.link_ids]
    assert suppressed == json_of(tmp_path / "out", "config.json")["gist"]["reserved_ids"] == reserved


@pytest.mark.parametrize(
    "gists,message",
    [
        (["<Gist>"], "has <Gist>, the gist of level 1, but none of level 0 (<gist0> or <gist>)"),
        (["<gist0>", "<gist>"], "both names of the gist of level 0"),
    ],
)
def test_gists_that_cannot_be_told_apart_are_refused(gists, message, tmp_path, capsys):
    write_directory(tmp_path / "hf", "llama")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(g, normalized=False, special=True) for g in gists])
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    assert main(["import", "--input", str(tmp_path / "hf"), "--output", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
