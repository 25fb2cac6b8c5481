"""Experts some of whose input columns train, in place: what PaCA puts into a mixture of experts.

transformers 5 holds the experts of a layer as parameters with an axis for them, `gate_up_proj` (e, 2 i, h) and
`down_proj` (e, h, i), and multiplies with them in one of several ways, which a model's configuration names. The class
keeps its name for its parts and its own forward, which runs whenever nothing trains; to train, the same products run
in an autograd function of ours, which keeps r channels of the input and recomputes what `batched_mm` would keep of the
weights.

Columns are `shared` by all experts of a parameter, so that an input is gathered once for all of them, or each expert's
`own`.

Shape suffixes: t tokens, n pairs of a token and an expert it goes to, e experts, o outputs, i inputs, r columns.

Source: PaCA, arXiv 2503.01905, section 3; the three ways: transformers' `integrations/moe.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from surgery.compat import grouped_product
from surgery.errors import UnsupportedError
from surgery.paca_layers import PacaLayer, SharedGather, combine, gather, without_autocast

SHARED, OWN = "shared", "own"


class ExpertColumns(PacaLayer):
    """The trained columns of one parameter of all experts. A part of the experts' module; nobody calls it.

    `paca_delta` and `paca_original` are (e, o, r), whatever the axes of the weight; `paca_columns` (r,) where the
    experts share them, (e, r) where each has its own; `paca_past` and `paca_scores` follow it: by expert, (e, i).
    Freshness and all else are `PacaLayer`'s.
    """

    bias = None
    paca_owner: tuple[nn.Module]  # in a tuple, so that it is no part of its own part
    paca_parameter: str

    @property
    def weight(self) -> Any:
        """The experts' parameter: (e, o, i), or (e, i, o) where `input_axis` is 1."""
        return self.paca_owner[0]._parameters[self.paca_parameter]  # noqa: SLF001  also where a rank holds some of it

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("the experts' module is called, not its columns")

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the trained columns into the weight."""
        weight, original, delta = self.rows()
        values = combine(original, delta, self.paca_scale).to(self.paca_storage).to(weight.dtype)
        write_experts(weight.data, self._columns_here().to(weight.device), values, self.input_axis)
        self.paca_pending, self.paca_seen = False, self._signs()

    def _columns_here(self) -> Tensor:
        """Of experts' own columns those of the experts that this rank holds: the first ranks have as many as can be."""
        if self.paca_columns.dim() == 1 or not self.paca_is_sharded:
            return self.paca_columns
        mesh = self.weight.device_mesh
        most = -(-len(self.paca_columns) // mesh.size())
        return self.paca_columns[most * mesh.get_local_rank() :][:most]

    def lane_weight(self, expert: int | None) -> tuple[Any, int]:
        """That of all experts, or of one that has columns of its own."""
        return (self.weight, self.input_axis) if expert is None else (self.weight[expert], self.input_axis - 1)

    def keep(self, x: Tensor, ids: Tensor | int) -> Tensor:
        """The channels of x (n, i) whose weights train in the experts that its rows go to: (n, r), outside autograd."""
        if self.paca_columns.dim() == 1:
            return gather(x, self.paca_columns)
        columns = self.paca_columns[ids]
        return gather(x, columns) if columns.dim() == 1 else x.detach().gather(1, columns)


def read_experts(weight_eoi: Tensor, columns: Tensor, input_axis: int) -> Tensor:
    """The columns of all experts as (e, o, r), copied. columns: (r,) or (e, r)."""
    weight_eoi = weight_eoi.detach() if input_axis == 2 else weight_eoi.detach().transpose(1, 2)
    if columns.dim() == 1:
        return weight_eoi.index_select(2, columns)
    return weight_eoi.gather(2, _along_outputs(columns, weight_eoi))


def write_experts(weight_eoi: Tensor, columns: Tensor, values_eor: Tensor, input_axis: int) -> None:
    """Replace the columns of all experts by values (e, o, r) of the weight's dtype. columns: (r,) or (e, r)."""
    weight_eoi = weight_eoi if input_axis == 2 else weight_eoi.transpose(1, 2)
    if columns.dim() == 1:
        weight_eoi.index_copy_(2, columns, values_eor)
    else:
        weight_eoi.scatter_(2, _along_outputs(columns, weight_eoi), values_eor)


def _along_outputs(columns_er: Tensor, weight_eoi: Tensor) -> Tensor:
    return columns_er.unsqueeze(1).expand(-1, weight_eoi.shape[1], -1)


# --- the ways to multiply: x (n, i) with each row's own expert

_Product = Callable[[Tensor, Tensor, "Tensor | None", bool], Tensor]


def _one(x: Tensor, weight: Tensor, _rows: Tensor | None, transposed: bool) -> Tensor:  # noqa: FBT001
    """All rows by one expert's weight."""
    result: Tensor = x @ weight if transposed else nn.functional.linear(x, weight)
    return result


def _batched(x: Tensor, weight: Tensor, ids: Tensor | None, transposed: bool) -> Tensor:  # noqa: FBT001
    """Each row by a copy of its expert's weight. ids: (n,)."""
    chosen = weight[ids]
    if transposed:
        return torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
    return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor | None, transposed: bool) -> Tensor:  # noqa: FBT001
    """Rows sorted by expert. ends: (e,) int32, where each expert's rows end."""
    return grouped_product(x, weight if transposed else weight.transpose(1, 2), cast("Tensor", ends))


# --- the gradient of the columns


@torch.library.custom_op("checkpoint_surgery::expert_column_gradient", mutates_args=())
def _by_expert(kept_nr: Tensor, dy_no: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert -> (e, r, o). An operator, so that its sizes are known where there are no values."""
    result = dy_no.new_zeros((ends.shape[0], kept_nr.shape[1], dy_no.shape[1]))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(kept_nr[start:end].t(), dy_no[start:end], out=result[expert])
        start = end
    return result


@_by_expert.register_fake
def _(kept_nr: Tensor, dy_no: Tensor, ends: Tensor) -> Tensor:
    return dy_no.new_empty((ends.shape[0], kept_nr.shape[1], dy_no.shape[1]))


def _gradient(kept_nr: Tensor, dy_no: Tensor, rows: Tensor | None, product: _Product, experts: int) -> Tensor:
    """The columns' gradient: (e, o, r), or (o, r) of one expert."""
    kept_nr = kept_nr.to(dy_no.dtype)
    if product is _one or rows is None:
        return kept_nr.t().mm(dy_no).t()
    if product is _batched:
        rows, order = torch.sort(rows)
        kept_nr, dy_no, rows = kept_nr[order], dy_no[order], ends_of(rows, experts)
    gradient: Tensor = _by_expert(kept_nr, dy_no.contiguous(), rows)
    return gradient.transpose(1, 2)


def ends_of(sorted_ids: Tensor, experts: int) -> Tensor:
    """Where each expert's rows end among sorted ones: (e,) int32. Its size does not depend on values."""
    numbers = torch.arange(experts, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids, numbers, right=True).to(torch.int32)


@dataclass(frozen=True)
class Call:
    """One product: the parameter of the experts that is multiplied with, and how.

    expert: the one that all rows go to, or None; part: its trained columns, or None where none train.
    """

    experts: Any
    parameter: str
    product: _Product
    expert: int | None
    part: ExpertColumns | None

    def weight(self) -> Tensor:
        """All experts' weights (e, ..), or the one's."""
        weight: Tensor = self.experts._parameters[self.parameter].detach()  # noqa: SLF001  that the class reads itself
        return weight if self.expert is None else weight[self.expert]

    def forward(self, x: Tensor, weight: Tensor, known: Tensor | None) -> Tensor:
        """x (n, i) -> (n, o)."""
        return self.product(x, weight, known, self.experts.is_transposed)

    def backward(self, dy: Tensor, weight: Tensor, known: Tensor | None, dtype: torch.dtype) -> Tensor:
        """dy (n, o) -> dx (n, i), in x's dtype."""
        return self.product(dy, weight.to(dy.dtype), known, not self.experts.is_transposed).to(dtype)


class _ExpertFunction(torch.autograd.Function):
    """y = x times the weight of each row's expert; backward keeps `kept` of the input, and where rows come from.

    kept: (n, r), or (t, r) with tokens (n,), the token of each row; rows: what the product needs to know of them.
    The weight rides on ctx for the reason that `paca_layers` gives.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, kept: Tensor | None, tokens: Tensor | None, rows: Any, call: Call
    ) -> Tensor:
        ctx.save_for_backward(kept, tokens, rows)
        ctx.call, ctx.weight = call, call.weight()
        ctx.dtypes = (x.dtype, None if delta is None else delta.dtype)
        return call.forward(x, ctx.weight, rows)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        kept, tokens, rows = ctx.saved_tensors
        x_dtype, delta_dtype = ctx.dtypes
        dx = ddelta = None
        if ctx.needs_input_grad[0]:
            dx = call.backward(dy, ctx.weight, rows, x_dtype)
        if ctx.needs_input_grad[1] and call.part is not None:
            mine = kept if tokens is None else kept[tokens]
            ddelta = _gradient(mine, dy, rows, call.product, call.experts.num_experts).to(delta_dtype)
            if call.part.paca_scale != 1.0:
                ddelta = ddelta.mul_(call.part.paca_scale)
            call.part.paca_pending = True  # whatever uses this gradient, the next forward refreshes
        return dx, ddelta, None, None, None, None


# --- the experts' module


class PacaExperts(nn.Module):
    """What is mixed into a class of experts: the same parameters, some of whose columns train.

    The experts' own attributes are transformers' (`use_experts_implementation` sets them).
    """

    paca_parts: dict[str, str]  # parameter: the name of the part that holds its columns

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (t, h), top_k_index and top_k_weights (t, k) -> (t, h)."""
        compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        run = torch.compiler.disable(self.run) if compiles else self.run  # type: ignore[no-untyped-call]
        result: Tensor = run(hidden_states, top_k_index, top_k_weights)
        return result

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The forward, outside compiled graphs: whether columns are fresh is nothing to compile in."""
        parts = parts_of(self)
        for part in parts.values():
            part.freshen()
        trains = torch.is_grad_enabled() and any(part.paca_delta.requires_grad for part in parts.values())
        if not trains:
            result: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return result
        way = require_way(self)
        first = parts.get(first_parameter(self))
        is_shared = first is not None and first.paca_columns.dim() == 1
        kept = first.paca_gather(hidden_states, first.paca_columns) if first is not None and is_shared else None
        # an expert's slice of the difference for each call: its gradients are put together once, by unbind's backward
        deltas = {name: part.paca_delta.unbind(0) for name, part in parts.items()} if way == "eager" else {}
        return WAYS[way](self, hidden_states, top_k_index, top_k_weights, _Trained(self, kept, deltas))


def require_way(experts: Any) -> str:
    """How a module of experts is to multiply. Raises: UnsupportedError for a way in which nothing of ours trains."""
    way: str = experts.config._experts_implementation  # noqa: SLF001  transformers has no other name for it
    if way not in WAYS or experts._is_expert_parallel:  # noqa: SLF001
        found = "experts divided among devices" if way in WAYS else f"the experts implementation {way!r}"
        raise UnsupportedError(
            "experts",
            f"{found}, and columns of experts train",
            expected=f"one of {', '.join(WAYS)}, with all experts on each device",
            fix="Call model.set_experts_implementation, or leave the experts out with --exclude 'experts.*'",
        )
    return way


def part_name(parameter: str) -> str:
    """What the columns of a parameter of experts are called in their module."""
    return f"paca_{parameter}"


def first_parameter(experts: Any) -> str:
    """The parameter that the input meets first."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def parts_of(experts: nn.Module) -> dict[str, ExpertColumns]:
    """The trained columns of an opened module of experts, by parameter."""
    names = cast("PacaExperts", experts).paca_parts
    return {parameter: cast("ExpertColumns", experts.get_submodule(name)) for parameter, name in names.items()}


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the experts: ids (n,) or the one expert of all; known: what the product needs.

    tokens (n,): which token each row is.
    """

    product: _Product
    ids: Tensor | int
    known: Tensor | None
    tokens: Tensor

    def call(self, experts: Any, parameter: str, part: ExpertColumns | None = None) -> Call:
        """These rows' product with a parameter."""
        return Call(experts, parameter, self.product, self.ids if isinstance(self.ids, int) else None, part)


Multiply = Callable[[str, Tensor, Rows], Tensor]  # (parameter, x (n, i), rows) -> (n, o), without the experts' bias


@dataclass(frozen=True)
class _Trained:
    """Products in which columns train. kept (t, r): the shared channels of all tokens; deltas: each expert's own."""

    experts: Any
    kept: Tensor | None
    deltas: dict[str, Any]

    def __call__(self, parameter: str, x: Tensor, rows: Rows) -> Tensor:
        part = parts_of(self.experts).get(parameter)
        kept, tokens, delta = None, None, None
        if part is not None and part.paca_delta.requires_grad:
            is_first = self.kept is not None and parameter == first_parameter(self.experts)
            kept, tokens = (self.kept, rows.tokens) if is_first else (part.keep(x, rows.ids), None)
            delta = self.deltas[parameter][rows.ids] if isinstance(rows.ids, int) else part.paca_delta
        call = rows.call(self.experts, parameter, part)
        result: Tensor = _ExpertFunction.apply(x, delta, kept, tokens, rows.known, call)  # type: ignore[no-untyped-call]
        return result


def _mlp(experts: Any, x: Tensor, rows: Rows, multiply: Multiply) -> Tensor:
    """What each row's expert makes of it: (n, h) -> (n, h), before the routing weights."""

    def with_bias(parameter: str, x: Tensor) -> Tensor:
        result = multiply(parameter, x, rows)
        return result + experts.get_parameter(f"{parameter}_bias")[rows.ids] if experts.has_bias else result

    middle = with_bias(first_parameter(experts), x)
    middle = experts._apply_gate(middle) if experts.has_gate else experts.act_fn(middle)  # noqa: SLF001  the class's own
    result = with_bias("down_proj", middle)
    return experts.post_expert_norm(result) if experts.has_post_expert_norm else result


def _summed(weighted: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """(t k, h) in the tokens' order -> (t, h)."""
    return weighted.view(-1, top_k, weighted.shape[-1]).sum(dim=1).to(dtype)


def _forward_grouped(experts: Any, x: Tensor, index: Tensor, weights: Tensor, multiply: Multiply) -> Tensor:
    ids, order = torch.sort(index.reshape(-1))
    tokens = order // index.shape[-1]
    rows = Rows(_grouped, ids, ends_of(ids, experts.num_experts), tokens)
    weighted = _mlp(experts, x[tokens], rows, multiply) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return _summed(weighted[back], index.shape[-1], x.dtype)


def _forward_batched(experts: Any, x: Tensor, index: Tensor, weights: Tensor, multiply: Multiply) -> Tensor:
    top_k, ids = index.shape[-1], index.reshape(-1)
    tokens = torch.arange(ids.shape[0], device=ids.device) // top_k
    rows = Rows(_batched, ids, ids, tokens)
    weighted = _mlp(experts, x.repeat_interleave(top_k, dim=0), rows, multiply) * weights.reshape(-1).unsqueeze(-1)
    return _summed(weighted, top_k, x.dtype)


def _forward_eager(experts: Any, x: Tensor, index: Tensor, weights: Tensor, multiply: Multiply) -> Tensor:
    result = torch.zeros_like(x)
    for expert in torch.unique(index).tolist():
        if expert >= experts.num_experts:
            continue
        place, tokens = torch.where(index.t() == expert)
        out = _mlp(experts, x[tokens], Rows(_one, expert, None, tokens), multiply)
        out = out * weights[tokens, place, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


WAYS: dict[str, Callable[..., Tensor]] = {
    "eager": _forward_eager,
    "batched_mm": _forward_batched,
    "grouped_mm": _forward_grouped,
}


@functools.cache
def _opened_class(plain: Any) -> Any:
    """A class of experts with `PacaExperts` mixed in."""
    return type(f"Paca{plain.__name__}", (PacaExperts, plain), {"__module__": plain.__module__})


def open_experts(
    experts: Any, parameter: str, columns: Tensor, *, storage: torch.dtype, shared: SharedGather, scale: float
) -> ExpertColumns:
    """Let columns of one parameter of a module of experts train, in place. columns: (r,) or (e, r).

    storage: the dtype in the file, to which they round. Raises: UnsupportedError.
    """
    require_way(experts)
    if not isinstance(experts, PacaExperts):
        experts.__class__ = _opened_class(cast("Any", type(experts)))
        experts.paca_parts = {}
    weight = experts._parameters[parameter]  # noqa: SLF001  by name, as the class has it
    if weight.dim() != 3 or not weight.is_floating_point():
        found = f"{parameter} of type {weight.dtype} {tuple(weight.shape)} in memory"
        raise UnsupportedError("experts", found, expected="floating point with an axis for the experts")
    part = ExpertColumns()
    part.paca_owner, part.paca_parameter = (experts,), parameter
    part.input_axis = 1 if experts.is_transposed else 2
    columns = columns.to(weight.device)
    original = read_experts(weight, columns, part.input_axis)
    part.open_columns(original, columns, storage=storage, shared=shared, scale=scale)
    name = part_name(parameter)
    experts.add_module(name, part)
    experts.paca_parts[parameter] = name
    return part


def close_experts(experts: nn.Module, *, merge: bool) -> None:
    """The plain module again, in place: with the trained columns (`merge`) or with the base's."""
    for name, part in [
        (name, experts.get_submodule(name)) for name in cast("PacaExperts", experts).paca_parts.values()
    ]:
        opened = cast("ExpertColumns", part)
        if merge:
            opened.refresh()
        else:
            write_experts(opened.weight.data, opened.paca_columns, opened.paca_original.data, opened.input_axis)
            opened.write_past()
        delattr(experts, name)
    del experts.paca_parts
    experts.__class__ = type(experts).__bases__[1]  # what `_opened_class` was made of


def opened_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The opened modules of experts of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PacaExperts)}
