"""Bugs that users of other engines met with this family: docs/bugs-we-do-not-have.md, row by row."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import PHI3_2024_04, PHI4, PHI4_MINI
from gguf_files import tiny_phi3_metadata, tiny_tensors, write_tiny
from goldens import CASES, golden
from models import write_tiny_phi3
from numpy.typing import NDArray
from oracle import Oracle
from test_chat import MESSAGES, template
from vocabularies import (
    AB,
    CONTROL,
    EXTRA,
    NORMAL,
    SPACE,
    SPACE_AB,
    USER_DEFINED,
    A,
    B,
    bpe_metadata,
    spm_metadata,
)

import phi3c
from phi3c.chat import ChatTemplate
from phi3c.config import Config
from phi3c.errors import ContextLengthError, UnsupportedModelError
from phi3c.gguf import GGMLType, GGUFFile, n_bytes, write_gguf
from phi3c.tokenizer import TextStream, Tokenizer

F32 = NDArray[np.float32]
ERROR = 2e-3  # of logits in float weights: keys and values are in half precision


def ids(n: int, seed: int = 0) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, 256, n).tolist()
    return drawn


def logits(path: Path, tokens: Sequence[int], **options: Any) -> F32:
    with phi3c.Model(path, **options) as model:
        return model.logits(tokens)


def error(actual: F32, expected: F32) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def seen(path: Path, tokens: Sequence[int], positions: Iterable[int]) -> list[bool]:
    """Which of `positions` have a say in the last row of logits: a change there changes a bit here."""
    with phi3c.Model(path) as model:
        expected = model.logits(tokens)[-1]
        found = []
        for position in positions:
            changed = list(tokens)
            changed[position] = (changed[position] + 1) % 256
            found.append(not np.array_equal(model.logits(changed)[-1], expected))
    return found


def metadata_of(path: Path) -> dict[str, Any]:
    with GGUFFile(path) as file:
        return dict(file.metadata)


def config_of(tmp_path: Path, **keys: Any) -> Config:
    metadata = tiny_phi3_metadata(**{f"phi3.{key}": value for key, value in keys.items()})
    with GGUFFile(write_tiny(tmp_path / "model.gguf", metadata, tiny_tensors(metadata))) as file:
        return Config.from_gguf(file)


# --- the page itself ---


def rows_of_the_page(checkout: Path) -> dict[int, str]:
    """Row number -> its line."""
    page = (checkout / "docs/bugs-we-do-not-have.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (\d+) \|.*$", page, re.MULTILINE)
    whole = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    return dict(zip(map(int, lines), whole, strict=True))


def test_the_page_has_every_row(checkout: Path) -> None:
    assert list(rows_of_the_page(checkout)) == list(range(1, 47))


def test_every_row_names_tests_that_exist_and_bear_its_number(checkout: Path) -> None:
    here = set(re.findall(r"^def (test_row_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    named: set[str] = set()
    for row, line in rows_of_the_page(checkout).items():
        tests = set(re.findall(r"`(test_row_\w+)`", line))
        assert tests, f"row {row} names no test"
        assert all(test.startswith(f"test_row_{row:02}_") for test in tests), (row, tests)
        named |= tests
    assert named == here


# --- 1 to 10, 46: the sliding window ---


def test_row_01_the_window_hides_what_lies_2047_tokens_back(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", layers=1, window=2047, ctx=4096, heads=1, kv_heads=1)
    last = 2300
    assert seen(path, ids(last + 1), [0, last - 2047, last - 2046, last]) == [False, False, True, True]


def test_row_02_a_file_without_the_window_key_loads(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window="absent")
    assert "phi3.attention.sliding_window" not in metadata_of(path)
    assert seen(path, ids(100), [0]) == [True]


@pytest.mark.parametrize("layers", [32, 40])
def test_row_03_the_default_for_4k_models_is_reached(tmp_path: Path, layers: int) -> None:
    geometry: dict[str, Any] = {"layers": layers, "ctx": 4096, "heads": 1, "kv_heads": 1, "ffn": 32}
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window="absent", **geometry)
    with phi3c.Model(path) as model:
        assert model.config.sliding_window == 2047
        assert len(model.generate(ids(5), max_tokens=1, temperature=0).token_ids) <= 1


def test_row_04_a_window_of_0_and_one_beyond_the_context_are_none(tmp_path: Path) -> None:
    files = [write_tiny_phi3(tmp_path / f"{w}.gguf", window=w, ctx=128) for w in (None, 128, 262144)]
    off, *beyond = (logits(path, ids(128)) for path in files)
    for same in beyond:
        np.testing.assert_array_equal(same, off)


def test_row_05_every_layer_has_the_window(tmp_path: Path) -> None:
    # Three layers of 10 keys each reach 27 tokens back; a layer without a window would reach all.
    path = write_tiny_phi3(tmp_path / "tiny.gguf", layers=3, window=10)
    assert seen(path, ids(100), [99 - 28, 99 - 27, 99 - 9]) == [False, True, True]


def test_row_05_phi_4_has_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"context_length": 16384, "attention.sliding_window": 0})
    assert config.sliding_window is None


def test_row_06_the_golden_figures_have_a_window_and_the_right_one(tmp_path: Path) -> None:
    (prompt,) = golden("window of 20").prompts
    path, tokens = CASES["window of 20"].write(tmp_path / "tiny.gguf"), prompt.ids.tolist()
    oracle = Oracle(path)
    assert error(oracle.logits(tokens)[prompt.rows], prompt.logits) < 1e-4
    for window in (0, 19, 21):
        oracle.sliding_window = window
        assert error(oracle.logits(tokens)[prompt.rows], prompt.logits) > 1e-2


@pytest.mark.parametrize("window", [1, 20, 63, 64, 65])
def test_row_07_a_query_sees_exactly_so_many_keys(tmp_path: Path, window: int) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", layers=1, window=window)
    assert seen(path, ids(90), range(90)) == [False] * (90 - window) + [True] * window


def test_row_08_rotation_is_exact_at_the_4096th_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", layers=1, heads=1, kv_heads=1, window=100, ctx=4096)
    tokens, late = ids(4096), slice(3900, None)
    oracle = Oracle(path)
    expected = oracle.logits(tokens)[late]
    assert error(logits(path, tokens)[late], expected) < ERROR

    exact = oracle._rope
    coarse = np.arange(4096) // 16 * 16  # bfloat16's steps from 2048 on

    def coarsely(x: F32) -> F32:
        return exact(x)[:, coarse]

    monkeypatch.setattr(oracle, "_rope", coarsely)
    assert error(oracle.logits(tokens)[late], expected) > 10 * ERROR


def test_row_08_decoding_one_token_applies_the_window(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=20)
    unlimited = write_tiny_phi3(tmp_path / "unlimited.gguf")
    tokens = ids(100)
    one_by_one = logits(path, tokens, n_batch=1)
    np.testing.assert_array_equal(one_by_one, logits(path, tokens))
    assert error(one_by_one[30:], logits(unlimited, tokens)[30:]) > 10 * ERROR


def test_row_09_pages_that_left_the_window_are_dropped_and_nothing_changes(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=20, ctx=1024)
    with phi3c.Model(path, n_batch=32) as model:
        stream = model.generate(ids(700), max_tokens=200, temperature=0, stream=True)
        tokens = [chunk.token_id for chunk in islice(stream, 20)]
        assert model._engine._parts is not None
        held = sum(model._engine._parts[1]._holders.values())
        assert held <= 2  # of 64 positions each
        assert len(tokens) == 20
        rows = model.logits([*ids(700), *tokens])[699:-1]
    np.testing.assert_array_equal(rows.argmax(axis=1), tokens)


def test_row_10_positions_are_a_sequence_s_own(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=30)
    prompts = [ids(n, seed=n) for n in (5, 29, 31, 100)]
    with phi3c.Model(path) as model:
        alone = [model.generate(prompt, max_tokens=12, seed=1).token_ids for prompt in prompts]
        streams = [model.generate(prompt, max_tokens=12, seed=1, stream=True) for prompt in prompts]
        for _ in range(6):
            for stream in streams:
                next(stream, None)
        assert [stream.result().token_ids for stream in streams] == alone


def test_row_46_a_window_longer_than_the_context_is_off(tmp_path: Path) -> None:
    keys = {"context_length": 16384, "attention.sliding_window": 131072, "rope.freq_base": 250000.0}
    assert config_of(tmp_path, **keys).sliding_window is None


# --- 11 to 16: long contexts ---


def golden_error(path: Path, name: str, prompt: int, **options: Any) -> float:
    """Of phi3c's logits against those of transformers, for a prompt of a case of tests/goldens.py."""
    expected = golden(name).prompts[prompt]
    return error(logits(path, expected.ids.tolist(), **options)[expected.rows], expected.logits)


def test_row_11_a_file_with_both_sets_of_factors_runs(tmp_path: Path) -> None:
    path = CASES["LongRoPE"].write(tmp_path / "tiny.gguf")
    with GGUFFile(path) as file:
        assert {"rope_factors_short.weight", "rope_factors_long.weight"} <= file.tensors.keys()
    for prompt in range(len(CASES["LongRoPE"].prompts)):
        assert golden_error(path, "LongRoPE", prompt) < ERROR
    short, long = 0, 1  # of 64 tokens, the original context, and of 65
    assert golden_error(path, "LongRoPE", short, rope_factors="long") > 10 * ERROR
    assert golden_error(path, "LongRoPE", long, rope_factors="short") > 10 * ERROR


def test_row_12_either_name_of_the_scaling_and_either_vintage_of_factors(tmp_path: Path) -> None:
    for name in ("LongRoPE", "LongRoPE, other factors"):
        path = CASES[name].write(tmp_path / "tiny.gguf")
        with GGUFFile(path) as file:
            tensors = [(name, info.shape, info.type, file.data(name)) for name, info in file.tensors.items()]
            named = dict(file.metadata) | {"phi3.rope.scaling.type": "longrope"}
            write_gguf(tmp_path / "named.gguf", named, tensors)
        assert golden_error(path, name, 1) < ERROR
        np.testing.assert_array_equal(logits(tmp_path / "named.gguf", ids(70)), logits(path, ids(70)))
    assert golden_error(path, "LongRoPE", 1) > 10 * ERROR  # the factors do make a difference


def test_row_13_an_answer_does_not_depend_on_room_beyond_it(tmp_path: Path) -> None:
    path = CASES["LongRoPE"].write(tmp_path / "tiny.gguf")
    answers = []
    for n_ctx in (64, 65, 128, 512):
        with phi3c.Model(path, n_ctx=n_ctx) as model:
            answers.append(model.generate(ids(40), max_tokens=24, seed=1).token_ids)
    assert answers == [answers[0]] * 4


def test_row_14_a_short_prompt_has_the_same_logits_at_any_context(tmp_path: Path) -> None:
    path = CASES["LongRoPE"].write(tmp_path / "tiny.gguf")
    expected = logits(path, ids(64), n_ctx=64)
    for n_ctx in (65, 512):
        np.testing.assert_array_equal(logits(path, ids(64), n_ctx=n_ctx), expected)


def test_row_15_an_answer_may_outgrow_the_original_context(tmp_path: Path) -> None:
    path = CASES["LongRoPE"].write(tmp_path / "tiny.gguf")
    prompt = ids(50)
    with phi3c.Model(path) as model:
        answer = list(model.generate(prompt, max_tokens=40, temperature=0.0).token_ids)
        assert len(answer) == 40
        assert model.generate([*prompt, *answer[:15]], max_tokens=25, temperature=0.0).token_ids == (
            *answer[15:],
        )
    with phi3c.Model(path, rope_factors="short") as model:
        kept_rotation = list(model.generate(prompt, max_tokens=40, temperature=0.0).token_ids)
    assert kept_rotation[:14] == answer[:14]
    assert kept_rotation != answer


def test_row_16_a_long_context_without_factors_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=131072, original_ctx=4096)
    with caplog.at_level(logging.WARNING, "phi3c"), phi3c.Model(path) as model:
        model.generate(ids(5), max_tokens=2)
    (record,) = caplog.records
    assert "rope_factors_long.weight" in record.getMessage()


# --- 17, 33, 35, 37, 38, 40, 41: geometry and rotation ---


def test_row_17_partial_rotation_and_a_tied_output(tmp_path: Path) -> None:
    path = write_tiny_phi3(
        tmp_path / "tiny.gguf",
        heads=3,
        kv_heads=1,
        head_dim=128,
        rope_dims=96,
        tied=True,
        types={"token_embd": "F16"},
    )
    oracle = Oracle(path)
    expected = oracle.logits(ids(60))
    assert error(logits(path, ids(60)), expected) < ERROR
    oracle.n_rot = 128
    assert error(oracle.logits(ids(60)), expected) > 10 * ERROR


@pytest.mark.parametrize(
    ("pre", "capital", "contraction"), [("gpt-4o", [*b"aB"], [260, *b"s"]), ("gpt-2", [259], [*b"a's"])]
)
def test_row_17_the_pre_tokenizer_of_phi_4_mini(pre: str, capital: list[int], contraction: list[int]) -> None:
    # A capital begins a word, and a contraction stays with its own; in GPT-2's pattern neither does.
    metadata = bpe_metadata(("aB", NORMAL), ("a'", NORMAL), pre=pre)
    metadata["tokenizer.ggml.merges"] += ["a B", "a '"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("aB") == capital
    assert tokenizer.encode("a's") == contraction


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 10), (24, 8)])
def test_row_33_heads_share_keys_unevenly_counted(tmp_path: Path, heads: int, kv_heads: int) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=heads, kv_heads=kv_heads, head_dim=16)
    assert error(logits(path, ids(60)), Oracle(path).logits(ids(60))) < ERROR


def test_row_35_rotation_pairs_halves_not_neighbours(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    oracle = Oracle(path)
    expected = oracle.logits(ids(60))
    assert error(logits(path, ids(60)), expected) < ERROR
    oracle.interleaved_rope = True
    assert error(oracle.logits(ids(60)), expected) > 10 * ERROR


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_row_37_layer_by_layer(tmp_path: Path, layers: int) -> None:
    whole = write_tiny_phi3(tmp_path / "whole.gguf", layers=4)
    with GGUFFile(whole) as file:
        metadata = dict(file.metadata) | {"phi3.block_count": layers}
        dropped = tuple(f"blk.{n}." for n in range(layers, 4))
        tensors = [
            (name, info.shape, info.type, file.data(name))
            for name, info in file.tensors.items()
            if not name.startswith(dropped)
        ]
        write_gguf(tmp_path / "first.gguf", metadata, tensors)
    first = tmp_path / "first.gguf"
    assert error(logits(first, ids(60)), Oracle(first).logits(ids(60))) < ERROR


def test_row_38_shared_heads_and_factors_at_once(tmp_path: Path) -> None:
    name = "LongRoPE, 40 over 10"
    path = CASES[name].write(tmp_path / "tiny.gguf")
    for prompt in range(len(CASES[name].prompts)):
        assert golden_error(path, name, prompt) < ERROR


def test_row_40_heads_of_96_in_a_quantised_cache(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=2, kv_heads=2, head_dim=96)
    assert error(logits(path, ids(100), kv_type="q8_0"), Oracle(path).logits(ids(100))) < 0.02


# --- 18, 19, 34, 36, 39, 42: cache and context ---


def test_row_18_pages_used_again_in_another_order_change_nothing(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=1024)
    prompt = ids(200)
    with phi3c.Model(path) as fresh:
        expected = fresh.generate(prompt, max_tokens=20, seed=3).token_ids
    with phi3c.Model(path, n_ctx=256) as model:
        held = [model.generate(ids(150, seed), max_tokens=20, stream=True) for seed in range(1, 4)]
        for stream in held:
            next(stream)
        held[0].cancel()
        held[2].cancel()
        assert held[0].result().finish_reason == held[2].result().finish_reason == "cancelled"
        assert model.generate(prompt, max_tokens=20, seed=3).token_ids == expected


def test_row_19_a_context_of_131072_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=131072)
    with phi3c.Model(path) as model:
        assert (model.info.n_ctx, model.info.n_ctx_train) == (4096, 131072)
    with phi3c.Model(path, n_ctx=131072) as model:
        assert model._engine._parts is not None
        pages = model._engine._parts[1].pages
        assert pages.count == 0
        model.generate(ids(10), max_tokens=2)
        assert pages.count == 1


def test_row_34_a_second_prompt_starts_from_nothing(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    with phi3c.Model(path) as model:
        first = model.generate(ids(124), max_tokens=12, seed=1).token_ids
        second = model.generate(ids(12, seed=1), max_tokens=12, seed=1).token_ids
        assert model.generate(ids(124), max_tokens=12, seed=1).token_ids == first
    with phi3c.Model(path) as model:
        assert model.generate(ids(12, seed=1), max_tokens=12, seed=1).token_ids == second


@pytest.mark.parametrize("window", [None, 50])
def test_row_36_chunks_and_cached_prefixes_give_the_same_logits(tmp_path: Path, window: int | None) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=window, types="Q4_0")
    tokens = ids(200)
    expected = logits(path, tokens)
    for n_batch in (1, 7, 32):
        np.testing.assert_array_equal(logits(path, tokens, n_batch=n_batch), expected)
    with phi3c.Model(path) as model:
        cold = model.generate(tokens, max_tokens=10, seed=2)
        warm = model.generate(tokens, max_tokens=10, seed=2)
    assert (cold.usage.cached_tokens, cold.token_ids) == (0, warm.token_ids)
    assert warm.usage.cached_tokens > 0 or window


def test_row_39_a_quantised_cache_stands_outliers(tmp_path: Path) -> None:
    # One pair of key dimensions ten times the others; queries make up for it, so that scores stay.
    with GGUFFile(write_tiny_phi3(tmp_path / "plain.gguf")) as file:
        tensors: list[Any] = []
        for name, info in file.tensors.items():
            data = file.data(name).view(np.float32).reshape(info.shape[::-1]).copy()
            if name.endswith("attn_qkv.weight"):
                heads = data.reshape(-1, 32, info.columns)  # 4 of q, 2 of k, 2 of v
                heads[0:4, [3, 3 + 16]] /= 10
                heads[4:6, [3, 3 + 16]] *= 10
            tensors.append((name, info.shape, info.type, data.view(np.uint8).reshape(-1)))
        path = tmp_path / "outliers.gguf"
        write_gguf(path, dict(file.metadata), tensors)
    expected = Oracle(path).logits(ids(100))
    np.testing.assert_allclose(expected, Oracle(tmp_path / "plain.gguf").logits(ids(100)), rtol=0, atol=1e-2)
    # If the pair's largest set the scale, 13 / 127 of the others' deviation, they would gain noise of 3 %,
    # and two layers of it make 6 % of a logit. H spreads the pair over 32 sums; the largest is about 4.5
    # and the noise 1 %: 2 % of a logit. Gibberish would be 100 %.
    assert error(logits(path, ids(100), kv_type="q8_0"), expected) < 0.04


def test_row_42_what_does_not_fit_the_context_is_refused_with_figures(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    with phi3c.Model(path, n_ctx=100) as model:
        with pytest.raises(ContextLengthError, match=r"101 tokens.* context of 100"):
            model.generate(ids(101))
        with pytest.raises(ContextLengthError, match="90 tokens and max_tokens 20"):
            model.generate(ids(90), max_tokens=20)
        answer = model.generate(ids(90), temperature=0)  # no max_tokens: up to the end of the context
    assert answer.finish_reason == "stop" or answer.stop_detail == "context"


# --- 43, 44: look-alikes ---


def test_row_43_phi_3_small_is_refused(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata()
    bias = (128,), GGMLType.F32, bytes(n_bytes((128,), GGMLType.F32))
    path = write_tiny(
        tmp_path / "small.gguf", metadata, tiny_tensors(metadata) | {"blk.0.attn_qkv.bias": bias}
    )
    with pytest.raises(UnsupportedModelError, match=r"attn_qkv\.bias is a bias"):
        phi3c.Model(path)


def test_row_44_phi_moe_is_refused(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata()
    tensors = tiny_tensors(metadata)
    path = write_tiny(tmp_path / "moe.gguf", metadata | {"general.architecture": "phimoe"}, tensors)
    with pytest.raises(UnsupportedModelError, match=r"mixtures? of experts"):
        phi3c.Model(path)


# --- 20, 21, 31: where an answer ends ---


def test_row_20_an_answer_ends_at_end_of_turn_and_does_not_show_it(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    metadata = metadata_of(path)
    end = metadata["tokenizer.ggml.tokens"].index("<|end|>")
    assert metadata["tokenizer.ggml.eos_token_id"] != end
    answers = []
    with phi3c.Model(path) as model:
        for seed in range(20):
            # Nearly uniform over 320 tokens, three of which end the answer.
            answers.append(model.generate(ids(5), max_tokens=200, temperature=20.0, seed=seed))
    assert "eog:<|end|>" in {answer.stop_detail for answer in answers}
    for answer in answers:
        assert end not in answer.token_ids
        assert "<|end|>" not in answer.text


def test_row_21_stop_tokens_are_a_union(tmp_path: Path) -> None:
    metadata = bpe_metadata(
        ("<|endoftext|>", CONTROL), ("<|end|>", CONTROL), ("<eot>", CONTROL), ("<eom>", CONTROL)
    )
    keys = {
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 261,
        "tokenizer.ggml.eom_token_id": 262,
    }
    assert Tokenizer.from_gguf(metadata | keys).stop_ids == {0, 259, 260, 261, 262}


def test_row_31_phi_4_ends_at_either_token() -> None:
    metadata = bpe_metadata(("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL))
    for eos in (259, 260):  # the first files named one, the repaired ones the other
        tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.eos_token_id": eos})
        assert tokenizer.stop_ids == {259, 260}
        assert tokenizer.decode([0x61, 260]) == Tokenizer.from_gguf(metadata).decode([0x61])
    assert template(PHI4).render(MESSAGES[1:2]).endswith("<|im_start|>assistant<|im_sep|>")


# --- 22 to 28, 41, 45: tokenizers ---

PHI3_SPECIALS = (
    ("<|endoftext|>", CONTROL),
    ("<|user|>", USER_DEFINED),
    ("<|end|>", USER_DEFINED),
    ("\n", NORMAL),
)
EOT, USER, END, NEWLINE = range(EXTRA, EXTRA + 4)


def phi3_like() -> Tokenizer:
    """SPM: bytes, pieces of a and b, `<|endoftext|>`, `<|user|>`, `<|end|>`, a newline."""
    return Tokenizer.from_gguf(spm_metadata(*PHI3_SPECIALS))


def test_row_22_of_duplicate_tokens_the_lowest_id_counts() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(*PHI3_SPECIALS, ("<|user|>", USER_DEFINED), ("ab", NORMAL)))
    assert tokenizer.encode("<|user|>ab", add_bos=False, parse_special=True) == [USER, SPACE_AB]
    assert tokenizer.special_tokens["<|user|>"] == USER


def test_row_23_white_space_after_role_tokens_is_swallowed() -> None:
    tokenizer = phi3_like()
    assert tokenizer.encode("<|user|>\nab<|end|>\n", add_bos=False, parse_special=True) == [
        USER,
        SPACE_AB,
        END,
    ]
    assert tokenizer.encode("<|endoftext|>\n", add_bos=False, parse_special=True) == [EOT, SPACE, NEWLINE]


@pytest.mark.parametrize("prefix", [True, False])
def test_row_24_the_space_before_text_is_as_the_file_says(prefix: bool) -> None:
    metadata = spm_metadata(*PHI3_SPECIALS) | {"tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = Tokenizer.from_gguf(metadata)
    expected = [SPACE_AB, EOT, SPACE_AB] if prefix else [AB, EOT, AB]
    assert tokenizer.encode("ab<|endoftext|>ab", add_bos=False, parse_special=True) == expected


def test_row_25_encoding_what_was_decoded_adds_no_space() -> None:
    tokenizer, text = phi3_like(), "ab  a b"
    tokens = tokenizer.encode(text, add_bos=False)
    for _ in range(3):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.encode(tokenizer.decode(tokens), add_bos=False) == tokens


def test_row_26_a_phi3_vocabulary_without_endoftext_loads() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(("<|user|>", CONTROL), ("<|end|>", CONTROL)))
    ids = tokenizer.encode("<|user|>\nab<|end|>", add_bos=False, parse_special=True)
    assert tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize(
    "text", ["Can you provide ways?", "naïve ½ \u2013 “ok”", "🦙 llama", "日本語 と 漢字", " \t\n a"]
)
@pytest.mark.parametrize("make", [spm_metadata, bpe_metadata])
def test_row_27_prose_emoji_and_cjk_come_back(make: Any, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(make())
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_row_28_decoding_token_by_token_loses_no_space() -> None:
    tokenizer = phi3_like()
    tokens = tokenizer.encode("ab ab a", add_bos=False)
    stream = TextStream(tokenizer, strip_space=True)
    assert "".join([*map(stream.push, tokens), stream.flush()]) == "ab ab a"
    assert tokenizer.encode("<|user|>\n\n ab", add_bos=False, parse_special=True) == [USER, SPACE_AB]


def test_row_41_merges_go_by_score_not_by_length() -> None:
    # "bab" by length first is "ba" + "b"; the better score is "ab".
    metadata = spm_metadata(("ba", NORMAL), ("abb", NORMAL))
    scores = np.array(metadata["tokenizer.ggml.scores"])
    scores[-2:] = -5, -7
    tokenizer = Tokenizer.from_gguf(
        metadata | {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": False}
    )
    assert tokenizer.encode("bab", add_bos=False) == [B, AB]


def test_row_41_thunderstorm(shared: Path) -> None:
    tokenizer = Tokenizer.from_gguf(metadata_of(shared / "vocab/ggml-vocab-phi-3.gguf"))
    pieces = [tokenizer.token_text(id) for id in tokenizer.encode("thunderstorm", add_bos=False)]
    assert pieces == ["▁th", "under", "st", "orm"]


def test_row_45_runs_of_spaces_and_special_tokens_can_be_decoded() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata(("▁▁", NORMAL), ("▁▁▁▁", NORMAL), ("<|end|>", CONTROL)))
    assert tokenizer.decode([A, EXTRA, B, EXTRA + 1, A]) == "a  b    a"
    assert tokenizer.decode([A, EXTRA + 2], skip_special=False) == "a<|end|>"
    assert tokenizer.decode([A, EXTRA + 2]) == "a"


# --- 29, 30, 32: chat templates ---


def test_row_29_a_system_message_the_template_drops_is_folded_in() -> None:
    rendered = template(PHI3_2024_04).render(MESSAGES[:2])
    assert rendered == "<s><|user|>\nS\nU1<|end|>\n<|assistant|>\n"


def test_row_30_one_begin_token_whoever_prints_it() -> None:
    metadata = spm_metadata(*PHI3_SPECIALS)
    with_bos, without = (
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_bos_token": flag}) for flag in (True, False)
    )
    prints, silent = template(PHI3_2024_04), template(PHI4)
    assert with_bos.encode_segments(prints.segments(MESSAGES[1:2])).count(1) == 1
    assert with_bos.encode_segments(silent.segments(MESSAGES[1:2])).count(1) == 1
    assert without.encode_segments(silent.segments(MESSAGES[1:2])).count(1) == 0


def test_row_32_tools_reach_the_template_of_phi_4_mini() -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    chat = ChatTemplate(
        PHI4_MINI,
        bos_token="",
        eos_token="<|endoftext|>",
        special_tokens=["<|system|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"],
    )
    for messages in (MESSAGES, MESSAGES[1:]):  # with a system message to put them in, and without
        listed = re.search(
            r"^<\|system\|>.*<\|tool\|>(.*)<\|/tool\|><\|end\|>", chat.render(messages, tools=[tool])
        )
        assert listed
        assert json.loads(listed[1])[0]["name"] == "get_weather"
