"""Small vocabularies as GGUF metadata, and byte-level ones as Hugging Face's tokenizers read them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection
from typing import Any

import numpy as np
import tokenizers

from phi3c.vocabulary import TokenType

Metadata = dict[str, Any]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = (
    TokenType.NORMAL,
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)

# As the tokenizer.json files of the models have them.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "dbrx": CL100K,
    "llama-bpe": CL100K,
    "qwen2": QWEN2,
    "gpt-4o": O200K,
    "gpt-2": GPT2,
    "smollm": GPT2,
}


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


def published_tokenizer(
    metadata: Metadata, special: Collection[str], lstrip: Collection[str], rstrip: Collection[str]
) -> tokenizers.Tokenizer:
    """The tokenizer.json that models with such a byte-level vocabulary are published with."""
    pre, tokens = metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.tokens"]
    vocab = {text: id for id, text in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    # Phi-4's file drops what the pattern does not match, which is nothing
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Removed", "invert": True}
    steps = [split, byte_level | {"use_regex": False}]
    if pre in ("gpt-2", "smollm"):
        steps = [byte_level | {"use_regex": True}]
    if pre == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, *steps]
    added = [
        {
            "id": vocab[text],
            "content": text,
            "single_word": False,
            "lstrip": text in lstrip,
            "rstrip": text in rstrip,
            "normalized": False,
            "special": True,
        }
        for text in special
    ]
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": metadata["tokenizer.ggml.merges"],
            "ignore_merges": pre == "llama-bpe",
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(spec))
