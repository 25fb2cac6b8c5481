"""What is shipped, and what the repository says about itself."""

from __future__ import annotations

import ast
import configparser
import email
import email.message
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
NAME, VERSION = PYPROJECT["project"]["name"], PYPROJECT["project"]["version"]
EXTRAS = {
    "onnx", "bnb", "deepspeed", "energy", "eval", "gaudi", "images", "liger", "lora", "report", "torchao", "tracking",
    "dev",
}  # fmt: skip
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# Where the name one imports is not the name one installs.
DISTRIBUTIONS = {
    "google": "protobuf", "sklearn": "scikit-learn", "yaml": "pyyaml", "optimum": "optimum-habana",
    "onnx_ir": "onnx-ir", "PIL": "pillow", "pynvml": "nvidia-ml-py", "vl_convert": "vl-convert-python",
}  # fmt: skip

# Names of package hosts, and folders of one machine. In pieces, so that this file holds none of them.
HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "download." + "pytorch.org",
    "vault." + "habana.ai",
    "ana" + "conda.org",
)
PLACES = re.compile(rb"(?<![\w.~-])/(?:work|tmp|root|opt/wheels|opt/py\w+|home/\w+)/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy of the sources: setuptools leaves folders behind where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(PROJECT / name, source)
    for name in ("surgery", "exporters", "recipes", "tests"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, bytes]:
    """Path -> bytes of the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(contents: dict[str, bytes]) -> email.message.Message:
    """The wheel's METADATA."""
    (name,) = [name for name in contents if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(contents[name])


def requirements(*, without: str = "") -> list[Requirement]:
    """Every direct dependency, those of extras included. `without` names an extra to leave out."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    texts = [text for extra, listed in extras.items() if extra != without for text in listed]
    return [Requirement(text) for text in [*PYPROJECT["project"]["dependencies"], *texts]]


def constraints() -> list[Requirement]:
    """The lines of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (PROJECT / "constraints.txt").read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pinned(python: str) -> dict[str, Requirement]:
    """Distribution -> its constraint on one Python."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    return {
        canonicalize_name(line.name): line
        for line in constraints()
        if line.marker is None or line.marker.evaluate(environment)
    }


def test_the_wheel_holds_the_two_packages_and_no_more(contents: dict[str, bytes]) -> None:
    """Every source file of both packages, their py.typed marks and a page's template are there; tests are not."""
    shipped = {name for name in contents if ".dist-info/" not in name and not name.startswith("surgery/recipes/")}
    ours = {
        str(path.relative_to(PROJECT))
        for package in ("surgery", "exporters")
        for pattern in ("*.py", "py.typed", "page.*")
        for path in (PROJECT / package).rglob(pattern)
    }
    assert shipped == ours
    page = {f"surgery/report/page.{ending}" for ending in ("css", "html.jinja", "js")}
    assert {"surgery/py.typed", "exporters/py.typed", *page} <= shipped


def test_the_wheel_holds_the_recipes_with_what_their_smoke_runs_need(contents: dict[str, bytes]) -> None:
    """Byte for byte, under the package, and none of the quickstart, which has a model of its own."""
    shipped = {name.removeprefix("surgery/"): data for name, data in contents.items() if "/recipes/" in name}
    papers = [path for path in (PROJECT / "recipes" / "papers").rglob("*") if path.is_file()]
    others = [path for folder in ("distributed", "sentiment") for path in (PROJECT / "recipes" / folder).glob("*.yaml")]
    assert shipped == {str(path.relative_to(PROJECT)): path.read_bytes() for path in (*papers, *others)}


def test_the_wheel_s_metadata(contents: dict[str, bytes], metadata: email.message.Message, wheel: Path) -> None:
    """Name, version, licence, Python and extras are as pyproject.toml has them."""
    assert (metadata["Name"], metadata["Version"]) == (NAME, VERSION)
    assert wheel.name == f"checkpoint_surgery-{VERSION}-py3-none-any.whl"
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    (licence,) = [data for name, data in contents.items() if name.endswith("/licenses/LICENSE")]
    assert licence == (PROJECT / "LICENSE").read_bytes()


def test_the_command_is_an_entry_point(contents: dict[str, bytes]) -> None:
    """Installing gives the command `surgery`, and the function it names exists."""
    (text,) = [data.decode() for name, data in contents.items() if name.endswith("/entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(text)
    assert dict(parser["console_scripts"]) == {"surgery": "surgery.cli:main"}
    tree = ast.parse(contents["surgery/cli.py"])
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_one_version() -> None:
    """A version written in the sources is the one of pyproject.toml."""
    for path in (PROJECT / "surgery").rglob("*.py"):
        found = re.findall(r'^__version__(?:: \w+)? = "(.*)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert found in ([], [VERSION]), path


def test_the_vendor_s_packages_stand_in_no_extra() -> None:
    """On a Gaudi machine the vendor's software is there already, and no index has it: an extra must not ask for it."""
    assert [r.name for r in requirements() if "habana" in r.name] == ["optimum-habana"]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_cover_every_direct_dependency(python: str) -> None:
    """On every supported Python each direct dependency has one tested version, and it lies in the declared range."""
    pins, environment = pinned(python), {**default_environment(), "python_version": python}
    for requirement in requirements(without="gaudi"):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = pins[canonicalize_name(requirement.name)].specifier
            assert requirement.specifier.contains(specifier.version), f"{requirement}: {specifier.version} is outside"


def test_every_constraint_is_one_exact_version() -> None:
    """A constraint pins, has no local suffix (it would exclude other builds) and is not given twice for one Python."""
    for line in constraints():
        (specifier,) = line.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version
    for python in PYTHONS:
        environment = {**default_environment(), "python_version": python}
        names = [canonicalize_name(c.name) for c in constraints() if c.marker is None or c.marker.evaluate(environment)]
        assert len(names) == len(set(names))
    assert str(pinned("3.11")["torch"].specifier) == "==2.13.0"


def imported_names(path: Path) -> set[str]:
    """The top-level names that a source file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_ = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in plain | from_}


def test_every_import_is_declared() -> None:
    """What the packages import from elsewhere is a dependency or stands in an extra: not somebody else's dependency."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    known = sys.stdlib_module_names | {"surgery", "exporters"}
    known |= {"habana_frameworks"}  # comes with a Gaudi's own software, and from no index
    undeclared = [
        f"{path.relative_to(PROJECT)}: {name}"
        for package in ("surgery", "exporters")
        for path in sorted((PROJECT / package).rglob("*.py"))
        for name in sorted(imported_names(path) - known)
        if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in declared
    ]
    assert undeclared == []


def repository_files() -> list[Path]:
    """What is, or is about to be, in the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout: git ls-files does not run here")
    paths = (PROJECT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_package_host_or_a_place_on_one_machine() -> None:
    """Where packages come from is the user's setting, and folders of one machine mean nothing on another."""
    found = []
    for path in repository_files():
        data = path.read_bytes()
        found += [f"{path.relative_to(PROJECT)}: {host}" for host in HOSTS if host.encode() in data]
        found += [f"{path.relative_to(PROJECT)}: {match[0].decode()}" for match in PLACES.finditer(data)]
    assert found == []


def test_the_readme_s_commands_exist() -> None:
    """The two commands of the README are targets of the Makefile, and continuous integration runs the second."""
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"make {target}" in (PROJECT / "README.md").read_text(encoding="utf-8")
    assert "\nmake test\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
