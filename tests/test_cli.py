"""cli/: arguments, streams and exit codes with a stand-in model; then the real thing on the demo model."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import PHI4_MINI as PHI4_MINI_TOKENS
from chat_models import write_chat_model
from chat_templates import PHI4_MINI
from models import store_as, write_tiny_phi3
from vocabularies import CONTROL, spm_metadata

import phi3c
from phi3c import cli, errors
from phi3c.cli.progress import ProgressBar
from phi3c.completion import Completion, Timings, Usage
from phi3c.gguf import write_gguf


class StandIn:
    """Has the surface of Model and keeps what it was called with."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # noqa: RUF012
    pieces: list[str | BaseException] = ["Hello", "", " there"]  # noqa: RUF012
    thoughts: list[str] = []  # noqa: RUF012
    profile = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("load", args, kwargs))

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *args: object) -> None:
        self.calls.append(("close", (), {}))

    def generate(self, *args: Any, **kwargs: Any) -> StandIn:
        self.calls.append(("generate", args, kwargs))
        return self

    def chat(self, *args: Any, **kwargs: Any) -> StandIn:
        self.calls.append(("chat", args, kwargs))
        return self

    def __iter__(self) -> Iterator[Any]:
        for thought in self.thoughts:
            yield types.SimpleNamespace(text="", reasoning=thought)
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield types.SimpleNamespace(text=piece, reasoning="")

    def result(self) -> Any:
        return Completion(
            text="Hello there",
            token_ids=(7, 8),
            finish_reason="stop",
            stop_detail="eog:<|end|>",
            usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0),
            timings=Timings(12.0, prompt_ms=30.0, generation_ms=20.0, prompt_tokens=3, generation_tokens=1),
            seed=11,
            logprobs=None,
            reasoning="".join(self.thoughts),
        )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    """Model replaced, and a file that PHI3C_MODEL names."""
    model = tmp_path / "model.gguf"
    model.touch()
    monkeypatch.setenv("PHI3C_MODEL", str(model))
    monkeypatch.setitem(sys.modules, "phi3c.model", types.SimpleNamespace(Model=StandIn))
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setattr(StandIn, "pieces", ["Hello", "", " there"])
    monkeypatch.setattr(StandIn, "thoughts", [])
    return StandIn


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


# --- run --------------------------------------------------------------------------------------------------


def test_run_streams_text_and_nothing_else(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", "Hi"]) == 0
    assert capsys.readouterr() == ("Hello there\n", "")
    assert [name for name, _, _ in stand_in.calls] == ["load", "chat", "close"]
    _, (path,), loading = stand_in.calls[0]
    assert path == tmp_path / "model.gguf"
    assert (loading["n_ctx"], loading["n_threads"]) == (None, None)
    _, (messages,), options = stand_in.calls[1]
    assert messages == [{"role": "user", "content": "Hi"}]
    assert options["stream"] is True
    assert options["system"] is None


@pytest.mark.parametrize(("flags", "choice"), [([], "auto"), (["--rope-factors", "long"], "long")])
def test_run_passes_the_rope_factors_on(
    flags: list[str], choice: str, stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *flags, "Hi"]) == 0
    assert stand_in.calls[0][2]["rope_factors"] == choice
    assert "--rope-factors: invalid choice: 'static'" in usage_error(
        capsys, "run", "--rope-factors", "static"
    )


@pytest.mark.parametrize(("flags", "kv_type"), [([], "f16"), (["--kv-type", "q8_0"], "q8_0")])
def test_run_passes_the_type_of_the_cache_on(
    flags: list[str], kv_type: str, stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *flags, "Hi"]) == 0
    assert stand_in.calls[0][2]["kv_type"] == kv_type
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--kv-type", "q4_0", "Hi"])
    assert "q8_0" in capsys.readouterr().err


def test_text_that_ends_a_line_gets_no_second_newline(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.pieces = ["line\n", ""]
    cli.main(["run", "Hi"])
    assert capsys.readouterr().out == "line\n"


def test_sampling_flags_are_the_apis(stand_in: type[StandIn]) -> None:
    from phi3c.sampling import SamplingParams

    flags = (
        "--max-tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.2 "
        "--repeat-last-n 32 --seed 9 --stop END --stop ###"
    )
    more = "--n-ctx 256 --threads 2 --speculate 8 --system Brief."
    cli.main(["run", "Hi", *flags.split(), *more.split()])
    expected = SamplingParams(
        max_tokens=5,
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repeat_penalty=1.2,
        repeat_last_n=32,
        seed=9,
        stop=("END", "###"),
    )
    assert stand_in.calls[1][2]["params"] == expected
    assert stand_in.calls[1][2]["system"] == "Brief."
    loading = stand_in.calls[0][2]
    assert (loading["n_ctx"], loading["n_threads"], loading["speculate"]) == (256, 2, 8)
    assert stand_in.calls[0][2]["n_ctx"] == 256
    assert stand_in.calls[0][2]["n_threads"] == 2


def test_sampling_defaults_are_the_apis(stand_in: type[StandIn]) -> None:
    from phi3c.sampling import SamplingParams

    cli.main(["run", "Hi"])
    assert stand_in.calls[1][2]["params"] == SamplingParams()


def test_raw_skips_the_template(stand_in: type[StandIn]) -> None:
    cli.main(["run", "--raw", "Once upon"])
    assert stand_in.calls[1][:2] == ("generate", ("Once upon",))


def test_nonsense_is_refused_before_loading(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "Hi", "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err
    assert stand_in.calls == []


@pytest.mark.parametrize("argv", [["run"], ["run", "-"]])
def test_prompt_from_standard_input(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grüß\ndich\n".encode())))
    cli.main(argv)
    assert stand_in.calls[1][1][0][0]["content"] == "grüß\ndich"


def test_prompt_from_a_file(
    stand_in: type[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"from a file\r\n")
    cli.main(["run", "-f", str(prompt)])
    assert stand_in.calls[1][1][0][0]["content"] == "from a file"

    prompt.write_bytes(b"a\xff")
    assert "not UTF-8 text: byte 1 is 0xff" in usage_error(capsys, "run", "-f", str(prompt))
    assert "cannot read" in usage_error(capsys, "run", "-f", str(tmp_path / "absent"))
    assert "not both" in usage_error(capsys, "run", "Hi", "-f", str(prompt))


@pytest.mark.usefixtures("stand_in")
def test_usage_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--raw" in usage_error(capsys, "run", "Hi", "--raw", "--system", "x")
    assert "--raw" in usage_error(capsys, "run", "Hi", "--raw", "--chat-template", "x")
    assert "cannot read /absent" in usage_error(capsys, "run", "Hi", "--chat-template", "/absent")
    assert "invalid int" in usage_error(capsys, "run", "Hi", "--top-k", "many")
    usage_error(capsys, "no-such-command")
    usage_error(capsys)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "give a PROMPT" in usage_error(capsys, "run")


@pytest.mark.usefixtures("stand_in")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "Hi", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["text"] == "Hello there"
    assert answer["token_ids"] == [7, 8]
    assert answer["seed"] == 11
    assert answer["usage"]["total_tokens"] == 5
    assert answer["timings"]["load_ms"] == 12.0
    assert answer["timings"]["generation_tokens_per_second"] == 50.0
    assert err == ""


@pytest.mark.parametrize(
    ("no_color", "shown"), [("", "\x1b[2mHm,\x1b[22m\x1b[2m well\x1b[22m\n\n"), ("1", "Hm, well\n\n")]
)
def test_reasoning_is_shown_on_a_terminal(
    stand_in: type[StandIn],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
    shown: str,
) -> None:
    stand_in.thoughts = ["Hm,", "", " well"]
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stderr", Terminal())
    cli.main(["run", "Hi"])
    assert capsys.readouterr().out == "Hello there\n"
    assert isinstance(sys.stderr, Terminal)
    assert sys.stderr.getvalue() == shown


def test_reasoning_is_in_json_and_in_no_pipe(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.thoughts = ["Hm"]
    cli.main(["run", "Hi"])
    assert capsys.readouterr() == ("Hello there\n", "")
    cli.main(["run", "Hi", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["reasoning"]) == ("Hello there", "Hm")


def test_run_takes_a_chat_template(stand_in: type[StandIn], tmp_path: Path) -> None:
    source = "{{ messages[0]['content'] }}\n"
    (tmp_path / "template.jinja").write_text(source)
    cli.main(["run", "Hi", "--chat-template", str(tmp_path / "template.jinja")])
    assert stand_in.calls[0][2]["chat_template"] == source


@pytest.mark.usefixtures("stand_in")
def test_stats_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["run", "Hi", "--stats"])
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    for expected in ("12 ms", "100.0 tok/s", "50.0 tok/s", "30 ms", "peak memory"):
        assert expected in err


def test_stats_say_what_was_read_again(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["run", "Hi", "--stats"])
    assert "read again" not in capsys.readouterr().err
    completion = stand_in().result()
    timings = dataclasses.replace(completion.timings, reprefill_tokens=4097, reprefill_ms=12.4)
    monkeypatch.setattr(stand_in, "result", lambda self: dataclasses.replace(completion, timings=timings))
    cli.main(["run", "Hi", "--stats"])
    assert "read again    4097 tokens, 12 ms\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ChatTemplateError("what happened"), 1),
        (errors.OutOfMemoryError("what happened"), 1),
        (errors.InvalidParameterError("what happened"), 2),
        (errors.UnsupportedModelError("what happened"), 3),
        (errors.TruncatedFileError("what happened", 2, 1), 3),
        (errors.ContextLengthError("what happened", 5, None, 4), 4),
    ],
)
def test_exit_codes(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    stand_in.pieces = ["some", error]
    assert cli.main(["run", "Hi"]) == code
    out, err = capsys.readouterr()
    assert out == "some"
    assert err == "phi3c: error: what happened\n"
    assert stand_in.calls[-1][0] == "close"


def test_debug_log_shows_the_traceback(
    stand_in: type[StandIn], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3C_LOG", "debug")
    stand_in.pieces = [errors.ChatTemplateError("what happened")]
    cli.main(["run", "Hi"])
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.pieces = ["some", KeyboardInterrupt()]
    assert cli.main(["run", "Hi"]) == 130
    assert capsys.readouterr() == ("some", "\n")
    assert stand_in.calls[-1][0] == "close"


def test_missing_model_is_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "Hi", "-m", "phi3mini"]) == 3
    assert "Did you mean phi3-mini?" in capsys.readouterr().err


# --- progress ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_draws_on_a_terminal_and_wipes_itself() -> None:
    screen = Terminal()
    with ProgressBar(screen, patience=0) as bar:
        bar("pack", 50_000_000, 200_000_000)
        drawn = screen.getvalue()
        bar("pack", 200_000_000, 200_000_000)
    assert drawn.startswith("\rpacking weights [######   ")
    assert " 25% " in drawn
    assert screen.getvalue().removeprefix(drawn) == "\r\x1b[K"


@pytest.mark.parametrize(("stage", "unit"), [("download", "MB/s"), ("tg128, 2 threads", "tok/s")])
def test_bar_counts_bytes_or_tokens(stage: str, unit: str) -> None:
    screen = Terminal()
    with ProgressBar(screen, patience=0) as bar:
        bar(stage, 1, 2)
    assert f"\r{stage.replace('download', 'downloading')} [" in screen.getvalue()
    assert f" {unit}\x1b[K" in screen.getvalue()


def test_bar_is_patient() -> None:
    screen = Terminal()
    with ProgressBar(screen, patience=3600) as bar:
        bar("prompt", 1, 2)
    assert screen.getvalue() == ""


def test_bar_is_silent_elsewhere() -> None:
    file = io.StringIO()
    with ProgressBar(file, patience=0) as bar:
        bar("download", 1, 2)
    assert file.getvalue() == ""


class Screen:
    """A terminal of a few rows that knows the control sequences in use."""

    def __init__(self, rows: int) -> None:
        self.rows, self.row, self.column, self.saved = [""] * rows, 0, 0, (0, 0)

    def show(self, text: str) -> None:
        for piece in re.findall(r"\x1b\[[A-Z]|\x1b.|[^\x1b]", text):
            line = self.rows[self.row]
            if piece in ("\n", "\x1bD"):
                if self.row == len(self.rows) - 1:
                    self.rows = [*self.rows[1:], ""]
                else:
                    self.row += 1
                self.column = 0 if piece == "\n" else self.column
            elif piece == "\x1b[A":
                self.row = max(0, self.row - 1)
            elif piece == "\x1b[B":
                self.row = min(len(self.rows) - 1, self.row + 1)
            elif piece == "\x1b7":
                self.saved = self.row, self.column
            elif piece == "\x1b8":
                self.row, self.column = self.saved
            elif piece == "\r":
                self.column = 0
            elif piece == "\x1b[K":
                self.rows[self.row] = line[: self.column]
            else:
                assert piece.isprintable(), piece
                padded = line.ljust(self.column)
                self.rows[self.row] = padded[: self.column] + piece + padded[self.column + 1 :]
                self.column += 1


@pytest.mark.parametrize("n_before", [0, 2])  # in the middle of the screen, and in its last row
def test_bar_amid_an_answer_leaves_it_as_it_is(n_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, screen = Terminal(), Screen(3)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("phi3c.cli.progress.INTERVAL", 0.0)
    screen.show("line\n" * n_before + "The answer")

    def seen() -> Screen:
        screen.show(terminal.getvalue())
        terminal.seek(0)
        terminal.truncate()
        return screen

    with ProgressBar(terminal, patience=0) as bar:
        for done in (1, 2):
            bar("again", done, 4)
            before, below = seen().rows[screen.saved[0] :][:2]
            assert before == "The answer"
            assert re.match(r"reading it all again \[#+ +\] +(25|50)%", below)
        bar("again", 4, 4)
    seen().show(" is\nhere")
    assert [row for row in screen.rows if row] == [*["line"] * max(0, n_before - 1), "The answer is", "here"]


def test_bar_amid_an_answer_that_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with ProgressBar(terminal, patience=0) as bar:
        bar("again", 1, 4)
    assert terminal.getvalue().startswith("\rreading it all again [")
    assert terminal.getvalue().endswith("\r\x1b[K")


# --- inspect, models, doctor ------------------------------------------------------------------------------


def test_inspect_demo(demo_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(demo_path), "--json", "--tensors", "--n-ctx", "1000"]) == 0
    report = json.loads(capsys.readouterr().out)
    # SmolLM2-135M: 49152 x 576 tied embedding; 30 layers of q, o 576², k, v 192 x 576, three 1536 x 576, two
    # norms; the last norm
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 2 * 576
    assert report["parameters"] == 49152 * 576 + 30 * layer + 576
    assert report["tensors"] == 2 + 30 * 9 == sum(report["types"].values())
    assert report["architecture"] == "llama"
    assert report["runs_here"] is True
    # 30 layers, keys and values, 3 heads of 64, 1000 positions; halves, or bytes and a half for 32 of them
    values = 30 * 2 * 3 * 64 * 1000
    assert report["memory"]["kv_bytes"] == {"f16": 2 * values, "q8_0": values + values // 32 * 2}
    assert report["memory"]["weights_bytes"] == sum(t["bytes"] for t in report["tensor_list"])
    assert report["context"] == {
        "context_length": 8192,
        "original_context_length": 8192,
        "sliding_window": None,
    }
    assert (report["rope"]["attn_factor"], report["rope"]["factors_short"]) == (1.0, None)
    assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == 49152
    assert len(report["tensor_list"]) == report["tensors"]

    assert cli.main(["inspect", str(demo_path)]) == 0
    text = capsys.readouterr().out
    assert "134,515,008" in text
    assert "<|im_start|>system" in text


def test_inspect_longrope_and_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = np.linspace(1, 1.5, 16, dtype=np.float32), np.linspace(1, 60, 16, dtype=np.float32)
    path = write_tiny_phi3(
        tmp_path / "tiny.gguf", head_dim=48, rope_dims=32, window=100, factors=factors, original_ctx=128
    )
    assert cli.main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["context"] == {
        "context_length": 512,
        "original_context_length": 128,
        "sliding_window": 100,
    }
    rope = report["rope"]
    assert (rope["dimension_count"], rope["head_dim"]) == (32, 48)
    assert rope["attn_factor"] == pytest.approx(np.sqrt(1 + 2 / 7))
    assert (rope["factors_short"], rope["factors_long"]) == (factors[0].tolist(), factors[1].tolist())
    assert report["memory"]["kv_bytes"].keys() == {"f16"}  # q8_0 needs heads of a multiple of 32

    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "512 tokens, extended from 128; each sees the last 100\n" in text
    assert "base 10000, 32 of 48 dimensions, short factors 1 to 1.5, long factors 1 to 60" in text
    assert "attn_factor 1.133893\n" in text


def test_inspect_a_model_that_phi3c_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from phi3c.gguf import GGMLType, write_gguf

    path = tmp_path / "other.gguf"
    metadata = {"general.architecture": "mamba", "general.name": "evil \x1b[2J name"}
    weights = ("w", (4, 2), GGMLType.F32, np.zeros(8, np.float32).tobytes())
    write_gguf(path, metadata, [weights])
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "phi3c runs it  no: " in text
    assert "mamba" in text
    assert "\x1b" not in text


def test_inspect_names_a_type_without_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64)
    path = store_as(path, tmp_path / "other.gguf", "output.weight", "IQ2_XS")
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert re.search("phi3c runs it  no: .*output.weight is stored as IQ2_XS", text)
    assert "memory         keys and values" in text  # the rest of what is known is shown all the same


def test_inspect_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html></html>")
    assert cli.main(["inspect", str(path)]) == 3
    assert capsys.readouterr().err.startswith("phi3c: error: ")


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model.gguf", PHI4_MINI_TOKENS, PHI4_MINI)


def template_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main(["template", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_template_shows_the_file_s(chat_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert template_of(capsys, chat_path) == PHI4_MINI


def test_template_of_a_file_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chat_model(tmp_path / "model.gguf", {}, None)
    assert cli.main(["template", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "<|end|>" in out
    assert "no chat template" in err


def test_template_lays_messages_out(
    chat_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hü"}]
    request = {"messages": messages, "tools": [{"name": "f"}]}
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    (tmp_path / "request.json").write_text(json.dumps(request))
    text = "<|user|>Hi<|end|><|assistant|>Hü<|end|>"
    assert template_of(capsys, chat_path, tmp_path / "messages.json") == text + "<|assistant|>"
    assert (
        template_of(capsys, chat_path, tmp_path / "messages.json", "--no-generation-prompt")
        == text + "<|endoftext|>"
    )
    with_tools = template_of(capsys, chat_path, tmp_path / "request.json")
    assert with_tools.endswith('<|tool|>[{"name": "f"}]<|/tool|><|end|>' + text + "<|assistant|>")
    (tmp_path / "bare.jinja").write_text("{{ messages[1]['content'] }}")
    other = ["--chat-template", tmp_path / "bare.jinja"]
    assert template_of(capsys, chat_path, tmp_path / "messages.json", *other) == "Hü"

    stdin = json.dumps([{"role": "user", "content": "a<|end|>"}]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    ids = [int(id) for id in template_of(capsys, chat_path, "-", "--ids").split()]
    with phi3c.Model(chat_path) as model:
        assert model.detokenize(ids, skip_special=False) == "<|user|>a<|end|><|end|><|assistant|>"
        end = model.tokenizer.special_tokens["<|end|>"]
        assert ids.count(end) == 1


def test_template_takes_messages_after_its_flags(
    chat_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = tmp_path / "messages.json"
    messages.write_text('[{"role": "user", "content": "Hi"}]')
    assert cli.main(["template", str(chat_path), str(messages), "--ids"]) == 0
    ids = capsys.readouterr().out
    assert cli.main(["template", str(chat_path), "--ids", str(messages)]) == 0
    assert capsys.readouterr().out == ids


def test_template_on_a_terminal_is_printable(
    chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.jinja").write_text("\x1b[2J")
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.main(["template", str(chat_path), "--chat-template", str(tmp_path / "evil.jinja")])
    assert isinstance(sys.stdout, Terminal)
    assert sys.stdout.getvalue() == "\\x1b[2J\n"


def test_template_usage(chat_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "messages.json"
    for text, complaint in (
        ("{", "is not JSON"),
        ("3", "holds neither"),
        ('{"messages": 3}', "holds neither"),
        ('{"messages": [], "tools": 3}', "the tools are no list"),
    ):
        path.write_text(text)
        assert complaint in usage_error(capsys, "template", str(chat_path), str(path))
    path.write_bytes(b"\xff")
    assert "not UTF-8" in usage_error(capsys, "template", str(chat_path), str(path))
    assert "need MESSAGES" in usage_error(capsys, "template", str(chat_path), "--ids")
    path.write_text("[]")
    assert cli.main(["template", str(chat_path), str(path)]) == 2


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf" in out
    assert "demo" in out


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3C_NUM_THREADS", "3")
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] == 3
    assert facts["thread_derivation"] == "3 threads from PHI3C_NUM_THREADS"
    assert facts["chosen"] in facts["instruction_sets"]
    assert "scalar" in facts["instruction_sets"]
    assert cli.main(["doctor"]) == 0
    assert "3 threads from PHI3C_NUM_THREADS" in capsys.readouterr().out


# --- as a process -----------------------------------------------------------------------------------------

PHI3C = [sys.executable, "-m", "phi3c"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from phi3c.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'tokenizers', 'huggingface_hub', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_version() -> None:
    done = subprocess.run([*PHI3C, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"phi3c {phi3c.__version__}\n"


def test_demo_answers(demo_path: Path) -> None:
    command = [*PHI3C, "run", "-m", str(demo_path), "What is the capital of France?"]
    command += ["--temperature", "0", "--max-tokens", "24", "--stats"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert "Paris" in done.stdout
    assert "tok/s" in done.stderr
    assert "\r" not in done.stderr


def test_demo_as_json_equals_the_api(demo_path: Path, demo_model: Any) -> None:
    command = [*PHI3C, "run", "-m", str(demo_path), "--raw", "--json", "--seed", "5", "--max-tokens", "8"]
    done = subprocess.run([*command, "Once upon a time"], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    completion = demo_model.generate("Once upon a time", seed=5, max_tokens=8)
    assert answer["token_ids"] == list(completion.token_ids)
    assert answer["text"] == completion.text
    assert answer["finish_reason"] == "length"


def test_demo_prompt_too_long_is_4(demo_path: Path) -> None:
    command = [*PHI3C, "run", "-m", str(demo_path), "--n-ctx", "32"]
    done = subprocess.run(command, input="word " * 100, capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stderr.startswith("phi3c: error: ")


def test_a_closed_pipe_ends_quietly(demo_path: Path) -> None:
    command = [*PHI3C, "run", "-m", str(demo_path), "Count from one to one hundred.", "--max-tokens", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_is_130(demo_path: Path) -> None:
    command = [*PHI3C, "run", "-m", str(demo_path), "Write a long story.", "--temperature", "0"]
    # a test run in the background may have SIGINT ignored, and children would inherit that
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, previous)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b"\n"


# --- tokenize ---------------------------------------------------------------------------------------------


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    """A file with a small SPM vocabulary and no weights: 262 is ▁a, 264 ▁ab, 265 <|end|>; bytes from 3."""
    path = tmp_path / "vocabulary.gguf"
    write_gguf(path, spm_metadata(("<|end|>", CONTROL)), [])
    return str(path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "     1  <s>\n   262  ' a'\n   198  b'\\xc3'\n   172  b'\\xa9'\n"),
        (["--no-bos"], "   262  ' a'\n   198  b'\\xc3'\n   172  b'\\xa9'\n"),
        (["--ids"], "1 262 198 172\n"),
        (["--ids", "--no-bos"], "262 198 172\n"),
        (["--pieces", "--add-bos"], "<s>\n' a'\nb'\\xc3'\nb'\\xa9'\n"),
    ],
)
def test_tokenize(
    vocabulary: str, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokenize", vocabulary, "aé", *flags]) == 0
    assert capsys.readouterr() == (expected, "")


def test_tokenize_reads_special_tokens_only_when_told(
    vocabulary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["tokenize", vocabulary, "--ids", "--no-bos", "--special", "a<|end|>"])
    assert capsys.readouterr().out == "262 265\n"
    cli.main(["tokenize", vocabulary, "--ids", "--no-bos", "a<|end|>"])
    assert "265" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1 264 265 262", "[1, 264, 265, 262]\n"])
def test_tokenize_puts_ids_together_again(
    vocabulary: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokenize", vocabulary, "--decode", text]) == 0
    assert capsys.readouterr().out == "ab a\n"
    assert cli.main(["tokenize", vocabulary, "--decode", "--special", text]) == 0
    assert capsys.readouterr().out == "<s>ab<|end|>a\n"


def test_tokenize_takes_a_file_or_standard_input(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"ab\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\n")))
    for source in (["-f", str(text)], []):
        cli.main(["tokenize", vocabulary, "--ids", *source])
        assert capsys.readouterr().out == "1 264\n"


def test_tokenize_refuses_nonsense(
    vocabulary: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not both" in usage_error(capsys, "tokenize", vocabulary, "a", "-f", "b")
    assert "'x' is no token id" in usage_error(capsys, "tokenize", vocabulary, "--decode", "1 x")
    assert "'-1' is no token id" in usage_error(capsys, "tokenize", vocabulary, "--decode", " -1")
    assert "unrecognized" in usage_error(capsys, "tokenize", vocabulary, "--decode", "--what")
    assert "unrecognized" in usage_error(capsys, "tokenize", vocabulary, "a", "--ids", "b")
    assert "not allowed with" in usage_error(capsys, "tokenize", vocabulary, "--ids", "--pieces", "a")
    assert cli.main(["tokenize", vocabulary, "--decode", "266"]) == 2
    assert "266" in capsys.readouterr().err
    assert cli.main(["tokenize", str(tmp_path / "absent.gguf"), "a"]) == 3


def test_tokenize_reads_no_weights(demo_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command works on the head of a file: what is behind it was never there."""
    before = set(sys.modules)
    assert cli.main(["tokenize", str(demo_path), "--ids", "Hello world"]) == 0
    out = capsys.readouterr().out
    assert cli.main(["tokenize", str(demo_path), "--decode", out]) == 0
    assert capsys.readouterr().out == "Hello world\n"
    assert not {"phi3c.model", "phi3c.engine"} & (set(sys.modules) - before)
