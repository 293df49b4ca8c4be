"""What phi3c found in this processor and what it uses of it."""

from __future__ import annotations

from dataclasses import dataclass

from . import _kernels


@dataclass(frozen=True, slots=True)
class CPUInfo:
    """Instruction sets of this machine."""

    isa: str  # in use; set PHI3C_ISA before importing phi3c to choose another
    available_isas: tuple[str, ...]  # worst first
    features: tuple[str, ...]


def cpu_info() -> CPUInfo:
    """The instruction set in use, those this machine can run, and the CPU features they were derived from."""
    return CPUInfo(_kernels.isa(), _kernels.available_isas(), tuple(_kernels.cpu_features().split()))
