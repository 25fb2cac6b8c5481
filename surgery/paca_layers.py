"""Linear layers some of whose input columns train, in place: what PaCA puts into a model.

For a weight W (out, in) and r columns P of it, with the trained columns already inside W: y = x W^T + b, dx = dy W,
dP = dy^T x[.., columns]. Backward keeps r channels of the input.

The master copy of the columns is a zero-initialised difference in float32, so that weight decay pulls towards the
pretrained values. The columns in the weight are refreshed from it before the first forward after it may have changed.

Shape suffixes: o out_features, i in_features, r trained columns, n all leading axes flattened.

Source: PaCA, arXiv 2503.01905 (ICLR 2025), section 3.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D


class SharedGather:
    """The gathered input of a group of layers fed by one tensor: gathered once, kept by backward once.

    Recognises the tensor itself, not its address; a layer called alone or with another input gathers for itself.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self._forget()

    def _forget(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._kept: Tensor | None = None
        self._version = self._left = 0

    def __call__(self, x: Tensor, columns_r: Tensor) -> Tensor:
        """The channels of x (.., i) whose weights train: (.., r), bit for bit."""
        if self.members == 1:
            return gather(x, columns_r)
        version = x._version  # noqa: SLF001  torch offers no other sign of an in-place change
        hit = self._source is not None and self._source() is x and self._version == version
        kept = cast("Tensor", self._kept) if hit else gather(x, columns_r)
        if not hit:
            self._source, self._version, self._kept, self._left = weakref.ref(x), version, kept, self.members
        self._left -= 1
        if self._left == 0:
            self._forget()
        return kept

    def __getstate__(self) -> dict[str, int]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.members = state["members"]
        self._forget()


def gather(x: Tensor, columns_r: Tensor) -> Tensor:
    """x (.., i) -> (.., r): the named channels, outside autograd."""
    return x.detach().index_select(-1, columns_r)


_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def _without_autocast(backward: _Backward) -> _Backward:
    """A backward that casts what it casts by name, on any kind of device: torch.amp.custom_bwd serves only one."""

    def run(ctx: Any, dy: Tensor) -> Any:
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return cast("_Backward", run)


class _PacaFunction(torch.autograd.Function):
    """y = base(x); backward keeps `kept` (.., r) of the input and nothing else.

    The weight rides on ctx, not through save_for_backward: its version check would trip over a refresh between a
    forward and its backward, which changes no value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta_or: Tensor, kept: Tensor, layer: PacaLayer) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.layer, ctx.dtypes = layer, (x.dtype, delta_or.dtype)
        ctx.weight = None if layer.paca_is_gathered else layer.weight.detach()
        return layer.frozen_forward(x)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        layer: PacaLayer = ctx.layer
        x_dtype, delta_dtype = ctx.dtypes
        dx = ddelta_or = None
        if ctx.needs_input_grad[0]:
            if ctx.weight is None:
                layer.refresh()  # what forward used is gone, and was put together again
            weight = layer.weight.detach() if ctx.weight is None else ctx.weight
            dx = layer.input_gradient(dy, weight.to(dy.dtype)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            (kept,) = ctx.saved_tensors
            kept_nr = kept.reshape(-1, kept.shape[-1]).to(dy.dtype)
            # (r, n) x (n, o): on the CPU a fourth faster than (o, n) x (n, r), which reads dy across its rows
            ddelta_or = kept_nr.t().mm(dy.reshape(-1, dy.shape[-1])).t().to(delta_dtype)
            if layer.paca_scale != 1.0:
                ddelta_or = ddelta_or.mul_(layer.paca_scale)
            layer.paca_pending = True  # whatever uses this gradient, the next forward refreshes
        return dx, ddelta_or, None, None


_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps  # noqa: PLW0603  one process-wide clock, so that layers need no link to their optimizer
    _optimizer_steps += 1


_step_hook: Any = None


def watch_optimizers() -> None:
    """Count the steps of every optimizer from now on: after one, columns are refreshed."""
    global _step_hook  # noqa: PLW0603  registered once, on the first attach, so that importing has no effect
    if _step_hook is None:
        _step_hook = register_optimizer_step_post_hook(_count_optimizer_step)


class PacaLayer(nn.Module):
    """What `PacaLinear` and `PacaConv1D` share: a linear layer some of whose input columns train.

    The layer stays the same object under the same names (`weight`, `bias`), so hooks and references survive. Added are
    `paca_delta` (o, r), the only parameter that trains, `paca_original` (o, r), the base's columns, and `paca_columns`.

    Freshness: the columns in `weight` are rewritten before a forward when since the last time a backward went through
    this layer, any optimizer stepped, the mode or the device changed, state was loaded or the parameter was written
    through autograd's eyes. A bare `.data` write in eval mode shows none of these signs: call `refresh` after one.
    A backward belongs before the step that follows its forward: one that comes after the next refresh sees the new
    columns in its input gradient, where plain torch would raise.

    Sharded, each rank holds the same outputs' rows of weight, columns and difference, and refreshes those; it happens
    before the model's forward puts the whole weights together, as `surgery.sharding` sees to. Gathered by DeepSpeed,
    the whole weight comes without the trained columns each time it is used, and each rank writes them.
    """

    weight: Any
    bias: Any
    paca_delta: nn.Parameter
    paca_original: nn.Parameter
    paca_columns: Tensor
    paca_gather: SharedGather
    paca_scale: float
    paca_storage: torch.dtype
    paca_pending: bool
    paca_seen: tuple[int, ...]
    paca_is_sharded = False  # True where `surgery.sharding` has given each rank some of the rows
    paca_is_gathered = False  # True where DeepSpeed puts the parameters together anew for each use
    input_axis: int
    frozen_forward: Callable[[Tensor], Tensor]  # the base layer's own forward, from the class this is mixed into

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy (.., o) -> dx (.., i)."""
        return dy.matmul(weight if self.input_axis == 1 else weight.t())

    def forward(self, x: Tensor) -> Tensor:
        if self.paca_is_gathered:
            self.refresh()
        elif not self.paca_is_sharded:
            self.refresh_if_stale()
        if not (torch.is_grad_enabled() and self.paca_delta.requires_grad):
            return self.frozen_forward(x)
        kept = self.paca_gather(x, self.paca_columns)
        result: Tensor = _PacaFunction.apply(x, self.paca_delta, kept, self)  # type: ignore[no-untyped-call]
        return result

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, the base's columns and the difference: of a sharded layer, this rank's rows of them."""
        parts: tuple[Any, ...] = (self.weight, self.paca_original, self.paca_delta)
        weight, original, delta = (part.to_local() for part in parts) if self.paca_is_sharded else parts
        return weight, original, delta

    @property
    def is_due(self) -> bool:
        """Whether a backward or a step came since the last refresh: what can be told without the parameters."""
        return self.paca_pending or self.paca_seen[0] != _optimizer_steps

    def _signs(self) -> tuple[int, ...]:
        weight, _, delta = self.rows()
        version = delta._version  # noqa: SLF001  one sign among several: some writers do not bump it
        return (_optimizer_steps, version, delta.data_ptr(), weight.data_ptr())

    def refresh_if_stale(self) -> None:
        """Rewrite the columns in the weight if the master copy may have changed."""
        if self.paca_pending or self.paca_seen != self._signs():
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the trained columns into the weight."""
        weight, original, delta = self.rows()
        values = combine(original, delta, self.paca_scale).to(self.paca_storage).to(weight.dtype)
        write_columns(weight.data, self.paca_columns.to(weight.device), values, self.input_axis)
        self.paca_pending, self.paca_seen = False, self._signs()

    @torch.no_grad()
    def trained_columns(self) -> Tensor:
        """The columns as training has them: (o, r) in the master copy's dtype; of a sharded layer, this rank's rows."""
        _, original, delta = self.rows()
        return combine(original, delta, self.paca_scale)

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Set the columns to `values` (o, r).

        values - original is exact where they are within a factor of two of each other (Sterbenz), so the sum gives
        `values` back bit for bit; elsewhere it can differ by one rounding of the master copy.
        """
        difference = values.to(self.paca_delta) - self.paca_original.to(self.paca_delta.dtype)
        self.paca_delta.copy_(difference / self.paca_scale)
        self.paca_pending = True

    def train(self, mode: bool = True) -> PacaLayer:  # noqa: FBT001, FBT002  torch's signature
        self.paca_pending = self.paca_pending or mode != self.training
        super().train(mode)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.paca_is_gathered:
            self.refresh_if_stale()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.paca_pending = True


class PacaLinear(PacaLayer, nn.Linear):
    """`nn.Linear` (weight (o, i)) with trained columns."""

    input_axis = 1

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class PacaConv1D(PacaLayer, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's `Conv1D` (weight (i, o)) with trained columns, which here are rows."""

    input_axis = 0

    def frozen_forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", Conv1D.forward(self, x))


def combine(original_or: Tensor, delta_or: Tensor, scale: float) -> Tensor:
    """original + scale * delta, in the delta's dtype.

    Where the difference is zero the base's value stands untouched: -0.0 + 0.0 would be +0.0.
    """
    original_or = original_or.to(delta_or.dtype)
    return torch.where(delta_or == 0, original_or, original_or.add(delta_or, alpha=scale))


SWAPS: dict[type[nn.Module], type[PacaLayer]] = {nn.Linear: PacaLinear, Conv1D: PacaConv1D}


def read_columns(weight: Tensor, columns_r: Tensor, input_axis: int) -> Tensor:
    """The columns of a stored weight as (o, r), copied."""
    columns = weight.detach().index_select(input_axis, columns_r)
    return columns if input_axis == 1 else columns.t().contiguous()


def write_columns(weight: Tensor, columns_r: Tensor, values_or: Tensor, input_axis: int) -> None:
    """Replace the columns of a stored weight by (o, r) values of its dtype.

    On the CPU by assignment, which goes row by row in several threads; `index_copy_` goes column by column and takes
    half as long again. Elsewhere by `index_copy_`, for which every device has a kernel.
    """
    if weight.device.type == "cpu" and input_axis == 1:
        weight[:, columns_r] = values_or
    else:
        weight.index_copy_(input_axis, columns_r, values_or if input_axis == 1 else values_or.t())


def open_layer(
    module: nn.Module, columns_r: Tensor, *, input_axis: int, storage: torch.dtype, shared: SharedGather, scale: float
) -> PacaLayer:
    """Make a linear layer one whose columns train, in place. `storage`: the dtype in the file, to which they round."""
    weight = cast("nn.Parameter", module.weight)
    columns_r = columns_r.to(weight.device)
    original = read_columns(weight, columns_r, input_axis)
    master = torch.float64 if weight.dtype == torch.float64 else torch.float32
    module.__class__ = SWAPS[type(module)]
    layer = cast("PacaLayer", module)
    layer.paca_delta = nn.Parameter(torch.zeros(original.shape, dtype=master, device=weight.device))
    layer.paca_original = nn.Parameter(original, requires_grad=False)
    layer.register_buffer("paca_columns", columns_r, persistent=False)
    layer.paca_gather, layer.paca_scale, layer.paca_storage = shared, scale, storage
    layer.paca_pending, layer.paca_seen = False, layer._signs()  # noqa: SLF001  this module's own class
    return layer


def close_layer(layer: PacaLayer, *, merge: bool) -> None:
    """The plain layer again, in place: with the trained columns (`merge`) or with the base's."""
    module: nn.Module = layer
    if merge:
        layer.refresh()
    else:
        write_columns(layer.weight.data, layer.paca_columns, layer.paca_original.data, layer.input_axis)
    for name in ("paca_delta", "paca_original", "paca_columns"):
        delattr(layer, name)
    for name in ("paca_gather", "paca_scale", "paca_storage", "paca_pending", "paca_seen"):
        delattr(layer, name)
    module.__class__ = next(plain for plain, opened in SWAPS.items() if opened is type(layer))


def layers(model: nn.Module) -> dict[str, PacaLayer]:
    """The opened layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PacaLayer)}
