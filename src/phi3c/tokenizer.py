"""Text to token ids and back, with the special tokens of a vocabulary apart from its plain ones.

Special tokens are cut out here, and only where the caller allows it; only plain text is merged into tokens
(vocabulary.py). Nothing a user types becomes a role token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from phi3c.errors import InvalidParameterError
from phi3c.vocabulary import SPECIAL_TOKENS, TURN_TOKENS, TokenType, Vocabulary, token_id

if TYPE_CHECKING:
    from phi3c.gguf import Value

# An answer ends at any of these, whatever `eos_token_id` says: Phi-3 files name <|endoftext|> there, yet
# turns end in <|end|>. Not `</s>`: Phi-3 does not end on it, and a file that does names it as its eos.
END_TOKENS = frozenset({"<|end|>", "<|endoftext|>", "<|im_end|>"})
# White space beside some special tokens is dropped: flags of tokenizer.json that GGUF does not store. They
# are told from the vocabulary: Phi-3's and Phi-4-mini's have <|end|>, and these of their tokens take what
# follows; Phi-4's has <|im_sep|>, and all its special tokens take both sides.
RSTRIP_TOKENS = TURN_TOKENS | {"</s>", "<|tag|>"}
# The Unicode property White_Space. str.isspace() also takes U+001C to U+001F, which the property does not.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Tokenizer:
    """Text and token ids of one model.

    Args:
        vocabulary: the tokens.
        bos_id, eos_id: ids of the begin and end tokens, None where the file names none.
        stop_ids: more ids that end an answer.

    Attributes:
        vocab_size: number of tokens in the file's list.
        bos_id, eos_id: as given.
        bos_token, eos_token: their texts, "" where there is none.
        stop_ids: every id that ends an answer.
        special_tokens: text to id of the tokens that only `parse_special` text can produce.
        special_ids: the ids of those that add nothing to decoded text. What a file calls user-defined is
            text that models write (`<think>`), unless it is the marker of a turn or looks like one.
        add_bos: whether `encode` puts `bos_id` first when it is not told.
        add_space_prefix: whether encoding puts a space before text (and decoding takes one away).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        texts, special = vocabulary.texts, vocabulary.special
        self.vocab_size = len(texts)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.bos_token = "" if bos_id is None else texts[bos_id]
        self.eos_token = "" if eos_id is None else texts[eos_id]
        self.add_bos, self.add_space_prefix = vocabulary.add_bos, vocabulary.add_space_prefix

        self._apart = frozenset(special)
        self.special_tokens = {texts[id]: id for id in reversed(special)}  # the lowest id of a text wins
        self.special_ids = frozenset(id for id in special if self._is_silent(id))
        ends = (id for id in special if texts[id] in END_TOKENS)
        self.stop_ids = frozenset({*stop_ids, *ends} if eos_id is None else {*stop_ids, *ends, eos_id})

        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._lstrip_ids: frozenset[int] = frozenset()
        self._rstrip_ids: frozenset[int] = frozenset()
        if "<|im_sep|>" in self.special_tokens:
            self._lstrip_ids = self._rstrip_ids = self._apart
        elif "<|end|>" in self.special_tokens:
            self._rstrip_ids = frozenset(id for id in special if texts[id] in RSTRIP_TOKENS)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Value]) -> Tokenizer:
        """Builds the tokenizer from the `tokenizer.ggml.*` keys of a GGUF file.

        Raises:
            TokenizerError: the vocabulary is missing, contradicts itself, or is of a kind not supported yet.
        """
        vocabulary = Vocabulary(metadata)
        bos, eos, *stops = (
            token_id(metadata, f"{name}_token_id", len(vocabulary.texts))
            for name in ("bos", "eos", "eot", "eom")
        )
        return cls(vocabulary, bos_id=bos, eos_id=eos, stop_ids={id for id in stops if id is not None})

    def _is_silent(self, id: int) -> bool:
        text = self._vocabulary.texts[id]
        return (
            self._vocabulary.types[id] != TokenType.USER_DEFINED
            or text in SPECIAL_TOKENS
            or text in RSTRIP_TOKENS
            or (text.startswith("<|") and text.endswith("|>"))
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
        before: int | None = None
        for text, after in self._runs(segments):
            if before in self._rstrip_ids:
                text = text.lstrip(WHITE_SPACE)
            if after in self._lstrip_ids:
                text = text.rstrip(WHITE_SPACE)
            ids += self._encode_plain(text)
            if after is not None:
                ids.append(after)
            before = after
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
        return self._vocabulary.merging.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turns token ids into text; bytes that are not UTF-8 become U+FFFD.

        `decode(encode(text))` is `text`, so the one space that encoding put first is taken away again. With
        `skip_special=False` so is the one it put after each special token, which Hugging Face leaves there:
        text that goes back and forth does not grow.

        Args:
            ids: token ids.
            skip_special: leave special tokens out rather than write their names.
        """
        pieces: list[bytes] = []
        prefixed = self.add_space_prefix  # whether the next piece begins with a space of encoding's
        for id in ids:
            if id in self._apart:
                if not (skip_special and id in self.special_ids):
                    pieces.append(self.token_text(id).encode())
                    prefixed = self.add_space_prefix and not skip_special
            elif piece := self.token_bytes(id):
                pieces.append(piece.removeprefix(b" ") if prefixed else piece)
                prefixed = False
        return b"".join(pieces).decode("utf-8", "replace")

    def token_text(self, id: int) -> str:
        """A token as the vocabulary spells it: `<|end|>`, `▁the`, `Ġthe`.

        Raises:
            InvalidParameterError: the id is not in the vocabulary.
        """
        self._check(id)
        return self._vocabulary.texts[id]

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to text, as UTF-8 bytes (perhaps a part of a character); b"" for special tokens.

        Raises:
            InvalidParameterError: the id is not in the vocabulary.
        """
        self._check(id)
        return b"" if id in self.special_ids else self._vocabulary.token_bytes(id)

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise InvalidParameterError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")


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
