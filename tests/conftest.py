"""What every test gets: no hub, one thread, the shared data, and tiny models that are built once."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal

# Before anything imports torch or transformers: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    import torch

    from tests.console import Command, Console

PROJECT = Path(__file__).resolve().parent.parent
LONGEST = ("test_real.py", "test_readme.py", "test_distributed.py", "test_faults.py", "test_packaging.py")
collect_ignore = ["gaudi"]  # `make test-gaudi` runs them: they have an environment of their own


class TinyModel(Protocol):
    """`tiny_model("llama", dtype=torch.bfloat16)`: see `tests.tiny.build_tiny` for the arguments."""

    def __call__(
        self,
        family: str,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str | None = None,
        seed: int = 0,
        overrides: Mapping[str, object] | None = None,
    ) -> Path: ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: of two workers neither is left alone with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs hardware that is not here, and say which."""
    if item.get_closest_marker("gaudi_hardware") and shutil.which("hl-smi") is None:
        pytest.skip("needs a Gaudi: no hl-smi on the path")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and texts, kept beside the project: `../shared/data`, or the folder named by SURGERY_TEST_DATA."""
    named = os.environ.get("SURGERY_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared test data: {folder} is no folder (SURGERY_TEST_DATA names another)")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Tiny checkpoints, each built on first use and shared by the tests of one process: read them, never write there.

    At the end every file is compared with what was built, so that a test that did write is found out.
    """
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, tuple[Path, str]] = {}

    def build(
        family: str,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str | None = None,
        seed: int = 0,
        overrides: Mapping[str, object] | None = None,
    ) -> Path:
        import torch

        from tests.tiny import build_tiny

        dtype = dtype or torch.float32
        key = repr((family, dtype, max_shard_size, seed, sorted((overrides or {}).items())))
        if key not in built:
            folder = root / f"{family}-{len(built)}"
            build_tiny(family, folder, dtype=dtype, max_shard_size=max_shard_size, seed=seed, overrides=overrides)
            built[key] = folder, digest_folder(folder)
        return built[key][0]

    yield build
    changed = [str(folder) for folder, digest in built.values() if digest_folder(folder) != digest]
    assert not changed, f"a test wrote into shared tiny models: {changed}"


@pytest.fixture
def console(capfd: pytest.CaptureFixture[str]) -> Console:
    """`console("export", folder)`: what the console script does with these arguments."""
    from tests.console import call

    return partial(call, capfd)


@pytest.fixture
def command(console: Console) -> Command:
    """The console script: its exit code, and what it wrote to standard error."""
    return lambda *arguments: console(*arguments)[::2]


def digest_folder(folder: Path) -> str:
    """One digest of all names and bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
