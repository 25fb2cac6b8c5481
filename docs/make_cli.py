"""Write docs/cli.md from the commands' own help; with --check, exit 1 where it is stale."""

from __future__ import annotations

from pathlib import Path

import click
from pages import write_or_check

from surgery.cli import HELP, cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 110
HEAD = """# Command line

Made by `make docs` from `surgery --help`; do not edit it by hand.

Exit codes: 0 done; 1 failure while running; 2 the request is wrong; 3 a check did not hold; 4 refused before starting
(wrong or damaged base or adapter, a path that leaves its folder, no room on disk, not enough memory); 5 unsupported
combination; 130 interrupted. Every error is one line on standard error.
"""


def help_of(command: click.Command, path: str) -> str:
    """A command's help text, as a terminal of fixed width shows it."""
    context = click.Context(command, info_name=path, terminal_width=WIDTH, **HELP)
    return command.get_help(context)


def render() -> str:
    """The whole page."""
    parts = [HEAD, f"## surgery\n\n```\n{help_of(cli, 'surgery')}\n```\n"]
    for name, command in sorted(cli.commands.items()):
        text = help_of(command, f"surgery {name}")
        parts += [f"## surgery {name}\n\n```\n{text}\n```\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    write_or_check(PAGE, render())
