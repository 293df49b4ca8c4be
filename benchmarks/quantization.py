"""phi3c's quantisers beside llama.cpp's: error and speed by type, and which tensor gets which type in a mix.

usage: PYTHONPATH=src PYTHON benchmarks/quantization.py [--write]

PYTHON is an interpreter that can import llama_cpp (see compare.py) and numpy. Errors are root mean squares
over the tensors that `samples` makes, all of them quantised to one type, as a ratio to llama.cpp's; speed is
in weights per second of processor time on one thread, rows in memory here, a whole file with llama.cpp. With
--write, what llama.cpp does is kept in tests/golden/llama_quantize.json, which tests/test_quantize.py holds
phi3c to.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from time import process_time

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from blocks import dequantize
from quantize_samples import SAMPLES, TINY, by_role, samples, write_samples, write_tiny

from phi3c import _kernels
from phi3c.gguf import GGMLType, GGUFFile, n_bytes
from phi3c.quantizer import FLOATS, MIXES

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden/llama_quantize.json"
# a file type of llama-quantize whose main type this is; with `pure`, all tensors have it
PURE = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "Q4_K", "Q3_K", "Q2_K")


def llama_quantize(src: Path, dst: Path, mix: str, *, pure: bool = False) -> float:
    """Quantise with llama.cpp; returns seconds of processor time."""
    import llama_cpp as c

    params = c.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, MIXES[mix].file_type, pure
    start = process_time()
    if c.llama_model_quantize(bytes(src), bytes(dst), ctypes.byref(params)) != 0:
        raise SystemExit(f"error: llama.cpp cannot quantise to {mix}")
    return process_time() - start


def error(w: np.ndarray, x: np.ndarray) -> float:
    return float(np.sqrt(np.mean((w.astype(np.float64) - x.ravel()) ** 2)))


def compare_errors(folder: Path) -> dict[str, dict[str, float]]:
    """Prints the table of errors and speeds; returns llama.cpp's errors by type and sample."""
    tensors = samples()
    source = write_samples(folder / "samples.gguf", tensors)
    n_weights = sum(x.size for x in tensors.values())
    pool = _kernels.Pool(1)
    found: dict[str, dict[str, float]] = {}
    print(f"| type | {' | '.join(SAMPLES)} | weights/s | llama.cpp |")
    print("|---|" + "---|" * (len(SAMPLES) + 2))
    for name in TYPES:
        type, seconds, ratios = GGMLType[name], 0.0, []
        peer_seconds = llama_quantize(source, folder / "peer.gguf", PURE.get(name, name), pure=True)
        found[name] = {}
        with GGUFFile(folder / "peer.gguf") as file:
            for sample, x in tensors.items():
                theirs = file.tensors[SAMPLES[sample]]
                if theirs.type is not type:
                    raise SystemExit(f"error: {theirs} is not {name}")
                found[name][sample] = error(dequantize(name, file.data(theirs.name), x.size), x)
                blocks = np.empty(n_bytes(x.shape[::-1], type), np.uint8)
                start = process_time()
                _kernels.encode(blocks, type, x.view(np.uint8).ravel(), GGMLType.F32, x.size, pool)
                seconds += process_time() - start
                ratios.append(error(dequantize(name, blocks, x.size), x) / found[name][sample])
        speeds = f"{n_weights / seconds / 1e6:.0f} M | {n_weights / peer_seconds / 1e6:.0f} M"
        print(f"| {name} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} | {speeds} |", flush=True)
    return found


def mixes(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Types that llama.cpp gives the tensors of each model in TINY, by mix."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in TINY:
        source = write_tiny(folder / "tiny.gguf", name)
        found[name] = {}
        for mix in MIXES:
            if MIXES[mix].base in FLOATS:
                continue
            llama_quantize(source, folder / "peer.gguf", mix)
            with GGUFFile(folder / "peer.gguf") as file:
                assert file.metadata["general.file_type"] == MIXES[mix].file_type
                found[name][mix] = by_role(
                    {t.name: t.type for t in file.tensors.values() if len(t.shape) > 1}
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="phi3c's quantisers beside llama.cpp's")
    parser.add_argument("--write", action="store_true", help=f"keep llama.cpp's answers in {GOLDEN.name}")
    write = parser.parse_args().write
    import llama_cpp as c

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    c.llama_log_set(silent, None)
    with tempfile.TemporaryDirectory() as name:
        golden = {
            "from": f"llama_cpp {c.__version__}, llama_model_quantize",
            "error": compare_errors(Path(name)),
            "types": mixes(Path(name)),
        }
    if write:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
