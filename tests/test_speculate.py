"""Speculation: the same tokens with drafts as without, and a cache that never learns of a wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_tiny_phi3

import phi3c
from phi3c import _kernels
from phi3c.cache import PAGE, KVCache
from phi3c.config import Config
from phi3c.lookup import MOST, NGRAM, PRICE, START, PromptLookup
from phi3c.packed import ModelFile
from phi3c.phi3 import Phi3, Step

# -- drafts


def lookup_of(text: str) -> PromptLookup:
    return PromptLookup(map(ord, text))


def text_of(drafts: Sequence[int]) -> str:
    return "".join(map(chr, drafts))


def rich(lookup: PromptLookup) -> PromptLookup:
    """With a purse that sets no limit."""
    for _ in range(20):
        lookup.settle(1, 1)
    return lookup


def test_drafts_need_an_ngram_that_occurred_before() -> None:
    assert rich(lookup_of("abcdefgh ab")).draft(8) == []
    assert text_of(rich(lookup_of("abcdefgh abc")).draft(8)) == "d"


def test_drafts_are_half_as_long_as_what_agrees() -> None:
    text = "the quick brown fox jumps; "
    for n in range(NGRAM, 20):
        assert text_of(rich(lookup_of(text + text[:n])).draft(16)) == (text + text)[n : n + n // 2]
    assert len(rich(lookup_of(text + text[:20])).draft(4)) == 4


def test_the_latest_occurrence_counts() -> None:
    assert text_of(rich(lookup_of("abcX abcY abc")).draft(1)) == "Y"


def test_a_source_is_followed_past_later_occurrences() -> None:
    # the copy began before "cde", whose latest occurrence goes on with Z
    assert text_of(rich(lookup_of("abcdefgh cdeZ xabcde")).draft(2)) == "fg"


def test_a_loop_shorter_than_the_draft_is_drafted_round_and_round() -> None:
    drafts = text_of(rich(lookup_of("ab" * 10)).draft(9))
    assert drafts == "ababababa"


def test_a_text_that_keeps_disagreeing_loses_its_purse_and_no_more() -> None:
    lookup = rich(lookup_of("abcd" * 10))
    spent = 0.0
    for _ in range(1000):
        drafts = lookup.draft(16)
        lookup.settle(len(drafts), 0)
        spent += PRICE * len(drafts)
    assert spent <= MOST + 0.01 * 1000
    assert spent > 0


def test_a_purse_that_earned_nothing_pays_for_one_step() -> None:
    assert len(lookup_of("abcd" * 10).draft(16)) == int(START / PRICE)


# -- the same answers

WINDOW = 100


@pytest.fixture(scope="module", params=[None, WINDOW], ids=["full attention", "window"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tmp_path_factory.mktemp("speculate") / "tiny.gguf"
    return write_tiny_phi3(tiny, types="Q4_0", window=request.param, ctx=1024)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[phi3c.Model]:
    with phi3c.Model(path, n_threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def speculating(path: Path) -> Iterator[phi3c.Model]:
    with phi3c.Model(path, n_threads=2, speculate=16) as model:
        yield model


def random_ids(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, n)]


def assert_same(a: phi3c.Completion, b: phi3c.Completion) -> None:
    assert a.token_ids == b.token_ids
    assert (a.text, a.finish_reason, a.stop_detail) == (b.text, b.finish_reason, b.stop_detail)
    assert a.logprobs == b.logprobs
    assert a.usage.completion_tokens == b.usage.completion_tokens


def rehearsed(model: phi3c.Model, prompt: list[int], n: int, **options: Any) -> list[int]:
    """A prompt after which the model says something that stands in it.

    What a random model answers to a prompt depends on all of it, so the answer is written into the prompt
    again and again until much of it comes out.
    """
    answer = model.generate(prompt, max_tokens=n, **options).token_ids
    return [*prompt, *answer, *prompt, *answer, *prompt]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalty": {"temperature": 0, "repeat_penalty": 1.1, "repeat_last_n": 5},
    "sampled": {"temperature": 0.5, "seed": 3},
    "sampled, all tokens": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0, "seed": 4},
    "sampled, penalty": {"temperature": 0.8, "repeat_penalty": 1.3, "repeat_last_n": 64, "seed": 5},
    "logprobs": {"temperature": 0.3, "seed": 6, "logprobs": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_those_without_drafts(
    plain: phi3c.Model, speculating: phi3c.Model, options: dict[str, Any], seed: int
) -> None:
    prompt = rehearsed(plain, random_ids(40, seed), 40, **options)
    a = plain.generate(prompt, max_tokens=300, **options)
    b = speculating.generate(prompt, max_tokens=300, **options)
    assert_same(a, b)
    assert a.timings.draft_n == 0
    assert 0 <= b.timings.draft_n_accepted <= b.timings.draft_n


class Copying:
    """Stands in for the sampler: chooses the tokens of a script, so that an answer copies as one wants."""

    def __init__(self, script: Sequence[int], seen: list[list[float]]) -> None:
        self.script, self.seen = list(script), seen

    def __call__(self, logits: Any) -> int:
        self.seen.append(logits[:8].tolist())
        return self.script[len(self.seen) - 1]


def scripted(model: phi3c.Model, prompt: list[int], script: Sequence[int]) -> tuple[phi3c.Completion, Any]:
    seen: list[list[float]] = []
    stream = model.generate(prompt, max_tokens=len(script), temperature=0, stream=True)
    stream._generation.sampler.sample = Copying(script, seen)  # type: ignore[method-assign]
    return stream.result(), seen


@pytest.mark.parametrize("n_copied", [10, 64, 250])
def test_drafts_of_a_copied_text_are_accepted(
    plain: phi3c.Model, speculating: phi3c.Model, n_copied: int
) -> None:
    prompt = random_ids(300)
    script = [*random_ids(5, 1), *prompt[20 : 20 + n_copied], *random_ids(5, 2)]
    a, logits = scripted(plain, prompt, script)
    b, logits_of_drafts = scripted(speculating, prompt, script)
    assert a.token_ids == b.token_ids == tuple(script)
    assert logits == logits_of_drafts  # bit for bit, behind every token
    wrong = b.timings.draft_n - b.timings.draft_n_accepted
    assert b.timings.draft_n_accepted > 0.6 * n_copied - 4
    assert wrong <= 16  # one draft, at the end of the copy


def test_drafts_that_fail_leave_no_trace(plain: phi3c.Model, speculating: phi3c.Model) -> None:
    """A text full of n-grams that occurred before and go on otherwise, across pages and windows."""
    rng = np.random.default_rng(7)
    prompt = random_ids(100)
    script: list[int] = []
    while len(script) < 600:
        begin = int(rng.integers(0, 80))
        script += [*prompt[begin : begin + int(rng.integers(4, 20))], *random_ids(2, len(script))]
    _, logits = scripted(plain, prompt, script)
    b, logits_of_drafts = scripted(speculating, prompt, script)
    assert logits == logits_of_drafts
    assert b.timings.draft_n > b.timings.draft_n_accepted > 50
    # and what the cache keeps of it serves the next prompt as if it had been computed anew
    again = [*prompt, *script[:500]]
    c = plain.generate(again, max_tokens=5, temperature=0, logprobs=2)
    d = speculating.generate(again, max_tokens=5, temperature=0, logprobs=2)
    assert_same(c, d)
    assert c.usage.cached_tokens == d.usage.cached_tokens


def test_limits_inside_a_draft(speculating: phi3c.Model) -> None:
    prompt = random_ids(100)
    for n in range(1, 40):
        completion, seen = scripted(speculating, prompt, prompt[:n])
        assert len(completion.token_ids) == len(seen) == n
        assert completion.stop_detail == "max_tokens"


def test_the_context_ends_inside_a_draft(path: Path) -> None:
    prompt = random_ids(100)
    with phi3c.Model(path, n_ctx=150, speculate=16) as model:
        stream = model.generate(prompt, temperature=0, stream=True)
        stream._generation.sampler.sample = Copying(prompt, [])  # type: ignore[method-assign]
        completion = stream.result()
        assert completion.token_ids == tuple(prompt[:50])
        assert completion.stop_detail == "context"
        assert completion.timings.draft_n_accepted > 20
        parts = model._engine._parts
        assert parts is not None
        assert parts[1].pages.in_use <= -(-150 // PAGE)


def test_a_stop_token_ends_a_copied_text(speculating: phi3c.Model) -> None:
    stop = min(speculating.tokenizer.stop_ids)
    prompt = [*random_ids(60), stop, *random_ids(60, 1)]
    completion, seen = scripted(speculating, prompt, prompt)
    assert completion.token_ids == tuple(prompt[:60])
    assert completion.finish_reason == "stop"
    assert len(seen) == 61
    assert completion.timings.draft_n == completion.timings.draft_n_accepted


def test_a_stop_string_ends_a_copied_text(plain: phi3c.Model, speculating: phi3c.Model) -> None:
    prompt = plain.tokenize("one two three four five six seven eight nine ten eleven twelve. One more: ")
    answers = []
    for model in (plain, speculating):
        stream = model.generate(prompt, temperature=0, stop="ine t", stream=True)
        stream._generation.sampler.sample = Copying(prompt, [])  # type: ignore[method-assign]
        answers.append(stream.result())
    assert_same(*answers)
    assert answers[1].text.endswith("eight n")
    assert answers[1].timings.draft_n_accepted > 0


def test_accepted_tokens_come_one_by_one_and_a_stream_may_be_cancelled_between_them(
    speculating: phi3c.Model,
) -> None:
    prompt = random_ids(100)
    seen: list[list[float]] = []
    stream = speculating.generate(prompt, temperature=0, stream=True)
    stream._generation.sampler.sample = Copying(prompt, seen)  # type: ignore[method-assign]
    ids = []
    for chunk in stream:
        ids.append(chunk.token_id)
        if len(seen) > len(ids) + 2:  # more have been computed than shown
            stream.cancel()
    assert ids == prompt[: len(ids)]
    assert len(ids) < 40
    assert stream.result().finish_reason == "cancelled"
    assert stream.result().usage.completion_tokens == len(ids)


def test_interleaved_sequences_that_draft(plain: phi3c.Model, speculating: phi3c.Model) -> None:
    prompts = [rehearsed(plain, random_ids(30, seed), 30, temperature=0) for seed in range(3)]
    expected = [plain.generate(prompt, max_tokens=100, temperature=0).token_ids for prompt in prompts]
    streams = [speculating.generate(prompt, max_tokens=100, temperature=0, stream=True) for prompt in prompts]
    for _ in zip_longest(*streams):
        pass
    assert [stream.result().token_ids for stream in streams] == expected


def test_nan_comes_when_it_is_its_turn(speculating: phi3c.Model) -> None:
    prompt = random_ids(100)
    for n in range(1, 30):
        copying = Copying(prompt, [])

        def sample(logits: Any, copying: Copying = copying, n: int = n) -> int:
            if len(copying.seen) == n:
                raise phi3c.NumericalError("here")
            return copying(logits)

        stream = speculating.generate(prompt, temperature=0, stream=True)
        stream._generation.sampler.sample = sample  # type: ignore[method-assign]
        assert [next(stream).token_id for _ in range(n)] == prompt[:n]
        with pytest.raises(phi3c.NumericalError):
            next(stream)


def test_a_batch_of_one_row_drafts_nothing(path: Path, plain: phi3c.Model) -> None:
    prompt = random_ids(20) * 3
    with phi3c.Model(path, n_batch=1, speculate=8) as model:
        answer = model.generate(prompt, max_tokens=10, temperature=0)
    assert answer.timings.draft_n == 0
    assert answer.token_ids == plain.generate(prompt, max_tokens=10, temperature=0).token_ids


def test_fewer_than_no_drafts_are_refused(path: Path) -> None:
    with pytest.raises(phi3c.InvalidParameterError, match="speculate is -1"):
        phi3c.Model(path, speculate=-1)


# -- the cache


@pytest.fixture(scope="module")
def phi3(path: Path) -> Iterator[Phi3]:
    with ModelFile(path) as file:
        yield Phi3(file, Config.from_gguf(file), _kernels.Pool(2), n_batch=1024)


@settings(max_examples=25)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 2**32),
)
def test_the_cache_holds_what_was_accepted_and_nothing_else(
    phi3: Phi3, steps: list[tuple[int, int, int]], seed: int
) -> None:
    """Steps of (sure tokens, drafts, of them accepted), against a cache that never saw a draft."""
    config = phi3.config
    cache, simple = (
        KVCache(phi3.heads, config.block_count, window=config.sliding_window, spare_pages=20)
        for _ in range(2)
    )
    sequence, other = cache.open(()), simple.open(())
    text = random_ids(5 * 170 + 1, seed)
    for n_sure, n_drafts, n_accepted in steps:
        begin = len(sequence)
        sure = text[begin : begin + n_sure]
        right = text[begin + n_sure :][: min(n_drafts, n_accepted)]
        wrong = [token ^ 1 for token in text[begin + n_sure + len(right) :][: n_drafts - len(right)]]
        drafted = phi3.forward([Step(sequence, [*sure, *right, *wrong], 1 + n_drafts, n_drafts)], cache)
        drafted = drafted[: 1 + len(right)].copy()
        assert len(sequence) == begin + n_sure
        cache.append(sequence, right)
        expected = phi3.forward([Step(other, [*sure, *right], 1 + len(right))], simple)
        np.testing.assert_array_equal(drafted, expected)

        assert sequence.tokens == other.tokens
        assert sequence.digest == other.digest
        assert [page < 0 for page in sequence.pages][: len(other.pages)] == [page < 0 for page in other.pages]
        assert cache._filed.keys() == simple._filed.keys()
    cache.close(sequence)
    simple.close(other)
    assert cache.pages.in_use == simple.pages.in_use == len(cache._filed)
    prompt = [*text[: sum(n + min(d, a) for n, d, a in steps)], 5]
    again, fresh = cache.open(prompt), simple.open(())
    logits = phi3.forward([Step(again, prompt[len(again) :])], cache).copy()
    np.testing.assert_array_equal(logits, phi3.forward([Step(fresh, prompt)], simple))
