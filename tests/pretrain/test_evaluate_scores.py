"""Scores against values worked out by hand; task files: what they mean, and what is wrong with them."""

import json
from argparse import Namespace

import pytest

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate import passkey, tasks
from unfold.pretrain.evaluate.items import read_items
from unfold.pretrain.evaluate.longbench import LONGBENCH as LONGBENCH_SETS
from unfold.pretrain.evaluate.metrics import FIRST_LINE, METRICS
from unfold.pretrain.evaluate.output import table


def score(name, prediction, *answers, classes=()):
    return METRICS[name](prediction, answers, classes)


def test_f1():
    # 'cat sat on mat' and 'cat on mat mat' share cat, on, one mat: precision 3/4, recall 3/4.
    assert score("f1", "The cat sat on a mat.", "cat on mat mat") == pytest.approx(0.75)
    # precision 1/3, recall 1/2
    assert score("f1", "in Paris, France", "Paris Texas") == pytest.approx(0.4)
    assert score("f1", "Paris", "London", "the paris!") == 1.0  # the best answer counts; case, article, mark do not
    assert score("f1", "", "Paris") == score("f1", "the", "an") == 0.0
    assert FIRST_LINE["f1"]("\nParis\nand so on", ["Paris"]) == 1.0
    assert score("f1", "\nParis\nand so on", "Paris") == pytest.approx(0.4)


def test_exact_match_and_contains():
    assert score("exact_match", "The  Eiffel Tower.", "eiffel tower") == 1
    assert score("exact_match", "Eiffel Tower in Paris", "Eiffel Tower") == 0
    assert score("contains", "It is the Eiffel Tower, I think", "eiffel tower") == 1
    assert score("contains", "It is a tower", "eiffel tower") == 0


def test_rouge_l():
    # Longest common subsequence 'police the gunman' has 3 words: recall 3/4, precision 3/4.
    assert score("rouge_l", "police kill the gunman", "police killed the gunman") == pytest.approx(0.75, abs=1e-6)
    # In another order only 'gunman' or 'police' is left of it, with 'the': recall and precision 2/4.
    assert score("rouge_l", "the gunman kill police", "police killed the gunman") == pytest.approx(0.5, abs=1e-6)
    assert score("rouge_l", "", "police") == score("rouge_l", ".", "police") == 0


def test_chinese_words():
    # 上海, 在, 中国 against 上海, 位于, 中国: two of three on both sides; marks and blanks are no words.
    assert score("f1_zh", "上海 在中国。", "上海位于中国！") == pytest.approx(2 / 3)
    assert score("f1_zh", "上海", "北京", "上海。") == 1.0 and score("f1_zh", "。", "上海") == 0.0
    assert score("rouge_l_zh", "上海在中国", "上海位于中国") == pytest.approx(2 / 3, abs=1e-6)
    assert score("rouge_l_zh", "中国在上海", "上海位于中国") == pytest.approx(1 / 3, abs=1e-6)  # no two words in one order
    assert score("retrieval", "段落12，段落3", "段落12") == 0.5


def test_all_of_longbench(tmp_path):
    """Its 21 data sets; the six without chat templates and the four of which the first line counts are those of its code."""
    assert len(LONGBENCH_SETS) == 21
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, kind in LONGBENCH_SETS.items() if not kind.chat} == plain
    first = {name for name, kind in LONGBENCH_SETS.items() if kind.metrics[0].first_line}
    assert first == {"trec", "triviaqa", "samsum", "lsht"}
    row = {**LONGBENCH, "dataset": "multifieldqa_zh", "answers": ["上海"]}
    item = read(write(tmp_path / "x.jsonl", row))[0]
    assert item.kind.metrics[0].name == "f1_zh" and item.question.endswith("答案：")


def test_classification():
    classes = ("City", "Capital city", "River", "Lake")
    assert score("classification", "River", "River", classes=classes) == 1
    assert score("classification", "River or Lake", "River", classes=classes) == 0.5
    assert score("classification", "Mountain", "River", classes=classes) == 0
    assert score("classification", "Lake\nRiver", "River", classes=classes) == 0  # only the first line counts
    assert score("classification", "big river City", "City", classes=classes) == 1
    # 'city' in the answer's own name is no second class
    assert score("classification", "Capital city", "Capital city", classes=("city", "Capital city")) == 1


def test_numbers():
    assert score("retrieval", "Paragraph 12, or 3, 12", "Paragraph 12") == pytest.approx(2 / 3)
    assert score("retrieval", "none", "Paragraph 12") == 0
    assert score("count", "17 of 20", "17") == 0.5
    assert score("count", "117", "17") == 0


def test_code_similarity():
    # 'return a' in both, 8 of 9 + 8 characters: 16 / 17
    assert score("code_similarity", "\n# sum\nreturn ab\nreturn c", "return a") == pytest.approx(0.94)
    assert score("code_similarity", "```", "return a") == 0


def test_string_matches():
    assert score("match_all", "The keys are 123 and ABC.", "123", "abc", "456", "789") == 0.5
    assert score("match_part", "The keys are 123", "999", "123") == 1
    assert score("match_part", "nothing", "999", "123") == 0


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path, prompts=None, lengths=None, metric=None):
    return list(read_items(path, prompts or {}, lengths or {}, metric))


LONGBENCH = {
    "input": "Who?",
    "context": "Ann came. Who? {input}",
    "answers": ["Ann"],
    "all_classes": None,
    "dataset": "hotpotqa",
    "length": 3,
    "_id": "x",
}
RULER = {"index": 0, "input": "Memorize.\nA 17. B 8.\nWhat is A? A is", "outputs": ["17"], "length": 20}
RAG = {"question": "Who?", "documents": ["Ann came.", {"title": "B", "text": "Bob left."}], "answers": ["Ann", "Anna"]}


def test_longbench_layout(tmp_path):
    path = write(tmp_path / "any.jsonl", LONGBENCH, "", {**LONGBENCH, "dataset": "gov_report_e", "input": ""})
    first, second = read(path, lengths={"gov_report": 7})
    assert (first.place, first.dataset, first.kind.max_new_tokens) == (f"{path}:1", "hotpotqa", 32)
    assert first.context == LONGBENCH["context"]  # what the context holds is no mark of the prompt
    assert first.question.endswith("Question: Who?\nAnswer:")
    assert (second.place, second.dataset, second.kind.max_new_tokens) == (f"{path}:3", "gov_report_e", 7)
    assert (first.words, second.words) == (None, 3)
    assert second.kind.metrics[0].name == "rouge_l"
    given = read(path, prompts={"hotpotqa": "Read {context} and say: {input} Say"})[0]
    assert given.context == "Read " + LONGBENCH["context"] and given.question == " and say: Who? Say"


def test_ruler_layout(tmp_path):
    (tmp_path / "niah_single_1").mkdir()
    item = read(write(tmp_path / "niah_single_1" / "validation.jsonl", RULER))[0]
    assert item.dataset == "niah_single_1" and item.kind.metrics[0].name == "match_all" and item.kind.max_new_tokens == 128
    assert item.context == "Memorize.\nA 17. B 8." and item.question == "\nWhat is A? A is"
    row = {**RULER, "input": "D 1\nQuestion: x\nD 2\n\nAnswer it.\n\nQuestion: Who?\n Answer:", "answer_prefix": " He"}
    item = read(write(tmp_path / "qa_1.jsonl", row))[0]
    assert item.kind.metrics[0].name == "match_part" and item.kind.max_new_tokens == 32
    assert (item.question, item.opening) == ("\nQuestion: Who?\n Answer:", " He") and item.context.endswith("Answer it.\n")


def test_documents_layout(tmp_path):
    item = read(write(tmp_path / "nq.jsonl", RAG))[0]
    assert item.dataset == "nq" and [m.name for m in item.kind.metrics] == ["f1", "exact_match", "contains"]
    assert item.context == "Document 1:\nAnn came.\n\nDocument 2: B\nBob left." and "Question: Who?" in item.question
    assert [m.name for m in read(tmp_path / "nq.jsonl", metric="rouge_l")[0].kind.metrics] == ["rouge_l"]


WRONG = {
    "no JSON": ('{"input":', "is not JSON"),
    "no object": ("[1]", "holds list, expected an object"),
    "unknown fields": ({"prompt": "x"}, "has the fields prompt; expected"),
    "no answers": ({**LONGBENCH, "answers": []}, "answers is []"),
    "answers of another type": ({**RULER, "outputs": [17]}, "outputs is [17]"),
    "context of another type": ({**LONGBENCH, "context": 5}, "context is 5, expected a text"),
    "no classes": ({**LONGBENCH, "dataset": "trec"}, "has no all_classes"),
    "no Chinese classes": ({**LONGBENCH, "dataset": "lsht"}, "has no all_classes"),
    "no Chinese number": ({**LONGBENCH, "dataset": "passage_retrieval_zh", "answers": ["段落"]}, "have no number"),
    "one line": ({**RULER, "input": "What is A?"}, "must begin a line"),
    "no number": ({**LONGBENCH, "dataset": "passage_retrieval_en"}, "have no number"),
    "document": ({**RAG, "documents": ["a", 3]}, "documents[1] is neither"),
    "no documents": ({**RAG, "documents": []}, "documents is not a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_lines_are_told_with_file_and_line(tmp_path, what):
    row, message = WRONG[what]
    path = write(tmp_path / "tasks.jsonl", LONGBENCH, row)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read as text"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no question"):
        read(write(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="has no {context}"):
        read(write(tmp_path / "x.jsonl", LONGBENCH), prompts={"hotpotqa": "{input}"})
    with pytest.raises(UserError, match="each with a number"):
        tasks._map(write(tmp_path / "n.json", {"a": "b"}), "--answer-lengths", int)


class Words:
    """A subject whose tokens are words: ids are places in the list of words seen."""

    def __init__(self):
        self.words = []

    def encode(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def prompt(self, context, question, opening, chat):
        return self.encode(context), self.encode(question + opening)


def test_contexts_are_cut_in_the_middle(tmp_path):
    row = {**LONGBENCH, "context": " ".join(f"w{i}" for i in range(50))}
    item = read(write(tmp_path / "x.jsonl", row), prompts={"hotpotqa": "{context} Q: {input} A:"}, lengths={"hotpotqa": 4})[0]
    whole = tasks.make_prompt(Words(), item, 57)
    assert whole.left_out == 0 and len(whole.context) == 50 and len(whole.question) == 3
    cut = tasks.make_prompt(Words(), item, 18)
    assert cut.context == [0, 1, 2, 3, 4, 5, 45, 46, 47, 48, 49] and cut.left_out == 39
    assert tasks.make_prompt(Words(), item, 8).context == [0]
    with pytest.raises(UserError, match=r"x.jsonl:1: the question takes 3 raw tokens, its answer 4; .* fit into 7"):
        tasks.make_prompt(Words(), item, 7)


def test_means_of_a_known_model(tmp_path):
    """Three questions answered in a known way: 100, 40 and 0 percent."""
    rows = [LONGBENCH, {**LONGBENCH, "answers": ["Paris Texas"]}, {**RULER, "task": "niah"}]
    prompts = [
        tasks.Prompt(item, [1], [1], left_out) for item, left_out in zip(read(write(tmp_path / "x.jsonl", *rows)), (0, 9, 0))
    ]
    result = tasks.summary(prompts, ["ann", "in Paris, France", "18"])
    assert result["datasets"]["hotpotqa"] == {
        "score": pytest.approx(70),
        "metrics": {"f1": pytest.approx(70)},
        "questions": 2,
        "truncated": 1,
    }
    assert result["datasets"]["niah"]["score"] == 0 and result["score"] == pytest.approx(35)
    head, body = tasks.rows([{"name": "dense", **result}])
    assert body[0] == ["hotpotqa", "f1", "2", "1", "70.00"] and body[-1][-1] == "35.00"
    lines = list(table(head, body))
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(body) + 2


def test_longbench_e_is_scored_by_length(tmp_path):
    rows = [{**LONGBENCH, "length": length, "answers": [who]} for length, who in ((3999, "Ann"), (10, "Bob"), (8000, "Ann"))]
    items = read(write(tmp_path / "hotpotqa_e.jsonl", *rows))
    result = tasks.summary([tasks.Prompt(item, [1], [1], 0) for item in items], ["Ann"] * 3)
    entry = result["datasets"]["hotpotqa_e"]
    assert entry["by_length"] == {"0-4k": {"score": 50, "questions": 2}, "8k+": {"score": 100, "questions": 1}}
    assert entry["score"] == pytest.approx(200 / 3)
    _, body = tasks.rows([{"name": "dense", **result}])
    assert [row[0] for row in body] == ["hotpotqa_e", "hotpotqa_e 0-4k", "hotpotqa_e 8k+", "mean of data sets"]
    assert body[1] == ["hotpotqa_e 0-4k", "f1", "2", "", "50.00"]


class Oracle:
    """A reader that finds keys in the second half of a text only, and is unsure between two keys of one digit sum."""

    def read(self, context, question):
        return context

    def write(self, sequence, most):
        return " " + "".join(map(str, sequence[-3:])) + ". And 5"

    def weigh(self, sequence, candidates):
        return [-1.0 if sum(candidate) == sum(sequence[-3:]) else -2.0 for candidate in candidates]


def test_scores_of_a_passkey():
    find = lambda digits, *others: passkey.answer(Oracle(), passkey.Trial([9, 9, *digits], [1], [[1, 2, 3], *others], "123"))
    assert find([1, 2, 3], [4, 4, 4]) == (True, 1)
    assert find([3, 2, 1], [4, 4, 4]) == (False, 1)
    assert find([1, 2, 3], [3, 2, 1]) == (True, 2)  # a tie counts against the key
    assert find([4, 4, 4], [4, 4, 4], [0, 0, 0]) == (False, 3)
    assert passkey.written_key("it is 0123, or 5") == "0123" and passkey.written_key("no") == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(trials=0), "--trials 0: is below 1"),
        (dict(candidates=1), "--candidates 1: is below 2"),
        (dict(digits=1, candidates=10), "not so many keys of 1 digits"),
        (dict(depths=[0.5, 1.5]), "--depths 1.5: is not between 0 and 1"),
    ],
)
def test_wrong_passkey_settings(flags, message):
    args = Namespace(**{"trials": 1, "digits": 5, "candidates": 3, "depths": [0.0], "lengths": None, **flags})
    with pytest.raises(UserError, match=message):
        next(passkey.passkey(args))
