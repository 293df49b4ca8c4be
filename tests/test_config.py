"""Hyper-parameters from GGUF metadata: what is read, what is defaulted, and what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_files import Metadata, Tensors, tiny_llama_metadata, tiny_phi3_metadata, tiny_tensors, write_tiny

from phi3c.config import Config
from phi3c.errors import UnsupportedModelError, UnsupportedQuantError
from phi3c.gguf import GGMLType, GGUFFile, Value, n_bytes


def config_of(tmp_path: Path, metadata: Metadata, tensors: Tensors | None = None) -> Config:
    if tensors is None:
        tensors = tiny_tensors(metadata)
    with GGUFFile(write_tiny(tmp_path / "model.gguf", metadata, tensors)) as file:
        return Config.from_gguf(file)


def zeros(type: GGMLType, *shape: int) -> tuple[tuple[int, ...], GGMLType, bytes]:
    return shape, type, bytes(n_bytes(shape, type))


# --- what is read -----------------------------------------------------------------------------------------


def test_phi3(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.freq_base": 250000.0, "phi3.rope.dimension_count": 12})
    assert config_of(tmp_path, metadata) == Config(
        architecture="phi3",
        name="tiny",
        block_count=2,
        embedding_length=64,
        feed_forward_length=96,
        head_count=4,
        head_count_kv=2,
        head_dim=16,
        rope_dimension_count=12,
        rope_freq_base=250000.0,
        rope_factors_short=None,
        rope_factors_long=None,
        rope_attn_factor=1.0,
        layer_norm_rms_epsilon=float(np.float32(1e-5)),
        context_length=256,
        original_context_length=256,
        sliding_window=None,
        vocab_size=128,
        tied=False,
        file_type=0,
    )


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata(
        **{
            "general.name": None,
            "general.file_type": None,
            "phi3.attention.head_count_kv": None,
            "phi3.rope.dimension_count": None,
        }
    )
    tensors = tiny_tensors({**metadata, "phi3.attention.head_count_kv": 4})
    config = config_of(tmp_path, metadata, tensors)
    assert (config.name, config.file_type) == ("model", None)
    assert (config.head_count_kv, config.rope_dimension_count) == (4, 16)
    assert config.rope_freq_base == 10000.0


@pytest.mark.parametrize("fused_qkv", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_phi3_with_either_form_of_attention_and_output(tmp_path: Path, tied: bool, fused_qkv: bool) -> None:
    metadata = tiny_phi3_metadata()
    assert config_of(tmp_path, metadata, tiny_tensors(metadata, tied=tied, fused_qkv=fused_qkv)).tied is tied


def test_llama(tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny_llama_metadata(**{"llama.rope.freq_base": 100000.0}))
    assert (config.architecture, config.rope_freq_base, config.sliding_window) == ("llama", 100000.0, None)


def test_head_size_from_key_length(tmp_path: Path) -> None:
    metadata = tiny_llama_metadata(
        **{"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.block_count": 1}
    )
    f32 = GGMLType.F32
    tensors = tiny_tensors(metadata) | {
        "blk.0.attn_q.weight": zeros(f32, 64, 4 * 32),
        "blk.0.attn_k.weight": zeros(f32, 64, 2 * 32),
        "blk.0.attn_v.weight": zeros(f32, 64, 2 * 32),
        "blk.0.attn_output.weight": zeros(f32, 4 * 32, 64),
    }
    assert config_of(tmp_path, metadata, tensors).head_dim == 32


def test_inventory_like_that_of_the_demo_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct.Q4_1.gguf, with 3 of its 30 layers and 512 of its 49152 tokens."""
    metadata: Metadata = {
        "general.architecture": "llama",
        "general.name": "Smollm2 135M",
        "llama.block_count": 3,
        "llama.context_length": 8192,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "general.file_type": 3,
        "llama.vocab_size": 512,
        "llama.rope.dimension_count": 64,
    }
    q4_1, f32 = GGMLType.Q4_1, GGMLType.F32
    tensors: Tensors = {"token_embd.weight": zeros(GGMLType.Q8_0, 576, 512)}
    for i in range(3):
        tensors |= {
            f"blk.{i}.attn_norm.weight": zeros(f32, 576),
            f"blk.{i}.ffn_down.weight": zeros(q4_1, 1536, 576),
            f"blk.{i}.ffn_gate.weight": zeros(q4_1, 576, 1536),
            f"blk.{i}.ffn_up.weight": zeros(q4_1, 576, 1536),
            f"blk.{i}.ffn_norm.weight": zeros(f32, 576),
            f"blk.{i}.attn_k.weight": zeros(q4_1, 576, 192),
            f"blk.{i}.attn_output.weight": zeros(q4_1, 576, 576),
            f"blk.{i}.attn_q.weight": zeros(q4_1, 576, 576),
            f"blk.{i}.attn_v.weight": zeros(q4_1, 576, 192),
        }
    tensors["output_norm.weight"] = zeros(f32, 576)
    config = config_of(tmp_path, metadata, tensors)
    assert (config.head_count, config.head_count_kv, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.tied, config.file_type) == (512, True, 3)


def test_the_shared_phi3_model(shared: Path) -> None:
    with GGUFFile(shared / "models" / "smollm2-135m-phi3-q4_k_m.gguf") as file:
        config = Config.from_gguf(file)
    assert (config.architecture, config.block_count, config.embedding_length) == ("phi3", 30, 768)
    assert (config.head_count, config.head_count_kv, config.head_dim) == (12, 4, 64)
    assert (config.vocab_size, config.tied, config.file_type) == (49152, True, 15)
    assert config.sliding_window is None  # the file says 0
    assert math.isclose(config.layer_norm_rms_epsilon, 7.5e-6, rel_tol=1e-6)


# --- sliding window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layers", "context", "key", "window"),
    [
        (tiny_phi3_metadata, 32, 4096, None, 2047),  # Phi-3-mini-4k, whose official file has no key
        (tiny_phi3_metadata, 40, 4096, None, 2047),  # Phi-3-medium-4k
        (tiny_phi3_metadata, 32, 4096, 2047, 2047),
        (tiny_phi3_metadata, 32, 4096, 0, None),
        (tiny_phi3_metadata, 30, 4096, None, None),
        (tiny_phi3_metadata, 32, 8192, None, None),
        (tiny_phi3_metadata, 40, 16384, 0, None),  # Phi-4
        (tiny_phi3_metadata, 40, 16384, 131072, None),  # Phi-4 from another converter
        (tiny_phi3_metadata, 2, 256, 255, 255),
        (tiny_phi3_metadata, 2, 256, 256, None),
        (tiny_phi3_metadata, 2, 256, 2**32 - 1, None),
        (tiny_llama_metadata, 32, 4096, None, None),
    ],
)
def test_sliding_window(
    tmp_path: Path,
    make: Callable[..., Metadata],
    layers: int,
    context: int,
    key: int | None,
    window: int | None,
) -> None:
    architecture = "phi3" if make is tiny_phi3_metadata else "llama"
    metadata = make(
        **{
            f"{architecture}.block_count": layers,
            f"{architecture}.context_length": context,
            f"{architecture}.attention.sliding_window": key,
        }
    )
    assert config_of(tmp_path, metadata).sliding_window == window


# --- rotary factors -----------------------------------------------------------------------------------------


def divisors(*values: float) -> tuple[tuple[int, ...], GGMLType, bytes]:
    return (len(values),), GGMLType.F32, np.array(values, "<f4").tobytes()


SHORT, LONG, FREQS = (tuple(k + j / 8 for j in range(8)) for k in (1.0, 4.0, 9.0))  # exact in float32


def with_factors(metadata: Metadata) -> Tensors:
    return tiny_tensors(metadata) | {
        "rope_factors_long.weight": divisors(*LONG),
        "rope_factors_short.weight": divisors(*SHORT),
    }


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_factors(tmp_path: Path, architecture: str) -> None:
    make = tiny_phi3_metadata if architecture == "phi3" else tiny_llama_metadata
    scaling = f"{architecture}.rope.scaling."
    metadata = make(**{scaling + "original_context_length": 64, scaling + "attn_factor": 1.25})
    config = config_of(tmp_path, metadata, with_factors(metadata))
    assert (config.rope_factors_short, config.rope_factors_long) == (SHORT, LONG)
    assert (config.context_length, config.original_context_length) == (256, 64)
    assert config.rope_attn_factor == 1.25


@pytest.mark.parametrize(
    ("context", "original", "expected"),
    [
        (131072, 4096, 1.1902380714238083),  # sqrt(17 / 12)
        (256, 64, math.sqrt(1 + 2 / 6)),
        (256, 256, 1.0),
        (256, 1024, 1.0),
        (256, 1, 1.0),
    ],
)
def test_attn_factor_of_files_that_do_not_say(
    tmp_path: Path, context: int, original: int, expected: float
) -> None:
    metadata = tiny_phi3_metadata(
        **{"phi3.context_length": context, "phi3.rope.scaling.original_context_length": original}
    )
    config = config_of(tmp_path, metadata, with_factors(metadata))
    assert config.rope_attn_factor == pytest.approx(expected, rel=1e-15)
    assert config.original_context_length == min(original, context)
    # Only LongRoPE defines it.
    assert config_of(tmp_path, metadata).rope_attn_factor == 1.0


@pytest.mark.parametrize("others", [True, False])
def test_rope_freqs_count_before_the_other_factors(tmp_path: Path, others: bool) -> None:
    metadata = tiny_llama_metadata(**{"llama.rope.scaling.original_context_length": 64})
    tensors = with_factors(metadata) if others else tiny_tensors(metadata)
    config = config_of(tmp_path, metadata, tensors | {"rope_freqs.weight": divisors(*FREQS)})
    assert (config.rope_factors_short, config.rope_factors_long) == (FREQS, None)
    assert config.rope_attn_factor == 1.0


@pytest.mark.parametrize(
    ("context", "original", "is_told"),
    [(131072, 4096, True), (131072, None, True), (256, 64, True), (256, 256, False), (256, 0, False)],
)
def test_an_extended_context_without_factors_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, context: int, original: int | None, is_told: bool
) -> None:
    metadata = tiny_phi3_metadata(
        **{"phi3.context_length": context, "phi3.rope.scaling.original_context_length": original}
    )
    config = config_of(tmp_path, metadata)
    assert (config.rope_factors_short, config.rope_factors_long) == (None, None)
    assert len(caplog.records) == is_told
    assert not is_told or "model.gguf is made for" in caplog.text


def test_nothing_is_told_where_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.scaling.original_context_length": 64})
    config_of(tmp_path, metadata, with_factors(metadata))
    config_of(tmp_path, metadata, tiny_tensors(metadata) | {"rope_freqs.weight": divisors(*FREQS)})
    config_of(tmp_path, tiny_phi3_metadata())
    assert not caplog.records


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-30])
@pytest.mark.parametrize("name", ["rope_factors_short", "rope_factors_long", "rope_freqs"])
def test_factors_that_no_model_has(tmp_path: Path, name: str, bad: float) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.scaling.original_context_length": 64})
    tensors = with_factors(metadata) | {f"{name}.weight": divisors(*SHORT[:5], bad, *SHORT[6:])}
    with pytest.raises(UnsupportedModelError, match=rf"{name}.weight\[5\] is .* finite number"):
        config_of(tmp_path, metadata, tensors)


@pytest.mark.parametrize("name", ["rope_factors_short", "rope_factors_long", "rope_freqs"])
def test_factors_of_another_shape(tmp_path: Path, name: str) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.scaling.original_context_length": 64})
    for tensor in (zeros(GGMLType.F32, 16), zeros(GGMLType.F32, 8, 2)):
        with pytest.raises(UnsupportedModelError, match=f"{name}.weight has shape"):
            config_of(tmp_path, metadata, with_factors(metadata) | {f"{name}.weight": tensor})
    halves = {f"{name}.weight": zeros(GGMLType.F16, 8)}
    with pytest.raises(UnsupportedQuantError, match=f"{name}.weight is F16"):
        config_of(tmp_path, metadata, with_factors(metadata) | halves)


@pytest.mark.parametrize("missing", ["short", "long"])
def test_one_set_of_two_is_missing(tmp_path: Path, missing: str) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.scaling.original_context_length": 64})
    tensors = with_factors(metadata)
    del tensors[f"rope_factors_{missing}.weight"]
    with pytest.raises(UnsupportedModelError, match=f"tensor rope_factors_{missing}.weight is missing"):
        config_of(tmp_path, metadata, tensors)


@pytest.mark.parametrize("original", [None, 0])
def test_factors_without_the_context_they_are_for(tmp_path: Path, original: int | None) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.rope.scaling.original_context_length": original})
    with pytest.raises(UnsupportedModelError, match="original_context_length is "):
        config_of(tmp_path, metadata, with_factors(metadata))


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("phimoe", "phimoe.*Phi-3.5-MoE.*mixtures of experts"),
        ("phi2", "phi2.*Phi-2 have LayerNorm"),
        ("phi3small", "phi3small.*block-sparse"),
        ("phi4flash", "phi4flash.*state-space"),
        ("phi4mm", "phi4mm.*images and sound"),
        ("clip", "clip.*image projector"),
        ("qwen2", "qwen2.*phi3c runs phi3 and llama"),
        (None, "general.architecture None"),
        (3, "general.architecture 3"),
        (np.zeros(3), "general.architecture"),
    ],
)
def test_other_architectures(tmp_path: Path, architecture: Value | None, message: str) -> None:
    metadata = tiny_phi3_metadata()
    metadata.pop("general.architecture")
    if architecture is not None:
        metadata["general.architecture"] = architecture
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(tmp_path, metadata, tiny_tensors(tiny_phi3_metadata()))


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_required_keys(tmp_path: Path, key: str) -> None:
    metadata = tiny_phi3_metadata(**{f"phi3.{key}": None})
    with pytest.raises(UnsupportedModelError, match=f"phi3.{key} is missing"):
        config_of(tmp_path, metadata, tiny_tensors(tiny_phi3_metadata()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("context_length", 0, "context_length is 0"),
        ("context_length", 2**24 + 1, "context_length 16777217"),
        ("embedding_length", -64, "embedding_length is -64"),
        ("embedding_length", 62, "no multiple of attention.head_count"),
        ("embedding_length", 128, r"token_embd.weight has shape \(64,"),
        ("feed_forward_length", True, "feed_forward_length is True"),
        ("feed_forward_length", 128, "ffn_"),
        ("block_count", 0, "block_count is 0"),
        ("block_count", 10**9, "1000000000 layers, but only"),
        ("block_count", "two", "block_count is 'two'"),
        ("block_count", 2.0, "block_count is 2.0"),
        ("block_count", 1, "blk.1.*is no part of the network"),
        ("block_count", 3, "blk.2.*is missing"),
        ("attention.head_count", 0, "head_count is 0"),
        ("attention.head_count", np.array([4, 4], np.int32), "head_count is"),
        ("attention.head_count", 8, "head size 8 is no multiple of 16"),
        ("attention.head_count_kv", 0, "head_count_kv is 0"),
        ("attention.head_count_kv", 3, "4 query heads cannot share 3"),
        ("attention.head_count_kv", 8, "4 query heads cannot share 8"),
        ("attention.head_count_kv", 4, "attn_"),
        ("attention.key_length", 24, "head size 24 is no multiple of 16"),
        ("attention.value_length", 32, "value size 32 is not the key size 16"),
        ("attention.layer_norm_rms_epsilon", 0.0, "epsilon is 0.0"),
        ("attention.layer_norm_rms_epsilon", -1e-5, "epsilon is -"),
        ("attention.layer_norm_rms_epsilon", math.nan, "epsilon is nan"),
        ("rope.freq_base", 0.0, "freq_base is 0.0"),
        ("rope.freq_base", math.inf, "freq_base is inf"),
        ("rope.freq_base", "big", "freq_base is 'big'"),
        ("rope.freq_base", 0.5, "freq_base is 0.5, but must be at least 1"),
        ("rope.scaling.attn_factor", 0.0, "attn_factor is 0.0"),
        ("rope.scaling.attn_factor", math.inf, "attn_factor is inf"),
        ("rope.scaling.original_context_length", -1, "original_context_length is -1"),
        ("rope.dimension_count", 0, "dimension_count is 0"),
        ("rope.dimension_count", 15, "dimension_count 15 is not an even number"),
        ("rope.dimension_count", 0, "must be a whole number from 1 up"),
        ("rope.dimension_count", 18, "dimension_count 18 is not an even number from 2 to"),
        ("attention.sliding_window", -1, "sliding_window is -1"),
    ],
)
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_values_that_no_such_model_has(
    tmp_path: Path, architecture: str, key: str, value: Value, message: str
) -> None:
    make = tiny_phi3_metadata if architecture == "phi3" else tiny_llama_metadata
    metadata = make(**{f"{architecture}.{key}": value})
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(tmp_path, metadata, tiny_tensors(make()))


@pytest.mark.parametrize(
    ("key", "harmless", "harmful"),
    [
        ("expert_count", 0, 16),
        ("expert_count", 0, np.array([0], np.int32)),
        ("rope.scaling.type", "none", "dynamic"),
        ("rope.scaling.type", "linear", "yarn"),
        ("rope.scaling.type", "longrope", "llama3"),
        ("rope.scaling.factor", 1.0, 4.0),
        ("rope.scale_linear", 1.0, 2.0),
        ("attn_logit_softcapping", 0.0, 50.0),
        ("final_logit_softcapping", 0.0, 30.0),
        ("logit_scale", 1.0, 0.5),
        ("residual_scale", 1.0, 0.22),
        ("embedding_scale", 1.0, 12.0),
        ("attention.scale", 0.0, 0.0156),
        ("attention.clamp_kqv", 0.0, 8.0),
        ("attention.max_alibi_bias", 0.0, 8.0),
        ("attention.causal", True, False),
        ("use_parallel_residual", False, True),
    ],
)
@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_features_that_change_the_computation(
    tmp_path: Path, architecture: str, key: str, harmless: Value, harmful: Value
) -> None:
    make = tiny_phi3_metadata if architecture == "phi3" else tiny_llama_metadata
    config_of(tmp_path, make(**{f"{architecture}.{key}": harmless}))
    with pytest.raises(UnsupportedModelError, match=key):
        config_of(tmp_path, make(**{f"{architecture}.{key}": harmful}))


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata()
    config_of(tmp_path, metadata | {"phi3.colour": "blue", "llama.expert_count": 8})


def with_bias(tensors: Tensors) -> None:
    tensors["blk.0.attn_qkv.bias"] = zeros(GGMLType.F32, 128)


def with_gate(tensors: Tensors) -> None:
    tensors["blk.1.ffn_gate.weight"] = zeros(GGMLType.F32, 64, 96)


def with_both_forms_of_attention(tensors: Tensors) -> None:
    tensors["blk.1.attn_q.weight"] = zeros(GGMLType.F32, 64, 64)


def without_norm(tensors: Tensors) -> None:
    del tensors["output_norm.weight"]


def without_embedding(tensors: Tensors) -> None:
    del tensors["token_embd.weight"]


def with_transposed_matrix(tensors: Tensors) -> None:
    tensors["blk.0.ffn_down.weight"] = zeros(GGMLType.F32, 64, 96)


def with_another_vocabulary(tensors: Tensors) -> None:
    tensors["output.weight"] = zeros(GGMLType.F32, 64, 127)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_bias, "blk.0.attn_qkv.bias is a bias"),
        (with_gate, "blk.1.ffn_gate.weight is no part"),
        (with_both_forms_of_attention, "blk.1.attn_q.weight is no part"),
        (without_norm, "output_norm.weight is missing"),
        (without_embedding, "no token_embd.weight"),
        (with_transposed_matrix, r"ffn_down.weight has shape \(64, 96\), the metadata asks for \(96, 64\)"),
        (with_another_vocabulary, r"output.weight has shape \(64, 127\)"),
    ],
)
def test_tensors_outside_the_inventory(
    tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    metadata = tiny_phi3_metadata()
    tensors = tiny_tensors(metadata)
    change(tensors)
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(tmp_path, metadata, tensors)


def test_norm_weights_must_be_f32(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata()
    tensors = tiny_tensors(metadata) | {"blk.1.ffn_norm.weight": zeros(GGMLType.F16, 64)}
    with pytest.raises(UnsupportedQuantError, match="norm weights and rotary factors must be F32") as caught:
        config_of(tmp_path, metadata, tensors)
    assert (caught.value.tensor, caught.value.type) == ("blk.1.ffn_norm.weight", "F16")


def test_rows_are_multiples_of_32(tmp_path: Path) -> None:
    metadata = tiny_phi3_metadata(**{"phi3.feed_forward_length": 80})
    with pytest.raises(UnsupportedModelError, match=r"ffn_down.weight have 80 elements"):
        config_of(tmp_path, metadata)


def test_one_part_of_a_split_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--merge"):
        config_of(tmp_path, tiny_phi3_metadata(**{"split.count": 2}))
