"""Speed of the network, beside what the machine allows at the same moment.

Memory and clock of a shared machine change within seconds, so a limit is measured before and after every
repetition: limit, run, limit, run, ..., limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import mean, median, stdev
from time import perf_counter
from types import TracebackType
from typing import Literal

import numpy as np

from . import _kernels
from .cache import PAGE
from .cache import Sequence as CachedSequence
from .config import Config
from .engine import Engine
from .errors import ContextLengthError, InvalidParameterError
from .packed import ModelFile
from .phi3 import Phi3, Step
from .profile import network, profile_of
from .weights import Progress

N_BATCH = 512  # most prompt tokens computed at once, as Model has it
PROBE_SECONDS = 0.05  # least duration of a measurement of a limit
PROBE_BURSTS = 64  # of multiply-adds a thread, between two looks at the clock: 1 to 2 ms


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: a prompt, then tokens one by one, behind so many that are in the cache already."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0
    n_parallel: int = 1  # sequences that generate together

    def __str__(self) -> str:
        """The name llama-bench gives it: pp512, tg128, pp512+tg128, tg128 npl4 @ d1024."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (self.n_gen > 0)
        parallel = f" npl{self.n_parallel}" if self.n_parallel > 1 else ""
        depth = f" @ d{self.n_depth}" if self.n_depth else ""
        return "+".join(parts) + parallel + depth

    @property
    def n_tokens(self) -> int:
        """Tokens computed while the clock runs."""
        return self.n_parallel * (self.n_prompt + self.n_gen)

    @property
    def n_positions(self) -> int:
        """Length of each sequence at the end."""
        return self.n_depth + self.n_prompt + self.n_gen


@dataclass(frozen=True, slots=True)
class Result:
    """Repetitions of a workload, and the limits around them."""

    workload: Workload
    n_threads: int
    seconds: tuple[float, ...]  # of each repetition
    unit: Literal["GB/s", "GOP/s"] | None  # None where a run is both prompt and generation
    work: float  # of one repetition: bytes read or operations done; 0 without a unit
    limits: tuple[float, ...]  # bytes or operations a second; one more than `seconds`, or none known

    @property
    def samples(self) -> tuple[float, ...]:
        """Tokens per second of each repetition, all sequences together."""
        return tuple(self.workload.n_tokens / seconds for seconds in self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Mean of the samples."""
        return mean(self.samples)

    @property
    def tokens_per_second_stddev(self) -> float:
        """Standard deviation of the samples (n - 1); 0 for a single one."""
        return stdev(self.samples) if len(self.samples) > 1 else 0.0

    @property
    def rate(self) -> float | None:
        """Mean, in `unit`."""
        return mean(self.work / seconds for seconds in self.seconds) / 1e9 if self.unit else None

    @property
    def limit(self) -> float | None:
        """Median of what the machine allowed, in `unit`."""
        return median(self.limits) / 1e9 if self.limits else None

    @property
    def share(self) -> float | None:
        """Median over the repetitions of: rate, divided by the mean of the limits before and after it."""
        if not self.limits:
            return None
        around = zip(self.seconds, self.limits, self.limits[1:], strict=False)
        return median(self.work / seconds / mean(limits) for seconds, *limits in around)


class Benchmark(AbstractContextManager["Benchmark"]):
    """A loaded model and the pools to measure it on. Its vocabulary is not looked at: prompts are random ids.

    Args:
        path: the GGUF file.
        workloads: all that will be measured; they say how much is kept in the cache.
        n_threads: sizes of the pools.
        progress: called as progress("pack", bytes done, bytes in all) while weights are packed.

    Raises:
        ModelLoadError, OutOfMemoryError: as for Model.
        ContextLengthError: a workload is longer than what the model was trained for.
        InvalidParameterError: more sequences than a step has rows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        workloads: Sequence[Workload],
        n_threads: Iterable[int],
        progress: Progress | None = None,
    ) -> None:
        self.file = ModelFile(path)
        try:
            self.config = Config.from_gguf(self.file)
            for workload in workloads:
                _check(workload, self.config)
            self._pools = {n: _kernels.Pool(n) for n in n_threads}
            fastest = self._pools[max(self._pools)]
            self.phi3 = network()(self.file, self.config, fastest, n_batch=N_BATCH, progress=progress)
        except BaseException:
            self.file.close()
            raise
        self.profile = profile_of(self.phi3)
        longest = max(workload.n_positions for workload in workloads)
        n_sequences = max(workload.n_parallel for workload in workloads)
        # No more room than the longest run needs, so that the next one writes over the pages it has touched:
        # new memory took a tenth of a prompt's time where the host of a virtual machine had to find it.
        self._engine = Engine(self.phi3, n_sequences * (longest + PAGE))
        self._ids = [
            np.random.default_rng((0, i)).integers(self.config.vocab_size, size=longest).tolist()
            for i in range(n_sequences)
        ]

    def run(
        self, workload: Workload, n_threads: int, repetitions: int, progress: Progress | None = None
    ) -> Result:
        """Measure a workload.

        Args:
            workload: one of those announced.
            n_threads: one of the sizes announced.
            repetitions: how often it is timed, after one run that is not.
            progress: called as progress(stage, tokens done, tokens in all) between the runs.
        """
        # what comes before the clock starts: as fast as may be
        self.phi3.pool = self._pools[max(self._pools)]
        for i in range(workload.n_parallel):
            self._engine.release(self._at_depth(i, workload, progress))
        pool = self.phi3.pool = self._pools[n_threads]

        stage = f"{workload}, {n_threads} {'thread' if n_threads == 1 else 'threads'}"
        unit, work = self._work(workload)
        limits = []
        seconds = []
        for i in range(repetitions + 1):
            if progress:
                progress(stage, i * workload.n_tokens, (repetitions + 1) * workload.n_tokens)
            elapsed = self._time(workload)
            if i > 0:
                seconds.append(elapsed)
            if unit:
                limits.append(self.read_limit(pool) if unit == "GB/s" else self.multiply_limit(pool))
        if progress:
            progress(stage, 1, 1)
        return Result(workload, n_threads, tuple(seconds), unit, work, tuple(limits) if all(limits) else ())

    def read_limit(self, pool: _kernels.Pool) -> float:
        """Bytes a second that the pool's threads read out of memory and do nothing with.

        They read the packed weights: the very bytes that decoding streams, in the same pages, from the same
        memory - or from the cache, where a model is so small that it fits. A buffer of its own would measure
        other memory, and be no limit to such a model.
        """

        def read() -> int:
            for matrix in self.phi3.matrices:
                _kernels.read(matrix, pool)
            return self.phi3.weight_bytes

        return _per_second(read)

    def multiply_limit(self, pool: _kernels.Pool) -> float:
        """Operations a second, two to a multiply-add, of the int8 instructions in use on registers.

        avx2: vpmaddubsw and vpaddw, avxvnni and avx512: vpdpbusd, neon: smlal, dotprod: sdot; 0 for scalar,
        which has none.
        """
        return _per_second(lambda: 2 * _kernels.peak(PROBE_BURSTS * pool.size, pool))

    def close(self) -> None:
        """Free the weights, the cache and the file."""
        self._engine.close()
        self.file.close()

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _at_depth(self, i: int, workload: Workload, progress: Progress | None = None) -> CachedSequence:
        """Sequence i at the workload's depth: full pages out of the prefix cache once there."""
        ids = self._ids[i][: workload.n_depth]
        # open() leaves the last token to be computed: another one behind ids is
        sequence = self._engine.open([*ids, 0] if ids else (), workload.n_positions)
        if len(sequence) < len(ids):
            self._engine.prefill(sequence, ids, _ignore, progress)
        return sequence

    def _time(self, workload: Workload) -> float:
        """Seconds of one run, without what brings the sequences to their depth."""
        sequences = [self._at_depth(i, workload) for i in range(workload.n_parallel)]
        prompt_end = workload.n_depth + workload.n_prompt
        started = perf_counter()
        if workload.n_prompt:
            for sequence, ids in zip(sequences, self._ids, strict=False):
                self._engine.prefill(sequence, ids[:prompt_end], _ignore, None)
        for position in range(prompt_end, workload.n_positions):
            steps = [
                Step(sequence, (ids[position],)) for sequence, ids in zip(sequences, self._ids, strict=False)
            ]
            self._engine.run(steps, _ignore)
        elapsed = perf_counter() - started
        for sequence in sequences:
            self._engine.release(sequence)
        return elapsed

    def _work(self, workload: Workload) -> tuple[Literal["GB/s", "GOP/s"] | None, float]:
        if workload.n_prompt and workload.n_gen:
            return None, 0.0
        if workload.n_gen:
            return "GB/s", bytes_read(self.phi3, workload)
        return "GOP/s", workload.n_parallel * operations(self.phi3, workload.n_prompt)


def bytes_read(phi3: Phi3, workload: Workload) -> float:
    """Bytes that generating reads: each step all packed weights once, and keys and values in sight.

    The embedding counts only where it is the output as well; its rows, the norms and the activations are left
    out: a few kB a step.
    """
    kv_bytes = phi3.heads.page_bytes(phi3.config.block_count) / PAGE  # of a position
    first = workload.n_depth + workload.n_prompt
    window = phi3.config.sliding_window or workload.n_positions
    seen = sum(min(position + 1, window) for position in range(first, first + workload.n_gen))
    return workload.n_gen * phi3.weight_bytes + workload.n_parallel * seen * kv_bytes


def operations(phi3: Phi3, n_prompt: int) -> int:
    """Two for each multiply-add of a matrix with a prompt that wants its last logits.

    The last layer computes qkv for all tokens and the rest for the last one only, as the output is. Attention
    is left out: it multiplies floats, so that the limit would not be its own.
    """
    last = phi3.layers[-1]
    once = [last.attn_output, last.ffn_up, last.ffn_down, phi3.output]
    each = [last.attn_qkv]
    for layer in phi3.layers[:-1]:
        each += [layer.attn_qkv, layer.attn_output, layer.ffn_up, layer.ffn_down]
    return 2 * (
        n_prompt * sum(matrix.rows * matrix.columns for matrix in each)
        + sum(matrix.rows * matrix.columns for matrix in once)
    )


def _check(workload: Workload, config: Config) -> None:
    if workload.n_positions > config.context_length:
        raise ContextLengthError(
            f"{workload} makes sequences of {workload.n_positions} tokens; the model was trained for "
            f"{config.context_length}: choose a smaller depth, prompt or number of tokens",
            workload.n_depth + workload.n_prompt,
            workload.n_gen,
            config.context_length,
        )
    if workload.n_parallel > N_BATCH:
        raise InvalidParameterError(
            f"{workload.n_parallel} sequences together; a step has room for {N_BATCH}"
        )


def _per_second(work: Callable[[], int]) -> float:
    done, started = 0, perf_counter()
    while (elapsed := perf_counter() - started) < PROBE_SECONDS:
        done += work()
    return done / elapsed


def _ignore(logits: object) -> None:
    """Logits are computed, and that is all."""
