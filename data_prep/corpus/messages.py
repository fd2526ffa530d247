"""Chats as people have them, in one form: a list of {"role", "content", ..} with text contents."""

import json

from unfold.data_prep.errors import DataError

SHAREGPT_KEY = "conversations"  # of a row, where ShareGPT and what follows it keep their messages
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class ChatText(str):
    """A document that is a chat: its messages as JSON text, to be written by a chat template."""


def is_chat(value: object) -> bool:
    """Whether a field's value is meant as a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)


def read_messages(value: object, key: str) -> list[dict]:
    """Messages with roles and text contents; those of ShareGPT (`from`, `value`) and lists of text parts among them.

    A message that calls tools keeps its `tool_calls`, arguments as objects; its content may be missing.

    Raises:
        DataError: it is no list of messages, or one of them cannot be written as text; the reason alone.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} is not a list of messages")
    return [_message(message, f"{key}[{number}]", key, number) for number, message in enumerate(value)]


def _message(message: object, place: str, key: str, number: int) -> dict:
    if isinstance(message, dict) and "role" not in message and "from" in message:
        role = SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise DataError(f"{place}: 'from' is {message['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        message = {"role": role, "content": message.get("value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{key!r}: message {number} is not an object with 'role' and 'content'")
    message = {name: field for name, field in message.items() if field is not None or name == "content"}  # columnar files fill up
    calls = message.get("tool_calls")
    if calls:
        message = {**message, "tool_calls": [_call(call, place) for call in calls]}
    else:
        message.pop("tool_calls", None)
    if "content" not in message and not calls:
        raise DataError(f"{key!r}: message {number} is not an object with 'role' and 'content'")
    return {**message, "content": _content(message.get("content"), place, bool(calls))}


def _content(content: object, place: str, may_lack: bool) -> object:
    """Text parts joined; what is neither text nor such a list stays as it is, for whoever wants text."""
    if content is None and may_lack:
        return ""
    if not (isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content)):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{place}.content holds a part of type {part['type']!r}; only text can be learned")
    return "".join(part["text"] for part in content)


def _call(call: object, place: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call without the name of its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's interface gives them; templates take objects
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise DataError(f"{place}: the arguments of {function['name']} are not JSON: {arguments[:60]!r}") from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def called(messages: list[dict]) -> list[str]:
    """Names of all functions that messages call."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return [call.get("function", call)["name"] for call in calls]
