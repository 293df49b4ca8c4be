"""Makes byte_level.json: a small byte-level vocabulary, and tiktoken's ids with each way of splitting.

    pip install tiktoken && python tests/golden/byte_level.py

The vocabulary is learnt here from the texts. tiktoken shares no code with Hugging Face's tokenizers, which
phi3c uses: it has another engine for patterns and merges by rank.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import json
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken
from tiktoken_ext import openai_public

N_MERGES = 400
# As in the tokenizer.json of Phi-4. What tiktoken 0.14 has takes a newline and blanks at the end of a text
# for one word, which is the same with the real vocabulary but not with this one.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog, doesn't it? They'll say they've seen it; I'd say I'm not.",
    "DON'T SHOUT! WE'LL SEE, IT'S THE 'S AND THE 'T THAT COUNT. 'Re, 'vE, 'M",
    "the thunderstorm, the others' theory and then the weather",
    "camelCase HTTPServer iPhone XMLHttpRequest ÉCOLE École éCOLE McDonald's O'Neill's",
    "def f(x: int) -> str:\n    if x > 10:\n        return f'{x:>8}'\n\n    return \"no\"\n",
    "#include <stdio.h>\r\nint main(void) { return 0; } // done\r\n/* a */ ///\n\n\n",
    'for (i = 0; i < n; ++i) {\n\ta[i] += b[i]*2;\t\t// tab\n}\n{"key": [1, 2.5, null]}\n',
    "https://example.org/a/b?c=d&e=f#g ./path/to/file.txt C:\\temp\\x /\n//\n",
    "Der Übergang heißt „Weiß“; où est l'été? ¿Qué? ğİı ŞŞ naïve cafe\u0301 e\u0301E\u0301 ǅungla ʰa",
    "Съешь же ещё этих мягких ФРАНЦУЗСКИХ булок. Ελληνικά ΚΑΙ ἀρχή",
    "日本語のテキスト、中文文本，한국어 텍스트。「引用」カタカナ",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया ภาษาไทย",
    "🦙🚀 👩‍👩‍👧 🇩🇪 👍🏽 ☃️ a🦙b ∑∫√ → ≠",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² ٣٤٥ ⅷ 2024-04-23T10:00:00Z x2 v1.0rc1",
    " a  b   c    d     e\n\n\n f \n \n\t\t g\r\n\r\n h\u00a0i\u3000j\u2003k\u200bl\u0085m\u2028n  ",
    "\n",
    "   ",
    " \n",
    "\n ",
    "  \n  x",
    "x\t ",
    "a\u001cb\u001fc\u0000d",
    "!!! ... ?!? --- === ((())) [[]] <|user|> <|end|> </s> $%&*",
    b"broken \xff\xfe bytes \xe6\x97 and \xf0\x9f\x98 end \x80".decode(errors="replace"),
    "\ufffd\ufffd \ufffd",
    "'\u017fs 's'S 'LL'll \u212a",
)


def learn(texts: tuple[str, ...], pattern: str) -> list[tuple[bytes, bytes]]:
    """The merges of byte pair encoding: each time the commonest pair, of equals the first by its bytes."""
    words = Counter(word for text in texts for word in regex.findall(pattern, text))
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    made: set[bytes] = set()
    while len(merges) < N_MERGES:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for left, right in pairwise(split[word]):
                if left + right not in made:
                    pairs[left, right] += count
        left, right = best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        made.add(left + right)
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [left + right]
                i += 1
    return merges


def patterns() -> dict[str, str]:
    """By the name of the way; tiktoken publishes GPT-2's and o200k_base's."""
    openai_public.load_tiktoken_bpe = lambda *args, **options: {}  # no download
    return {
        "gpt-2": openai_public.r50k_pat_str,
        "smollm": openai_public.r50k_pat_str,
        "dbrx": CL100K,
        "llama-bpe": CL100K,
        "qwen2": CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
        "gpt-4o": openai_public.o200k_base()["pat_str"],
    }


def encode(name: str, encoding: tiktoken.Encoding, text: str) -> list[int]:
    if name == "qwen2":
        text = unicodedata.normalize("NFC", text)
    parts = regex.split(r"(\p{N})", text) if name == "smollm" else [text]
    return [id for part in parts for id in encoding.encode_ordinary(part)]


def main() -> None:
    ways = patterns()
    merges = learn(TEXTS, ways["dbrx"])
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = {}
    for name, pattern in ways.items():
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        ids[name] = [encode(name, encoding, text) for text in TEXTS]
    golden = {
        "tiktoken": tiktoken.__version__,
        "merges": [f"{left.hex()} {right.hex()}" for left, right in merges],  # token 256 + i, as hex
        "texts": TEXTS,
        "ids": {name: [" ".join(map(str, text)) for text in of_name] for name, of_name in ids.items()},
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
