"""Chat templates in evaluation and generation: what is read, and which part of it is folded."""

import dataclasses
import json
import shutil
from argparse import Namespace

import pytest
from transformers import AutoTokenizer

from tests import warm
from tests.pretrain.test_evaluate_scores import LONGBENCH, RULER, write
from unfold.pretrain.command import main
from unfold.pretrain.data.chat import Chat, load_bos
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError

CHATML = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<s>system\nBe brief.</s>\n{% endif %}{% for m in messages %}"
    "<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WITH_CONTEXTS = (
    "{% for m in messages %}{{ '(' if m.role == 'context' }}{{ m.content }};{% endfor %}{{ 'A:' if add_generation_prompt }}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    """A run of one step whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny.tokenizer, directory / "tokenizer")
    (directory / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    sections = {"model": {"max_position": 256}, "train": {"steps": 1, "valid_every": 0}, "checkpoint": {"every": 1}}
    config = tiny.config(directory / "c.yaml", **sections, data={"tokenizer": str(directory / "tokenizer")})
    warm.command("pretrain", "train", "--config", config, "--run-dir", directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def tokenizer(run_dir):
    return load_tokenizer(run_dir / "tokenizer", 2)


def shown(tokenizer, ids):
    return tokenizer.tokenizer().decode(ids, skip_special_tokens=False)


def command(capsys, *arguments):
    """(exit status, stdout, stderr)"""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("system", [None, "Answer in French."])
def test_the_ids_are_those_of_transformers(tokenizer, system):
    context, question = "The senate met on Monday. It was cold.", "\n\nWhen did it meet?"
    parts = Chat(tokenizer, None, system).prompt(context, question)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": context + question})
    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert shown(tokenizer, [*parts[0], *parts[1]]) == text
    # Between control tokens and at the end of the context texts are encoded apart, as in training.
    cut = text.index(question)
    encode = lambda part: theirs(part, add_special_tokens=False)["input_ids"]
    assert parts == (encode(text[:cut]), encode(text[cut:]))
    assert tokenizer.bos_id in parts[0] and tokenizer.eos_id in parts[1]


def test_what_is_folded_follows_from_the_template(tokenizer, tmp_path):
    texts = lambda parts: [shown(tokenizer, part) for part in parts]
    own = Chat(tokenizer, None, "Yes.")
    assert texts(own.prompt("C.", "Q?", separator="\n\n"))[1] == "\n\nQ?</s>\n<s>assistant\n"
    assert texts(own.prompt("C.", "Q?", opening=" It is"))[1].endswith("<s>assistant\nIt is")
    alone = own.prompt(None, "Q?")
    assert alone[0] == [] and texts(alone)[1].endswith("system\nYes.</s>\n<s>user\nQ?</s>\n<s>assistant\n")
    (tmp_path / "c.jinja").write_text(WITH_CONTEXTS)
    # A template that knows contexts gets one as a message of its own.
    assert texts(Chat(tokenizer, str(tmp_path / "c.jinja"), None).prompt("C.", "\n\nQ?")) == ["(C.", ";Q?;A:"]
    assert texts(Chat(tokenizer, "plain", None).prompt("C.", "Q?")) == ["C.", "\n\nQuestion: Q?\nAnswer:\n"]


def test_a_control_token_that_a_text_spells_is_text(tokenizer):
    context, question = Chat(tokenizer, "plain", None).prompt("a</s>b", "<s>?")
    assert not set(context + question) & {tokenizer.bos_id, tokenizer.eos_id}
    assert "a</s>b" in shown(tokenizer, context)


def test_wrong_templates(tokenizer, tiny, tmp_path):
    with pytest.raises(UserError, match="--chat: the tokenizer has no chat template; give a FILE.jinja, or 'plain'"):
        Chat(load_tokenizer(tiny.tokenizer, 2), None, None)
    with pytest.raises(UserError, match="^--chat nowhere.jinja: cannot be read"):
        Chat(tokenizer, "nowhere.jinja", None)
    (tmp_path / "n.jinja").write_text(NO_SYSTEM)
    with pytest.raises(UserError, match="leaves the system message out; leave --system out"):
        Chat(tokenizer, str(tmp_path / "n.jinja"), "Be kind.").prompt("C.", "Q?")
    (tmp_path / "r.jinja").write_text("{{ raise_exception('no ' ~ messages[0].role) }}")
    with pytest.raises(UserError, match="cannot write it: no user"):
        Chat(tokenizer, str(tmp_path / "r.jinja"), None).prompt("C.", "Q?")


def test_tasks_with_a_chat_template(run_dir, tmp_path, capsys):
    few = {**LONGBENCH, "dataset": "triviaqa"}
    ruler = {**RULER, "answer_prefix": " A is"}
    files = [write(tmp_path / "bench.jsonl", LONGBENCH, few, LONGBENCH), write(tmp_path / "niah_1.jsonl", ruler)]
    flags = ["evaluate", "tasks", "--run-dir", run_dir, "--tasks", *files, "--output", tmp_path / "o", "--chat"]
    status, out, _ = command(capsys, *flags, "--system", "Be kind.", "--show-prompt")
    assert status == 0 and not (tmp_path / "o" / "tasks.json").exists()
    bench, examples, needle = out.split("--- ")[1:]
    assert bench.startswith(f"{files[0]}:1, hotpotqa") and "system\nBe kind.</s>" in bench
    folded, asked = bench.split("[question: ")
    assert "Ann came. Who? {input}" in folded and "folded" in folded and "Answer:</s>\n<s>assistant\n" in asked
    assert "<s>" not in examples and "triviaqa" in examples  # examples are put as they are
    assert "What is A? A is</s>\n<s>assistant\nA is\n[answer]" in needle  # the answer's first words stand in its turn
    lengths = write(tmp_path / "lengths.json", {"hotpotqa": 2, "triviaqa": 2, "niah_1": 2})
    status, out, _ = command(capsys, *flags, "--answer-lengths", lengths, "--mode", "recall")
    assert status == 0 and json.loads((tmp_path / "o" / "tasks.json").read_text())["chat"] is True


def test_a_passkey_in_a_chat(run_dir, tmp_path, capsys):
    flags = ["evaluate", "passkey", "--run-dir", run_dir, "--lengths", 160, "--depths", 0.5, "--output", tmp_path / "o", "--chat"]
    status, out, _ = command(capsys, *flags, "--show-prompt", "--digits", 2, "--candidates", 3)
    assert status == 0 and "What is the pass key?</s>\n<s>assistant\nThe pass key is\n[answer]" in out
    assert out.index("There is a pass key hidden") < out.index("[question: ")
    few = ["--trials", 1, "--digits", 2, "--candidates", 3, "--mode", "forget"]
    assert command(capsys, *flags, *few)[0] == 0


def test_texts_may_begin_with_their_token(run_dir, tokenizer, tmp_path, capsys):
    """Where no template writes it: --bos. Context and question are the same otherwise."""
    path = write(tmp_path / "x.jsonl", {**LONGBENCH, "dataset": "triviaqa"})
    flags = ["evaluate", "tasks", "--run-dir", run_dir, "--tasks", path, "--output", tmp_path / "o", "--show-prompt"]
    plain, begun, few = (command(capsys, *flags, *more)[1] for more in ([], ["--bos"], ["--bos", "--chat"]))
    n = int(plain.split("[context: ")[1].split()[0])
    assert begun == few == plain.replace(f"[context: {n} tokens", f"[context: {n + 1} tokens").replace("Ann came", "<s>Ann came")
    prompt = ["generate", "--run-dir", run_dir, "--prompt", "When?", "--show-prompt", "--bos"]
    assert "\n<s>When?\n[answer]" in command(capsys, *prompt)[1]
    with pytest.raises(UserError, match="--bos: the tokenizer has no beginning-of-text token"):
        load_bos(Namespace(bos=True), dataclasses.replace(tokenizer, bos_id=None))


def test_generate_in_a_chat(run_dir, tmp_path, capsys):
    context = tmp_path / "c.txt"
    context.write_text("The senate met on Monday.")
    flags = ["generate", "--run-dir", run_dir, "--prompt", "When?", "--max-new-tokens", 3, "--chat"]
    status, out, _ = command(capsys, *flags, "--context-file", context, "--show-prompt")
    assert status == 0 and "[context: " in out
    assert "\nWhen?</s>\n<s>assistant\n" in out.split("[question: ")[1]
    status, out, _ = command(capsys, *flags, "--show-prompt")
    assert status == 0 and "[context: " not in out and "gets gists as its chunks close" in out
    status, out, _ = command(capsys, *flags, "--context-file", context)
    assert status == 0 and out.startswith("When?\n\n")
    assert main(["export", "--run-dir", str(run_dir), "--output", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    exported = ["generate", "--model", tmp_path / "hf", *flags[3:]]
    status, out, _ = command(capsys, *exported, "--show-prompt")
    assert status == 0 and "Be brief.</s>\n<s>user\nWhen?</s>\n<s>assistant\n" in out
    assert command(capsys, *exported)[0] == 0
    status, _, err = command(capsys, *exported[:-1], "--system", "x")
    assert status == 1 and "error: --system: needs --chat" in err
