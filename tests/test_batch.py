"""Sequences side by side: pages, prefixes found again, threads; never a different bit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import write_tiny_phi3
from numpy.typing import NDArray

import phi3c
from phi3c import _kernels
from phi3c.cache import KV_TYPES, PAGE, RELEASED, KVCache
from phi3c.config import Config
from phi3c.packed import ModelFile
from phi3c.phi3 import Phi3, Step

WINDOW = 100


@pytest.fixture(scope="module", params=[None, WINDOW], ids=["full attention", "window"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tmp_path_factory.mktemp("batch") / "tiny.gguf"
    return write_tiny_phi3(tiny, types="Q4_0", window=request.param, ctx=1024)


@pytest.fixture(params=KV_TYPES)
def phi3(request: pytest.FixtureRequest, path: Path) -> Iterator[Phi3]:
    with ModelFile(path) as file:
        yield Phi3(file, Config.from_gguf(file), _kernels.Pool(2), n_batch=512, kv_type=request.param)


def new_cache(phi3: Phi3, spare_pages: int = 0) -> KVCache:
    config = phi3.config
    return KVCache(phi3.heads, config.block_count, window=config.sliding_window, spare_pages=spare_pages)


def ids(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, n)]


def alone(phi3: Phi3, prompt: list[int]) -> NDArray[np.float32]:
    cache = new_cache(phi3)
    return phi3.forward([Step(cache.open(()), prompt, len(prompt))], cache).copy()


def test_prefill_and_decode_in_one_batch_give_the_bits_of_each_alone(phi3: Phi3) -> None:
    prompts = [ids(n, seed=n) for n in (1, 63, 64, 65, 7, 130)]
    expected = [alone(phi3, prompt) for prompt in prompts]
    cache = new_cache(phi3)
    sequences = [cache.open(()) for _ in prompts]
    # Every sequence is cut elsewhere, so that each batch holds long chunks and single tokens.
    cuts = [sorted({0, len(p), min(len(p), 3 + i), max(0, len(p) - 1)}) for i, p in enumerate(prompts)]
    for turn in range(max(map(len, cuts)) - 1):
        taking = [i for i, cut in enumerate(cuts) if turn + 1 < len(cut)]
        chunks = [prompts[i][cuts[i][turn] : cuts[i][turn + 1]] for i in taking]
        steps = [Step(sequences[i], chunk, len(chunk)) for i, chunk in zip(taking, chunks, strict=True)]
        logits, row = phi3.forward(steps, cache), 0
        for i, chunk in zip(taking, chunks, strict=True):
            start = cuts[i][turn]
            np.testing.assert_array_equal(
                logits[row : row + len(chunk)], expected[i][start : start + len(chunk)]
            )
            row += len(chunk)
    assert [sequence.tokens for sequence in sequences] == prompts


@pytest.mark.parametrize("n_logits", [0, 1, 5])
def test_only_wanted_logits_are_computed_and_the_cache_is_whole(phi3: Phi3, n_logits: int) -> None:
    prompt = ids(70)
    expected = alone(phi3, [*prompt, 7])
    cache = new_cache(phi3)
    sequence = cache.open(())
    logits = phi3.forward([Step(sequence, prompt, n_logits)], cache)
    np.testing.assert_array_equal(logits, expected[70 - n_logits : 70])
    np.testing.assert_array_equal(phi3.forward([Step(sequence, [7])], cache)[0], expected[70])


def test_a_known_prefix_is_taken_from_the_cache_and_changes_no_bit(phi3: Phi3) -> None:
    prompt = ids(3 * PAGE + 10)
    expected = alone(phi3, prompt)[-1]
    cache = new_cache(phi3, spare_pages=8)
    first = cache.open(prompt)
    assert len(first) == 0
    phi3.forward([Step(first, prompt)], cache)
    beside, other = cache.open(prompt), cache.open([*prompt[:PAGE], *ids(200, seed=1)])
    if phi3.config.sliding_window is None:
        assert len(beside) == 3 * PAGE
        assert len(other) == PAGE
        assert beside.pages[:3] == first.pages[:3]
    np.testing.assert_array_equal(phi3.forward([Step(beside, prompt[len(beside) :])], cache)[0], expected)
    cache.close(first)
    cache.close(beside)
    later = cache.open(prompt)
    assert phi3.config.sliding_window or len(later) == 3 * PAGE
    np.testing.assert_array_equal(phi3.forward([Step(later, prompt[len(later) :])], cache)[0], expected)


def test_the_last_token_of_a_known_prompt_is_computed_again(phi3: Phi3) -> None:
    prompt = ids(2 * PAGE)
    cache = new_cache(phi3, spare_pages=8)
    first = cache.open(prompt)
    expected = phi3.forward([Step(first, prompt)], cache).copy()
    again = cache.open(prompt)
    assert len(again) < len(prompt)
    np.testing.assert_array_equal(phi3.forward([Step(again, prompt[len(again) :])], cache), expected)


def test_pages_are_given_back_and_spare_ones_bounded(phi3: Phi3) -> None:
    cache = new_cache(phi3, spare_pages=2)
    for seed in range(4):
        sequence = cache.open(())
        phi3.forward([Step(sequence, ids(200, seed))], cache)
        cache.close(sequence)
        assert cache.pages.in_use <= 2
    assert cache.pages.count == 200 // PAGE + 1  # the next sequence takes over what the last one left


def test_pages_out_of_the_window_are_freed(phi3: Phi3) -> None:
    cache = new_cache(phi3)
    sequence = cache.open(())
    most = 0
    for start in range(0, 600, 60):
        phi3.forward([Step(sequence, ids(600)[start : start + 60])], cache)
        most = max(most, cache.pages.in_use)
    if phi3.config.sliding_window is None:
        assert most == 600 // PAGE + 1
    else:
        assert sequence.pages[0] == RELEASED
        assert most <= (WINDOW + 60) // PAGE + 2


@pytest.mark.parametrize("n_step", [1, 13, 64, 200])
def test_a_sequence_holds_the_pages_it_may_still_look_into_and_no_other(phi3: Phi3, n_step: int) -> None:
    cache, text = new_cache(phi3), ids(520)
    sequence = cache.open(())
    for start in range(0, len(text), n_step):
        phi3.forward([Step(sequence, text[start : start + n_step], 0)], cache)
        n = len(sequence)
        first = (
            0 if phi3.config.sliding_window is None else max(0, n + 1 - WINDOW)
        )  # the next query's first key
        seen = {position // PAGE for position in range(first, n)}
        held = {i for i, page in enumerate(sequence.pages) if page != RELEASED}
        assert held == seen
        assert cache.pages.in_use == len(held)


def test_threads_that_generate_at_once_get_what_each_gets_alone(path: Path) -> None:
    prompts = [ids(20 + i, seed=i) for i in range(4)]
    with phi3c.Model(path, n_threads=2) as model:
        expected = [model.generate(prompt, max_tokens=20, seed=5).token_ids for prompt in prompts]
        found: dict[int, tuple[int, ...]] = {}

        def run(i: int) -> None:
            found[i] = model.generate(prompts[i], max_tokens=20, seed=5).token_ids

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(len(prompts))] == expected


def test_streams_may_be_interleaved_left_and_cancelled(path: Path) -> None:
    with phi3c.Model(path, n_threads=2) as model:
        expected = [model.generate(ids(30, seed=i), max_tokens=8, temperature=0).token_ids for i in range(3)]
        left, cancelled, finished = (
            model.generate(ids(30, seed=i), max_tokens=8, temperature=0, stream=True) for i in range(3)
        )
        next(left)
        del left
        first = next(cancelled)
        next(finished)
        cancelled.cancel()
        part = cancelled.result()
        assert part.token_ids == expected[1][:1] == (first.token_id,)
        assert part.finish_reason == "cancelled"
        assert finished.result().token_ids == expected[2]


def test_a_closed_model_says_so_and_lets_go_of_its_memory(path: Path) -> None:
    model = phi3c.Model(path)
    model.generate(ids(100), max_tokens=5)
    weights, cache = (weakref.ref(part) for part in model._engine._parts or ())
    stream = model.generate(ids(5), max_tokens=5, stream=True)
    model.close()
    model.close()
    assert weights() is None
    assert cache() is None
    with pytest.raises(phi3c.ModelClosedError):
        next(stream)
    with pytest.raises(phi3c.ModelClosedError):
        model.logits([1])


def test_weights_beyond_the_machine_s_memory_are_refused_with_figures(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3c.weights.total_memory", lambda: 1000)
    with pytest.raises(phi3c.OutOfMemoryError, match=r"the weights take .* this machine has"):
        phi3c.Model(path)
