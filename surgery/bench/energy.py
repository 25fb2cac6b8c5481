"""Joules that a machine's own counters say were used: never estimated from anything else.

NVML's total-energy counter on CUDA (Volta and newer; the extra `energy`); on the CPU RAPL's package counters, where
the kernel lets us read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICROJOULES, MILLIJOULES = 1e6, 1e3


@dataclass(frozen=True)
class Meter:
    """A counter of energy. read: joules since some moment; wraps_at: joules after which it begins again, or 0."""

    name: str
    read: Callable[[], float]
    wraps_at: float = 0.0

    def used(self, before: float, after: float) -> float:
        """Joules between two readings."""
        return after - before if after >= before else after - before + self.wraps_at


def open_meter(device: str) -> Meter | str:
    """The device's counter, or why there is none."""
    return _nvml() if device == "cuda" else _rapl(POWERCAP)


def _nvml() -> Meter | str:
    try:
        import pynvml
    except ModuleNotFoundError:
        return "pynvml is not installed: pip install 'checkpoint-surgery[energy]'"
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML has no energy counter for this device ({error})"
    return Meter("nvml", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / MILLIJOULES)


def _rapl(folder: Path) -> Meter | str:
    """All packages together: the machine's other programs count, too."""
    packages = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not packages:
        return "this CPU offers no RAPL counter"
    try:
        limits = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        _read(packages)
    except (OSError, ValueError) as error:
        return f"the RAPL counters cannot be read ({error})"
    return Meter("rapl", lambda: _read(packages), sum(limits) / MICROJOULES)


def _read(packages: list[Path]) -> float:
    return sum(int((path / "energy_uj").read_text()) for path in packages) / MICROJOULES
