"""How far training moved each layer's columns, from an adapter's values, and which layers a side network reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.delta import ColumnDelta, SideDelta
from surgery.table import fold

ROWS = 40  # of the map: beyond, kinds of layers that differ in a number are taken together
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Move:
    """A target's relative movement, ||trained - original|| / ||original|| of its columns, and its place on the map.

    layer: the first number in its name, -1 where it has none; modules: how many targets it is the mean of.
    """

    module: str
    layer: int
    projection: str
    value: float
    modules: int = 1


def relative_norm(values: Tensor, original: Tensor) -> float:
    """||values - original|| / ||original||; of columns that were all zero, the norm itself. Shapes: equal."""
    was = original.double()
    moved, size = float(torch.linalg.vector_norm(values.double() - was)), float(torch.linalg.vector_norm(was))
    return moved / size if size else moved


def column_moves(delta: ColumnDelta, values: Mapping[str, Tensor] | None = None) -> list[Move]:
    """The movement of every target. values: by module, where they are not the adapter's own but a checkpoint's."""
    prefix = _shared_prefix([_place(module)[1] for module in delta.patches])
    moves = []
    for module, patch in delta.patches.items():
        layer, name = _place(module)
        now = patch.values if values is None else values[module]
        moves.append(Move(module, layer, name[len(prefix) :], relative_norm(now, patch.original)))
    return _folded(moves)


def _place(module: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj` is up_proj's place in layer 3: (3, `model.layers.mlp.up_proj`)."""
    found = _NUMBER.search(f"{module}.")
    if found is None:
        return -1, module
    return int(found[0]), module[: found.start()] + module[found.end() + 1 :]


def _shared_prefix(names: Sequence[str]) -> str:
    """What all names begin with, in whole parts."""
    first, *rest = sorted(set(names))
    parts = first.split(".")[:-1]
    while parts and not all(name.startswith(".".join(parts) + ".") for name in rest):
        parts.pop()
    return ".".join(parts) + "." if parts else ""


def _folded(moves: list[Move]) -> list[Move]:
    """Experts and their like as one row each, where there are too many rows to read."""
    if len({move.projection for move in moves}) <= ROWS:
        return moves
    together: dict[tuple[int, str], list[Move]] = {}
    for move in moves:
        together.setdefault((move.layer, fold(f".{move.projection}")[1:]), []).append(move)
    return [
        Move(f"{name} of layer {layer}", layer, name, sum(move.value for move in same) / len(same), len(same))
        for (layer, name), same in together.items()
    ]


def side_norms(delta: SideDelta) -> list[tuple[str, str, float]]:
    """(stack, tensor, root mean square) of a side network's tensors, those of a stack together."""
    found = []
    for name, values in delta.state.items():
        parts = name.split(".")
        at = parts.index("stacks") if "stacks" in parts else -2
        stack, tensor = (parts[at + 1], ".".join(parts[at + 2 :])) if at >= 0 else ("joiner", parts[-1])
        found.append((stack, tensor, float(values.double().square().mean().sqrt())))
    return found
