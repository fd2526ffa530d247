"""Chats as plain documents: written by a chat template, all of them learned."""

import json

import numpy as np

from unfold.data_prep.corpus.messages import called, read_messages
from unfold.data_prep.errors import DataError
from unfold.data_prep.format.templates import ChatTemplate, ControlText, special_tokens
from unfold.data_prep.format.tokenizer import Tokenizer


class ChatEncoder:
    """Chats to ids: control tokens of the template are ids, those that a content spells are text.

    Args:
        template: (source, name).
    """

    def __init__(self, template: tuple[str, str], tokenizer: Tokenizer):
        self._template = ChatTemplate(*template, special_tokens(tokenizer.control, tokenizer.info))
        self._control, self._tokenizer = ControlText(tokenizer.control), tokenizer

    def encode(self, chat: str) -> np.ndarray:
        """Ids, int32 [tokens], of a chat's messages as JSON text.

        Raises:
            DataError: the messages are none, or the template does not take them.
        """
        messages = read_messages(json.loads(chat), "messages")
        for number, message in enumerate(messages):
            if not isinstance(message["content"], str):
                raise DataError(f"messages[{number}].content is {type(message['content']).__name__}, not text; correct the file")
        escaped = [{**message, "content": self._control.escape(message["content"])} for message in messages]
        rendered = self._template.render(escaped)
        check_calls(messages, rendered, self._template.name)
        pieces = self._control.pieces(rendered)
        texts = iter(self._tokenizer.encode_batch([piece.text for piece in pieces if piece.text]))
        ids = [[piece.control] if piece.control is not None else next(texts) for piece in pieces]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in ids]) if ids else np.zeros(0, np.int32)


def check_calls(messages: list[dict], rendered: str, template: str) -> None:
    """Raise DataError where a template leaves tool calls out."""
    if missing := [name for name in called(messages) if name not in rendered]:
        raise DataError(f"calls the tool {missing[0]!r}, which the template {template} does not write; give one that does")
