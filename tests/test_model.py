"""Model against the oracle, against golden figures, and against itself: the same bits however work is cut."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import FLOAT_TYPES, LAYOUTS, TYPES_OF_32
from models import Types, fuse_llama_to_phi3, store_as, write_tiny_llama, write_tiny_phi3
from numpy.typing import NDArray
from oracle import Oracle, compare, load_oracle, log_softmax

import phi3c
from phi3c import hub
from phi3c._kernels import available_isas
from phi3c.cache import KV_TYPES
from phi3c.gguf import GGMLType

F32 = NDArray[np.float32]

# Relative error of logits (Frobenius) when all weights are floats: keys and values in half precision leave
# 1e-3 at most after two layers, sums in another order 1e-5.
FLOAT_ERROR = 2e-3

# The same for quantised weights, whose activations are rounded to int8. A step is the largest of 32 values,
# about 2.1 standard deviations (up to twice that where the power-of-two refinement just misses), over 127:
# each product gains noise of about 0.7 %. Nine products feed the logits of two layers, and attention sharpens
# the noise of scores: simulated in NumPy, 2.4 to 3.2 % untied and 3.8 % tied.
INT8_ERROR = 0.05

# With logits spread by 3, that noise moves the difference of two logits by 0.13 (standard deviation); a
# margin of five times that does not flip.
DECIDED_MARGIN = 0.7

PAGE = 64  # positions per KV page


def random_ids(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 320, n).tolist()
    return ids


def logits_of(path: Path, ids: list[int], *, n_threads: int | None = None, n_batch: int = 512) -> F32:
    with phi3c.Model(path, n_threads=n_threads, n_batch=n_batch) as model:
        return model.logits(ids)


def relative_error(actual: F32, expected: F32) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def margins(logits: F32) -> F32:
    """Distance from the best logit to the second best, per row."""
    two_best = np.sort(logits, axis=1)[:, -2:]
    return two_best[:, 1] - two_best[:, 0]


def assert_close_for_int8(actual: F32, expected: F32) -> None:
    assert relative_error(actual, expected) < INT8_ERROR
    decided = margins(expected) > DECIDED_MARGIN
    assert decided.mean() > 0.3  # else the next line says nothing
    assert (actual.argmax(axis=1) == expected.argmax(axis=1))[decided].all()


# --- every type, every geometry: against the oracle ---


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_type(tmp_path: Path, type_name: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, ffn=512, types=type_name)
    ids = random_ids(100)
    actual, expected = logits_of(path, ids), Oracle(path).logits(ids)
    if type_name in FLOAT_TYPES:
        assert relative_error(actual, expected) < FLOAT_ERROR
    else:
        assert_close_for_int8(actual, expected)


@pytest.mark.parametrize("type_name", ["F16", "BF16", *TYPES_OF_32])
def test_rows_that_end_inside_a_super_block(tmp_path: Path, type_name: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=6, kv_heads=3, head_dim=48, ffn=352, types=type_name)
    ids = random_ids(60)
    actual, expected = logits_of(path, ids), Oracle(path).logits(ids)
    if type_name in FLOAT_TYPES:
        assert relative_error(actual, expected) < FLOAT_ERROR
    else:
        assert_close_for_int8(actual, expected)


def test_mixed_types_of_q4_k_m(tmp_path: Path) -> None:
    types = {
        "token_embd": "Q4_K",
        "attn_qkv": "Q5_K",
        "attn_output": "Q4_K",
        "ffn_up": "Q4_K",
        "blk.0.ffn_down": "Q6_K",
        "blk.1.ffn_down": "Q4_K",
        "output": "Q6_K",
    }
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, ffn=512, types=types)
    ids = random_ids(100)
    assert_close_for_int8(logits_of(path, ids), Oracle(path).logits(ids))


def test_mixed_types_of_iq4_xs(tmp_path: Path) -> None:
    # rows of 288 are no whole blocks of IQ4_XS, whose place IQ4_NL takes
    types = {
        "token_embd": "IQ4_NL",
        "attn_qkv": "IQ4_NL",
        "attn_output": "IQ4_NL",
        "ffn_up": "IQ4_NL",
        "blk.0.ffn_down": "Q5_K",
        "blk.1.ffn_down": "IQ4_XS",
        "output": "Q8_0",
    }
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=6, head_dim=48, ffn=512, types=types)
    ids = random_ids(100)
    assert_close_for_int8(logits_of(path, ids), Oracle(path).logits(ids))


def test_llama_parts_of_different_types(tmp_path: Path) -> None:
    types = {
        "token_embd": "Q8_0",
        "attn_q": "Q4_K",
        "attn_k": "Q6_K",
        "attn_v": "Q8_0",
        "attn_output": "Q5_1",
        "ffn_gate": "Q5_K",
        "ffn_up": "Q4_0",
        "ffn_down": "Q3_K",
        "output": "Q6_K",
    }
    path = write_tiny_llama(tmp_path / "tiny.gguf", head_dim=64, ffn=512, types=types)
    ids = random_ids(100)
    assert_close_for_int8(logits_of(path, ids), Oracle(path).logits(ids))


REFUSED = [
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "Q1_0", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64",
]  # fmt: skip


def test_every_type_either_runs_or_is_refused() -> None:
    assert {type.name for type in GGMLType} == {*LAYOUTS, *REFUSED}


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.attn_qkv.weight"])
@pytest.mark.parametrize("type_name", REFUSED)
def test_other_types_are_refused_by_name(tmp_path: Path, type_name: str, tensor: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64)
    other = store_as(path, tmp_path / "other.gguf", tensor, type_name)
    message = f"other.gguf: tensor {tensor} is stored as {type_name}, .*another quantisation.*IQ4_XS"
    with pytest.raises(phi3c.UnsupportedQuantError, match=message) as caught:
        phi3c.Model(other)
    assert (caught.value.tensor, caught.value.type) == (tensor, type_name)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "one kv head": {"heads": 4, "kv_heads": 1},
    "a kv head each": {"heads": 4, "kv_heads": 4},
    "groups of three": {"heads": 6, "kv_heads": 2},
    "head of 16": {"heads": 4, "kv_heads": 2, "head_dim": 16},
    "head of 96": {"heads": 2, "kv_heads": 2, "head_dim": 96},
    "head of 128, 96 rotated": {"heads": 3, "kv_heads": 1, "head_dim": 128, "rope_dims": 96},
    "half rotated": {"rope_dims": 16},
    "tied": {"tied": True},
    "vocabulary not a multiple of 16": {"vocab": 323},
    "one layer": {"layers": 1},
}


@pytest.mark.parametrize("write", [write_tiny_phi3, write_tiny_llama])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_geometry(tmp_path: Path, write: Any, geometry: dict[str, Any]) -> None:
    path = write(tmp_path / "tiny.gguf", **geometry)
    ids = random_ids(100)
    assert relative_error(logits_of(path, ids), Oracle(path).logits(ids)) < FLOAT_ERROR


def test_q8_0_cache_is_half_as_large_and_nearly_as_exact(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=2, kv_heads=2, head_dim=96)
    ids = random_ids(100)
    with phi3c.Model(path, kv_type="q8_0") as model:
        # two layers, two heads, keys and values: 96 values of 8 bits and 3 halves
        assert model.info.kv_bytes_per_token == 2 * 2 * 2 * (96 + 3 * 2)
        logits = model.logits(ids)
    expected = Oracle(path).logits(ids)
    assert relative_error(logits, expected) < INT8_ERROR
    assert relative_error(logits, expected) > relative_error(logits_of(path, ids), expected)  # it is in use


def test_kv_types_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=48)
    with pytest.raises(phi3c.InvalidParameterError, match=r"'q4_0'.*f16, q8_0"):
        phi3c.Model(path, kv_type="q4_0")
    with pytest.raises(phi3c.InvalidParameterError, match="heads have 48"):
        phi3c.Model(path, kv_type="q8_0")


def test_tied_quantised_embedding_is_read_both_ways(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, tied=True, types={"token_embd": "Q6_K"})
    ids = random_ids(100)
    assert_close_for_int8(logits_of(path, ids), Oracle(path).logits(ids))


# --- the sliding window ---


@pytest.mark.parametrize("n_batch", [512, 7, 1])
@pytest.mark.parametrize("window", [1, 20, PAGE - 1, PAGE, PAGE + 1, 100])
def test_sliding_window(tmp_path: Path, window: int, n_batch: int) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=window)
    ids = random_ids(200)
    expected = Oracle(path).logits(ids)
    # One key more or less is an error this test can see.
    assert relative_error(Oracle(path, sliding_window=window + 1).logits(ids), expected) > 5 * FLOAT_ERROR
    assert relative_error(logits_of(path, ids, n_batch=n_batch), expected) < FLOAT_ERROR


@pytest.mark.parametrize("n_batch", [512, 1], ids=["prefill", "one by one"])
@pytest.mark.parametrize("window", [1, PAGE - 1, PAGE, PAGE + 1, 2047, 2048])
def test_a_query_sees_as_many_keys_as_the_window_has(tmp_path: Path, window: int, n_batch: int) -> None:
    """With one layer, logits depend on the last `window` tokens, the query's own among them, and no other."""
    path = write_tiny_phi3(tmp_path / "tiny.gguf", layers=1, window=window, ctx=4096)
    n = window + 70  # the first keys that are out of sight, and the last query, in several pages
    ids = random_ids(n)
    with phi3c.Model(path, n_batch=n_batch) as model:
        expected = model.logits(ids)
        for position in (3, 66):  # the second one's window ends within another page than it begins
            changed = [*ids[:position], (ids[position] + 1) % 320, *ids[position + 1 :]]
            same = (model.logits(changed) == expected).all(axis=1)
            assert np.flatnonzero(~same).tolist() == list(range(position, min(position + window, n)))


def test_decoding_moves_the_window(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=20)
    oracle = Oracle(path)
    prompt = random_ids(50)
    with phi3c.Model(path) as model:
        generated = model.generate(prompt, max_tokens=100, temperature=0.0).token_ids
        rows = model.logits([*prompt, *generated])[len(prompt) - 1 : -1]
    assert list(generated) == rows.argmax(axis=1).tolist()
    expected = oracle.logits([*prompt, *generated])[len(prompt) - 1 : -1]
    assert len(generated) > PAGE  # from one page over a boundary
    decided = margins(expected) > 0.1
    assert (expected.argmax(axis=1) == generated)[decided].all()


def test_default_window_of_phi3_4k_files_without_the_key(tmp_path: Path) -> None:
    path = write_tiny_phi3(
        tmp_path / "tiny.gguf", layers=32, ctx=4096, window="absent", heads=1, kv_heads=1, head_dim=32, ffn=64
    )
    ids = random_ids(2100)
    beyond = slice(2047, None)
    actual, expected = logits_of(path, ids)[beyond], Oracle(path).logits(ids)[beyond]
    unlimited = Oracle(path, sliding_window=0).logits(ids)[beyond]
    assert relative_error(unlimited, expected) > 10 * FLOAT_ERROR
    assert relative_error(actual, expected) < 4 * FLOAT_ERROR  # 32 layers instead of 2


# --- a real model: golden figures ---


@pytest.fixture(scope="module")
def real_path(shared: Path) -> Path:
    return shared / "models/smollm2-135m-phi3-q4_k_m.gguf"


@pytest.fixture(scope="module")
def real(real_path: Path) -> Iterator[phi3c.Model]:
    with phi3c.Model(real_path) as model:
        yield model


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    text = (shared / "golden/smollm2-135m-phi3-q4_k_m.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


UNDECIDED = 0.3  # margin in nats below which the golden greedy id may flip


@pytest.mark.parametrize("case", range(6))
def test_golden_greedy_ids(real: phi3c.Model, golden: dict[str, Any], case: int) -> None:
    expected = golden["cases"][case]
    prompt, greedy = expected["prompt_ids"], expected["greedy_ids"]
    # Fed with the golden ids, so that one toss-up does not change all that follows.
    after_prompt = real.logits([*prompt, *greedy[:-1]])[len(prompt) - 1 :]
    decided = np.array(expected["greedy_margin"]) > UNDECIDED
    assert (after_prompt.argmax(axis=1) == greedy)[decided].all()


@pytest.mark.parametrize("case", range(6))
def test_golden_log_probabilities(real: phi3c.Model, golden: dict[str, Any], case: int) -> None:
    expected = golden["cases"][case]
    prompt = expected["prompt_ids"]
    log_probs = log_softmax(real.logits(prompt))
    of_top10 = np.abs(log_probs[-1, expected["top10_ids"]] - expected["top10_logprobs"])
    assert of_top10.max() <= 0.25
    of_prompt = np.abs(log_probs[np.arange(len(prompt) - 1), prompt[1:]] - expected["prompt_logprobs"])
    assert of_prompt.max() <= 0.25


@pytest.mark.parametrize("case", range(6))
def test_golden_greedy_generation(real: phi3c.Model, golden: dict[str, Any], case: int) -> None:
    expected = golden["cases"][case]
    decided = np.array(expected["greedy_margin"]) > UNDECIDED
    n = len(decided) if decided.all() else int(decided.argmin())  # up to the first toss-up
    generated = real.generate(expected["prompt_ids"], max_tokens=max(n, 1), temperature=0.0).token_ids
    if n == 0:  # the very first token is a toss-up between two
        assert generated[0] in expected["top10_ids"][:2]
        return
    assert list(generated) == expected["greedy_ids"][: len(generated)]
    assert len(generated) >= n - 1  # a stop token may be left out


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_accuracy_on_text(kv_type: str, real_path: Path, golden: dict[str, Any], shared: Path) -> None:
    text = (shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8")
    with phi3c.Model(real_path, kv_type=kv_type) as model:
        ids = model.tokenize(text, add_bos=False)
        assert len(ids) == golden["perplexity"]["tokens"]
        accuracy = compare(load_oracle(real_path).logits, model.logits, ids, golden["perplexity"]["context"])
    assert accuracy.perplexity == pytest.approx(golden["perplexity"]["value"], rel=0.01)
    assert accuracy.mean_kl <= 0.0045


# --- the same bits ---


@pytest.fixture(scope="module")
def demo() -> Path:
    return hub.demo()


DEMO_IDS = random_ids(150, seed=1)  # three pages


@pytest.fixture(scope="module")
def demo_logits(demo: Path) -> F32:
    return logits_of(demo, DEMO_IDS)


def test_fused_twin_of_the_demo_gives_the_same_bits(demo: Path, demo_logits: F32, tmp_path: Path) -> None:
    twin = fuse_llama_to_phi3(demo, tmp_path / "twin.gguf")
    np.testing.assert_array_equal(logits_of(twin, DEMO_IDS), demo_logits)


@pytest.mark.parametrize("types", ["F32", "F16", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("rope_dims", [64, 32])
def test_small_fused_twin_gives_the_same_bits(tmp_path: Path, types: Types, rope_dims: int) -> None:
    llama = write_tiny_llama(tmp_path / "llama.gguf", head_dim=64, rope_dims=rope_dims, types=types)
    twin = fuse_llama_to_phi3(llama, tmp_path / "twin.gguf")
    np.testing.assert_array_equal(logits_of(twin, random_ids(70)), logits_of(llama, random_ids(70)))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_give_the_same_bits(demo: Path, demo_logits: F32, n_threads: int) -> None:
    np.testing.assert_array_equal(logits_of(demo, DEMO_IDS, n_threads=n_threads), demo_logits)


@pytest.mark.parametrize("n_batch", [1, 7, 64, 512])
def test_prefill_chunks_give_the_same_bits(demo: Path, demo_logits: F32, n_batch: int) -> None:
    np.testing.assert_array_equal(logits_of(demo, DEMO_IDS, n_batch=n_batch), demo_logits)


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_chunks_and_threads_give_the_same_bits_for_every_type(tmp_path: Path, type_name: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, ffn=512, window=50, types=type_name)
    ids = random_ids(140)
    expected = logits_of(path, ids, n_threads=1)
    for n_threads, n_batch in [(2, 1), (3, 7), (2, 64)]:
        actual = logits_of(path, ids, n_threads=n_threads, n_batch=n_batch)
        np.testing.assert_array_equal(actual, expected)


def test_earlier_requests_leave_no_trace(demo: Path, demo_logits: F32) -> None:
    with phi3c.Model(demo) as model:
        model.generate(DEMO_IDS[:70], max_tokens=3, temperature=0.0)
        np.testing.assert_array_equal(model.logits(DEMO_IDS[:90]), demo_logits[:90])
        np.testing.assert_array_equal(model.logits(DEMO_IDS), demo_logits)


HASH_LOGITS = """
import hashlib, json, sys, phi3c
for path, ids in json.load(sys.stdin):
    with phi3c.Model(path) as model:
        print(hashlib.sha256(model.logits(ids).tobytes()).hexdigest())
"""


def test_instruction_sets_give_the_same_bits(demo: Path, demo_logits: F32, tmp_path: Path) -> None:
    jobs = [(str(demo), DEMO_IDS[:10])]
    for type_name in LAYOUTS:
        path = write_tiny_phi3(tmp_path / f"{type_name}.gguf", head_dim=64, window=50, types=type_name)
        jobs.append((str(path), random_ids(70)))
    factors = np.linspace(1, 1.1, 16, dtype=np.float32), np.linspace(1, 30, 16, dtype=np.float32)
    longrope = write_tiny_phi3(tmp_path / "longrope.gguf", factors=factors, original_ctx=64)
    jobs += [(str(longrope), random_ids(n)) for n in (64, 65)]
    hashes = {}
    for isa in available_isas():
        result = subprocess.run(
            [sys.executable, "-c", HASH_LOGITS],
            input=json.dumps(jobs),
            env={**os.environ, "PHI3C_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        hashes[isa] = result.stdout.split()
    assert hashes["scalar"][0] == hashlib.sha256(demo_logits[:10].tobytes()).hexdigest()
    for isa, values in hashes.items():
        assert values == hashes["scalar"], isa


# --- memory ---


def test_a_context_beyond_the_machine_s_memory_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two layers, two heads, keys and values: 32 halves, or 32 bytes and a scale
    path, per_token = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=2**20), {"f16": 512, "q8_0": 272}
    with phi3c.Model(path) as model:
        weights = model.info.weight_bytes
        assert model.info.n_ctx == 4096
    for kv_type, n_bytes in per_token.items():
        monkeypatch.setattr("phi3c.model.total_memory", lambda n_bytes=n_bytes: weights + 100_000 * n_bytes)
        phi3c.Model(path, n_ctx=100_000, kv_type=kv_type).close()
        with pytest.raises(phi3c.OutOfMemoryError) as caught:
            phi3c.Model(path, n_ctx=1_000_000, kv_type=kv_type)
        message = str(caught.value)
        assert f"takes {n_bytes / 1e3:.1f} GB ({n_bytes} bytes a token as {kv_type})" in message
        assert "n_ctx up to 100000 fits" in message
        assert (f"with kv_type q8_0 up to {100_000 * 512 // 272}" in message) == (kv_type == "f16")
    monkeypatch.setattr("phi3c.model.total_memory", lambda: None)
    phi3c.Model(path, n_ctx=2**20).close()


def test_memory_is_taken_as_the_context_fills(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=2**20)
    with phi3c.Model(path, n_ctx=2**20) as model:
        model.logits(random_ids(150))
        parts = model._engine._parts
        assert parts is not None
        assert parts[1].pages.count == -(-150 // PAGE)


# --- a model in use ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phi3c.Model]:
    with phi3c.Model(write_tiny_phi3(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), n_batch=16) as model:
        yield model


def test_a_seed_reproduces_and_is_reported(tiny: phi3c.Model) -> None:
    prompt = random_ids(20)

    def sample(seed: int | None) -> phi3c.Completion:
        return tiny.generate(prompt, max_tokens=40, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)

    first, drawn = sample(7), sample(None)
    assert first.seed == 7
    assert sample(7).token_ids == first.token_ids
    assert sample(8).token_ids != first.token_ids
    assert sample(drawn.seed).token_ids == drawn.token_ids
    assert sample(None).seed != drawn.seed


def test_stream_gives_what_one_call_gives(tiny: phi3c.Model) -> None:
    prompt = random_ids(20)
    whole = tiny.generate(prompt, max_tokens=40, temperature=1.0, seed=3)
    stream = tiny.generate(prompt, max_tokens=40, temperature=1.0, seed=3, stream=True)
    assert "".join(chunk.text for chunk in stream) == whole.text
    assert stream.result().token_ids == whole.token_ids


def test_ctrl_c_leaves_the_model_usable(tiny: phi3c.Model) -> None:
    prompt = random_ids(100)
    before = tiny.generate(prompt, max_tokens=20, temperature=0.0).token_ids
    calls = []

    def interrupt(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))
        if done >= 48:  # in the middle of the prompt
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(random_ids(100, seed=2), max_tokens=20, progress=interrupt)
    assert calls[-1][0] == "prompt"
    assert calls[-1][1] < 100
    assert tiny.generate(prompt, max_tokens=20, temperature=0.0).token_ids == before


def test_breaking_out_of_a_stream_leaves_the_model_usable(tiny: phi3c.Model) -> None:
    prompt = random_ids(30)
    before = tiny.generate(prompt, max_tokens=20, temperature=0.0).token_ids
    for _ in tiny.generate(prompt, max_tokens=20, temperature=0.0, stream=True):
        break
    assert tiny.generate(prompt, max_tokens=20, temperature=0.0).token_ids == before


def test_two_models_in_two_threads_give_what_each_gives_alone(tmp_path: Path) -> None:
    paths = write_tiny_phi3(tmp_path / "phi3.gguf"), write_tiny_llama(tmp_path / "llama.gguf")
    ready = threading.Barrier(2)

    def load_and_generate(path: Path, wait: bool) -> list[tuple[int, ...]]:
        if wait:
            ready.wait(60)
        with phi3c.Model(path, n_threads=2) as model:
            prompts = [random_ids(100, seed=seed) for seed in range(3)]
            return [
                model.generate(prompt, max_tokens=60, temperature=1.0, seed=5).token_ids for prompt in prompts
            ]

    alone = [load_and_generate(path, False) for path in paths]
    with ThreadPoolExecutor(2) as executor:
        together = list(executor.map(load_and_generate, paths, (True, True)))
    assert together == alone
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()  # no import may have switched it back on
    assert gil == (not sysconfig.get_config_var("Py_GIL_DISABLED"))


def test_logits_have_a_row_for_each_id(tiny: phi3c.Model) -> None:
    logits = tiny.logits(random_ids(33))
    assert logits.shape == (33, 320)
    assert logits.dtype == np.float32


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = phi3c.Model(write_tiny_phi3(tmp_path / "tiny.gguf"))
    model.close()
    with pytest.raises(phi3c.errors.ModelClosedError):
        model.logits([1, 2, 3])
