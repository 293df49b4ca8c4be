"""Messages to the text of a prompt, through the chat template that the model's file carries."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import tools as tool_calling
from .errors import ChatTemplateError, InvalidParameterError, ToolsUnsupportedError
from .reasoning import OPEN, without_reasoning
from .tokenizer import Tokenizer

logger = logging.getLogger("phi3c")

ROLES = ("system", "user", "assistant", "tool")
# Of an assistant's message in OpenAI's form, what no prompt repeats: how it was reasoned out, by either name.
UNREPEATED = ("reasoning", "reasoning_content")

PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI4_MINI_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['tools'] %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PHI4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The first whose special tokens are all in the vocabulary.
DEFAULT_TEMPLATES: tuple[tuple[set[str], str], ...] = (
    ({"<|user|>", "<|assistant|>", "<|end|>", tool_calling.CALL}, PHI4_MINI_TEMPLATE),
    ({"<|user|>", "<|assistant|>", "<|end|>"}, PHI3_TEMPLATE),
    ({"<|im_start|>", "<|im_sep|>", "<|im_end|>"}, PHI4_TEMPLATE),
    ({"<|im_start|>", "<|im_end|>"}, CHATML_TEMPLATE),
)

# Stands for the n-th text of the messages while the template is laid out; private-use characters around n.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("(\ue000[0-9]+\ue001)")
# The shape that all special tokens of the supported vocabularies have.
_SPECIAL_SHAPE = re.compile(r"<[^<>\s]+>")

Message = Mapping[str, object]
Tool = Mapping[str, Any]
# Text, and whether it is ours or the template's, so that it may be read for special tokens.
Segment = tuple[str, bool]


def default_template(special_tokens: Collection[str]) -> str | None:
    """The template for a file without one, told from its special tokens; None where they tell nothing."""
    for needed, template in DEFAULT_TEMPLATES:
        if needed <= set(special_tokens):
            return template
    return None


class ChatTemplate:
    """A chat template (Jinja, as Hugging Face runs it), in a sandbox with bounded work.

    A system message the template leaves out goes in front of the next user message, on lines of its own, and
    one warning is logged.

    Args:
        source: the template.
        bos_token: text of the begin token, for the template to print.
        eos_token: text of the end token.
        special_tokens: of the vocabulary; they tell whether the model was made to call tools.

    Raises:
        ChatTemplateError: `source` is not a valid template.
    """

    def __init__(
        self, source: str, *, bos_token: str, eos_token: str, special_tokens: Collection[str] = ()
    ) -> None:
        from .sandbox import Template

        try:
            self._template = Template(source)
        except Exception as error:  # the source is a stranger's: anything may happen in it
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._calls_tools = {tool_calling.CALL, tool_calling.END_CALL} <= set(special_tokens)
        self._tool_role: str | None = None
        if re.search(r"""['"]tool['"]""", source):
            self._tool_role = "tool"
        elif f"<|{tool_calling.RESPONSE_ROLE}|>" in special_tokens:
            # Phi-4-mini's template prints any role as <|role|>, yet <|tool|> opens definitions.
            self._tool_role = tool_calling.RESPONSE_ROLE
        self._warned = False

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, object], tokenizer: Tokenizer, override: str | None = None
    ) -> ChatTemplate:
        """The template of a file, or the one to use instead; a default where there is neither.

        Raises:
            ChatTemplateError: there is none, and the vocabulary suggests none; or it is not valid.
        """
        special_tokens = tokenizer.special_tokens
        source = override or metadata.get("tokenizer.chat_template") or default_template(special_tokens)
        if not isinstance(source, str):
            raise ChatTemplateError(
                "the file has no chat template and none of the special tokens phi3c knows one for; give one "
                "as chat_template, or use generate() with a prompt in the model's own format"
            )
        return cls(
            source,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=special_tokens,
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as one text. To encode it, use `segments`, which keeps the roles safe.

        Args:
            messages: in OpenAI's form: each with a "role" (system, user, assistant or tool) and a "content",
                which is a string or a list of {"type": "text", "text": ...}; an assistant's also with
                "tool_calls", and then perhaps without content. Its reasoning is left out: what stands as
                such beside the content, and what the content begins with between `<think>` and `</think>`.
            tools: definitions in OpenAI's form, which go into the first system message.
            add_generation_prompt: end with the header of the answer, where the template can.

        Raises:
            InvalidParameterError: a message or a tool is malformed.
            ToolsUnsupportedError: tools, their calls or results, which the model or its template know not.
            ChatTemplateError: the template refused the messages or failed.
        """
        segments = self.segments(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return "".join(text for text, _ in segments)

    def segments(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        parse_special: bool = False,
    ) -> list[Segment]:
        """The prompt in pieces: (text, True) from the template, (text, False) from the messages.

        Only the first kind may be read for special tokens, so nobody can end their turn by typing `<|end|>`;
        unless `parse_special` asks to trust the messages too.

        The template is rendered twice, once with a mark in place of each text. If putting the texts back
        gives the true rendering, the cuts are where the marks are. If not, the template alters texts; then
        the rendering is one trusted piece, and refused if any text looks like a special token.

        Other args and errors are those of `render`.
        """
        turns = _turns(messages)
        for i, turn in enumerate(turns):
            if turn.calls:
                self._require_tools(f"message {i} has tool_calls")
            if turn.role == "tool":
                if self._tool_role is None:
                    raise ToolsUnsupportedError(
                        f"message {i} has the role tool, of which neither the model's chat template nor its "
                        "vocabulary knows; put the result into a user message"
                    )
                turns[i] = replace(turn, role=self._tool_role)
        if tools:
            self._require_tools("tools were given")
            turns = _with_tools(turns, tool_calling.definitions(tools))
        return self._segments(turns, add_generation_prompt, parse_special)

    def _segments(
        self, turns: list[_Turn], add_generation_prompt: bool, parse_special: bool
    ) -> list[Segment]:
        rendering = self._render([turn.plain() for turn in turns], add_generation_prompt)
        texts: dict[str, str] = {}  # by their marks
        marked = [turn.marked(texts) for turn in turns]
        outline = self._render(marked, add_generation_prompt)

        lost: set[int] = set()
        for i, message in enumerate(marked):
            if message.get("tools", "").strip() not in outline:
                raise ToolsUnsupportedError(
                    "the model's chat template leaves the tools out; use one that prints message['tools'], "
                    "or describe the tools in a message"
                )
            if message["role"] == "system" and message["content"].strip() not in outline:
                lost.add(i)
        if lost:
            self._warn()
            return self._segments(_fold(turns, lost), add_generation_prompt, parse_special)

        segments = [(texts.get(part, part), part not in texts) for part in _MARKED.split(outline)]
        if "".join(text for text, _ in segments) == rendering:
            return [(text, trusted or parse_special) for text, trusted in segments if text]
        for text in () if parse_special else texts.values():
            special = _SPECIAL_SHAPE.search(text)
            if special is not None:
                raise ChatTemplateError(
                    f"a message holds {special[0]!r}, which could pass for a special token because the "
                    "model's chat template alters messages; take it out"
                )
        return [(rendering, True)]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,  # as Hugging Face does: templates ask `tools is not none`
                documents=None,
                **self._tokens,
            )
        except Exception as error:
            raise ChatTemplateError(f"the model's chat template failed: {error}") from error

    def _require_tools(self, what: str) -> None:
        if not self._calls_tools:
            raise ToolsUnsupportedError(
                f"{what}, but this model was not made to call tools: its vocabulary has no "
                f"{tool_calling.CALL}, as Phi-4-mini's does; describe the tools in a message and ask for JSON"
            )

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the model's chat template leaves system messages out; they go into the next user message"
            )


def opens_reasoning(segments: Sequence[Segment]) -> bool:
    """Whether a prompt ends with `<think>` from its template, so that the answer begins inside."""
    text, trusted = segments[-1] if segments else ("", False)
    return trusted and text.rstrip().endswith(OPEN)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message, checked: its content, and the other texts that a template may print, by their keys."""

    role: str
    content: tuple[Segment, ...]
    others: Mapping[str, str]
    calls: bool = False  # the content ends with tool calls

    def plain(self) -> dict[str, str]:
        content = "".join(text for text, _ in self.content)
        return {"role": self.role, "content": content, **self.others}

    def marked(self, texts: dict[str, str]) -> dict[str, str]:
        """As `plain`, with marks in place of what is not trusted, which is moved to `texts`."""
        content = "".join(text if trusted else _mark(text, texts) for text, trusted in self.content)
        others = {key: _mark(text, texts) for key, text in self.others.items()}
        return {"role": self.role, "content": content, **others}


def _mark(value: str, texts: dict[str, str]) -> str:
    """Moves the text of `value` to `texts` and leaves a mark. White space around it stays, for `trim`."""
    text = value.strip()
    if not text:
        return value
    mark = _MARK.format(len(texts))
    texts[mark] = text
    return value.replace(text, mark, 1)


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise InvalidParameterError('messages must be a list such as [{"role": "user", "content": "Hi"}]')
    return [_turn(i, message) for i, message in enumerate(messages)]


def _turn(i: int, message: object) -> _Turn:
    if not isinstance(message, Mapping):
        raise InvalidParameterError(f"message {i} is a {type(message).__name__}, not a mapping")
    fields = {key: value for key, value in message.items() if value is not None}
    role, calls = fields.pop("role", None), fields.pop("tool_calls", None)
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidParameterError(f"message {i} has the role {role!r}; a role is one of {', '.join(ROLES)}")
    if role == "assistant":
        for key in UNREPEATED:
            fields.pop(key, None)
    elif calls:
        raise InvalidParameterError(f"message {i} has tool_calls, but its role is {role}, not assistant")
    if "content" not in fields and not calls:
        raise InvalidParameterError(f"message {i} has no content")
    text = _text(i, fields.pop("content", ""))
    for key, value in fields.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidParameterError(f"message {i}: {key!r} is a {type(value).__name__}, not a string")
    content: tuple[Segment, ...] = ((without_reasoning(text) if role == "assistant" else text, False),)
    if calls:
        try:
            written = tool_calling.written_calls(calls)
        except InvalidParameterError as error:
            raise InvalidParameterError(f"message {i}: tool_calls: {error}") from None
        content += ((tool_calling.CALL, True), (written, False), (tool_calling.END_CALL, True))
    return _Turn(role, content, fields, bool(calls))


def _text(i: int, content: object) -> str:
    """A content as one text: itself, or the parts of OpenAI's form joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidParameterError(f"message {i}: 'content' is a {type(content).__name__}, not a string")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidParameterError(
                f'message {i}: a part of the content is not of the form {{"type": "text", "text": "..."}}; '
                "phi3c takes no images or sounds"
            )
        texts.append(text)
    return "".join(texts)


def _with_tools(turns: list[_Turn], definitions: str) -> list[_Turn]:
    """The definitions as "tools" of the first system message, one that is made where there is none."""
    for i, turn in enumerate(turns):
        if turn.role == "system":
            turns = list(turns)
            turns[i] = replace(turn, others={**turn.others, "tools": definitions})
            return turns
    return [_Turn("system", ((tool_calling.SYSTEM_MESSAGE, False),), {"tools": definitions}), *turns]


def _fold(turns: list[_Turn], lost: Collection[int]) -> list[_Turn]:
    folded: list[_Turn] = []
    system: tuple[Segment, ...] = ()
    for i, turn in enumerate(turns):
        if i in lost:
            system += (*turn.content, ("\n", False))
        elif system and turn.role == "user":
            folded.append(replace(turn, content=(*system, *turn.content)))
            system = ()
        else:
            folded.append(turn)
    if system:
        raise ChatTemplateError(
            "the model's chat template leaves the system message out, and no user message follows to carry it"
        )
    return folded
