"""`tokenize-supervised`: rows to contexts, questions and answers; templates as transformers applies them; bad rows."""

import json

import numpy as np
import pytest

from tests.data_prep.texts import contents
from tests.supervised import rows, write_jsonl
from unfold.data_prep import batches
from unfold.data_prep.format.shards import open_shard
from unfold.data_prep.format.spans import Spans

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim "
    "+ ' [/INST]' }}{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}{% else %}{% generation %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "The people went to Ohio. Where?"},
    {"role": "assistant", "content": "To Ohio."},
    {"role": "user", "content": "Why </s> <|im_end|>?"},
    {"role": "assistant", "content": "Because of the land."},
]


@pytest.fixture(scope="session")
def chat(byte_level, tmp_path_factory, run_session):
    """A byte-level tokenizer with ChatML's control tokens and template, imported."""
    from tokenizers import Tokenizer

    foreign, own = (tmp_path_factory.mktemp("chat") / name for name in ("foreign", "own"))
    foreign.mkdir()
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(foreign / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": CHATML}
    (foreign / "tokenizer_config.json").write_text(json.dumps(config))
    run_session("import-tokenizer", "--input", foreign, "--output", own)
    return own


@pytest.fixture(scope="session")
def run_session():
    """Run a command that must succeed."""
    from unfold.data_prep.command import main

    def call(*args: object) -> None:
        assert main([str(a) for a in args]) == 0

    return call


@pytest.fixture
def make(tmp_path, run):
    """Write rows, tokenise them, and open the shard."""

    def call(values: list[dict], tokenizer, *options: object, name: str = "s"):
        file = write_jsonl(tmp_path / f"{name}.jsonl", values)
        command = ("tokenize-supervised", "--input", file, "--tokenizer", tokenizer, "--output", tmp_path / name, "--no-plot")
        status, out, err = run(*command, *options)
        assert status == 0, err
        return open_shard(tmp_path / name)

    return call


def parts(shard, i: int, decode) -> tuple[str, list[str], str]:
    """Context, answers, and the whole text of a document."""
    ids, spans = shard.document(i).tolist(), shard.spans[i : i + 1]
    answers = [decode(ids[begin:end]) for begin, end in spans.ranges.tolist()]
    return decode(ids[: spans.context[0]]), answers, decode(ids)


def test_rows_of_every_kind(bpe, load, make):
    values = [
        {"context": "All went well.", "question": "How?", "answer": "Well"},
        {"context": "All went well.", "turns": [{"question": "A?", "answer": "1"}, {"question": "B?", "answer": "2"}]},
        {"documents": ["First.", "Second."], "question": "Which?", "answer": "both"},
        {"messages": CHAT},
        {"context": "Given.", "messages": CHAT},
        {"messages": [{"role": "context", "content": "Inside."}, *CHAT[1:]]},
        {"documents": ["First.", {"title": "Two", "text": "Second."}], "question": "Which?", "answer": "both"},
    ]
    shard, decode = make(values, bpe), load(bpe).decode
    got = [parts(shard, i, decode) for i in range(len(values))]
    assert got[0] == ("All went well.", ["Well"], "All went well.\n\nQuestion: How?\nAnswer:\nWell")
    assert got[1][:2] == ("All went well.", ["1", "2"])
    assert got[1][2].endswith("\n\nQuestion: A?\nAnswer:\n1\n\nQuestion: B?\nAnswer:\n2")
    assert got[2][:2] == ("First.\n\nSecond.", ["both"])
    assert got[3][0].startswith("Answer shortly.\n\nQuestion: The people went") and got[3][0].endswith("To Ohio.\n\nQuestion:")
    assert got[3][1] == ["Because of the land."], "answers within the context are not learned"
    assert got[4][:2] == ("Answer shortly.\n\nGiven.", ["To Ohio.", "Because of the land."])
    assert got[5][:2] == ("Inside.", ["To Ohio.", "Because of the land."])
    assert got[6][:2] == ("First.\nTwo\nSecond.\n", ["both"])
    eos = load(bpe).info.eos_id
    for i in range(len(values)):
        ids = shard.document(i)
        assert [ids[end - 1] for _, end in shard.spans[i : i + 1].ranges] == [eos] * len(got[i][1]), "an answer ends"
        assert shard.spans[i : i + 1].ranges[-1, 1] == len(ids)


def test_keys_and_formats(bpe, load, tmp_path, run, make):
    import pyarrow
    import pyarrow.parquet

    values = [{"passage": "It rained.", "q": "What?", "a": "rain", "n": 1}, {"passage": "Sun.", "q": "And?", "a": "sun", "n": 2}]
    keys = ("--context-key", "passage", "--question-key", "q", "--answer-key", "a")
    want = contents(make(values, bpe, *keys).prefix)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "p.parquet")
    (tmp_path / "c.csv").write_text("passage,q,a,n\nIt rained.,What?,rain,1\nSun.,And?,sun,2\n")
    for name in ("p.parquet", "c.csv"):
        command = ("tokenize-supervised", "--input", tmp_path / name, "--tokenizer", bpe, "--output", tmp_path / name)
        assert run(*command, "--no-plot", *keys)[0] == 0
        assert all(contents(tmp_path / name)[s] == want[s] for s in (".bin", ".idx"))
        assert (tmp_path / f"{name}.spans").read_bytes() == (tmp_path / "s.spans").read_bytes()
    picked = make(values, bpe, *keys, "--where", "n>=2", name="where")
    assert picked.info.documents == 1 and parts(picked, 0, load(bpe).decode)[0] == "Sun."


@pytest.mark.parametrize("template", [None, LLAMA2], ids=["chatml", "llama2"])
def test_templates_are_applied_as_transformers_does(chat, load, make, tmp_path, template):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(chat))
    options = []
    if template:
        theirs.chat_template = template
        (tmp_path / "t.jinja").write_text(template)
        options = ["--template", tmp_path / "t.jinja"]
    # A literal control token in a content is text here, and a control id there: left out of the comparison.
    plain = [{**m, "content": m["content"].replace(" </s> <|im_end|>", " not")} for m in CHAT]
    shard = make([{"messages": plain}, {"messages": plain}], chat, *options)
    want = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    got = shard.document(0).tolist()
    assert got == want[: len(got)] and not theirs.decode(want[len(got) :]).strip(), "nothing is learned after the last answer"
    (begin, end), = shard.spans[0:1].ranges.tolist()  # fmt: skip
    answer = " Because of the land. <|im_end|>" if template else "Because of the land.<|im_end|>"
    assert theirs.decode(got[begin:end]) == answer
    asked = theirs.apply_chat_template(plain[:3], tokenize=True, return_dict=False)
    assert got[: len(asked)] == asked
    assert theirs.decode(got[: shard.spans.context[0]]).endswith("[INST]" if template else "<|im_start|>user\n")


def test_a_context_goes_into_the_first_message_of_a_foreign_template(chat, load, make):
    turns = [{"question": "A?", "answer": "1"}, {"question": "B?", "answer": "2"}]
    shard, tokenizer = make([{"context": "It rained <|im_end|>.", "turns": turns}], chat), load(chat)
    ids, start, end = shard.document(0).tolist(), *(tokenizer.control[f"<|im_{n}|>"].id for n in ("start", "end"))
    assert (ids.count(start), ids.count(end)) == (4, 4), "the literal in the context is text"
    context, answers, _ = parts(shard, 0, tokenizer.decode)
    assert (context, answers) == ("user\nIt rained <|im_end|>.", ["1", "2"])
    assert [ids[e - 1] for _, e in shard.spans.ranges] == [end, end]


def test_a_template_that_knows_contexts_gets_a_message(bpe, load, make, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ '(' if m.role == 'context' }}{{ m.content }};{% endfor %}")
    shard = make([{"context": "C.", "question": "Q?", "answer": "A"}], bpe, "--template", tmp_path / "t.jinja")
    assert parts(shard, 0, load(bpe).decode) == ("(C.", ["A"], "(C.;Q?;A")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages", ("not a Jinja template",)),
        ("{% for m in messages %}{{ m.content | upper }}{{ raise_exception('no ' ~ m.role) }}{% endfor %}", ("no user",)),
        ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", ("leaves a message out",)),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", ("alters a content",)),
    ],
)
def test_templates_that_cannot_be_used(bpe, tmp_path, fails, template, words):
    (tmp_path / "t.jinja").write_text(template)
    file = write_jsonl(tmp_path / "c.jsonl", rows(1))
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "s")
    fails(*command, "--template", tmp_path / "t.jinja", words=("t.jinja", *words))
    assert not list(tmp_path.glob("s*"))


GOOD = {"context": "All went well.", "question": "How?", "answer": "Well"}
BAD = {
    "no answer": ({"context": "x", "question": "y"}, "no key 'answer'; name one of ['context', 'question'] by --answer-key"),
    "no context": ({"question": "y", "answer": "z"}, "no key 'context'"),
    "nothing": ({"text": "y"}, "no key 'context'"),
    "empty context": ({**GOOD, "context": " \n"}, "an empty context"),
    "empty question": ({**GOOD, "question": ""}, "'question' is empty"),
    "empty answer": ({**GOOD, "answer": " "}, "'answer' is empty"),
    "answer of numbers": ({**GOOD, "answer": [1]}, "'answer' is list, not text"),
    "turns without answer": ({"context": "x", "turns": [{"question": "a"}]}, "'turns' holds an entry without 'answer'"),
    "no turns": ({"context": "x", "turns": []}, "'turns' is not a list"),
    "chat without context": ({"messages": CHAT[1:3]}, "an empty context"),
    "chat without answer": ({"messages": CHAT[:4]}, "no answer after the context"),
    "chat without user": ({"messages": CHAT[:1]}, "no user message"),
    "chat of texts": ({"messages": ["a"]}, "message 0 is not an object with 'role' and 'content'"),
    "two contexts": ({"context": "x", "messages": [{"role": "context", "content": "y"}, *CHAT]}, "leave one out"),
    "unknown role": ({"context": "x", "messages": [*CHAT, {"role": "tool", "content": "y"}]}, "not tool"),
    "private character": ({**GOOD, "context": "\uf8f1"}, "U+F8F1"),
    "long question": ({**GOOD, "question": "how " * 80}, "more than --max-question 60"),
    "long document": ({**GOOD, "context": "well " * 300}, "more than --max-tokens 200"),
}
LIMITS = ("--max-question", 60, "--max-tokens", 200)


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_by_file_and_line(bpe, tmp_path, fails, name):
    row, reason = BAD[name]
    file = write_jsonl(tmp_path / "c.jsonl", [GOOD, GOOD, row, GOOD])
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "s", *LIMITS)
    fails(*command, words=(f"{file}:3: ", reason))


def test_bad_rows_are_skipped_and_listed(bpe, tmp_path, make):
    shard = make([GOOD, *(row for row, _ in BAD.values()), GOOD], bpe, *LIMITS, "--on-error", "skip")
    assert shard.info.documents == 2
    listed = [json.loads(line) for line in (tmp_path / "s.rejects.jsonl").read_text().splitlines()]
    assert [entry["place"].rpartition(":")[2] for entry in listed] == [str(i) for i in range(2, len(BAD) + 2)]
    assert all(reason in entry["reason"] for entry, (_, reason) in zip(listed, BAD.values(), strict=True))
    assert json.loads((tmp_path / "s.report.json").read_text())["rejected"] == len(BAD)


def test_rows_without_context_are_taken_if_asked(bpe, load, make):
    values = [{**GOOD, "context": ""}, {"messages": CHAT[1:3]}]
    shard = make(values, bpe, "--allow-empty-context")
    assert shard.spans.context.tolist() == [0, 0]
    assert parts(shard, 0, load(bpe).decode) == ("", ["Well"], "Question: How?\nAnswer:\nWell")


def test_the_context_of_a_chat_may_end_before_its_first_question(bpe, load, make):
    shard = make([{"messages": CHAT}], bpe, "--chat-context", "first-user")
    assert parts(shard, 0, load(bpe).decode)[:2] == ("Answer shortly.\n\nQuestion:", ["To Ohio.", "Because of the land."])


@pytest.mark.parametrize("where", ["start", "middle"])
def test_contexts_are_cut_to_the_limit(bpe, load, make, tmp_path, where):
    words = " ".join(f"word{i}" for i in range(200))
    shard = make([GOOD, {**GOOD, "context": words}], bpe, "--max-tokens", 120, "--truncate", where)
    whole = make([{**GOOD, "context": words}], bpe, name="whole")
    assert shard.lengths.tolist()[1] == 120
    context, answers, text = parts(shard, 1, load(bpe).decode)
    assert answers == ["Well"] and text.endswith("\n\nQuestion: How?\nAnswer:\nWell")
    ids, kept = whole.document(0)[: whole.spans.context[0]], int(shard.spans.context[1])
    head = 0 if where == "start" else (kept + 1) // 2
    assert shard.document(1)[:kept].tolist() == [*ids[:head], *ids[len(ids) - kept + head :]]
    assert json.loads((tmp_path / "s.report.json").read_text())["truncated"] == 1


def test_a_suffix_that_leaves_no_room_for_a_context(bpe, tmp_path, fails, run):
    file = write_jsonl(tmp_path / "c.jsonl", [{**GOOD, "question": "how " * 80}])
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "s")
    fails(*command, "--max-tokens", 50, "--truncate", "middle", words=("c.jsonl:1", "leave nothing of it within --max-tokens 50"))
    fails(*command, "--truncate", "middle", words=("--truncate middle: needs --max-tokens",))
    (tmp_path / "t.txt").write_text("text")
    command = ("tokenize-supervised", "--input", tmp_path / "t.txt", "--tokenizer", bpe, "--output", tmp_path / "s")
    fails(*command, words=("t.txt: a text file has no fields",))


def test_files_are_the_same_for_any_number_of_workers(bpe, tmp_path, make, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 7)
    made = [
        {**contents(make(rows(60), bpe, "--workers", n, name=f"w{n}").prefix), "spans": (tmp_path / f"w{n}.spans").read_bytes()}
        for n in (1, 2)
    ]
    for files in made:  # the sidecar names its input
        files[".json"] = files[".json"].replace(b"w1.jsonl", b"w.jsonl").replace(b"w2.jsonl", b"w.jsonl")
    assert made[0] == made[1]


def test_questions_on_one_context_fall_to_one_side(bpe, load, make, tmp_path, run):
    values = [{"context": f"Fact {i}.", "question": f"Q{j}?", "answer": "A"} for i in range(60) for j in range(3)]
    file = write_jsonl(tmp_path / "v.jsonl", values)
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "v", "--no-plot")
    assert run(*command, "--valid-fraction", 0.3)[0] == 0
    sides = [open_shard(tmp_path / f"v_{part}") for part in ("train", "valid")]
    train, valid = ({parts(s, i, load(bpe).decode)[0] for i in range(s.info.documents)} for s in sides)
    assert len(train) + len(valid) == 60 and not train & valid and valid


def test_an_interrupted_run_goes_on(bpe, tmp_path, make, run, monkeypatch):
    """A bad row ends the run after some batches; once it is mended the files are those of one whole run."""
    from unfold.data_prep import encode

    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(encode, "COMMIT_SECONDS", 0.0)
    values = rows(40)
    want = make(values, bpe, name="whole")
    file = write_jsonl(tmp_path / "c.jsonl", [*values[:30], {"context": "x"}, *values[31:]])
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "c", "--no-plot")
    status, _, err = run(*command)
    assert status == 1 and "c.jsonl:31: no key 'question'" in err and "30 documents are done and kept" in err
    # A kill may leave half an entry behind.
    with open(tmp_path / "c.spans.ranges.partial", "ab") as stream:
        stream.write(b"xyz")
    status, _, err = run(*command, "--chat-context", "first-user")
    assert status == 1 and "another way to make supervised documents" in err
    write_jsonl(file, values)
    assert run(*command)[0] == 0
    got = open_shard(tmp_path / "c")
    assert (tmp_path / "c.spans").read_bytes() == (tmp_path / "whole.spans").read_bytes()
    assert np.array_equal(got.tokens, want.tokens) and not list(tmp_path.glob("*.partial"))


def test_merge_inspect_stats_and_verify_know_spans(bpe, tmp_path, make, run, fails):
    make(rows(20), bpe, name="a")
    make(rows(15, seed=1), bpe, name="b")
    whole = make([*rows(20), *rows(15, seed=1)], bpe, name="whole")
    assert run("merge", "--input", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "m")[0] == 0
    assert (tmp_path / "m.spans").read_bytes() == (tmp_path / "whole.spans").read_bytes()
    status, out, _ = run("verify", tmp_path / "m", tmp_path / "whole", "--tokenizer", bpe)
    assert status == 0 and out.count("OK") == 2
    _, out, _ = run("inspect", tmp_path / "m", "--tokenizer", bpe)
    assert f"supervised: {len(whole.spans.ranges)} answers" in out and "[context ends]" in out and "[answer]" in out
    _, out, _ = run("stats", tmp_path / "a", tmp_path / "b", "--json")
    assert json.loads(out)["answer_tokens"] == whole.spans.loss_tokens
    (tmp_path / "t.jsonl").write_text('{"text": "plain"}\n')
    assert run("tokenize", "--input", tmp_path / "t.jsonl", "--tokenizer", bpe, "--output", tmp_path / "plain")[0] == 0
    fails("merge", "--input", tmp_path / "a", tmp_path / "plain", "--output", tmp_path / "x", words=("supervised is False",))
    command = ("tokenize", "--input", tmp_path / "t.jsonl", "--tokenizer", bpe, "--output", tmp_path / "m", "--overwrite")
    assert run(*command)[0] == 0 and not (tmp_path / "m.spans").exists()


def _rewrite(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda raw: raw[:-4], "cut short or altered"),
        (lambda raw: b"x" + raw[1:], "not the spans of a supervised shard"),
        (lambda raw: raw[:20], "not the spans of a supervised shard"),
        (lambda raw: raw[:-4] + b"\xff\xff\xff\x7f", "answers do not lie one after the other"),
        (lambda raw: raw[:40] + b"\x09" + raw[41:], "contradict each other"),
        (lambda raw: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:], "altered"),
    ],
)
def test_damaged_spans_are_named(bpe, tmp_path, make, run, change, word):
    make(rows(8), bpe)
    _rewrite(tmp_path / "s.spans", change)
    status, _, err = run("verify", tmp_path / "s")
    assert status == 1 and "s.spans: " in err and word in err
    (tmp_path / "s.spans").unlink()
    status, _, err = run("verify", tmp_path / "s")
    assert status == 1 and "s.spans: missing" in err


@pytest.mark.parametrize(
    ("context", "ranges"),
    [(5, [(4, 6)]), (0, [(0, 2)]), (2, []), (2, [(3, 3)]), (2, [(3, 11)]), (2, [(3, 6), (5, 8)]), (-1, [(3, 4)])],
)
def test_spans_that_cannot_be(context, ranges):
    good = (2, [(3, 4), (4, 10)])
    assert Spans.of([good, good]).defect(np.array([10, 10])) == ""
    assert "document 1" in Spans.of([good, (context, ranges)]).defect(np.array([10, 10]))
