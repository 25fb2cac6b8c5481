"""Lists of layers that are alike but for their number: a few of them stand for all where only sizes are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

FEW = 2  # layers of a shortened list


def is_alike(model: nn.Module, block: str) -> bool:
    """Whether the layers of a list are worth shortening and differ, from the second on, in their numbers only."""
    layers: Any = model.get_submodule(block)
    if len(layers) <= FEW + 2:
        return False
    second = _traits(layers[1])
    return all(_equal_but_number(second, 1, _traits(layer), n) for n, layer in enumerate(layers) if n > 1)


def _traits(layer: nn.Module) -> dict[str, Any]:
    """Everything plain that may tell a layer from another, by name."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name] = type(module)
        found |= {f"{name}.{k}": v for k, v in vars(module).items() if isinstance(v, (str, bool, int, float))}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{name}.{key}": (tuple(t.shape), t.dtype, t.requires_grad) for key, t in own}
    return found


def _equal_but_number(first: Mapping[str, Any], first_number: int, other: Mapping[str, Any], number: int) -> bool:
    if first.keys() != other.keys():
        return False
    pairs = ((value, other[name]) for name, value in first.items())
    numbers = (first_number, number)
    return all(a == b or ((a, b) == numbers and type(a) is type(b) is int) for a, b in pairs)


@contextmanager
def few_layers(model: nn.Module, lengths: Mapping[str, int]) -> Iterator[None]:
    """The model with only the first so many layers of each named list."""
    whole: dict[str, Any] = {block: model.get_submodule(block) for block in lengths}
    try:
        for block, length in lengths.items():
            set_submodule(model, block, nn.ModuleList(list(whole[block])[:length]))
        yield
    finally:
        for block, layers in whole.items():
            set_submodule(model, block, layers)


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another is, by its path."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# --- beside a side network


@dataclass(frozen=True)
class _Returned:
    """What a layer returned: its state's shape and dtype, and of each further thing its place among what it was given.

    `rest`: (place, None), or (-1, what is no tensor).
    """

    shape: torch.Size
    dtype: torch.dtype
    rest: tuple[tuple[int, Any], ...]
    is_tuple: bool


@contextmanager
def echoing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """All layers of the lists, of which the first two and the last run, and the others return a state of the same size.

    Exact beside a side network: a backbone that trains nothing keeps nothing itself, whatever reads a state is run, and
    what a layer holds for a moment is most at the last, when most is kept.
    """
    handles: list[Any] = []
    echoes: list[Any] = []
    for block in blocks:
        whole: Any = model.get_submodule(block)
        layers = list(whole)
        seen: list[_Returned] = []
        handles.append(layers[1].register_forward_hook(partial(_note, seen), with_kwargs=True))
        for layer in layers[2:-1]:
            layer.forward = partial(_echo, seen, layer.forward)
            echoes.append(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in echoes:
            del layer.forward


def _note(seen: list[_Returned], _layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """After a layer: keep in `seen` what it returned, where another can return the like."""
    state, *others = output if isinstance(output, tuple) else (output,)
    given = (*args, *kwargs.values())
    tensors = {id(value): place for place, value in enumerate(given) if isinstance(value, Tensor)}
    places = [tensors.get(id(other), -1) for other in others]
    is_own = state.is_contiguous() and state.untyped_storage().nbytes() == state.nbytes
    if is_own and not any(place < 0 and _has_tensors(other) for place, other in zip(places, others, strict=True)):
        rest = tuple((place, other if place < 0 else None) for place, other in zip(places, others, strict=True))
        seen[:] = [_Returned(state.shape, state.dtype, rest, isinstance(output, tuple))]


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _echo(seen: list[_Returned], forward: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a layer's forward, which runs where nothing could be noted."""
    if not seen:
        return forward(*args, **kwargs)
    returned, given = seen[0], (*args, *kwargs.values())
    state = torch.empty(returned.shape, dtype=returned.dtype)
    rest = (given[place] if place >= 0 else value for place, value in returned.rest)
    return (state, *rest) if returned.is_tuple else state
