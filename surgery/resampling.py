"""Other columns train from time to time: how an opened layer changes its columns, and what it remembers of the others.

Columns that trained and do not train now stay in the weight as they were, rounded to the base's dtype as ever; their
difference from the base's columns is kept in the CPU's memory in full, for when they are drawn again and for the file.
What the device holds is that of one set: difference, gradient and the optimizer's state keep their shapes.

The whole of it is exact: a change of columns changes no output, and a column that returns goes on from where it was.

A *lane* is what changes its columns together: a layer; of a mixture's experts all that share their columns, or each
that has its own, since by and by one of them has held more columns than another.

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


@dataclass(frozen=True)
class Lane:
    """A layer whose columns change; of experts with columns of their own `expert` says whose these are."""

    layer: PacaLayer
    expert: int | None = None

    def part(self, tensor: Tensor) -> Tensor:
        """What of one of the layer's tensors is the lane's."""
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def place(self) -> tuple[Tensor, int]:
        """The weight, and its axis along which the inputs run."""
        return self.layer.lane_weight(self.expert)

    @property
    def columns(self) -> Tensor:
        """(r,), those that train now."""
        return self.part(self.layer.paca_columns)

    @property
    def past(self) -> Held | None:
        found: Held | None = (self.layer.paca_past or {}).get(self.expert)
        return found

    def set_past(self, past: Held) -> None:
        """Columns that have trained, and do not now."""
        self.layer.paca_past = {**(self.layer.paca_past or {}), self.expert: past}


def lanes_of(layer: PacaLayer) -> list[Lane]:
    """What in a layer changes its columns together."""
    if layer.paca_columns.dim() == 1:
        return [Lane(layer)]
    return [Lane(layer, expert) for expert in range(len(layer.paca_columns))]


def lanes(model: nn.Module) -> dict[str, Lane]:
    """All lanes of a model, by the layer's name; of experts with columns of their own their number follows.

    An embedding has none: its rows are named, and stay.
    """
    found: dict[str, Lane] = {}
    for name, layer in layers(model).items():
        if layer.paca_is_named:
            continue
        found |= {name if lane.expert is None else f"{name}.{lane.expert}": lane for lane in lanes_of(layer)}
    return found


def active(lane: Lane) -> Held:
    """The columns that train now."""
    delta, original = (lane.part(t.detach()) for t in (lane.layer.paca_delta, lane.layer.paca_original))
    matrices = (tensor.reshape(-1, tensor.shape[-1]).to("cpu", copy=True) for tensor in (delta, original))
    return Held(lane.columns.to("cpu", copy=True), *matrices)


def held(lane: Lane) -> Held:
    """All columns that train or have trained, each once."""
    return active(lane) if lane.past is None else lane.past.joined(active(lane))


@torch.no_grad()
def swap(lane: Lane, known: Held, columns_r: Tensor) -> None:
    """Train these columns from now on, as many as before; those that trained before go on where they were.

    known: what the lane holds, of which the weight is fresh; columns_r: (r,) int64, strictly increasing.
    """
    new = columns_r[~torch.isin(columns_r, known.columns)]
    original = _read(lane, new)
    known = known.joined(Held(new, torch.zeros(original.shape, dtype=known.delta.dtype), original))
    _set_active(lane, known.pick(columns_r))
    lane.set_past(known.without(columns_r))


def _set_active(lane: Lane, chosen: Held) -> None:
    """In place: optimizers, shards of a group and compiled graphs hold these tensors."""
    layer = lane.layer
    lane.columns.copy_(chosen.columns)
    for tensor, values in ((layer.paca_original, chosen.original), (layer.paca_delta, chosen.delta)):
        own = lane.part(tensor.data)
        own.copy_(values.reshape(own.shape))
    layer.paca_delta.grad = None
    layer.paca_gather.forget()
    layer.paca_pending = True


@torch.no_grad()
def restore(lane: Lane, columns_r: Tensor, past_columns_m: Tensor, past_delta_om: Tensor) -> None:
    """From the base's weight to where some columns train and others have. The former's difference is set apart."""
    original, first = _read(lane, past_columns_m), _read(lane, columns_r)
    _set_active(lane, Held(columns_r, torch.zeros_like(first, dtype=lane.layer.paca_delta.dtype), first))
    past = Held(past_columns_m, past_delta_om, original)
    lane.set_past(past)
    _write(lane, past, combine(past.original, past.delta, lane.layer.paca_scale))


@torch.no_grad()
def open_past(lane: Lane, columns_m: Tensor, values_om: Tensor) -> None:
    """Tell a lane of columns that have trained, and do not now: the weight holds them from here on."""
    original, dtype = _read(lane, columns_m), lane.layer.paca_delta.dtype
    past = Held(columns_m, (values_om.to(dtype) - original.to(dtype)) / lane.layer.paca_scale, original)
    lane.set_past(past)
    _write(lane, past, values_om)


def reset(lane: Lane) -> None:
    """Give the weight back the base's columns wherever any have trained."""
    everything = held(lane)
    _write(lane, everything, everything.original)


def _read(lane: Lane, columns: Tensor) -> Tensor:
    """Columns as the weight holds them: (o, c), on the CPU."""
    if not len(columns):  # which cannot be told apart from others once it has no values
        return active(lane).original[:, :0]
    weight, axis = lane.place
    return read_columns(weight, columns.to(weight.device), axis).cpu()


def _write(lane: Lane, place: Held, values_ou: Tensor) -> None:
    if not len(place.columns):
        return
    weight, axis = lane.place
    rounded = values_ou.to(lane.layer.paca_storage).to(weight.dtype).to(weight.device)
    write_columns(weight.data, place.columns.to(weight.device), rounded, axis)


# --- of a model


def resample_model(
    model: nn.Module, optimizer: Any, *, groups: Mapping[str, str], every: int, seed: int, step: int
) -> bool:
    """Draw other columns where `step` optimizer steps are a multiple of `every`; returns whether they were.

    groups: each lane's, by name. The draw is a function of seed, group and step: of a group all lanes draw alike.
    The optimizer forgets what it knew of the columns, also of one that is drawn twice in a row.
    """
    if not every or step == 0 or step % every:
        return False
    opened, drawn = layers(model), lanes(model)
    for layer in opened.values():
        layer.refresh()  # the weight holds what the columns that go have become
    known = {name: held(lane) for name, lane in drawn.items()}  # first: a group's layers share their numbers
    for name, lane in drawn.items():
        (weight, axis), rank = lane.place, len(lane.columns)
        scores = None if lane.layer.paca_scores is None else lane.part(lane.layer.paca_scores)
        chosen = drawn_columns(
            weight.shape[axis], rank, seed=seed, group=groups[name], draw=step // every, weights_i=scores
        )
        swap(lane, known[name], chosen)
    for lane in drawn.values():
        optimizer.state.pop(lane.layer.paca_delta, None)
    return True


def state_of_layers(model: nn.Module) -> dict[str, Tensor]:
    """What a training checkpoint keeps beside the differences that train, by name."""
    state: dict[str, Tensor] = {}
    for name, lane in lanes(model).items():
        now = active(lane)
        past = lane.past or now.pick(torch.empty(0, dtype=torch.int64))
        parts = (now.columns, past.columns, past.delta)
        state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in zip(PARTS, parts, strict=True)}
    return state


def restore_layers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `state_of_layers`; the differences that train are then to be set."""
    for lane in lanes(model).values():
        reset(lane)  # first: a group's layers share their column numbers
    for name, lane in lanes(model).items():
        restore(lane, *(state[f"{name}.{part}"] for part in PARTS))
