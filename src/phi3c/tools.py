"""Tool calling as Phi-4-mini was trained for it: definitions into the prompt, calls out of the answer.

The system message carries the definitions as a JSON list, and the model calls with a JSON list of names and
arguments between two special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3c.errors import InvalidParameterError

CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"
RESPONSE_ROLE = "tool_response"  # <|tool_response|> opens the turn that holds a result
# In front of the tools where a conversation has no system message; the sentence of Phi-4-mini's model card.
SYSTEM_MESSAGE = "You are a helpful assistant with some tools."


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that the model asks for.

    Attributes:
        id: names the call within its conversation; its result is sent back with it.
        name: of the function, as the model wrote it; it need not be one that was offered.
        arguments: by parameter name, as the model wrote them; nothing was checked against a schema.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    def as_message_part(self) -> dict[str, object]:
        """The element of an assistant message's "tool_calls" that stands for this call."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}


def definitions(tools: Sequence[Mapping[str, Any]]) -> str:
    """The JSON list of tools for the prompt.

    Args:
        tools: {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}, each,
            of which the inner part is what the model is shown; or that inner part itself.

    Raises:
        InvalidParameterError: one of them is no such thing.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InvalidParameterError(f"tools is a {type(tools).__name__}, not a list")
    functions: list[object] = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise InvalidParameterError(
                f"tools[{i}] must be a mapping such as "
                '{"type": "function", "function": {"name": "f", "description": "...", "parameters": {...}}}'
            )
        functions.append(function)
    try:
        return json.dumps(functions, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"the tools cannot be written as JSON: {error}") from None


def written_calls(calls: object) -> str:
    """The calls in an assistant message's "tool_calls", as the model itself would write them.

    Raises:
        InvalidParameterError: they are no list of calls.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidParameterError("it must be a list")
    written: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise InvalidParameterError(
                f'element {i} must be {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}'
            )
        arguments = _arguments(function.get("arguments"))
        if arguments is None:
            raise InvalidParameterError(f"element {i}: the arguments are no JSON object")
        written.append({"name": function["name"], "arguments": arguments})
    try:
        return json.dumps(written, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"it cannot be written as JSON: {error}") from None


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of what a model wrote as its calls, or as its only call; None if malformed."""
    value = _from_json(text)
    calls: list[tuple[str, dict[str, Any]]] = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not _is_name(call.get("name")):
            return None
        arguments = _arguments(call.get("arguments"))
        if arguments is None:
            return None
        calls.append((call["name"], arguments))
    return calls or None


def _arguments(value: object) -> dict[str, Any] | None:
    """Arguments, which may be absent, or JSON in a string as OpenAI's interface has them; None if neither."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = _from_json(value)
    return dict(value) if isinstance(value, Mapping) else None


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""
