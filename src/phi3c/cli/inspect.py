"""phi3c inspect: show what is in a GGUF file."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3c.config import Config
    from phi3c.packed import ModelFile

DEFAULT_N_CTX = 4096
LONG = 60  # characters of a value in the table
SHORT_ARRAY = 8  # elements of an array that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--n-ctx", type=int, metavar="N", help="context length of the memory estimate")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Describe the file, whether or not phi3c can run it."""
    from phi3c import hub
    from phi3c.cli.progress import ProgressBar
    from phi3c.config import Config
    from phi3c.errors import ModelLoadError
    from phi3c.packed import ModelFile
    from phi3c.weights import matrices

    if args.n_ctx is not None and args.n_ctx < 1:
        args.usage_error("--n-ctx must be at least 1")
    with ProgressBar() as bar:
        path = hub.resolve(args.model, progress=bar)
    with ModelFile(path) as file:
        config, problem = None, None
        try:
            config = Config.from_gguf(file)
            matrices(file, config)
        except ModelLoadError as error:
            problem = str(error)
        report = describe(file, config, problem, args.n_ctx, with_tensors=args.tensors)
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return 0


def describe(
    file: ModelFile, config: Config | None, problem: str | None, n_ctx: int | None, *, with_tensors: bool
) -> dict[str, object]:
    """Collect what `inspect` shows as plain JSON values.

    Args:
        file: The open file.
        config: Its hyper-parameters, None where phi3c cannot run it.
        problem: Why it cannot, if so.
        n_ctx: Context length of the memory estimate; the model's own, at most 4096, when None.
        with_tensors: Also list every tensor.
    """
    from phi3c.cache import kv_types
    from phi3c.phi3 import kv_bytes_per_token

    tensors = list(file.tensors.values())
    weights = sum(tensor.n_bytes for tensor in tensors)
    report: dict[str, object] = {
        "path": str(file.path),
        "file_bytes": file.path.stat().st_size,
        "gguf_version": file.version,
        "architecture": file.metadata.get("general.architecture"),
        "layout": file.layout,
        "runs_here": problem is None,
        "problem": problem,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "tensors": len(tensors),
        "types": dict(Counter(tensor.type.name for tensor in tensors).most_common()),
        "weights_bytes": weights,
    }
    if config is not None:
        n_ctx = n_ctx or min(config.context_length, DEFAULT_N_CTX)
        kv = {kv_type: n_ctx * kv_bytes_per_token(config, kv_type) for kv_type in kv_types(config.head_dim)}
        report["context"] = {
            "context_length": config.context_length,
            "original_context_length": config.original_context_length,
            "sliding_window": config.sliding_window,
        }
        report["rope"] = {
            "freq_base": config.rope_freq_base,
            "dimension_count": config.rope_dimension_count,
            "head_dim": config.head_dim,
            "attn_factor": config.rope_attn_factor,
            "factors_short": config.rope_factors_short,
            "factors_long": config.rope_factors_long,
        }
        report["memory"] = {"n_ctx": n_ctx, "weights_bytes": weights, "kv_bytes": kv}
    report["metadata"] = {key: _plain(value) for key, value in file.metadata.items()}
    if with_tensors:
        report["tensor_list"] = [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "bytes": t.n_bytes,
                "offset": t.offset,
            }
            for t in tensors
        ]
    return report


def _plain(value: object) -> object:
    """A metadata value as JSON has it; of a long array its length and its beginning."""
    import numpy as np

    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        head = [_plain(item) for item in value[:SHORT_ARRAY]]
        return head if len(value) <= SHORT_ARRAY else {"length": len(value), "head": head}
    return value


def _as_text(report: dict[str, object]) -> str:
    metadata, types = report["metadata"], report["types"]
    assert isinstance(metadata, dict)
    assert isinstance(types, dict)
    runs = "yes" if report["runs_here"] else f"no: {report['problem']}"
    facts = {
        "file": f"{report['path']} ({_megabytes(report['file_bytes'])}, GGUF v{report['gguf_version']})",
        "architecture": f"{report['architecture']}",
        "phi3c runs it": runs,
        "parameters": f"{report['parameters']:,}",
        "tensors": f"{report['tensors']}: " + ", ".join(f"{n} {name}" for name, n in types.items()),
        "weights": _megabytes(report["weights_bytes"]),
    }
    if report["layout"]:
        facts["packed"] = f"{report['layout']}: loads without packing; types are those it was packed from"
    if isinstance(context := report.get("context"), dict):
        facts["context"] = _context(context)
    if isinstance(rope := report.get("rope"), dict):
        facts["rope"] = _rope(rope)
    if isinstance(memory := report.get("memory"), dict):
        kv = " or ".join(f"{_megabytes(size)} as {kv_type}" for kv_type, size in memory["kv_bytes"].items())
        facts["memory"] = f"keys and values of {memory['n_ctx']} tokens take {kv}, beside the weights"
    template = metadata.get("tokenizer.chat_template")
    lines = [f"{name:15}{value}" for name, value in facts.items()]
    lines += ["", "metadata"]
    lines += [f"  {key:40} {_short(value)}" for key, value in metadata.items() if value is not template]
    lines += ["", "chat template", str(template) if template else "  (none)"]
    if isinstance(tensors := report.get("tensor_list"), list):
        lines += ["", "tensors"]
        lines += [f"  {t['name']:32} {t['type']:8} {' x '.join(map(str, t['shape']))}" for t in tensors]
    return printable("\n".join(lines))


def _context(context: dict[str, Any]) -> str:
    length, original, window = context.values()
    text = f"{length} tokens"
    if original < length:
        text += f", extended from {original}"
    return f"{text}; " + ("each sees all before it" if window is None else f"each sees the last {window}")


def _rope(rope: dict[str, Any]) -> str:
    text = f"base {rope['freq_base']:g}, {rope['dimension_count']} of {rope['head_dim']} dimensions"
    for name in ("short", "long"):
        if factors := rope[f"factors_{name}"]:
            text += f", {name} factors {min(factors):g} to {max(factors):g}"
    return text if rope["attn_factor"] == 1 else f"{text}, attn_factor {rope['attn_factor']:.6f}"


def printable(text: str) -> str:
    """Text from a file, which may hold anything, without the characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return f"[{value['length']}] {_short(value['head'])}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else text[: LONG - 3] + "..."


def _megabytes(n_bytes: object) -> str:
    assert isinstance(n_bytes, int)
    return f"{n_bytes / 1e6:,.1f} MB"
