"""The vocabulary and chat template of a Hugging Face checkpoint, as the metadata a GGUF file has."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3c.errors import CheckpointError
from phi3c.gguf import Value
from phi3c.vocabulary import BYTE_TOKENS, TokenType

_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_FIXED64, _LENGTH, _FIXED32 = 1, 2, 5  # wire types of protocol buffers; 0 is a varint

# The regular expression by which text is split before merging -> tokenizer.ggml.pre.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "dbrx",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}  # fmt: skip


class _Tokens:
    """Texts, scores and types by id, of as many tokens as the embedding has rows."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self.texts = [f"[PAD{id}]" for id in range(size)]
        self.scores = np.full(size, _UNUSED_SCORE, np.float32)
        self.types = np.full(size, TokenType.UNUSED, np.int32)

    def put(self, id: object, text: object, score: float, type: TokenType) -> None:
        if not isinstance(id, int) or not 0 <= id < len(self.texts) or not isinstance(text, str):
            raise CheckpointError(
                f"{self._folder}: token {text!r:.40} has id {id!r:.20}, "
                f"and the embedding has {len(self.texts)} rows"
            )
        self.texts[id], self.scores[id], self.types[id] = text, score, type


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def vocabulary_metadata(folder: Path, config: Mapping[str, Any], size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys for the checkpoint in `folder`.

    Args:
        folder: holds tokenizer.model (SentencePiece) or tokenizer.json, and tokenizer_config.json.
        config: contents of config.json, which may name the ids of special tokens.
        size: rows of the embedding; ids beyond the vocabulary become unused tokens.

    Raises:
        CheckpointError: a file is missing, contradicts itself, or is of a kind that GGUF cannot tell.
    """
    settings, fast = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    tokens, metadata = _Tokens(folder, size), dict[str, Value]()
    if (folder / "tokenizer.model").is_file():
        _read_sentencepiece(folder / "tokenizer.model", tokens)
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    else:
        metadata |= _read_bpe(folder / "tokenizer.json", fast, tokens)
    _put_added(folder, fast, settings, tokens)

    metadata["tokenizer.ggml.tokens"] = tokens.texts
    if metadata["tokenizer.ggml.model"] == "llama":
        metadata["tokenizer.ggml.scores"] = tokens.scores
    metadata["tokenizer.ggml.token_type"] = tokens.types
    ids = {text: id for id, text in reversed(list(enumerate(tokens.texts)))}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text, listed = settings.get(f"{name}_token"), config.get(f"{name}_token_id")
        if isinstance(text, dict):
            text = text.get("content")
        if isinstance(listed, list) and listed:
            listed = listed[0]
        id = ids.get(text) if isinstance(text, str) else listed
        if type(id) is int and 0 <= id < size:
            metadata[f"tokenizer.ggml.{key}_token_id"] = id
    for flag in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(flag), bool):
            metadata[f"tokenizer.ggml.{flag}"] = settings[flag]
    if template := _chat_template(folder, settings):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _read_sentencepiece(path: Path, tokens: _Tokens) -> None:
    """Pieces of a SentencePiece model: a protocol buffer whose field 1 repeats (text 1, score 2, type 3)."""
    try:
        model = path.read_bytes()
        pieces = [value for field, value in _fields(model) if field == 1 and isinstance(value, bytes)]
        for id, piece in enumerate(pieces):
            record = {1: b"", 2: b"\0\0\0\0", 3: int(TokenType.NORMAL)} | dict(_fields(piece))
            text, score, type = record[1], record[2], record[3]
            if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(type, int)):
                raise ValueError(f"piece {id} has fields of other types")
            tokens.put(id, text.decode(), struct.unpack("<f", score)[0], TokenType(type))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as a SentencePiece model: {error}") from None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer: whole numbers as int, all else as bytes."""
    pos = 0

    def varint() -> int:
        nonlocal pos
        value = shift = 0
        while True:
            if pos >= len(message) or shift > 63:
                raise ValueError(f"a number at byte {pos} does not end")
            byte = message[pos]
            pos += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while pos < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        if wire not in (_FIXED64, _LENGTH, _FIXED32):
            raise ValueError(f"wire type {wire} at byte {pos}")
        length = varint() if wire == _LENGTH else 8 if wire == _FIXED64 else 4
        if length > len(message) - pos:
            raise ValueError(f"a field at byte {pos} ends beyond the file")
        yield key >> 3, message[pos : pos + length]
        pos += length


def _read_bpe(path: Path, fast: Mapping[str, Any], tokens: _Tokens) -> dict[str, Value]:
    """The vocabulary of tokenizer.json: byte-level BPE, or SentencePiece's, whose scores its merges tell."""
    model = fast.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path.parent} has neither tokenizer.model nor a tokenizer.json with a model")
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{path}: only vocabularies of the type BPE with their merges can be converted")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs) or not all(
        isinstance(part, str) for pair in pairs for part in pair
    ):
        raise CheckpointError(f"{path}: a merge is no pair of tokens")

    if not model.get("byte_fallback"):
        for text, id in vocab.items():
            tokens.put(id, text, 0.0, TokenType.NORMAL)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(path, fast),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        }
    ranks: dict[str, int] = {}  # the earlier a token is merged, the higher SentencePiece scored it
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    for text, id in vocab.items():
        type = TokenType.BYTE if text in BYTE_TOKENS else TokenType.NORMAL
        if text == model.get("unk_token"):
            type = TokenType.UNKNOWN
        tokens.put(id, text, -float(ranks.get(text, len(ranks))), type)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}


def _pre_tokenizer(path: Path, fast: Mapping[str, Any]) -> str:
    """GGUF's name of the way in which tokenizer.json splits text before merging."""
    splitter = fast.get("pre_tokenizer")
    steps = splitter.get("pretokenizers", [splitter]) if isinstance(splitter, dict) else []
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str) and regex in _SPLITS:
            return _SPLITS[regex]
    way = " + ".join(map(str, kinds)) or "not at all"
    raise CheckpointError(f"{path} splits text in a way that GGUF has no name for ({way})")


def _put_added(folder: Path, fast: Mapping[str, Any], settings: Mapping[str, Any], tokens: _Tokens) -> None:
    """Tokens added to the model's own: `special` ones are control tokens."""
    added = fast.get("added_tokens")
    if not isinstance(added, list):
        by_id = settings.get("added_tokens_decoder")
        added = []
        for key, token in by_id.items() if isinstance(by_id, dict) else ():
            added.append({**token, "id": int(key)} if isinstance(token, dict) and key.isdecimal() else key)
    for token in added:
        if not isinstance(token, dict):
            raise CheckpointError(f"{folder}: the added token {token!r:.40} is no JSON object")
        type = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        tokens.put(token.get("id"), token.get("content"), _ADDED_SCORE, type)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
