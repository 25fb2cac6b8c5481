"""The side network as one module that needs torch alone: what is written beside weights that transformers loads."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from types import ModuleType

from surgery import side
from surgery.side import memory, network, padding, recurrence, settings, steps

PARTS: tuple[ModuleType, ...] = (settings, steps, memory, padding, recurrence, network)  # each needs those before it
IMPORTS = (ast.Import, ast.ImportFrom)


def side_source() -> str:
    """The package's docstring, what its modules import of others, and their bodies."""
    sources = [inspect.getsource(part) for part in PARTS]
    head = f"{inspect.getsource(side)}\n{_imports(map(ast.parse, sources))}"
    return "\n\n\n".join([head, *map(_body, sources)]) + "\n"


def _imports(trees: Iterable[ast.Module]) -> str:
    """Their imports but those of each other, each once."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            plain.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(side.__name__):
            named.setdefault(node.module, set()).update(map(ast.unparse, node.names))
    first, *rest = (f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items()))
    return "\n".join([first, "", *sorted(plain), *rest])  # `__future__` comes first in both senses


def _body(source: str) -> str:
    """What follows a module's imports, under its docstring's first line."""
    tree = ast.parse(source)
    about = (ast.get_docstring(tree) or "").splitlines()[0]
    end = max(node.end_lineno or 0 for node in tree.body if isinstance(node, IMPORTS))
    return f"# --- {about}\n\n\n" + "\n".join(source.splitlines()[end:]).strip("\n")
