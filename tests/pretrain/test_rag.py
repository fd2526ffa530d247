"""Questions on retrieved documents: the layouts of five data sets, the place of the gold document, scores, and the command."""

import json
from argparse import Namespace

import pytest

from tests import warm
from tests.conftest import module
from tests.pretrain.test_evaluate_scores import write
from tests.supervised import add_links, make_linked_shard
from unfold.model.config import GistConfig
from unfold.model.decode.generation import Decoder
from unfold.pretrain.command import main
from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate import rag
from unfold.pretrain.evaluate.documents import Document, read_questions
from unfold.pretrain.evaluate.subject import make_variants

NQ = {
    "question": "who came?",
    "answers": ["Ann", "Anna"],
    "ctxs": [
        {"id": "1", "title": "A", "text": "Bob left.", "isgold": False, "hasanswer": True},
        {"id": "2", "title": "B", "text": "Ann came.", "isgold": True, "hasanswer": True},
        {"id": "3", "title": "C", "text": "Cid slept.", "isgold": False, "hasanswer": False},
    ],
}
TRIVIA = {
    "question": "Who came?",
    "answer": {"value": "Ann", "aliases": ["Anna", "Ann"], "normalized_aliases": ["ann"]},
    "entity_pages": {"title": ["A"], "wiki_context": ["Bob left."], "filename": ["a"]},
    "search_results": {"title": ["B", "E"], "search_context": ["So ANN came.", ""], "rank": [0, 1]},
}
HOTPOT = {
    "_id": "x",
    "question": "Who came?",
    "answer": "Ann",
    "supporting_facts": [["B", 0], ["C", 1]],
    "context": [["A", ["Bob left."]], ["B", ["Ann came.", " Late."]], ["C", ["Cid slept.", " Long."]]],
}
COLUMNS = {
    **HOTPOT,
    "supporting_facts": {"title": ["B", "C"], "sent_id": [0, 1]},
    "context": {"title": ["A", "B", "C"], "sentences": [["Bob left."], ["Ann came.", " Late."], ["Cid slept.", " Long."]]},
}
WIKI = {key: json.dumps(value) if key in ("context", "supporting_facts") else value for key, value in HOTPOT.items()}
MUSIQUE = {
    "question": "Who came?",
    "answer": "Ann",
    "answer_aliases": ["Anna"],
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "Bob left.", "is_supporting": False},
        {"idx": 1, "title": "B", "paragraph_text": "Ann came.", "is_supporting": True},
    ],
}
PLAIN = {"question": "Who came?", "answers": "Ann", "documents": ["Bob left.", {"title": "B", "text": "Ann came.", "gold": True}]}
LAYOUTS = {
    "nq": (NQ, ("Ann", "Anna"), [("A", "Bob left.", False), ("B", "Ann came.", True), ("C", "Cid slept.", False)]),
    "triviaqa": (TRIVIA, ("Ann", "Anna"), [("A", "Bob left.", False), ("B", "So ANN came.", True)]),
    "hotpotqa": (HOTPOT, ("Ann",), [("A", "Bob left.", False), ("B", "Ann came. Late.", True), ("C", "Cid slept. Long.", True)]),
    "hotpotqa_columns": (COLUMNS, ("Ann",), None),
    "2wikimqa": (WIKI, ("Ann",), None),
    "musique": (MUSIQUE, ("Ann", "Anna"), [("A", "Bob left.", False), ("B", "Ann came.", True)]),
    "plain": (PLAIN, ("Ann",), [("", "Bob left.", None), ("B", "Ann came.", True)]),
}


def read(path, most=None, gold_at=None):
    return list(read_questions(path, most, gold_at))


def texts(item):
    return [document.text for document in item.documents]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    row, answers, documents = LAYOUTS[name]
    item = read(write(tmp_path / f"{name}.jsonl", row))[0]
    assert (item.dataset, item.question, item.answers) == (name, row["question"], answers)
    expected = documents or LAYOUTS["hotpotqa"][2]
    assert item.documents == tuple(Document(*document) for document in expected)


def test_the_gold_document_is_put_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "nq.jsonl", NQ)
    left, came, slept = (entry["text"] for entry in NQ["ctxs"])
    assert texts(read(path)[0]) == [left, came, slept]
    assert texts(read(path, gold_at=0)[0]) == [came, left, slept]
    assert texts(read(path, gold_at=2)[0]) == [left, slept, came]
    assert texts(read(path, most=2)[0]) == [left, came]  # gold stays, and the first of the others
    assert texts(read(path, most=1)[0]) == [came]
    both = read(write(tmp_path / "h.jsonl", HOTPOT), gold_at=1)[0]
    assert [document.title for document in both.documents] == ["A", "B", "C"]
    assert [d.title for d in read(tmp_path / "h.jsonl", most=2)[0].documents] == ["B", "C"]


WRONG = {
    "unknown fields": ({"prompt": "x"}, {}, "has the fields prompt; expected documents as"),
    "no gold": ({**PLAIN, "documents": ["a", "b"]}, {"gold_at": 0}, "says of no document that it is gold"),
    "beyond": (NQ, {"gold_at": 3}, "--gold-at 3: has 2 other documents only"),
    "too few": (HOTPOT, {"most": 1}, "has 2 gold documents; --documents 1"),
    "empty": ({**PLAIN, "documents": ["a", " "]}, {}, "document 2 is empty"),
    "none": ({**PLAIN, "documents": []}, {}, "has no document"),
    "no text": ({**NQ, "ctxs": [{"title": "A"}]}, {}, "ctxs[0] is neither a text nor an object with text"),
    "no list": ({**MUSIQUE, "paragraphs": "x"}, {}, "paragraphs is 'x', expected a list"),
    "no pairs": ({**HOTPOT, "context": [["A"]]}, {}, "context[0] is no pair of a title and its sentences"),
    "a text": ({**HOTPOT, "context": "Ann came."}, {}, "context is a text that is not JSON"),
    "no answer": ({**NQ, "answers": []}, {}, "answers is []"),
    "no question": ({**NQ, "question": None}, {}, "question is None"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_lines_are_told_with_file_and_line(tmp_path, what):
    row, settings, message = WRONG[what]
    path = write(tmp_path / "x.jsonl", "", row)
    with pytest.raises(UserError) as error:
        read(path, **settings)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_scores_of_known_answers(tmp_path):
    """Subspan: the answer stands in what was written, whatever else does. Three answers, two of them right."""
    items = read(write(tmp_path / "nq.jsonl", NQ, NQ)) + read(write(tmp_path / "m.jsonl", MUSIQUE))
    prompts = [rag.RagPrompt(item, [1], [[2], [3]], [4]) for item in items]
    written = [rag.Answer("It was the ANNA.", 10), rag.Answer("Bob", 20), rag.Answer("ann", 60)]
    result = rag.summary(prompts, written)
    assert result["datasets"]["nq"]["subspan_em"] == 50 and result["datasets"]["m"]["subspan_em"] == 100
    assert result["subspan_em"] == 75 and result["tokens_read"] == 30
    assert result["datasets"]["nq"]["f1"] == pytest.approx(100 * (2 / 4) / 2)  # 'it was anna' against 'anna'
    head, body = rag.rows([{"name": "dense", **result}])
    assert len(head) == len(body[0]) and body[0][-5:] == ["75.00", "62.50", "30", "0", "0.000"]


@pytest.fixture(scope="module")
def tokenizer(tiny, tmp_path_factory):
    return add_links(tiny, tmp_path_factory.mktemp("links") / "tokenizer")


@pytest.fixture(scope="module")
def run_dir(tiny, tokenizer, tmp_path_factory):
    """A run of one step on linked documents."""
    directory = tmp_path_factory.mktemp("rag")
    shard = str(make_linked_shard(tokenizer, directory / "shard", 12))
    data = {"train": [shard], "valid": [], "tokenizer": str(tokenizer), "raw_tokens": 256, "shuffle_parts": True}
    sections = {"model": {"max_position": 256}, "train": {"steps": 1, "valid_every": 0}, "checkpoint": {"every": 1}}
    gist = {"chunk_sizes": [4, 2], "recall": "suffix", "links": 3}
    config = tiny.config(directory / "c.yaml", **sections, data=data, gist=gist)
    warm.command("pretrain", "train", "--config", config, "--run-dir", directory / "run")
    return directory / "run"


def evaluate(capsys, *flags):
    """(exit status, stdout, stderr)"""
    status = main(["evaluate", "rag", *map(str, flags)])
    return status, *capsys.readouterr()


def test_rag_command(run_dir, tmp_path, capsys):
    files = [write(tmp_path / f"{name}.jsonl", LAYOUTS[name][0]) for name in ("nq", "musique", "triviaqa")]
    flags = ["--run-dir", run_dir, "--data", *files, "--max-new-tokens", 3, "--output", tmp_path / "o"]
    status, out, _ = evaluate(capsys, *flags, "--gold-at", 1, "--show-prompt", "--chat", "plain")
    assert status == 0 and "1, musique" in out and not (tmp_path / "o" / "rag.json").exists()
    assert "by the documents." not in out and "\n\n\nQuestion: who came?\nAnswer:\n" in out
    assert out.split("[document 2: ")[1].split("[document 3: ")[0].endswith("B\nAnn came.\n\n")
    status, out, _ = evaluate(capsys, *flags, "--documents", 2)
    assert status == 0 and "3 questions on 2 documents each" in out
    result = json.loads((tmp_path / "o" / "rag.json").read_text())
    names = [r["name"] for r in result["results"]]
    assert names == ["dense", "forget 4,2", "recall 4,2", "linked forget 4,2", "linked recall 4,2"]
    lines = [json.loads(line) for line in (tmp_path / "o" / "predictions.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in lines] == [[1], [1], [1]]
    for arm in result["results"]:
        read = [line["written"][arm["name"]]["tokens_read"] for line in lines]
        assert arm["tokens_read"] == pytest.approx(sum(read) / 3)
        scores = [line["written"][arm["name"]]["subspan_em"] for line in lines]
        assert arm["subspan_em"] == pytest.approx(sum(scores) / 3)
    dense, forget, _, _, linked = result["results"]
    assert linked["tokens_read"] < dense["tokens_read"] + 6 < forget["tokens_read"] + 6 and forget["cost"]["first_token_s"] > 0
    assert (tmp_path / "o" / "rag.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gold-at", -1], "--gold-at -1: is below 0"),
        (["--documents", 0], "--documents 0: is below 1"),
        (["--document-template", "{text} {url}"], "nq.jsonl:1: document 1 of 3 has no 'url', --document-template names it"),
        (["--document-template", "{text"], "--document-template '{text'"),
        (["--question-template", "?"], "--question-template '?': has no {question}"),
        (["--max-new-tokens", 300], "nq.jsonl:1: its 3 documents (see --documents, --document-tokens): 3"),
        (["--mode", "dense", "--topk", 3], "--topk: sets what recall selects"),
        (["--links", 4, "--mode", "linked-recall"], "--mode linked-recall: documents have 4 links each (gist.links), but"),
        (["--links", 4], "--links 4: documents have 4 links each (gist.links), but"),
        (["--links", -1], "links"),
    ],
)
def test_mistakes_end_in_one_line(run_dir, tmp_path, capsys, flags, message):
    data = write(tmp_path / "nq.jsonl", NQ)
    status, out, err = evaluate(capsys, "--run-dir", run_dir, "--data", data, "--output", tmp_path / "o", *flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and out == "" and len(errors) == 1 and message in errors[0]


def test_linked_modes_are_compared_where_there_are_links():
    from unfold.data_prep.format.tokenizer import TokenizerInfo
    from unfold.pretrain.command import build_parser

    parse = lambda kind, *flags: build_parser().parse_args(["evaluate", kind, "--run-dir", "x", "--output", "x", *flags])
    info = TokenizerInfo("sentencepiece", 20, (10, 11), ("<gist0>", "<gist1>"), 1, 2, 3, "x", (12, 13, 14))
    names = lambda links, kind="rag", *flags: [
        v.name for v in make_variants(parse(kind, "--data", "x", *flags), GistConfig((4, 2), links=links), info, "x")
    ]
    assert names(3) == ["dense", "forget 4,2", "recall 4,2", "linked forget 4,2", "linked recall 4,2"]
    assert names(4) == names(3, "perplexity") == ["dense", "forget 4,2", "recall 4,2"]
    assert names(4, "rag", "--links", "2", "--mode", "linked-recall", "dense") == ["linked recall 4,2", "dense"]


def test_linked_documents_are_read_once(run_dir, tmp_path, capsys, monkeypatch):
    """Two questions on the same documents in another order: the second one reads none of them."""
    read_part, documents = Decoder.read_part, []
    monkeypatch.setattr(Decoder, "read_part", lambda self, tokens: documents.append(tokens) or read_part(self, tokens))
    again = {**NQ, "question": "who left?", "ctxs": NQ["ctxs"][::-1]}
    data = write(tmp_path / "nq.jsonl", NQ, again)
    flags = ["--run-dir", run_dir, "--data", data, "--mode", "recall", "linked-forget", "linked-recall"]
    status, out, _ = evaluate(capsys, *flags, "--max-new-tokens", 3, "--output", tmp_path / "o")
    assert status == 0 and "| linked recall 4,2 |" in out
    lines = [json.loads(line)["written"] for line in (tmp_path / "o" / "predictions.jsonl").read_text().splitlines()]
    for first, second in ([line[name] for line in lines] for name in ("linked forget 4,2", "linked recall 4,2")):
        assert first["tokens_reused"] == second["tokens_reused"] > 0 and first["tokens_read"] > 0
        assert first["documents_s"] > 0
    # In each linked mode three for the question that does not count, and three for the others.
    assert len(documents) == 12 and documents[:3] == documents[3:6] == documents[6:9]
    joined = lines[0]["recall 4,2"]
    assert joined["tokens_reused"] == joined["documents_s"] == 0
    linked = json.loads((tmp_path / "o" / "rag.json").read_text())["results"][2]
    assert linked["linked"] and linked["mode"] == "recall" and linked["cost"]["first_token_s"] > 0


def test_linked_questions_are_asked_as_they_are_learned(run_dir, tokenizer, tmp_path):
    """Prefix, parts and question are those of `tokenize-supervised --linked` of the same row, token by token."""
    from unfold.data_prep.format.shards import open_shard
    from unfold.data_prep.format.spans import Spans
    from unfold.pretrain.command import build_parser
    from unfold.pretrain.evaluate.subject import load_subject

    row = {"prefix": "Be brief.", "question": "Who came?", "answer": "Ann", "documents": PLAIN["documents"]}
    data = write(tmp_path / "train.jsonl", row)
    output = ["--tokenizer", tokenizer, "--output", tmp_path / "shard", "--no-plot"]
    module("data_prep", "tokenize-supervised", "--linked", "--template", "plain", "--input", data, *output)
    learned = open_shard(tmp_path / "shard").document(0).tolist()
    path = write(tmp_path / "plain.jsonl", PLAIN)
    flags = ["--run-dir", str(run_dir), "--data", str(path), "--output", "x", "--chat", "plain", "--system", "Be brief."]
    args = build_parser().parse_args(["evaluate", "rag", *flags])
    prompt = rag.make_prompt(load_subject(args), read(path)[0], args)
    asked = [*prompt.context, *prompt.question]
    assert learned[: len(asked)] == asked and 0 < len(learned) - len(asked) < 6
    edges = [len(prompt.prefix), len(prompt.prefix) + len(prompt.parts[0]), len(prompt.context)]
    assert Spans.from_file(tmp_path / "shard.spans").edges.tolist() == edges


def test_documents_have_the_same_tokens_wherever_they_stand(run_dir, tmp_path):
    from unfold.pretrain.command import build_parser
    from unfold.pretrain.evaluate.subject import load_subject

    path = write(tmp_path / "nq.jsonl", NQ)
    flags = ["--run-dir", str(run_dir), "--data", str(path), "--output", "x", "--document-tokens", "4"]
    args = build_parser().parse_args(["evaluate", "rag", *flags])
    subject = load_subject(args)
    first, last = (rag.make_prompt(subject, read(path, gold_at=place)[0], args) for place in (0, 2))
    assert first.parts == [last.parts[2], *last.parts[:2]] and all(len(part) <= 4 for part in first.parts)
    assert (first.prefix, first.question) == (last.prefix, last.question)
    whole = rag.make_prompt(subject, read(path)[0], Namespace(**{**vars(args), "document_tokens": None}))
    assert whole.parts[0] == subject.encode("A\nBob left.\n")
