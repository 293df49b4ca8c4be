"""Tiny models with the special tokens and templates of the Phi models, and answers that follow a script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import StrPath, write_tiny_phi3
from numpy.typing import NDArray

import phi3c
from phi3c.gguf import GGUFFile, Value, write_gguf
from phi3c.tokenizer import TokenType

CONTROL, USER_DEFINED = TokenType.CONTROL, TokenType.USER_DEFINED
PHI4 = dict.fromkeys(["<|im_start|>", "<|im_sep|>", "<|im_end|>"], CONTROL)
PHI4_MINI = {
    "<|system|>": CONTROL,
    **dict.fromkeys(["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"], USER_DEFINED),
    "<|tool_response|>": USER_DEFINED,
}


def write_chat_model(
    path: StrPath, special: Mapping[str, int], template: str | None, more: Mapping[str, Value] | None = None
) -> Path:
    """Write a tiny phi3 model.

    Args:
        special: tokens to add to `<|user|>`, `<|assistant|>`, `<|end|>` and `<|endoftext|>`, and their types.
        template: the chat template; None writes none.
        more: metadata to add.
    """
    plain = write_tiny_phi3(Path(path).with_suffix(".plain"), layers=1, heads=2, kv_heads=1, ffn=64, ctx=2048)
    with GGUFFile(plain) as file:
        tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
        assert isinstance(tokens, list)
        assert isinstance(types, np.ndarray)
        first = tokens.index("[PAD0]")
        tokens[first : first + len(special)] = special
        types = types.copy()
        types[first : first + len(special)] = list(special.values())
        metadata: dict[str, Value] = {**file.metadata, **(more or {})}
        metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        del metadata["tokenizer.chat_template"]
        if template is not None:
            metadata["tokenizer.chat_template"] = template
        tensors = [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        write_gguf(path, metadata, tensors)
    return Path(path)


class Script:
    """Stands in for a sampler: says a text, whatever the logits, with special tokens by their names."""

    def __init__(self, model: phi3c.Model, text: str) -> None:
        special = model.tokenizer.special_tokens
        parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        # each part by itself: when a prompt is read, some special tokens take the white space around them
        ids = ([special[part]] if part in special else model.tokenize(part, add_bos=False) for part in parts)
        self.ids = [id for part in ids for id in part]
        self.left = list(self.ids)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        return self.left.pop(0)


def scripted(stream: phi3c.Stream, script: Script) -> list[phi3c.Chunk]:
    """The chunks of an answer that follows the script."""
    stream._generation.sampler.sample = script  # type: ignore[method-assign]
    return list(stream)


def say(
    model: phi3c.Model, text: str, messages: Sequence[Mapping[str, object]] | None = None, **options: Any
) -> tuple[list[phi3c.Chunk], phi3c.Completion]:
    """What `chat` makes of an answer that consists of the tokens of `text`."""
    stream = model.chat(messages or [{"role": "user", "content": "Hi"}], stream=True, **options)
    chunks = scripted(stream, Script(model, text))
    return chunks, stream.result()
