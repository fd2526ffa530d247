"""Export, reload with transformers, generation."""

import dataclasses
import json
import warnings

import pytest
import torch

from model.config import ModelConfig
from model.hf.names import entries, from_hugging_face, to_hugging_face
from tests.conftest import module
from tests.integration.runs import train

PROMPT = "Fellow-Citizens of the Senate"


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A run on two tensor-parallel ranks with untied embeddings, so that export has something to put together."""
    root = tmp_path_factory.mktemp("export")
    config = tiny.config(root / "c.yaml", model={"tied_embeddings": False})
    train(config, root / "run", 2, "parallel.tensor=2", "train.steps=6")
    return root / "run"


@pytest.fixture(scope="module")
def exported(run_dir):
    output = run_dir.parent / "hf"
    module("pretrain", "export", "--run-dir", run_dir, "--output", output)
    return output


def test_transformers_loads_it_without_a_word(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(exported)
    assert not any(info.values())
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.vocab_size == len(tokenizer) == 512
    proof = json.loads((exported / "export_proof.json").read_text())
    assert proof["largest_logit_difference"] <= 1e-4


def test_logits_equal_those_of_the_training_model(exported, run_dir):
    """Not by the export's own proof: the checkpoint is read again, here, and compared on real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.gist import GistConfig, build_layout
    from model.transformer import Transformer
    from pretrain.load import load_run

    run = load_run(run_dir, None)
    ids = torch.tensor([AutoTokenizer.from_pretrained(exported).encode("The state of the Union is strong. " * 8)])
    dense = Transformer(dataclasses.replace(run.config.model, attention="dense"), run.model.build).eval()
    dense.load_state_dict(run.model.state_dict())
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported)(ids).logits
    assert (theirs - dense.logits(ids, layout)).abs().max() <= 1e-4


def test_generation_from_both(exported, run_dir):
    ours = module("pretrain", "generate", "--run-dir", run_dir, "--prompt", PROMPT, "--max-new-tokens", 12).stdout
    theirs = module("pretrain", "generate", "--model", exported, "--prompt", PROMPT, "--max-new-tokens", 12).stdout
    for text in (ours, theirs):
        assert text.startswith(PROMPT) and len(text.strip()) > len(PROMPT) and "<gist" not in text
    assert ours == generated("--run-dir", run_dir, "--prompt", PROMPT, "--max-new-tokens", 12) + "\n"
    stop = theirs.removeprefix(PROMPT)[3:5]
    stopped = generated("--model", exported, "--prompt", PROMPT, "--max-new-tokens", 12, "--stop", stop)
    assert stopped == theirs[: theirs.find(stop, len(PROMPT))]


def generated(*arguments) -> str:
    """What the command prints, in this process."""
    from pretrain.__main__ import build_parser
    from pretrain.generate import check, generate

    args = build_parser().parse_args(["generate", *map(str, arguments)])
    check(args)
    return "".join(generate(args))


def test_questions_on_a_context(run_dir, tmp_path):
    """The context is read once; every question gets the answer that it gets alone, up to its stop text."""
    context, prompt = tmp_path / "context.txt", tmp_path / "prompt.txt"
    context.write_text("The Congress shall meet, and the President shall speak of the state of the Union. " * 12)
    common = ("--run-dir", run_dir, "--context-file", context, "--recall", "suffix", "--max-new-tokens", 10)
    questions = ("What of it?", "Who speaks?")
    alone = [generated(*common, "--prompt", question) for question in questions]
    both = generated(*common, "--prompt", questions[0], "--prompt", questions[1])
    assert both == f"[1] {alone[0]}\n\n[2] {alone[1]}"
    assert alone[0] != generated("--run-dir", run_dir, "--prompt", questions[0], "--max-new-tokens", 10), "the context counts"
    answer = alone[0].removeprefix(questions[0])
    prompt.write_text(questions[0])
    stopped = generated(*common, "--prompt-file", prompt, "--stop", answer[2:4])
    assert stopped == questions[0] + answer[: answer.find(answer[2:4])]
    assert generated(*common, "--prompt", questions[0], "--grow").startswith(questions[0])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["export", "--run-dir", "{run}", "--output", "{hf}"], "exists; name a new directory"),
        (["export", "--run-dir", "{run}", "--step", "5", "--output", "{new}"], "has no such checkpoint; it has steps 6, 3"),
        (["export", "--run-dir", "{new}", "--output", "{new}x"], "is not a run directory"),
        (["generate", "--run-dir", "{run}", "--prompt", ""], "--prompt: is empty"),
        (["generate", "--model", "{hf}", "--prompt", "a", "--recall", "all"], "--recall: needs --run-dir"),
        (["generate", "--model", "{new}", "--prompt", "a"], "is not an exported model"),
        (["generate", "--run-dir", "{run}", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: is not in (0, 1]"),
    ],
)
def test_bad_calls_end_in_one_line(exported, run_dir, tmp_path, arguments, message):
    places = {"run": run_dir, "hf": exported, "new": tmp_path / "new"}
    done = module("pretrain", *[a.format(**places) for a in arguments], check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--grow"], "--grow: needs --context-file"),
        (["--context-file", "{new}"], "--context-file {new}: cannot be read"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: is below 1"),
        (["--temperature", "-1"], "--temperature -1.0: is below 0"),
        (["--stop", ""], "--stop: is empty"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(tmp_path, arguments, message):
    from pretrain.errors import UserError

    fill = lambda text: text.format(new=tmp_path / "new")
    with pytest.raises(UserError, match=message.format(new=tmp_path / "new")):
        generated("--run-dir", tmp_path, "--prompt", "a", *map(fill, arguments))


@pytest.mark.parametrize("tied", [True, False])
def test_names_map_both_ways(tied):
    shape = dict(hidden_size=32, layers=2, heads=6, kv_heads=2, head_dim=8, ffn_size=40)
    config = ModelConfig(vocab_size=300, tied_embeddings=tied, **shape)
    rows = {"qkv": 80, "gate_up": 80, "embedding": 384, "head": 384, "output": 32, "down": 32}
    columns = {"output": 48, "down": 40}
    state = {}
    for entry in entries(config):
        part = entry.ours.split(".")[-2]
        shape = (32,) if "norm" in part else (rows[part], columns.get(part, 32))
        state[entry.ours] = torch.randn(shape)
        if part in ("embedding", "head"):
            state[entry.ours][300:] = 0
    theirs = to_hugging_face(state, config)
    assert theirs["model.layers.1.self_attn.q_proj.weight"].shape == (48, 32)
    assert ("lm_head.weight" in theirs) == (not tied)
    back = from_hugging_face(theirs, config)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)
