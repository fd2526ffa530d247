"""What the benchmark of documents read once is for: the first token comes sooner, and what passes through the model says why."""

import pytest

from tests.benchmarks.documents_once import QUESTION, measure

LINKS = 5


def test_only_links_and_the_question_are_read(tmp_path):
    found = measure(documents=3, tokens=40, questions=2, directory=tmp_path)
    for name in ("read before", "read before, from files"):
        assert found[name].tokens == 3 * LINKS + QUESTION
    assert found["all in place"].tokens > 3 * 40 + QUESTION
    assert found["as parts, anew"].tokens > 3 * (40 + LINKS) + QUESTION


@pytest.mark.long
def test_ten_times_sooner(tmp_path):
    """Ten documents of a thousand tokens, in one run."""
    found = measure(documents=10, tokens=1000, questions=3, directory=tmp_path)
    for anew in ("all in place", "as parts, anew"):
        assert found[anew].seconds > 10 * found["read before"].seconds
