"""Packed files: the bits of the original, whole or not at all, and refused where anything does not fit."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from blocks import LAYOUTS, TYPES_OF_32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import store_as, write_tiny_llama, write_tiny_phi3
from numpy.typing import NDArray

import phi3c
from phi3c import _kernels, hub
from phi3c._kernels import Pool
from phi3c.config import Config
from phi3c.errors import (
    CorruptGGUFError,
    InvalidParameterError,
    ModelLoadError,
    ModelWriteError,
    NotGGUFError,
    TruncatedFileError,
    UnsupportedModelError,
    UnsupportedQuantError,
)
from phi3c.gguf import GGMLType, GGUFFile, Value, write_gguf
from phi3c.packed import ModelFile
from phi3c.vocabulary import SPM_MERGES
from phi3c.weights import ReadAhead, Weights

IDS: list[int] = np.random.default_rng(5).integers(0, 300, 70).tolist()  # two pages
Stored = tuple[tuple[int, ...], GGMLType, NDArray[np.uint8]]


def logits_of(path: Path) -> NDArray[np.uint32]:
    with phi3c.Model(path) as model:
        return model.logits(IDS).view(np.uint32)


def assert_same_bits(original: Path, packed: Path) -> None:
    phi3c.pack(original, packed)
    np.testing.assert_array_equal(logits_of(packed), logits_of(original))


# --- the same bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_every_type(tmp_path: Path, type_name: str) -> None:
    # 300 rows of the output: the last panel is not full
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, ffn=512, vocab=300, types=type_name)
    assert_same_bits(path, tmp_path / "packed.gguf")


@pytest.mark.parametrize("type_name", ["F16", "BF16", *TYPES_OF_32])
def test_rows_that_end_inside_a_super_block(tmp_path: Path, type_name: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", heads=6, kv_heads=3, head_dim=48, ffn=352, types=type_name)
    assert_same_bits(path, tmp_path / "packed.gguf")


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q5_0", "Q3_K", "Q6_K"])
def test_tied_embedding(tmp_path: Path, type_name: str) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", head_dim=64, vocab=300, tied=True, types=type_name)
    assert_same_bits(path, tmp_path / "packed.gguf")


def test_llama_parts_of_different_types(tmp_path: Path) -> None:
    types = {"attn_q": "Q4_K", "attn_k": "Q6_K", "attn_v": "Q8_0", "ffn_gate": "Q5_K", "ffn_up": "Q4_0"}
    path = write_tiny_llama(tmp_path / "tiny.gguf", head_dim=64, rope_dims=32, ffn=512, types=types)
    assert_same_bits(path, tmp_path / "packed.gguf")


def test_demo(demo_path: Path, tmp_path: Path) -> None:
    assert_same_bits(demo_path, tmp_path / "packed.gguf")


def test_real_phi3_model(shared: Path, tmp_path: Path) -> None:
    assert_same_bits(shared / "models/smollm2-135m-phi3-q4_k_m.gguf", tmp_path / "packed.gguf")


def test_a_hyper_parameter_in_double_precision_is_kept(tmp_path: Path) -> None:
    """A rotary base that float32 cannot hold: rounded on the way, logits would differ."""
    plain, path = write_tiny_phi3(tmp_path / "plain.gguf"), tmp_path / "double.gguf"
    with GGUFFile(plain) as file:
        metadata = {**file.metadata, "phi3.rope.freq_base": np.float64(10000.0001)}
        write_gguf(
            path, metadata, [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        )
    assert_same_bits(path, tmp_path / "packed.gguf")
    with ModelFile(tmp_path / "packed.gguf") as file:
        assert Config.from_gguf(file).rope_freq_base == 10000.0001


# --- what is in the file ----------------------------------------------------------------------------------


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", types="Q8_0")
    messages = [{"role": "user", "content": "the hello"}]
    with phi3c.Model(path) as model:
        prompt, text = model.apply_chat_template(messages), model.chat(messages, seed=3, max_tokens=8).text
        info = model.info
    packed = tmp_path / "elsewhere" / "packed.gguf"
    packed.parent.mkdir()
    phi3c.pack(path, packed)
    path.unlink()
    with phi3c.Model(packed) as model:
        assert model.apply_chat_template(messages) == prompt
        assert model.chat(messages, seed=3, max_tokens=8).text == text
        assert (model.info.architecture, model.info.n_parameters) == ("phi3", info.n_parameters)
        assert (model.info.layout, info.layout) == ("p16 version 1", None)
        assert model.info.weight_bytes == info.weight_bytes


def test_an_spm_vocabulary_keeps_its_merges(tmp_path: Path, shared: Path) -> None:
    """Phi-3's vocabulary on a tiny model: the packed file tokenises alike, with merges it kept."""
    plain, path, out = tmp_path / "plain.gguf", tmp_path / "spm.gguf", tmp_path / "packed.gguf"
    with GGUFFile(shared / "vocab/ggml-vocab-phi-3.gguf") as file:
        vocabulary = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    write_tiny_phi3(plain, head_dim=16, layers=1, vocab=len(vocabulary["tokenizer.ggml.tokens"]))  # type: ignore[arg-type]
    with GGUFFile(plain) as file:
        metadata = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
        tensors = [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        write_gguf(path, metadata | vocabulary, tensors)
    phi3c.pack(path, out)
    text = (shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8")
    with phi3c.Model(path) as model, phi3c.Model(out) as packed:
        assert packed.tokenize(text) == model.tokenize(text)
    with GGUFFile(out) as file:
        assert len(file.metadata[SPM_MERGES]) > 50_000  # type: ignore[arg-type]


def test_other_readers_are_told_by_the_architecture(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", vocab=300, types="F16")
    phi3c.pack(path, tmp_path / "packed.gguf")
    reader = gguf.GGUFReader(tmp_path / "packed.gguf")
    field = reader.get_field("general.architecture")
    assert field is not None
    assert field.contents() == "phi3c"
    panels = {tensor.name: tensor for tensor in reader.tensors}["output.weight"]
    assert panels.tensor_type == gguf.GGMLQuantizationType.I8
    assert panels.data.shape == (304 * 128 * 2,)  # 300 rows of 128 halves in 19 panels
    assert panels.data_offset % 64 == 0
    with pytest.raises(UnsupportedModelError, match="'phi3c'"), GGUFFile(tmp_path / "packed.gguf") as file:
        Config.from_gguf(file)


def test_panels_are_those_of_the_documentation(tmp_path: Path) -> None:
    """f32: [panel][column][16 rows], rows that are missing are zeros."""
    path = write_tiny_phi3(tmp_path / "tiny.gguf", vocab=300)
    phi3c.pack(path, tmp_path / "packed.gguf")
    with GGUFFile(path) as plain, GGUFFile(tmp_path / "packed.gguf") as packed:
        rows = np.zeros((304, 128), np.float32)
        rows[:300] = plain.data("output.weight").view(np.float32).reshape(300, 128)
        panels = packed.data("output.weight").view(np.float32).reshape(19, 128, 16)
        np.testing.assert_array_equal(panels, rows.reshape(19, 16, 128).swapaxes(1, 2))
        embedding = "token_embd.weight"  # rows are looked up, not multiplied
        assert packed.tensors[embedding].shape == (128, 300)
        np.testing.assert_array_equal(packed.data(embedding), plain.data(embedding))


# --- reading ahead ----------------------------------------------------------------------------------------


def mapped_bytes(path: Path) -> int:
    """Bytes of a file's mappings in this process whose pages are there."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell which pages of a mapping are there")
    found, inside = 0, False
    for line in smaps.read_text().splitlines():
        field = line.split()
        if "-" in field[0]:  # the addresses of a mapping, and its file
            inside = field[-1] == str(path)
        elif inside and field[0] == "Rss:":
            found += 1024 * int(field[1])
    return found


@pytest.mark.parametrize("n_bytes", [1, 65536, 65537, 40 << 20])
def test_every_64_kb_are_touched(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(n_bytes))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        data = np.frombuffer(pages, np.uint8)
        stopped, ahead = _kernels.ReadAhead(), _kernels.ReadAhead()
        stopped.stop()
        stopped.run(data)
        assert mapped_bytes(path) == 0
        ahead.run(data)
        assert mapped_bytes(path) >= -(-n_bytes // 65536) * mmap.PAGESIZE
        ahead.run(data[:0])
        del data  # an array keeps the mapping open


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "phi3c read ahead"]


def test_panels_are_mapped_before_they_are_needed(packed: Path) -> None:
    with ModelFile(packed) as file:
        before = mapped_bytes(packed)
        ahead = ReadAhead(file)
        for thread in readers():
            thread.join()
        ahead.close()
        panels = sum(file.tensors[name].n_bytes for name in file.packed)
        assert mapped_bytes(packed) - before >= (panels // 65536 - 1) * mmap.PAGESIZE


class Endless(_kernels.ReadAhead):
    """Reads until it is stopped."""

    def __init__(self) -> None:
        self.begun, self.stopped = threading.Event(), threading.Event()

    def run(self, file: NDArray[np.uint8]) -> None:
        self.begun.set()
        self.stopped.wait()

    def stop(self) -> None:
        self.stopped.set()


def test_the_reader_ends_with_the_model(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless()
    monkeypatch.setattr("phi3c._kernels.ReadAhead", lambda: endless)
    with phi3c.Model(packed) as model:
        assert endless.begun.wait(10)
        assert len(readers()) == 1
        model.logits(IDS)
    assert readers() == []
    model.close()


def test_the_reader_ends_with_a_model_that_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless()
    monkeypatch.setattr("phi3c._kernels.ReadAhead", lambda: endless)
    with pytest.raises(InvalidParameterError, match="kv_type"):
        phi3c.Model(packed, kv_type="f64")
    assert endless.begun.is_set()
    assert readers() == []


def test_a_model_loads_where_no_thread_is_to_be_had(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected = logits_of(packed)
    monkeypatch.setattr("threading.Thread.start", refuse)
    np.testing.assert_array_equal(logits_of(packed), expected)


def test_an_ordinary_file_is_not_read_ahead(tmp_path: Path) -> None:
    with ModelFile(write_tiny_phi3(tmp_path / "tiny.gguf")) as file:
        ahead = ReadAhead(file)
        assert readers() == []
        ahead.close()


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    phi3c.pack(
        write_tiny_phi3(folder / "tiny.gguf", layers=1, vocab=300, types="Q8_0"), folder / "packed.gguf"
    )
    return folder / "packed.gguf"


def rewritten(
    packed: Path,
    path: Path,
    change: Callable[[dict[str, Value], dict[str, Stored]], None],
    alignment: int = 64,
) -> Path:
    """A copy of the packed file whose metadata and tensors `change` has altered."""
    with GGUFFile(packed) as file:
        metadata = dict(file.metadata)
        del metadata["general.alignment"]
        tensors = {t.name: (t.shape, t.type, file.data(t.name)) for t in file.tensors.values()}
        change(metadata, tensors)
        write_gguf(path, metadata, [(name, *tensor) for name, tensor in tensors.items()], alignment)
    return path


def set_key(key: str, value: Value | None) -> Callable[[dict[str, Value], dict[str, Stored]], None]:
    def change(metadata: dict[str, Value], _: dict[str, Stored]) -> None:
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value

    return change


def set_number(column: str, index: int, value: int) -> Callable[[dict[str, Value], dict[str, Stored]], None]:
    def change(metadata: dict[str, Value], _: dict[str, Stored]) -> None:
        numbers = metadata[f"phi3c.packed.{column}"]
        assert isinstance(numbers, np.ndarray)
        numbers[index] = value

    return change


def second_name(name: str) -> Callable[[dict[str, Value], dict[str, Stored]], None]:
    def change(metadata: dict[str, Value], _: dict[str, Stored]) -> None:
        names = metadata["phi3c.packed.names"]
        assert isinstance(names, list)
        metadata["phi3c.packed.names"] = [names[0], name or str(names[0]), *map(str, names[2:])]

    return change


def stored_as(
    type: GGMLType, shape: tuple[int, ...]
) -> Callable[[dict[str, Value], dict[str, Stored]], None]:
    def change(_: dict[str, Value], tensors: dict[str, Stored]) -> None:
        tensors["output.weight"] = (shape, type, tensors["output.weight"][2])

    return change


def unlisted(metadata: dict[str, Value], _: dict[str, Stored]) -> None:
    for column in ("names", "types", "columns", "rows"):
        metadata[f"phi3c.packed.{column}"] = metadata[f"phi3c.packed.{column}"][:-1]  # type: ignore[index]


def embedding_listed(metadata: dict[str, Value], tensors: dict[str, Stored]) -> None:
    panels = np.zeros(304 * 136, np.uint8)
    tensors["token_embd.weight"] = ((panels.size,), GGMLType.I8, panels)
    added = {"names": ["token_embd.weight"], "types": [8], "columns": [128], "rows": [300]}
    for column, values in added.items():
        old = metadata[f"phi3c.packed.{column}"]
        new: Any = [*old, *values] if isinstance(old, list) else np.array([*old, *values], old.dtype)  # type: ignore[union-attr, misc]
        metadata[f"phi3c.packed.{column}"] = new


OUTPUT_BYTES = 304 * 136  # rows of 128 in q8_0
REFUSED: dict[str, tuple[Any, type[ModelLoadError], str]] = {
    "next version": (set_key("phi3c.layout_version", 2), UnsupportedModelError, "version 2.*'tiny.gguf'"),
    "other layout": (set_key("phi3c.layout", "p8"), UnsupportedModelError, "layout 'p8' .*from 'tiny.gguf'"),
    "no version": (set_key("phi3c.layout_version", None), UnsupportedModelError, "version None"),
    "text as version": (set_key("phi3c.layout_version", "1"), UnsupportedModelError, "version '1'"),
    "list as version": (
        set_key("phi3c.layout_version", np.ones(2, np.uint32)), UnsupportedModelError, "version array",
    ),
    "numbers as names": (set_key("phi3c.packed.names", np.ones(5)), CorruptGGUFError, "phi3c.packed"),
    "text as types": (set_key("phi3c.packed.types", ["8"] * 5), CorruptGGUFError, "no whole number"),
    "no names": (set_key("phi3c.packed.names", None), CorruptGGUFError, "phi3c.packed"),
    "no types": (set_key("phi3c.packed.types", None), CorruptGGUFError, "phi3c.packed"),
    "one row count": (set_key("phi3c.packed.rows", 300), CorruptGGUFError, "phi3c.packed"),
    "fewer rows": (set_key("phi3c.packed.rows", np.ones(1, np.uint64)), CorruptGGUFError, "phi3c.packed"),
    "float rows": (set_key("phi3c.packed.rows", np.ones(5, np.float32)), CorruptGGUFError, "no whole number"),
    "no architecture": (set_key("phi3c.architecture", None), UnsupportedModelError, "architecture ''"),
    "itself": (set_key("phi3c.architecture", "phi3c"), UnsupportedModelError, "architecture 'phi3c'"),
    "unknown name": (second_name("blk.7.ffn_up.weight"), CorruptGGUFError, "no tensor 'blk.7"),
    "same name": (second_name(""), CorruptGGUFError, "twice"),
    "unknown type": (set_number("types", 0, 99), CorruptGGUFError, "of type 99"),
    "no columns": (set_number("columns", 0, 0), CorruptGGUFError, "0 x"),
    "part of a block": (set_number("columns", 0, 100), CorruptGGUFError, "100 x"),
    "no rows": (set_number("rows", 0, 0), CorruptGGUFError, "x 0"),
    "a panel more": (set_number("rows", 0, 305), CorruptGGUFError, "take .* bytes, not"),
    "as many as fit 64 bits": (set_number("rows", 0, 2**64 - 1), CorruptGGUFError, "take .* bytes, not"),
    "another type": (set_number("types", 0, GGMLType.Q4_0), CorruptGGUFError, "take .* bytes, not"),
    "other vocabulary": (set_number("rows", 0, 299), UnsupportedModelError, r"shape \(128, 299\)"),
    "two dimensions": (stored_as(GGMLType.I8, (136, 304)), CorruptGGUFError, "no row of I8"),
    "other storage": (stored_as(GGMLType.F16, (OUTPUT_BYTES // 2,)), CorruptGGUFError, "no row of I8"),
    "not packed": (unlisted, UnsupportedModelError, "shape"),
    "embedding packed": (embedding_listed, UnsupportedModelError, "not those that phi3c packs"),
}  # fmt: skip


def test_the_order_that_the_table_below_counts_on(packed: Path) -> None:
    with ModelFile(packed) as file:
        names = file.metadata["phi3c.packed.names"]
        assert isinstance(names, list)
        assert (names[0], len(names)) == ("output.weight", 5)
        assert file.tensors["output.weight"].shape == (128, 300)


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_contradictions_are_refused(
    packed: Path, tmp_path: Path, change: Any, error: type[ModelLoadError], message: str
) -> None:
    path = rewritten(packed, tmp_path / "changed.gguf", change)
    with pytest.raises(error, match=message):
        phi3c.Model(path)


def test_any_architecture_opens(tmp_path: Path) -> None:
    for i, architecture in enumerate((np.ones(2, np.uint32), 7, [["phi3c"]])):
        write_gguf(tmp_path / f"{i}.gguf", {"general.architecture": architecture}, [])
        with ModelFile(tmp_path / f"{i}.gguf") as file:
            assert file.layout is None


def test_panels_off_a_line_of_the_cache_are_refused(packed: Path, tmp_path: Path) -> None:
    def shift(metadata: dict[str, Value], tensors: dict[str, Stored]) -> None:
        one = np.zeros(1, np.float32).view(np.uint8)
        first = {"shift": ((1,), GGMLType.F32, one), **tensors}
        tensors.clear()
        tensors.update(first)

    path = rewritten(packed, tmp_path / "changed.gguf", shift, alignment=32)
    with GGUFFile(path) as file:
        assert any(tensor.offset % 64 for tensor in file.tensors.values())
    with pytest.raises(CorruptGGUFError, match="not aligned to 64"):
        ModelFile(path)


def test_a_file_cut_short_is_refused(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (3, 100, len(content) // 2, len(content) - 64):
        path.write_bytes(content[:length])
        with pytest.raises((TruncatedFileError, NotGGUFError)):
            phi3c.Model(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(0, 255), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_stay_inside_the_file(
    packed: Path, tmp_path: Path, flips: dict[float, int]
) -> None:
    """Bytes from the packed lists to the data: what is not refused fits the file and the kernels."""
    content = bytearray(packed.read_bytes())
    start, pool = content.index(b"phi3c.layout"), Pool(1)
    with GGUFFile(packed) as file:
        end = min(tensor.offset for tensor in file.tensors.values())
    for place, byte in flips.items():
        content[start + int(place * (end - start))] = byte
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    try:
        with ModelFile(path) as file:
            config = Config.from_gguf(file)
            weights = Weights(file, config, pool)
            for name in file.packed:
                assert weights.matrix(name).rows == file.tensors[name].rows
    except ModelLoadError:
        return


# --- writing ----------------------------------------------------------------------------------------------


def test_a_packed_file_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"packed already.*p16 version 1"):
        phi3c.pack(packed, tmp_path / "again.gguf")
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    path, out = write_tiny_phi3(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(InvalidParameterError, match=r"out\.gguf exists"):
        phi3c.pack(path, out)
    assert out.read_bytes() == b"old"
    phi3c.pack(path, out, overwrite=True)
    np.testing.assert_array_equal(logits_of(out), logits_of(path))


def test_neither_a_folder_nor_the_original_is_replaced(tmp_path: Path) -> None:
    path, link = write_tiny_phi3(tmp_path / "tiny.gguf"), tmp_path / "link.gguf"
    link.symlink_to(path)
    content = path.read_bytes()
    for out in (path, link, tmp_path):
        with pytest.raises(InvalidParameterError, match="exists"):
            phi3c.pack(path, out, overwrite=True)
    assert path.read_bytes() == content


def test_what_phi3c_does_not_run_is_not_packed(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    other = store_as(path, tmp_path / "other.gguf", "blk.0.attn_output.weight", "MXFP4")
    with pytest.raises(UnsupportedQuantError, match="MXFP4"):
        phi3c.pack(other, tmp_path / "packed.gguf")
    assert not (tmp_path / "packed.gguf").exists()


def test_no_folder_and_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    with pytest.raises(ModelWriteError, match=r"nowhere.*cannot be written: No such file"):
        phi3c.pack(path, tmp_path / "nowhere" / "packed.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=path.stat().st_size - 1))
    with pytest.raises(ModelWriteError, match="the disk has"):
        phi3c.pack(path, tmp_path / "packed.gguf")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path, out = write_tiny_phi3(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    out.write_bytes(b"old")

    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ModelWriteError if isinstance(failure, OSError) else KeyboardInterrupt):
        phi3c.pack(path, out, overwrite=True)
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [out, path]


def test_progress_rises_to_the_whole(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    path = write_tiny_phi3(tmp_path / "tiny.gguf")
    phi3c.pack(path, tmp_path / "packed.gguf", progress=lambda *report: reports.append(report))
    done = [done for _, done, _ in reports]
    ((stage, total),) = {(stage, total) for stage, _, total in reports}
    assert stage == "pack"
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)


def test_the_demo_by_name(demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from phi3c import cli

    out = tmp_path / "demo.gguf"
    assert hub.demo() == demo_path
    assert cli.main(["pack", "demo", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert cli.main(["pack", "demo", str(out)]) == cli.EXIT_USAGE
    assert "--force" in capsys.readouterr().err
    assert cli.main(["pack", "demo", str(out), "--force"]) == 0
    assert cli.main(["pack", str(out), str(tmp_path / "again.gguf")]) == cli.EXIT_USAGE
    assert cli.main(["pack", "demo", str(tmp_path / "nowhere" / "out.gguf")]) == cli.EXIT_RUNTIME
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "packed         p16 version 1" in text
    assert "phi3c runs it  yes" in text
    assert "134,515,008" in text
