"""PHI3C_PROFILE=1: which operations are counted, how often, and that nothing changes. No times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import write_tiny_phi3

from phi3c import Model, _kernels, cli
from phi3c.cli.profile import table
from phi3c.phi3 import Phi3
from phi3c.profile import Phase, ProfiledPhi3, Timing, network

LAYERS, N_BATCH = 3, 4
OF_A_LAYER = ["attn_norm", "attn_qkv", "rope_append", "attend", "attn_output", "ffn_norm", "ffn_up"]
OF_A_LAYER += ["ffn_down"]
OF_A_STEP = ["embed", "output_norm", "output"]
PROMPT = list(range(10))  # chunks of 4, 4 and 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_phi3(tmp_path_factory.mktemp("profile") / "tiny.gguf", layers=LAYERS)


@pytest.fixture
def model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("PHI3C_PROFILE", "1")
    with Model(tiny, n_batch=N_BATCH, n_threads=2) as model:
        yield model


def calls(phase: Phase) -> dict[tuple[str, int | None], int]:
    return {key: timing.calls for key, timing in phase.operations.items()}


def test_decode_counts_every_operation_of_every_layer(model: Model) -> None:
    model.generate(PROMPT, max_tokens=5, temperature=0)
    assert model.profile
    phase = model.profile.decode
    assert (phase.steps, phase.tokens) == (4, 4)  # the first token comes from the prompt
    expected = {(name, layer): 4 for layer in range(LAYERS) for name in OF_A_LAYER}
    assert calls(phase) == expected | {(name, None): 4 for name in OF_A_STEP}
    assert list(phase.operations)[:3] == [("embed", None), ("attn_norm", 0), ("attn_qkv", 0)]


def test_prefill_leaves_out_what_nobody_reads(model: Model) -> None:
    model.generate(PROMPT, max_tokens=1, temperature=0)
    assert model.profile
    phase = model.profile.prefill
    assert (phase.steps, phase.tokens) == (3, 10)
    assert (model.profile.decode.steps, model.profile.decode.operations) == (0, {})
    last = LAYERS - 1
    expected: dict[tuple[str, int | None], int]
    expected = {(name, layer): 3 for layer in range(last) for name in OF_A_LAYER}
    # in the last layer each chunk is attended to, and one row of the last chunk goes on
    expected |= {(name, last): 3 if name in OF_A_LAYER[:4] else 1 for name in OF_A_LAYER}
    expected |= {
        ("keep_rows", last): 3 * 2,
        ("embed", None): 3,
        ("output_norm", None): 1,
        ("output", None): 1,
    }
    assert calls(phase) == expected


def test_times_add_up(model: Model) -> None:
    model.generate(PROMPT, max_tokens=3, temperature=0)
    assert model.profile
    for phase in (model.profile.prefill, model.profile.decode):
        assert all(timing.seconds > 0 for timing in phase.operations.values())
        assert 0 < phase.kernel_seconds < phase.seconds
        assert phase.measuring_seconds > 0
        assert phase.python_seconds > 0
        parts = phase.kernel_seconds + phase.python_seconds + phase.measuring_seconds
        assert parts == pytest.approx(phase.seconds)


def test_bits_are_the_same(model: Model, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHI3C_PROFILE")
    with Model(tiny, n_batch=N_BATCH, n_threads=2) as plain:
        np.testing.assert_array_equal(model.logits(PROMPT), plain.logits(PROMPT))


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_means_that_the_extension_is_called(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("PHI3C_PROFILE", raising=False)
    if value is not None:
        monkeypatch.setenv("PHI3C_PROFILE", value)
    assert network() is Phi3
    assert Phi3._operations is _kernels
    with Model(tiny) as model:
        assert model.profile is None


def test_a_failed_step_is_no_surprise(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations are in the account, so its time must be."""
    phi3 = model._engine._open_parts()[0]
    assert isinstance(phi3, ProfiledPhi3)

    def refuse(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_kernels, "attend", refuse)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_tokens=1)
    assert phi3.profile.prefill.steps == 1
    assert phi3.profile.prefill.python_seconds > 0


def test_table_by_hand() -> None:
    phase = Phase(steps=2, tokens=4, seconds=0.010, measuring_seconds=0.001)
    phase.operations = {
        ("embed", None): Timing(2, 0.001),
        ("attend", 0): Timing(2, 0.002),
        ("attend", 1): Timing(2, 0.003),
    }
    lines = [line.split() for line in table("decode", phase).splitlines()]
    assert lines[1] == ["decode:", "steps", "2,", "tokens", "a", "step", "2.0,", "ms", "a", "step", "5.000"]
    assert ["embed", "2", "0.500", "10.0%"] in lines
    assert ["attend", "4", "2.500", "50.0%"] in lines
    assert ["Python", "1.500", "30.0%"] in lines
    assert ["measuring", "0.500", "10.0%"] in lines
    assert lines[-3:] == [["layer", "attend", "all"], ["0", "1.000", "1.000"], ["1", "1.500", "1.500"]]


def test_the_command_line_prints_it_on_stderr(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PHI3C_PROFILE", "1")
    for command in (
        ["run", "-m", str(tiny), "--raw", "--max-tokens", "3", "--seed", "1", "hello the in on"],
        ["bench", str(tiny), "-p", "4", "-n", "2", "-r", "1"],
    ):
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert "ffn_down" not in out
        for expected in ("prefill: steps", "decode: steps", "ffn_down", "Python"):
            assert expected in err
