"""The cases of tests/golden: models with one feature each, and what transformers computed for them.

`tests/make_goldens.py` fills the folder, which needs torch; reading it needs NumPy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from blocks import LAYOUTS, QUANT_TYPES
from models import write_tiny_llama, write_tiny_phi3
from numpy.typing import NDArray

from phi3c.gguf import GGUFFile

F32 = NDArray[np.float32]
Ids = NDArray[np.uint16]

FOLDER = Path(__file__).parent / "golden"
N_ROWS = 2  # logits are kept whole behind so many tokens of a prompt, the last one among them


@dataclass(frozen=True)
class Case:
    """A random model and the prompts it is given.

    Attributes:
        model: arguments of `write_tiny_phi3`.
        prompts: for each, its tokens and how many more to generate greedily.
        window: keys a query sees, where the file leaves that to a rule.
        llama: write it with `write_tiny_llama` instead.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[int, int], ...] = ((120, 24),)
    window: int | None = None
    llama: bool = False

    def write(self, path: Path) -> Path:
        """Write the model: the same bytes each time."""
        write = write_tiny_llama if self.llama else write_tiny_phi3
        return write(path, vocab=VOCAB, **self.model)


# Real weights, given a sliding window: the last tokens of a text are scored under each of WINDOWS.
WINDOW_TOKENS, WINDOW_SCORED = 3500, 1000
WINDOWS = (256, None)


def factors(n_rot: int, short: float, long: float) -> tuple[F32, F32]:
    """LongRoPE divisors that rise from 1, as those of the real models do, to `short` and `long`."""

    def ramp(end: float) -> F32:
        return np.linspace(1, end, n_rot // 2, dtype=np.float32)

    return ramp(short), ramp(long)


VOCAB = 288
# The last length for the short factors, the first for the long ones, and generation from one to the other.
AROUND_64 = ((64, 0), (65, 0), (50, 40))
LONGROPE = {"original_ctx": 64, "factors": factors(32, 2.5, 40)}
K_SIZE = {"heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512}  # whole blocks of 256 columns

CASES: dict[str, Case] = {
    "plain": Case(),
    "four layers": Case({"layers": 4}),
    "one kv head": Case({"heads": 4, "kv_heads": 1}),
    "a kv head each": Case({"heads": 4, "kv_heads": 4}),
    "heads 40 over 10": Case({"heads": 40, "kv_heads": 10, "head_dim": 16}),
    "heads 24 over 8": Case({"heads": 24, "kv_heads": 8, "head_dim": 16}),
    "head of 96": Case({"heads": 2, "kv_heads": 2, "head_dim": 96}),
    "head of 128": Case({"heads": 4, "kv_heads": 1, "head_dim": 128}),
    "24 of 32 rotated": Case({"rope_dims": 24}),
    "96 of 128 rotated": Case({"heads": 3, "kv_heads": 1, "head_dim": 128, "rope_dims": 96}),
    "tied": Case({"tied": True}),
    "llama": Case({"kv_heads": 4, "layers": 3}, llama=True),
    "llama, shared heads": Case({"heads": 6, "kv_heads": 2}, llama=True),
    "tied Q6_K": Case({**K_SIZE, "tied": True, "types": {"token_embd": "Q6_K"}}),
    # Prompts longer than the window, and an answer that outgrows it, over a boundary of pages.
    "window of 20": Case({"window": 20}, ((150, 40),)),
    "window of 64": Case({"window": 64}, ((150, 40),)),
    "window of 100": Case({"window": 100}, ((90, 60), (300, 0))),
    "window beyond the context": Case({"window": 512}),
    "window that the file leaves out": Case(
        {"layers": 32, "heads": 2, "kv_heads": 2, "ffn": 64, "ctx": 4096, "window": "absent"},
        ((2200, 4),),
        window=2047,
    ),
    "window of 600, 3500 tokens": Case({"window": 600, "ctx": 4096}, ((3500, 0),)),
    "rope base 250000": Case({"rope_base": 250000.0}),
    "rope base 500000": Case({"rope_base": 500000.0}),
    "LongRoPE": Case(LONGROPE, (*AROUND_64, (150, 0))),
    "LongRoPE, other factors": Case({**LONGROPE, "factors": factors(32, 1.2, 60)}, AROUND_64),
    "LongRoPE with attn_factor": Case({**LONGROPE, "attn_factor": 1.0}, AROUND_64),
    "LongRoPE, 24 over 8, 12 of 16 rotated, tied": Case(
        {"heads": 24, "kv_heads": 8, "head_dim": 16, "rope_dims": 12, "tied": True}
        | {"original_ctx": 64, "factors": factors(12, 2.5, 40)},
        AROUND_64,
    ),
    "LongRoPE, 40 over 10": Case(
        {"heads": 40, "kv_heads": 10, "head_dim": 16, "original_ctx": 64, "factors": factors(16, 2.5, 40)},
        AROUND_64,
    ),
    "LongRoPE and a window of 40": Case({**LONGROPE, "window": 40}, AROUND_64),
    "LongRoPE, Q4_K": Case(
        {**K_SIZE, "types": "Q4_K", "original_ctx": 64, "factors": factors(64, 2.5, 40)}, ((64, 0), (120, 0))
    ),
    **{f"weights {name}": Case({**K_SIZE, "types": name}, ((120, 0),)) for name in LAYOUTS},
    "weights as in Q4_K_M": Case(
        {
            **K_SIZE,
            "types": {
                "token_embd": "Q4_K",
                "attn_qkv": "Q5_K",
                "attn_output": "Q4_K",
                "ffn_up": "Q4_K",
                "blk.0.ffn_down": "Q6_K",
                "blk.1.ffn_down": "Q4_K",
                "output": "Q6_K",
            },
        },
        ((120, 0),),
    ),
}


@dataclass(frozen=True)
class Prompt:
    """What transformers' Phi3ForCausalLM says of one prompt, in float32.

    Attributes:
        ids: the prompt's tokens.
        rows: positions whose logits are kept.
        logits: (len(rows), vocab).
        top: the likeliest token behind each position.
        margin: its logit minus the second best.
        next_logprob: of ids[i + 1] behind position i.
        greedy: the greedy continuation.
        greedy_margin: best minus second best logit where each was chosen.
    """

    ids: Ids
    rows: NDArray[np.int32]
    logits: F32
    top: Ids
    margin: F32
    next_logprob: F32
    greedy: Ids
    greedy_margin: F32


@dataclass(frozen=True)
class Golden:
    """One case's figures.

    Attributes:
        sha256: of the tensors they were computed with.
        noise: root mean square error of the model's logits when the input of every quantised matrix is
            rounded to 8 bits, 32 values to a scale; 0 where no weight is quantised.
        noise_kl: KL(exact || rounded) in nats, averaged over positions.
    """

    sha256: str
    noise: float
    noise_kl: float
    prompts: tuple[Prompt, ...]


@cache
def facts() -> dict[str, Any]:
    """tests/golden/tiny.json: versions, and by case what is not an array."""
    loaded: dict[str, Any] = json.loads((FOLDER / "tiny.json").read_text(encoding="utf-8"))
    return loaded


def golden(case: str) -> Golden:
    """What is recorded of a case."""
    recorded = facts()["cases"][case]
    with np.load(FOLDER / "tiny.npz") as arrays:
        prompts = tuple(
            Prompt(**{name: arrays[f"{case}/{i}/{name}"] for name in Prompt.__dataclass_fields__})
            for i in range(len(CASES[case].prompts))
        )
    return Golden(recorded["sha256"], recorded["noise"], recorded["noise_kl"], prompts)


def tensors_sha256(path: Path) -> str:
    """Of all tensors of a file: names, types, shapes and bytes. Metadata may change, weights may not."""
    digest = hashlib.sha256()
    with GGUFFile(path) as file:
        for name, info in sorted(file.tensors.items()):
            digest.update(f"{name} {info.type.name} {info.shape}\n".encode())
            digest.update(file.data(name))
    return digest.hexdigest()


def is_quantized(case: str) -> bool:
    """Whether any weight of the case's model is, so that activations are rounded to int8."""
    types = CASES[case].model.get("types", "F32")
    return not isinstance(types, str) or types in QUANT_TYPES
