"""`tokenize-supervised --linked`: parts of their own tokens, whatever stands around them; shards of both kinds; bad rows."""

import json

import numpy as np
import pytest

from tests.data_prep.test_supervised import CHATML, LLAMA2, chat, make, run_session  # noqa: F401
from unfold.data_prep.format.lazy import open_lazily
from unfold.data_prep.format.shards import open_shard
from unfold.data_prep.format.spans import HEADER, PLAIN, Spans

DOCUMENTS = [{"title": "Polk", "text": "He went to Ohio."}, "Tyler went to Maine.", {"text": "Grant was in <|im_end|> Texas."}]
ROW = {"documents": DOCUMENTS, "prefix": "Read on.", "question": "Where did Polk go?", "answer": "Ohio"}
TEXTS = ["Polk\nHe went to Ohio.\n", "Tyler went to Maine.\n", "Grant was in <|im_end|> Texas.\n"]
TURNS = {"documents": DOCUMENTS[:1], "turns": [{"question": "Who?", "answer": "Polk"}, {"question": "Where?", "answer": "Ohio"}]}
JOINED = {"context": "Hayes left Boston.", "question": "Who left?", "answer": "Hayes"}


def parts_of(shard, i):
    """Ids of prefix, of each part, and of the rest of a document."""
    ids, edges = shard.document(i), shard.spans[i : i + 1].edges.tolist()
    return np.split(ids, edges)


@pytest.mark.parametrize("template", ["plain", CHATML, LLAMA2])
def test_parts_are_their_own_text(chat, load, make, tmp_path, template):  # noqa: F811
    if template != "plain":
        (tmp_path / "template.jinja").write_text(template)
        template = tmp_path / "template.jinja"
    shard = make([ROW, TURNS], chat, "--linked", "--template", template)
    tokenizer = load(chat)
    prefix, *parts, rest = parts_of(shard, 0)
    want = tokenizer.encode_batch(TEXTS)
    assert len(parts) == 3 and all(np.array_equal(a, b) for a, b in zip(parts, want))
    assert "Read on." in tokenizer.decode(prefix) and "Where did Polk go?" in tokenizer.decode(rest)
    (begin, end), context = shard.spans[:1].ranges[0].tolist(), int(shard.spans.context[0])
    assert tokenizer.decode(shard.document(0)[begin:end]).strip() == "Ohio" and begin > context == len(prefix) + sum(
        map(len, want)
    )
    assert np.array_equal(parts_of(shard, 1)[1], want[0]) and len(shard.spans[1:2].ranges) == 2


def test_a_template_for_documents(bpe, load, make):  # noqa: F811
    row = {**ROW, "documents": [{"title": "A", "text": "x", "year": "1844"}]}
    shard = make([row], bpe, "--linked", "--document-template", "<{year}> {title}: {text}\\n\\n", "--template", "plain")
    assert load(bpe).decode(parts_of(shard, 0)[1]) == "<1844> A: x\n\n"


def test_shards_of_both_kinds_are_merged_shown_and_taken_up(bpe, tmp_path, make, run, load, monkeypatch):  # noqa: F811
    linked = make([ROW, TURNS], bpe, "--linked", name="linked")
    plain = make([JOINED], bpe, name="plain")
    assert (tmp_path / "plain.spans").read_bytes()[:16] == HEADER.pack(b"UNFSPANS", PLAIN, 1, 1)[:16]
    assert not plain.spans.edges.size and linked.spans.parts == 4
    assert run("merge", "--input", tmp_path / "plain", tmp_path / "linked", "--output", tmp_path / "m")[0] == 0
    status, out, _ = run("verify", tmp_path / "m", "--tokenizer", bpe)
    assert status == 0 and "OK" in out
    lazy, whole = open_lazily(str(tmp_path / "m")), open_shard(tmp_path / "m")
    assert (
        lazy.linked
        and lazy.edges(0) == []
        and [lazy.edges(i) for i in (1, 2)] == [linked.spans[i : i + 1].edges.tolist() for i in (0, 1)]
    )
    assert lazy.spans(1)[0] == whole.spans.context[1] and np.array_equal(lazy.spans(2)[1], whole.spans[2:3].ranges)
    assert not open_lazily(str(tmp_path / "plain")).linked
    _, out, _ = run("inspect", tmp_path / "linked", "--tokenizer", bpe, "--documents", 2)
    assert "4 linked documents" in out and "[document 1]Polk\nHe went to Ohio.\n[document 2]Tyler" in out
    _, out, _ = run("inspect", tmp_path / "linked", "--tokenizer", bpe, "--chunk-sizes", "4")
    assert "<gist0>[document 3]Grant" in out and "<gist0>[context ends]" in out, "every part is closed"
    _, out, _ = run("stats", tmp_path / "linked", "--json")
    assert json.loads(out)["linked_documents"] == 4


def test_a_run_that_was_cut_goes_on(bpe, tmp_path, make, run, monkeypatch):  # noqa: F811
    from unfold.data_prep import batches

    monkeypatch.setattr(batches, "BATCH_DOCUMENTS", 2)
    want = make([ROW, TURNS, ROW, TURNS], bpe, "--linked", name="whole")
    file = tmp_path / "cut.jsonl"
    good = [json.dumps(row) + "\n" for row in (ROW, TURNS, ROW)]
    command = ("tokenize-supervised", "--input", file, "--tokenizer", bpe, "--output", tmp_path / "c", "--no-plot", "--linked")
    file.write_text("".join(good) + "{")
    assert run(*command)[0] == 1
    file.write_text("".join(good) + json.dumps(TURNS) + "\n")
    assert run(*command)[0] == 0
    assert (tmp_path / "c.spans").read_bytes() == (tmp_path / "whole.spans").read_bytes()
    assert np.array_equal(open_shard(tmp_path / "c").tokens, want.tokens) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        ({"documents": ["a", " \n"]}, (), "document 2 of 2 is empty; leave it out"),
        ({"documents": []}, (), "no list of documents under 'documents'"),
        ({"documents": "one text"}, (), "no list of documents under 'documents'"),
        ({"documents": ["a", 3]}, (), "document 2 of 2 is int, neither a text nor an object"),
        ({"documents": [{"title": "a"}]}, (), "document 1 of 1 has no 'text', every document needs one; it has 'title'"),
        ({"documents": [{"text": 4}]}, (), "document 1 of 1: its 'text' is int, not text"),
        ({}, ("--document-template", "{titel}: {text}"), "document 1 of 3 has no 'titel', --document-template names it; it has"),
        ({"context": "x"}, (), "a context under 'context', but --linked takes a list"),
        ({"answer": " "}, (), "'answer' is empty"),
        ({"documents": ["a \uf8f6 b"]}, (), "private character"),
        ({}, ("--max-tokens", 20), "more than --max-tokens 20; give it fewer documents"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            (),
            "a prefix under 'prefix' and a system message",
        ),
    ],
)
def test_rows_that_cannot_be_used(bpe, tmp_path, fails, change, options, word):
    (tmp_path / "r.jsonl").write_text(json.dumps(ROW | change) + "\n")
    command = ("tokenize-supervised", "--input", tmp_path / "r.jsonl", "--tokenizer", bpe, "--output", tmp_path / "s", "--linked")
    fails(*command, *options, words=("r.jsonl:1", word))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--linked", "--truncate", "middle", "--max-tokens", 9), "--truncate middle: cuts contexts, but linked documents"),
        (("--document-template", "{text}"), "writes linked documents; give --linked"),
        (("--linked", "--document-template", "{text"), "write braces of the text itself twice"),
        (("--linked", "--document-template", "{text.x}"), "takes names of fields alone"),
        (("--linked", "--document-template", "text"), "names no field"),
    ],
)
def test_options_that_do_not_go_together(bpe, tmp_path, fails, options, word):
    (tmp_path / "r.jsonl").write_text(json.dumps(ROW) + "\n")
    command = ("tokenize-supervised", "--input", tmp_path / "r.jsonl", "--tokenizer", bpe, "--output", tmp_path / "s")
    fails(*command, *options, words=(word,))


@pytest.mark.parametrize("edges", [[5], [0, 2, 2, 5], [0, 3], [2, 4], [-1, 5]])
def test_edges_that_cannot_be(edges):
    good = (5, [(6, 7)])
    lengths = np.array([10, 10])
    assert Spans.of([good, good], [[0, 5], [1, 2, 5]]).defect(lengths) == ""
    assert "document 1: the parts" in Spans.of([good, good], [[], edges]).defect(lengths)
