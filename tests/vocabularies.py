"""Small vocabularies as GGUF metadata, and texts to try them on."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from hypothesis import strategies as st

from phi3c.vocabulary import TokenType

Metadata = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    TokenType.NORMAL,
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)

anything = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
words = st.sampled_from(
    ["the", "thunderstorm", "don't", "'ll", "é", "日本", "🦙", "_x", "!?", "∑", "İ", "zzzzzzzz"]
)
oddities = st.sampled_from(["2024", "½", "Ġ", "<|user|>", "<|end|>", "<s>", "</s>", "<0x41>"])
blanks = st.sampled_from([" ", "  ", "\n", "\t", "\xa0", "\u3000"])
prose = st.lists(words | oddities | blanks | anything, max_size=12).map("".join)


def spm_metadata(*extra: tuple[str, int]) -> Metadata:
    """A small SPM vocabulary: 3 to 258 the bytes, then the pieces named below, then `extra`."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    pieces += [("▁", -9, NORMAL), ("a", -9, NORMAL), ("b", -9, NORMAL)]
    pieces += [("▁a", -2, NORMAL), ("ab", -1, NORMAL), ("▁ab", -3, NORMAL)]
    pieces += [(text, 0, type) for text, type in extra]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([type for _, _, type in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


SPACE, A, B, SPACE_A, AB, SPACE_AB, EXTRA = range(259, 266)


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet by its rule: bytes that print in Latin-1 are their own letters, others from U+0100."""
    letters: dict[int, str] = {}
    for byte in range(256):
        prints = unicodedata.category(chr(byte)) not in ("Cc", "Cf", "Zs")
        letters[byte] = (
            chr(byte) if prints else chr(256 + sum(ord(letter) > 255 for letter in letters.values()))
        )
    return letters


def bpe_metadata(*extra: tuple[str, int], pre: str = "gpt-2") -> Metadata:
    """A small byte-level vocabulary: 0-255 the bytes, 256 `ab`, 257 `Ġab`, 258 `12`, then extra."""
    pieces = [(letter, int(NORMAL)) for letter in byte_letters().values()]
    pieces += [("ab", NORMAL), ("Ġab", NORMAL), ("12", NORMAL), *extra]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [text for text, _ in pieces],
        "tokenizer.ggml.token_type": np.array([type for _, type in pieces], np.int32),
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
    }
