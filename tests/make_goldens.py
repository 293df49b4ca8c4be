"""Fill tests/golden: what Hugging Face transformers computes, in float32, for our test models.

    make goldens MODEL=model.gguf LONG_TEXT=text.txt

The configuration is written by hand from what the tests ask for, not from the GGUF file by our reader or by
transformers' importer, which drops window, partial rotary embedding and LongRoPE factors. Weights are
dequantised by tests/blocks.py. Needs the dependency group `golden`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from blocks import QUANT_TYPES, dequantize
from goldens import (
    CASES,
    FOLDER,
    N_ROWS,
    VOCAB,
    WINDOW_SCORED,
    WINDOW_TOKENS,
    WINDOWS,
    Case,
    tensors_sha256,
)
from models import fuse_llama_to_phi3
from numpy.typing import NDArray
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from phi3c.gguf import GGUFFile
from phi3c.tokenizer import Tokenizer

Model = Any
GROUP = 32  # values to a scale where activations are rounded to 8 bits

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a GGUF file of real weights in Phi-3's layout")
    parser.add_argument("--text", type=Path, help="an English text of 3500 tokens or more")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    torch.set_grad_enabled(False)
    FOLDER.mkdir(exist_ok=True)
    make_tiny()
    if args.model and args.text:
        make_window(args.model, args.text)


def make_tiny() -> None:
    """tests/golden/tiny.json and tiny.npz, of all CASES."""
    recorded: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            path = case.write(Path(folder) / "model.gguf")
            facts, prompts = run_case(case, path)
            recorded[name] = {"sha256": tensors_sha256(path), **facts}
            for i, prompt in enumerate(prompts):
                arrays |= {f"{name}/{i}/{key}": array for key, array in prompt.items()}
            print(f"{len(recorded)} of {len(CASES)}: {name}", file=sys.stderr)
    np.savez_compressed(FOLDER / "tiny.npz", **arrays)
    (FOLDER / "tiny.json").write_text(
        json.dumps({"versions": versions(), "cases": recorded}, indent=1) + "\n", encoding="utf-8"
    )


def make_window(path: Path, text: Path) -> None:
    """tests/golden/window.npz: log-probabilities of a text's last tokens with and without a window."""
    with GGUFFile(path) as file:
        metadata = dict(file.metadata)
    ids = Tokenizer.from_gguf(metadata).encode(text.read_text(encoding="utf-8"))[:WINDOW_TOKENS]
    assert len(ids) == WINDOW_TOKENS, "the text is too short"
    state, logprobs = weights(path), []
    for window in WINDOWS:
        model = load(config_of_file(metadata, window, tied=True), state, "sdpa")
        logits = forward(model, ids, WINDOW_TOKENS - WINDOW_SCORED - 1)[:-1].double()
        logprobs.append(
            logits.log_softmax(dim=-1)[np.arange(WINDOW_SCORED), ids[-WINDOW_SCORED:]].float().numpy()
        )
        print(
            f"window {window}: perplexity {np.exp(-logprobs[-1].mean(dtype=np.float64)):.4f}", file=sys.stderr
        )
    np.savez_compressed(
        FOLDER / "window.npz",
        ids=np.array(ids, np.uint16),
        logprobs=np.stack(logprobs),
        sha256=tensors_sha256(path),
    )


def config_of_file(metadata: Mapping[str, Any], window: int | None, *, tied: bool) -> Phi3Config:
    """The configuration of a `phi3` file without LongRoPE whose heads are rotated whole."""

    def key(name: str) -> Any:
        return metadata[f"phi3.{name}"]

    heads, width = key("attention.head_count"), key("embedding_length")
    assert key("rope.dimension_count") * heads == width
    assert metadata.get("phi3.rope.scaling.original_context_length") in (None, key("context_length"))
    return Phi3Config(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("attention.head_count_kv"),
        max_position_embeddings=key("context_length"),
        original_max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": key("rope.freq_base"),
            "partial_rotary_factor": 1.0,
        },
        sliding_window=window,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def run_case(case: Case, path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    if case.llama:
        eager, sdpa = (import_llama(path, attention) for attention in ("eager", "sdpa"))
    else:
        config, state = config_of(case), weights(path)
        eager, sdpa = (load(config, state, attention) for attention in ("eager", "sdpa"))
    facts = {"noise": 0.0, "noise_kl": 0.0, "sdpa_difference": 0.0}
    prompts: list[dict[str, Any]] = []
    for i, (n, n_generate) in enumerate(case.prompts):
        ids = np.random.default_rng(i).integers(0, VOCAB, n)
        logits = forward(eager, ids)
        difference = (forward(sdpa, ids) - logits).abs().max()
        facts["sdpa_difference"] = max(facts["sdpa_difference"], difference.item())
        greedy, greedy_margin = generate(eager, ids, n_generate)
        assert_generate_agrees(eager, ids, greedy, greedy_margin)
        rows = np.unique(np.linspace(0, n - 1, N_ROWS + 1).round().astype(np.int32)[1:])
        top, margin = best(logits)
        log_probs = logits.double().log_softmax(dim=-1)
        prompts.append(
            {
                "ids": ids.astype(np.uint16),
                "rows": rows,
                "logits": logits[rows].numpy(),
                "top": top,
                "margin": margin,
                "next_logprob": log_probs[np.arange(n - 1), ids[1:]].float().numpy(),
                "greedy": np.array(greedy, np.uint16),
                "greedy_margin": np.array(greedy_margin, np.float32),
            }
        )
        if quantized := quantized_modules(path):
            with rounded_activations(eager, quantized):
                rounded = forward(eager, ids)
            kl = log_probs.exp() * (log_probs - rounded.double().log_softmax(dim=-1))
            facts["noise"] = (rounded - logits).square().mean().sqrt().item()
            facts["noise_kl"] = kl.sum(dim=-1).mean().item()
    return facts, prompts


def config_of(case: Case) -> Phi3Config:
    """The configuration that the arguments of `write_tiny_phi3` mean."""
    m: Mapping[str, Any] = {
        "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256, "tied": False, "ctx": 512,
        "rope_base": 10000.0, "rope_dims": None, "window": None,
        "factors": None, "original_ctx": None, "attn_factor": None,
    } | dict(case.model)  # fmt: skip
    partial = (m["rope_dims"] or m["head_dim"]) / m["head_dim"]
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": m["rope_base"],
        "partial_rotary_factor": partial,
    }
    if m["factors"]:
        short, long = ([float(factor) for factor in factors] for factors in m["factors"])
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope |= {"original_max_position_embeddings": m["original_ctx"]}
        if m["attn_factor"]:
            rope |= {"attention_factor": m["attn_factor"]}
    return Phi3Config(
        vocab_size=VOCAB,
        hidden_size=m["heads"] * m["head_dim"],
        intermediate_size=m["ffn"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        max_position_embeddings=m["ctx"],
        original_max_position_embeddings=m["original_ctx"] or m["ctx"],
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        sliding_window=case.window if m["window"] == "absent" else m["window"],
        tie_word_embeddings=m["tied"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of transformers' module, dequantised."""
    state: dict[str, torch.Tensor] = {}
    with GGUFFile(path) as file:
        for name, info in file.tensors.items():
            if name.startswith("rope_factors"):
                continue
            values = dequantize(info.type.name, file.data(name), int(np.prod(info.shape)))
            state[module_name(name)] = torch.from_numpy(values.reshape(info.shape[::-1]).copy())
    return state


def module_name(tensor: str) -> str:
    """blk.3.attn_qkv.weight -> model.layers.3.self_attn.qkv_proj.weight"""
    parts = tensor.removesuffix(".weight").split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{NAMES[parts[-1]]}.weight"


def load(config: Phi3Config, state: Mapping[str, torch.Tensor], attention: str) -> Model:
    model = Phi3ForCausalLM._from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    ).eval()
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    assert model.lm_head.weight.dtype == torch.float32
    assert model.config._attn_implementation == attention
    return model


def import_llama(path: Path, attention: str) -> Model:
    """A `llama` file by transformers' own importer, which knows all that such a file can say.

    Its rows of q and k are ordered by that importer, not by us; only then do the Phi-3 twin and it agree.
    """
    llama = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation=attention, dtype=torch.float32
    ).eval()
    twin_path = fuse_llama_to_phi3(path, path.with_name("twin.gguf"))
    with GGUFFile(twin_path) as file:
        config = config_of_file(dict(file.metadata), None, tied=False)
    twin = load(config, weights(twin_path), attention)
    ids = range(100)
    difference = (forward(twin, ids) - forward(llama, ids)).abs().max().item()
    assert difference < 1e-4, difference
    return llama


def forward(model: Model, ids: Iterable[int], first: int = 0) -> torch.Tensor:
    """Logits (n - first, vocab) behind the tokens from `first` on, in one pass without a cache."""
    tokens = torch.tensor([[int(token) for token in ids]])
    keep = tokens.shape[1] - first
    return model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[0]


def best(logits: torch.Tensor) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    values, ids = logits.topk(2, dim=-1)
    return ids[:, 0].numpy().astype(np.uint16), (values[:, 0] - values[:, 1]).numpy()


def generate(model: Model, ids: Iterable[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and margins, each from a pass over all tokens before it: the definition, no cache."""
    tokens, margins = [int(token) for token in ids], []
    start = len(tokens)
    for _ in range(n):
        top, margin = best(forward(model, tokens, len(tokens) - 1))
        tokens.append(int(top[0]))
        margins.append(float(margin[0]))
    return tokens[start:], margins


def assert_generate_agrees(model: Model, ids: Iterable[int], greedy: list[int], margins: list[float]) -> None:
    """transformers' own generate(), with its cache, finds the same tokens as far as they are decided."""
    if not greedy:
        return
    prompt = torch.tensor([[int(token) for token in ids]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(greedy), do_sample=False
    )[0, prompt.shape[1] :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(out, greedy, strict=True)) if a != b), len(greedy))
    assert same == len(greedy) or margins[same] < 1e-3, (same, margins[same])


def quantized_modules(path: Path) -> set[str]:
    """Names of transformers' modules whose weights are quantised in the file."""
    with GGUFFile(path) as file:
        names = {name for name, info in file.tensors.items() if info.type.name in QUANT_TYPES}
        if "token_embd.weight" in names and "output.weight" not in file.tensors:
            names.add("output.weight")
    return {module_name(name).removesuffix(".weight") for name in names}


@contextmanager
def rounded_activations(model: Model, names: Collection[str]) -> Iterator[None]:
    """The plainest 8-bit activations: before these matrices, 32 values become integers times max / 127."""

    def rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        groups = args[0].unflatten(-1, (-1, GROUP))
        scale = groups.abs().amax(dim=-1, keepdim=True) / 127
        codes = torch.where(scale > 0, groups / scale, torch.zeros_like(groups)).round()
        return ((codes * scale).flatten(-2),)

    matrices = [
        module
        for name, module in model.named_modules()
        if name in names and isinstance(module, torch.nn.Linear)
    ]
    assert matrices
    handles = [matrix.register_forward_pre_hook(rounded) for matrix in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
