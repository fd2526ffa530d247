"""What reading a corpus yields, and how a row becomes a text."""

import json
from typing import NamedTuple

from unfold.data_prep.corpus.fields import reach
from unfold.data_prep.corpus.messages import SHAREGPT_KEY, ChatText, is_chat
from unfold.data_prep.corpus.sources import Source

BOM = b"\xef\xbb\xbf"
CHAT_KEYS = ("messages", SHAREGPT_KEY)  # looked at where a row has no text


class Position(NamedTuple):
    """A place between two documents of a corpus."""

    source: int = 0  # index of the source
    offset: int = 0  # in it: bytes of the decompressed stream, or rows
    line: int = 1  # number of the line (or row) that begins there


class Document(NamedTuple):
    """One text, exactly as the file has it; or why there is none."""

    text: str
    source: int  # index of its source
    line: int  # number of its first line (or row)
    after: Position
    consumed: int  # bytes of the file up to here, for progress
    problem: str = ""
    filtered: bool = False  # left out by a condition


def text_of(row: dict, source: Source) -> tuple[str | None, str, bool]:
    """(text, problem, kept) of a row; kept is False where a condition leaves it out."""
    try:
        if not all(condition.holds(row) for condition in source.where):
            return "", "", False
    except ValueError as e:
        return None, str(e), True
    if source.fields:
        return *source.fields.pick(row), True
    key = source.text_key
    present, value = reach(row, key)
    if not present and source.chats:
        key = next((name for name in CHAT_KEYS if is_chat(row.get(name))), key)
        present, value = reach(row, key)
    if not present:
        return None, f"no key {key!r}; name one of {sorted(map(str, row))} by --text-key", True
    if source.chats and is_chat(value):
        return ChatText(json.dumps(value, ensure_ascii=False, default=str)), "", True
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        what = "neither text nor a chat" if source.chats else "not text"
        return None, f"{key!r} is {kind}, {what}; correct the file, or name another key by --text-key", True
    return value, "", True


def too_long(size: int, limit: int) -> str:
    """What to tell of a line or document beyond the limit."""
    return f"a document of {size:,} bytes, more than the limit of {limit:,}; raise --max-document-mb, or split it"
