"""Byte-level vocabularies: against tiktoken, Hugging Face's recipes, and another engine for the patterns."""
# ruff: noqa: RUF001

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from texts import prose
from vocabularies import (
    CONTROL,
    GPT2,
    NORMAL,
    PATTERNS,
    USER_DEFINED,
    Metadata,
    bpe_metadata,
    byte_letters,
    published_tokenizer,
)

from phi3c.tokenizer import TextStream, Tokenizer
from phi3c.vocabulary import SPLITTINGS, Vocabulary

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "byte_level.json").read_text("utf-8"))

PHI4 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_0|>")
PHI4_MINI = (
    *("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
    *("<|tool|>", "<|/tool|>", "<|tag|>"),
)
PHI4_MINI_RSTRIP = frozenset({"<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tag|>"})

cased = st.text(st.sampled_from("aAbBzZéÉßǅʰªжЖ日́̈ـ'sStTlLvVrReEdDmMſ"), max_size=12)
spaced = st.text(st.sampled_from(" \n\r\t\v\f\x1c\x85\xa0\u2028\u3000\u200b/!a1"), max_size=12)
numbered = st.text(st.sampled_from("0123456789½²٣ⅷ一.,xX "), max_size=12)
assigned = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=12)
tangled = st.lists(cased | spaced | numbered | assigned, max_size=6).map("".join)


def golden_metadata(pre: str, *special: str) -> Metadata:
    """The vocabulary of the golden ids, and special tokens behind it."""
    letters = byte_letters()

    def spell(data: bytes) -> str:
        return "".join(letters[byte] for byte in data)

    merges = [tuple(bytes.fromhex(part) for part in merge.split()) for merge in GOLDEN["merges"]]
    tokens = [*letters.values(), *(spell(left + right) for left, right in merges)]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [f"{spell(left)} {spell(right)}" for left, right in merges],
    }


@cache
def golden_tokenizer(pre: str, *special: str) -> Tokenizer:
    return Tokenizer.from_gguf(golden_metadata(pre, *special))


@cache
def hugging_face(
    pre: str, *special: str, lstrip: Collection[str] = (), rstrip: Collection[str] = ()
) -> tokenizers.Tokenizer:
    return published_tokenizer(golden_metadata(pre, *special), special, lstrip, rstrip)


class TestAgainstTiktoken:
    @pytest.mark.parametrize("pre", PATTERNS)
    def test_golden_ids(self, pre: str) -> None:
        tokenizer = golden_tokenizer(pre)
        for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][pre], strict=True):
            assert tokenizer.encode(text) == [int(id) for id in ids.split()], repr(text)

    @pytest.mark.parametrize("pre", PATTERNS)
    def test_golden_texts_come_back(self, pre: str) -> None:
        tokenizer = golden_tokenizer(pre)
        for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][pre], strict=True):
            back = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
            assert tokenizer.decode([int(id) for id in ids.split()]) == back

    def test_the_ways_of_splitting_differ(self) -> None:
        """Or the test above could not tell them apart."""
        ids = GOLDEN["ids"]
        distinct = {json.dumps(ids[pre]) for pre in PATTERNS}
        assert ids["dbrx"] == ids["llama-bpe"]
        assert len(distinct) == len(PATTERNS) - 1


WORDS = {pre: Vocabulary(golden_metadata(pre)).merging.pre_tokenizer for pre in PATTERNS}


class TestAgainstThePatterns:
    def test_every_way_of_splitting_is_tried(self) -> None:
        assert PATTERNS.keys() == SPLITTINGS.keys()

    @pytest.mark.parametrize("pre", sorted(PATTERNS.keys() - {"smollm"}))
    @given(text=tangled)
    @example(text="I'LL we'ſ HTTPServer's e\u0301E\u0301x ǅungla \r\n\r\n //\n 12345 \u3000 x")
    def test_words_are_those_of_the_pattern(self, pre: str, text: str) -> None:
        spans = [span for _, span in WORDS[pre].pre_tokenize_str(text)]
        assert spans == [match.span() for match in regex.finditer(PATTERNS[pre], text)]

    @given(text=tangled)
    def test_smollm_takes_digits_out_first(self, text: str) -> None:
        expected, start = [], 0
        for part in regex.split(r"(\p{N})", text):
            expected += [(start + match.start(), start + match.end()) for match in regex.finditer(GPT2, part)]
            start += len(part)
        assert [span for _, span in WORDS["smollm"].pre_tokenize_str(text)] == expected


class TestAgainstHuggingFace:
    @pytest.mark.parametrize("pre", PATTERNS)
    @given(text=prose | tangled)
    def test_text(self, pre: str, text: str) -> None:
        tokenizer, reference = golden_tokenizer(pre), hugging_face(pre)
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)

    @given(ids=st.lists(st.integers(0, 655), max_size=20))
    def test_ids_of_any_bytes(self, ids: list[int]) -> None:
        """Broken UTF-8 becomes the same replacement characters, streamed or not."""
        tokenizer = golden_tokenizer("dbrx")
        text = hugging_face("dbrx").decode(ids)
        assert tokenizer.decode(ids) == text
        stream = TextStream(tokenizer, strip_space=True)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text

    @given(data=st.binary(max_size=40))
    def test_text_of_any_bytes(self, data: bytes) -> None:
        text = data.decode(errors="replace")
        tokenizer = golden_tokenizer("gpt-4o")
        ids = tokenizer.encode(text)
        assert ids == hugging_face("gpt-4o").encode(text).ids
        assert tokenizer.decode(ids) == text

    @given(
        parts=st.lists(
            st.sampled_from([*PHI4, "hi", "<|im_", "|>", "a"]) | st.sampled_from(" \n\xa0\u3000\x1c\x85"),
            max_size=10,
        )
    )
    def test_phi4_takes_white_space_on_both_sides_of_special_tokens(self, parts: list[str]) -> None:
        text = "".join(parts)
        reference = hugging_face("dbrx", *PHI4, lstrip=PHI4, rstrip=PHI4)
        ids = reference.encode(text).ids
        tokenizer = golden_tokenizer("dbrx", *PHI4)
        assert tokenizer.encode(text, parse_special=True) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)

    @given(
        parts=st.lists(
            st.sampled_from([*PHI4_MINI, "hi", "<|", "|>", "a"]) | st.sampled_from(" \n\xa0\u3000\x1c\x85"),
            max_size=10,
        )
    )
    def test_phi4_mini_takes_white_space_after_role_tokens(self, parts: list[str]) -> None:
        text = "".join(parts)
        reference = hugging_face("gpt-4o", *PHI4_MINI, rstrip=PHI4_MINI_RSTRIP)
        ids = reference.encode(text).ids
        tokenizer = golden_tokenizer("gpt-4o", *PHI4_MINI)
        assert tokenizer.encode(text, parse_special=True) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)

    def test_white_space_beside_special_tokens_of_other_families_stays(self) -> None:
        special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        text = " <|im_start|> \n<|im_end|>\n a <|endoftext|> "
        reference = hugging_face("smollm", *special)
        ids = golden_tokenizer("smollm", *special).encode(text, parse_special=True)
        assert ids == reference.encode(text).ids
        assert golden_tokenizer("smollm", *special).decode(ids, skip_special=False) == text

    def test_text_before_a_special_token_is_stripped_across_segments(self) -> None:
        tokenizer = golden_tokenizer("dbrx", *PHI4)
        segments = [("<|im_start|>", True), (" user ", False), (" \n", False), ("<|im_sep|>", True)]
        assert tokenizer.encode_segments(segments) == [
            tokenizer.special_tokens["<|im_start|>"],
            *tokenizer.encode("user"),
            tokenizer.special_tokens["<|im_sep|>"],
        ]


class TestVocabularies:
    def test_a_digit_is_a_word_or_three_are(self) -> None:
        digit = {letter: byte for byte, letter in byte_letters().items()}
        alone = [digit["1"], digit["2"]]
        for pre, ids in {
            "gpt-2": [258],
            "dbrx": [258],
            "gpt-4o": [258],
            "qwen2": alone,
            "smollm": alone,
        }.items():
            assert Tokenizer.from_gguf(bpe_metadata(pre=pre)).encode("12") == ids, pre

    @pytest.mark.parametrize("pre", [{}, {"tokenizer.ggml.pre": "default"}])
    def test_a_file_that_does_not_say_gets_gpt2_s_way_and_a_warning(
        self, pre: Metadata, caplog: pytest.LogCaptureFixture
    ) -> None:
        metadata = bpe_metadata()
        del metadata["tokenizer.ggml.pre"]
        with caplog.at_level(logging.WARNING, "phi3c"):
            assert Tokenizer.from_gguf(metadata | pre).encode("ab 12") == [256, byte_letters_id("Ġ"), 258]
        assert "tokenizer.ggml.pre" in caplog.text

    @pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", [259]), ("dbrx", [256, 98])])
    def test_a_word_that_is_a_token_though_no_merge_makes_it(self, pre: str, ids: list[int]) -> None:
        tokenizer = Tokenizer.from_gguf(bpe_metadata(("abb", NORMAL), pre=pre))
        assert tokenizer.encode("abb") == [byte_letters_id("b") if id == 98 else id for id in ids]

    def test_llama_bpe_begins_with_bos_unless_the_file_says_otherwise(self) -> None:
        metadata = bpe_metadata(("<|begin_of_text|>", CONTROL), pre="llama-bpe")
        metadata["tokenizer.ggml.bos_token_id"] = 259
        assert Tokenizer.from_gguf(metadata).encode("ab") == [259, 256]
        metadata["tokenizer.ggml.add_bos_token"] = False
        assert Tokenizer.from_gguf(metadata).encode("ab") == [256]

    def test_qwen2_composes_characters_and_the_others_do_not(self) -> None:
        assert golden_tokenizer("qwen2").encode("e\u0301") == golden_tokenizer("qwen2").encode("é")
        assert golden_tokenizer("dbrx").encode("e\u0301") != golden_tokenizer("dbrx").encode("é")

    @pytest.mark.parametrize("type", [CONTROL, USER_DEFINED, NORMAL])
    def test_a_token_held_as_plain_text_which_merges_spell(self, type: int) -> None:
        """Conversions of Phi-4 hold the token of U+FFFD so, typed control."""
        metadata = golden_metadata("dbrx")
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        id = tokens.index("ï¿½")
        tokens[id], types[id] = "\ufffd", type
        tokenizer, sound = Tokenizer.from_gguf(metadata), golden_tokenizer("dbrx")
        assert id not in tokenizer.special_ids
        assert tokenizer.encode("\ufffd") == sound.encode("\ufffd") == [id]
        assert tokenizer.encode(" \ufffd x\ufffd") == sound.encode(" \ufffd x\ufffd")
        assert tokenizer.decode([id]) == "\ufffd"
        assert tokens[id] == "\ufffd"  # the metadata are the caller's

    def test_a_special_token_outside_the_byte_alphabet_stays_special(self) -> None:
        tokenizer = golden_tokenizer("dbrx", "<｜User｜>")
        assert tokenizer.special_ids == {656}
        assert tokenizer.encode("<｜User｜>", parse_special=True) == [656]
        assert 656 not in tokenizer.encode("<｜User｜>")

    def test_user_defined_tokens_are_text_that_models_write(self) -> None:
        extra = [("<think>", USER_DEFINED), ("<|tool_call|>", USER_DEFINED), ("<|end|>", USER_DEFINED)]
        tokenizer = Tokenizer.from_gguf(bpe_metadata(*extra))
        ids = tokenizer.encode("<think>ab<|end|>", parse_special=True)
        assert ids == [259, 256, 261]
        assert 259 not in tokenizer.encode("<think>ab<|end|>")
        assert tokenizer.decode([259, 260, 256, 261]) == "<think>ab"
        assert tokenizer.special_ids == {260, 261}
        stream = TextStream(tokenizer, strip_space=True)
        assert [stream.push(id) for id in ids] == ["<think>", "ab", ""]


def byte_letters_id(letter: str) -> int:
    return list(byte_letters().values()).index(letter)
