"""The vocabulary in a GGUF file: its lists, checked, and the merging of pieces into tokens that they define.

The merging itself is done by the `tokenizers` library, which is built here from the lists alone.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from phi3c.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from phi3c.gguf import Value

logger = logging.getLogger("phi3c")

MAX_TOKEN_LENGTH = 1024  # characters; Phi-4's longest is 128. Rebuilding merges is quadratic in it.
SPACE = "\u2581"  # how an SPM vocabulary spells U+0020
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}  # and a byte that is part of no other token
SPM_MERGES = "phi3c.tokenizer.merges"  # metadata key of packed files, see spm_merges

# The markers of turns in Phi-3 and Phi-4-mini.
TURN_TOKENS = frozenset(
    {"<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *(f"<|placeholder{i}|>" for i in range(1, 7))}
)
# Special whatever type the file gives them: conversions have typed them control, user-defined and normal.
SPECIAL_TOKENS = TURN_TOKENS | {"<unk>", "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"}


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_NORMAL, _BYTE = int(TokenType.NORMAL), int(TokenType.BYTE)  # an enum's members are slow to look up
_SPECIAL_TYPES = frozenset((TokenType.CONTROL, TokenType.USER_DEFINED))


@dataclass(frozen=True, slots=True)
class Splitting:
    """What a name in `tokenizer.ggml.pre` stands for.

    Attributes:
        words: the pattern of the words that no merge crosses; None for GPT-2's.
        single_digits: every digit is a word.
        nfc: text is brought to Unicode's form NFC first.
        ignore_merges: a word that is a token is that token, whatever its merges would give.
        add_bos: the begin token comes first where the file does not say.
    """

    words: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


# Each as in the tokenizer.json of the models whose files carry the name; \p{...} are Unicode's own classes.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "dbrx": Splitting(_CL100K),  # Phi-4
    "gpt-4o": Splitting(_O200K),  # Phi-4-mini
    "llama-bpe": Splitting(_CL100K, ignore_merges=True, add_bos=True),
    "qwen2": Splitting(_CL100K.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
}


class Vocabulary:
    """The tokens of a file and how text is merged into them.

    Attributes:
        texts: the tokens as the file spells them. One that the file holds as plain text, though merges make
            it, is spelled in the byte alphabet here and typed normal.
        types: their types.
        special: ids of the tokens that no merging makes, in order.
        spm: whether the vocabulary is SentencePiece's; else it is byte-level.
        add_bos: whether text begins with the begin token.
        add_space_prefix: whether text is given a space in front.
        merging: turns text without special tokens into ids.

    Raises:
        TokenizerError: the vocabulary is missing, contradicts itself, or is of a kind not supported.
    """

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        self.texts, self.types = _lists(metadata)
        model = str(metadata.get("tokenizer.ggml.model"))
        self.spm = model == "llama"
        self.add_space_prefix = self.spm and _flag(metadata, "tokenizer.ggml.add_space_prefix", default=True)
        self.merging: tokenizers.Tokenizer
        if self.spm:
            self.special = _special(self.texts, self.types)
            self.merging = _spm(self.texts, self.types, metadata, self.add_space_prefix)
            add_bos = True
        elif model == "gpt2":
            splitting = _splitting(metadata)
            merges = metadata.get("tokenizer.ggml.merges")
            if not isinstance(merges, list):
                raise TokenizerError(
                    "tokenizer.ggml.merges is missing: a gpt2 vocabulary cannot be used without it"
                )
            _respell(self.texts, self.types, merges)
            self.special = _special(self.texts, self.types)
            self.merging = _byte_level(self.texts, self.types, self.special, merges, splitting)
            add_bos = splitting.add_bos
        else:
            raise TokenizerError(
                f"tokenizer.ggml.model is {model!r}; phi3c reads 'llama' (SPM) and 'gpt2' (byte-level BPE)"
            )
        self.add_bos = _flag(metadata, "tokenizer.ggml.add_bos_token", default=add_bos)

    def token_bytes(self, id: int) -> bytes:
        """The text of a token as UTF-8, perhaps a part of a character; b"" for padding."""
        text, type = self.texts[id], self.types[id]
        if type in (TokenType.UNKNOWN, TokenType.UNUSED):
            return b""
        if type in _SPECIAL_TYPES:
            return text.encode()
        if not self.spm:
            return _from_byte_alphabet(text)
        if type == TokenType.BYTE:
            return bytes([BYTE_TOKENS[text]])
        return text.replace(SPACE, " ").encode()


def token_id(metadata: Mapping[str, Value], name: str, n: int) -> int | None:
    """The id that `tokenizer.ggml.<name>` gives, None where the file has no such key.

    Raises:
        TokenizerError: it is none of the `n` tokens.
    """
    id = metadata.get(f"tokenizer.ggml.{name}")
    if id is None:
        return None
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < n:
        raise TokenizerError(f"tokenizer.ggml.{name} is {id!r}; the vocabulary has ids 0 to {n - 1}")
    return id


def spm_merges(metadata: Mapping[str, Value]) -> NDArray[np.uint32] | None:
    """The merges of an SPM vocabulary: left and right id of each, in the order they apply; None for others.

    To find them takes longer than all else in building a tokenizer, so packed files keep them as SPM_MERGES.

    Raises:
        TokenizerError: the vocabulary is missing or contradicts itself.
    """
    if metadata.get("tokenizer.ggml.model") != "llama":
        return None
    texts, types = _lists(metadata)
    vocab, _ = _spm_vocabulary(texts, types)
    merges = _find_merges(vocab, _scores(metadata, len(texts)))
    return np.array([vocab[text] for pair in merges for text in pair], np.uint32)


def _lists(metadata: Mapping[str, Value]) -> tuple[list[str], list[int]]:
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


def _special(texts: Sequence[str], types: Sequence[int]) -> list[int]:
    return [
        id
        for id, (text, type) in enumerate(zip(texts, types, strict=True))
        if text and (type in _SPECIAL_TYPES or text in SPECIAL_TOKENS)
    ]


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


def _flag(metadata: Mapping[str, Value], key: str, *, default: bool) -> bool:
    flag = metadata.get(key, default)
    if not isinstance(flag, bool):
        raise TokenizerError(f"{key} is {flag!r}, not a boolean")
    return flag


# --- SentencePiece ----------------------------------------------------------------------------------------


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
    for id, (text, type) in enumerate(zip(texts, types, strict=True)):
        if type == _NORMAL and text and text not in SPECIAL_TOKENS:
            vocab.setdefault(text, id)
        elif type == _BYTE:
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


# --- bytes ------------------------------------------------------------------------------------------------


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


def _respell(texts: list[str], types: list[int], merges: Sequence[object]) -> None:
    """Spells tokens that merges make, yet the file holds as plain text, as the merges do.

    Conversions of Phi-4 have token 5809 as U+FFFD, typed control, where merges make `ï¿½` of it.
    """
    outside = re.compile(f"[^{re.escape(''.join(_byte_alphabet()))}]").search
    plain = [id for id, text in enumerate(texts) if outside(text)]
    if plain:
        letter = {byte: letter for letter, byte in _byte_alphabet().items()}
        made = {str(merge).replace(" ", "") for merge in merges}
        for id in plain:
            spelled = "".join(letter[byte] for byte in texts[id].encode())
            if spelled in made:
                texts[id], types[id] = spelled, _NORMAL


def _splitting(metadata: Mapping[str, Value]) -> Splitting:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name == "default":  # what converters write that do not know the vocabulary
        logger.warning(
            "the file does not say how text is split before its tokens are merged (tokenizer.ggml.pre); "
            "phi3c takes GPT-2's way, which may not be the model's"
        )
        return SPLITTINGS["gpt-2"]
    if name not in SPLITTINGS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}; the pre-tokenizers of this version of phi3c are "
            + ", ".join(map(repr, SPLITTINGS))
        )
    return SPLITTINGS[name]


def _byte_level(
    texts: Sequence[str],
    types: Sequence[int],
    special: Sequence[int],
    merges: Sequence[object],
    splitting: Splitting,
) -> tokenizers.Tokenizer:
    """BPE over bytes. A byte the vocabulary lacks is dropped: SmolLM has no U+0004, for one."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    apart = {texts[id] for id in special}
    vocab: dict[str, int] = {}
    for id, (text, type) in enumerate(zip(texts, types, strict=True)):
        if type == _NORMAL and text and text not in apart:
            vocab.setdefault(text, id)
    pairs = [str(merge).partition(" ")[::2] for merge in merges]
    try:
        model = models.BPE(vocab, pairs, ignore_merges=splitting.ignore_merges)
    except (
        Exception
    ):  # it misses a token, but does not say for which merge; to look up all takes as long again
        pairs = _sound_merges(merges, vocab, apart)
        model = models.BPE(vocab, pairs, ignore_merges=splitting.ignore_merges)
    bpe = Tokenizer(model)
    if splitting.nfc:
        bpe.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.words is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.words), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.words is None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return bpe


def _sound_merges(
    merges: Sequence[object], vocab: Mapping[str, int], apart: AbstractSet[str]
) -> list[tuple[str, str]]:
    """The merges that make a token of two others, without those that name special tokens."""
    pairs = []
    for rank, merge in enumerate(merges):
        left, _, right = str(merge).partition(" ")
        names = {left, right, left + right}
        if names <= vocab.keys():
            pairs.append((left, right))
        elif names.isdisjoint(apart):
            raise TokenizerError(f"merge {rank} ({merge!r}) does not make a token out of two others")
    return pairs
