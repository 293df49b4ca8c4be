"""Quantisers against the best there is and llama.cpp's, mixes against llama.cpp's, and the written file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from blocks import (
    FLOAT_TYPES,
    LAYOUTS,
    block_bytes,
    block_elements,
    dequantize,
    quantize_simple,
    random_blocks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_tiny_phi3
from numpy.typing import NDArray
from quantize_samples import SAMPLES, TINY, by_role, samples, write_tiny

import phi3c
from phi3c import cli
from phi3c._kernels import Pool, encode
from phi3c.config import Config
from phi3c.errors import InvalidParameterError, ModelWriteError, NumericalError, UnsupportedQuantError
from phi3c.gguf import GGMLType, GGUFFile, Value, write_gguf
from phi3c.quantizer import FLOATS, MIXES, SHORT, target_type

F32 = NDArray[np.float32]
GOLDEN = json.loads((Path(__file__).parent / "golden/llama_quantize.json").read_text(encoding="utf-8"))
ENCODED = tuple(GOLDEN["error"])  # quantised types that there are quantisers for
IDS: list[int] = np.random.default_rng(5).integers(0, 300, 40).tolist()


def quantized(type_name: str, x: F32, threads: int = 1) -> NDArray[np.uint8]:
    blocks = np.empty(x.size // block_elements(type_name) * block_bytes(type_name), np.uint8)
    encode(blocks, GGMLType[type_name], x.view(np.uint8).ravel(), GGMLType.F32, x.size, Pool(threads))
    return blocks


def restored(type_name: str, x: F32) -> F32:
    return dequantize(type_name, quantized(type_name, x), x.size).reshape(x.shape)


def rms(x: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# --- how near the weights come ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, F32]:
    return samples()


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("type_name", ENCODED)
def test_no_worse_than_llama_cpp(tensors: dict[str, F32], type_name: str, sample: str) -> None:
    """benchmarks/quantization.py wrote down what llama.cpp's quantisers leave of the same tensors."""
    x = tensors[sample]
    assert rms(restored(type_name, x) - x) <= 1.02 * GOLDEN["error"][type_name][sample]


def best_of_a_grid(x: F32, low: int, high: int, *, minimum: bool) -> float:
    """Least root mean square error of x (groups, n) on lines d q + m, by trying hundreds of them a group."""
    best = np.full(len(x), np.inf)
    if not minimum:
        largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
        for top in np.arange(0.55, 1.5, 0.002) * low:
            d = largest / top
            best = np.minimum(best, np.mean((np.clip(np.rint(x / d), low, high) * d - x) ** 2, axis=1))
        return float(np.sqrt(best.mean()))
    ends, span = x.min(1, keepdims=True), np.ptp(x, axis=1, keepdims=True)
    for inner in np.arange(-0.04, 0.2, 0.008):
        for outer in np.arange(-0.04, 0.2, 0.008):
            m, d = ends + inner * span, span * (1 - inner - outer) / high
            best = np.minimum(
                best, np.mean((np.clip(np.rint((x - m) / d), 0, high) * d + m - x) ** 2, axis=1)
            )
    return float(np.sqrt(best.mean()))


@pytest.mark.parametrize(
    ("type_name", "low", "high", "minimum"),
    [("Q4_0", -8, 7, False), ("Q5_0", -16, 15, False), ("Q4_1", 0, 15, True), ("Q5_1", 0, 31, True)],
)
def test_near_the_best_line_of_each_group(type_name: str, low: int, high: int, minimum: bool) -> None:
    x = np.random.default_rng(1).standard_normal((400, 32), np.float32)
    best = best_of_a_grid(x, low, high, minimum=minimum)
    assert rms(restored(type_name, x) - x) < 1.015 * best


@pytest.mark.parametrize(
    ("type_name", "n", "low", "high", "minimum"),
    [
        ("Q2_K", 16, 0, 3, True),
        ("Q3_K", 16, -4, 3, False),
        ("Q4_K", 32, 0, 15, True),
        ("Q5_K", 32, 0, 31, True),
        ("Q6_K", 16, -32, 31, False),
    ],
)
def test_k_types_lose_little_to_rounded_scales(
    type_name: str, n: int, low: int, high: int, minimum: bool
) -> None:
    """Against groups whose scales need not be multiples of anything."""
    x = np.random.default_rng(2).standard_normal((64, 256), np.float32)
    best = best_of_a_grid(x.reshape(-1, n), low, high, minimum=minimum)
    assert rms(restored(type_name, x) - x) < 1.08 * best


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0"])
def test_types_without_a_choice_are_those_of_gguf(type_name: str) -> None:
    x = np.random.default_rng(3).standard_normal((50, 96), np.float32)
    x[0], x[1] = 0, x[1] * np.float32(1e-7)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(quantized(type_name, x), theirs.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q8_0"])
def test_what_the_type_can_hold_is_kept(type_name: str) -> None:
    """Weights that are whole multiples of a scale, every code among them."""
    low, high = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q4_1": (0, 15), "Q5_1": (0, 31), "Q8_0": (-127, 127)}[
        type_name
    ]
    rng = np.random.default_rng(4)
    codes = rng.integers(low, high + 1, (64, 32)).astype(np.float32)
    codes[:, 0], codes[:, 1] = low, high
    x = codes * (2.0 ** rng.integers(-9, 0, (64, 1))).astype(np.float32)
    if type_name.endswith("_1"):
        x -= np.float32(0.25)
    np.testing.assert_array_equal(restored(type_name, x), x)


HALF_MAX = 65504.0
ODD = {
    "zeros": np.zeros(256),
    "one value": np.full(256, 0.3),
    "below zero": np.full(256, -0.3),
    "largest": np.full(256, HALF_MAX),
    "both ends": np.tile([HALF_MAX, -HALF_MAX], 128),
    "first": np.r_[1.0, np.zeros(255)],
    "last": np.r_[np.zeros(255), -1.0],
    "outlier": np.r_[100.0, np.full(255, 0.01)],
    "rising": np.arange(256) / 256,
    "falling": -np.arange(256) / 256,
    "subnormal": np.full(256, 1e-40),
    "faint": np.full(256, 3e-8),
}


@pytest.mark.parametrize("type_name", ENCODED)
@pytest.mark.parametrize("x", ODD.values(), ids=ODD.keys())
def test_odd_blocks(type_name: str, x: NDArray[np.float64]) -> None:
    """A code's step away at most, and the same groups of zeros."""
    weights = x.astype(np.float32)
    found = restored(type_name, weights)
    codes = {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q4_0": 15, "Q4_1": 15}.get(type_name, 31)
    assert np.isfinite(found).all()
    assert np.abs(found - weights).max() <= np.ptp(np.r_[weights, 0]) / codes + 2.0**-24 * 64
    assert not found[weights == 0].any() or weights.any()


@given(seed=st.integers(0, 2**32 - 1), type_name=st.sampled_from(ENCODED), spread=st.floats(0, 4))
@settings(max_examples=60)
def test_better_than_rounding_over_the_range(seed: int, type_name: str, spread: float) -> None:
    """On blocks of uneven groups; tests/blocks.py takes each group's range as it is."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((8, 256))
        * np.exp(spread * rng.standard_normal((8, 256 // 16)).repeat(16, 1))
        / 50
    )
    x = np.clip(x, -60000, 60000).astype(np.float32)
    simple = dequantize(type_name, quantize_simple(type_name, x), x.size).reshape(x.shape)
    assert rms(restored(type_name, x) - x) <= 1.0001 * rms(simple - x)


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", [*FLOAT_TYPES, *ENCODED])
def test_the_number_of_threads_changes_nothing(type_name: str) -> None:
    x = np.random.default_rng(6).standard_normal((70, 2048), np.float32)
    np.testing.assert_array_equal(quantized(type_name, x, 3), quantized(type_name, x, 1))


@pytest.mark.parametrize(
    "type_name", [name for name in (*FLOAT_TYPES, *ENCODED) if block_elements(name) < 256]
)
def test_a_row_that_ends_inside_256(type_name: str) -> None:
    """The blocks at the end are those they would be anywhere else."""
    x = np.random.default_rng(7).standard_normal((4, 256), np.float32).ravel()
    whole = quantized(type_name, x).reshape(len(x) // 32, -1)
    np.testing.assert_array_equal(quantized(type_name, x[: 256 + 96]).reshape(11, -1), whole[:11])


@pytest.mark.parametrize("source", LAYOUTS)
def test_a_source_counts_as_its_floats(source: str) -> None:
    data = random_blocks(source, 1024 // block_elements(source) * 8, np.random.default_rng(8))
    n = len(data) // block_bytes(source) * block_elements(source)
    floats = np.ascontiguousarray(dequantize(source, data, n))
    found = np.empty(n // 256 * 144, np.uint8)
    encode(found, GGMLType.Q4_K, data, GGMLType[source], n, Pool(1))
    np.testing.assert_array_equal(found, quantized("Q4_K", floats))


def test_what_half_precision_cannot_hold_is_refused() -> None:
    for value in (np.inf, -np.inf, np.nan, 65536.0, -1e30):
        x = np.zeros(512, np.float32)
        x[300] = value
        for type_name in (*FLOAT_TYPES, *ENCODED):
            if type_name in ("F32", "BF16") and np.isfinite(value):
                assert restored(type_name, x)[300] == pytest.approx(value, rel=2**-8)
            else:
                with pytest.raises(OverflowError):
                    quantized(type_name, x)


def test_buffers_must_fit() -> None:
    x = np.zeros(256, np.float32).view(np.uint8)
    for blocks, type, n in (
        (np.empty(143, np.uint8), 12, 256),
        (np.empty(144, np.uint8), 12, 128),
        (np.empty(144, np.uint8), 17, 256),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            encode(blocks, type, x, 0, n, Pool(1))


# --- mixes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [name for name, mix in MIXES.items() if mix.base not in FLOATS])
@pytest.mark.parametrize("model", TINY)
def test_mixes_are_those_of_llama_cpp(tmp_path: Path, model: str, mix: str) -> None:
    with GGUFFile(write_tiny(tmp_path / "tiny.gguf", model)) as file:
        config = Config.from_gguf(file)
        types = {
            tensor.name: target_type(MIXES[mix], config, tensor)
            for tensor in file.tensors.values()
            if len(tensor.shape) > 1
        }
    assert by_role(types) == GOLDEN["types"][model][mix]


def test_file_types_are_those_of_the_format() -> None:
    for name, mix in MIXES.items():
        spelling = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
        assert mix.file_type == gguf.LlamaFileType[spelling]


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_phi3(
        tmp_path_factory.mktemp("quantize") / "f32.gguf", head_dim=64, ffn=512, vocab=300, layers=3
    )


def weights_of(path: Path) -> F32:
    with GGUFFile(path) as file:
        return np.concatenate(
            [dequantize(t.type.name, file.data(t.name), t.rows * t.columns) for t in file.tensors.values()]
        )


@pytest.mark.parametrize("type_name", [*MIXES, *SHORT])
def test_the_file_runs(f32: Path, tmp_path: Path, type_name: str) -> None:
    """Its logits are as near to the source's as its weights are, but for a factor and rounded activations."""
    out = tmp_path / "out.gguf"
    phi3c.quantize(f32, out, type_name.lower())
    with phi3c.Model(f32) as model, phi3c.Model(out) as small:
        logits, found = model.logits(IDS), small.logits(IDS)
    weights = weights_of(f32)
    lost = rms(weights_of(out) - weights) / rms(weights)
    assert (lost == 0) == (type_name == "F32")
    assert rms(found - logits) / rms(logits) <= 8 * lost + (
        0 if MIXES.get(type_name, MIXES["Q4_K_M"]).base in FLOATS else 0.02
    )


def test_all_but_the_weights_is_carried_over(f32: Path, tmp_path: Path) -> None:
    phi3c.quantize(f32, tmp_path / "out.gguf", "Q4_K_M")
    with GGUFFile(f32) as source, GGUFFile(tmp_path / "out.gguf") as file:
        assert list(file.tensors) == list(source.tensors)
        for name, tensor in source.tensors.items():
            assert file.tensors[name].shape == tensor.shape
            if len(tensor.shape) == 1:
                assert file.tensors[name].type is GGMLType.F32
                np.testing.assert_array_equal(file.data(name), source.data(name))
        added = {"general.file_type": 15, "general.quantization_version": 2}
        for key, value in (source.metadata | added).items():
            np.testing.assert_array_equal(file.metadata[key], value)
        assert file.metadata.keys() == source.metadata.keys() | added.keys()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_file_on_any_number_of_threads(f32: Path, tmp_path: Path, threads: int) -> None:
    phi3c.quantize(f32, tmp_path / "one.gguf", "Q4_K_M", n_threads=1)
    phi3c.quantize(f32, tmp_path / "more.gguf", "Q4_K_M", n_threads=threads)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "more.gguf").read_bytes()


def test_a_quantised_source_is_refused_unless_asked_for(f32: Path, tmp_path: Path) -> None:
    small, out = tmp_path / "q8_0.gguf", tmp_path / "q4_0.gguf"
    phi3c.quantize(f32, small, "Q8_0")
    with pytest.raises(InvalidParameterError, match=r"is quantised already .*--allow-requantize"):
        phi3c.quantize(small, out, "Q4_0")
    assert not out.exists()
    phi3c.quantize(small, out, "Q8_0", allow_requantize=True)
    assert out.read_bytes() == small.read_bytes()  # tensors that have the type already are copied
    phi3c.quantize(small, out, "Q4_0", allow_requantize=True, overwrite=True)
    with GGUFFile(out) as file:
        assert file.tensors["blk.0.ffn_up.weight"].type is GGMLType.Q4_0


def test_a_source_in_a_type_that_is_not_read(f32: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    with GGUFFile(f32) as file:
        tensors = [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        name, shape, _, _ = next(tensor for tensor in tensors if tensor[0] == "blk.0.ffn_up.weight")
        replaced = (name, shape, GGMLType.TQ1_0, np.zeros(shape[0] * shape[1] // 256 * 54, np.uint8))
        write_gguf(strange, file.metadata, [replaced if t[0] == name else t for t in tensors])
    with pytest.raises(UnsupportedQuantError, match="TQ1_0"):
        phi3c.quantize(strange, tmp_path / "out.gguf", "Q8_0", allow_requantize=True)


def test_weights_that_do_not_fit_are_named(f32: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.gguf", tmp_path / "out.gguf"
    with GGUFFile(f32) as file:
        data = {name: np.array(file.data(name)) for name in file.tensors}
        data["blk.1.attn_output.weight"].view(np.float32)[77] = np.nan
        metadata: dict[str, Value] = file.metadata
        write_gguf(broken, metadata, [(t.name, t.shape, t.type, data[t.name]) for t in file.tensors.values()])
    with pytest.raises(NumericalError, match=r"blk\.1\.attn_output\.weight cannot become Q4_K"):
        phi3c.quantize(broken, out, "Q4_K_S")
    assert os.listdir(tmp_path) == ["broken.gguf"]


def test_what_is_there_is_not_replaced_unasked(f32: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(InvalidParameterError, match="exists"):
        phi3c.quantize(f32, out, "Q8_0")
    assert out.read_bytes() == b"old"
    phi3c.quantize(f32, out, "Q8_0", overwrite=True)
    with pytest.raises(InvalidParameterError, match="the source itself"):
        phi3c.quantize(f32, f32, "Q8_0", overwrite=True)
    with pytest.raises(InvalidParameterError, match="a folder"):
        phi3c.quantize(f32, tmp_path, "Q8_0", overwrite=True)


def test_an_unknown_type_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"no type 'IQ9_Z'; there are F32, .*Q4_K_M.*, Q4_K"):
        phi3c.quantize(tmp_path / "missing.gguf", tmp_path / "out.gguf", "iq9_z")


def test_a_packed_source_is_refused(f32: Path, tmp_path: Path) -> None:
    phi3c.pack(f32, tmp_path / "packed.gguf")
    with pytest.raises(InvalidParameterError, match="quantise the file it was packed from"):
        phi3c.quantize(tmp_path / "packed.gguf", tmp_path / "out.gguf", "Q8_0")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ModelWriteError if isinstance(failure, OSError) else KeyboardInterrupt):
        phi3c.quantize(f32, tmp_path / "out.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_writing(
    f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelWriteError, match=r"the disk has 0\.00 GB left"):
        phi3c.quantize(f32, tmp_path / "out.gguf", "Q8_0")


def test_progress_counts_the_bytes_of_the_source(f32: Path, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    phi3c.quantize(f32, tmp_path / "out.gguf", "Q8_0", progress=lambda *report: reports.append(report))
    stages, done, totals = (list(column) for column in zip(*reports, strict=True))
    assert set(stages) == {"quantize"}
    with GGUFFile(f32) as file:
        assert set(totals) == {sum(tensor.n_bytes for tensor in file.tensors.values())}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0])


def test_the_command(f32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.gguf")
    assert cli.main(["quantize", str(f32), out, "Q8_0", "--threads", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: ")
    assert "8.5" in captured.out  # bits per weight: 34 bytes for 32, norms besides
    assert captured.err == ""
    assert cli.main(["quantize", out, str(tmp_path / "two.gguf"), "Q4_0"]) == cli.EXIT_USAGE
    assert "--allow-requantize" in capsys.readouterr().err
    assert cli.main(["quantize", out, str(tmp_path / "two.gguf"), "Q4_0", "--allow-requantize"]) == 0
    assert cli.main(["quantize", str(f32), out, "Q5_9"]) == cli.EXIT_USAGE
    assert "no type 'Q5_9'" in capsys.readouterr().err
