"""Adapters that have moved, made without training: noise that is a function of the seed and the name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from surgery.adapter import Adapter, update_adapter
from surgery.columns import generator_seed
from surgery.delta import ColumnDelta, SideDelta, require_columns, require_side
from surgery.manifest import Manifest
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.survey import TaskSpec


def make_adapter(
    model: Path, out: Path, spec: PacaSpec | None = None, *, task: TaskSpec | None = None, seed: int = 0
) -> Adapter:
    """Apply a surgery to a tiny checkpoint and move every trained value, by some tenths of the weights' own size."""
    adapter = apply(model, out, spec or PacaSpec(rank=4), task=task)
    delta = require_columns(adapter.delta, "make_adapter")
    patches = {m: replace(p, values=_moved(p.values, m, seed)) for m, p in delta.patches.items()}
    whole = {n: replace(w, values=_moved(w.values, n, seed)) for n, w in delta.whole.items()}
    manifest: Manifest = adapter.record.manifest
    return update_adapter(adapter, ColumnDelta(delta.plan, patches, whole), manifest)


def make_read_adapter(
    model: Path, out: Path, spec: ReadSpec | None = None, *, task: TaskSpec | None = None, seed: int = 0
) -> Adapter:
    """The same for a side network: each of its tensors moves, the projections back away from zero."""
    adapter = apply(model, out, spec or ReadSpec(hidden=7), task=task)
    delta = require_side(adapter.delta, "make_read_adapter")
    state = {name: _moved(values, name, seed) for name, values in delta.state.items()}
    whole = {n: replace(w, values=_moved(w.values, n, seed)) for n, w in delta.whole.items()}
    return update_adapter(adapter, SideDelta(delta.plan, state, whole), adapter.record.manifest)


def _moved(values: Tensor, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(generator_seed(seed, name))
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return values + 0.3 * max(float(values.abs().mean()), 0.1) * noise
