"""How a page that a script makes is written, or checked."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, text: str) -> None:
    """Write a page; with `--check` on the command line exit with 1 and a line where what lies there is another."""
    if "--check" in sys.argv[1:]:
        is_fresh = page.is_file() and page.read_text(encoding="utf-8") == text
        sys.exit(0 if is_fresh else f"{page} is stale: run `make docs`")
    page.write_text(text, encoding="utf-8")
