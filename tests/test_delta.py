"""A target's columns in its weight's bytes: read and replaced a chunk at a time, along any axis of any shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from surgery import checkpoint as checkpoints
from surgery.checkpoint import Checkpoint
from surgery.delta import patched_chunks, read_target
from surgery.errors import DamagedError
from surgery.paca_layers import read_columns, write_columns
from surgery.plan import Target

COLUMNS = torch.tensor([0, 3, 4])
SHAPES = ((7, 6), (6, 7, 2), (5, 6, 3, 3), (4, 2, 6))


def make_target(shape: tuple[int, ...], axis: int) -> Target:
    """A target whose columns run along an axis of a weight of this shape."""
    others = int(np.prod(shape)) // shape[axis]
    return Target("layer", "layer.weight", others, shape[axis], axis, "BF16", len(COLUMNS), "layer", sizes=shape)


@pytest.mark.parametrize("chunk_bytes", (1, 40, 1 << 20))
@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in range(len(s)) if s[a] > 4])
def test_columns_of_any_axis_are_read_and_replaced(
    shape: tuple[int, ...], axis: int, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As indexing the whole tensor does it, whatever rows come at a time; and in memory alike."""
    monkeypatch.setattr(checkpoints, "CHUNK_BYTES", chunk_bytes)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    safetensors.torch.save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    checkpoint, target = Checkpoint.open(tmp_path), make_target(shape, axis)
    _, original = read_target(checkpoint, target, COLUMNS)
    assert torch.equal(original, weight.movedim(axis, -1).reshape(-1, shape[axis])[:, COLUMNS])
    assert torch.equal(original, read_columns(weight, COLUMNS, axis))

    new = torch.randn(original.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    data = b"".join(bytes(chunk) for chunk in patched_chunks(checkpoint, "layer.weight", target, COLUMNS, new))
    written = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
    expected = weight.clone()
    expected.movedim(axis, -1)[..., COLUMNS] = new.reshape(*expected.movedim(axis, -1).shape[:-1], -1)
    assert torch.equal(written, expected)
    write_columns(weight, COLUMNS, new, axis)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("sizes", ((7, 5), (7, 6, 2), (3, 6)))
def test_sizes_that_are_not_the_target_s_are_refused(sizes: tuple[int, ...]) -> None:
    """The shape holds as many values as the columns say, and the inputs along their axis."""
    with pytest.raises(DamagedError, match="sizes"):
        Target("layer", "layer.weight", 7, 6, 1, "F32", 2, "layer", sizes=sizes)
