"""What this machine offers: versions, devices, extras, and what stands in the way of using them.

The vendor's packages for Gaudi are looked up by their metadata and never imported: importing them changes transformers.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from packaging.specifiers import SpecifierSet

from surgery.backends import gaudi
from surgery.errors import shorten
from surgery.table import align, size_text

DISTRIBUTION = "checkpoint-surgery"
# What the code runs with: any one of the ranges. pyproject.toml says the same (a test holds them together), but that
# an installer cannot be told about the hole between the two lines of transformers.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "torch": (">=2.9,<3",),
    "transformers": (">=4.55,<4.56", ">=5,<6"),
    "safetensors": (">=0.5,<1",),
    "accelerate": (">=1.1,<2",),
    "datasets": (">=3.6,<6",),
}
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "onnx": {
        "onnx": ">=1.19,<2",
        "onnx-ir": ">=1,<2",
        "onnxruntime": ">=1.23,<2",
        "onnxscript": ">=0.7,<1",
        "protobuf": ">=5",
    },
    "bnb": {"bitsandbytes": ">=0.50,<1"},
    "deepspeed": {"deepspeed": ">=0.17,<1"},
    "energy": {"nvidia-ml-py": ">=12"},
    "eval": {"lm-eval": ">=0.4.13,<0.5"},
    "gaudi": {"optimum-habana": "==1.21.2"},
    "images": {"pillow": ">=10,<14"},
    "liger": {"liger-kernel": ">=0.8,<1"},
    "lora": {"peft": ">=0.17,<1"},
    "report": {"vl-convert-python": ">=1.9,<2"},
    "torchao": {"torchao": ">=0.18,<1"},
    "tracking": {"tensorboard": ">=2.18,<3", "trackio": ">=0.5,<1"},
}
GAUDI_TOOL, NVIDIA_TOOL = "hl-smi", "nvidia-smi"
MIN_FREE_BYTES = 1_000_000_000
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16")  # the last one is ARM's
_NO_BF16 = "bf16 is emulated here: it saves memory, not time"


@dataclass(frozen=True)
class Device:
    """A kind of device: what it is, or why it cannot be used."""

    name: str
    is_usable: bool
    detail: str


@dataclass(frozen=True)
class Extra:
    """An optional part: `missing` packages, and the command that brings them."""

    name: str
    missing: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Report:
    """What was found. `packages`: versions, empty where not installed. `problems`: sentences that end in the remedy."""

    system: Mapping[str, str]
    packages: Mapping[str, str]
    devices: tuple[Device, ...]
    extras: tuple[Extra, ...]
    kernels: Mapping[str, str]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One block each, problems last."""
        packages = [(name, version or "not installed") for name, version in self.packages.items()]
        devices = [(d.name, "usable" if d.is_usable else "not usable", d.detail) for d in self.devices]
        extras = [
            (e.name, f"missing {', '.join(e.missing)}: {e.command}" if e.missing else "installed") for e in self.extras
        ]
        blocks = {
            "system": align(list(self.system.items())),
            "packages": align(packages),
            "devices": align(devices),
            "extras": align(extras),
            "kernels": align(list(self.kernels.items())),
            "problems": list(self.problems) or ["none"],
        }
        return [line for title, block in blocks.items() for line in (title, *(f"  {text}" for text in block))]


def examine() -> Report:
    """Look at everything; nothing is changed, nothing is fetched."""
    versions = {name: installed(name) for name in (*REQUIRED, *(name for extra in EXTRAS.values() for name in extra))}
    broken = _import_errors(versions)
    devices = (_cpu(), _cuda(), _hpu(versions))
    extras = tuple(_extra(name, packages, versions) for name, packages in EXTRAS.items())
    problems = (
        *_version_problems(versions),
        *broken,
        *_device_problems(devices),
        *_gaudi_problems(versions),
        *_folder_problems({"the current folder": Path.cwd(), "the folder for temporary files": _temporary()}),
        *_cache_problems(_cache()),
    )
    return Report(
        _system(), {DISTRIBUTION: installed(DISTRIBUTION), **versions}, devices, extras, _kernels(devices), problems
    )


def installed(name: str) -> str:
    """A distribution's version, or the empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _system() -> dict[str, str]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": f"{cores}",
        "memory": f"{size_text(memory.total)}, {size_text(memory.available)} free",
        "disk here": f"{size_text(shutil.disk_usage(Path.cwd()).free)} free",
        "disk for temporary files": f"{size_text(shutil.disk_usage(_temporary()).free)} free in {_temporary()}",
        "hub cache": f"{_cache()}",
    }


# --- devices


def _cpu() -> Device:
    flags = _cpu_flags()
    found = [flag for flag in _BF16_FLAGS if flag in flags]
    bf16 = f"bf16 in hardware ({', '.join(found)})" if found else _NO_BF16 if flags else "bf16: unknown"
    return Device("cpu", is_usable=True, detail=bf16)


def _cpu_flags() -> set[str]:
    """The processor's features as Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def _cuda() -> Device:
    """CUDA (or ROCm, which torch calls by the same name)."""
    try:
        import torch
    except (ImportError, OSError):
        return Device("cuda", is_usable=False, detail="torch cannot be imported")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        is_usable = torch.cuda.is_available()
    if is_usable:
        return Device("cuda", is_usable=True, detail="; ".join(map(_describe_gpu, range(torch.cuda.device_count()))))
    if torch.version.cuda is None and torch.version.hip is None:
        driver = f", though {NVIDIA_TOOL} is here" if shutil.which(NVIDIA_TOOL) else ""
        return Device("cuda", is_usable=False, detail=f"this torch is built for the CPU{driver}")
    reason = str(said[0].message).splitlines()[0] if said else "no driver or no device"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return Device("cuda", is_usable=False, detail=f"torch is built for {built_for}, but: {reason}")


def _describe_gpu(number: int) -> str:
    import torch

    card = torch.cuda.get_device_properties(number)
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    return f"{card.name}, {size_text(card.total_memory)}, capability {card.major}.{card.minor}, {bf16}"


def _gaudi_installation(versions: Mapping[str, str]) -> gaudi.Installation:
    return gaudi.Installation(
        plugin=installed(gaudi.PLUGIN),
        package=versions[gaudi.PACKAGE],
        torch=versions["torch"],
        transformers=versions["transformers"],
    )


def _hpu(versions: Mapping[str, str]) -> Device:
    """Gaudi, by what is installed: its driver's tool, its plugin for torch, optimum-habana, and what fits those."""
    here = _gaudi_installation(versions)
    missing = [] if shutil.which(GAUDI_TOOL) else [f"no {GAUDI_TOOL} on the path"]
    missing += [problem.found for problem in gaudi.shortcomings(here)]
    versions_text = f"plugin {here.plugin}, {gaudi.PACKAGE} {here.package}, torch {here.torch}"
    return Device("hpu", is_usable=not missing, detail=", ".join(missing) or f"{versions_text}; {gaudi.SUPPORT}")


def _extra(name: str, packages: Mapping[str, str], versions: Mapping[str, str]) -> Extra:
    missing = tuple(package for package in packages if not versions[package])
    command = f"pip install '{DISTRIBUTION}[{name}]'"
    if name == "gaudi":
        command += " in an environment of its own"
        if installed(gaudi.PLUGIN):  # here pip must leave torch alone
            command += f", with -c FILE whose line is torch=={versions['torch']}"
    return Extra(name, missing, command if missing else "")


def _kernels(devices: tuple[Device, ...]) -> dict[str, str]:
    """What a run's settings (precision, tf32, attention, liger, compile) can have on this machine."""
    try:
        from surgery.acceleration import state

        has_cuda = any(device.name == "cuda" and device.is_usable for device in devices)
        return state("cuda" if has_cuda else "cpu")
    except (ImportError, OSError):
        return {"all": "not usable: torch or transformers cannot be imported"}


# --- problems


def _version_problems(versions: Mapping[str, str]) -> list[str]:
    """Packages that are missing or outside the ranges that the code runs with."""
    optional = {name: (admitted,) for extra in EXTRAS.values() for name, admitted in extra.items() if versions[name]}
    problems = []
    for name, admitted in {**REQUIRED, **optional}.items():
        version = versions[name]
        if not version or not any(SpecifierSet(text).contains(version, prereleases=True) for text in admitted):
            found = f"{name} {version}" if version else f"{name} is not installed"
            command = f"pip install '{name}{admitted[-1]}'"
            if name == "torch" and installed(gaudi.PLUGIN):
                command = "install the Gaudi software that has it; pip would break the plugin"
            problems.append(f"{found}, needed is {' or '.join(admitted)}: {command}")
    return problems


def _import_errors(versions: Mapping[str, str]) -> list[str]:
    """Whether torch and transformers, where installed, can be imported at all: their binaries may not fit together."""
    problems = []
    for name in ("torch", "transformers"):
        try:
            if versions[name]:
                importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  whatever a broken installation raises is the finding
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            why = shorten(first_line, 200)
            problems.append(f"{name} {versions[name]} cannot be imported ({why}): install it again")
    return problems


def _device_problems(devices: tuple[Device, ...]) -> list[str]:
    """A device that is there in part: nobody misses one that is not there at all."""
    cuda = next(device for device in devices if device.name == "cuda")
    if cuda.is_usable:
        return []
    if "is here" in cuda.detail:
        return [f"{cuda.detail}: install torch's build for CUDA to use the GPU"]
    if ", but: " in cuda.detail:
        return [f"{cuda.detail}: install or update the driver, or take torch's build for the CPU"]
    return []


def _gaudi_problems(versions: Mapping[str, str]) -> list[str]:
    """On a machine with the Gaudi software: what else is missing, or does not fit it."""
    here = _gaudi_installation(versions)
    return [str(problem) for problem in gaudi.shortcomings(here)] if here.plugin else []


def _folder_problems(folders: Mapping[str, Path]) -> list[str]:
    """Folders that cannot be written to, or whose disk is nearly full."""
    problems = []
    for name, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if not is_writable(folder):
            problems.append(f"{name} ({folder}) cannot be written to: write elsewhere with -o")
        elif free < MIN_FREE_BYTES:
            problems.append(f"{name} ({folder}) has {size_text(free)} free: make room before training or exporting")
    return problems


def _cache_problems(cache: Path) -> list[str]:
    if is_writable(cache):
        return []
    return [f"the hub's cache ({cache}) cannot be written to: name another with HF_HOME, or use model folders"]


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it does not exist yet."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
