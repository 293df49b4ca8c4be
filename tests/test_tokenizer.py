"""Token ids against published vectors, against textbook implementations, and for text nobody should trust."""

from __future__ import annotations

import heapq
import json
import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from texts import prose
from tokenizers import decoders
from vocabularies import (
    AB,
    BYTE,
    CONTROL,
    EXTRA,
    NORMAL,
    SPACE,
    SPACE_A,
    SPACE_AB,
    UNKNOWN,
    USER_DEFINED,
    A,
    B,
    Metadata,
    bpe_metadata,
    byte_letters,
    spm_metadata,
)

from phi3c.errors import InvalidParameterError, TokenizerError
from phi3c.gguf import GGUFFile, Value
from phi3c.tokenizer import RSTRIP_TOKENS, WHITE_SPACE, TextStream, Tokenizer
from phi3c.vocabulary import SPM_MERGES, TokenType, spm_merges


@pytest.fixture(scope="session")
def phi3_metadata(shared: Path) -> Metadata:
    with GGUFFile(shared / "vocab" / "ggml-vocab-phi-3.gguf") as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def phi3(phi3_metadata: Metadata) -> Tokenizer:
    return Tokenizer.from_gguf(phi3_metadata)


@pytest.fixture(scope="session")
def smollm_metadata(demo_path: Path) -> Metadata:
    with GGUFFile(demo_path) as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def smollm(smollm_metadata: Metadata) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_metadata)


def numbers(line: str) -> list[int]:
    return [int(number) for number in line.split()]


SYSTEM_PROMPT = (
    "<|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n"
)
SYSTEM_IDS = (
    "32006 887 526 263 8444 20255 29889 32007 32010 1724 338 29871 29906 29974 29906 29973 32007 32001"
)


class TestPublishedVectors:
    def test_all_vectors_of_the_phi3_vocabulary(self, phi3: Tokenizer, shared: Path) -> None:
        vocab = shared / "vocab" / "ggml-vocab-phi-3.gguf"
        texts = vocab.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
        lines = vocab.with_suffix(".gguf.out").read_text("utf-8").split("\n")
        assert len(texts) == len(lines) == 47
        for text, line in zip(texts, lines, strict=True):
            assert phi3.encode(text, add_bos=False) == numbers(line), repr(text)

    # Ids that Hugging Face's own Phi-3 tokenizer gives, added-token flags included.
    GOLDEN = (
        ("<|user|>\nHello<|end|>\n<|assistant|>\n", "32010 15043 32007 32001"),
        ("<s><|user|>\nHello world<|end|>\n<|assistant|>", "1 32010 15043 3186 32007 32001"),
        (SYSTEM_PROMPT, SYSTEM_IDS),
        (
            "Test:<|user|>This is a test<|end|>\n<|assistant|>",
            "4321 29901 32010 910 338 263 1243 32007 32001",
        ),
        ("a </s> b", "263 29871 2 289"),
        ("a<|endoftext|> b", "263 32000 29871 289"),
        ("<s> Hello", "1 29871 15043"),
        ("  hi", "259 7251"),
        ("\n", "29871 13"),
    )

    @pytest.mark.parametrize(("text", "ids"), GOLDEN)
    def test_golden_ids(self, phi3: Tokenizer, text: str, ids: str) -> None:
        assert phi3.encode(text, add_bos=False, parse_special=True) == numbers(ids)

    def test_golden_ids_with_the_official_file_s_token_types(self, phi3_metadata: Metadata) -> None:
        types = np.array(phi3_metadata["tokenizer.ggml.token_type"])
        types[0] = UNKNOWN
        types[2] = CONTROL
        types[32000:32011] = USER_DEFINED
        tokenizer = Tokenizer.from_gguf(phi3_metadata | {"tokenizer.ggml.token_type": types})
        for text, ids in self.GOLDEN:
            assert tokenizer.encode(text, add_bos=False, parse_special=True) == numbers(ids)
        assert tokenizer.decode([32010, 15043, 32007]) == "Hello"

    def test_typed_markers_are_plain_text(self, phi3: Tokenizer) -> None:
        assert phi3.encode("<|end|>", add_bos=False) == [529, 29989, 355, 29989, 29958]

    def test_oracle_prompts_of_the_smollm_vocabulary(self, shared: Path) -> None:
        golden = json.loads((shared / "golden" / "smollm2-135m-phi3-q4_k_m.json").read_text())
        with GGUFFile(shared / golden["model"]) as file:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        for case in golden["cases"]:
            assert tokenizer.encode(case["prompt"], parse_special=True) == case["prompt_ids"]
            assert tokenizer.decode(case["greedy_ids"], skip_special=False) == case["greedy_text"]


def textbook_spm(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's merging: the pair that scores best, of equals the leftmost; skips stale offers."""
    if not text:
        return []
    symbols = list(("▁" + text).replace(" ", "▁"))
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    offers: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := symbols[left] + symbols[right]) in scores:
            heapq.heappush(offers, (-scores[joined], left, right, joined))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while offers:
        _, left, right, joined = heapq.heappop(offers)
        if symbols[left] and symbols[right] and symbols[left] + symbols[right] == joined:
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
    return [symbol for symbol in symbols if symbol]


@pytest.fixture(scope="session")
def phi3_textbook(phi3_metadata: Metadata) -> Callable[[str], list[int]]:
    ids, scores = {}, {}
    columns = (phi3_metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for id, (text, score, type) in enumerate(zip(*columns, strict=True)):
        if type == NORMAL:
            ids[text], scores[text] = id, float(score)

    def encode(text: str) -> list[int]:
        out: list[int] = []
        for symbol in textbook_spm(text, scores):
            out += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
        return out

    return encode


def textbook_words(text: str) -> list[str]:
    """GPT-2's pattern by hand: contractions; runs of letters, numbers or others, one space before; blanks."""

    def kind(character: str) -> str:
        if character in WHITE_SPACE:
            return "blank"
        category = unicodedata.category(character)[0]
        return category if category in "LN" else "other"

    words, i = [], 0
    while i < len(text):
        contraction = next(
            (c for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(c, i)), ""
        )
        start = i + (text[i] == " ")
        if contraction:
            end = i + len(contraction)
        elif start < len(text) and kind(text[start]) != "blank":
            end = start
            while end < len(text) and kind(text[end]) == kind(text[start]):
                end += 1
        else:
            end = i
            while end < len(text) and text[end] in WHITE_SPACE:
                end += 1
            if end < len(text) and end - i > 1:
                end -= 1  # the last blank belongs to the word after it
        words.append(text[i:end])
        i = end
    return words


def textbook_bpe(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Sennrich's merging: the pair of the lowest rank, everywhere it occurs, until no pair has a rank."""
    while True:
        pairs = {pair for pair in pairwise(word) if pair in ranks}
        if not pairs:
            return word
        left, right = min(pairs, key=ranks.__getitem__)
        merged: list[str] = []
        for symbol in word:
            if merged and (merged[-1], symbol) == (left, right):
                merged[-1] = left + right
            else:
                merged.append(symbol)
        word = merged


@pytest.fixture(scope="session")
def smollm_textbook(smollm_metadata: Metadata) -> Callable[[str], list[int]]:
    ids = {text: id for id, text in enumerate(smollm_metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(smollm_metadata["tokenizer.ggml.merges"])}
    letters = byte_letters()

    def encode(text: str) -> list[int]:
        spaced = "".join(f"\0{c}\0" if unicodedata.category(c)[0] == "N" else c for c in text)
        out: list[int] = []
        for word in (word for part in spaced.split("\0") for word in textbook_words(part)):
            known = [letters[byte] for byte in word.encode() if letters[byte] in ids]
            out += [ids[symbol] for symbol in textbook_bpe(known, ranks)]
        return out

    return encode


@pytest.fixture(scope="session")
def hugging_face(phi3: Tokenizer) -> tokenizers.Tokenizer:
    """The same merges, but with Hugging Face's own handling of added tokens and their flags."""
    spec = json.loads(phi3._vocabulary.merging.to_str())
    spec["model"]["vocab"] |= phi3.special_tokens
    reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
    reference.add_tokens(
        [
            tokenizers.AddedToken(text, rstrip=text in RSTRIP_TOKENS, normalized=False)
            for text in phi3.special_tokens
        ]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    reference.decoder = decoders.Sequence(steps)
    return reference


phi3_tokens = st.sampled_from(
    ["<|user|>", "<|end|>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<|assistant|>", "<|placeholder6|>"]
)


class TestAgainstTextbooks:
    @given(text=prose)
    @example(text="a severe thunderstorm warning")  # st + orm: a greedy longest match goes wrong here
    @example(text=" " * 70 + "x" + " " * 17)
    def test_spm(self, phi3: Tokenizer, phi3_textbook: Callable[[str], list[int]], text: str) -> None:
        assert phi3.encode(text, add_bos=False) == phi3_textbook(text)

    @given(text=prose.map(lambda text: text.replace("\0", "")))
    @example(text="I'll pay 12.50 for x2,\n\n  you've\t got 3½ \n")
    def test_byte_level_bpe(
        self, smollm: Tokenizer, smollm_textbook: Callable[[str], list[int]], text: str
    ) -> None:
        assert smollm.encode(text) == smollm_textbook(text)

    @given(
        parts=st.lists(
            phi3_tokens
            | st.sampled_from(["<|", "hi", " a", " ", "\n", "\xa0", "\u3000", "\x1c", "\x85", "\u200b"]),
            max_size=10,
        )
    )
    def test_special_tokens_are_split_as_hugging_face_splits_added_tokens(
        self, phi3: Tokenizer, hugging_face: tokenizers.Tokenizer, parts: list[str]
    ) -> None:
        text = "".join(parts)
        expected = hugging_face.encode(text, add_special_tokens=False).ids
        assert phi3.encode(text, add_bos=False, parse_special=True) == expected

    @given(text=prose)
    def test_decoding(self, phi3: Tokenizer, hugging_face: tokenizers.Tokenizer, text: str) -> None:
        ids = phi3.encode(text, add_bos=False)
        assert phi3.decode(ids) == hugging_face.decode(ids)

    def test_of_broken_bytes_the_sound_characters_stay(
        self, phi3: Tokenizer, hugging_face: tokenizers.Tokenizer
    ) -> None:
        """Hugging Face gives up the whole run of byte tokens, with a mark for each; no stream can do that."""
        ids = [3 + byte for byte in "你".encode() + b"\xf0\x9f"]
        assert hugging_face.decode(ids) == "\ufffd" * 5
        assert phi3.decode(ids) == "你\ufffd"


class TestSpm:
    def test_merges_by_score_not_by_length(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert tokenizer.encode("ab", add_bos=False) == [SPACE_AB]  # ab (-1) first, then ▁+ab
        assert tokenizer.encode("aab", add_bos=False) == [SPACE_A, AB]
        assert tokenizer.encode("a b", add_bos=False) == [SPACE_A, SPACE, B]

    def test_kept_merges_replace_the_search(self) -> None:
        """ab by its score, ▁a, then ▁ab in its two ways, longest left part first."""
        merges = spm_merges(spm_metadata())
        assert merges is not None
        expected = [A, B, SPACE, A, SPACE_A, B, SPACE, AB]
        assert merges.tolist() == expected
        metadata = spm_metadata()
        for kept, ids in ((expected, [SPACE_AB]), ([SPACE, A], [SPACE_A, B]), ([], [SPACE, A, B])):
            metadata[SPM_MERGES] = np.array(kept, np.uint32)
            assert Tokenizer.from_gguf(metadata).encode("ab", add_bos=False) == ids

    @pytest.mark.parametrize(
        "kept",
        [
            "a b",
            ["a", "b"],
            np.array([A, B, A], np.uint32),
            np.array([A, B], np.float32),
            np.array([A, EXTRA], np.uint32),  # no such token
            np.array([A, A], np.uint32),  # there is no aa
            np.array([3 + 0x41, B], np.uint32),  # a byte is never merged
        ],
    )
    def test_kept_merges_that_make_no_sense(self, kept: Value) -> None:
        with pytest.raises(TokenizerError, match=re.escape(SPM_MERGES)):
            Tokenizer.from_gguf(spm_metadata() | {SPM_MERGES: kept})

    def test_kept_merges_of_phi3(self, phi3_metadata: Metadata, phi3: Tokenizer, shared: Path) -> None:
        merges = spm_merges(phi3_metadata)
        assert merges is not None
        again = Tokenizer.from_gguf(phi3_metadata | {SPM_MERGES: merges})
        text = (shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8")
        assert again.encode(text) == phi3.encode(text)

    def test_other_vocabularies_have_none(self, smollm_metadata: Metadata) -> None:
        assert spm_merges(smollm_metadata) is None

    def test_bytes_stand_for_what_no_token_holds(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert tokenizer.encode("é", add_bos=False) == [SPACE, 3 + 0xC3, 3 + 0xA9]
        assert tokenizer.decode([SPACE, 3 + 0xC3, 3 + 0xA9]) == "é"

    def test_byte_tokens_cannot_be_typed(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert 3 + 0x41 not in tokenizer.encode("<0x41>", add_bos=False, parse_special=True)

    def test_space_prefix_can_be_off(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata() | {"tokenizer.ggml.add_space_prefix": False})
        assert tokenizer.encode("ab b", add_bos=False) == [AB, SPACE, B]
        assert tokenizer.decode([SPACE_AB]) == " ab"

    def test_runs_of_spaces(self, phi3: Tokenizer) -> None:
        assert [phi3.token_bytes(id) for id in (259, 268, 462)] == [b" " * 2, b" " * 4, b" " * 16]
        assert phi3.decode([259, 268, 462]) == " " * 21  # 22, less the prefix

    def test_white_space_after_an_end_token_of_another_family_stays(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())  # has </s>, but none of Phi-3's turn markers
        assert tokenizer.encode("</s> a", add_bos=False, parse_special=True) == [2, SPACE, SPACE_A]


class TestSpecialTokens:
    @pytest.mark.parametrize("type", [CONTROL, USER_DEFINED, NORMAL])
    def test_turn_markers_are_special_whatever_their_type(self, type: TokenType) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(("<|user|>", type), ("<|end|>", type)))
        assert tokenizer.encode("<|user|>\na<|end|>", parse_special=True) == [1, EXTRA, SPACE_A, EXTRA + 1]
        assert not {EXTRA, EXTRA + 1} & set(tokenizer.encode("<|user|>\na<|end|>"))
        assert tokenizer.decode([EXTRA, SPACE_A, EXTRA + 1]) == "a"
        assert tokenizer.decode([EXTRA, SPACE_A, EXTRA + 1], skip_special=False) == "<|user|>a<|end|>"

    @pytest.mark.parametrize("type", [UNKNOWN, TokenType.UNUSED])
    def test_padding_is_neither_read_nor_written(self, type: TokenType) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(("[PAD265]", type)))
        assert EXTRA not in tokenizer.encode("[PAD265]", parse_special=True)
        assert tokenizer.token_bytes(EXTRA) == b""

    @pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
    def test_merging_never_makes_a_special_token(self, make: Callable[..., Metadata]) -> None:
        metadata = make()
        types = metadata["tokenizer.ggml.token_type"]
        special = metadata["tokenizer.ggml.tokens"].index("ab")
        types[special] = USER_DEFINED
        tokenizer = Tokenizer.from_gguf(metadata)
        assert special not in tokenizer.encode("ab ab")
        assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"
        assert special in tokenizer.encode("ab ab", parse_special=True)

    def test_a_vocabulary_without_endoftext(self) -> None:
        """Fine-tunes pad its place: neither their names nor what strips white space depends on it."""
        metadata = spm_metadata(("[PAD0]", UNKNOWN), ("<|user|>", USER_DEFINED), ("<|end|>", USER_DEFINED))
        metadata["general.name"] = "phi3"
        tokenizer = Tokenizer.from_gguf(metadata)
        ids = tokenizer.encode("<|user|>\na<|end|>", add_bos=False, parse_special=True)
        assert ids == [EXTRA + 1, SPACE_A, EXTRA + 2]
        assert tokenizer.stop_ids == {2, EXTRA + 2}

    def test_the_unknown_token_has_a_name(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert tokenizer.encode("<unk>", add_bos=False, parse_special=True) == [0]
        assert 0 not in tokenizer.encode("<unk>", add_bos=False)
        assert tokenizer.decode([0, SPACE_A]) == "a"
        assert tokenizer.decode([0, SPACE_A], skip_special=False) == "<unk>a"

    def test_the_longest_special_token_wins(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(("<x>", CONTROL), ("<x>>", CONTROL), ("<x", CONTROL)))
        assert tokenizer.encode("<x>><x>", add_bos=False, parse_special=True) == [EXTRA + 1, EXTRA]

    @pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
    def test_of_equal_texts_the_lowest_id_wins(self, make: Callable[..., Metadata]) -> None:
        metadata = make(("<|system|>", CONTROL), ("<|system|>", CONTROL), ("ab", NORMAL))
        first = len(metadata["tokenizer.ggml.tokens"]) - 3
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode("<|system|>", add_bos=False, parse_special=True) == [first]
        assert {first, first + 1} <= tokenizer.special_ids
        assert first + 2 not in tokenizer.encode("ab ab")

    def test_an_empty_token_text_is_harmless(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(("", CONTROL), ("", NORMAL)))
        assert tokenizer.encode("ab", add_bos=False, parse_special=True) == [SPACE_AB]

    def test_stop_ids_are_the_union_of_all_that_ends_an_answer(self, phi3: Tokenizer) -> None:
        assert phi3.stop_ids == {32000, 32007}
        metadata = spm_metadata(("<|im_end|>", CONTROL), ("<|end|>", USER_DEFINED), ("<|end|>", CONTROL))
        metadata |= {"tokenizer.ggml.eot_token_id": A, "tokenizer.ggml.eom_token_id": B}
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.stop_ids == {2, A, B, EXTRA, EXTRA + 1, EXTRA + 2}
        del metadata["tokenizer.ggml.eos_token_id"]
        assert 2 not in Tokenizer.from_gguf(metadata).stop_ids

    def test_names_of_tokens(self, phi3: Tokenizer) -> None:
        assert [phi3.token_text(id) for id in (32007, 278)] == ["<|end|>", "▁the"]
        assert (phi3.bos_id, phi3.bos_token, phi3.eos_id, phi3.eos_token) == (
            1,
            "<s>",
            32000,
            "<|endoftext|>",
        )
        tokenizer = Tokenizer.from_gguf(bpe_metadata())
        assert (tokenizer.bos_id, tokenizer.bos_token, tokenizer.eos_id, tokenizer.eos_token) == (
            None,
            "",
            None,
            "",
        )


class TestBos:
    def test_exactly_once(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert tokenizer.add_bos
        assert tokenizer.encode("ab") == [1, SPACE_AB]
        assert tokenizer.encode("ab", add_bos=False) == [SPACE_AB]
        assert tokenizer.encode("<s>ab", parse_special=True) == [1, SPACE_AB]
        assert tokenizer.encode_segments([("<s>", True), ("ab", False)]) == [1, SPACE_AB]
        assert tokenizer.encode("<s>ab")[0:2] != [1, SPACE_AB]  # typed, not meant

    def test_as_the_file_says(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata() | {"tokenizer.ggml.add_bos_token": False})
        assert tokenizer.encode("ab") == [SPACE_AB]
        assert tokenizer.encode("ab", add_bos=True) == [1, SPACE_AB]

    def test_a_byte_level_vocabulary_adds_none_unless_the_file_says_so(self) -> None:
        metadata = bpe_metadata() | {"tokenizer.ggml.bos_token_id": 5}
        assert Tokenizer.from_gguf(metadata).encode("ab") == [256]
        metadata["tokenizer.ggml.add_bos_token"] = True
        assert Tokenizer.from_gguf(metadata).encode("ab") == [5, 256]

    def test_no_begin_token_to_add(self) -> None:
        assert Tokenizer.from_gguf(bpe_metadata()).encode("ab", add_bos=True) == [256]

    @pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
    def test_empty_text(self, make: Callable[..., Metadata]) -> None:
        tokenizer = Tokenizer.from_gguf(make())
        assert tokenizer.encode("", add_bos=False) == []
        assert tokenizer.decode([]) == ""


class TestByteLevel:
    def test_pre_tokenizers_differ_in_digits(self) -> None:
        digit = {letter: byte for byte, letter in byte_letters().items()}
        assert Tokenizer.from_gguf(bpe_metadata(pre="gpt-2")).encode("ab 12") == [256, digit["Ġ"], 258]
        assert Tokenizer.from_gguf(bpe_metadata(pre="default")).encode("12") == [258]
        assert Tokenizer.from_gguf(bpe_metadata(pre="smollm")).encode("12") == [digit["1"], digit["2"]]

    def test_a_token_stored_as_plain_text_is_written_as_it_is(self) -> None:
        tokenizer = Tokenizer.from_gguf(bpe_metadata(("\ufffd", NORMAL)))
        assert tokenizer.token_bytes(259) == "\ufffd".encode()

    def test_a_leading_space_is_kept(self) -> None:
        tokenizer = Tokenizer.from_gguf(bpe_metadata())
        assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


@pytest.fixture(scope="session", params=["phi3", "smollm"])
def real(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


class TestRoundTrip:
    @given(text=prose)
    def test_text_comes_back(self, real: Tokenizer, text: str) -> None:
        if not real.add_space_prefix:  # SmolLM's vocabulary lacks the bytes of a few control characters
            text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Co", "Cf"))
        text = text.replace("\u2581", "")  # which SPM cannot tell from a space
        ids = real.encode(text)
        assert real.decode(ids) == text
        assert real.encode(real.decode(ids)) == ids

    @given(parts=st.lists(phi3_tokens | prose, max_size=8))
    def test_special_tokens_come_back_and_text_does_not_grow(self, phi3: Tokenizer, parts: list[str]) -> None:
        ids = phi3.encode("".join(parts).replace("\u2581", ""), parse_special=True)
        text = phi3.decode(ids, skip_special=False)
        assert phi3.encode(text, parse_special=True) == ids
        assert phi3.decode(phi3.encode(text, parse_special=True), skip_special=False) == text

    def test_text_with_special_tokens_comes_back_as_it_was(self, phi3: Tokenizer) -> None:
        text = "<s> Hello<|endoftext|>you  <|user|>there<|end|>"
        assert phi3.decode(phi3.encode(text, parse_special=True), skip_special=False) == text

    @given(ids=st.lists(st.integers(0, 32063), max_size=30))
    def test_a_stream_gives_what_decode_gives(self, real: Tokenizer, ids: list[int]) -> None:
        stream = TextStream(real, strip_space=True)
        assert "".join([*map(stream.push, ids), stream.flush()]) == real.decode(ids)

    @given(text=prose)
    def test_a_stream_never_breaks_a_character(self, real: Tokenizer, text: str) -> None:
        stream = TextStream(real, strip_space=False)
        pieces = [stream.push(id) for id in real.encode(text.replace("\ufffd", ""))]
        assert "\ufffd" not in "".join(pieces)

    @given(text=prose, cuts=st.lists(st.integers(0, 60), max_size=4))
    def test_where_plain_text_is_cut_changes_nothing(
        self, real: Tokenizer, text: str, cuts: list[int]
    ) -> None:
        edges = [0, *sorted(cuts), len(text)]
        segments = [(text[i:j], False) for i, j in pairwise(edges)]
        assert real.encode_segments(segments) == real.encode(text)

    def test_spliced_text_encodes_as_the_whole_does(self, phi3: Tokenizer) -> None:
        segments = [("<|user|>\n", True), ("  Hello ", False), ("<|end|>\n<|assistant|>\n", True)]
        whole = "".join(text for text, _ in segments)
        assert phi3.encode_segments(segments) == phi3.encode(whole, parse_special=True)


class TestTextStream:
    def test_holds_back_half_a_character(self) -> None:
        stream = TextStream(Tokenizer.from_gguf(spm_metadata()), strip_space=True)
        assert [stream.push(3 + byte) for byte in "é🦙".encode()] == ["", "é", "", "", "", "🦙"]
        assert stream.flush() == ""

    def test_a_character_never_completed(self) -> None:
        stream = TextStream(Tokenizer.from_gguf(spm_metadata()), strip_space=True)
        assert stream.push(3 + 0xC3) == ""
        assert stream.push(A) == "\ufffda"
        assert stream.push(3 + 0xF0) == ""
        assert stream.flush() == "\ufffd"

    def test_strips_one_space_of_an_answer_and_none_of_a_continuation(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(("<|end|>", CONTROL)))
        answer = TextStream(tokenizer, strip_space=True)
        assert [answer.push(id) for id in (EXTRA, SPACE, SPACE_A, SPACE)] == ["", "", " a", " "]
        continuation = TextStream(tokenizer, strip_space=False)
        assert [continuation.push(id) for id in (SPACE_A, SPACE_AB)] == [" a", " ab"]

    def test_a_byte_level_space_belongs_to_the_text(self) -> None:
        stream = TextStream(Tokenizer.from_gguf(bpe_metadata()), strip_space=True)
        assert stream.push(257) == " ab"


class TestRefusals:
    @pytest.mark.parametrize("id", [-1, 265, 2**32])
    def test_ids_outside_the_vocabulary(self, id: int) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        with pytest.raises(InvalidParameterError, match="vocabulary of 265"):
            tokenizer.decode([id])

    @pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
    def test_lone_surrogates(self, make: Callable[..., Metadata]) -> None:
        with pytest.raises(InvalidParameterError, match="udce9"):
            Tokenizer.from_gguf(make()).encode("caf\udce9")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tokens": None}, "no vocabulary"),
            ({"tokens": []}, "no vocabulary"),
            ({"tokens": np.zeros(265, np.int32)}, "no vocabulary"),
            ({"tokens": [["a"]] * 265}, "strings"),
            ({"tokens": ["a" * 1025] * 265}, "at most 1024"),
            ({"model": None}, "None"),
            ({"model": "bert"}, "'bert'"),
            ({"scores": None}, "scores"),
            ({"scores": np.zeros(264, np.float32)}, "each of 265"),
            ({"scores": np.full(265, np.nan, np.float32)}, "finite"),
            ({"scores": ["1"] * 265}, "scores"),
            ({"token_type": None}, "token_type"),
            ({"token_type": np.ones(266, np.int32)}, "token_type"),
            ({"token_type": np.full(265, 7, np.int32)}, "token_type holds 7"),
            ({"token_type": np.ones(265, np.int32)}, "every byte; <0x00>"),
            ({"token_type": np.full(265, BYTE, np.int32)}, "'<unk>' names none"),
            ({"bos_token_id": 265}, "bos_token_id is 265"),
            ({"eos_token_id": -1}, "eos_token_id is -1"),
            ({"eot_token_id": 2**32 - 1}, "eot_token_id"),
            ({"eom_token_id": "2"}, "eom_token_id"),
            ({"bos_token_id": True}, "bos_token_id"),
            ({"add_bos_token": 1}, "add_bos_token"),
            ({"add_space_prefix": "no"}, "add_space_prefix"),
        ],
    )
    def test_contradictory_spm_vocabularies(self, change: Metadata, message: str) -> None:
        metadata = spm_metadata() | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_gguf({key: value for key, value in metadata.items() if value is not None})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"merges": None}, "merges is missing"),
            ({"merges": ["a b", "ab"]}, "merge 1 .'ab'."),
            ({"merges": ["a c"]}, "merge 0"),
            ({"merges": ["a zz"]}, "merge 0"),
            ({"merges": [" ab"]}, "merge 0"),
            ({"pre": "tekken"}, "'tekken'.* 'gpt-2', 'smollm', 'dbrx'"),
            ({"pre": ["smollm"]}, "pre-tokenizers"),
        ],
    )
    def test_contradictory_byte_level_vocabularies(self, change: Metadata, message: str) -> None:
        metadata = bpe_metadata() | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_gguf({key: value for key, value in metadata.items() if value is not None})
