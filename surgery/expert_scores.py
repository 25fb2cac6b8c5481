"""What batches say of a mixture's experts: their inputs, or their gradients, as scores of their input columns.

While they are looked at, experts multiply in the way that their model asks for, in products of ours: they say which
rows went to which expert, and take the gradient of one expert's weight at a time, which is reduced and let go. So no
gradient of all experts is ever there, and the three ways see the same numbers. An expert that no token reaches keeps
scores of zero.

Shape suffixes as in `paca_experts`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from surgery.columns import GRADIENTS, STRATEGIES
from surgery.paca_experts import WAYS, Call, Rows, ends_of, require_way
from surgery.paca_layers import without_autocast

ALL = -1


@dataclass(frozen=True)
class ExpertSite:
    """A target of experts to look at: the module that holds them, its parameter, and the place in it, as a `Target`'s.

    `module`: what its scores are called.
    """

    module: str
    in_features: int
    holder: str
    parameter: str
    place: tuple[int, ...] = ()


def rows_by_expert(rows: Rows, experts: int) -> Iterator[tuple[int, Any]]:
    """Each expert that any row goes to, and which rows those are."""
    if isinstance(rows.ids, int):
        yield rows.ids, slice(None)
        return
    ids, order = torch.sort(rows.ids, stable=True)
    start = 0
    for expert, end in enumerate(ends_of(ids, experts).tolist()):
        if end > start:
            yield expert, order[start:end]
        start = end


@dataclass(frozen=True)
class _Watch:
    """Products that are looked at: of a holder's parameters, the targets that lie in them.

    sites: by parameter and expert, which is `ALL` of a target that holds all of them.
    """

    experts: Any
    sites: Mapping[tuple[str, int], Sequence[ExpertSite]]
    strategy: str
    scores: Mapping[str, Tensor]

    def __call__(self, parameter: str, x: Tensor, rows: Rows) -> Tensor:
        call = rows.call(self.experts, parameter)
        if STRATEGIES[self.strategy].looks_at == GRADIENTS:
            weight = self.experts.get_parameter(parameter)  # that backward is called for, also of the first layer
            result: Tensor = _WatchedFunction.apply(x, weight, rows, call, self)  # type: ignore[no-untyped-call]
            return result
        result = call.forward(x, call.weight(), rows.known)
        for expert, chosen in rows_by_expert(rows, self.experts.num_experts):
            self._add(parameter, expert, x[chosen], None, result.shape[-1])
        return result

    def add_gradients(self, call: Call, rows: Rows, x: Tensor, dy: Tensor) -> None:
        """One expert's dense gradient after another: (o, i)."""
        for expert, chosen in rows_by_expert(rows, self.experts.num_experts):
            self._add(call.parameter, expert, dy[chosen].t().mm(x[chosen].to(dy.dtype)), self._weight(call, expert), 0)

    def _weight(self, call: Call, expert: int) -> Tensor:
        weight: Tensor = self.experts.get_parameter(call.parameter).detach()[expert]
        return weight.t() if self.experts.is_transposed else weight

    def _add(self, parameter: str, expert: int, seen: Tensor, weight: Tensor | None, outputs: int) -> None:
        """seen: an expert's inputs (n, i), or its gradient (o, i) beside its weight."""
        score = STRATEGIES[self.strategy].score
        for site in (*self.sites.get((parameter, expert), ()), *self.sites.get((parameter, ALL), ())):
            _, part, parts = site.place or (expert, 0, 1)
            if weight is None:
                found = score(seen, out_features=outputs // parts)
            else:
                found = score(seen.chunk(parts)[part], weight.chunk(parts)[part])
            self.scores[site.module].add_(found.cpu())


class _WatchedFunction(torch.autograd.Function):
    """y = x times the weight of each row's expert, which keeps x; backward tells of the weights' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Rows, call: Call, watch: _Watch) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.rows, ctx.call, ctx.watch, ctx.dtype = rows, call, watch, x.dtype
        return call.forward(x, call.weight(), rows.known)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        (x,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.watch.add_gradients(call, ctx.rows, x, dy)
        dx = call.backward(dy, call.weight(), ctx.rows.known, ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def _run(watch: _Watch, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of experts that are looked at."""
    way = WAYS[require_way(watch.experts)]
    return way(watch.experts, hidden_states, top_k_index, top_k_weights, watch)


@contextmanager
def watching_experts(
    model: nn.Module, sites: Sequence[ExpertSite], strategy: str, scores: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add to scores (i,) float64, by module, what each forward (inputs) or backward (gradients) says of experts.

    Raises: UnsupportedError for a way to multiply that is none of ours.
    """
    by_holder: dict[str, dict[tuple[str, int], list[ExpertSite]]] = {}
    for site in sites:
        place = (site.parameter, site.place[0] if site.place else ALL)
        by_holder.setdefault(site.holder, {}).setdefault(place, []).append(site)
    watched: list[nn.Module] = []
    try:
        for holder, places in by_holder.items():
            experts = model.get_submodule(holder)
            require_way(experts)
            for parameter, _ in places if STRATEGIES[strategy].looks_at == GRADIENTS else ():
                experts.get_parameter(parameter).requires_grad_()
            cast("Any", experts).forward = functools.partial(_run, _Watch(experts, places, strategy, scores))
            watched.append(experts)
        yield
    finally:
        for experts in watched:
            del vars(experts)["forward"]
