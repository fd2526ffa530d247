"""Chat templates: messages to text as transformers' apply_chat_template writes it, and where in it the parts begin and end.

The parts are told by private characters that are put into the messages' contents before they are rendered. What the
template writes must be the same without them, or the document is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from unfold.data_prep.errors import DataError
from unfold.data_prep.format.text import read_text
from unfold.data_prep.format.tokenizer import CHAT_TEMPLATE_FILE, CONFIG_FILE, ControlToken, TokenizerInfo, locate, read_json

CONTEXT_END, ANSWER, ANSWER_END, PART = "\uf8f1", "\uf8f2", "\uf8f3", "\uf8f6"
_ESCAPE, _ESCAPE_END = "\uf8f4", "\uf8f5"  # around the number of a control token that stands in a content as mere text
MARKS = re.compile(f"([{CONTEXT_END}{ANSWER}{ANSWER_END}{PART}])")
RESERVED = re.compile("[\uf8f1-\uf8f6]")
SEPARATOR = "\n\n"  # between documents of a context, and between a context and the question in one message
PLAIN = """\
{%- for message in messages -%}
{%- if message.role in ['context', 'system'] -%}
{{ message.content ~ '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ 'Question: ' ~ message.content ~ '\\nAnswer:\\n' }}
{%- elif message.role == 'assistant' -%}
{{ message.content ~ eos_token }}{{ '' if loop.last else '\\n\\n' }}
{%- else -%}
{{ raise_exception('the plain template knows context, system, user and assistant, not ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
"""


class _Generation(Extension):
    """{% generation %} .. {% endgeneration %}, by which some templates mark answers: what is inside, as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # jinja's own escapes for HTML


class ChatTemplate:
    """A Jinja template over `messages`, in the environment that transformers gives it. The date is not known in it."""

    def __init__(self, source: str, name: str, special_tokens: dict[str, str]):
        """Compile.

        Args:
            name: stands for it in errors.
            special_tokens: 'bos_token', .. -> the token, those that there are.

        Raises:
            DataError: it is not a Jinja template.
        """
        self.name = name
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
            constants = {node.value for node in environment.parse(source).find_all(nodes.Const)}
        except jinja2.TemplateError as e:
            raise DataError(f"the template {name}: not a Jinja template: {e}") from None
        self.takes_context = "context" in constants  # as a role of its own; else it goes into the first question's message

    def render(self, messages: list[dict], answer: bool = False) -> str:
        """The text of messages, each {"role": .., "content": .., ..}.

        Args:
            answer: an answer is to follow: the beginning of the assistant's turn is written, too.

        Raises:
            DataError: the template refuses them.
        """
        values = {"tools": None, "documents": None, "add_generation_prompt": answer, **self._special_tokens}
        try:
            return self._template.render(messages=messages, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as e:
            raise DataError(f"the template {self.name} cannot write it: {e}") from None

    def render_marked(self, messages: list[dict], answer: bool = False) -> str:
        """The text of messages (as :meth:`render`) with marks in their contents; every mark comes out where its place is.

        Raises:
            DataError: the template refuses them, leaves a mark out, or writes other text where marks are.
        """
        bare = lambda: self.render(_map_contents(messages, lambda text: RESERVED.sub("", text)), answer)
        marked = self.render(messages, answer)
        if RESERVED.sub("", marked) != bare():
            messages = _map_contents(messages, _trim)  # as many templates do themselves
            marked = self.render(messages, answer)
            if RESERVED.sub("", marked) != bare():
                raise DataError(f"the template {self.name} alters a content, so that its places are lost")
        expected = MARKS.findall("".join(message["content"] for message in messages))
        if MARKS.findall(marked) != expected:
            raise DataError(f"the template {self.name} leaves a message out, repeats or reorders it")
        # Tokenizers join a space with the word after it, so it belongs to what follows the mark.
        return re.sub(f"( +)([{CONTEXT_END}{ANSWER}])", r"\2\1", marked)


def _map_contents(messages: list[dict], change) -> list[dict]:
    return [{**message, "content": change(message["content"])} for message in messages]


def _trim(content: str) -> str:
    """Without white space at the ends; marks at the ends stay there."""
    parts = MARKS.split(content)
    parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
    texts = [i for i, part in enumerate(parts) if part and not MARKS.fullmatch(part)]
    if texts:
        parts[texts[0]] = parts[texts[0]].lstrip()
        parts[texts[-1]] = parts[texts[-1]].rstrip()
    return "".join(parts)


def insert_context(messages: list[dict], context: str, as_message: bool, separator: str = SEPARATOR) -> None:
    """Put a context, its end marked, before the first user message: as a message of its own, or into it.

    Args:
        as_message: whether the template takes it as a message of its own.
        separator: between context and question in one message.
    """
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    if as_message:
        messages.insert(first, {"role": "context", "content": context + CONTEXT_END})
    else:
        messages[first]["content"] = context + CONTEXT_END + separator + messages[first]["content"]


@dataclass(frozen=True)
class Piece:
    """A part of a rendered text: a mark, a control id, or text."""

    text: str = ""
    mark: str = ""
    control: int | None = None


class ControlText:
    """Rendered text to pieces: control tokens of the template are ids, those that a content spells are text."""

    def __init__(self, control: Mapping[str, ControlToken]):
        """control: by name."""
        self._tokens = control
        self._names = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def escape(self, content: str) -> str:
        """A content in which nothing can be taken for a control token.

        Raises:
            DataError: it holds one of the private characters that are used as marks.
        """
        return self._pattern.sub(lambda m: f"{_ESCAPE}{self._names.index(m[0])}{_ESCAPE_END}", self.checked(content))

    def checked(self, text: str) -> str:
        """The text itself.

        Raises:
            DataError: it holds one of the private characters that are used as marks.
        """
        if found := RESERVED.search(text):
            raise DataError(f"holds U+{ord(found[0]):04X}, a private character that marks places here; remove it")
        return text

    def _restored(self, text: str) -> str:
        return re.sub(f"{_ESCAPE}(\\d+){_ESCAPE_END}", lambda m: self._names[int(m[1])], text)

    def pieces(self, rendered: str) -> list[Piece]:
        """Cut a rendered text at marks and control tokens."""
        found: list[Piece] = []
        for part in MARKS.split(rendered):
            if MARKS.fullmatch(part):
                found.append(Piece(mark=part))
                continue
            at = 0
            for match in self._pattern.finditer(part):
                token = self._tokens[match[0]]
                before = part[at : match.start()]
                found.append(Piece(text=self._restored(before.rstrip() if token.lstrip else before)))
                found.append(Piece(control=token.id))
                at = match.end()
                while token.rstrip and at < len(part) and part[at].isspace():
                    at += 1
            found.append(Piece(text=self._restored(part[at:])))
        return [piece for piece in found if piece != Piece()]


def special_tokens(control: Mapping[str, ControlToken], info: TokenizerInfo) -> dict[str, str]:
    """'bos_token', 'eos_token', 'pad_token' -> the token, those that there are."""
    names = {token.id: name for name, token in control.items()}
    ids = {role: getattr(info, f"{role}_id") for role in ("bos", "eos", "pad")}
    return {f"{role}_token": names[i] for role, i in ids.items() if i in names}


def find_template(given: str | None, tokenizer: str | Path, flag: str = "--template") -> tuple[str, str]:
    """(source, name) of the template to use: `given` ('plain' or a file), else the tokenizer's own, else the plain one.

    flag: which gave it, for messages.

    Raises:
        DataError: a file that cannot be read, or several templates without one named 'default'.
    """
    if given == "plain":
        return PLAIN, "plain"
    if given:
        return _read(Path(given), f"{flag} {given}"), given
    _, path = locate(Path(tokenizer))
    directory = path if path.is_dir() else path.parent
    own = directory / CHAT_TEMPLATE_FILE
    if own.is_file():
        return _read(own, str(own)), str(own)
    config = directory / CONFIG_FILE
    values = read_json(config) if config.is_file() else {}
    found = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and "name" in entry}
        if "default" not in named:
            raise DataError(f"{config}: has chat templates {sorted(named)}, none named 'default'; give a file by {flag}")
        found = named["default"]
    return (found, f"{config} chat_template") if isinstance(found, str) and found else (PLAIN, "plain")


def _read(path: Path, name: str) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{name}: cannot be read as text ({getattr(e, 'strerror', None) or e})") from None
