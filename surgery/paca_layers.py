"""Linear layers some of whose input columns train, in place: what PaCA puts into a model.

For a weight W (out, in) and r columns P of it, with the trained columns already inside W: y = x W^T + b, dx = dy W,
dP = dy^T x[.., columns]. Backward keeps r channels of the input.

The master copy of the columns is a zero-initialised difference in float32, so that weight decay pulls towards the
pretrained values. The columns in the weight are refreshed from it before the first forward after it may have changed.

Under torch.compile a layer is one call of a custom operator, which looks whether its columns are fresh when the
compiled graph runs: nothing of that is traced, so no step recompiles and no hook has to run outside the graph. Without
compiling the autograd function below does the same at less cost a call.

Shape suffixes: o out_features, i in_features, r trained columns, n all leading axes flattened.

Source: PaCA, arXiv 2503.01905 (ICLR 2025), section 3.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

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
        self._columns: Tensor | None = None
        self.forget()

    def one_tensor(self, columns_r: Tensor) -> Tensor:
        """The group's columns as one tensor object, by which a compiler sees that all members gather the same.

        columns_r: a member's own, equal to the others'; it becomes the group's where that lies on another device.
        """
        ours = self._columns
        if ours is None or ours.device != columns_r.device or ours.shape != columns_r.shape:
            self._columns = ours = columns_r
        return ours

    def forget(self) -> None:
        """Let go of what was gathered: the next member gathers anew."""
        self._source: weakref.ref[Tensor] | None = None
        self._kept: Tensor | None = None
        self._version = self._left = 0

    def __call__(self, x: Tensor, columns_r: Tensor, axis: int = -1) -> Tensor:
        """The channels of x (.., i) whose weights train: (.., r), bit for bit. `axis`: of x, that of the channels."""
        if self.members == 1:
            return gather(x, columns_r, axis)
        version = x._version  # noqa: SLF001  torch offers no other sign of an in-place change
        hit = self._source is not None and self._source() is x and self._version == version
        kept = cast("Tensor", self._kept) if hit else gather(x, columns_r, axis)
        if not hit:
            self._source, self._version, self._kept, self._left = weakref.ref(x), version, kept, self.members
        self._left -= 1
        if self._left == 0:
            self.forget()
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members, self._columns = state["members"], state["_columns"]
        self.forget()


def gather(x: Tensor, columns_r: Tensor, axis: int = -1) -> Tensor:
    """x (.., i) -> (.., r): the named channels, outside autograd. `axis`: of x, that of the channels.

    Images whose channels lie last in memory (torch.channels_last) are gathered as such.
    """
    x = x.detach()
    if x.dim() == 4 and axis != -1 and not x.is_contiguous():
        return x.movedim(axis, -1).index_select(-1, columns_r).movedim(-1, axis)
    return x.index_select(axis, columns_r)


_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def without_autocast(backward: _Backward) -> _Backward:
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
        ctx.layer, ctx.dtypes, ctx.shape = layer, (x.dtype, delta_or.dtype), x.shape
        ctx.weight = layer.kept_weight()
        return layer.frozen_forward(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        layer: PacaLayer = ctx.layer
        x_dtype, delta_dtype = ctx.dtypes
        dx = ddelta_or = None
        dy = layer.laid_out(dy)
        if ctx.needs_input_grad[0]:
            weight = layer.weight_again() if ctx.weight is None else ctx.weight
            dx = layer.input_gradient(dy, weight, ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[1]:
            (kept,) = ctx.saved_tensors
            ddelta_or = layer.column_gradient(kept, dy, delta_dtype)
        return dx, ddelta_or, None, None


def input_gradient(dy: Tensor, weight: Tensor, input_axis: int) -> Tensor:
    """dy (.., o) -> dx (.., i), in dy's dtype."""
    weight = weight.to(dy.dtype)
    return dy.matmul(weight if input_axis == 1 else weight.t())


# --- the same for torch.compile

_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, PacaLayer] = weakref.WeakValueDictionary()
# Both operators reach the layer itself through its number, a CPU tensor: an integer would be compiled in, and layers
# that are compiled one by one would each need a graph of their own. A CUDA graph would not run their Python again.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "checkpoint_surgery::paca_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor delta_or, Tensor weight, Tensor? bias, Tensor columns_r, Tensor number, int input_axis,"
    " ScalarType? autocast) -> Tensor",
    tags=_TAGS,
)
def _paca_linear(
    x: Tensor,
    delta_or: Tensor,  # noqa: ARG001  autograd's: what the columns' gradient is for
    weight: Tensor,  # noqa: ARG001  autograd's too: at run time it is the layer's own
    bias: Tensor | None,  # noqa: ARG001
    columns_r: Tensor,  # noqa: ARG001
    number: Tensor,
    input_axis: int,  # noqa: ARG001
    autocast: torch.dtype | None,
) -> Tensor:
    """The layer's forward, its columns refreshed before if they are stale. `autocast`: its dtype where it is on.

    The schema does not say that the weight's columns may be rewritten: nothing else in a graph reads them before this
    operator has run, and a compiler that knew would copy the weight.
    """
    layer = _numbered[int(number)]
    layer.freshen()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return layer.frozen_forward(x)


@_paca_linear.register_fake
def _(
    x: Tensor, delta_or: Tensor, _weight: Any, _bias: Any, _columns: Any, _number: Any, _axis: int, autocast: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], delta_or.shape[0]), dtype=autocast or x.dtype)


@torch.library.custom_op(
    "checkpoint_surgery::paca_column_gradient",
    mutates_args=(),
    schema="(Tensor kept, Tensor dy, Tensor number, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
def _column_gradient(kept: Tensor, dy: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    return _numbered[int(number)].column_gradient(kept, dy, dtype).contiguous()


@_column_gradient.register_fake
def _(kept: Tensor, dy: Tensor, _number: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[-1], kept.shape[-1]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  torch's signature
    x, delta_or, weight, _, columns_r, number, ctx.input_axis, _ = inputs
    ctx.dtypes = (x.dtype, delta_or.dtype)
    kept = gather(x, columns_r) if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(kept, weight, number)


def _go_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, number = ctx.saved_tensors
    x_dtype, delta_dtype = ctx.dtypes
    dx = ddelta_or = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(dy, weight, ctx.input_axis).to(x_dtype)
    if ctx.needs_input_grad[1]:
        ddelta_or = _column_gradient(kept, dy, number, delta_dtype)
    return dx, ddelta_or, None, None, None, None, None, None


_paca_linear.register_autograd(_go_back, setup_context=_keep)


# --- when columns are stale


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
    """What all opened layers share: a layer some of whose input columns train. As it stands, a linear one.

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
    paca_number: Tensor
    paca_scale: float
    paca_storage: torch.dtype
    paca_pending: bool
    paca_seen: tuple[int, ...]
    paca_past: Any = None  # {None: `surgery.resampling.Held`}: columns that trained before and do not now
    paca_scores: Tensor | None = None  # by which later columns are drawn (i,), where not evenly
    paca_is_sharded = False  # True where `surgery.sharding` has given each rank some of the rows
    paca_is_named = False  # True where a person names what trains, and nothing else is ever drawn in its place
    paca_is_gathered = False  # True where DeepSpeed puts the parameters together anew for each use
    input_axis: int
    plain: ClassVar[type[nn.Module]]  # the class that was opened, and that the layer is of again when it is closed
    frozen_forward: Callable[[Tensor], Tensor]  # the base layer's own forward, from the class this is mixed into

    @property
    def paca_weight(self) -> Any:
        """The parameter whose columns train."""
        return self.weight

    def lane_weight(self, _expert: int | None) -> tuple[Any, int]:
        """The weight in which columns are drawn anew, and its axis along which the inputs run."""
        return self.paca_weight, self.input_axis

    def write_past(self) -> None:
        """Give the weight back the base's columns where others than those of now have trained."""
        for expert, past in (self.paca_past or {}).items():
            weight, axis = self.lane_weight(expert)
            write_columns(weight.data, past.columns.to(weight.device), past.original.to(weight), axis)

    def laid_out(self, dy: Tensor) -> Tensor:
        """dy as both products of backward read it: rows one after another.

        Where the axes of images were permuted (ConvNeXt's), matmul would go image by image and take up to four times as
        long.
        """
        return dy.contiguous()

    def input_gradient(self, dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:  # noqa: ARG002  others need it
        """dy (.., o) -> dx (.., i) of this shape, in dy's dtype."""
        return input_gradient(dy, weight, self.input_axis)

    def column_gradient(self, kept: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """kept (.., r), dy (.., o) -> the columns' gradient (o, r), after which the columns count as stale."""
        kept_nr = kept.reshape(-1, kept.shape[-1]).to(dy.dtype)
        # (r, n) x (n, o): on the CPU a fourth faster than (o, n) x (n, r), which reads dy across its rows
        gradient_or = kept_nr.t().mm(dy.reshape(-1, dy.shape[-1])).t().to(dtype)
        if self.paca_scale != 1.0:
            gradient_or = gradient_or.mul_(self.paca_scale)
        self.paca_pending = True  # whatever uses this gradient, the next forward refreshes
        return gradient_or

    def kept_weight(self) -> Tensor | None:
        """What backward takes the input's gradient with; None where that is put together again (`weight_again`)."""
        return None if self.paca_is_gathered else self.weight.detach()

    def weight_again(self) -> Tensor:
        """The weight for backward where what forward used is gone: gathered parameters were put together again."""
        self.refresh()
        weight: Tensor = self.weight.detach()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._compiled_forward(x)
        self.freshen()
        if not (torch.is_grad_enabled() and self.paca_delta.requires_grad):
            return self.frozen_forward(x)
        kept = self.paca_gather(x, self.paca_columns)
        result: Tensor = _PacaFunction.apply(x, self.paca_delta, kept, self)  # type: ignore[no-untyped-call]
        return result

    def _compiled_forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        settings = (self.weight, self.bias, self.paca_columns, self.paca_number, self.input_axis, autocast)
        result: Tensor = _paca_linear(x, self.paca_delta, *settings)
        return result

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, the base's columns and the difference: of a sharded layer, this rank's rows of them."""
        parts: tuple[Any, ...] = (self.paca_weight, self.paca_original, self.paca_delta)
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

    def freshen(self) -> None:
        """Before a forward: let the weight hold the trained columns, if nothing else has seen to it."""
        if self.paca_is_gathered:
            self.refresh()
        elif not self.paca_is_sharded:
            self.refresh_if_stale()

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
    def start_from(self, values: Tensor) -> None:
        """Set the columns to `values` (o, r).

        values - original is exact where they are within a factor of two of each other (Sterbenz), so the sum gives
        `values` back bit for bit; elsewhere it can differ by one rounding of the master copy.
        """
        difference = values.to(self.paca_delta) - self.paca_original.to(self.paca_delta.dtype)
        self.paca_delta.copy_(difference / self.paca_scale)
        self.paca_pending = True

    def open_columns(
        self, original: Tensor, columns: Tensor, *, storage: torch.dtype, shared: SharedGather, scale: float
    ) -> None:
        """Become a layer whose columns train, of which nothing has moved yet.

        original: the base's columns (o, r); columns: which, on the weight's device; storage: as of `open_layer`.
        """
        master = torch.float64 if self.paca_weight.dtype == torch.float64 else torch.float32
        self.paca_delta = nn.Parameter(torch.zeros(original.shape, dtype=master, device=columns.device))
        self.paca_original = nn.Parameter(original.to(columns.device), requires_grad=False)
        self.register_buffer("paca_columns", shared.one_tensor(columns), persistent=False)
        self.take_number()
        self.paca_gather, self.paca_scale, self.paca_storage = shared, scale, storage
        self.paca_pending, self.paca_seen = False, self._signs()

    def close_columns(self) -> None:
        """The inverse of `open_columns`."""
        for name in ("paca_delta", "paca_original", "paca_columns", "paca_gather", "paca_number", "paca_scale",
                     "paca_storage", "paca_pending", "paca_seen"):  # fmt: skip
            delattr(self, name)
        for name in ("paca_past", "paca_scores"):
            vars(self).pop(name, None)  # where other columns are drawn from time to time

    def train(self, mode: bool = True) -> PacaLayer:  # noqa: FBT001, FBT002  torch's signature
        self.paca_pending = self.paca_pending or mode != self.training
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PacaLayer:  # noqa: FBT001, FBT002  torch's signature
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.paca_columns = self.paca_gather.one_tensor(self.paca_columns)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.take_number()  # a copy is a layer of its own

    def take_number(self) -> None:
        """A number by which compiled graphs find this layer."""
        number = next(_numbers)
        with torch.device("cpu"):
            self.paca_number = torch.tensor(number)
        _numbered[number] = self

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.paca_is_gathered:
            self.refresh_if_stale()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.paca_pending = True


def run_paca(layer: PacaLayer, x: Tensor, fed: Tensor, axis: int) -> Tensor:
    """The forward of a layer that is no linear one, which a compiler leaves to eager mode.

    x: what the layer computes with; fed: what it was given, whose channels along `axis` are kept.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return cast("Tensor", _run_eagerly(layer, x, fed, axis))
    layer.freshen()
    if not (torch.is_grad_enabled() and layer.paca_delta.requires_grad):
        return layer.frozen_forward(x)
    kept = layer.paca_gather(fed, layer.paca_columns, axis)
    result: Tensor = _PacaFunction.apply(x, layer.paca_delta, kept, layer)  # type: ignore[no-untyped-call]
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_eagerly(layer: PacaLayer, x: Tensor, fed: Tensor, axis: int) -> Tensor:
    return run_paca(layer, x, fed, axis)


class PacaLinear(PacaLayer, nn.Linear):
    """`nn.Linear` (weight (o, i)) with trained columns."""

    input_axis = 1
    plain = nn.Linear

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class PacaConv1D(PacaLayer, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """GPT-2's `Conv1D` (weight (i, o)) with trained columns, which here are rows."""

    input_axis = 0
    plain = Conv1D

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
    """The columns of a stored weight as (o, r), copied; of one that is no matrix o are all axes but the inputs'."""
    columns = weight.detach().index_select(input_axis, columns_r)
    return columns.movedim(input_axis, -1).reshape(-1, len(columns_r)).contiguous()


def write_columns(weight: Tensor, columns_r: Tensor, values_or: Tensor, input_axis: int) -> None:
    """Replace the columns of a stored weight by (o, r) values of its dtype.

    On the CPU by assignment, which goes row by row in several threads; `index_copy_` goes column by column and takes
    half as long again. Elsewhere by `index_copy_`, for which every device has a kernel.
    """
    if weight.device.type == "cpu" and input_axis == 1 and weight.dim() == 2:
        weight[:, columns_r] = values_or
    else:
        others = (*weight.shape[:input_axis], *weight.shape[input_axis + 1 :])
        weight.index_copy_(input_axis, columns_r, values_or.reshape(*others, -1).movedim(-1, input_axis))


def open_layer(
    module: nn.Module,
    columns_r: Tensor,
    *,
    input_axis: int,
    storage: torch.dtype,
    shared: SharedGather,
    scale: float,
    opened: type[PacaLayer] | None = None,
) -> PacaLayer:
    """Make a layer one whose columns train, in place.

    storage: the dtype in the file, to which they round; opened: the class to make it one of, where it is no linear one.
    """
    module.__class__ = opened or SWAPS[type(module)]
    layer = cast("PacaLayer", module)
    weight = cast("nn.Parameter", layer.paca_weight)
    columns_r = columns_r.to(weight.device)
    original = read_columns(weight, columns_r, input_axis)
    layer.open_columns(original, columns_r, storage=storage, shared=shared, scale=scale)
    return layer


def close_layer(layer: PacaLayer, *, merge: bool) -> None:
    """The plain layer again, in place: with the trained columns (`merge`) or with the base's."""
    module: nn.Module = layer
    if merge:
        layer.refresh()
    else:
        write_columns(layer.paca_weight.data, layer.paca_columns, layer.paca_original.data, layer.input_axis)
        layer.write_past()
    layer.close_columns()
    module.__class__ = layer.plain


def layers(model: nn.Module) -> dict[str, PacaLayer]:
    """The opened layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PacaLayer)}
