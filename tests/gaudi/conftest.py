"""The environment of the contract tests: the stand-in where the vendor's plugin is not installed, lazy mode, no hub."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
STANDIN = Path(__file__).resolve().parent / "standin"
HAS_PLUGIN = any(d.name == "habana-torch-plugin" for d in importlib.metadata.distributions())

# Before anything imports torch, which loads the plugin, or the stand-in for it. Child processes get the same.
if not HAS_PLUGIN:
    sys.path.insert(0, str(STANDIN))
os.environ["PYTHONPATH"] = os.pathsep.join([*([] if HAS_PLUGIN else [str(STANDIN)]), str(PROJECT)])
os.environ["PT_HPU_LAZY_MODE"] = "1"

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tests.conftest import TinyModel, pytest_runtest_setup  # noqa: F401  a hook of all tests


@pytest.fixture(scope="session")
def upstream() -> Iterator[ProcessPoolExecutor]:
    """A process in which transformers stays as it is: after a run on hpu this one's classes are the vendor's."""
    from tests.gaudi import runs

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        runs.POOL.append(pool)
        yield pool
        runs.POOL.clear()


@pytest.fixture(scope="session")
def tiny_model(upstream: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Tiny checkpoints as upstream's classes write them, each built on first use."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def build(family: str, *, overrides: Mapping[str, object] | None = None, **settings: Any) -> Path:
        from tests.tiny import build_tiny

        key = repr((family, settings, sorted((overrides or {}).items())))
        if key not in built:
            folder = root / f"{family}-{len(built)}"
            built[key] = upstream.submit(build_tiny, family, folder, overrides=overrides, **settings).result()
        return built[key]

    return build  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks into the stand-in cannot run with the vendor's plugin."""
    for item in items:
        if HAS_PLUGIN and not item.get_closest_marker("gaudi_hardware"):
            item.add_marker(pytest.mark.skip(reason="looks into the stand-in, and the vendor's plugin is installed"))
