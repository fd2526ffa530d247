"""Questions as a chat template writes them: what stands before the end of the context is folded, what follows it recalls."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from unfold.data_prep.format.templates import (
    CONTEXT_END,
    SEPARATOR,
    ChatTemplate,
    ControlText,
    find_template,
    insert_context,
    special_tokens,
)
from unfold.pretrain.errors import UserError

if TYPE_CHECKING:
    from unfold.pretrain.data.tokenizer import RunTokenizer

OWN = "own"  # the tokenizer's template
SHOWN = 600  # characters at either end of a text that is shown


def add_chat_arguments(parser: ArgumentParser) -> None:
    """Flags that say how a question is put."""
    parser.add_argument(
        "--chat",
        nargs="?",
        const=OWN,
        metavar="TEMPLATE",
        help="put questions as a user's message of the tokenizer's chat template; a FILE.jinja, or 'plain', is taken instead",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message (default: what the template says)")
    parser.add_argument(
        "--bos",
        action="store_true",
        help="begin what no template writes with the beginning-of-text token (default: nothing)",
    )
    parser.add_argument("--show-prompt", action="store_true", help="print what would be read, and which part is folded; then end")


def load_chat(args: Namespace, tokenizer: RunTokenizer) -> Chat | None:
    """The chat that the flags ask for; None: questions are put as they are.

    Raises:
        UserError: no such template, or --system without --chat.
    """
    chat, system = vars(args).get("chat"), vars(args).get("system")  # commands without questions have no such flags
    if system is not None and not chat:
        raise UserError("--system: needs --chat; a text that is no chat has no system message")
    return Chat(tokenizer, None if chat == OWN else chat, system) if chat else None


def load_bos(args: Namespace, tokenizer: RunTokenizer) -> tuple[int, ...]:
    """What begins a text that no template writes. Raises UserError where --bos asks for a token that there is not."""
    if not vars(args).get("bos"):
        return ()
    if tokenizer.bos_id is None:
        raise UserError("--bos: the tokenizer has no beginning-of-text token; leave it out")
    return (tokenizer.bos_id,)


class Chat:
    """Writes one question as the next turn of a chat.

    Args:
        tokenizer: its directory holds the template.
        given: 'plain' or a file, instead of the tokenizer's own template.
        system: content of a system message; None writes none (many templates have one of their own).

    Raises:
        UserError: there is no such template.
    """

    def __init__(self, tokenizer: RunTokenizer, given: str | None, system: str | None):
        self._system, control = system, tokenizer.control()
        try:
            source, name = find_template(given, tokenizer.directory, "--chat")
            if name == "plain" and not given:
                raise UserError(
                    "--chat: the tokenizer has no chat template; give a FILE.jinja, or 'plain', which is how questions are "
                    "written in training where there is none"
                )
            self._template = ChatTemplate(source, name, special_tokens(control, tokenizer))
        except ValueError as error:  # of a file that was given it has the flag
            told = str(error)
            raise UserError(told if told.startswith("--chat ") else f"--chat: {told}") from None
        self._control, self._codec = ControlText(control), tokenizer.tokenizer()

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self._codec.encode(text, add_special_tokens=False).ids

    def prompt(self, context: str | None, question: str, opening: str = "", separator: str = "") -> tuple[list[int], list[int]]:
        """Ids of what is read before an answer: (up to the end of the context, from there on).

        The context ends where its content ends: the system message and the beginning of the user's turn stand before it,
        the end of that turn and the beginning of the assistant's after it.

        Args:
            context: begins the user's message, or is a message of its own where the template knows that role. None: there is
                none, and all is question.
            question: what follows it in the user's message.
            opening: the answer's first words.
            separator: between context and question in one message.

        Raises:
            UserError: the template does not take the messages, or leaves one out.
        """
        try:
            messages = [{"role": "user", "content": self._control.escape(question)}]
            if context is not None:
                whole = self._template.takes_context
                if whole:
                    messages[0]["content"] = messages[0]["content"].lstrip("\n")
                insert_context(messages, self._control.escape(context), whole, separator)
            system = None if self._system is None else self._control.escape(self._system)
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            rendered = self._template.render_marked(messages, answer=True)
            if system and system.strip() not in rendered:
                raise ValueError(f"the template {self._template.name} leaves the system message out; leave --system out")
            pieces = self._control.pieces(rendered + opening.lstrip())
        except ValueError as error:
            raise UserError(f"--chat: {error}") from None
        parts: list[list[int]] = [[], []]
        part = parts[0 if context is not None else 1]
        for piece in pieces:
            if piece.mark == CONTEXT_END:
                part = parts[1]
            elif piece.control is not None:
                part.append(piece.control)
            else:
                part += self.encode(piece.text)
        return parts[0], parts[1]


def put_question(
    encode: Callable[[str], list[int]], chat: Chat | None, bos: Sequence[int], context: str | None, question: str
) -> tuple[list[int], list[int]]:
    """Context and question of a user as :meth:`Chat.prompt` gives them; without a chat, each as it is.

    Args:
        encode: text to ids.
        bos: begins what is read without a chat.
        context: None: there is none, and all is question.
    """
    if chat:
        return chat.prompt(context, question, separator=SEPARATOR)
    return ([], [*bos, *encode(question)]) if context is None else ([*bos, *encode(context)], encode(question))


def shown_prompt(
    decode: Callable[[Sequence[int]], str], context: Sequence[int], question: Sequence[int], how: str = "recalls"
) -> Iterator[str]:
    """Lines for people: what is read, in its parts.

    Args:
        decode: ids to text, control tokens by name.
        context, question: the ids of the two parts; the first may have none.
        how: what becomes of the second.
    """
    parts = [("context", context, "folded, then closed with a gist at every level"), ("question", question, how)]
    yield from shown_parts(decode, [part for part in parts if len(part[1])])


def shown_parts(decode: Callable[[Sequence[int]], str], parts: Sequence[tuple[str, Sequence[int], str]]) -> Iterator[str]:
    """Lines for people: of each part its name, how many tokens it has, what becomes of it, and its text."""
    for name, ids, how in parts:
        text = decode(ids)
        left_out = len(text) - 2 * SHOWN
        if left_out > 0:
            text = f"{text[:SHOWN]}[.. {left_out:,} characters ..]{text[-SHOWN:]}"
        yield f"[{name}: {len(ids):,} tokens; {how}]"
        yield text
    yield "[answer]"
