"""Messages to the text of a prompt, through the chat template that the model's file carries."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence

from phi3c.errors import ChatTemplateError, InvalidParameterError

logger = logging.getLogger("phi3c")

ROLES = ("system", "user", "assistant", "tool")

PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Stands for the n-th text of the messages while the template is laid out; private-use characters around n.
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("(\ue000[0-9]+\ue001)")
# The shape that all special tokens of the supported vocabularies have.
_SPECIAL_SHAPE = re.compile(r"<[^<>\s]+>")


def default_template(special_tokens: Collection[str]) -> str | None:
    """The template for a file without one, told from its special tokens; None where they tell nothing."""
    if {"<|user|>", "<|assistant|>", "<|end|>"} <= set(special_tokens):
        return PHI3_TEMPLATE
    if {"<|im_start|>", "<|im_end|>"} <= set(special_tokens):
        return CHATML_TEMPLATE
    return None


class ChatTemplate:
    """A chat template (Jinja, as Hugging Face runs it), in a sandbox with bounded work.

    A system message the template leaves out goes in front of the next user message, on lines of its own, and
    one warning is logged.

    Args:
        source: the template.
        bos_token: text of the begin token, for the template to print.
        eos_token: text of the end token.

    Raises:
        ChatTemplateError: `source` is not a valid template.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        from phi3c.sandbox import Template

        try:
            self._template = Template(source)
        except Exception as error:  # the source is a stranger's: anything may happen in it
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._warned = False

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt as one text. To encode it, use `segments`, which keeps the roles safe.

        Args:
            messages: each with a "role" (system, user, assistant or tool) and its "content", both strings.
            add_generation_prompt: end with the header of the answer, where the template can.

        Raises:
            InvalidParameterError: a message is malformed.
            ChatTemplateError: the template refused the messages or failed.
        """
        segments = self.segments(messages, add_generation_prompt=add_generation_prompt)
        return "".join(text for text, _ in segments)

    def segments(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[tuple[str, bool]]:
        """The prompt in pieces: (text, True) from the template, (text, False) from the messages.

        Only the first kind may be read for special tokens, so nobody can end their turn by typing `<|end|>`.

        The template is rendered twice, once with a mark in place of each text. If putting the texts back
        gives the true rendering, the cuts are where the marks are. If not, the template alters texts; then
        the rendering is one trusted piece, and refused if any text looks like a special token.

        Args and errors are those of `render`.
        """
        _check(messages)
        plain = [dict(message) for message in messages]
        rendering = self._render(plain, add_generation_prompt)
        texts: dict[str, str] = {}  # by their marks
        marked = [{key: _mark(key, value, texts) for key, value in message.items()} for message in plain]
        outline = self._render(marked, add_generation_prompt)

        lost = [
            i
            for i, message in enumerate(marked)
            if message["role"] == "system" and message["content"].strip() not in outline
        ]
        if lost:
            self._warn()
            return self.segments(_fold(plain, lost), add_generation_prompt=add_generation_prompt)

        segments = [(texts.get(part, part), part not in texts) for part in _MARKED.split(outline)]
        if "".join(text for text, _ in segments) == rendering:
            return [segment for segment in segments if segment[0]]
        for text in texts.values():
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

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the model's chat template leaves system messages out; they go into the next user message"
            )


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise InvalidParameterError('messages must be a list such as [{"role": "user", "content": "Hi"}]')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidParameterError(f"message {i} is a {type(message).__name__}, not a mapping")
        if message.get("role") not in ROLES:
            raise InvalidParameterError(
                f"message {i} has the role {message.get('role')!r}; a role is one of {', '.join(ROLES)}"
            )
        if "content" not in message:
            raise InvalidParameterError(f"message {i} has no content")
        for key, value in message.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise InvalidParameterError(f"message {i}: {key!r} is a {type(value).__name__}, not a string")


def _mark(key: str, value: str, texts: dict[str, str]) -> str:
    """Moves the text of `value` to `texts` and leaves a mark. White space around it stays, for `trim`."""
    text = value.strip()
    if key == "role" or not text:
        return value
    mark = _MARK.format(len(texts))
    texts[mark] = text
    return value.replace(text, mark, 1)


def _fold(messages: list[dict[str, str]], lost: Collection[int]) -> list[dict[str, str]]:
    folded: list[dict[str, str]] = []
    system = ""
    for i, message in enumerate(messages):
        if i in lost:
            system += message["content"] + "\n"
        elif system and message["role"] == "user":
            folded.append({**message, "content": system + message["content"]})
            system = ""
        else:
            folded.append(message)
    if system:
        raise ChatTemplateError(
            "the model's chat template leaves the system message out, and no user message follows to carry it"
        )
    return folded
