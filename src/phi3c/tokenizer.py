"""Text to token ids and back, from the vocabulary a GGUF file carries.

The byte-pair merging itself is done by the `tokenizers` library, which only ever sees plain text: special
tokens are cut out here, and only where the caller allows it. Nothing a user types becomes a role token.
"""

from __future__ import annotations

import codecs
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from phi3c.errors import InvalidParameterError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from phi3c.gguf import Value

MAX_TOKEN_LENGTH = 1024  # characters; Phi-4's longest is 128. Rebuilding merges is quadratic in it.
SPACE = "\u2581"  # how an SPM vocabulary spells U+0020
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}  # and a byte that is part of no other token

# Phi-3's turn markers. White space after them is dropped: a flag of tokenizer.json that GGUF does not store.
PHI3_TURN_TOKENS = frozenset(
    {"<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *(f"<|placeholder{i}|>" for i in range(1, 7))}
)
RSTRIP_TOKENS = PHI3_TURN_TOKENS | {"</s>"}
# Special whatever type the file gives them: conversions have typed them control, user-defined and normal.
SPECIAL_TOKENS = PHI3_TURN_TOKENS | {"<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"}
# An answer ends at any of these, whatever `eos_token_id` says: Phi-3 files name <|endoftext|> there, yet
# turns end in <|end|>. Not `</s>`: Phi-3 does not end on it, and a file that does names it as its eos.
END_TOKENS = frozenset({"<|end|>", "<|endoftext|>", "<|im_end|>"})
# The Unicode property White_Space. str.isspace() also takes U+001C to U+001F, which the property does not.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
SPM_MERGES = "phi3c.tokenizer.merges"  # metadata key of packed files, see spm_merges


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL_TYPES = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED))


class Tokenizer:
    """The vocabulary of one model.

    Attributes:
        vocab_size: number of tokens in the file's list.
        bos_id, eos_id: ids of the begin and end tokens, None where the file names none.
        bos_token, eos_token: their texts, "" where there is none.
        stop_ids: every id that ends an answer.
        special_tokens: text to id of the tokens that only `parse_special` text can produce.
        special_ids: the ids of all such tokens; they add nothing to decoded text.
        add_bos: whether `encode` puts `bos_id` first when it is not told.
        add_space_prefix: whether encoding puts a space before text (and decoding takes one away).
    """

    def __init__(
        self,
        texts: Sequence[str],
        types: Sequence[int],
        bpe: tokenizers.Tokenizer,
        *,
        spm: bool,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: Collection[int],
        add_bos: bool,
        add_space_prefix: bool,
    ) -> None:
        self._texts = texts
        self._types = types
        self._bpe = bpe
        self._spm = spm
        self.vocab_size = len(texts)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.bos_token = "" if bos_id is None else texts[bos_id]
        self.eos_token = "" if eos_id is None else texts[eos_id]
        self.add_bos, self.add_space_prefix = add_bos, add_space_prefix

        special = [id for id, text in enumerate(texts) if _is_special(text, types[id])]
        self.special_ids = frozenset(special)
        self.special_tokens = {texts[id]: id for id in reversed(special)}  # the lowest id of a text wins
        ends = (id for id in special if texts[id] in END_TOKENS)
        self.stop_ids = frozenset({*stop_ids, *ends} if eos_id is None else {*stop_ids, *ends, eos_id})

        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        is_phi3 = spm and "<|end|>" in self.special_tokens  # other SPM models keep the newline after `</s>`
        self._rstrip_ids = {self.special_tokens.get(text) for text in RSTRIP_TOKENS} if is_phi3 else set()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Value]) -> Tokenizer:
        """Builds the tokenizer from the `tokenizer.ggml.*` keys of a GGUF file.

        Raises:
            TokenizerError: the vocabulary is missing, contradicts itself, or is of a kind not supported yet.
        """
        texts, types = _vocabulary(metadata)
        model = str(metadata.get("tokenizer.ggml.model"))
        spm = model == "llama"
        add_space_prefix = spm and _flag(metadata, "tokenizer.ggml.add_space_prefix", default=True)
        if spm:
            bpe = _spm(texts, types, metadata, add_space_prefix)
        elif model == "gpt2":
            bpe = _byte_level_bpe(texts, types, metadata)
        else:
            raise TokenizerError(
                f"tokenizer.ggml.model is {model!r}; phi3c reads 'llama' (SPM) and 'gpt2' (byte-level BPE)"
            )
        stops = (_token_id(metadata, f"{name}_token_id", len(texts)) for name in ("eot", "eom"))
        return cls(
            texts,
            types,
            bpe,
            spm=spm,
            bos_id=_token_id(metadata, "bos_token_id", len(texts)),
            eos_id=_token_id(metadata, "eos_token_id", len(texts)),
            stop_ids={id for id in stops if id is not None},
            add_bos=_flag(metadata, "tokenizer.ggml.add_bos_token", default=spm),
            add_space_prefix=add_space_prefix,
        )

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Turns text into token ids.

        Args:
            text: any text; a lone surrogate is refused.
            add_bos: put the begin token first unless the ids start with it anyway; None: as the file says.
            parse_special: read texts such as `<|user|>` as the special token of that name. Only for text that
                is trusted; otherwise they are spelled out like any other text.

        Raises:
            InvalidParameterError: the text is not valid Unicode.
        """
        return self.encode_segments([(text, parse_special)], add_bos=add_bos)

    def encode_segments(
        self, segments: Iterable[tuple[str, bool]], *, add_bos: bool | None = None
    ) -> list[int]:
        """Encodes a text given in pieces, each with its own `parse_special`.

        Plain text is joined across pieces before it is encoded, so where it was cut changes nothing.
        """
        ids: list[int] = []
        swallow = False  # white space, after a special token that takes it
        for text, special in self._runs(segments):
            plain = text.lstrip(WHITE_SPACE) if swallow else text
            ids += self._encode_plain(plain)
            if special is not None:
                ids.append(special)
                swallow = special in self._rstrip_ids
        wanted = self.add_bos if add_bos is None else add_bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _runs(self, segments: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, int | None]]:
        """Yields (plain text, id of the special token after it); the last run has None."""
        plain: list[str] = []
        for text, parse_special in segments:
            start = 0
            for match in self._special.finditer(text) if parse_special else ():
                plain.append(text[start : match.start()])
                yield "".join(plain), self.special_tokens[match[0]]
                plain, start = [], match.end()
            plain.append(text[start:])
        yield "".join(plain), None

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameterError(
                f"the text has a lone surrogate, {text[error.start]!a}, which no token can express; "
                "decode the input with errors='replace'"
            ) from None
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turns token ids into text; bytes that are not UTF-8 become U+FFFD.

        `decode(encode(text))` is `text`, so the one space that encoding put first is taken away again.

        Args:
            ids: token ids.
            skip_special: leave special tokens out rather than write their names.
        """
        pieces = (
            self.token_bytes(id) if skip_special or id not in self.special_ids else self._texts[id].encode()
            for id in ids
        )
        text = b"".join(pieces).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.add_space_prefix else text

    def token_text(self, id: int) -> str:
        """A token as the vocabulary spells it: `<|end|>`, `▁the`, `Ġthe`.

        Raises:
            InvalidParameterError: the id is not in the vocabulary.
        """
        if not 0 <= id < self.vocab_size:
            raise InvalidParameterError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return self._texts[id]

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to text, as UTF-8 bytes (perhaps a part of a character); b"" for special tokens.

        Raises:
            InvalidParameterError: the id is not in the vocabulary.
        """
        text = self.token_text(id)
        if id in self.special_ids or self._types[id] in (TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if not self._spm:
            return _from_byte_alphabet(text)
        if self._types[id] == TokenType.BYTE:
            return bytes([BYTE_TOKENS[text]])
        return text.replace(SPACE, " ").encode()


class TextStream:
    """Turns the ids of one answer into text as they come, never splitting a character.

    All pieces joined, `flush` included, are what `Tokenizer.decode` gives.

    Args:
        tokenizer: where the ids come from.
        strip_space: drop the one space an SPM model starts with after a role token. A completion that goes on
            from the prompt's text keeps it.
    """

    def __init__(self, tokenizer: Tokenizer, *, strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = strip_space and tokenizer.add_space_prefix

    def push(self, id: int) -> str:
        """Takes one token; returns the characters it completes, often none."""
        return self._text(self._tokenizer.token_bytes(id), final=False)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD for a character that was never completed."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _is_special(text: str, type: int) -> bool:
    return text != "" and (type in _SPECIAL_TYPES or text in SPECIAL_TOKENS)


def _vocabulary(metadata: Mapping[str, Value]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError("tokenizer.ggml.tokens is missing or empty: the file has no vocabulary")
    texts = [text for text in tokens if isinstance(text, str) and len(text) <= MAX_TOKEN_LENGTH]
    if len(texts) < len(tokens):
        raise TokenizerError(
            f"tokenizer.ggml.tokens must hold strings of at most {MAX_TOKEN_LENGTH} characters"
        )
    types = [int(type) for type in _numbers(metadata, "token_type", len(texts))]
    unknown = set(types) - set(TokenType)
    if unknown:
        raise TokenizerError(f"tokenizer.ggml.token_type holds {min(unknown)}, which is no token type")
    return texts, types


def _scores(metadata: Mapping[str, Value], n: int) -> list[float]:
    scores = _numbers(metadata, "scores", n)
    if not all(map(math.isfinite, scores)):
        raise TokenizerError("tokenizer.ggml.scores holds a value that is not finite")
    return scores


def _numbers(metadata: Mapping[str, Value], name: str, n: int) -> list[float]:
    values = np.asarray(metadata.get(f"tokenizer.ggml.{name}", ()))
    if values.shape != (n,) or values.dtype.kind not in "iuf":
        raise TokenizerError(
            f"tokenizer.ggml.{name} must hold a number for each of {n} tokens; its shape is {values.shape}"
        )
    numbers: list[float] = values.tolist()
    return numbers


def _token_id(metadata: Mapping[str, Value], name: str, n: int) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}")
    if id is None:
        return None
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < n:
        raise TokenizerError(f"tokenizer.ggml.{name} is {id!r}; the vocabulary has ids 0 to {n - 1}")
    return id


def _flag(metadata: Mapping[str, Value], key: str, *, default: bool) -> bool:
    flag = metadata.get(key, default)
    if not isinstance(flag, bool):
        raise TokenizerError(f"{key} is {flag!r}, not a boolean")
    return flag


def spm_merges(metadata: Mapping[str, Value]) -> NDArray[np.uint32] | None:
    """The merges of an SPM vocabulary: left and right id of each, in the order they apply; None for others.

    To find them takes longer than all else in building a tokenizer, so packed files keep them as SPM_MERGES.

    Raises:
        TokenizerError: the vocabulary is missing or contradicts itself.
    """
    if metadata.get("tokenizer.ggml.model") != "llama":
        return None
    texts, types = _vocabulary(metadata)
    vocab, _ = _spm_vocabulary(texts, types)
    merges = _find_merges(vocab, _scores(metadata, len(texts)))
    return np.array([vocab[text] for pair in merges for text in pair], np.uint32)


def _spm(
    texts: Sequence[str], types: Sequence[int], metadata: Mapping[str, Value], add_space_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE as merges: first the pair whose joined token scores highest, then the leftmost."""
    from tokenizers import Tokenizer, models, normalizers

    vocab, byte_ids = _spm_vocabulary(texts, types)
    scores, kept = _scores(metadata, len(texts)), metadata.get(SPM_MERGES)
    merges = _find_merges(vocab, scores) if kept is None else _kept_merges(texts, vocab, kept)
    bpe = Tokenizer(models.BPE(vocab | byte_ids, merges, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    bpe.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if add_space_prefix else spaces
    )
    return bpe


def _spm_vocabulary(texts: Sequence[str], types: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
    """Text to id of the tokens that merging makes, and of the byte tokens."""
    vocab: dict[str, int] = {}
    byte_ids: dict[str, int] = {}
    normal, byte = int(TokenType.NORMAL), int(TokenType.BYTE)  # an enum's members are slow to look up
    for id, (text, type) in enumerate(zip(texts, types, strict=True)):
        if type == normal and text and text not in SPECIAL_TOKENS:
            vocab.setdefault(text, id)
        elif type == byte:
            if text not in BYTE_TOKENS:
                raise TokenizerError(f"token {id} is typed as a byte, but {text!r} names none")
            byte_ids.setdefault(text, id)
    missing = sorted(BYTE_TOKENS.keys() - byte_ids.keys())
    if missing:
        raise TokenizerError(f"an SPM vocabulary needs a token for every byte; {missing[0]} is missing")
    return vocab, byte_ids


def _find_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    merges = [
        (text[:i], text[i:])
        for text in vocab
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    merges.sort(key=lambda pair: (-scores[vocab[pair[0] + pair[1]]], -len(pair[0]), -len(pair[1])))
    return merges


def _kept_merges(texts: Sequence[str], vocab: Mapping[str, int], kept: Value) -> list[tuple[str, str]]:
    """Merges as `spm_merges` gives them, checked."""
    if not isinstance(kept, np.ndarray) or kept.dtype != np.uint32 or len(kept) % 2:
        raise TokenizerError(f"{SPM_MERGES} is no list of pairs of token ids")
    if len(kept) and kept.max() >= len(texts):
        raise TokenizerError(f"{SPM_MERGES} names token {kept.max()} of {len(texts)}")
    parts = [texts[id] for id in kept.tolist()]
    merges = list(zip(parts[::2], parts[1::2], strict=True))
    if not vocab.keys() >= {*parts, *map("".join, merges)}:
        raise TokenizerError(f"{SPM_MERGES} has a merge that does not make a token out of two others")
    return merges


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_byte_alphabet(text: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[letter] for letter in text)
    except KeyError:  # some files hold a token or two as plain text
        return text.encode()


def _byte_level_bpe(
    texts: Sequence[str], types: Sequence[int], metadata: Mapping[str, Value]
) -> tokenizers.Tokenizer:
    """GPT-2's BPE over bytes. A byte the vocabulary lacks is dropped: SmolLM has no U+0004, for one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splitters: dict[str, pre_tokenizers.PreTokenizer] = {
        "gpt-2": gpt2,
        "default": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in splitters:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r}; the pre-tokenizers of this version of phi3c are "
            + ", ".join(map(repr, splitters))
        )

    vocab: dict[str, int] = {}
    special: set[str] = set()
    for id, text in enumerate(texts):
        if _is_special(text, types[id]):
            special.add(text)
        elif types[id] == TokenType.NORMAL and text:
            vocab.setdefault(text, id)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise TokenizerError("tokenizer.ggml.merges is missing: a gpt2 vocabulary cannot be used without it")
    pairs: list[tuple[str, str]] = []
    for rank, merge in enumerate(merges):
        left, space, right = str(merge).partition(" ")
        if special and not special.isdisjoint((left, right, left + right)):
            continue  # a special token never comes from merging
        if not space or not {left, right, left + right} <= vocab.keys():
            raise TokenizerError(f"merge {rank} ({merge!r}) does not make a token out of two others")
        pairs.append((left, right))
    bpe = Tokenizer(models.BPE(vocab, pairs))
    bpe.pre_tokenizer = splitters[pre]
    return bpe
