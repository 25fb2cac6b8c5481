"""A dense run whose gradients are masked to the columns of the time: what columns that take turns must be equal to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.columns import drawn_columns
from surgery.delta import ColumnPatch, require_columns
from surgery.operate import collect


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
    loss_of: Callable[[Any, int], Tensor],
    *,
    steps: int,
    every: int,
    rate: float,
) -> None:
    """Train a plain model by Adam, which knows nothing after each draw but of rows, which are in all of them."""
    model.requires_grad_(requires_grad=False)
    named = {patch.target.name for patch in patches.values() if patch.target.rows}
    steady = [torch.optim.Adam([model.get_parameter(name)], lr=rate) for name in sorted(named)]
    for number in range(steps):
        if number % every == 0:
            masks = masks_of(patches, model, number // every)
            drawn = [model.get_parameter(name) for name in masks if name not in named]
            optimizers = [*steady, torch.optim.Adam(drawn, lr=rate)]
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
