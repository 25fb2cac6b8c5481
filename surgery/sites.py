"""The layers of a model that can be opened and are no linear ones: convolutions, packed attention, embeddings.

What cannot be opened is found as well, with the reason: who names it is told, and the plan's table says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from surgery.select import ATTENTION, CONVOLUTION, EMBEDDING, LinearSite, find_sites, is_within, owners_of


def find_all_sites(model: nn.Module, heads: Iterable[str] = ()) -> tuple[LinearSite, ...]:
    """Every layer of a model that a request may name, by name; see `find_sites`. Exact classes only."""
    heads, owners = tuple(heads), owners_of(model)
    found = list(find_sites(model, heads))
    for name, module in model.named_modules():
        for site, weight in _sites_of(name, module, is_head=is_within(name, heads)):
            others = [owner for owner in owners[id(weight)] if owner != site.module]
            found.append(replace(site, tied_with=others[0]) if others else site)
    return tuple(sorted(found, key=lambda site: (site.module, site.parameter)))


def _sites_of(name: str, module: nn.Module, *, is_head: bool) -> Iterator[tuple[LinearSite, Any]]:
    if isinstance(module, nn.Conv2d):
        yield _convolution(name, module, is_head=is_head), module.weight
    elif type(module) is nn.MultiheadAttention:
        yield from _attention(name, module, is_head=is_head)
    elif isinstance(module, nn.Embedding):
        yield _embedding(name, module, is_head=is_head), module.weight


def _convolution(name: str, module: nn.Conv2d, *, is_head: bool) -> LinearSite:
    """`out_features` is the number of values of a column: outputs x height x width of the kernel."""
    sizes = tuple(map(int, module.weight.shape))
    unfit = ""
    if module.groups > 1:
        kind = "depthwise" if module.groups == module.in_channels else "grouped"
        unfit = f"{kind} convolution ({module.groups} groups): a channel reaches the outputs of its group only"
    elif type(module) is not nn.Conv2d:
        unfit = f"{type(module).__name__}, a class of its own"
    values = sizes[0] * sizes[2] * sizes[3]
    return LinearSite(name, values, sizes[1], 1, is_head=is_head, sizes=sizes, kind=CONVOLUTION, unfit=unfit)


def _attention(name: str, module: nn.MultiheadAttention, *, is_head: bool) -> Iterator[tuple[LinearSite, Any]]:
    """Both projections. `unfit` where queries, keys and values have weights of their own, or attention more inputs."""
    unfit = ""
    packed_weight: Any = module.in_proj_weight  # None where each of the three has its own
    if packed_weight is None:
        unfit = "queries, keys and values of different widths"
    elif module.bias_k is not None or module.add_zero_attn:
        unfit = "attention with added keys (add_bias_kv, add_zero_attn)"
    if packed_weight is not None:
        rows, width = map(int, packed_weight.shape)
        packed = LinearSite(
            name, rows, width, 1, is_head=is_head, parameter="in_proj_weight", kind=ATTENTION, unfit=unfit
        )
        yield packed, packed_weight
    rows, width = map(int, module.out_proj.weight.shape)
    out = LinearSite(f"{name}.out_proj", rows, width, 1, is_head=is_head, kind=ATTENTION, unfit=unfit)
    yield out, module.out_proj.weight


def _embedding(name: str, module: nn.Embedding, *, is_head: bool) -> LinearSite:
    """Rows are an embedding's columns: the weight (tokens, width) as (in, out)."""
    tokens, width = map(int, module.weight.shape)
    unfit = ""
    if type(module) is not nn.Embedding:
        unfit = f"{type(module).__name__}, a class of its own"
    elif module.max_norm is not None:
        unfit = "max_norm rewrites its rows whenever it is used"
    elif module.scale_grad_by_freq:
        unfit = "scale_grad_by_freq scales its gradient by what else is in a batch"
    return LinearSite(name, width, tokens, 0, is_head=is_head, kind=EMBEDDING, unfit=unfit)
