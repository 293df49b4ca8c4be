"""Scores, perplexity and KL divergence against plain NumPy, golden figures, and files made by hand."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import write_tiny_phi3
from numpy.typing import NDArray
from oracle import log_softmax

import phi3c
from phi3c import _kernels, cli, logits_file
from phi3c.logits_file import LogitsFile
from phi3c.perplexity import Estimate, chunks_of, strided_chunks_of

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
VOCAB = 323  # odd: records of a file end in a step that stands for no token
BOS = 266  # <|endoftext|> of the tiny models


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_phi3(tmp_path_factory.mktemp("tiny") / "tiny.gguf", vocab=VOCAB)


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Iterator[phi3c.Model]:
    with phi3c.Model(tiny_path, n_batch=48) as model:
        yield model


@pytest.fixture
def with_bos(tiny: phi3c.Model, monkeypatch: pytest.MonkeyPatch) -> phi3c.Model:
    """The same model, asking for BOS as Phi-3 does."""
    monkeypatch.setattr(tiny.tokenizer, "add_bos", True)
    assert tiny.tokenizer.bos_id == BOS
    return tiny


def random_ids(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, n).tolist()
    return ids


def logprobs_of(model: phi3c.Model, ids: Sequence[int]) -> list[float]:
    """Log-probability of every token but the first, from logits in NumPy."""
    rows = log_softmax(model.logits(ids))
    return [float(rows[i - 1, ids[i]]) for i in range(1, len(ids))]


# --- kernels ---


@pytest.mark.parametrize("n_vocab", [1, 15, 63, 64, 65, 1000, 32064])
def test_log_sum_exp(n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    logits = rng.normal(0, 10, (7, n_vocab)).astype(np.float32)
    logits[1] -= 3e4
    logits[2] = 5.0
    out = np.empty(7)
    _kernels.log_sum_exp(out, logits, _kernels.Pool(2))
    top = logits.max(axis=1).astype(np.float64)
    expected = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    alone = np.empty(1)
    _kernels.log_sum_exp(alone, logits[3:4], _kernels.Pool(1))
    assert alone[0] == out[3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_log_sum_exp_of_what_is_not_finite(bad: float) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[1, 69] = bad
    out = np.empty(3)
    _kernels.log_sum_exp(out, logits, _kernels.Pool(1))
    assert np.isnan(out).tolist() == [False, True, False]


def kl_in_numpy(log_p: F64, log_q: F64) -> F64:
    """KL of rows, without what the base finds less likely than exp(-16)."""
    terms = np.exp(log_p) * (log_p - log_q)
    return np.where(log_p > -16, terms, 0.0).sum(axis=1)


@pytest.mark.parametrize("n_vocab", [1, 64, 79, 1000])
def test_kl_divergence(n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    logits = rng.normal(0, 3, (5, n_vocab)).astype(np.float32)
    log_sums = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    wide = rng.integers(0, 2**16, (5, n_vocab + 3), np.uint16)
    scales = np.full(5, 20 / 65535, np.float32)  # some below -16, which do not count
    mins = np.full(5, -21, np.float32)
    steps = wide[:, :n_vocab]
    out = np.empty(5)
    _kernels.kl_divergence(out, steps, scales, mins, logits, log_sums, _kernels.Pool(2))
    log_p = mins[:, None].astype(np.float64) + scales[:, None].astype(np.float64) * steps
    assert n_vocab < 64 or (log_p < -16).any()
    np.testing.assert_allclose(out, kl_in_numpy(log_p, logits - log_sums[:, None]), rtol=1e-10)


# --- score ---


def test_score_of_ids(tiny: phi3c.Model) -> None:
    ids = random_ids(130)
    score = tiny.score(ids)
    expected = logprobs_of(tiny, ids)
    assert score.token_ids == tuple(ids)
    assert score.logprobs[0] is None
    np.testing.assert_allclose(np.array(score.logprobs[1:], float), expected, rtol=0, atol=1e-9)
    assert score.sum == pytest.approx(sum(expected))
    assert score.perplexity == pytest.approx(np.exp(-np.mean(expected)))


@pytest.mark.parametrize("n_context", [1, 2, 47, 48, 49, 100, 129])
def test_context_is_seen_and_not_scored(tiny: phi3c.Model, n_context: int) -> None:
    ids = random_ids(130)
    whole = tiny.score(ids)
    score = tiny.score(ids[n_context:], context=ids[:n_context])
    assert score.token_ids == tuple(ids[n_context:])
    assert score.logprobs == whole.logprobs[n_context:]


@pytest.mark.parametrize(("n_threads", "n_batch"), [(1, 512), (2, 1), (3, 64)])
def test_score_has_the_same_bits(tiny: phi3c.Model, tiny_path: Path, n_threads: int, n_batch: int) -> None:
    ids = random_ids(150)
    with phi3c.Model(tiny_path, n_threads=n_threads, n_batch=n_batch) as model:
        assert model.score(ids) == tiny.score(ids)
        assert model.score(ids[70:], context=ids[:70]).logprobs == tiny.score(ids).logprobs[70:]


def test_score_is_what_generate_reports(tiny: phi3c.Model) -> None:
    prompt = random_ids(30)
    answer = tiny.generate(prompt, max_tokens=20, seed=3, temperature=1.0, top_k=0, logprobs=0)
    assert answer.logprobs
    score = tiny.score(answer.token_ids, context=prompt)
    reported = np.array([entry.logprob for entry in answer.logprobs[: len(answer.token_ids)]], np.float32)
    np.testing.assert_array_equal(np.array(score.logprobs, np.float32), reported)


def test_score_of_text(tiny: phi3c.Model) -> None:
    ids = tiny.tokenize("hello there")
    assert tiny.score("hello there") == tiny.score(ids)
    # the border lies inside "hello", one token of the whole text: it is scored, and "(" is context
    split = tiny.score("llo there", context="(he")
    whole = tiny.tokenize("(hello there")
    n = len(tiny.tokenize("("))
    assert tiny.detokenize(split.token_ids[:1]) == "hello"
    assert split == tiny.score(whole[n:], context=whole[:n])


def test_bos_is_context_of_a_text(with_bos: phi3c.Model) -> None:
    ids = with_bos.tokenize("hello there")
    assert ids[0] == BOS
    score = with_bos.score("hello there")
    assert score == with_bos.score(ids[1:], context=[BOS])
    assert None not in score.logprobs
    # " the" reaches across the border
    assert with_bos.score("there", context="hello ") == with_bos.score(ids[2:], context=ids[:2])


def test_what_cannot_be_scored(tiny: phi3c.Model) -> None:
    for text, context in [([5], None), ("", None), ([], [5, 6]), ("", "hello")]:
        with pytest.raises(phi3c.InvalidParameterError, match=r"nothing to score|is empty"):
            tiny.score(text, context=context)
    with pytest.raises(phi3c.InvalidParameterError, match="both be text"):
        tiny.score("hello", context=[5])
    with pytest.raises(phi3c.InvalidParameterError, match="both be text"):
        tiny.score([5], context="hello")
    with pytest.raises(phi3c.InvalidParameterError, match="323"):
        tiny.score([5, 323])
    with pytest.raises(phi3c.ContextLengthError):
        tiny.score(random_ids(513))


# --- perplexity ---


def mean_and_error(samples: Sequence[float] | F64) -> tuple[float, float]:
    """As llama-perplexity has it: from the means of samples and of their squares."""
    n, mean, square = len(samples), np.mean(samples), np.mean(np.square(samples))
    return float(mean), float(np.sqrt((square - mean**2) / (n - 1)))


def test_estimate() -> None:
    samples = np.random.default_rng(0).normal(3, 2, 1000)
    estimate = Estimate.mean(samples)
    assert estimate == pytest.approx(mean_and_error(samples))
    assert estimate.error == pytest.approx(samples.std(ddof=1) / np.sqrt(1000))
    assert Estimate.mean(samples[:1]) == (samples[0], 0)
    assert Estimate(1.0, 0.5).exp() == pytest.approx((math.e, math.e / 2))
    assert Estimate(1e4, 1.0).exp() == (math.inf, math.inf)


@pytest.mark.parametrize("n_ctx", [3, 50, 51, 128])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_of_chunks(
    tiny: phi3c.Model, n_ctx: int, bos: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue("with_bos") if bos else tiny
    ids = random_ids(300)
    nll: list[float] = []
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = ids[start : start + n_ctx]
        if bos:
            chunk[0] = BOS
        rows = log_softmax(model.logits(chunk))
        nll += [-float(rows[j, chunk[j + 1]]) for j in range(n_ctx // 2, n_ctx - 1)]
    mean, error = mean_and_error(nll)
    result = model.perplexity(ids, n_ctx=n_ctx)
    assert (result.n_tokens, result.n_chunks, result.n_ctx) == (len(nll), len(ids) // n_ctx, n_ctx)
    assert result.perplexity == pytest.approx((np.exp(mean), np.exp(mean) * error), rel=1e-6)


@pytest.mark.parametrize(("n_ctx", "stride"), [(128, 64), (100, 1), (50, 49), (128, 100), (400, 200), (3, 1)])
def test_perplexity_with_a_stride(tiny: phi3c.Model, n_ctx: int, stride: int) -> None:
    ids = random_ids(130)
    nll: list[float] = []
    ends = [0]
    for begin in range(0, len(ids), stride):  # as the guide of Hugging Face goes over a text
        end = min(begin + n_ctx, len(ids))
        targets = range(max(ends[-1], 1), end)
        rows = log_softmax(tiny.logits(ids[begin:end]))
        nll += [-float(rows[t - 1 - begin, ids[t]]) for t in targets]
        ends.append(end)
        if end == len(ids):
            break
    assert len(nll) == len(ids) - 1
    mean, error = mean_and_error(nll)
    result = tiny.perplexity(ids, n_ctx=n_ctx, stride=stride)
    assert (result.n_tokens, result.n_chunks, result.stride) == (len(nll), len(ends) - 1, stride)
    assert result.perplexity == pytest.approx((np.exp(mean), np.exp(mean) * error), rel=1e-6)


@given(st.integers(2, 300), st.integers(3, 64), st.data())
def test_a_stride_scores_every_token_once(n: int, n_ctx: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, n_ctx - 1))
    chunks = strided_chunks_of(range(n), n_ctx, stride)
    assert [id for chunk in chunks for id in chunk.ids[chunk.n_context :]] == list(range(1, n))
    assert all(len(chunk.ids) <= n_ctx for chunk in chunks)
    assert all(chunk.n_context >= n_ctx - stride for chunk in chunks[1:])


def test_chunks_leave_the_rest_alone() -> None:
    chunks = chunks_of(range(25), 8, bos_id=None)
    assert [list(chunk.ids) for chunk in chunks] == [list(range(i, i + 8)) for i in (0, 8, 16)]
    assert [chunk.n_context for chunk in chunks] == [5, 5, 5]
    assert list(chunks_of(range(25), 8, bos_id=99)[1].ids) == [99, *range(9, 16)]


def test_fewer_chunks(tiny: phi3c.Model) -> None:
    ids = random_ids(300)
    assert tiny.perplexity(ids, n_ctx=64, n_chunks=2) == tiny.perplexity(ids[:130], n_ctx=64)


def test_perplexity_has_the_same_bits(tiny: phi3c.Model, tiny_path: Path) -> None:
    ids = random_ids(300)
    with phi3c.Model(tiny_path, n_threads=3, n_batch=7) as model:
        assert model.perplexity(ids, n_ctx=128) == tiny.perplexity(ids, n_ctx=128)


def test_progress_tells_the_perplexity_so_far(tiny: phi3c.Model) -> None:
    ids = random_ids(300)
    reports: list[tuple[int, int, float | None]] = []
    tiny.perplexity(ids, n_ctx=64, progress=lambda *report: reports.append(report))
    assert [report[:2] for report in reports] == [(64 * i, 256) for i in range(5)]
    assert reports[0][2] is None
    for i, (_, _, so_far) in enumerate(reports[1:], 1):
        assert so_far == pytest.approx(tiny.perplexity(ids, n_ctx=64, n_chunks=i).perplexity.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 2}, "n_ctx is 2"),
        ({"n_ctx": 1000}, "n_ctx is 1000"),
        ({"n_ctx": 301}, "has 300 tokens"),
        ({"n_ctx": 64, "stride": 64}, "stride is 64"),
        ({"n_ctx": 64, "stride": -1}, "stride is -1"),
        ({"n_ctx": 64, "n_chunks": 0}, "n_chunks is 0"),
        ({"n_ctx": 64, "stride": 8, "save_logits": "x"}, "stride must be 0"),
    ],
)
def test_what_perplexity_refuses(tiny: phi3c.Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(phi3c.InvalidParameterError, match=message):
        tiny.perplexity(random_ids(300), **arguments)


# --- files of log-probabilities ---


def file_in_numpy(tokens: NDArray[np.int32], log_probs: Sequence[F64]) -> bytes:
    """A file as llama-perplexity writes it; log_probs: (n_scored, n_vocab) of each chunk."""
    n_chunk, n_ctx = tokens.shape
    n_vocab = log_probs[0].shape[1]
    data = b"_logits_" + struct.pack("<iii", n_ctx, n_vocab, n_chunk) + tokens.astype("<i4").tobytes()
    for chunk in log_probs:
        for row in chunk:
            low = max(row.min(), row.max() - 16)
            scale = (row.max() - low) / 65535
            steps = np.rint((np.maximum(row, low) - low) / scale).astype("<u2").tobytes()
            data += struct.pack("<ff", scale, low) + steps + bytes(2 * (n_vocab % 2))
    return data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.int32], list[F64]]:
    """Another model's log-probabilities of three chunks of 64, written by NumPy."""
    path = tmp_path_factory.mktemp("base") / "base.logits"
    tokens = np.array(random_ids(192), np.int32).reshape(3, 64)
    with phi3c.Model(write_tiny_phi3(path.with_suffix(".gguf"), vocab=VOCAB, seed=0)) as model:
        noise = np.random.default_rng(1).normal(0, 0.3, (3, 64, VOCAB))
        log_probs = [
            log_softmax((model.logits(chunk) + noise[i]).astype(np.float32))[32:-1]
            for i, chunk in enumerate(tokens)
        ]
    path.write_bytes(file_in_numpy(tokens, log_probs))
    return path, tokens, log_probs


def test_reads_what_numpy_wrote(base: tuple[Path, NDArray[np.int32], list[F64]]) -> None:
    path, tokens, log_probs = base
    file = LogitsFile(path)
    assert (file.n_ctx, file.n_vocab) == (64, VOCAB)
    np.testing.assert_array_equal(file.tokens, tokens)
    for i, expected in enumerate(log_probs):
        chunk = file.chunk(i)
        actual = chunk.mins[:, None] + chunk.scales[:, None] * chunk.steps.astype(np.float64)
        above = expected > expected.max(axis=1, keepdims=True) - 16
        np.testing.assert_allclose(actual[above], expected[above], rtol=0, atol=16 / 65535)
        own = np.take_along_axis(actual, tokens[i, 33:, None], axis=1)[:, 0]
        np.testing.assert_array_equal(chunk.logprobs(tokens[i, 33:]), own)


def test_writes_what_numpy_would(tiny: phi3c.Model, tmp_path: Path) -> None:
    ids, path = random_ids(200), tmp_path / "saved.logits"
    result = tiny.perplexity(ids, n_ctx=64, save_logits=path)
    assert result == tiny.perplexity(ids, n_ctx=64)
    tokens = np.array(ids[:192], np.int32).reshape(3, 64)
    expected = file_in_numpy(tokens, [log_softmax(tiny.logits(chunk))[32:-1] for chunk in tokens])
    written = path.read_bytes()
    head = 20 + 4 * 192
    assert len(written) == len(expected)
    assert written[:head] == expected[:head]
    record = np.dtype([("scale", "<f4"), ("minimum", "<f4"), ("step", "<u2", (VOCAB + 1,))])
    ours, theirs = (np.frombuffer(data[head:], record) for data in (written, expected))
    np.testing.assert_allclose(ours["scale"], theirs["scale"], rtol=1e-6)
    np.testing.assert_allclose(ours["minimum"], theirs["minimum"], rtol=1e-6)
    assert np.abs(ours["step"].astype(int) - theirs["step"]).max() <= 1
    assert list(tmp_path.iterdir()) == [path]


def test_tokens_are_saved_as_the_text_has_them(with_bos: phi3c.Model, tmp_path: Path) -> None:
    ids, path = random_ids(200), tmp_path / "saved.logits"
    saved = with_bos.perplexity(ids, n_ctx=64, save_logits=path)
    assert LogitsFile(path).tokens.reshape(-1).tolist() == ids[:192]
    again = with_bos.divergence(path)
    assert again.perplexity == saved.perplexity  # BOS was put into the chunks both times
    assert again.kl.value == pytest.approx(0, abs=1e-4)


def test_flat_logits_and_wide_ones(tmp_path: Path) -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[1] = [0, 100, -1e30, 99]
    path = tmp_path / "flat.logits"
    with logits_file.writing(path, np.zeros((1, 5), np.int32), 4) as append:
        append(0, logits, np.logaddexp.reduce(logits.astype(np.float64), axis=1))
    chunk = LogitsFile(path).chunk(0)
    np.testing.assert_array_equal(chunk.steps, [[0, 0, 0, 0], [0, 65535, 0, 61439]])  # 15/16 of 65535
    np.testing.assert_allclose(chunk.logprobs(np.array([3, 3], np.int32)), [-np.log(4), -1.3133], atol=2e-4)


def test_divergence(tiny: phi3c.Model, base: tuple[Path, NDArray[np.int32], list[F64]]) -> None:
    path, tokens, _ = base
    file = LogitsFile(path)
    own, theirs, kl, same = [], [], [], []
    for i, ids in enumerate(tokens.tolist()):
        log_q = log_softmax(tiny.logits(ids))[32:-1]
        chunk = file.chunk(i)
        log_p = chunk.mins[:, None] + chunk.scales[:, None].astype(np.float64) * chunk.steps
        targets = np.array(ids[33:])[:, None]
        own.append(np.take_along_axis(log_q, targets, axis=1)[:, 0])
        theirs.append(np.take_along_axis(log_p, targets, axis=1)[:, 0])
        kl.append(kl_in_numpy(log_p, log_q))
        same.append(log_p.argmax(axis=1) == log_q.argmax(axis=1))
    q, p, kls, agree = (np.concatenate(parts) for parts in (own, theirs, kl, same))
    n = len(q)
    result = tiny.divergence(path)
    assert (result.n_tokens, result.n_chunks, result.n_ctx) == (n, 3, 64) == (93, 3, 64)

    def close(expected: Any) -> Any:
        return pytest.approx(expected, rel=1e-5)

    # every formula as llama-perplexity writes it
    (ln_q, err_q), (ln_p, err_p) = mean_and_error(-q), mean_and_error(-p)
    covariance = (np.mean(q * p) - q.mean() * p.mean()) / (n - 1)
    assert result.perplexity == close((np.exp(ln_q), np.exp(ln_q) * err_q))
    assert result.base_perplexity == close((np.exp(ln_p), np.exp(ln_p) * err_p))
    err_ratio = np.sqrt(err_q**2 + err_p**2 - 2 * covariance)
    assert result.log_ratio == close((ln_q - ln_p, err_ratio))
    assert result.ratio == close((np.exp(ln_q - ln_p), np.exp(ln_q - ln_p) * err_ratio))
    ppl_q, ppl_p = np.exp(ln_q), np.exp(ln_p)
    err = np.sqrt((ppl_q * err_q) ** 2 + (ppl_p * err_p) ** 2 - 2 * ppl_q * ppl_p * covariance)
    assert result.difference == close((ppl_q - ppl_p, err))
    assert result.correlation == close(covariance / (err_q * err_p))
    assert result.kl == close(mean_and_error(kls))
    assert 0.01 < result.kl.value < 0.2  # noise of 0.3 in the logits: about 0.3^2 / 2
    delta = np.exp(q) - np.exp(p)
    assert result.delta_p == close(mean_and_error(delta))
    square, err = mean_and_error(delta**2)
    assert result.delta_p_rms == close((np.sqrt(square), 0.5 / np.sqrt(square) * err))
    share = agree.mean()
    assert 0.5 < share < 1
    assert result.same_top == close((share, np.sqrt(share * (1 - share) / (n - 1))))

    for quantiles, values in [
        (result.kl_quantiles, np.sort(kls)),
        (result.delta_p_quantiles, np.sort(delta)),
    ]:
        assert quantiles["maximum"] == close(values[-1])
        assert quantiles["median"] == close(values[46])
        assert quantiles["minimum"] == close(values[0])
        place = 0.99 * 92
        below, above = values[int(place)], values[int(place) + 1]
        assert quantiles["99 %"] == close(below + (place - int(place)) * (above - below))


def test_a_model_does_not_diverge_from_itself(tiny: phi3c.Model, tmp_path: Path) -> None:
    prompt, path = random_ids(20), tmp_path / "saved.logits"
    ids = [*prompt, *tiny.generate(prompt, max_tokens=280, seed=1, temperature=1.0, top_k=0).token_ids]
    saved = tiny.perplexity(ids, n_ctx=128, save_logits=path)
    result = tiny.divergence(path)
    assert result.perplexity == saved.perplexity
    # 65535 steps of at most 16 nats: log-probabilities are off by half of 0.00025
    assert abs(result.kl.value) < 1.3e-4
    assert result.base_perplexity.value == pytest.approx(saved.perplexity.value, rel=1.3e-4)
    assert result.same_top.value > 0.98
    assert tiny.divergence(path, n_chunks=1).n_tokens == 63
    with pytest.raises(phi3c.InvalidParameterError, match="n_chunks is 0"):
        tiny.divergence(path, n_chunks=0)


def test_divergence_of_a_single_token(tiny: phi3c.Model, tmp_path: Path) -> None:
    path = tmp_path / "saved.logits"
    tiny.perplexity([5, 6, 7], n_ctx=3, save_logits=path)
    result = tiny.divergence(path)
    assert (result.n_tokens, result.correlation, result.kl.error, result.same_top) == (1, 0, 0, (1, 0))


def test_damaged_files(
    tiny: phi3c.Model, base: tuple[Path, NDArray[np.int32], list[F64]], tmp_path: Path
) -> None:
    good = base[0].read_bytes()
    path = tmp_path / "damaged.logits"

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(phi3c.LogitsFileError, match=message):
            tiny.divergence(path)

    def changed(offset: int, patch: bytes) -> bytes:
        return good[:offset] + patch + good[offset + len(patch) :]

    for n in (0, 5, 19):
        refused(good[:n], "does not begin")
    for n in (20, 500, len(good) - 1):
        refused(good[:n], "bytes, it has")
    refused(good + b"x", "bytes, it has")
    refused(changed(0, b"_Logits_"), "does not begin")
    for offset in (8, 12, 16):
        for value in (-1, 0, 2**31 - 1):
            refused(changed(offset, struct.pack("<i", value)), "is damaged")
    for token in (-1, VOCAB):
        refused(changed(20, struct.pack("<i", token)), "outside the vocabulary")
    first = 20 + 4 * 192
    for scale, minimum in [(np.nan, -5), (-1, -5), (1e-4, np.nan), (1e-4, np.inf), (1e-4, 0), (np.inf, -5)]:
        refused(changed(first, struct.pack("<ff", scale, minimum)), "no log-probabilities")
    with pytest.raises(phi3c.LogitsFileError, match="cannot be read"):
        tiny.divergence(tmp_path / "absent")
    with pytest.raises(phi3c.LogitsFileError, match="cannot be read"):
        tiny.divergence(tmp_path)


def test_files_of_other_models(
    tiny: phi3c.Model, tiny_path: Path, base: tuple[Path, NDArray[np.int32], list[F64]], tmp_path: Path
) -> None:
    path = tmp_path / "other.logits"
    path.write_bytes(file_in_numpy(np.zeros((1, 4), np.int32), [np.log(np.arange(1, 8)[None] / 28)]))
    with pytest.raises(phi3c.LogitsFileError, match="of 7 tokens, the model 323"):
        tiny.divergence(path)
    with (
        phi3c.Model(tiny_path, n_ctx=63) as model,
        pytest.raises(phi3c.ContextLengthError, match="chunks of 64"),
    ):
        model.divergence(base[0])


def test_an_interrupted_save_leaves_nothing(tiny: phi3c.Model, tmp_path: Path) -> None:
    path = tmp_path / "saved.logits"
    path.write_bytes(b"before")

    def interrupt(done: int, total: int, perplexity: float | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.perplexity(random_ids(200), n_ctx=64, save_logits=path, progress=interrupt)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_a_save_that_cannot_be(tiny: phi3c.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(phi3c.ModelWriteError, match="cannot be written"):
        tiny.perplexity(random_ids(64), n_ctx=64, save_logits=tmp_path / "no" / "folder")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(phi3c.ModelWriteError, match=r"the disk has 0\.00 GB left"):
        tiny.perplexity(random_ids(64), n_ctx=64, save_logits=tmp_path / "saved.logits")
    assert list(tmp_path.iterdir()) == []


# --- a real model ---


def test_golden_figures(shared: Path) -> None:
    golden = json.loads((shared / "golden/smollm2-135m-phi3-q4_k_m.json").read_text(encoding="utf-8"))
    text = (shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8")
    with phi3c.Model(shared / "models/smollm2-135m-phi3-q4_k_m.gguf") as model:
        errors = [
            actual - expected
            for case in golden["cases"]
            for actual, expected in zip(
                model.score(case["prompt_ids"]).logprobs[1:], case["prompt_logprobs"], strict=True
            )
            if actual is not None
        ]
        assert len(errors) == sum(len(case["prompt_logprobs"]) for case in golden["cases"])
        assert np.sqrt(np.mean(np.square(errors))) < 0.15  # test_model.py bounds each

        ids, n_ctx = model.tokenize(text), golden["perplexity"]["context"]
        starts = range(0, len(ids) - n_ctx + 1, n_ctx)
        parts = [
            model.score(ids[i + n_ctx // 2 : i + n_ctx], context=ids[i : i + n_ctx // 2]) for i in starts
        ]
        value = math.exp(-sum(part.sum for part in parts) / sum(len(part.logprobs) for part in parts))
        assert value == pytest.approx(golden["perplexity"]["value"], rel=0.01)

        # llama-perplexity's chunks score one token less each
        result = model.perplexity(text)
        scored = [logprob for part in parts for logprob in part.logprobs[1:]]
        assert result.n_tokens == len(scored) == 5 * 255
        assert result.perplexity.value == pytest.approx(np.exp(-np.mean(np.array(scored, float))))


# --- the command ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the hello in a window, " * 30 + "\n", encoding="utf-8")
    return path


def test_command(
    tiny: phi3c.Model, tiny_path: Path, text_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["perplexity", str(tiny_path), "-f", str(text_path), "--ctx", "64"]
    expected = tiny.perplexity(text_path.read_text().removesuffix("\n"), n_ctx=64)
    value, error = expected.perplexity
    assert cli.main(argv) == 0
    n, chunks = expected.n_tokens, expected.n_chunks
    line = f"perplexity {value:.4f} ± {error:.4f}: {n} tokens scored in {chunks} chunks of 64\n"
    assert capsys.readouterr() == (line, "")

    assert cli.main([*argv, "-o", "json", "--chunks", "2", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    shorter = tiny.perplexity(text_path.read_text(), n_ctx=64, n_chunks=2)
    assert (report["perplexity"], report["perplexity_error"]) == shorter.perplexity
    assert (report["n_chunks"], report["n_ctx"], report["stride"], report["n_threads"]) == (2, 64, 0, 1)
    assert (report["kv_type"], report["model_filename"]) == ("f16", str(tiny_path))


def test_command_with_a_stride_from_standard_input(
    tiny: phi3c.Model,
    tiny_path: Path,
    text_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text_path.read_bytes())))
    assert cli.main(["perplexity", str(tiny_path), "--ctx", "64", "--stride", "32"]) == 0
    expected = tiny.perplexity(text_path.read_text().removesuffix("\n"), n_ctx=64, stride=32)
    out = capsys.readouterr().out
    assert out.startswith(f"perplexity {expected.perplexity.value:.4f} ")
    assert out.endswith(" chunks of 64, stride 32\n")


def test_command_saves_and_compares(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.logits"
    argv = ["perplexity", str(tiny_path), "-f", str(text_path), "--ctx", "64", "--save-logits", str(base)]
    assert cli.main(argv) == 0
    capsys.readouterr()
    compare = ["perplexity", str(tiny_path), "--kl-base", str(base), "--kv-type", "q8_0"]
    with phi3c.Model(tiny_path, kv_type="q8_0") as model:
        expected = model.divergence(base)
    assert cli.main(compare) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{expected.n_tokens} tokens scored in {expected.n_chunks} chunks of 64"
    (ratio,) = [line for line in lines if line.startswith("PPL(Q) / PPL(base) ")]
    assert f"{expected.ratio.value:.6f} ± {expected.ratio.error:.6f}" in ratio
    (mean,) = [line for line in lines if line.startswith("mean ")]
    assert f"{expected.kl.value:.6f} ± {expected.kl.error:.6f}" in mean
    (median,) = [line for line in lines if line.startswith("median ")]
    assert f"{expected.kl_quantiles['median']:.6f}" in median

    assert cli.main([*compare, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kl"], report["kl_error"]) == expected.kl
    assert report["kl_quantiles"] == expected.kl_quantiles
    assert (report["same_top"], report["kv_type"]) == (expected.same_top.value, "q8_0")


def test_command_shows_the_running_perplexity(
    tiny_path: Path, text_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("phi3c.cli.progress.INTERVAL", 0)
    assert cli.main(["perplexity", str(tiny_path), "-f", str(text_path), "--ctx", "64"]) == 0
    assert "\rperplexity [        " in screen.getvalue()
    assert " so far\x1b[K" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")


def test_command_refuses(
    tiny_path: Path,
    text_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def usage_error(*argv: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["perplexity", str(tiny_path), *argv])
        return capsys.readouterr().err

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "give -f FILE" in usage_error()
    assert "cannot read" in usage_error("-f", str(tmp_path / "absent"))
    assert "no -f" in usage_error("--kl-base", "x", "-f", str(text_path))
    assert "--stride" in usage_error("--kl-base", "x", "--stride", "5")
    assert cli.main(["perplexity", str(tiny_path), "--kl-base", str(text_path)]) == 1
    assert "is no file of log-probabilities" in capsys.readouterr().err
    assert cli.main(["perplexity", str(tiny_path), "-f", str(text_path), "--ctx", "400"]) == 2
    assert "400 are needed" in capsys.readouterr().err
