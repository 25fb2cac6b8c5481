"""What batches say of a model's weights: one number for each input column, summed up layer by layer.

Inputs are seen by hooks on the layers, which are all called while they are looked at: no fast path of torch's runs
around them. Gradients are the weights' own, which autograd computes for the chosen layers alone; each is reduced and
let go as soon as it is there, so that there is one dense gradient at a time. Of a mixture's experts `expert_scores`
sees both.

Sums are kept in float64: the order of the batches changes them in their last digits only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.columns import GRADIENTS, STRATEGIES, as_matrix
from surgery.errors import CheckError, RequestError, UnsupportedError
from surgery.expert_scores import ExpertSite, watching_experts
from surgery.paca_attention import calling_projections
from surgery.paca_conv import CHANNELS
from surgery.quantized import is_quantized

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """A layer to look at: its sizes, which a packed weight does not show, and the weight's axis of its inputs.

    `out_features` and `parameter` are as a `Target` has them.
    """

    module: str
    out_features: int
    in_features: int
    input_axis: int
    parameter: str = "weight"


def calibrate(
    model: Any, sites: Sequence[Site | ExpertSite], strategy: str, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Each target's scores (i,) float64 by module, over all batches. The model is left as it was.

    Raises: RequestError without batches; UnsupportedError where there is no loss, or a layer's weight has no gradient;
    CheckError where scores are not finite.
    """
    scores = {site.module: torch.zeros(site.in_features, dtype=torch.float64) for site in sites}
    look = _gradients if STRATEGIES[strategy].looks_at == GRADIENTS else _inputs
    layers = [site for site in sites if isinstance(site, Site)]
    experts = [site for site in sites if isinstance(site, ExpertSite)]
    seen = 0
    with _evaluating(model), look(model, layers, strategy, scores), watching_experts(model, experts, strategy, scores):
        for batch in batches:
            _run(model, batch, strategy)
            seen += 1
    if not seen:
        fix = "Give rows (--calibration-data), or batches (calibration=)"
        raise RequestError(f"--select {strategy}", "no batch to look at", expected="at least one", fix=fix)
    wrong = [name for name, score in scores.items() if not bool(score.isfinite().all())]
    if wrong:
        fix = "Look at the data and the model: a forward or its gradient overflows"
        raise CheckError(
            f"--select {strategy}", f"{wrong[0]} has scores that are not finite", expected="numbers", fix=fix
        )
    return scores


def _run(model: Any, batch: Batch, strategy: str) -> None:
    device = next(model.parameters()).device
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if STRATEGIES[strategy].looks_at != GRADIENTS:
        with torch.no_grad():
            model(**placed)
        return
    result = model(**placed)
    loss = result.loss if hasattr(result, "loss") else None
    if loss is None:
        fix = "Give batches with labels, or name the task with --task"
        raise UnsupportedError(f"--select {strategy}", f"{type(model).__name__} gives no loss", expected="one", fix=fix)
    loss.backward()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and no gradients but those that are asked for; all as it was in the end.

    bitsandbytes' layers stay in training mode, in which they compute the same: in eval mode some CPUs order their
    weights anew, for good. torch's attention and encoder layers have a way of their own in eval mode, in which they
    read weights and call no layer: not here.
    """
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for module in filter(is_quantized, model.modules()):
        module.training = True
    model.requires_grad_(requires_grad=False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        for module, was_training in modes:
            module.training = was_training
        for parameter, was_wanted in wanted:
            parameter.requires_grad_(was_wanted)


@contextmanager
def _inputs(model: nn.Module, sites: Sequence[Site], strategy: str, scores: Mapping[str, Tensor]) -> Iterator[None]:
    def watch(site: Site) -> Any:
        def add(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            for x, outputs in _fed(module, args, kwargs, site.out_features):
                scores[site.module].add_(STRATEGIES[strategy].score(x, out_features=outputs).cpu())

        return add

    watched = [model.get_submodule(site.module) for site in sites]
    with ExitStack() as stack, calling_projections(model, watched):
        for site, module in zip(sites, watched, strict=True):
            handle = module.register_forward_pre_hook(watch(site), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _fed(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], out_features: int
) -> list[tuple[Tensor, int]]:
    """What a module's weight is multiplied with, channels last, and with how many of its outputs each.

    A third of attention's packed projection sees the queries, one the keys, one the values.
    """
    given = [*args, *kwargs.values()]
    if isinstance(module, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        return [(named[name], out_features // 3) for name in ("query", "key", "value")]
    return [(given[0].movedim(CHANNELS, -1) if isinstance(module, nn.Conv2d) else given[0], out_features)]


@contextmanager
def _gradients(model: nn.Module, sites: Sequence[Site], strategy: str, scores: Mapping[str, Tensor]) -> Iterator[None]:
    def watch(site: Site) -> Any:
        def add(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None  # before the next layer's is computed
            assert gradient is not None  # noqa: S101  the hook runs after it was put there
            gradient, values = (as_matrix(tensor.detach(), site.input_axis) for tensor in (gradient, weight))
            scores[site.module].add_(STRATEGIES[strategy].score(gradient, values).cpu())

        return add

    with ExitStack() as stack:
        for site in sites:
            weight = model.get_parameter(f"{site.module}.{site.parameter}")
            if not weight.is_floating_point() or type(weight.data) is not Tensor:  # torchao has a class of its own
                found = f"{site.module} has a weight of {weight.dtype}, which has no gradient"
                raise UnsupportedError(
                    f"--select {strategy}", found, expected="activation, or a base that is not quantized"
                )
            weight.requires_grad_()
            handle = weight.register_post_accumulate_grad_hook(watch(site))  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        yield
