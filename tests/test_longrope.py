"""LongRoPE: one set of rotary factors for texts within the original context, another for longer ones.

The set follows from the length of the text and from nothing else, and a text that outgrows the original
context is read again: at every step the logits are those of a fresh start with the right set, bit for bit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import write_tiny_phi3
from numpy.typing import NDArray
from oracle import Oracle

import phi3c
from phi3c import _kernels
from phi3c.cache import KV_TYPES, LONG, PAGE, SHORT, KVCache
from phi3c.config import Config
from phi3c.gguf import GGMLType, GGUFFile, write_gguf
from phi3c.packed import ModelFile
from phi3c.phi3 import Phi3, Step

F32 = NDArray[np.float32]

ORIGINAL = 150  # ends within the third page
CONTEXT = 1024
FLOAT_ERROR = 2e-3  # as in test_model.py


def factors(n: int) -> tuple[F32, F32]:
    """Short and long ones of Phi-3's kind: near 1 for fast frequencies, growing for slow ones."""
    j = np.arange(n) / n
    return (1 + 0.5 * j).astype(np.float32), (1 + 20 * j**2).astype(np.float32)


def write(path: Path, *, n_factors: int = 16, **options: Any) -> Path:
    options = {"types": "Q4_0", "ctx": CONTEXT, "original_ctx": ORIGINAL} | options
    return write_tiny_phi3(path, factors=factors(n_factors), **options)


@pytest.fixture(scope="module", params=[None, 100], ids=["full attention", "window"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("longrope") / "tiny.gguf", window=request.param)


def random_ids(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, n)]


TEXT = random_ids(400)


def logits_of(path: Path, ids: Sequence[int], **options: Any) -> F32:
    with phi3c.Model(path, **options) as model:
        return model.logits(ids)


def relative_error(actual: F32, expected: F32) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# --- against the oracle ---


GEOMETRIES: dict[str, dict[str, Any]] = {
    "all rotated": {},
    "24 heads of 128 share 8, 96 rotated, tied": {
        "heads": 24, "kv_heads": 8, "head_dim": 128, "rope_dims": 96, "n_factors": 48, "tied": True,
        "layers": 1,
    },
    "heads of 96": {"heads": 2, "kv_heads": 2, "head_dim": 96, "n_factors": 48},
    "40 heads share 10, another base": {"heads": 40, "kv_heads": 10, "layers": 1, "rope_base": 250000.0},
    "attn_factor in the file": {"attn_factor": 1.5},
    "window": {"window": 70},
}  # fmt: skip


@pytest.mark.parametrize("n", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 260])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_length_decides(tmp_path: Path, geometry: dict[str, Any], n: int) -> None:
    path = write(tmp_path / "tiny.gguf", types="F32", **geometry)
    ids = TEXT[:n]
    right, wrong = ("short", "long") if n <= ORIGINAL else ("long", "short")
    expected = Oracle(path, rope_factors=right).logits(ids)
    assert relative_error(Oracle(path, rope_factors=wrong).logits(ids), expected) > 20 * FLOAT_ERROR
    assert relative_error(logits_of(path, ids), expected) < FLOAT_ERROR
    forced = logits_of(path, ids, rope_factors=wrong)
    assert relative_error(forced, Oracle(path, rope_factors=wrong).logits(ids)) < FLOAT_ERROR


def test_attn_factor_counts_for_short_texts_too(tmp_path: Path) -> None:
    ids = TEXT[:50]
    without = Oracle(write(tmp_path / "1.gguf", types="F32", attn_factor=1.0)).logits(ids)
    path = write(tmp_path / "tiny.gguf", types="F32")  # sqrt(1 + ln(1024 / 150) / ln 150)
    expected = Oracle(path).logits(ids)
    assert relative_error(without, expected) > 10 * FLOAT_ERROR
    assert relative_error(logits_of(path, ids), expected) < FLOAT_ERROR


@pytest.mark.parametrize("n", [100, 260])
def test_rope_freqs_serve_all_lengths(tmp_path: Path, n: int) -> None:
    plain = write(tmp_path / "plain.gguf", types="F32", attn_factor=1.0)
    path = tmp_path / "freqs.gguf"
    with GGUFFile(plain) as file:
        tensors: list[Any] = [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        tensors.append(("rope_freqs.weight", (16,), GGMLType.F32, np.linspace(1, 3, 16, dtype=np.float32)))
        write_gguf(path, file.metadata, tensors)
    expected = Oracle(path).logits(TEXT[:n])
    assert relative_error(Oracle(plain).logits(TEXT[:n]), expected) > 20 * FLOAT_ERROR
    assert relative_error(logits_of(path, TEXT[:n]), expected) < FLOAT_ERROR
    with pytest.raises(phi3c.InvalidParameterError, match="same rotary factors for all lengths"):
        phi3c.Model(path, rope_factors="long")


def test_packed_files_carry_the_factors(path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.gguf"
    phi3c.pack(path, packed)
    with ModelFile(path) as file, ModelFile(packed) as other:
        assert Config.from_gguf(other) == Config.from_gguf(file)
    for n in (ORIGINAL, ORIGINAL + 1):
        np.testing.assert_array_equal(logits_of(packed, TEXT[:n]), logits_of(path, TEXT[:n]))


# --- the allocated context changes nothing ---


def test_a_short_prompt_in_a_long_context(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", ctx=131072, original_ctx=4096, layers=1, kv_heads=1)
    with phi3c.Model(path, n_ctx=4096) as small, phi3c.Model(path, n_ctx=131072) as large:
        assert (small.info.n_ctx, large.info.n_ctx) == (4096, 131072)
        np.testing.assert_array_equal(small.logits(TEXT), large.logits(TEXT))
        prompt = random_ids(4090, seed=1)
        within, beyond = (model.generate(prompt, max_tokens=6, temperature=0) for model in (small, large))
        assert within.token_ids == beyond.token_ids
        assert beyond.timings.reprefill_tokens == 0
        across = large.generate(prompt, max_tokens=9, temperature=0, stream=True)
        tokens = [chunk.token_id for chunk in itertools.islice(across, 8)]
        assert tokens[:6] == list(within.token_ids)
        assert across.result().timings.reprefill_tokens == 4097
    with phi3c.Model(path, n_ctx=131072, rope_factors="long") as long:
        # tokens 8 and 9 are behind texts of 4097 and 4098
        rows = long.logits([*prompt, *across.result().token_ids])[-3:-1]
        assert rows.argmax(axis=1).tolist() == list(across.result().token_ids[7:])


# --- across the original context ---


class Copying:
    """Stands in for the sampler: chooses the tokens of a script and keeps the logits it was shown."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.seen = list(script), []  # type: tuple[list[int], list[F32]]

    def __call__(self, logits: Any) -> int:
        self.seen.append(logits.copy())
        return self.script[len(self.seen) - 1]


def scripted(
    model: phi3c.Model, prompt: Sequence[int], script: Sequence[int], **options: Any
) -> tuple[phi3c.Completion, F32]:
    copying = Copying(script)
    stream = model.generate(prompt, max_tokens=len(script), temperature=0, stream=True, **options)
    stream._generation.sampler.sample = copying  # type: ignore[method-assign]
    return stream.result(), np.array(copying.seen)


@pytest.fixture(scope="module", params=KV_TYPES)
def expected(request: pytest.FixtureRequest, path: Path) -> tuple[str, F32]:
    """The type of cache, and row i: logits behind TEXT[: i + 1], which its own length has the factors of."""
    short = logits_of(path, TEXT[:ORIGINAL], kv_type=request.param, rope_factors="short")
    long = logits_of(path, TEXT, kv_type=request.param, rope_factors="long")
    assert (short != long[:ORIGINAL]).any()
    return request.param, np.concatenate([short, long[ORIGINAL:]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_batch": 7},
        {"n_batch": 1},
        {"n_threads": 1},
        {"n_threads": 3, "n_batch": 64},
        {"speculate": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_prompt", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_every_step_is_a_fresh_start_with_the_right_factors(
    path: Path, expected: tuple[str, F32], options: dict[str, Any], n_prompt: int
) -> None:
    kv_type, rows = expected
    with phi3c.Model(path, kv_type=kv_type, **options) as model:
        completion, seen = scripted(model, TEXT[:n_prompt], TEXT[n_prompt : n_prompt + 170])
    np.testing.assert_array_equal(seen, rows[n_prompt - 1 : n_prompt + 169])
    assert completion.timings.reprefill_tokens == (ORIGINAL + 1 if n_prompt <= ORIGINAL else 0)


def test_the_caller_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "phi3c")
    with phi3c.Model(path) as model:
        caplog.clear()
        completion, _ = scripted(model, TEXT[:100], TEXT[100:300])
        (record,) = caplog.records
        assert record.name.startswith("phi3c")
        assert "outgrew the 150 tokens" in record.getMessage()
        timings = completion.timings
        assert timings.reprefill_tokens == ORIGINAL + 1
        assert 0 < timings.reprefill_ms < timings.generation_ms
        caplog.clear()
        for prompt in (TEXT[:20], TEXT[:300]):
            timings = model.generate(prompt, max_tokens=20).timings
            assert (timings.reprefill_tokens, timings.reprefill_ms) == (0, 0)
        assert not caplog.records


@pytest.mark.parametrize("rope_factors", ["short", "long"])
def test_forced_factors_stay(path: Path, rope_factors: str) -> None:
    with phi3c.Model(path, rope_factors=rope_factors) as model:
        expected = model.logits(TEXT)
        completion, seen = scripted(model, TEXT[:100], TEXT[100:300])
    np.testing.assert_array_equal(seen, expected[99:299])
    assert completion.timings.reprefill_tokens == 0
    assert (expected[:100] == logits_of(path, TEXT[:100])).all() == (rope_factors == "short")


def test_choices_that_cannot_be_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(phi3c.InvalidParameterError, match=r"'static'.*auto, short, long"):
        phi3c.Model(path, rope_factors="static")
    plain = write_tiny_phi3(tmp_path / "plain.gguf")
    phi3c.Model(plain, rope_factors="short").close()
    with pytest.raises(phi3c.InvalidParameterError, match="same rotary factors for all lengths"):
        phi3c.Model(plain, rope_factors="long")


def test_a_context_within_the_original_is_never_outgrown(path: Path) -> None:
    with phi3c.Model(path, n_ctx=ORIGINAL) as model:
        completion = model.generate(TEXT[:100], temperature=0, stop=())
        assert completion.timings.reprefill_tokens == 0
        assert len(completion.token_ids) + 100 <= ORIGINAL


# --- drafts ---


@pytest.mark.parametrize("n_copied", [60, 120, 200])
@pytest.mark.parametrize("n_prompt", [90, 130, 149, 150])
def test_drafts_do_not_cross(path: Path, n_prompt: int, n_copied: int) -> None:
    """An answer that copies from its prompt, so that drafts are right up to the crossing and beyond."""
    prompt = TEXT[:n_prompt]
    script = [*random_ids(3, 1), *itertools.islice(itertools.cycle(prompt[10:80]), n_copied)]
    with phi3c.Model(path) as plain, phi3c.Model(path, speculate=16) as speculating:
        a, logits = scripted(plain, prompt, script)
        b, logits_of_drafts = scripted(speculating, prompt, script)
    np.testing.assert_array_equal(logits, logits_of_drafts)
    assert a.token_ids == b.token_ids == tuple(script)
    assert b.timings.draft_n_accepted > n_copied // 3
    crosses = n_prompt + len(script) > ORIGINAL + 1
    assert a.timings.reprefill_tokens == b.timings.reprefill_tokens == (ORIGINAL + 1 if crosses else 0)


# --- the cache ---


def test_pages_of_either_set_are_never_taken_for_the_other(path: Path) -> None:
    prompts = [TEXT[:n] for n in (140, 300, 149, 200, 130, 399, 141)]
    fresh = []
    for prompt in prompts:
        with phi3c.Model(path) as model:
            fresh.append(scripted(model, prompt, random_ids(12, 5))[1])
    with phi3c.Model(path) as model:
        cached = []
        for prompt, rows in zip(prompts, fresh, strict=True):
            completion, seen = scripted(model, prompt, random_ids(12, 5))
            np.testing.assert_array_equal(seen, rows)
            cached.append(completion.usage.cached_tokens)
        if model.config.sliding_window is None:
            # 140 crosses with its answer; the text before it is the long ones' and the short ones' beginning
            assert cached == [0, 128, 128, 192, 128, 256, 128]


def test_what_crossed_is_found_again_with_its_long_keys(path: Path) -> None:
    with phi3c.Model(path) as model:
        scripted(model, TEXT[:140], TEXT[140:260])
        completion, _ = scripted(model, TEXT[:259], TEXT[259:262])
        again, seen = scripted(model, TEXT[:140], TEXT[140:260])
    if model.config.sliding_window is None:
        assert completion.usage.cached_tokens == 4 * PAGE
        assert again.usage.cached_tokens == 2 * PAGE
        assert again.timings.reprefill_tokens == ORIGINAL + 1 - 2 * PAGE
    np.testing.assert_array_equal(seen[11:], logits_of(path, TEXT[:259], rope_factors="long")[150:])


def test_no_page_is_lost(path: Path) -> None:
    with phi3c.Model(path, n_ctx=320) as model:
        parts = model._engine._parts
        assert parts is not None
        pages = parts[1].pages
        for seed in range(3):
            scripted(model, random_ids(140, seed), random_ids(100, 9))
            assert pages.in_use <= 320 // PAGE  # all of them spare
        assert pages.count <= 2 * 320 // PAGE


class Interrupted(Exception):
    pass


def test_an_interruption_while_reading_again_frees_the_pages(path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if total == ORIGINAL + 1 and done > 50:
            raise Interrupted

    with phi3c.Model(path, n_batch=32) as model:
        expected = scripted(model, TEXT[:140], TEXT[140:200])[1]
        parts = model._engine._parts
        assert parts is not None
        with pytest.raises(Interrupted):
            scripted(model, random_ids(140, 3), TEXT[:60], progress=interrupt)
        assert not parts[1]._holders
        np.testing.assert_array_equal(scripted(model, TEXT[:140], TEXT[140:200])[1], expected)


# --- side by side ---


@pytest.fixture(params=KV_TYPES)
def phi3(request: pytest.FixtureRequest, path: Path) -> Iterator[Phi3]:
    with ModelFile(path) as file:
        yield Phi3(file, Config.from_gguf(file), _kernels.Pool(2), n_batch=512, kv_type=request.param)


def test_one_forward_pass_takes_any_mix(phi3: Phi3) -> None:
    def cache() -> KVCache:
        config = phi3.config
        return KVCache(phi3.heads, config.block_count, window=config.sliding_window, spare_pages=20)

    sets = [SHORT, LONG, LONG, SHORT, LONG]
    prompts = [random_ids(n, seed=n) for n in (100, 100, 65, 64, 130)]
    prompts[1] = prompts[0]  # the same text with both
    expected = []
    for rope, prompt in zip(sets, prompts, strict=True):
        own = cache()
        expected.append(phi3.forward([Step(own.open((), rope), prompt, len(prompt))], own).copy())
    assert (expected[0] != expected[1]).any()

    shared = cache()
    sequences = [shared.open((), rope) for rope in sets]
    found: list[list[F32]] = [[] for _ in sets]
    cuts = [[0, 50 + i, len(prompt) - 1, len(prompt)] for i, prompt in enumerate(prompts)]
    for turn in range(3):
        chunks = [prompt[cut[turn] : cut[turn + 1]] for prompt, cut in zip(prompts, cuts, strict=True)]
        steps = [Step(s, chunk, len(chunk)) for s, chunk in zip(sequences, chunks, strict=True) if chunk]
        logits = phi3.forward(steps, shared)
        ends = list(itertools.accumulate(len(chunk) for chunk in chunks))
        for rows, chunk, end in zip(found, chunks, ends, strict=True):
            rows.append(logits[end - len(chunk) : end].copy())
    for rows, exact in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(rows), exact)


def test_streams_that_cross_beside_others(path: Path) -> None:
    prompts = [random_ids(n, seed=n) for n in (140, 20, 200, 149)]
    with phi3c.Model(path) as model:
        alone = [model.generate(prompt, max_tokens=30, seed=1).token_ids for prompt in prompts]
    with phi3c.Model(path) as model:
        streams = [model.generate(prompt, max_tokens=30, seed=1, stream=True) for prompt in prompts]
        for _ in itertools.zip_longest(*streams):
            pass
        assert [stream.result().token_ids for stream in streams] == alone
