"""Sampling against a plain float64 reference of the chain, and stop strings against their definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phi3c._kernels import expf, philox4x32
from phi3c.errors import InvalidParameterError, NumericalError
from phi3c.sampling import Sampler, SamplingOptions, SamplingParams
from phi3c.stopping import StopMatcher

MASK = 0xFFFFFFFF
NEAR = 1e-9  # closer than this to a boundary, rounding decides


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & MASK, (low >> 32) ^ c3 ^ k1, low & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def uniform(seed: int, counter: int) -> float:
    w0, w1, _, _ = philox([counter & MASK, counter >> 32, 0, 0], [seed & MASK, seed >> 32])
    return ((w1 << 32 | w0) >> 11) / 2**53


def distribution(
    logits: np.ndarray, recent: Sequence[int], params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """Ids that may be drawn, best first, and their probabilities. Rejects inputs where rounding decides."""
    x = logits.astype(np.float64)
    for token in set(recent):
        penalty = np.float32(params.repeat_penalty)
        x[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    ids = np.lexsort((np.arange(x.size), -x))
    if params.temperature == 0:
        return ids[:1], np.ones(1)
    if params.top_k:
        ids = ids[: params.top_k]
    p = softmax(x[ids])
    if params.top_p < 1:
        mass = np.cumsum(p)
        assume(np.abs(mass - params.top_p).min() > NEAR)
        ids = ids[: np.searchsorted(mass, params.top_p) + 1]
    relative = np.exp(x[ids] - x[ids[0]])
    assume(params.min_p in (0, 1) or np.abs(relative - params.min_p).min() > NEAR)
    ids = ids[relative >= params.min_p]
    return ids, softmax(x[ids] / params.temperature)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def expected(
    logits: np.ndarray, recent: Sequence[int], params: SamplingParams, seed: int, counter: int
) -> int:
    ids, p = distribution(logits, recent, params)
    mass = np.cumsum(p)
    u = uniform(seed, counter)
    assume(np.abs(mass - u).min() > NEAR)
    return int(ids[np.searchsorted(mass, u, side="right")])


def draw(logits: np.ndarray, **options: object) -> int:
    return Sampler(SamplingParams.from_kwargs(**options), []).sample(logits)


def normal(n: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


# -- the chain

options = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 5)),
        "top_k": st.one_of(st.just(0), st.integers(1, 400)),
        "top_p": st.one_of(st.just(1.0), st.floats(0, 1)),
        "min_p": st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
        "repeat_penalty": st.one_of(st.just(1.0), st.floats(0.5, 2)),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=400)
@given(
    options=options,
    n=st.integers(1, 400),
    scale=st.sampled_from([0.0, 0.1, 2.0, 30.0, 1e6]),
    levels=st.sampled_from([0.5, 1e-3]),  # few levels: many ties
    noise=st.integers(0, 2**32),
    n_prompt=st.integers(0, 80),
)
def test_draws_what_the_reference_draws(options, n, scale, levels, noise, n_prompt):
    rng = np.random.default_rng(noise)
    ids = rng.integers(0, n, n_prompt).tolist()
    params = SamplingParams(**options)
    sampler = Sampler(params, ids)
    for counter in range(5):
        logits = (np.round(rng.standard_normal(n) / levels) * levels * scale).astype(np.float32)
        token = sampler.sample(logits)
        assert token == expected(logits, ids[-64:], params, params.seed, counter)
        ids.append(token)


@pytest.mark.parametrize("n", [5000, 32064])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 40},
        {"top_k": 0, "top_p": 0.3},  # wide: more tokens than are ranked at first
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 3.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.3},
        {"top_k": 3000, "top_p": 1.0, "min_p": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.01, 1.5, 6.0])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_large_vocabulary(n, options, scale, seed):
    params = SamplingParams(seed=seed, **options)
    logits = normal(n, scale, seed)
    assert Sampler(params, []).sample(logits) == expected(logits, [], params, seed, 0)


def test_frequencies_follow_the_probabilities():
    logits, n, temperature = normal(10, 1.5), 20_000, 0.8
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1, min_p=0, seed=1)
    sampler = Sampler(params, [])
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=10)
    wanted = n * softmax(logits.astype(np.float64) / temperature)
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    assert chi_square < 27.88  # 9 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 32064])
@pytest.mark.parametrize("temperature", [0.0, 1e-300])
def test_lowest_temperatures_take_the_most_likely_token(n, temperature):
    for seed in range(20):
        logits = normal(n, seed=seed)
        assert draw(logits, temperature=temperature) == logits.argmax()


def test_ties_go_to_the_lowest_id():
    logits = np.full(300, -1, np.float32)
    logits[[299, 70, 130]] = 2
    assert draw(logits, temperature=0) == 70
    assert draw(logits, top_k=1) == 70
    assert draw(logits, top_p=0.0) == 70
    assert {draw(logits, top_k=2, top_p=1.0, min_p=0.0, seed=seed) for seed in range(40)} == {70, 130}


def test_zeros_of_either_sign_are_equal():
    assert draw(np.array([-1, -0.0, 0.0], np.float32), temperature=0) == 1


def test_greedy_ignores_filters_but_not_the_penalty():
    logits = np.array([3, 2, 1], np.float32)
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1, repeat_penalty=2)
    assert Sampler(params, [0]).sample(logits) == 1


def test_penalty_lowers_either_sign_and_each_id_once():
    params = SamplingParams(temperature=0, repeat_penalty=1.5)
    assert Sampler(params, [0]).sample(np.array([-1, -1.4], np.float32)) == 1
    assert Sampler(params, [0, 0, 0]).sample(np.array([2, 1.2], np.float32)) == 0


def test_penalty_reaches_back_repeat_last_n_tokens():
    logits = np.array([4, 3, 2, 1], np.float32)
    sampler = Sampler(SamplingParams(temperature=0, repeat_penalty=100, repeat_last_n=2), [3, 1, 0])
    # 0 and 1 are recent; then 0 and 2; then 2 and 1; the window goes on sliding
    assert [sampler.sample(logits) for _ in range(5)] == [2, 1, 0, 2, 1]
    without = Sampler(SamplingParams(temperature=0, repeat_penalty=100, repeat_last_n=0), [0])
    assert [without.sample(logits) for _ in range(2)] == [0, 0]


def test_logits_stay_as_they_are():
    logits = normal(500)
    logits.flags.writeable = False
    before = logits.copy()
    Sampler(SamplingParams(repeat_penalty=1.3), [1, 2]).sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 77, 129])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, position, temperature):
    logits = normal(130)
    logits[position] = value
    sampler = Sampler(SamplingParams(temperature=temperature), [])
    with pytest.raises(NumericalError, match=f"1 of 130 .* token {position}:"):
        sampler.sample(logits)
    with pytest.raises(NumericalError):
        sampler.logprob(logits, 0)


# -- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert list(philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))) == words
    assert philox(counter, key) == words


def test_a_seed_repeats_its_tokens_whatever_runs_beside_it():
    rows = [normal(1000, 2, seed=i) for i in range(20)]
    params = SamplingParams(seed=2**64 - 1, top_k=0)
    alone = Sampler(params, [1])
    tokens = [alone.sample(row) for row in rows]
    again, other = Sampler(params, [1]), Sampler(SamplingParams(seed=5), [])
    mixed = []
    for row in rows:
        other.sample(row)
        mixed.append(again.sample(row))
    assert mixed == tokens


def test_seed_is_reported_and_drawn_when_absent():
    assert Sampler(SamplingParams(seed=7), []).seed == 7
    drawn = Sampler(SamplingParams(), [])
    assert drawn.seed != Sampler(SamplingParams(), []).seed
    rows = [normal(1000, seed=i) for i in range(10)]
    repeated = Sampler(SamplingParams(seed=drawn.seed), [])
    assert [drawn.sample(row) for row in rows] == [repeated.sample(row) for row in rows]


# -- log-probabilities


@settings(max_examples=100)
@given(
    n=st.integers(1, 2000),
    scale=st.sampled_from([0.0, 1.0, 50.0, 1e30]),
    noise=st.integers(0, 2**32),
    n_top=st.integers(0, 20),
)
def test_logprobs(n, scale, noise, n_top):
    logits = normal(n, scale, noise)
    x = logits.astype(np.float64)
    wanted = x - x.max() - np.log(np.exp(x - x.max()).sum())
    token = noise % n
    result = Sampler(SamplingParams(logprobs=n_top, temperature=3, repeat_penalty=2), [0]).logprob(
        logits, token
    )
    assert result.token_id == token
    assert math.isclose(result.logprob, wanted[token], rel_tol=1e-6, abs_tol=1e-12)
    best = np.lexsort((np.arange(n), -x))[:n_top]
    assert [token for token, _ in result.top] == best.tolist()
    np.testing.assert_allclose([logprob for _, logprob in result.top], wanted[best], rtol=1e-6, atol=1e-12)


# -- exp of softmax and silu


def test_expf_is_within_one_ulp():
    x = np.concatenate(
        [
            np.linspace(-87.3365, 88.7228, 1_000_001),
            normal(100_000, 1e-3),
            [
                0.0,
                -0.0,
                -87.33654022216797,
                88.72283172607422,
            ],  # the last x on either side with a normal result
        ]
    ).astype(np.float32)
    y = x.copy()
    expf(y)
    wanted = np.exp(x.astype(np.float64))
    ulp = np.spacing(wanted.astype(np.float32)).astype(np.float64)
    assert (np.abs(y - wanted) / ulp).max() < 1
    assert y[-4] == y[-3] == 1


def test_expf_outside_its_range():
    x = np.array([-87.336548, -1e3, -math.inf, 88.72284, 1e9, math.inf, math.nan], np.float32)
    expf(x)
    np.testing.assert_array_equal(x, np.array([0, 0, 0, math.inf, math.inf, math.inf, math.nan], np.float32))


# -- parameters


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be an integer from 1 to 2147483647, got 0"),
        ("temperature", -0.1, "temperature must be a number from 0 to 100, got -0.1"),
        ("temperature", math.nan, "temperature must be a number from 0 to 100, got nan"),
        ("temperature", "hot", "temperature must be a number from 0 to 100, got 'hot'"),
        ("temperature", True, "temperature must be"),
        ("top_k", -1, "top_k must be an integer from 0"),
        ("top_k", 4.0, "top_k must be an integer"),
        ("top_p", 1.1, "top_p must be a number from 0 to 1, got 1.1"),
        ("min_p", -1, "min_p must be a number from 0 to 1, got -1"),
        ("repeat_penalty", 0, "repeat_penalty must be a number from 0.01 to 100, got 0"),
        ("repeat_last_n", -1, "repeat_last_n must be an integer from 0"),
        ("seed", 2**64, "seed must be an integer from 0 to 18446744073709551615"),
        ("seed", -1, "seed must be"),
        ("stop", ["a", ""], "stop must be"),
        ("stop", 3, "stop must be"),
        ("logprobs", 21, "logprobs must be an integer from 0 to 20, got 21"),
    ],
)
def test_values_out_of_range_are_refused(name, value, message):
    with pytest.raises(InvalidParameterError) as error:
        SamplingParams(**{name: value})
    assert message in str(error.value)


def test_values_are_normalised():
    params = SamplingParams(temperature=1, top_k=np.int64(5), top_p=np.float32(0.5), stop="end")
    assert params == SamplingParams(temperature=1.0, top_k=5, top_p=0.5, stop=("end",))
    assert type(params.temperature) is float
    assert type(params.top_k) is int


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_new_tokens", "max_tokens"),
        ("num_predict", "max_tokens"),
        ("n_predict", "max_tokens"),
        ("repetition_penalty", "repeat_penalty"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
    ],
)
def test_unknown_names_get_a_hint(name, meant):
    with pytest.raises(TypeError, match=f"'{name}': did you mean '{meant}'"):
        SamplingParams.from_kwargs(**{name: 1})


def test_names_that_resemble_nothing():
    with pytest.raises(TypeError, match="'xyz': known are max_tokens, temperature,"):
        SamplingParams.from_kwargs(xyz=1)


def test_options_are_the_parameters():
    assert list(SamplingOptions.__annotations__) == [field.name for field in fields(SamplingParams)]


# -- stop strings


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Text before the stop string that ends first (of those the longest), and that string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


few_letters = st.text(alphabet="ab", min_size=1, max_size=6)


@settings(max_examples=500)
@given(pieces=st.lists(few_letters, max_size=10), stops=st.lists(few_letters, max_size=3))
def test_stop_strings_are_found_and_no_more_is_withheld_than_needed(pieces, stops):
    matcher = StopMatcher(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            break
        prefixes = {stop[:i] for stop in stops for i in range(len(stop))} | {""}
        assert shown == text[: len(text) - max(len(prefix) for prefix in prefixes if text.endswith(prefix))]
    shown += matcher.flush()
    assert (shown, matcher.matched) == cut(text, stops)


def test_nothing_is_shown_after_a_stop_string():
    matcher = StopMatcher(["<end>", "STOP"])
    assert matcher.push("so <e") == "so "
    assert matcher.push("nd of it") == "<end of it"
    assert matcher.push(" ST") == " "
    assert matcher.push("OP and on") == ""
    assert matcher.matched == "STOP"
    assert matcher.push("more") == matcher.flush() == ""
