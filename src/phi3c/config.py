"""Hyper-parameters of a model, read from GGUF metadata and checked against the tensors of the file.

After `Config.from_gguf` every tensor is known by name and has exactly the shape the network needs.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from phi3c.errors import UnsupportedModelError, UnsupportedQuantError
from phi3c.gguf import GGMLType, TensorInfo, TensorSource

ARCHITECTURES: Final = ("phi3", "llama")
ROPE_FACTORS_SHORT: Final = "rope_factors_short.weight"
ROPE_FACTORS_LONG: Final = "rope_factors_long.weight"
ROPE_FREQS: Final = "rope_freqs.weight"  # divisors for sequences of any length; counts before the other two
_MAX_CONTEXT = 2**24  # the last position float32 counts exactly
_MIN_FACTOR = 2.0**-10  # models have 1 and more; this keeps angles within what a double can reduce
_EXTENDED = 131072  # every phi3 of this context came from 4096 by LongRoPE

logger = logging.getLogger(__name__)

_LOOK_ALIKES = {
    "phimoe": "Phi-3.5-MoE and Phi-mini-MoE are mixtures of experts",
    "phi2": "Phi-1, Phi-1.5 and Phi-2 have LayerNorm and parallel blocks",
    "phi3small": "Phi-3-small has block-sparse attention",
    "phi4flash": "Phi-4-mini-flash mixes attention with state-space layers",
    "phi4mm": "Phi-4-multimodal has towers for images and sound; Phi-4-mini is a model like its text part",
    "clip": "this is the image projector (mmproj) of a model, not the language model",
}

# Metadata that would change the computation -> the values with which it changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window_pattern": (),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (1,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none", "linear", "longrope"),
    "use_parallel_residual": (False,),
}


@dataclass(frozen=True, slots=True)
class Config:
    """What the forward pass needs to know of a model; names are GGUF's.

    Attributes:
        architecture: "phi3" (ffn_gate fused into ffn_up, attn_q/k/v usually into attn_qkv) or "llama" (all
            apart, rows of attn_q and attn_k ordered for interleaved rotary embedding).
        name: general.name, or the file's name without suffix.
        block_count: number of layers.
        embedding_length: width of the residual stream, d.
        feed_forward_length: width of the gated unit in each layer.
        head_count: query heads, a multiple of head_count_kv.
        head_count_kv: key and value heads.
        head_dim: elements per head, a multiple of 16.
        rope_dimension_count: leading elements of a head that are rotated; even, at most head_dim.
        rope_freq_base: base of the rotary frequencies.
        rope_factors_short: divisors of the rope_dimension_count / 2 frequencies; None: all are 1.
        rope_factors_long: those for sequences longer than original_context_length (LongRoPE); None: the same.
        rope_attn_factor: what cos and sin are multiplied with, whatever the sequence's length.
        layer_norm_rms_epsilon: added to the mean square in RMSNorm.
        context_length: positions the model was trained for.
        original_context_length: those it was trained for before its context was extended.
        sliding_window: a query sees this many keys, itself included; None: all before it.
        vocab_size: rows of the embedding and of the logits.
        tied: the embedding also is the output matrix.
        file_type: general.file_type (15 is Q4_K_M), None if the file does not say.
    """

    architecture: str
    name: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    rope_dimension_count: int
    rope_freq_base: float
    rope_factors_short: tuple[float, ...] | None
    rope_factors_long: tuple[float, ...] | None
    rope_attn_factor: float
    layer_norm_rms_epsilon: float
    context_length: int
    original_context_length: int
    sliding_window: int | None
    vocab_size: int
    tied: bool
    file_type: int | None

    @classmethod
    def from_gguf(cls, file: TensorSource) -> Config:
        """Read the hyper-parameters of `file` and check all of its tensors' names and shapes.

        Raises:
            UnsupportedModelError: another architecture, a feature phi3c does not compute, a value no model
                can have, or a tensor that is missing, unknown or of the wrong shape.
            UnsupportedQuantError: norm weights or rotary factors that are not F32.
        """
        hyper = _Hyperparameters(file)
        _refuse_features(hyper)

        d, head_count = hyper.integer("embedding_length"), hyper.integer("attention.head_count")
        if d % head_count and hyper.get("attention.key_length") is None:
            raise hyper.refuse(f"embedding_length {d} is no multiple of attention.head_count {head_count}")
        head_dim = hyper.integer("attention.key_length", default=d // head_count)
        rope_dims = hyper.integer("rope.dimension_count", default=head_dim)
        context_length = hyper.integer("context_length")
        original_context_length = _original_context(hyper, context_length)
        name, file_type = file.metadata.get("general.name"), file.metadata.get("general.file_type")
        config = cls(
            architecture=hyper.architecture,
            name=name if isinstance(name, str) else file.path.stem,
            block_count=hyper.integer("block_count"),
            embedding_length=d,
            feed_forward_length=hyper.integer("feed_forward_length"),
            head_count=head_count,
            head_count_kv=hyper.integer("attention.head_count_kv", default=head_count),
            head_dim=head_dim,
            rope_dimension_count=rope_dims,
            rope_freq_base=hyper.positive("rope.freq_base", default=10000.0),
            rope_factors_short=_factors(hyper, ROPE_FREQS, rope_dims)
            or _factors(hyper, ROPE_FACTORS_SHORT, rope_dims),
            rope_factors_long=None
            if ROPE_FREQS in file.tensors
            else _factors(hyper, ROPE_FACTORS_LONG, rope_dims),
            rope_attn_factor=_attn_factor(hyper, context_length, original_context_length),
            layer_norm_rms_epsilon=hyper.positive("attention.layer_norm_rms_epsilon"),
            context_length=context_length,
            original_context_length=original_context_length,
            sliding_window=_sliding_window(hyper, context_length),
            vocab_size=file.tensors["token_embd.weight"].rows,
            tied="output.weight" not in file.tensors,
            file_type=file_type if isinstance(file_type, int) else None,
        )
        _check_relations(hyper, config)
        _check_tensors(hyper, config)
        return config


class _Hyperparameters:
    """The metadata of a file under its architecture's prefix; says what is wrong with it."""

    def __init__(self, file: TensorSource) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            reason = _LOOK_ALIKES.get(str(architecture), "phi3c runs " + " and ".join(ARCHITECTURES))
            raise self.refuse(f"unsupported general.architecture {reprlib.repr(architecture)}: {reason}")
        self.architecture = architecture

    def refuse(self, message: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.file.path}: {message}")

    def get(self, key: str) -> object:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if type(value) is not int or value < minimum:
            raise self._bad_value(key, value, f"a whole number from {minimum} up")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._bad_value(key, value, "a finite number above 0")
        return float(value)

    def _bad_value(self, key: str, value: object, wanted: str) -> UnsupportedModelError:
        found = "missing" if value is None else reprlib.repr(value)
        return self.refuse(f"{self.architecture}.{key} is {found}, but must be {wanted}")


def _refuse_features(hyper: _Hyperparameters) -> None:
    """Refuse what phi3c does not compute, before anything that would only be a consequence of it."""
    tensors = hyper.file.tensors
    if not _is_one_of(hyper.file.metadata.get("split.count", 1), (0, 1)):
        raise hyper.refuse("one part of a model in several files; join them with llama-gguf-split --merge")
    if "token_embd.weight" not in tensors:
        raise hyper.refuse("no token_embd.weight: a file without a model, such as a vocabulary")
    for key, neutral in _NEUTRAL.items():
        value = hyper.get(key)
        if value is not None and not _is_one_of(value, neutral):
            raise hyper.refuse(f"{hyper.architecture}.{key} = {reprlib.repr(value)} is not supported")


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return isinstance(value, bool | int | float | str) and value in allowed


def _original_context(hyper: _Hyperparameters, context_length: int) -> int:
    """Positions before the context was extended. 0 in the file means that it never was."""
    key = "rope.scaling.original_context_length"
    tensors = hyper.file.tensors
    has_factors = ROPE_FACTORS_LONG in tensors or ROPE_FACTORS_SHORT in tensors
    if has_factors:  # without the key nobody can tell which sequences take which
        original = hyper.integer(key)
    else:
        original = hyper.integer(key, default=0, minimum=0) or context_length
    is_extended = original < context_length or (
        hyper.architecture == "phi3" and hyper.get(key) is None and context_length == _EXTENDED
    )
    if is_extended and not has_factors and ROPE_FREQS not in tensors:
        logger.warning(
            "%s is made for %d tokens by rotary factors (LongRoPE), but does not hold them: answers will be "
            "poor, the more so the longer the text; look for a newer conversion of the model, with %s and %s",
            hyper.file.path,
            context_length,
            ROPE_FACTORS_SHORT,
            ROPE_FACTORS_LONG,
        )
    return min(original, context_length)


def _factors(hyper: _Hyperparameters, name: str, rope_dims: int) -> tuple[float, ...] | None:
    """A tensor of divisors, one for each frequency; None if the file has none."""
    tensor = hyper.file.tensors.get(name)
    if tensor is None:
        return None
    _check_tensor(hyper, tensor, (rope_dims // 2,))
    factors: tuple[float, ...] = tuple(hyper.file.data(name).view("<f4").tolist())
    for j, factor in enumerate(factors):
        if not _MIN_FACTOR <= factor < math.inf:
            raise hyper.refuse(f"{name}[{j}] is {factor}, but must be a finite number from {_MIN_FACTOR} up")
    return factors


def _attn_factor(hyper: _Hyperparameters, context_length: int, original_context_length: int) -> float:
    """The file's, or what LongRoPE defines: sqrt(1 + ln(context / original) / ln(original)).

    By decimal arithmetic: a system's `log` may differ from another's in the last bit.
    """
    from decimal import Decimal, localcontext

    key = "rope.scaling.attn_factor"
    is_longrope = ROPE_FACTORS_LONG in hyper.file.tensors and ROPE_FREQS not in hyper.file.tensors
    if hyper.get(key) is not None or not is_longrope or original_context_length in (1, context_length):
        return hyper.positive(key, default=1.0)
    with localcontext() as context:
        context.prec = 40
        original = Decimal(original_context_length)
        return float((1 + (context_length / original).ln() / original.ln()).sqrt())


def _sliding_window(hyper: _Hyperparameters, context_length: int) -> int | None:
    """The window in keys, or None if it never hides one. 0 in the file means off (Phi-4)."""
    if hyper.get("attention.sliding_window") is None:
        return 2047 if context_length == 4096 and _is_phi3_4k(hyper) else None
    window = hyper.integer("attention.sliding_window", minimum=0)
    return window if 0 < window < context_length else None


def _is_phi3_4k(hyper: _Hyperparameters) -> bool:
    """Whether it is Phi-3-mini or -medium, trained with a window of 2047 that official files do not mention.

    The first upload of Phi-3-mini-4k called itself a llama; no other llama has its shape.
    """
    if hyper.architecture == "phi3":
        return hyper.get("block_count") in (32, 40)
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    shape = tuple(hyper.get(key) for key in keys)
    return shape == (32, 3072, 8192, 32) and hyper.file.tensors["token_embd.weight"].rows == 32064


def _check_relations(hyper: _Hyperparameters, config: Config) -> None:
    """Check values against each other and against what the kernels can do."""
    n_tensors = len(hyper.file.tensors)
    value_length = hyper.integer("attention.value_length", default=config.head_dim)
    for is_fault, message in (
        (config.context_length > _MAX_CONTEXT, f"context_length {config.context_length} > {_MAX_CONTEXT}"),
        (config.block_count > n_tensors, f"{config.block_count} layers, but only {n_tensors} tensors"),
        (config.head_dim % 16, f"head size {config.head_dim} is no multiple of 16"),
        (config.rope_freq_base < 1, f"rope.freq_base is {config.rope_freq_base}, but must be at least 1"),
        (value_length != config.head_dim, f"value size {value_length} is not the key size {config.head_dim}"),
        (
            config.head_count % config.head_count_kv,
            f"{config.head_count} query heads cannot share {config.head_count_kv} key heads evenly",
        ),
        (
            config.rope_dimension_count % 2 or not 2 <= config.rope_dimension_count <= config.head_dim,
            f"rope.dimension_count {config.rope_dimension_count} is not an even number "
            f"from 2 to {config.head_dim}",
        ),
    ):
        if is_fault:
            raise hyper.refuse(message)


def _check_tensors(hyper: _Hyperparameters, config: Config) -> None:
    tensors = hyper.file.tensors
    expected = _inventory(config, tensors)
    for name in tensors:
        if name not in expected:
            raise hyper.refuse(f"tensor {name} {_why_unknown(name)}")
    for name, shape in expected.items():
        if name not in tensors:
            raise hyper.refuse(f"tensor {name} is missing")
        _check_tensor(hyper, tensors[name], shape)


def _check_tensor(hyper: _Hyperparameters, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise hyper.refuse(f"tensor {tensor.name} has shape {tensor.shape}, the metadata asks for {shape}")
    if len(shape) == 1 and tensor.type is not GGMLType.F32:
        raise UnsupportedQuantError(
            f"{hyper.file.path}: {tensor.name} is {tensor.type.name}; norm weights and rotary factors must "
            "be F32",
            tensor.name,
            tensor.type.name,
        )
    if len(shape) == 2 and tensor.columns % 32:
        raise hyper.refuse(f"rows of {tensor.name} have {tensor.columns} elements, no multiple of 32")


def _inventory(config: Config, found: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Every tensor the network has: name -> shape, (columns, rows) as in the file.

    Names in `found` say which of its forms the file has: q, k, v fused or apart, rotary factors or none.
    """
    d, ffn = config.embedding_length, config.feed_forward_length
    q, kv = config.head_count * config.head_dim, config.head_count_kv * config.head_dim
    is_phi3 = config.architecture == "phi3"

    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "attn_output": (q, d),
        "ffn_norm": (d,),
        "ffn_down": (ffn, d),
    }
    if is_phi3 and "blk.0.attn_qkv.weight" in found:
        block |= {"attn_qkv": (d, q + 2 * kv)}
    else:
        block |= {"attn_q": (d, q), "attn_k": (d, kv), "attn_v": (d, kv)}
    block |= {"ffn_up": (d, 2 * ffn)} if is_phi3 else {"ffn_gate": (d, ffn), "ffn_up": (d, ffn)}

    inventory: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (d, config.vocab_size),
        "output_norm.weight": (d,),
    }
    if not config.tied:
        inventory["output.weight"] = (d, config.vocab_size)
    factors = (config.rope_dimension_count // 2,)
    if ROPE_FREQS in found:
        inventory[ROPE_FREQS] = factors
    if ROPE_FACTORS_SHORT in found or ROPE_FACTORS_LONG in found:
        inventory |= {ROPE_FACTORS_SHORT: factors, ROPE_FACTORS_LONG: factors}
    for i in range(config.block_count):
        inventory |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return inventory


def _why_unknown(name: str) -> str:
    if name.endswith(".bias"):
        return "is a bias, which the supported models do not have"
    return "is no part of the network that the metadata describes"
