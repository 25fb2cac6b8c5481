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

from tests.conftest import digest_folder, pytest_runtest_setup, tiny_model  # noqa: F401  hooks and fixtures of all tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks into the stand-in cannot run with the vendor's plugin."""
    for item in items:
        if HAS_PLUGIN and not item.get_closest_marker("gaudi_hardware"):
            item.add_marker(pytest.mark.skip(reason="looks into the stand-in, and the vendor's plugin is installed"))
