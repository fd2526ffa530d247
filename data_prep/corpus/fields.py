"""What a row of supervised data holds, and under which keys."""

import json
from dataclasses import dataclass

DOCUMENTS = "documents"  # a key beside the context's own, and a role: a list of texts, or one, that are the context


@dataclass(frozen=True)
class SupervisedFields:
    """The keys of the three kinds of rows: context, question, answer; context and turns; messages, perhaps with a context."""

    context: str = "context"
    question: str = "question"
    answer: str = "answer"
    turns: str = "turns"
    messages: str = "messages"

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that is looked at."""
        return (self.context, DOCUMENTS, self.question, self.answer, self.turns, self.messages)

    def pick(self, row: dict) -> tuple[str | None, str]:
        """(the fields that matter as JSON text, problem) of a row. A field that is null counts as missing."""
        present = {key: row[key] for key in self.columns if row.get(key) is not None}
        kinds = ((self.messages,), (self.turns,), (self.question, self.answer))
        kind = next((k for k in kinds if k[0] in present), kinds[-1])
        wanted = kind if kind[0] == self.messages else (self.context, *kind)
        absent = [k for k in wanted if k not in present and not (k == self.context and DOCUMENTS in present)]
        if absent:
            option = {v: k for k, v in vars(self).items()}[absent[0]]
            return None, f"no key {absent[0]!r}; name one of {sorted(map(str, row))} by --{option}-key"
        used = {key: value for key, value in present.items() if key in (*wanted, self.context, DOCUMENTS)}
        return json.dumps(used, ensure_ascii=False, default=str), ""
