"""Texts that tell tokenizers apart, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

anything = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
words = st.sampled_from(
    ["the", "thunderstorm", "don't", "'ll", "é", "日本", "🦙", "_x", "!?", "∑", "İ", "zzzzzzzz"]
)
oddities = st.sampled_from(["2024", "½", "Ġ", "<|user|>", "<|end|>", "<s>", "</s>", "<0x41>"])
blanks = st.sampled_from([" ", "  ", "\n", "\t", "\xa0", "\u3000"])
prose = st.lists(words | oddities | blanks | anything, max_size=12).map("".join)
