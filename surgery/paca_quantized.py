"""PaCA over a quantized weight (QPaCA), which is dense for one product at a time, with the trained columns in it.

What trains is the same difference, in float32. In a product the weight is dequantized, the difference is added to its
columns, and they are rounded to the file's dtype; forward and the input's gradient each do so, and nothing of it is
kept for backward. A fresh layer computes what the quantized layer computed, bit for bit.

What an adapter holds is the base's own columns with the difference added, where the base's are known: the same
difference then stands on the base in 16 bits (a merge, a LoRA) and on the quantized one. So a zero-step merge into
either gives it back unchanged.

Source: PaCA, arXiv 2503.01905, section 4 (QPaCA); QLoRA, arXiv 2305.14314, for a frozen base in 4 bits.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery.paca_layers import PacaLayer, SharedGather, combine, read_columns, write_columns
from surgery.quantized import dequantize, frozen_product, require_eager


def seen_columns(held_or: Tensor, original_or: Tensor, values_or: Tensor) -> Tensor:
    """The trained columns as training sees them: what the quantized weight holds there, moved as the base's were.

    Shapes: all (out, r). held: the dequantized columns; original: the base's own; values: those with what training
    added. Returns held's dtype; where nothing was added, held's very bits.
    """
    added = values_or.float() - original_or.float()
    return torch.where(added == 0, held_or, (held_or.float() + added).to(held_or.dtype))


class Columns(Protocol):
    """A layer's trained columns: a `ColumnPatch`."""

    @property
    def columns(self) -> Tensor: ...
    @property
    def original(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...


def trained_weight(weight: Tensor, patch: Columns | None) -> Tensor:
    """A dequantized weight (o, i), on the CPU, with a layer's trained columns written into it: the same tensor."""
    if patch is not None:
        seen = seen_columns(weight.index_select(1, patch.columns), patch.original, patch.values)
        write_columns(weight, patch.columns, seen, 1)
    return weight


class QuantizedPacaLinear(PacaLayer, nn.Linear):
    """A quantized linear layer with trained columns. Nothing is ever written into the packed weight: none is stale."""

    input_axis = 1
    paca_plain: type[nn.Module]  # what the layer was
    storage: torch.dtype
    shape: tuple[int, int]

    def dense(self, x: Tensor | None = None) -> Tensor:
        """The weight (o, i) with the trained columns, a tensor of its own: in the file's dtype, or for use with `x`."""
        with torch.no_grad():
            weight = dequantize(self, self.paca_storage)
            columns = self.paca_columns
            values = combine(self.paca_original, self.paca_delta, self.paca_scale)
            seen = seen_columns(weight.index_select(1, columns), self.paca_original, values)
            write_columns(weight, columns, seen, 1)
        return weight if x is None or torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        require_eager()
        if torch.is_grad_enabled() and x.requires_grad and not self.paca_delta.requires_grad:
            return frozen_product(x, self)  # autograd itself would keep the dense weight
        return super().forward(x)

    def kept_weight(self) -> None:
        """Nothing: backward dequantizes again."""

    def weight_again(self) -> Tensor:
        return self.dense()

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.paca_original, self.paca_delta

    def _signs(self) -> tuple[int, ...]:
        return ()  # by which a weight would be told to be stale

    @property
    def is_due(self) -> bool:
        return False

    def refresh_if_stale(self) -> None:
        """Nothing to do: columns are put in for each product."""

    def refresh(self) -> None:
        """Nothing to do either."""


def open_quantized(
    module: nn.Module, columns_r: Tensor, *, original: Tensor | None, storage: torch.dtype, shared: SharedGather,
    scale: float,
) -> PacaLayer:  # fmt: skip
    """Make a quantized linear layer one whose columns train, in place.

    original: the base's own columns (o, r) where its file holds them; else the dequantized ones are.
    """
    weight = cast("nn.Parameter", module.weight)
    columns_r = columns_r.to(weight.device)
    if original is None:
        original = read_columns(dequantize(module, storage), columns_r, 1)
    plain = type(module)
    module.__class__ = QuantizedPacaLinear
    layer = cast("QuantizedPacaLinear", module)
    layer.paca_plain = plain
    layer.open_columns(original, columns_r, storage=storage, shared=shared, scale=scale)
    return layer


def close_quantized(layer: QuantizedPacaLinear, *, merge: bool, dtype: torch.dtype | None = None) -> None:
    """The quantized layer again, in place; with `merge` an `nn.Linear` with what training saw, not quantized anew.

    dtype: of the dense weight, where it is not to be the file's.
    """
    module: Any = layer
    dense = layer.dense().to(dtype) if merge else None
    plain = layer.paca_plain
    layer.close_columns()
    del layer.paca_plain
    module.__class__ = plain
    if dense is not None:
        module.__class__ = nn.Linear
        module.weight = nn.Parameter(dense, requires_grad=False)
