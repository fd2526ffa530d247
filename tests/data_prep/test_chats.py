"""Rows as people have them: nested keys, chats of several makes, tool calls; and what is none of these."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.data_prep.texts import contents
from unfold.data_prep.format.shards import open_shard

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
)
NO_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Where? <s>"}, {"role": "assistant", "content": "To Ohio."}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "Ohio"}}}
SHAREGPT = {"conversations": [{"from": "human", "value": "Where? <s>"}, {"from": "gpt", "value": "To Ohio."}]}
PARTS = [{**m, "content": [{"type": "text", "text": m["content"][:3]}, {"type": "text", "text": m["content"][3:]}]} for m in CHAT]


@pytest.fixture
def tokenize(bpe, tmp_path, run):
    (tmp_path / "chatml.jinja").write_text(CHATML)

    def call(rows, *options, name="s", template="chatml.jinja", status=0):
        if isinstance(rows, list):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            rows = tmp_path / f"{name}.jsonl"
        template = tmp_path / template
        command = ("tokenize", "--input", rows, "--tokenizer", bpe, "--output", tmp_path / name, "--template", template)
        got, out, err = run(*command, "--no-plot", *options)
        assert got == status, err
        return err if status else tmp_path / name

    return call


def texts(prefix, load, bpe):
    shard, tokenizer = open_shard(prefix), load(bpe)
    return [tokenizer.decode(shard.document(i)) for i in range(len(shard.lengths))]


def test_nested_keys_in_every_kind_of_file(bpe, tmp_path, run):
    rows = [{"meta": {"text": "first", "n": 1}, "a.b": "dotted"}, {"meta": {"text": "second", "n": 2}, "a.b": "name"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    (tmp_path / "want.jsonl").write_text("".join(json.dumps({"text": row["meta"]["text"]}) + "\n" for row in rows))
    common = ("--tokenizer", bpe, "--no-plot", "--output")
    assert run("tokenize", "--input", tmp_path / "want.jsonl", *common, tmp_path / "want")[0] == 0
    for kind in ("jsonl", "parquet"):
        options = ("--text-key", "meta.text", "--where", "meta.n>=1")
        assert run("tokenize", "--input", tmp_path / f"r.{kind}", *options, *common, tmp_path / kind)[0] == 0
        assert contents(tmp_path / kind)[".bin"] == contents(tmp_path / "want")[".bin"]
        literal = ("--text-key", "a.b")
        assert run("tokenize", "--input", tmp_path / f"r.{kind}", *literal, *common, tmp_path / f"{kind}2")[0] == 0


def test_chats_of_every_make_are_the_same_document(tokenize, tmp_path, load, bpe):
    want = tokenize([{"messages": CHAT}], name="want")
    text = "<|im_start|>user\nWhere? <s><|im_end|>\n<|im_start|>assistant\nTo Ohio.<|im_end|>\n"
    assert texts(want, load, bpe) == [text], "what a content spells is text, whatever it looks like"
    table = pyarrow.Table.from_pylist([{"messages": CHAT, "id": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    made = {
        "sharegpt": tokenize([SHAREGPT], name="a"),
        "parts": tokenize([{"messages": PARTS}], name="b"),
        "named": tokenize([{"chat": {"turns": CHAT}, "messages": "no"}], "--text-key", "chat.turns", name="c"),
        "parquet": tokenize(tmp_path / "t.parquet", name="d"),
        "workers": tokenize([{"messages": CHAT}], "--workers", 2, name="e"),
    }
    for name, prefix in made.items():
        assert contents(prefix)[".bin"] == contents(want)[".bin"], name


def test_texts_and_chats_stand_in_order_and_end_once(tokenize, tmp_path, load, bpe):
    (tmp_path / "ends.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    prefix = tokenize([{"text": "before"}, {"messages": CHAT[1:]}, {"text": "after"}], template="ends.jinja")
    assert texts(prefix, load, bpe) == ["before", "To Ohio.", "after"]
    shard, eos = open_shard(prefix), load(bpe).info.eos_id
    assert [list(shard.document(i)).count(eos) for i in range(3)] == [1, 1, 1]


def test_tool_calls(tokenize, tmp_path, load, bpe):
    as_text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    rows = [[CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "Ohio"}]
            for call in (CALL, as_text)]  # fmt: skip
    one, two = texts(tokenize([{"messages": chat} for chat in rows]), load, bpe)
    assert one == two and '<call>look {"at": "Ohio"}</call>' in one
    (tmp_path / "plain.jinja").write_text(NO_TOOLS)
    said = tokenize([{"messages": rows[0]}], name="n", template="plain.jinja", status=1)
    assert "n.jsonl:1: calls the tool 'look', which the template" in said and said.count("\n") == 1


BAD = {
    "number": ({"messages": 3}, "no key 'text'; name one of ['messages'] by --text-key"),
    "no speaker": ({"messages": [{"content": "a"}]}, "no key 'text'"),
    "unknown speaker": ({"conversations": [{"from": "ghost", "value": "a"}]}, "'from' is 'ghost'; known are human, "),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content holds a part of type 'image_url'; only text can be learned",
    ),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is int, not text"),
    "nothing said": ({"messages": [{"role": "user"}]}, "message 0 is not an object with 'role' and 'content'"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "the arguments of f are not JSON",
    ),
    "list": ({"text": ["a"]}, "'text' is list, neither text nor a chat"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_none_of_these_is_told_with_its_line(case, tokenize):
    row, message = BAD[case]
    said = tokenize([{"text": "good"}, row], status=1)
    assert "s.jsonl:2: " in said and message in said and said.count("\n") == 1
    prefix = tokenize([{"text": "good"}, row], "--on-error", "skip", "--overwrite")
    (reject,) = map(json.loads, prefix.with_name("s.rejects.jsonl").read_text().splitlines())
    assert reject["place"].endswith("s.jsonl:2") and message in reject["reason"]


def test_supervised_takes_the_same_makes(bpe, tmp_path, run, fails):
    def make(row, name):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        command = ("tokenize-supervised", "--input", tmp_path / f"{name}.jsonl", "--tokenizer", bpe, "--no-plot")
        return (*command, "--template", "plain", "--output", tmp_path / name)

    chat = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}, *CHAT]
    shared = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in chat]}
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    for name, row in {"want": {"messages": chat}, "shared": shared, "parts": {"messages": parts}}.items():
        assert run(*make(row, name))[0] == 0
        assert contents(tmp_path / name)[".bin"] == contents(tmp_path / "want")[".bin"]
    called = [*chat[:3], {**chat[3], "tool_calls": [CALL]}]
    fails(*make({"messages": called}, "bad"), words=("bad.jsonl:1: calls a tool after its context",))
