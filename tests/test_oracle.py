"""The oracle itself, before anything is measured against it: figures that another program made."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import fuse_llama_to_phi3, write_tiny_llama, write_tiny_phi3
from oracle import Oracle, compare, load_oracle

from phi3c.gguf import GGUFFile
from phi3c.tokenizer import Tokenizer

MODEL = "models/smollm2-135m-phi3-q4_k_m.gguf"


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    text = (shared / "golden/smollm2-135m-phi3-q4_k_m.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


# The golden figures have 4 or 5 decimals and both sides sum in float32.
@pytest.mark.parametrize("case", range(6))
def test_golden_log_probabilities(shared: Path, golden: dict[str, Any], case: int) -> None:
    expected = golden["cases"][case]
    prompt, greedy = expected["prompt_ids"], expected["greedy_ids"]
    log_probs = load_oracle(shared / MODEL).log_probs(prompt + greedy[:-1])
    after_prompt = log_probs[len(prompt) - 1 :]

    np.testing.assert_allclose(
        log_probs[np.arange(len(prompt) - 1), prompt[1:]], expected["prompt_logprobs"], atol=2e-4
    )
    np.testing.assert_allclose(
        after_prompt[0, expected["top10_ids"]], expected["top10_logprobs"], rtol=0, atol=2e-4
    )
    assert after_prompt.argmax(axis=1).tolist() == greedy
    runner_up, best = np.sort(after_prompt, axis=1)[:, -2:].T
    np.testing.assert_allclose(best - runner_up, expected["greedy_margin"], rtol=0, atol=2e-4)


def test_golden_perplexity(shared: Path, golden: dict[str, Any]) -> None:
    expected = golden["perplexity"]
    logits = lru_cache(maxsize=1)(load_oracle(shared / MODEL).logits)
    with GGUFFile(shared / MODEL) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = tokenizer.encode((shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8"))
    assert len(ids) == expected["tokens"]

    accuracy = compare(logits, logits, ids, expected["context"])
    assert accuracy.oracle_perplexity == pytest.approx(expected["value"], abs=1e-3)
    assert (accuracy.mean_kl, accuracy.same_top, accuracy.max_delta) == (0, 1, 0)


def test_compare_measures_what_it_says() -> None:
    p = np.log([[0.5, 0.25, 0.25]], dtype=np.float32)
    q = np.log([[0.25, 0.5, 0.25]], dtype=np.float32)
    accuracy = compare(lambda ids: p.repeat(len(ids), 0), lambda ids: q.repeat(len(ids), 0), [0] * 9, 4)
    assert accuracy.n_scored == 4  # two full chunks, the second half of each
    assert accuracy.oracle_perplexity == pytest.approx(2)
    assert accuracy.perplexity == pytest.approx(4)
    assert accuracy.mean_kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert accuracy.same_top == 0
    assert accuracy.max_delta == pytest.approx(np.log(2))


@pytest.mark.parametrize("rope_dims", [32, 16])
def test_interleaved_and_neox_rope_agree_on_twins(tmp_path: Path, rope_dims: int) -> None:
    llama = write_tiny_llama(tmp_path / "llama.gguf", rope_dims=rope_dims)
    phi3 = fuse_llama_to_phi3(llama, tmp_path / "phi3.gguf")
    ids = list(range(60))
    np.testing.assert_allclose(Oracle(phi3).logits(ids), Oracle(llama).logits(ids), rtol=0, atol=1e-3)


def test_window_hides_exactly_the_keys_before_it(tmp_path: Path) -> None:
    # With one layer a token sees the last W tokens and no more: an older one leaves its logits alone.
    oracle = Oracle(write_tiny_phi3(tmp_path / "tiny.gguf", layers=1, window=20))
    ids = list(range(60))
    changed = [300, *ids[1:]]
    same_row = np.isclose(oracle.logits(ids), oracle.logits(changed), rtol=0, atol=1e-5).all(axis=1)
    assert same_row.tolist() == [False] * 20 + [True] * 40


@pytest.mark.parametrize(
    ("layers", "ctx", "window", "expected"),
    [
        (32, 4096, "absent", 2047),
        (40, 4096, "absent", 2047),
        (24, 4096, "absent", 0),
        (32, 8192, "absent", 0),
        (32, 4096, None, 0),
        (32, 4096, 100, 100),
    ],
)
def test_window_of_files_that_do_not_say(
    tmp_path: Path, layers: int, ctx: int, window: Any, expected: int
) -> None:
    path = write_tiny_phi3(
        tmp_path / "tiny.gguf", layers=layers, ctx=ctx, window=window, heads=1, kv_heads=1, ffn=32
    )
    assert Oracle(path).sliding_window == expected


def test_query_tile_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(write_tiny_phi3(tmp_path / "tiny.gguf", window=37))
    ids = np.random.default_rng(0).integers(0, 320, 300).tolist()
    expected = oracle.logits(ids)
    monkeypatch.setattr("oracle.QUERY_TILE", 10)
    np.testing.assert_allclose(oracle.logits(ids), expected, rtol=0, atol=1e-3)
