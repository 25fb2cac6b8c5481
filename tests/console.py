"""The console script, called in the tests' own process: see the fixture `console`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pytest

from surgery.cli import main


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Console: TypeAlias = Callable[..., Ended]
Command: TypeAlias = Callable[..., tuple[int, str]]  # the same without what it printed on standard output


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run the console script's function, as the script does; what reaches either stream is seen, by any means."""
    handler = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    code: Any = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Ended(code, *capfd.readouterr())
