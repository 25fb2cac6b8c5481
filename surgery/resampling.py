"""Other columns train from time to time: how an opened layer changes its columns, and what it remembers of the others.

Columns that trained and do not train now stay in the weight as they were, rounded to the base's dtype as ever; their
difference from the base's columns is kept in the CPU's memory in full, for when they are drawn again and for the file.
What the device holds is that of one set: difference, gradient and the optimizer's state keep their shapes.

The whole of it is exact: a change of columns changes no output, and a column that returns goes on from where it was.

Shape suffixes as in `paca_layers`; m columns that trained before and do not now.
Source: TraDy (ICLR 2026) draws channels anew each epoch; that the state of what comes in starts fresh is our rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.columns import drawn_columns
from surgery.paca_layers import PacaLayer, combine, layers, read_columns, write_columns

COLUMNS, PAST_COLUMNS, PAST_DELTA = "paca_columns", "paca_past_columns", "paca_past_delta"  # in a training checkpoint
PARTS = (COLUMNS, PAST_COLUMNS, PAST_DELTA)


@dataclass(frozen=True)
class Held:
    """All columns that a layer has trained, on the CPU.

    Shapes: columns (u,) int64, strictly increasing; delta, original (o, u): the difference, and the base's columns.
    """

    columns: Tensor
    delta: Tensor
    original: Tensor

    def pick(self, columns: Tensor) -> Held:
        """Some of them; all that are asked for are there."""
        at = torch.searchsorted(self.columns, columns)
        return Held(columns, self.delta[:, at], self.original[:, at])

    def without(self, columns: Tensor) -> Held:
        """All but some of them."""
        stays = ~torch.isin(self.columns, columns)
        return Held(self.columns[stays], self.delta[:, stays], self.original[:, stays])

    def joined(self, other: Held) -> Held:
        """Both; they have no column in common."""
        columns, order = torch.cat([self.columns, other.columns]).sort()
        delta = torch.cat([self.delta, other.delta], 1)[:, order]
        return Held(columns, delta, torch.cat([self.original, other.original], 1)[:, order])


def active(layer: PacaLayer) -> Held:
    """The columns that train now."""
    tensors = (layer.paca_columns, layer.paca_delta, layer.paca_original)
    return Held(*(tensor.detach().to("cpu", copy=True) for tensor in tensors))


def held(layer: PacaLayer) -> Held:
    """All columns that train or have trained, each once."""
    past: Held | None = layer.paca_past
    return active(layer) if past is None else past.joined(active(layer))


@torch.no_grad()
def swap(layer: PacaLayer, known: Held, columns_r: Tensor) -> None:
    """Train these columns from now on, as many as before; those that trained before go on where they were.

    known: what the layer holds, of which the weight is fresh; columns_r: (r,) int64, strictly increasing.
    """
    new = columns_r[~torch.isin(columns_r, known.columns)]
    original = _read(layer, new)
    known = known.joined(Held(new, torch.zeros(original.shape, dtype=known.delta.dtype), original))
    _set_active(layer, known.pick(columns_r))
    layer.paca_past = known.without(columns_r)


def _set_active(layer: PacaLayer, chosen: Held) -> None:
    """In place: optimizers, shards of a group and compiled graphs hold these tensors."""
    layer.paca_columns.copy_(chosen.columns)
    layer.paca_original.data.copy_(chosen.original)
    layer.paca_delta.data.copy_(chosen.delta)
    layer.paca_delta.grad = None
    layer.paca_gather.forget()
    layer.paca_pending = True


@torch.no_grad()
def restore(layer: PacaLayer, columns_r: Tensor, past_columns_m: Tensor, past_delta_om: Tensor) -> None:
    """From the base's weight to where some columns train and others have. The former's difference is set apart."""
    original, first = _read(layer, past_columns_m), _read(layer, columns_r)
    _set_active(layer, Held(columns_r, torch.zeros_like(first, dtype=layer.paca_delta.dtype), first))
    layer.paca_past = past = Held(past_columns_m, past_delta_om, original)
    _write(layer, past, combine(past.original, past.delta, layer.paca_scale))


@torch.no_grad()
def open_past(layer: PacaLayer, columns_m: Tensor, values_om: Tensor) -> None:
    """Tell a layer of columns that have trained, and do not now: the weight holds them from here on."""
    original = _read(layer, columns_m)
    delta = (values_om.to(layer.paca_delta.dtype) - original.to(layer.paca_delta.dtype)) / layer.paca_scale
    layer.paca_past = Held(columns_m, delta, original)
    _write(layer, layer.paca_past, values_om)


def reset(layer: PacaLayer) -> None:
    """Give the weight back the base's columns wherever any have trained."""
    everything = held(layer)
    _write(layer, everything, everything.original)


def _read(layer: PacaLayer, columns: Tensor) -> Tensor:
    """Columns as the weight holds them: (o, c), on the CPU."""
    if not len(columns):  # which cannot be told apart from others once it has no values
        return layer.paca_original.detach().to("cpu", copy=True)[:, :0]
    return read_columns(layer.weight, columns.to(layer.weight.device), layer.input_axis).cpu()


def _write(layer: PacaLayer, place: Held, values_ou: Tensor) -> None:
    if not len(place.columns):
        return
    weight = layer.weight.data
    rounded = values_ou.to(layer.paca_storage).to(weight.dtype).to(weight.device)
    write_columns(weight, place.columns.to(weight.device), rounded, layer.input_axis)


# --- of a model


def resample_model(
    model: nn.Module, optimizer: Any, *, groups: Mapping[str, str], every: int, seed: int, step: int
) -> bool:
    """Draw other columns where `step` optimizer steps are a multiple of `every`; returns whether they were.

    groups: each layer's, by module. The draw is a function of seed, group and step: of a group all layers draw alike.
    The optimizer forgets what it knew of the columns, also of one that is drawn twice in a row.
    """
    if not every or step == 0 or step % every:
        return False
    opened = layers(model)
    for layer in opened.values():
        layer.refresh()  # the weight holds what the columns that go have become
    known = {module: held(layer) for module, layer in opened.items()}  # first: a group's layers share their numbers
    for module, layer in opened.items():
        rank, in_features = layer.paca_delta.shape[1], layer.weight.shape[layer.input_axis]
        chosen = drawn_columns(
            in_features, rank, seed=seed, group=groups[module], draw=step // every, weights_i=layer.paca_scores
        )
        swap(layer, known[module], chosen)
        optimizer.state.pop(layer.paca_delta, None)
    return True


def state_of_layers(model: nn.Module) -> dict[str, Tensor]:
    """What a training checkpoint keeps beside the differences that train, by name."""
    state: dict[str, Tensor] = {}
    for module, layer in layers(model).items():
        past = layer.paca_past or active(layer).pick(torch.empty(0, dtype=torch.int64))
        parts = (active(layer).columns, past.columns, past.delta)
        state |= {f"{module}.{part}": tensor.contiguous() for part, tensor in zip(PARTS, parts, strict=True)}
    return state


def restore_layers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `state_of_layers`; the differences that train are then to be set."""
    for layer in layers(model).values():
        reset(layer)  # first: a group's layers share their column numbers
    for module, layer in layers(model).items():
        restore(layer, *(state[f"{module}.{part}"] for part in PARTS))
