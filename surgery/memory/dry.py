"""A model without storage: the real class, with tensors that have sizes and no values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.compat import keep_no_cache
from surgery.repeated import is_alike


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward, by the kind of module that saved them first."""

    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class DryModel:
    """A model without storage.

    `heads`: modules of the output; `blocks`: its outermost lists of layers; `is_side`: a side network reads it;
    `known`: what has been found, by step and lengths of lists.
    """

    model: Any
    mode: FakeTensorMode
    task: str
    heads: tuple[str, ...]
    blocks: tuple[str, ...]
    is_side: bool = False
    known: dict[Any, Saved] = field(default_factory=dict, compare=False)

    def layer_of(self, name: str) -> str:
        """The path of the layer that a module or tensor is in, or is; the empty string outside."""
        block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
        return f"{block}.{name.removeprefix(f'{block}.').split('.')[0]}" if block else ""

    @cached_property
    def alike(self) -> dict[str, int]:
        """The lists whose layers are alike but for the first, and their lengths: a few stand for all of them."""
        lengths = {block: len(self.model.get_submodule(block)) for block in self.blocks}
        return {block: length for block, length in lengths.items() if is_alike(self.model, block)}


def dry_model(model: Any, task: str, heads: tuple[str, ...], *, dtype: torch.dtype) -> DryModel:
    """Turn a model on the meta device, in place, into one that believes to lie on the CPU with weights of `dtype`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):  # noqa: SLF001  the only way to replace both in place
                for name, tensor in tensors.items():
                    if tensor is not None:
                        known.setdefault(id(tensor), _without_storage(tensor, dtype))
                        tensors[name] = known[id(tensor)]
    keep_no_cache(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return DryModel(model, mode, task, heads, tuple(blocks))


def _without_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_like(tensor, device="cpu")
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(torch.empty(tensor.shape, dtype=kind, device="cpu"), requires_grad=tensor.requires_grad)


@contextmanager
def without_values(mode: FakeTensorMode) -> Iterator[None]:
    """Everything inside computes sizes only. PaCA's layers compare addresses, which are all 0 here: that may be.

    What PyTorch logs about an operator that fails here, our own error says.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), mode:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.setLevel(level)
