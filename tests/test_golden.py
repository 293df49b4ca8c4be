"""Tiny models, and real weights with a window, against what Hugging Face transformers computed for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from goldens import CASES, FOLDER, WINDOW_SCORED, WINDOWS, Golden, golden, is_quantized, tensors_sha256
from models import fuse_llama_to_phi3
from numpy.typing import NDArray
from oracle import Oracle, log_softmax

import phi3c
from phi3c.gguf import GGUFFile, write_gguf

F32 = NDArray[np.float32]

# Where all weights are floats: largest error of a logit, relative to the largest logit of its row, for up to
# four layers. Keys and values in half precision are what remains; errors add up as the root of the depth.
FLOAT_ERROR = 2e-3
FLOAT_KL = 1e-5

# The oracle on NumPy against the one on torch: float32 sums in another order, and angles of rotation that
# transformers computes in float32 (2200 positions: 1e-4 radians).
ORACLE_ERROR = 2e-4

# The golden's noise is what the plainest 8-bit activations, 32 values to a scale, do to a logit in
# transformers itself, root mean square. The difference of two logits has 2^0.5 times that; five times, and it
# is decided.
DECIDED = 5 * 2**0.5

# phi3c's own error of a logit over that noise; divergence goes with the square. The range of 32 values ends
# up to an eighth of its block's beyond what it needs, which makes the scales of such random models 1.08 times
# as coarse on average. The rest is chance: measured 1.01 to 1.15.
NOISE_RATIO = 1.3


@dataclass(frozen=True)
class Run:
    """A case's file, its figures, and what phi3c and the oracle on NumPy make of its prompts."""

    name: str
    path: Path
    golden: Golden
    model: phi3c.Model
    logits: list[F32]
    oracle: list[F32]


LONG = [name for name, case in CASES.items() if any(n > 1000 for n, _ in case.prompts)]


@pytest.fixture(scope="module", params=[name for name in CASES if name not in LONG])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    name = request.param
    path = CASES[name].write(tmp_path_factory.mktemp("golden") / "model.gguf")
    figures, oracle = golden(name), Oracle(path)
    prompts = [prompt.ids.tolist() for prompt in figures.prompts]
    with phi3c.Model(path) as model:
        model.tokenizer.stop_ids = frozenset()  # transformers knew of none either
        yield Run(
            name,
            path,
            figures,
            model,
            [model.logits(ids) for ids in prompts],
            [oracle.logits(ids) for ids in prompts],
        )


def relative_error(actual: F32, expected: F32) -> float:
    """Largest error in a row over the row's largest magnitude; the worst row counts."""
    return float((np.abs(actual - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


def margin_needed(run: Run) -> float:
    """The oracle's lead of the best token over the second, from which phi3c has to agree."""
    if is_quantized(run.name):
        return DECIDED * run.golden.noise
    return 2 * FLOAT_ERROR * max(float(np.abs(prompt.logits).max()) for prompt in run.golden.prompts)


def test_the_weights_are_those_of_the_golden(run: Run) -> None:
    assert tensors_sha256(run.path) == run.golden.sha256, "tests/models.py has changed: make goldens"


def test_the_oracle_on_numpy_is_transformers(run: Run) -> None:
    for logits, prompt in zip(run.oracle, run.golden.prompts, strict=True):
        assert relative_error(logits[prompt.rows], prompt.logits) < ORACLE_ERROR
        behind = log_softmax(logits)[np.arange(len(prompt.ids) - 1), prompt.ids[1:]]
        np.testing.assert_allclose(behind, prompt.next_logprob, rtol=0, atol=20 * ORACLE_ERROR)


def test_logits(run: Run) -> None:
    for logits, oracle, prompt in zip(run.logits, run.oracle, run.golden.prompts, strict=True):
        if is_quantized(run.name):
            assert float(np.sqrt(np.square(logits - oracle).mean())) < NOISE_RATIO * run.golden.noise
        else:
            assert relative_error(logits[prompt.rows], prompt.logits) < FLOAT_ERROR


def test_top_tokens(run: Run) -> None:
    for logits, prompt in zip(run.logits, run.golden.prompts, strict=True):
        decided = prompt.margin > margin_needed(run)
        assert decided.mean() > 0.3  # else the next line says nothing
        np.testing.assert_array_equal(logits.argmax(axis=1)[decided], prompt.top[decided])


def test_divergence(run: Run) -> None:
    """KL(oracle || phi3c), averaged over positions, beside that of 8-bit activations in transformers."""
    for logits, oracle in zip(run.logits, run.oracle, strict=True):
        p, q = log_softmax(oracle), log_softmax(logits)
        kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
        bound = NOISE_RATIO**2 * run.golden.noise_kl if is_quantized(run.name) else FLOAT_KL
        assert kl < bound


def test_greedy_generation(run: Run) -> None:
    """Token by token through phi3c's own cache, until transformers itself is undecided."""
    for prompt in run.golden.prompts:
        n = len(prompt.greedy)
        if n == 0:
            continue
        generated = run.model.generate(prompt.ids.tolist(), max_tokens=n, temperature=0).token_ids
        different = np.flatnonzero(np.array(generated) != prompt.greedy)
        if len(different):
            assert different[0] >= n / 2 or is_quantized(run.name)
            assert prompt.greedy_margin[different[0]] < margin_needed(run)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.llama])
def test_the_phi3_twin_of_a_llama_file(name: str, tmp_path: Path) -> None:
    """The goldens are of the `llama` file, read by transformers: its order of rows, not our idea of it."""
    (prompt,) = golden(name).prompts
    twin = fuse_llama_to_phi3(CASES[name].write(tmp_path / "llama.gguf"), tmp_path / "phi3.gguf")
    with phi3c.Model(twin) as model:
        logits = model.logits(prompt.ids.tolist())
    assert relative_error(logits[prompt.rows], prompt.logits) < FLOAT_ERROR


@pytest.mark.parametrize("name", LONG)
def test_long_prompts(name: str, tmp_path: Path) -> None:
    (prompt,) = golden(name).prompts
    path, ids = CASES[name].write(tmp_path / "model.gguf"), prompt.ids.tolist()
    assert tensors_sha256(path) == golden(name).sha256, "tests/models.py has changed: make goldens"
    with phi3c.Model(path) as model:
        logits = model.logits(ids)
        bound = FLOAT_ERROR * max(1.0, model.config.block_count / 4) ** 0.5
        assert relative_error(logits[prompt.rows], prompt.logits) < bound
        decided = prompt.margin > 2 * bound * np.abs(prompt.logits).max()
        assert decided.mean() > 0.3
        np.testing.assert_array_equal(logits.argmax(axis=1)[decided], prompt.top[decided])
        if len(prompt.greedy):
            generated = model.generate(ids, max_tokens=len(prompt.greedy), temperature=0).token_ids
            assert list(generated) == prompt.greedy.tolist()


# --- the perplexity of a long text's last thousand tokens, with a window and without ---


def perplexity(logprobs: NDArray[np.floating]) -> float:
    return float(np.exp(-logprobs.mean(dtype=np.float64)))


def last_logprobs(path: Path, ids: list[int], n: int) -> NDArray[np.float64]:
    """Log-probabilities of the last `n` ids."""
    with phi3c.Model(path, n_ctx=4096) as model:
        return np.array(model.score(ids[-n:], context=ids[:-n]).logprobs)


def with_window(source: Path, target: Path, window: int) -> Path:
    """A copy of a `phi3` file with another sliding window; 0 is none."""
    with GGUFFile(source) as file:
        metadata = dict(file.metadata) | {"phi3.attention.sliding_window": window}
        tensors = [(name, info.shape, info.type, file.data(name)) for name, info in file.tensors.items()]
        write_gguf(target, metadata, tensors)
    return target


def test_perplexity_of_a_random_model_s_last_thousand_tokens(tmp_path: Path) -> None:
    name = "window of 600, 3500 tokens"
    (prompt,) = golden(name).prompts
    path, ids = CASES[name].write(tmp_path / "model.gguf"), prompt.ids.tolist()
    expected = perplexity(prompt.next_logprob[-1000:])
    assert perplexity(last_logprobs(path, ids, 1000)) == pytest.approx(expected, rel=1e-4)
    without = with_window(path, tmp_path / "without.gguf", 0)
    assert perplexity(last_logprobs(without, ids, 1000)) != pytest.approx(expected, rel=1e-2)


def test_perplexity_of_real_weights_last_thousand_tokens(shared: Path, tmp_path: Path) -> None:
    path = shared / "models/smollm2-135m-phi3-q4_k_m.gguf"
    with np.load(FOLDER / "window.npz") as arrays:
        ids, logprobs = arrays["ids"].tolist(), dict(zip(WINDOWS, arrays["logprobs"], strict=True))
        assert tensors_sha256(path) == str(arrays["sha256"])
    assert perplexity(logprobs[256]) != pytest.approx(perplexity(logprobs[None]), rel=0.03)
    windowed = with_window(path, tmp_path / "window.gguf", 256)
    for file, expected in ((windowed, logprobs[256]), (path, logprobs[None])):
        actual = last_logprobs(file, ids, WINDOW_SCORED)
        # Rounded activations move a log-probability by some 0.05, so the mean of a thousand by 0.002.
        assert perplexity(actual) == pytest.approx(perplexity(expected), rel=0.01)
        assert np.corrcoef(actual, expected)[0, 1] > 0.999
