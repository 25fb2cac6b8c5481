"""Columns that take turns, and what they must equal: a dense run whose gradients are masked to those of the time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.columns import drawn_columns
from surgery.delta import ColumnPatch, require_columns
from surgery.operate import collect, detach, resample
from surgery.paca_layers import layers
from surgery.resampling import restore_layers, state_of_layers
from tests.test_paca import trainable

RATE = 1e-2
LossOf = Callable[[Any, int], Tensor]  # of a model and the number of a batch


def train_in_turns(loss_of: LossOf, model: Any, steps: int, *, first: int = 0, optimizer: Any = None) -> Any:
    """Adam for so many steps, other columns whenever they are due. Returns the optimizer."""
    optimizer = optimizer or torch.optim.Adam(trainable(model), lr=RATE)
    for number in range(first, first + steps):
        loss_of(model, number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        resample(model, optimizer, step=number + 1)
    return optimizer


def require_draws_are_exact(loss_of: LossOf, model: Any, logits_of: Callable[[Any], Tensor]) -> set[str]:
    """Of a model whose columns are drawn every other step, and which is attached; it is closed in the end.

    Its logits before a draw and after; a state put back into a model that has moved on; the base. Returns the layers
    of which the optimizer still knows something after a draw.
    """
    base = detach(copy.deepcopy(model), merge=False).state_dict()
    optimizer = train_in_turns(loss_of, model, 3)
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    before = logits_of(model)
    assert resample(model, optimizer, step=4)
    assert torch.equal(logits_of(model), before)
    known = {name for name, layer in layers(model).items() if layer.paca_delta in optimizer.state}
    state = {name: tensor.clone() for name, tensor in state_of_layers(model).items()}
    deltas = {name: layer.paca_delta.detach().clone() for name, layer in layers(model).items()}
    train_in_turns(loss_of, model, 4, first=4, optimizer=optimizer)
    assert not torch.equal(logits_of(model), before)
    restore_layers(model, state)
    for name, layer in layers(model).items():
        layer.paca_delta.data.copy_(deltas[name])
        layer.refresh()
    assert torch.equal(logits_of(model), before)
    assert all(torch.equal(state_of_layers(model)[name], tensor) for name, tensor in state.items())
    found = detach(model, merge=False).state_dict()
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    return known


def patches_of(model: Any) -> Mapping[str, ColumnPatch]:
    """What an attached model has to begin with: its first columns, and what later ones are drawn by."""
    return require_columns(collect(model), "test").patches


def columns_in(patch: ColumnPatch, draw: int) -> Tensor:
    """A target's columns in a draw, of which the first has number 0; rows stay."""
    target = patch.target
    if target.rows or not draw:
        return patch.columns
    return drawn_columns(target.in_features, target.rank, seed=0, group=target.group, draw=draw, weights_i=patch.scores)


def masks_of(patches: Mapping[str, ColumnPatch], model: Any, draw: int) -> dict[str, Tensor]:
    """1 where a parameter trains in a draw, by name."""
    masks: dict[str, Tensor] = {}
    for patch in patches.values():
        target = patch.target
        mask = masks.setdefault(target.name, torch.zeros_like(model.get_parameter(target.name)))
        if target.place:
            expert, part, parts = target.place
            mask = mask[expert].chunk(parts)[part]
        mask.index_fill_(target.input_axis, columns_in(patch, draw), 1)
    return masks


def run_masked(
    model: Any,
    patches: Mapping[str, ColumnPatch],
    loss_of: LossOf,
    *,
    steps: int,
    every: int,
) -> None:
    """Train a plain model by Adam, which knows nothing after each draw but of rows, which are in all of them."""
    model.requires_grad_(requires_grad=False)
    named = {patch.target.name for patch in patches.values() if patch.target.rows}
    steady = [torch.optim.Adam([model.get_parameter(name)], lr=RATE) for name in sorted(named)]
    for number in range(steps):
        if number % every == 0:
            masks = masks_of(patches, model, number // every)
            drawn = [model.get_parameter(name) for name in masks if name not in named]
            optimizers = [*steady, torch.optim.Adam(drawn, lr=RATE)]
        for name in masks:
            model.get_parameter(name).requires_grad_()
        loss_of(model, number).backward()  # type: ignore[no-untyped-call]
        for name, mask in masks.items():
            model.get_parameter(name).grad *= mask
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def require_merge_equals(merged: Mapping[str, Tensor], dense: Any, *, within: float = 1e-12) -> None:
    """A merged model's tensors are those of a dense one."""
    for name, expected in dense.state_dict().items():
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=within, msg=name)
