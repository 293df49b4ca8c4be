"""A Phi-3 checkpoint as Hugging Face stores it, seen as the GGUF file it would be."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phi3c.checkpoint_tokenizer import read_json, vocabulary_metadata
from phi3c.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from phi3c.gguf import GGMLType, TensorInfo, Value, n_bytes
from phi3c.safetensors import SafetensorsFile, StoredTensor

_FLOAT_TYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}

# Names of a checkpoint -> those of GGUF, without ".weight".
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a folder or a safetensors file, rather than a GGUF file."""
    path = Path(path)
    return path.is_dir() or path.suffix == ".safetensors"


class Checkpoint:
    """A folder of config.json, *.safetensors and tokenizer files, or one such safetensors file in its folder.

    Attributes:
        path: the folder.
        parts: the safetensors files.
        metadata, tensors: as of GGUFFile. Matrices have the type they are stored in, norms are F32; offsets
            are those in their safetensors files.

    Raises:
        ModelNotFoundError: no such path, or a part of the model is missing.
        UnsupportedModelError: no Phi3ForCausalLM, or with tensors or settings which that does not have.
        CheckpointError: a file is damaged or contradicts the others.
        ModelLoadError: a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.path = path if path.is_dir() else path.parent
        self._files: list[SafetensorsFile] = []
        self._homes: dict[str, tuple[SafetensorsFile, str]] = {}  # GGUF name -> file, name there
        self._factors: dict[str, NDArray[np.float32]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        config = read_json(self.path / "config.json")
        if not config:
            raise ModelNotFoundError(
                f"{self.path} has no config.json; a checkpoint is converted from its folder"
            )
        architectures = config.get("architectures") or [config.get("model_type")]
        if architectures not in (["Phi3ForCausalLM"], ["phi3"]):
            raise UnsupportedModelError(
                f"{self.path}: {architectures} is not supported, only Phi3ForCausalLM"
            )
        try:
            self.parts = self._find_parts(path)
            for part in self.parts:
                self._add(SafetensorsFile(part), config)
            if "token_embd.weight" not in self.tensors:
                raise ModelNotFoundError(f"{self.path}: model.embed_tokens.weight is in none of its files")
            self._add_factors(_rope(config))
            size = self.tensors["token_embd.weight"].rows
            self.metadata: dict[str, Value] = {
                "general.architecture": "phi3",
                "general.name": self.path.resolve().name,
                **_hyperparameters(self.path, config),
                **vocabulary_metadata(self.path, config, size),
            }
        except BaseException:
            self.close()
            raise

    def _find_parts(self, path: Path) -> list[Path]:
        """The files that hold the model's tensors."""
        if path != self.path:
            return [path]
        index = read_json(self.path / "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict):
            return [self.path / "model.safetensors"]
        names = sorted({name for name in index.values() if isinstance(name, str)})
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(
                f"{self.path}/model.safetensors.index.json names no files, or some elsewhere"
            )
        return [self.path / name for name in names]

    def _add(self, file: SafetensorsFile, config: Mapping[str, Any]) -> None:
        self._files.append(file)
        for stored, tensor in file.tensors.items():
            if stored.endswith("rotary_emb.inv_freq"):
                continue  # what older versions of the library stored besides
            name = _gguf_name(stored)
            if name is None:
                raise UnsupportedModelError(f"{file.path}: tensor {stored} is no part of a Phi3ForCausalLM")
            if name == "output.weight" and config.get("tie_word_embeddings") is True:
                continue
            if name in self.tensors:
                raise CheckpointError(f"{file.path}: tensor {stored} comes twice")
            self.tensors[name] = self._info(file, stored, name, tensor)
            self._homes[name] = file, stored

    def _info(self, file: SafetensorsFile, stored: str, name: str, tensor: StoredTensor) -> TensorInfo:
        if tensor.dtype not in _FLOAT_TYPES or 0 in tensor.shape or len(tensor.shape) not in (1, 2):
            raise UnsupportedModelError(
                f"{file.path}: tensor {stored} is {tensor.dtype} {list(tensor.shape)}; "
                "weights must be vectors and matrices of F32, F16 or BF16"
            )
        type = GGMLType.F32 if len(tensor.shape) == 1 else _FLOAT_TYPES[tensor.dtype]
        shape = tensor.shape[::-1]
        return TensorInfo(name, shape, type, tensor.offset, n_bytes(shape, type))

    def _add_factors(self, rope: Mapping[str, Any]) -> None:
        """LongRoPE's divisors of the rotary frequencies, which GGUF keeps as tensors."""
        for length in ("long", "short"):
            factors = rope.get(f"{length}_factor")
            if factors is None:
                continue
            if not isinstance(factors, list) or not all(isinstance(f, int | float) for f in factors):
                raise CheckpointError(f"{self.path}/config.json: {length}_factor is no list of numbers")
            name = f"rope_factors_{length}.weight"
            self._factors[name] = np.array(factors, np.float32)
            self.tensors[name] = TensorInfo(name, (len(factors),), GGMLType.F32, 0, 4 * len(factors))

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`, as its type in `tensors` has them."""
        if name in self._factors:
            return self._factors[name].view(np.uint8)
        file, stored = self._homes[name]
        data, dtype = file.data(stored), file.tensors[stored].dtype
        if self.tensors[name].type is not GGMLType.F32 or dtype == "F32":
            return data
        if dtype == "F16":
            return data.view(np.float16).astype(np.float32).view(np.uint8)
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _gguf_name(stored: str) -> str | None:
    """GGUF's name of a checkpoint's tensor, None for one that the network does not have."""
    match = re.fullmatch(r"(?:model\.layers\.(0|[1-9]\d{0,5})\.)?(.+)\.weight", stored)
    if match is None or match[2] not in _NAMES or (match[1] is None) != (match[2] in list(_NAMES)[:3]):
        return None
    name = f"{_NAMES[match[2]]}.weight"
    return name if match[1] is None else f"blk.{match[1]}.{name}"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything said of rotary positions: config.json has it in one place or in another, by its age."""
    merged = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            merged |= config[key]
    return merged


def _hyperparameters(path: Path, config: Mapping[str, Any]) -> dict[str, Value]:
    """The `phi3.*` keys."""
    rope = _rope(config)

    def number(key: str, default: float | None = None) -> float:
        value = rope.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(f"{path}/config.json: {key} is {value!r:.40}, but must be a number above 0")
        return value

    def whole(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if value != int(value):
            raise CheckpointError(f"{path}/config.json: {key} is {value!r}, but must be a whole number")
        return int(value)

    width, heads, context = (
        whole("hidden_size"),
        whole("num_attention_heads"),
        whole("max_position_embeddings"),
    )
    head_dim = whole("head_dim", width // heads or 1)
    original = whole("original_max_position_embeddings", context)
    keys: dict[str, Value] = {
        "phi3.context_length": context,
        "phi3.rope.scaling.original_context_length": original,
        "phi3.embedding_length": width,
        "phi3.feed_forward_length": whole("intermediate_size"),
        "phi3.block_count": whole("num_hidden_layers"),
        "phi3.attention.head_count": heads,
        "phi3.attention.head_count_kv": whole("num_key_value_heads", heads),
        "phi3.attention.layer_norm_rms_epsilon": float(number("rms_norm_eps", 1e-5)),
        "phi3.attention.sliding_window": whole("sliding_window", context)
        if rope.get("sliding_window")
        else 0,
        "phi3.rope.dimension_count": int(number("partial_rotary_factor", 1.0) * head_dim),
        "phi3.rope.freq_base": float(number("rope_theta", 10000.0)),
    }
    if head_dim * heads != width:
        keys |= {"phi3.attention.key_length": head_dim, "phi3.attention.value_length": head_dim}
    kind = rope.get("rope_type", rope.get("type"))
    if rope.get("long_factor") is not None or rope.get("short_factor") is not None:
        if kind not in ("su", "longrope"):
            raise UnsupportedModelError(
                f"{path}/config.json: rope factors of type {kind!r:.40}, only longrope is known"
            )
        keys["phi3.rope.scaling.attn_factor"] = float(
            number("attention_factor", _attn_factor(context, original))
        )
    elif kind not in (None, "default"):
        raise UnsupportedModelError(f"{path}/config.json: rope scaling of type {kind!r:.40} is not supported")
    return keys


def _attn_factor(context: int, original: int) -> float:
    """LongRoPE's scale of queries and keys (Ding et al. 2024, as Phi-3 uses it)."""
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
