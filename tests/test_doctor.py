"""The examination: what is here is listed, what is wrong is named with its remedy, and nothing is touched."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from surgery import doctor
from surgery.doctor import EXTRAS, REQUIRED, Device, Report, examine, installed, is_writable
from tests.conftest import PROJECT, digest_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Let these distributions have these versions (empty: not installed), and the others their own."""

    def version(name: str) -> str:
        return versions[name] if name in versions else installed(name)

    monkeypatch.setattr(doctor, "installed", version)


def device(report: Report, name: str) -> Device:
    """One device of a report."""
    (found,) = [device for device in report.devices if device.name == name]
    return found


def test_this_machine_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that the tests run in has no problem, a usable CPU and the versions of its packages."""
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 0)
    report = examine()
    assert [problem for problem in report.problems if "hub's cache" not in problem and "CUDA" not in problem] == []
    assert report.packages["torch"] == torch.__version__
    assert device(report, "cpu").is_usable
    assert device(report, "cuda").is_usable is torch.cuda.is_available()
    assert report.system["cores"].isdigit()


def test_the_report_is_plain_json_and_readable() -> None:
    """Six blocks, each package and device named; the same as a document."""
    report = examine()
    document = json.loads(json.dumps(report.to_dict()))
    assert set(document) == {"system", "packages", "devices", "extras", "kernels", "problems"}
    lines = report.lines()
    assert [line for line in lines if not line.startswith("  ")] == list(document)
    text = "\n".join(lines)
    assert all(f"  {name}" in text for name in (*report.packages, *EXTRAS, "cpu", "cuda", "hpu"))
    assert lines == [line.rstrip() for line in lines]


def test_no_problem_is_said_in_a_word() -> None:
    """An empty list of problems reads `none`."""
    assert Report({}, {}, (), (), {}, ()).lines()[-2:] == ["problems", "  none"]


@pytest.mark.parametrize(
    ("name", "version", "is_fit"),
    (
        ("torch", "2.8.0", False),
        ("torch", "2.9.0+cu128", True),
        ("torch", "2.11.0a0+git123", True),
        ("torch", "3.0.0", False),
        ("transformers", "4.54.1", False),
        ("transformers", "4.55.4", True),
        ("transformers", "4.56.0", False),
        ("transformers", "4.57.1", False),
        ("transformers", "5.0.0", True),
        ("transformers", "5.23.0", True),
        ("transformers", "6.0.0", False),
        ("datasets", "2.19.0", False),
        ("safetensors", "", False),
        ("peft", "", True),
        ("peft", "0.10.0", False),
        ("onnx", "1.10", False),
    ),
)
def test_versions_outside_the_ranges_are_problems(
    name: str, version: str, *, is_fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too old, too new, in the hole between two supported lines, missing: named with the command that mends it."""
    pretend(monkeypatch, {name: version})
    found = [problem for problem in examine().problems if problem.startswith(f"{name} ")]
    assert bool(found) is not is_fit
    if found:
        assert f"pip install '{name}" in found[0]
        assert (version or "not installed") in found[0]


def test_what_is_installed_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose binaries do not load is a problem, not a crash."""

    def broken(name: str) -> types.ModuleType:
        raise OSError(f"lib{name}.so: undefined symbol\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = [problem for problem in examine().problems if "cannot be imported" in problem]
    assert [problem.split()[0] for problem in found] == ["torch", "transformers"]
    assert "undefined symbol" in found[0]
    assert "more" not in found[0]


def test_extras_come_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra that lacks a package names it; a whole one is installed; Gaudi's wants an environment of its own."""
    complete = {name: "1.0" for extra in EXTRAS.values() for name in extra}
    pretend(monkeypatch, {**complete, "onnxruntime": "", "optimum-habana": ""})
    extras = {extra.name: extra for extra in examine().extras}
    assert (extras["lora"].missing, extras["lora"].command) == ((), "")
    assert (extras["onnx"].missing, extras["onnx"].command) == (
        ("onnxruntime",),
        "pip install 'checkpoint-surgery[onnx]'",
    )
    assert extras["gaudi"].command.endswith("[gaudi]' in an environment of its own")


def test_the_ranges_are_those_of_the_package() -> None:
    """pyproject.toml and the doctor agree on every range; for transformers pip's range spans both of ours."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, admitted in REQUIRED.items():
        if name == "transformers":
            assert declared[name] == SpecifierSet(">=4.55,<6")
        else:
            assert [SpecifierSet(text) for text in admitted] == [declared[name]]
    assert {*EXTRAS, "dev"} == set(project["optional-dependencies"])
    for extra, packages in EXTRAS.items():
        listed = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"][extra])}
        assert {name: SpecifierSet(text) for name, text in packages.items()}.items() <= listed.items()


def fake_torch(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, warning: str = "", cards: int = 0) -> None:
    """Let torch be built for this CUDA (None: the CPU), see that many cards and warn like this."""

    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=1)
        return cards > 0

    card = types.SimpleNamespace(name="H200", total_memory=150_000_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)


def fake_tools(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these command-line tools be on the path, and no others."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in names else None)


def cuda_problems(report: Report) -> list[str]:
    """The problems that concern CUDA."""
    return [problem for problem in report.problems if "torch is built" in problem]


def test_a_graphics_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, memory, capability and bf16 of each card."""
    fake_torch(monkeypatch, cuda="13.0", cards=2)
    report = examine()
    card = "H200, 150.00 GB, capability 9.0, bf16"
    assert device(report, "cuda") == Device("cuda", is_usable=True, detail=f"{card}; {card}")
    assert cuda_problems(report) == []


def test_a_cpu_build_without_a_card_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody misses a card that is not there."""
    fake_torch(monkeypatch, cuda=None)
    fake_tools(monkeypatch)
    report = examine()
    assert device(report, "cuda").detail == "this torch is built for the CPU"
    assert [problem for problem in report.problems if "CPU" in problem] == []


def test_a_cpu_build_beside_a_driver_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that torch cannot use for want of the right build."""
    fake_torch(monkeypatch, cuda=None)
    fake_tools(monkeypatch, "nvidia-smi")
    (problem,) = [problem for problem in examine().problems if "CPU" in problem]
    assert problem.endswith("install torch's build for CUDA to use the GPU")


@pytest.mark.parametrize(
    ("warning", "reason"), (("", "no driver or no device"), ("The driver is too old\nhelp", "The driver is too old"))
)
def test_a_cuda_build_without_a_driver_is_a_problem(warning: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own words where it has some, as a finding and not as a warning."""
    fake_torch(monkeypatch, cuda="12.8", warning=warning)
    report = examine()
    assert device(report, "cuda").detail == f"torch is built for CUDA 12.8, but: {reason}"
    (problem,) = cuda_problems(report)
    assert "install or update the driver" in problem


GAUDI = {
    "optimum-habana": "1.21.2",
    "habana-torch-plugin": "1.24.0.695",
    "torch": "2.11.0+hpu.1.24.0.695.git1a2b3c4",
    "transformers": "4.55.4",
}


def test_gaudi_needs_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each missing part is named; with all of them the device is usable, and its support's end is said."""
    fake_tools(monkeypatch)
    pretend(monkeypatch, {"optimum-habana": "", "habana-torch-plugin": ""})
    missing = device(examine(), "hpu")
    assert not missing.is_usable
    assert missing.detail.startswith("no hl-smi on the path, habana-torch-plugin is not installed, optimum-habana is")
    assert [problem for problem in examine().problems if "hpu" in problem] == []  # nobody misses what is not there
    fake_tools(monkeypatch, "hl-smi")
    pretend(monkeypatch, GAUDI)
    whole = device(examine(), "hpu")
    assert whole.is_usable
    assert whole.detail.startswith("plugin 1.24.0.695, optimum-habana 1.21.2, torch 2.11.0+hpu")
    assert "2026-10-31" in whole.detail


@pytest.mark.parametrize(
    ("change", "found", "remedy"),
    (
        ({"torch": "2.11.0+cpu"}, "torch 2.11.0+cpu, expected the build that came with", "pip has replaced it"),
        ({"torch": "2.9.0+hpu_1.23.1-25.git8598e6d"}, "torch 2.9.0+hpu_1.23.1", "Install both from one"),
        ({"transformers": "5.23.0"}, "transformers 5.23.0", "pip install 'transformers>=4.55,<4.56'"),
        ({"optimum-habana": ""}, "optimum-habana is not installed", "pip install -c"),
        ({"optimum-habana": "1.20.0"}, "with optimum-habana 1.20.0", "Install optimum-habana 1.21"),
    ),
)
def test_on_a_gaudi_what_does_not_fit_is_a_problem(
    change: dict[str, str], found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the vendor's software is installed, whatever does not fit it is said, with what to do."""
    fake_tools(monkeypatch, "hl-smi")
    pretend(monkeypatch, {**GAUDI, **change})
    report = examine()
    assert not device(report, "hpu").is_usable
    (problem,) = [problem for problem in report.problems if problem.startswith("--device hpu")]
    assert found in problem
    assert remedy in problem


def test_on_a_gaudi_no_advice_lets_pip_replace_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a torch that is too old nor for a missing extra."""
    old = "2.8.0+hpu.1.22.0.740"
    pretend(monkeypatch, {**GAUDI, "torch": old, "habana-torch-plugin": "1.22.0.740", "optimum-habana": ""})
    report = examine()
    (problem,) = [problem for problem in report.problems if problem.startswith(f"torch {old}")]
    assert "pip install" not in problem
    (extra,) = [extra for extra in report.extras if extra.name == "gaudi"]
    assert f"-c FILE whose line is torch=={old}" in extra.command


@pytest.mark.parametrize(
    ("flags", "expected"),
    (
        ({"avx2", "avx512_bf16"}, "bf16 in hardware (avx512_bf16)"),
        ({"avx2"}, "bf16 is emulated here: it saves memory, not time"),
        (set(), "bf16: unknown"),
    ),
)
def test_the_processor_s_bf16_is_read_from_its_flags(
    flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In hardware, emulated, or unknown where the system does not list its features."""
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: flags)
    assert device(examine(), "cpu").detail == expected


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache below a file cannot be made; one that does not exist yet can."""
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o700)  # executable as a folder is
    assert is_writable(tmp_path / "new" / "cache")
    assert not is_writable(tmp_path / "file" / "cache")
    assert not is_writable(tmp_path / "file")
    monkeypatch.setattr(doctor, "_cache", lambda: tmp_path / "file" / "cache")
    assert any("HF_HOME" in problem for problem in examine().problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_not_writable(tmp_path: Path) -> None:
    """Permissions count."""
    tmp_path.chmod(0o500)
    try:
        assert not is_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a gigabyte free, here or for temporary files, is said."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=5_000_000))
    full = [problem for problem in examine().problems if "make room" in problem]
    assert len(full) == 2
    assert "5.00 MB free" in full[0]


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examination leaves no file behind, here or in the folder for temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_temporary", lambda: tmp_path)
    before = digest_folder(tmp_path)
    examine()
    assert digest_folder(tmp_path) == before


def test_the_vendor_s_packages_are_never_imported(tmp_path: Path) -> None:
    """With packages of the vendor's names on the path that fail when imported, the examination passes."""
    vendor = "opt" + "imum"
    for name in (vendor, "habana" + "_frameworks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    code = f"import sys, surgery.doctor as d; d.examine(); assert {vendor!r} not in sys.modules; print('done')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    source = (PROJECT / "surgery" / "doctor.py").read_text()
    assert not re.search(rf"\b{vendor}\b(?!-habana)", source)
