"""Where a step's time goes: a network that takes the time of each of its operations.

Nothing of this runs unless PHI3C_PROFILE is 1 when a model is loaded: `Phi3` calls the extension directly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .cache import KVCache
from .phi3 import Layer, Phi3, Step


@dataclass(slots=True)
class Timing:
    """Calls of one operation, and the wall time they took together."""

    calls: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Phase:
    """Steps of one kind. An operation is named by its weights where it has any, else as in _kernels."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0  # wall time of the steps: the forward pass, without sampling
    measuring_seconds: float = 0.0  # of it, what taking the times took
    operations: dict[tuple[str, int | None], Timing] = field(default_factory=dict)
    """By (operation, layer), in the order of the forward pass; the layer of embed and output is None."""

    @property
    def kernel_seconds(self) -> float:
        """Time within operations."""
        return sum(timing.seconds for timing in self.operations.values())

    @property
    def python_seconds(self) -> float:
        """Time between operations, without that of measuring them."""
        return self.seconds - self.kernel_seconds - self.measuring_seconds


@dataclass(slots=True)
class Profile:
    """Steps that compute one token a sequence, and all others; they grow with every step."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)


class ProfiledPhi3(Phi3):
    """Phi3, and an account of its time in `profile`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.profile = Profile()
        self._timed = self._operations = TimedKernels(self)

    def forward(self, steps: Sequence[Step], cache: KVCache) -> NDArray[np.float32]:
        """As Phi3.forward."""
        one_each = all(len(step.ids) == 1 for step in steps)
        phase = self.profile.decode if one_each else self.profile.prefill
        self._timed.begin(phase)
        started = perf_counter()
        try:
            return super().forward(steps, cache)
        finally:
            phase.seconds += perf_counter() - started
            phase.steps += 1
            phase.tokens += sum(len(step.ids) for step in steps)


class TimedKernels(ModuleType):
    """Stands in for `_kernels` in the forward pass of one network."""

    def __init__(self, phi3: Phi3) -> None:
        super().__init__(_kernels.__name__)
        self._phase = Phase()
        self._layer: int | None = None  # of the last operation
        self._names: dict[int, tuple[str, int | None]] = {
            id(phi3.output_norm): ("output_norm", None),
            id(phi3.output): ("output", None),
        }
        for i, layer in enumerate(phi3.layers):
            self._names |= {id(getattr(layer, part.name)): (part.name, i) for part in fields(Layer)}

    def begin(self, phase: Phase) -> None:
        """What is called from now on belongs to a new step of this phase."""
        self._phase, self._layer = phase, None

    def __getattr__(self, name: str) -> Any:
        operation = getattr(_kernels, name)
        timed = operation if isinstance(operation, type) else self._timed(name, operation)
        setattr(self, name, timed)
        return timed

    def _timed(self, name: str, operation: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: object) -> None:
            entered = perf_counter()
            key = next((self._names[id(arg)] for arg in args if id(arg) in self._names), (name, self._layer))
            self._layer = key[1]
            started = perf_counter()
            operation(*args)
            ended = perf_counter()
            timing = self._phase.operations.setdefault(key, Timing())
            timing.calls += 1
            timing.seconds += ended - started
            self._phase.measuring_seconds += started - entered + perf_counter() - ended

        return timed


def network() -> type[Phi3]:
    """The class to load a model as: Phi3, but ProfiledPhi3 where PHI3C_PROFILE is 1."""
    return ProfiledPhi3 if os.environ.get("PHI3C_PROFILE") == "1" else Phi3


def profile_of(phi3: Phi3) -> Profile | None:
    """The account of a network that was loaded with PHI3C_PROFILE=1."""
    return phi3.profile if isinstance(phi3, ProfiledPhi3) else None
