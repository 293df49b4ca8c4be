"""Checkpoints in safetensors: the same model as the GGUF of the same weights, and refusals."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import MERGES, SPECIALS, TEMPLATE, tokenizer_metadata, write_tiny_phi3
from numpy.typing import NDArray

import phi3c
from phi3c import cli
from phi3c.checkpoint import Checkpoint
from phi3c.config import Config
from phi3c.errors import (
    CheckpointError,
    InvalidParameterError,
    ModelLoadError,
    ModelNotFoundError,
    TruncatedFileError,
    UnsupportedModelError,
)
from phi3c.gguf import GGMLType, GGUFFile
from phi3c.tokenizer import Tokenizer
from phi3c.vocabulary import TokenType

Record = tuple[str, tuple[int, ...], bytes]  # type, shape with rows first, data
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
IDS: list[int] = np.random.default_rng(5).integers(0, 300, 40).tolist()


def write_safetensors(path: Path, records: dict[str, Record]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in records.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    encoded = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, _, data in records.values())
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """x, which must be a bf16 already, as one."""
    bits = x.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def records_of(gguf: Path, dtype: str) -> dict[str, Record]:
    """The tensors of a phi3 file in F32 under the names of a checkpoint."""
    records: dict[str, Record] = {}
    with GGUFFile(gguf) as file:
        for name, tensor in file.tensors.items():
            block, _, kind = name.removesuffix(".weight").rpartition(".")
            prefix = f"model.layers.{block.removeprefix('blk.')}." if block else ""
            x = file.data(name).view(np.float32)
            data = (
                x.tobytes()
                if dtype == "F32"
                else bf16(x).tobytes()
                if dtype == "BF16"
                else x.astype("<f2").tobytes()
            )
            records[f"{prefix}{NAMES[kind]}.weight"] = (dtype, tensor.shape[::-1], data)
    return records


def config_of(gguf: Path, **overrides: object) -> dict[str, object]:
    with GGUFFile(gguf) as file:
        get = {key.removeprefix("phi3."): value for key, value in file.metadata.items()}
    width, heads = get["embedding_length"], get["attention.head_count"]
    assert isinstance(width, int)
    assert isinstance(heads, int)
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": width,
        "intermediate_size": get["feed_forward_length"],
        "num_hidden_layers": get["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": get["attention.head_count_kv"],
        "max_position_embeddings": get["context_length"],
        "original_max_position_embeddings": get["context_length"],
        "rms_norm_eps": get["attention.layer_norm_rms_epsilon"],
        "rope_theta": get["rope.freq_base"],
        "rope_scaling": None,
        "sliding_window": get["attention.sliding_window"] or None,
        "partial_rotary_factor": get["rope.dimension_count"] / (width // heads),  # type: ignore[operator]
        "tie_word_embeddings": False,
        "bos_token_id": 266,
        "eos_token_id": [266, 268],
        **overrides,
    }
    return {key: value for key, value in config.items() if value != "absent"}


def write_tokenizer(folder: Path) -> None:
    """The vocabulary of `tokenizer_metadata`, as tokenizer.json and tokenizer_config.json have it."""
    tokens = tokenizer_metadata(300)["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    n_merged = 256 + len(MERGES)
    added = [
        {"id": n_merged + n, "content": text, "special": True, "rstrip": False, "normalized": False}
        for n, text in enumerate(SPECIALS)
    ]
    fast = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(tokens[:n_merged])},
            "merges": MERGES,
        },
    }
    settings = {
        "add_bos_token": False,
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer.json", fast)
    write_json(folder / "tokenizer_config.json", settings)


def write_checkpoint(folder: Path, gguf: Path, dtype: str = "F32", **overrides: object) -> Path:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", records_of(gguf, dtype))
    write_json(folder / "config.json", config_of(gguf, **overrides))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phi3 file in F32 whose weights are all exact in bf16 and in half precision."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_phi3(path, head_dim=64, rope_dims=48, window=33, vocab=300)
    content = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        start = min(tensor.offset for tensor in file.tensors.values())
    weights = np.frombuffer(content, np.uint32, offset=start)
    weights &= np.uint32(0xFFF00000)  # 3 bits of mantissa ...
    weights[np.abs(weights.view(np.float32)) < 2.0**-14] = 0  # ... and no subnormal halves
    path.write_bytes(content)
    return path


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tiny)


# --- the same model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_model_of_the_same_weights(tiny: Path, tmp_path: Path, dtype: str) -> None:
    folder, out = write_checkpoint(tmp_path / "checkpoint", tiny, dtype), tmp_path / "out.gguf"
    phi3c.quantize(folder, out, "F32")
    with GGUFFile(tiny) as wanted, GGUFFile(out) as found:
        assert found.tensors.keys() == wanted.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert (found.tensors[name].shape, found.tensors[name].type) == (tensor.shape, GGMLType.F32)
            np.testing.assert_array_equal(found.data(name), wanted.data(name))
        for key in wanted.metadata.keys() - {"general.name", "tokenizer.ggml.eot_token_id"}:
            if key.startswith("tokenizer.ggml.token"):  # unused tokens have other names
                assert list(found.metadata[key])[:270] == list(wanted.metadata[key])[:270]  # type: ignore[arg-type]
            else:
                assert found.metadata[key] == wanted.metadata[key], key
        assert found.metadata["general.name"] == "checkpoint"
        assert Config.from_gguf(found).sliding_window == 33
    with phi3c.Model(tiny) as model, phi3c.Model(out) as converted:
        np.testing.assert_array_equal(
            converted.logits(IDS).view(np.uint32), model.logits(IDS).view(np.uint32)
        )
        messages = [{"role": "user", "content": "the hello in on"}]
        assert converted.apply_chat_template(messages) == model.apply_chat_template(messages)
        text = "the hello <|end|> thin"
        assert converted.tokenize(text) == model.tokenize(text)


@pytest.mark.parametrize(("dtype", "type_name"), [("BF16", "Q4_K_M"), ("F16", "Q8_0"), ("BF16", "F16")])
def test_quantised_as_the_gguf_is(tiny: Path, tmp_path: Path, dtype: str, type_name: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tiny, dtype)
    phi3c.quantize(folder, tmp_path / "one.gguf", type_name)
    phi3c.quantize(tiny, tmp_path / "two.gguf", type_name)
    with GGUFFile(tmp_path / "one.gguf") as one, GGUFFile(tmp_path / "two.gguf") as two:
        for name, tensor in two.tensors.items():
            assert one.tensors[name].type is tensor.type
            np.testing.assert_array_equal(one.data(name), two.data(name))


def test_several_files_with_an_index(tiny: Path, checkpoint: Path, tmp_path: Path) -> None:
    records = list(records_of(tiny, "F32").items())
    (checkpoint / "model.safetensors").unlink()
    index = {}
    for n, part in enumerate((records[:4], records[4:])):
        file = f"model-{n + 1:05}-of-00002.safetensors"
        write_safetensors(checkpoint / file, dict(part))
        index |= {name: file for name, _ in part}
    write_json(checkpoint / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    with Checkpoint(checkpoint) as found, GGUFFile(tiny) as wanted:
        assert found.tensors.keys() == wanted.tensors.keys()
        for name in wanted.tensors:
            np.testing.assert_array_equal(found.data(name), wanted.data(name))


def test_one_file_by_name_and_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert cli.main(["quantize", str(checkpoint / "model.safetensors"), str(out), "q8_0"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    with phi3c.Model(out) as model:
        assert np.isfinite(model.logits(IDS)).all()


def test_a_tied_embedding_is_there_once(tmp_path: Path) -> None:
    path = write_tiny_phi3(tmp_path / "tied.gguf", head_dim=64, vocab=300, tied=True)
    folder = write_checkpoint(tmp_path / "checkpoint", path, tie_word_embeddings=True)
    records = records_of(path, "F32")
    write_safetensors(
        folder / "model.safetensors", records | {"lm_head.weight": records["model.embed_tokens.weight"]}
    )
    with Checkpoint(folder) as found, GGUFFile(path) as wanted:
        assert found.tensors.keys() == wanted.tensors.keys()


# --- hyper-parameters -------------------------------------------------------------------------------------

LONG = {"short_factor": [1.0] * 24, "long_factor": [1.5] * 23 + [40.0]}


@pytest.mark.parametrize("spelling", ["su", "longrope", "rope_parameters"])
def test_long_rope(tiny: Path, tmp_path: Path, spelling: str) -> None:
    """As transformers 4 wrote it, before and after July 2024, and as transformers 5 does."""
    kind = "longrope" if spelling == "rope_parameters" else spelling
    overrides: dict[str, object] = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }
    if spelling == "rope_parameters":
        rope = {**LONG, "rope_type": kind, "rope_theta": 5e5, "partial_rotary_factor": 0.75}
        overrides |= {"rope_parameters": rope, "rope_theta": "absent", "partial_rotary_factor": "absent"}
        overrides |= {"rope_scaling": "absent"}
    else:
        overrides |= {"rope_scaling": {**LONG, "type": kind}, "rope_theta": 5e5}
    with Checkpoint(write_checkpoint(tmp_path / "checkpoint", tiny, **overrides)) as found:
        assert found.metadata["phi3.rope.scaling.original_context_length"] == 4096
        assert found.metadata["phi3.context_length"] == 131072
        assert found.metadata["phi3.rope.freq_base"] == 5e5
        assert found.metadata["phi3.rope.dimension_count"] == 48
        # sqrt(1 + ln 32 / ln 4096), and ln 32 / ln 4096 is 5/12
        assert found.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(17 / 12), rel=1e-12)
        for length in ("short", "long"):
            name = f"rope_factors_{length}.weight"
            assert (found.tensors[name].type, found.tensors[name].shape) == (GGMLType.F32, (24,))
            np.testing.assert_array_equal(
                found.data(name).view(np.float32), np.float32(LONG[f"{length}_factor"])
            )


def test_no_window_is_written_as_zero(tiny: Path, tmp_path: Path) -> None:
    with Checkpoint(write_checkpoint(tmp_path / "checkpoint", tiny, sliding_window=None)) as found:
        assert found.metadata["phi3.attention.sliding_window"] == 0
        assert found.metadata["phi3.rope.scaling.original_context_length"] == 512
        assert "phi3.rope.scaling.attn_factor" not in found.metadata


# --- vocabularies -----------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["\u2581t", "he", "\u2581the", "in", "\u2581", "t", "h", "e", "i", "n"]
SCORES = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -10.0]


def sentencepiece_model() -> bytes:
    """A SentencePiece model, encoded by hand: field 1 repeats (text 1, score 2, type 3); others follow."""
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * len(WORDS)
    message = b""
    for text, score, type in zip(PIECES + WORDS, [0.0] * len(PIECES) + SCORES, types, strict=True):
        data = text.encode()
        piece = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", score)
        if type is not TokenType.NORMAL:  # the default, which is left out
            piece += b"\x18" + bytes([type])
        message += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x0a\x03abc\x18\x90\x4e" + b"\x51" + bytes(8)  # a text, a varint of two bytes, a fixed64
    return message + b"\x12" + bytes([len(trainer)]) + trainer


ADDED = [
    {"id": 269, "content": "<|endoftext|>", "special": True},
    {"id": 270, "content": "<|user|>", "special": True},
    {"id": 2, "content": "</s>", "special": False},
    {"id": 0, "content": "<unk>", "special": True},
]


def spm_checkpoint(folder: Path, tiny: Path, *, fast: bool) -> Path:
    write_checkpoint(folder, tiny)
    merges = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["i", "n"]]
    vocab = {text: id for id, text in enumerate(PIECES + WORDS)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer.json",
        {"added_tokens": ADDED, "model": model} if fast else {"added_tokens": ADDED},
    )
    if not fast:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": True, "add_eos_token": False})
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("fast", [False, True], ids=["tokenizer.model", "tokenizer.json"])
def test_sentencepiece(tiny: Path, tmp_path: Path, fast: bool) -> None:
    with Checkpoint(spm_checkpoint(tmp_path / "checkpoint", tiny, fast=fast)) as found:
        metadata = found.metadata
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert (get["model"], get["pre"], get["add_bos_token"], get["add_eos_token"]) == (
        "llama",
        "default",
        True,
        False,
    )
    ids = {name: get[f"{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 269, "unknown": 0, "padding": 269}
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    tokens, types, scores = get["tokens"], get["token_type"], get["scores"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert isinstance(scores, np.ndarray)
    assert tokens[258:272] == ["<0xFF>", *WORDS, "<|endoftext|>", "<|user|>", "[PAD271]"]
    kinds = {0: "CONTROL", 2: "USER_DEFINED", 3: "BYTE", 259: "NORMAL", 270: "CONTROL", 271: "UNUSED"}
    assert {id: TokenType(types[id]).name for id in kinds} == kinds
    # the order of merging is what scores are for
    assert scores[259] > scores[260] > scores[261] > scores[262]
    if not fast:
        assert scores[259:269].tolist() == SCORES
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("the thin", add_bos=False) == [261, 259, 265, 262]  # "▁the", "▁t", "h", "in"
    assert tokenizer.encode("<|user|>z", parse_special=True) == [1, 270, 263, 3 + ord("z")]


def test_phi3_vocabulary_from_its_merges(shared: Path, tiny: Path, tmp_path: Path) -> None:
    """tokenizer.json without tokenizer.model: scores come from merges, and text is cut alike."""
    from phi3c.vocabulary import spm_merges

    with GGUFFile(shared / "vocab/ggml-vocab-phi-3.gguf") as file:
        metadata = dict(file.metadata)
    texts, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(texts, list)
    assert isinstance(types, np.ndarray)
    merges = spm_merges(metadata)
    assert merges is not None
    pairs = [f"{texts[left]} {texts[right]}" for left, right in merges.reshape(-1, 2).tolist()]
    folder = write_checkpoint(
        tmp_path / "checkpoint",
        write_tiny_phi3(tmp_path / "wide.gguf", head_dim=16, layers=1, vocab=len(texts)),
    )
    model = {"type": "BPE", "vocab": {text: id for id, text in enumerate(texts)}, "merges": pairs}
    added = [
        {"id": id, "content": texts[id], "special": True}
        for id in range(len(texts))
        if types[id] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    write_json(
        folder / "tokenizer.json",
        {"added_tokens": added, "model": model | {"byte_fallback": True, "unk_token": "<unk>"}},
    )
    with Checkpoint(folder) as found:
        ours, theirs = Tokenizer.from_gguf(found.metadata), Tokenizer.from_gguf(metadata)
    text = (shared / "golden/gpl-3-head.txt").read_text(encoding="utf-8")
    assert ours.encode(text, add_bos=False) == theirs.encode(text, add_bos=False)


O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        ([("Split", O200K), ("ByteLevel", None)], "gpt-4o"),
        ([("Split", CL100K), ("ByteLevel", None)], "dbrx"),
        ([("Digits", None), ("ByteLevel", None)], "smollm"),
        ([("Split", r"\w+"), ("ByteLevel", None)], None),
        ([("Metaspace", None)], None),
        ([("Split", ["a"]), ("ByteLevel", None)], None),
        ([], None),
    ],
)
def test_how_text_is_split(checkpoint: Path, steps: list[tuple[str, object]], pre: str | None) -> None:
    fast = json.loads((checkpoint / "tokenizer.json").read_text())
    parts = [{"type": kind} | ({"pattern": {"Regex": regex}} if regex else {}) for kind, regex in steps]
    fast["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts} if parts else None
    write_json(checkpoint / "tokenizer.json", fast)
    if pre is None:
        with pytest.raises(CheckpointError, match="splits text in a way"):
            Checkpoint(checkpoint)
        return
    with Checkpoint(checkpoint) as found:
        assert found.metadata["tokenizer.ggml.pre"] == pre


# --- refusals ---------------------------------------------------------------------------------------------


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        write_json(folder / name, content | changes)

    return change


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        encoded = (
            changed
            if isinstance(changed, bytes)
            else json.dumps(header if changed is None else changed).encode()
        )
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return apply


def record(**changes: object) -> Callable[[Path], None]:
    return edit_header(lambda header: header["lm_head.weight"].update(changes))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def tensor(name: str) -> Callable[[Path], None]:
    return edit_header(lambda header: header.update({name: header.pop("lm_head.weight")}))


def model_of(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"] |= changes
        write_json(folder / "tokenizer.json", content)

    return change


def index(*files: str) -> Callable[[Path], None]:
    names = {str(n): file for n, file in enumerate(files)}
    return lambda folder: write_json(folder / "model.safetensors.index.json", {"weight_map": names})


def twice(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index("b.safetensors", "model.safetensors")(folder)


def texts_as_added_tokens(folder: Path) -> None:
    edit_json("tokenizer.json", added_tokens=None)(folder)
    edit_json("tokenizer_config.json", added_tokens_decoder={"3": "x"})(folder)


def broken_model(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "tokenizer.model").write_bytes(data) and None


REFUSED: dict[str, tuple[Callable[[Path], None], type[ModelLoadError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ModelNotFoundError, "no config.json"),
    "config is a list": (lambda f: write_json(f / "config.json", [1]), CheckpointError, "no JSON object"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{") and None,
        CheckpointError,
        "cannot be read",
    ),
    "another architecture": (
        edit_json("config.json", architectures=["PhiMoEForCausalLM"]),
        UnsupportedModelError,
        "PhiMoE",
    ),
    "no width": (edit_json("config.json", hidden_size=None), CheckpointError, "hidden_size is None"),
    "text as width": (edit_json("config.json", hidden_size="3072"), CheckpointError, "hidden_size is '3072'"),
    "half a layer": (edit_json("config.json", num_hidden_layers=2.5), CheckpointError, "whole number"),
    "huge": (edit_json("config.json", rope_theta=1e999), CheckpointError, "rope_theta is inf"),
    "yarn": (
        edit_json("config.json", rope_scaling={"type": "yarn", "factor": 2}),
        UnsupportedModelError,
        "'yarn'",
    ),
    "factors of another type": (
        edit_json("config.json", rope_scaling={"type": "linear", "long_factor": [1]}),
        UnsupportedModelError,
        "linear",
    ),
    "factors that are none": (
        edit_json("config.json", rope_scaling={"type": "su", "long_factor": ["1"]}),
        CheckpointError,
        "long_factor",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ModelLoadError, "cannot be opened"),
    "an empty file": (
        lambda f: (f / "model.safetensors").write_bytes(b"") and None,
        CheckpointError,
        "0 bytes",
    ),
    "cut short": (cut, TruncatedFileError, "cut short"),
    "a page of HTML": (
        lambda f: (f / "model.safetensors").write_bytes(b"<!doctype html>") and None,
        CheckpointError,
        "a header of",
    ),
    "a header that is no JSON": (edit_header(lambda _: b"{]"), CheckpointError, "no JSON"),
    "a header that is a list": (edit_header(lambda _: b"[]"), CheckpointError, "no JSON object"),
    "deep nesting": (edit_header(lambda _: b"[" * 100_000), CheckpointError, "no JSON"),
    "a record that is a list": (
        edit_header(lambda h: h.update({"lm_head.weight": []})),
        CheckpointError,
        "object",
    ),
    "another type": (record(dtype="F8_E4M3"), CheckpointError, "F8_E4M3"),
    "whole numbers": (record(dtype="I32"), UnsupportedModelError, "I32"),
    "another shape": (record(shape=[300, 255]), CheckpointError, "lies in bytes"),
    "negative shape": (record(shape=[-300, -256]), CheckpointError, "whole numbers"),
    "three dimensions": (record(shape=[300, 16, 16]), UnsupportedModelError, "vectors and matrices"),
    "text as shape": (record(shape="ab"), CheckpointError, "whole numbers"),
    "one offset": (record(data_offsets=[0]), CheckpointError, "whole numbers"),
    "backwards": (record(data_offsets=[307200, 0]), CheckpointError, "lies in bytes"),
    "beyond the end": (record(data_offsets=[10**9, 10**9 + 307200]), TruncatedFileError, "cut short"),
    "a bias": (tensor("lm_head.bias"), UnsupportedModelError, "lm_head.bias is no part"),
    "a vision tower": (tensor("model.vision_embed_tokens.weight"), UnsupportedModelError, "is no part"),
    "a layer's tensor without its layer": (
        tensor("mlp.down_proj.weight"),
        UnsupportedModelError,
        "is no part",
    ),
    "a layer of the output": (tensor("model.layers.0.lm_head.weight"), UnsupportedModelError, "is no part"),
    "no embedding": (
        edit_header(lambda h: h.pop("model.embed_tokens.weight") and None),
        ModelNotFoundError,
        "embed_tokens",
    ),
    "an index of files elsewhere": (index("../model.safetensors"), CheckpointError, "elsewhere"),
    "an index of nothing": (index(), CheckpointError, "names no files"),
    "the same tensor twice": (
        twice,
        CheckpointError,
        "comes twice",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        CheckpointError,
        "neither tokenizer.model nor",
    ),
    "a unigram model": (model_of(type="Unigram"), CheckpointError, "type BPE"),
    "no merges": (model_of(merges=None), CheckpointError, "type BPE"),
    "a merge of three": (model_of(merges=["a b c"]), CheckpointError, "no pair"),
    "a merge that is a number": (model_of(merges=[5]), CheckpointError, "no pair"),
    "a merge of numbers": (model_of(merges=[[1, 2]]), CheckpointError, "no pair"),
    "an id beyond the embedding": (model_of(vocab={"a": 300}), CheckpointError, "300 rows"),
    "an id that is text": (model_of(vocab={"a": "7"}), CheckpointError, "id '7'"),
    "added tokens beyond": (
        edit_json("tokenizer.json", added_tokens=[{"id": -1, "content": "x"}]),
        CheckpointError,
        "id -1",
    ),
    "added tokens that are texts": (
        texts_as_added_tokens,
        CheckpointError,
        "no JSON object",
    ),
    "a template that is no text": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff") and None,
        CheckpointError,
        "cannot be read",
    ),
    "an added token that is text": (
        edit_json("tokenizer.json", added_tokens=["x"]),
        CheckpointError,
        "no JSON object",
    ),
    "a SentencePiece model cut short": (
        broken_model(sentencepiece_model()[:-3]),
        CheckpointError,
        "beyond the file",
    ),
    "a SentencePiece model of noise": (broken_model(b"\xff" * 20), CheckpointError, "does not end"),
    "a SentencePiece model of groups": (broken_model(b"\x0b"), CheckpointError, "wire type 3"),
    "a piece of another type": (broken_model(b"\x0a\x02\x18\x09"), CheckpointError, "SentencePiece"),
    "a piece with a text as score": (broken_model(b"\x0a\x03\x12\x01a"), CheckpointError, "SentencePiece"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(checkpoint: Path, change: Any, error: type[ModelLoadError], message: str) -> None:
    change(checkpoint)
    with pytest.raises(error, match=message):
        Checkpoint(checkpoint)


def test_a_missing_layer_is_refused_before_writing(checkpoint: Path, tmp_path: Path) -> None:
    edit_header(lambda header: header.pop("model.layers.1.mlp.down_proj.weight") and None)(checkpoint)
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_down\.weight is missing"):
        phi3c.quantize(checkpoint, tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_its_own_weights_are_not_replaced(checkpoint: Path) -> None:
    with pytest.raises(InvalidParameterError, match="the source itself"):
        phi3c.quantize(checkpoint, checkpoint / "model.safetensors", "Q8_0", overwrite=True)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        phi3c.quantize(tmp_path / "missing.safetensors", tmp_path / "out.gguf", "Q8_0")
