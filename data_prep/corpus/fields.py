"""What a row of supervised data holds, and under which keys."""

import json
from collections.abc import Container
from dataclasses import dataclass

from unfold.data_prep.corpus.messages import SHAREGPT_KEY, is_chat

DOCUMENTS = "documents"  # a key beside the context's own, and a role: a list of texts, or one, that are the context


def reach(row: dict, key: str) -> tuple[bool, object]:
    """(whether it is there, value) of a key: one of the row itself, else a dotted one that reaches inside (`meta.text`)."""
    if key in row:
        return True, row[key]
    found: object = row
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return False, None
        found = found[part]
    return True, found


def column_of(key: str, names: Container[str]) -> str:
    """The column of a table that a key needs."""
    return key if key in names else key.split(".")[0]


@dataclass(frozen=True)
class SupervisedFields:
    """The keys of the three kinds of rows: context, question, answer; context and turns; messages, perhaps with a context.

    A row whose context is linked documents may have a prefix, too.
    """

    context: str = "context"
    question: str = "question"
    answer: str = "answer"
    turns: str = "turns"
    messages: str = "messages"
    prefix: str = "prefix"

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that is looked at."""
        return (self.context, DOCUMENTS, self.prefix, self.question, self.answer, self.turns, self.messages, SHAREGPT_KEY)

    def pick(self, row: dict) -> tuple[str | None, str]:
        """(the fields that matter as JSON text, problem) of a row. A field that is null counts as missing."""
        present = {key: value for key in self.columns if (value := reach(row, key)[1]) is not None}
        chat = present.pop(SHAREGPT_KEY, None) if self.messages != SHAREGPT_KEY else None
        if is_chat(chat):
            present.setdefault(self.messages, chat)
        kinds = ((self.messages,), (self.turns,), (self.question, self.answer))
        kind = next((k for k in kinds if k[0] in present), kinds[-1])
        wanted = kind if kind[0] == self.messages else (self.context, *kind)
        absent = [k for k in wanted if k not in present and not (k == self.context and DOCUMENTS in present)]
        if absent:
            option = {v: k for k, v in vars(self).items()}[absent[0]]
            return None, f"no key {absent[0]!r}; name one of {sorted(map(str, row))} by --{option}-key"
        used = {key: value for key, value in present.items() if key in (*wanted, self.context, DOCUMENTS, self.prefix)}
        return json.dumps(used, ensure_ascii=False, default=str), ""
