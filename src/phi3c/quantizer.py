"""Models of fewer bits a weight: which tensor gets which type, and the file that is written.

A type such as Q4_K_M is a mix: most matrices in Q4_K, those that matter most in more. The mixes are those of
llama-quantize, so that a name means the same size and the same care here and there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .checkpoint import Checkpoint, is_checkpoint
from .config import Config
from .errors import InvalidParameterError, ModelWriteError, NumericalError, UnsupportedQuantError
from .gguf import BLOCKS, Data, GGMLType, GGUFFile, TensorInfo, n_bytes, write_gguf
from .packed import ModelFile
from .threads import default_threads

Progress = Callable[[str, int, int], None]
T = GGMLType

FLOATS: Final = (T.F32, T.F16, T.BF16)
# Rows that are no whole number of 256 take a type of 32 instead.
FALLBACK: Final = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
_QUANTIZATION_VERSION = 2  # of the blocks; general.quantization_version

Where = Callable[[int, Config], bool]


def _everywhere(layer: int, config: Config) -> bool:
    return True


def _grouped(layer: int, config: Config) -> bool:
    """Four or more query heads share a key head: values are few, and each counts."""
    return config.head_count // config.head_count_kv >= 4


def _below(count: int) -> Where:
    return lambda layer, config: layer < count


def _first(share: int) -> Where:
    """The first 1 / share of the layers."""
    return lambda layer, config: layer < config.block_count // share


def _more_bits(layer: int, config: Config) -> bool:
    """The first and last eighth of the layers, and every third between."""
    n, eighth = config.block_count, config.block_count // 8
    return layer < eighth or layer >= 7 * n // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True, slots=True)
class Mix:
    """Types of a model's matrices.

    Attributes:
        file_type: number of the mix in general.file_type.
        base: type of all matrices that nothing else is said of.
        exceptions: (tensor, layers, type), the first that applies counts. "attn_v" stands for attn_qkv too.
    """

    file_type: int
    base: GGMLType
    exceptions: tuple[tuple[str, Where, GGMLType], ...] = ()


MIXES: Final = {
    "F32": Mix(0, T.F32),
    "F16": Mix(1, T.F16),
    "BF16": Mix(32, T.BF16),
    "Q4_0": Mix(2, T.Q4_0),
    "Q4_1": Mix(3, T.Q4_1),
    "Q8_0": Mix(7, T.Q8_0),
    "Q5_0": Mix(8, T.Q5_0),
    "Q5_1": Mix(9, T.Q5_1),
    "Q2_K": Mix(
        10,
        T.Q2_K,
        (
            ("attn_v", _grouped, T.Q4_K),
            ("attn_v", _everywhere, T.Q3_K),
            ("attn_output", _everywhere, T.Q3_K),
            ("ffn_down", _everywhere, T.Q3_K),
        ),
    ),
    "Q3_K_S": Mix(11, T.Q3_K),
    "Q3_K_M": Mix(
        12,
        T.Q3_K,
        (
            ("attn_v", _below(2), T.Q5_K),
            ("attn_v", _everywhere, T.Q4_K),
            ("attn_output", _everywhere, T.Q4_K),
            ("ffn_down", _first(16), T.Q5_K),
            ("ffn_down", _everywhere, T.Q4_K),
        ),
    ),
    "Q3_K_L": Mix(
        13, T.Q3_K, tuple((name, _everywhere, T.Q5_K) for name in ("attn_v", "attn_output", "ffn_down"))
    ),
    "Q4_K_S": Mix(14, T.Q4_K, (("attn_v", _below(4), T.Q5_K), ("ffn_down", _first(8), T.Q5_K))),
    "Q4_K_M": Mix(15, T.Q4_K, (("attn_v", _more_bits, T.Q6_K), ("ffn_down", _more_bits, T.Q6_K))),
    "Q5_K_S": Mix(16, T.Q5_K),
    "Q5_K_M": Mix(17, T.Q5_K, (("attn_v", _more_bits, T.Q6_K), ("ffn_down", _more_bits, T.Q6_K))),
    "Q6_K": Mix(18, T.Q6_K),
}
SHORT: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mix_named(name: str) -> Mix:
    """The mix of that name, in capitals or not.

    Raises:
        InvalidParameterError: there is none; the message lists them.
    """
    name = name.upper()
    try:
        return MIXES[SHORT.get(name, name)]
    except KeyError:
        raise InvalidParameterError(
            f"no type {name!r:.40}; there are {', '.join([*MIXES, *SHORT])}"
        ) from None


def target_type(mix: Mix, config: Config, tensor: TensorInfo) -> GGMLType:
    """The type in which a mix stores a tensor; what is no matrix keeps its own."""
    if len(tensor.shape) == 1:
        return tensor.type
    if mix.base in FLOATS:
        return mix.base
    type = _preferred_type(mix, config, tensor)
    return type if tensor.columns % BLOCKS[type][0] == 0 else FALLBACK[type]


def _preferred_type(mix: Mix, config: Config, tensor: TensorInfo) -> GGMLType:
    is_output = tensor.name == ("token_embd.weight" if config.tied else "output.weight")
    if is_output:
        return mix.base if mix.base is T.Q8_0 else T.Q6_K
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    if match:
        layer, role = int(match[1]), "attn_v" if match[2] == "attn_qkv" else match[2]
        for name, where, type in mix.exceptions:
            if name == role and where(layer, config):
                return type
    return mix.base


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model as a GGUF file of another type, usually one of fewer bits a weight.

    The same bytes whatever the number of threads. The file is there whole or not at all.

    Args:
        src: a GGUF file in F32, F16 or BF16, or the folder of a Phi-3 checkpoint as Hugging Face stores it
            (config.json, safetensors, tokenizer), or one safetensors file in such a folder.
        dst: the new file.
        type: a name of llama-quantize, such as "Q4_K_M", "Q8_0" or "F16".
        allow_requantize: take a source that is quantised already, though what it lost is not to be had back.
        overwrite: replace `dst` if it exists.
        n_threads: threads that quantise; None derives it from the machine.
        progress: called as progress("quantize", bytes of src done, bytes in all).

    Raises:
        ModelLoadError: src cannot be read, or phi3c does not run it; the subclass says which.
        InvalidParameterError: no such type, src is quantised or packed, or dst exists.
        NumericalError: a weight is not finite, or too large for the type.
        ModelWriteError: dst cannot be written; the disk may be full.
    """
    mix, dst = mix_named(type), Path(dst)
    with Checkpoint(src) if is_checkpoint(src) else ModelFile(src) as file:
        if isinstance(file, ModelFile) and file.layout:
            raise InvalidParameterError(
                f"{file.path} is packed for phi3c; quantise the file it was packed from"
            )
        config = Config.from_gguf(file)
        _check_source(file, allow_requantize)
        sources = file.parts if isinstance(file, Checkpoint) else [file.path]
        if dst.exists() and (not overwrite or dst.is_dir() or any(map(dst.samefile, sources))):
            raise InvalidParameterError(
                f"{dst} exists; choose another name, or have it replaced (overwrite=True, --force), which a "
                "folder and the source itself are not"
            )
        pool = _kernels.Pool(default_threads(n_threads).count)
        try:
            _write(dst, file, config, mix, pool, progress)
        except OSError as error:
            raise ModelWriteError(f"{dst} cannot be written: {error.strerror or error}") from error


def _check_source(file: GGUFFile | Checkpoint, allow_requantize: bool) -> None:
    for tensor in file.tensors.values():
        if len(tensor.shape) == 1 or tensor.type in FLOATS:
            continue
        if not allow_requantize:
            raise InvalidParameterError(
                f"{file.path} is quantised already ({tensor.name} is {tensor.type.name}); begin with F16 or "
                "BF16, or accept what is lost twice (allow_requantize=True, --allow-requantize)"
            )
        if not _kernels.has_kernels(tensor.type):
            raise UnsupportedQuantError(
                f"{file.path}: tensor {tensor.name} is {tensor.type.name}, which phi3c does not read",
                tensor.name,
                tensor.type.name,
            )


def _write(
    dst: Path,
    file: GGUFFile | Checkpoint,
    config: Config,
    mix: Mix,
    pool: _kernels.Pool,
    progress: Progress | None,
) -> None:
    total = sum(tensor.n_bytes for tensor in file.tensors.values())
    done = 0

    def data(tensor: TensorInfo, type: GGMLType) -> NDArray[np.uint8]:
        nonlocal done
        if progress:
            progress("quantize", done, total)
        done += tensor.n_bytes
        source = file.data(tensor.name)
        if type is tensor.type:
            return source
        blocks = np.empty(n_bytes(tensor.shape, type), np.uint8)
        try:
            _kernels.encode(blocks, type, source, tensor.type, tensor.rows * tensor.columns, pool)
        except OverflowError as error:
            message = f"{file.path}: tensor {tensor.name} cannot become {type.name}: {error}"
            raise NumericalError(message) from None
        if isinstance(file, GGUFFile):
            file.release(tensor.name)
        return blocks

    def stored(tensor: TensorInfo) -> tuple[str, tuple[int, ...], GGMLType, Data]:
        type = target_type(mix, config, tensor)
        return tensor.name, tensor.shape, type, lambda: data(tensor, type)

    metadata = {**file.metadata, "general.file_type": mix.file_type}
    if mix.base not in FLOATS:
        metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    write_gguf(dst, metadata, map(stored, file.tensors.values()))
    if progress:
        progress("quantize", total, total)
