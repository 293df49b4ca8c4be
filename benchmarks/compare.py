"""phi3c and llama.cpp by turns on the same file, in one run: A B A B, each in a process of its own.

usage: python benchmarks/compare.py MODEL.gguf --peer PYTHON [--threads 2] [--repetitions 5] [--packed FILE]
                                    [--tests load,pp512,tg32,tg32x4,pp3500:1,tg16@d3500]

PYTHON is an interpreter that can import llama_cpp, built natively from the llama-cpp-python sdist:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python

The peer runs four times over, with and without weight repacking and with flash attention on and off; each
test counts the best of the four. Prompts are pseudo-random ids, the same for all. A test is repeated in
rounds: every engine once, then every engine again; `:N` behind a name asks for N rounds of it. Prints a
Markdown table: tokens per second (median over rounds) and the median of the ratios within a round, with the
least and the greatest. A `ppN` behind a depth computes N tokens after it; `tgN@dD` generates N tokens one by
one behind D; `xK` K sequences together. `load` is the time from opening the file to the first logits of a
one-token prompt, in a fresh process, file in the page cache; `resident` is the memory of that process then,
`peak` the most until then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol

TESTS = "load,pp512,tg32,tg32x4,tg32x8,pp3500:1,tg16@d3500,tg16@d2000"
VOCAB = 32000
BATCH = 512  # prompt tokens computed at once, by both
PEERS = {
    "llama.cpp": {"repack": True, "flash": False},
    "llama.cpp, flash attention": {"repack": True, "flash": True},
    "llama.cpp, no repacking": {"repack": False, "flash": False},
    "llama.cpp, no repacking, flash attention": {"repack": False, "flash": True},
}


@dataclass(frozen=True, slots=True)
class Test:
    """A row: pp tokens of a prompt or tg tokens generated, of so many sequences, behind a depth."""

    pp: int
    tg: int
    sequences: int
    depth: int

    @classmethod
    def parse(cls, name: str) -> Test:
        match = re.fullmatch(r"(pp|tg)(\d+)(?:x(\d+))?(?:@d(\d+))?", name)
        if not match:
            raise SystemExit(f"error: {name!r}: write pp512, tg32, tg32@d2000 or tg32x4")
        kind, n, sequences, depth = match.groups()
        pp, tg = (int(n), 0) if kind == "pp" else (0, int(n))
        return cls(pp, tg, int(sequences or 1), int(depth or 0))

    @property
    def n_tokens(self) -> int:
        return (self.pp + self.tg) * self.sequences


def ids(sequence: int, n: int) -> list[int]:
    """Token ids of a sequence: a linear congruence, so that both sides compute the same without a file."""
    state, out = 12345 + sequence, []
    for _ in range(n):
        state = (1103515245 * state + 12345) % 2**31
        out.append(3 + (state >> 8) % (VOCAB - 3))
    return out


class Worker(Protocol):
    """An engine with a loaded model."""

    def run(self, test: Test) -> float:
        """Seconds of a test; bringing the sequences to their depth does not count."""


class Phi3c:
    def __init__(self, path: str, threads: int, longest: int) -> None:
        import phi3c._kernels as kernels
        from phi3c.config import Config
        from phi3c.engine import Engine
        from phi3c.packed import ModelFile
        from phi3c.phi3 import Phi3

        self.file = ModelFile(path)
        config = Config.from_gguf(self.file)
        self.engine = Engine(Phi3(self.file, config, kernels.Pool(threads), n_batch=BATCH), longest)

    def run(self, test: Test) -> float:
        from phi3c.phi3 import Step

        def ignore(logits: object) -> None:
            pass

        end = test.depth + test.pp + test.tg
        prompts = [ids(i, end) for i in range(test.sequences)]
        sequences = []
        for prompt in prompts:
            sequence = self.engine.open([*prompt[: test.depth], 0] if test.depth else (), end)
            if len(sequence) < test.depth:
                self.engine.prefill(sequence, prompt[: test.depth], ignore, None)
            sequences.append(sequence)
        started = perf_counter()
        if test.pp:
            for sequence, prompt in zip(sequences, prompts, strict=True):
                self.engine.prefill(sequence, prompt[: test.depth + test.pp], ignore, None)
        for position in range(test.depth + test.pp, end):
            steps = [Step(s, (prompt[position],)) for s, prompt in zip(sequences, prompts, strict=True)]
            self.engine.run(steps, ignore)
        elapsed = perf_counter() - started
        for sequence in sequences:
            self.engine.release(sequence)
        return elapsed


class LlamaCpp:
    def __init__(self, path: str, threads: int, longest: int, *, repack: bool, flash: bool) -> None:
        import llama_cpp as c

        self.c = c
        self._log = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._log, None)
        c.llama_backend_init()
        model_params = c.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = repack
        self.model = c.llama_model_load_from_file(path.encode(), model_params)
        params = c.llama_context_default_params()
        params.n_ctx = longest
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = 8
        params.kv_unified = True
        params.flash_attn_type = 1 if flash else 0
        self.context = c.llama_init_from_model(self.model, params)
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(BATCH, 0, 1)
        self.held: dict[int, int] = {}  # sequence -> positions in the cache

    def run(self, test: Test) -> float:
        for sequence in list(self.held):  # what is not this test's depth goes
            keep = min(self.held[sequence], test.depth) if sequence < test.sequences else 0
            self.c.llama_memory_seq_rm(self.memory, sequence, keep, -1)
            self.held[sequence] = keep
        end = test.depth + test.pp + test.tg
        prompts = [ids(i, end) for i in range(test.sequences)]
        for sequence, prompt in enumerate(prompts):
            self._prefill(sequence, prompt[: test.depth])
        started = perf_counter()
        if test.pp:
            for sequence, prompt in enumerate(prompts):
                self._prefill(sequence, prompt[: test.depth + test.pp])
        for position in range(test.depth + test.pp, end):
            self._decode([(i, position, prompt[position], True) for i, prompt in enumerate(prompts)])
        return perf_counter() - started

    def _prefill(self, sequence: int, prompt: list[int]) -> None:
        for first in range(self.held.get(sequence, 0), len(prompt), BATCH):
            chunk = range(first, min(first + BATCH, len(prompt)))
            self._decode([(sequence, i, prompt[i], i == len(prompt) - 1) for i in chunk])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows are (sequence, position, token, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            self.held[sequence] = position + 1
        if self.c.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.c.llama_synchronize(self.context)


def resident() -> int:
    """Bytes of this process in physical memory, file mappings included (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(settings: dict[str, object]) -> None:
    """The other side of Engine: load, say how long that took, then answer tests line by line."""
    options = {key: settings[key] for key in ("repack", "flash") if key in settings}
    engine = LlamaCpp if options else Phi3c
    started = perf_counter()
    worker: Worker = engine(settings["path"], settings["threads"], settings["longest"], **options)  # type: ignore[arg-type]
    worker.run(Test(1, 0, 1, 0))
    seconds = perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "resident": resident(), "peak": peak}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": worker.run(Test(*json.loads(line)))}), flush=True)


class Engine:
    """A worker in another process."""

    def __init__(self, python: str, settings: dict[str, object]) -> None:
        command = [python, str(Path(__file__).resolve()), "--serve", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = self._answer()
        self.load_seconds, self.resident, self.peak = answer["seconds"], answer["resident"], answer["peak"]

    def run(self, test: Test) -> float:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([test.pp, test.tg, test.sequences, test.depth]) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a worker ended with exit code {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def rounds(title: str, n: int) -> Iterator[int]:
    for i in range(n):
        if sys.stderr.isatty():
            print(f"\r{title}: round {i + 1} of {n}\033[K", end="", file=sys.stderr, flush=True)
        yield i
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def row(
    name: str, unit: str, ours: str, measured: dict[str, list[float]], *, less_is_better: bool, form: str
) -> None:
    """One line of the table; measured: by engine, one value a round."""
    best = (min if less_is_better else max)(PEERS, key=lambda peer: median(measured[peer]))
    pairs = zip(measured[ours], measured[best], strict=True)
    ratios = [theirs / mine if less_is_better else mine / theirs for mine, theirs in pairs]
    others = ", ".join(f"{median(measured[peer]):{form}}" for peer in PEERS)
    mine, theirs = f"{median(measured[ours]):{form}}", f"{median(measured[best]):{form}}"
    print(f"| {name} | {unit} | {mine} | {theirs} | {spread(ratios, '.2f')} | {others} |", flush=True)


def parse_tests(names: str, repetitions: int) -> tuple[int, dict[str, tuple[Test, int]]]:
    """How many loads, and tests by name with their rounds, out of 'load:3,pp512,tg32:1'."""
    loads, tests = 0, dict[str, tuple[Test, int]]()
    for name in names.split(","):
        test, _, asked = name.partition(":")
        rounds = int(asked or repetitions)
        if test == "load":
            loads = rounds
        else:
            tests[test] = Test.parse(test), rounds
    return loads, tests


def main() -> None:
    parser = argparse.ArgumentParser(description="phi3c and llama.cpp by turns on the same file")
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--peer", required=True, metavar="PYTHON", help="an interpreter that can import llama_cpp"
    )
    parser.add_argument("--packed", metavar="FILE", help="the model as `phi3c pack` writes it, for `load`")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="rounds of each test")
    parser.add_argument("--tests", default=TESTS, help=f"default {TESTS}")
    args = parser.parse_args()

    loads, tests = parse_tests(args.tests, args.repetitions)
    longest = max([BATCH, *(t.sequences * (t.depth + t.pp + t.tg) for t, _ in tests.values())])
    settings = {"path": args.model, "threads": args.threads, "longest": longest}

    print("| test | unit | phi3c | best peer | ratio (least-greatest) | " + "; ".join(PEERS) + " |")
    print("|---|---|---|---|---|---|")
    if loads:
        load: dict[str, list[float]] = {name: [] for name in ["phi3c", "packed", *PEERS]}
        memory: dict[str, list[float]] = {name: [] for name in load}
        peak: dict[str, list[float]] = {name: [] for name in load}
        for _ in rounds("load", loads):
            started = [("phi3c", sys.executable, settings)]
            if args.packed:
                started.append(("packed", sys.executable, {**settings, "path": args.packed}))
            started += [(peer, args.peer, {**settings, **options}) for peer, options in PEERS.items()]
            for name, python, its in started:
                engine = Engine(python, its)
                engine.close()
                load[name].append(engine.load_seconds)
                memory[name].append(engine.resident / 1e9)
                peak[name].append(engine.peak / 1e9)
        row("load", "s", "phi3c", load, less_is_better=True, form=".2f")
        if args.packed:
            row("load, packed", "s", "packed", load, less_is_better=True, form=".2f")
        row("resident", "GB", "phi3c", memory, less_is_better=True, form=".2f")
        row("peak", "GB", "phi3c", peak, less_is_better=True, form=".2f")
    if tests:
        engines = {"phi3c": Engine(sys.executable, settings)}
        engines |= {peer: Engine(args.peer, {**settings, **options}) for peer, options in PEERS.items()}
        # llama.cpp touches the memory of keys and values when it makes a context, phi3c when they are written
        engines["phi3c"].run(Test(longest, 0, 1, 0))
        for name, (test, repetitions) in tests.items():
            for engine in engines.values():
                engine.run(Test(min(test.pp, 32), min(test.tg, 2), test.sequences, test.depth))  # warm up
            speed: dict[str, list[float]] = {key: [] for key in engines}
            for _ in rounds(name, repetitions):
                for key, engine in engines.items():
                    speed[key].append(test.n_tokens / engine.run(test))
            row(name, "tok/s", "phi3c", speed, less_is_better=False, form=".2f")
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
