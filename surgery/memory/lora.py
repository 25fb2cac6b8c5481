"""LoRA as PEFT computes it, for a model without storage: what a run beside ours would hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import is_conv1d
from surgery.quantized import QuantizedLinear
from surgery.repeated import set_submodule


class LoraLayer(nn.Module):
    """A frozen linear layer and a LoRA adapter beside it, as PEFT computes it, without dropout.

    Source: LoRA, arXiv 2106.09685; the order of casts is that of PEFT 0.21's `lora.Linear.forward`.
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        axis = 0 if is_conv1d(base) else 1
        is_packed = isinstance(base, QuantizedLinear)
        shape, kind = (base.shape, base.storage) if is_packed else (base.weight.shape, base.weight.dtype)
        dtype = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
        self.base = base
        self.a = nn.Linear(shape[axis], rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, shape[1 - axis], bias=False, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The base's: some classes ask a layer for its weight's dtype."""
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        plain = self.base(x)
        result = plain + self.b(self.a(x.to(self.a.weight.dtype))) * 1.0
        back: Tensor = result.to(plain.dtype)
        return back


def attach_lora(model: nn.Module, ranks: Mapping[str, int], whole: Sequence[str]) -> None:
    """LoRA on the named layers of a frozen model; `whole`: parameters that train as they are, beside a copy."""
    model.requires_grad_(requires_grad=False)
    for name, rank in ranks.items():
        set_submodule(model, name, LoraLayer(model.get_submodule(name), rank))
    for name in whole:
        owner, _, last = name.rpartition(".")
        parameter = model.get_parameter(name).requires_grad_()
        model.get_submodule(owner).register_buffer(f"original_{last}", torch.empty_like(parameter, requires_grad=False))
