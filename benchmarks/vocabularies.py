"""Vocabularies at full size: cl100k_base (Phi-4), o200k_base (Phi-4-mini), against tiktoken and Hugging Face.

usage: pip install tiktoken && pip download --no-deps litellm
       python benchmarks/vocabularies.py litellm-*.whl [--llama-cpp FOLDER]

The wheel holds OpenAI's two lists of tokens, which are told by their hashes. Merges and special tokens are
put to them as in the GGUF files of the models. FOLDER is `models` of llama.cpp's sources: vocabularies of
other models with texts and their ids. Ends with an error if a single id differs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import random
import statistics
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from vocabularies import CONTROL, NORMAL, Metadata, byte_letters, published_tokenizer

from phi3c.gguf import GGUFFile
from phi3c.tokenizer import Tokenizer
from phi3c.vocabulary import TokenType

ROOT = Path(__file__).resolve().parents[1]
N_TEXTS = 20_000
LETTERS = byte_letters()
PIECES = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\xa0", "\u3000", "\u200b", "\x85"),
    *("'s", "'LL", "don't", "HELLO", "Hello", "iPhone", "e\u0301", "ʰ", "ǅ", "ЙЦУК", "日本語", "한국어"),
    *("🦙", "👩‍👩‍👧", "\ufffd", "123", "12345", "½", "²", "//", "...", "!!", "def f(x):\n    return x"),
)
PHI4 = {100257: "<|endoftext|>", 100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>"}
PHI4_MINI = {
    **{199999: "<|endoftext|>", 200019: "<|assistant|>", 200020: "<|end|>", 200021: "<|user|>"},
    **{200022: "<|system|>", 200023: "<|tool|>", 200024: "<|/tool|>", 200028: "<|tag|>"},
}
PHI4_MINI_RSTRIP = {"<|assistant|>", "<|end|>", "<|user|>", "<|system|>", "<|tag|>"}


def encodings(wheel: Path) -> dict[str, tiktoken.Encoding]:
    """tiktoken's encodings, from the wheel instead of the network."""
    with zipfile.ZipFile(wheel) as archive:
        files = (archive.read(name) for name in archive.namelist() if "tokenizers/" in name)
        by_hash = {hashlib.sha256(data).hexdigest(): data for data in files}

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        lines = (line.split() for line in by_hash[expected_hash].splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in lines}

    openai_public.load_tiktoken_bpe = load
    makers = {"dbrx": openai_public.cl100k_base, "gpt-4o": openai_public.o200k_base}
    return {pre: tiktoken.Encoding(**make()) for pre, make in makers.items()}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that the last merge makes the token of."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def gguf_metadata(pre: str, ranks: dict[bytes, int], special: dict[int, str], n: int) -> Metadata:
    def spell(data: bytes) -> str:
        return "".join(LETTERS[byte] for byte in data)

    normal = {rank: spell(token) for token, rank in ranks.items()}
    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokens = normal | special
    types = [NORMAL if id in normal else CONTROL if id in special else TokenType.UNUSED for id in range(n)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(id, f"[PAD{id}]") for id in range(n)],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [f"{spell(left)} {spell(right)}" for left, right in merges],
    }


def texts(rng: random.Random, special: tuple[str, ...] = ()) -> list[str]:
    """Pieces of the list above, characters of all Unicode, and special tokens, one text after the other."""
    anything = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
    kinds = (PIECES, PIECES, anything, special or PIECES)
    return ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 12))) for _ in range(N_TEXTS)]


def milliseconds(run: Callable[[], Any], times: int = 9) -> float:
    """Of processor time, the median."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        run()
        taken.append(1000 * (time.process_time() - started))
    return statistics.median(taken)


def check(pre: str, encoding: tiktoken.Encoding, prose: str) -> None:
    rng = random.Random(1)
    special, n = (PHI4, 100352) if pre == "dbrx" else (PHI4_MINI, 200064)
    lstrip, rstrip = (PHI4.values(),) * 2 if pre == "dbrx" else ((), PHI4_MINI_RSTRIP)
    metadata = gguf_metadata(pre, encoding._mergeable_ranks, special, n)
    tokenizer = Tokenizer.from_gguf(metadata)
    names = tuple(special.values())
    published = published_tokenizer(metadata, names, frozenset(lstrip), frozenset(rstrip))
    build = milliseconds(lambda: Tokenizer.from_gguf(metadata))
    ratios = [  # before the words of the texts below fill the caches of both
        milliseconds(lambda: tokenizer.encode(prose, parse_special=True), 1)
        / milliseconds(lambda: published.encode(prose).ids, 1)
        for _ in range(41)
    ]
    for text in (*texts(rng), prose):
        ids = encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text, repr(text)
    for text in texts(rng, names):
        ids = published.encode(text).ids
        assert tokenizer.encode(text, parse_special=True) == ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == published.decode(ids, skip_special_tokens=False)
    print(
        f"| {pre} | {n:,} | {len(metadata['tokenizer.ggml.merges']):,} | {build:.0f} ms "
        f"| {2 * N_TEXTS:,} | {statistics.median(ratios):.2f} |"
    )


def check_vectors(path: Path) -> None:
    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    inputs = path.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text("utf-8").split("\n")
    for text, line in zip(inputs, lines, strict=True):
        ids = [int(id) for id in line.split()]
        assert tokenizer.encode(text, add_bos=False) == ids, repr(text)
        assert tokenizer.decode(ids) == text, repr(text)
    print(f"{path.name}: {len(lines)} texts equal")


def main() -> None:
    parser = argparse.ArgumentParser(description="Phi-4's vocabularies at full size")
    parser.add_argument("wheel", type=Path, metavar="litellm-*.whl")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="FOLDER", help="with ggml-vocab-*.gguf, .inp and .out"
    )
    args = parser.parse_args()

    prose = (ROOT / "README.md").read_text("utf-8") + (ROOT / "src/phi3c/tokenizer.py").read_text("utf-8")
    prose = (prose * (100_000 // len(prose) + 1))[:100_000]
    print(
        "| vocabulary | tokens | merges | to build, processor time | texts equal "
        "| time for 100 KB / Hugging Face's |\n|---|---|---|---|---|---|"
    )
    for pre, encoding in encodings(args.wheel).items():
        check(pre, encoding, prose)
    for name in ("gpt-2", "llama-bpe", "qwen2", "phi-3") if args.llama_cpp else ():
        check_vectors(args.llama_cpp / f"ggml-vocab-{name}.gguf")


if __name__ == "__main__":
    main()
