"""`clean`: what stays, what goes and why; and `stats`."""

import json

import pytest

from tests.data_prep.texts import write_jsonl
from unfold.data_prep.corpus import clean
from unfold.data_prep.corpus.clean import mask_pii, quality_problem
from unfold.data_prep.format.shards import write_shard

BASE = " ".join(f"the word{i} of chapter {i % 7} and" for i in range(200))
PROSE = "It is the duty of the Congress to consider, with care, the state of the Union and of its people.\n"


def cleaned(run, tmp_path, texts, *options):
    write_jsonl(tmp_path / "c.jsonl", texts)
    status, out, err = run("clean", "--input", tmp_path / "c.jsonl", "--output", tmp_path / "o.jsonl", "--overwrite", *options)
    assert status == 0 and err == "", err
    drops = [json.loads(line) for line in open(tmp_path / "o.jsonl.dropped.jsonl")]
    kept = [json.loads(line)["text"] for line in open(tmp_path / "o.jsonl")]
    return kept, {int(d["place"].rpartition(":")[2]): d["reason"] for d in drops}, out


def test_exact_and_near_duplicates(run, tmp_path):
    near = BASE.replace("word17 ", "wort17 ")
    half = BASE[: len(BASE) // 2] + " ".join(f"other thing{i}" for i in range(300))
    texts = [BASE, PROSE, BASE.replace(" ", "  "), near, half, PROSE.upper()]
    kept, dropped, _ = cleaned(run, tmp_path, texts, "--exact")
    assert dropped == {3: "exact duplicate"} and len(kept) == 5
    kept, dropped, out = cleaned(run, tmp_path, texts, "--exact", "--near", 0.8)
    assert dropped == {3: "exact duplicate", 4: "near duplicate", 6: "near duplicate"}
    assert kept == [BASE, PROSE, half] and "3 of 6 documents" in out and "left out: 2 near duplicate" in out
    assert cleaned(run, tmp_path, texts)[0] == texts, "without options everything stays as it is"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE * 3, ""),
        ("a b c d e f g h i", "mean word length"),
        ("12345 6789 1011 12131 letters 1415", "60 % of the words"),
        ("#one #two #three #four words here", "# or ellipsis"),
        (PROSE * 20, "repeated lines"),
        ("\n".join(f"The beginning of a longer sentence with words, number {i} of many ..." for i in range(9)), "end in an"),
        (" \n", "empty"),
    ],
)
def test_quality_rules(text, reason):
    assert quality_problem(text) == reason or reason and reason in quality_problem(text)


def test_real_speeches_pass_and_other_rules(run, tmp_path, speeches):
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches.iterdir())]
    assert cleaned(run, tmp_path, texts, "--quality", "--language", "en", "--exact", "--near", 0.8)[0] == texts
    german = "Der Ausschuss hat die Frage nicht mit der Regierung beraten."
    options = ("--language", "en", "--min-words", 3, "--max-words", 99)
    _, dropped, _ = cleaned(run, tmp_path, [PROSE, german, "short", PROSE * 9], *options)
    assert dropped == {2: "not of language en", 3: "fewer than 3 words", 4: "more than 99 words"}


def test_personal_data_stays_unless_asked(run, tmp_path):
    text = "Write to a.b+c@mail.example.org from 192.168.0.254, version 1.2.3, 300.1.1.1"
    assert mask_pii(text) == "Write to <email> from <ip>, version 1.2.3, 300.1.1.1"
    assert cleaned(run, tmp_path, [text, PROSE])[0] == [text, PROSE]
    kept, _, out = cleaned(run, tmp_path, [text, PROSE], "--mask-pii")
    assert kept == [mask_pii(text), PROSE] and "masked in 1" in out


def test_refusals(run, fails, tmp_path, monkeypatch):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{\n')
    command = ("clean", "--input", tmp_path / "c.jsonl", "--output", tmp_path / "o.jsonl")
    fails(*command, words=("c.jsonl:2", "not valid JSON"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]
    status, out, _ = run(*command, "--on-error", "skip")
    assert status == 0 and "left out: 1 unreadable" in out
    fails(*command, words=("exists already",))
    fails(*command, "--overwrite", "--min-words", 5, "--on-error", "skip", words=("no document is left",))
    monkeypatch.setattr(clean, "find_spec", lambda name: None)
    fails(*command, "--overwrite", "--near", 0.5, words=("--near", "pip install datasketch"))


def test_stats(run, fails, tmp_path):
    for name, documents in {"a": [[1] * 5, [2]], "b": [[3] * 100]}.items():
        write_shard(tmp_path / name, documents, vocab_size=10)
    status, out, _ = run("stats", tmp_path / "a", tmp_path / "b.bin", "--plot", tmp_path / "x.png")
    assert status == 0 and "2 shards, 3 documents, 106 tokens, 212 bytes" in out and "#" in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("stats", tmp_path / "a", "--json")[1])["lengths"]["longest"] == 5
    fails("stats", tmp_path / "none", words=("none.json",))
