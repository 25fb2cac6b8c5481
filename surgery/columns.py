"""Which input columns are trained: the strategies, one function each, in one table.

A strategy chooses for a *group* (layers fed by the same tensor). `random` draws from the group's name and the seed
alone, so that the choice does not depend on order, device, process or what else is trained. The others give each
input column a score (the group's layers' scores are summed); equal scores are told apart by the seed and the name.

A column is what a weight holds of one input: of a convolution o x h x w values of an input channel, so that its weight
and its gradient are looked at as (o x h x w, i).

Shape suffixes: o out_features, i in_features, n inputs (batch and tokens flattened), r chosen columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import RequestError, UnsupportedError, closest, shorten

if TYPE_CHECKING:
    from torch import Tensor

RANDOM, FILE = "random", "file:"
WEIGHTS, INPUTS, GRADIENTS = "weights", "inputs", "gradients"  # what a score is made of
LOW_RANK, LOW_RANK_PART = 128, 4  # of the approximation: so many, but at most that part of the smaller side
OVERSAMPLED, ITERATIONS = 8, 4


def generator_seed(seed: int, name: str) -> int:
    """A 63-bit seed that is a function of (seed, name) only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _generator(seed: int, name: str) -> Any:
    import torch

    return torch.Generator(device="cpu").manual_seed(generator_seed(seed, name))


# --- the strategies


def as_matrix(weight: Tensor, input_axis: int) -> Tensor:
    """A weight, or its gradient, as (o, i): of one that is no matrix o are all axes but the inputs'."""
    return weight.movedim(input_axis, -1).reshape(-1, weight.shape[input_axis])


def random_columns(in_features: int, rank: int, *, seed: int, group: str) -> Tensor:
    """`rank` distinct columns, uniformly at random.

    Returns (rank,) int64, strictly increasing. A smaller rank's columns are a subset of a larger one's, so layers of
    one group with different ranks still overlap. Source: PaCA, arXiv 2503.01905, section 3.
    """
    import torch

    order = torch.randperm(in_features, generator=_generator(seed, group), device="cpu")
    return order[:rank].sort().values


def score_magnitude(weight_oi: Tensor, *, seed: int, name: str) -> Tensor:  # noqa: ARG001  one signature for weights
    """The squared norm of each column. (i,) float64.

    Source: the usual criterion of pruning (Han et al. 2015, arXiv 1506.02626, section 3), here for what to train.
    """
    return weight_oi.float().square().sum(0).double()


def score_lowrank(weight_oi: Tensor, *, seed: int, name: str) -> Tensor:
    """The squared norm of each column of the weight's best low-rank approximation. (i,) float64.

    Source: LIFT, arXiv 2506.00772, section 3 (it trains the approximation's largest entries, we its largest columns);
    the approximation by subspace iteration from a drawn start: Halko et al. 2011, arXiv 0909.4061, algorithm 4.4.
    """
    import torch

    weight = weight_oi.float()
    smaller = min(weight.shape)
    rank = max(1, min(LOW_RANK, smaller // LOW_RANK_PART))
    width = min(smaller, rank + OVERSAMPLED)
    start = torch.randn((weight.shape[1], width), generator=_generator(seed, f"{name}/lowrank")).to(weight)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    _, sizes, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    kept = sizes[:rank, None] * right[:rank]
    score: Tensor = kept.square().sum(0).double()
    return score


def score_activation(x: Tensor, *, out_features: int) -> Tensor:
    """The squared norm of each channel of the inputs x (.., i), for each value of its column. (i,) float64.

    A column's gradient is an outer product with its input: where that is large, so is what can be learnt. Source: the
    input norms of Wanda, arXiv 2306.11695, section 3.
    """
    return x.detach().float().reshape(-1, x.shape[-1]).square().sum(0).double() * out_features


def score_gradient(gradient_oi: Tensor, weight_oi: Tensor) -> Tensor:  # noqa: ARG001  one signature for gradients
    """The squared norm of each column's gradient: what a small step along it lowers the loss by. (i,) float64.

    Source: SMT, arXiv 2405.15525, section 3 (blocks by gradient), and TraDy, ICLR 2026 (channels and layers by it).
    """
    return gradient_oi.float().square().sum(0).double()


def score_activation_gradient(gradient_oi: Tensor, weight_oi: Tensor) -> Tensor:
    """The square of activation times gradient of each input channel, summed over a batch. (i,) float64.

    For a channel the sum over inputs of x dx equals that over outputs of W dW, so it takes no gradient of the input.
    Source: Molchanov et al. 2017, arXiv 1611.06440, section 2.2 (the first term of Taylor's series).
    """
    score: Tensor = (gradient_oi.float() * weight_oi.detach().float()).sum(0).double().square()
    return score


@dataclass(frozen=True)
class Strategy:
    """A way to choose columns. looks_at: what `score` is given; empty where nothing is looked at."""

    name: str
    score: Callable[..., Tensor]
    looks_at: str = ""


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(RANDOM, random_columns),
        Strategy("magnitude", score_magnitude, WEIGHTS),
        Strategy("lowrank", score_lowrank, WEIGHTS),
        Strategy("activation", score_activation, INPUTS),
        Strategy("gradient", score_gradient, GRADIENTS),
        Strategy("activation-gradient", score_activation_gradient, GRADIENTS),
    )
}


STORED = "stored"  # columns that came with an adapter's values, from PEFT or from several adapters: never chosen


def require_strategy(name: str) -> None:
    """Raises RequestError for a strategy that is not in the table, and is no `file:PATH`."""
    if not isinstance(name, str):
        raise TypeError(f"select {name!r}")
    if name not in (*STRATEGIES, STORED) and not (is_file(name) and name != FILE):
        raise RequestError(
            "--select",
            f"unknown strategy {name!r}",
            expected=f"one of {', '.join(STRATEGIES)} or {FILE}PATH",
            fix=closest(name, STRATEGIES),
        )


def takes_data(select: str) -> bool:
    """Whether a known strategy takes a calibration set."""
    return select in STRATEGIES and STRATEGIES[select].looks_at in (INPUTS, GRADIENTS)


def is_file(select: str) -> bool:
    """Whether columns are named by a file."""
    return select.startswith(FILE)


def choose_columns(strategy: str, in_features: int, rank: int, *, seed: int, group: str) -> Tensor:
    """The columns of one layer where the seed alone decides: (rank,) int64, strictly increasing.

    Raises: RequestError for an unknown strategy, UnsupportedError for one that has to look at something.
    """
    require_strategy(strategy)
    refuse_stored(strategy)
    if strategy != RANDOM:
        found = "columns that nobody has chosen yet"
        raise UnsupportedError(f"--select {strategy}", found, expected="an adapter made by apply, or surgery.attach")
    return random_columns(in_features, rank, seed=seed, group=group)


def refuse_stored(strategy: str) -> None:
    """Raises RequestError where columns would have to be chosen for a plan whose columns are an adapter's own."""
    if strategy == STORED:
        raise RequestError(
            "--select",
            f"{STORED!r}, which adapters say whose columns were read from elsewhere",
            expected=f"one of {', '.join(STRATEGIES)}",
            fix="Import or unite again, with the --task that is wanted, or apply anew",
        )


def columns_key(columns: Tensor) -> bytes:
    """What two layers have in common whose columns are equal."""
    return columns.numpy().tobytes()


# --- from scores to columns


@dataclass(frozen=True)
class Choice:
    """What was chosen, by module: columns (r,) int64, strictly increasing; scores (i,) where draws will follow."""

    columns: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = field(default_factory=dict)


def top_columns(scores_i: Tensor, rank: int, *, seed: int, group: str) -> Tensor:
    """The `rank` columns of the largest scores: (rank,) int64, strictly increasing; nested as ranks grow."""
    import torch

    order = torch.randperm(len(scores_i), generator=_generator(seed, group), device="cpu")
    best = scores_i[order].argsort(descending=True, stable=True)
    return order[best[:rank]].sort().values


def drawn_columns(
    in_features: int, rank: int, *, seed: int, group: str, draw: int, weights_i: Tensor | None = None
) -> Tensor:
    """The columns of a later draw: (rank,) int64, strictly increasing. A function of its arguments.

    weights_i: how likely each is; None: all alike. Source: Efraimidis and Spirakis 2006, weighted sampling without
    replacement, by the order of log(u) / w.
    """
    import torch

    name = f"{group}#{draw}"
    if weights_i is None:
        return random_columns(in_features, rank, seed=seed, group=name)
    lots = torch.rand(in_features, generator=_generator(seed, name), dtype=torch.float64).clamp_min(1e-300)
    keys = -(-lots.log()).log() + weights_i.double().log()  # the same order, without an overflow
    return top_columns(keys, rank, seed=seed, group=name)


@dataclass(frozen=True)
class GroupScores:
    """A group as a budget sees it: its columns' scores (i,) float64, and how many values each of them has."""

    group: str
    scores: Tensor
    values_each: int


def even_scores(group: str, in_features: int, values_each: int, *, seed: int) -> GroupScores:
    """Scores by which a budget gives every group the same part of its columns."""
    import torch

    order = torch.randperm(in_features, generator=_generator(seed, group), device="cpu")
    scores = torch.empty(in_features, dtype=torch.float64)
    scores[order] = (1 - torch.arange(in_features, dtype=torch.float64) / in_features) * values_each
    return GroupScores(group, scores, values_each)


def spread(groups: Sequence[GroupScores], budget: int) -> dict[str, int]:
    """How many columns each group gets of a budget in values: the best by score for each value, until one fits no more.

    So less than one column of the budget is left over. Groups that get none are missing.
    Raises: RequestError where no column fits, or all columns are fewer.
    """
    import torch

    each = [torch.full((len(entry.scores),), entry.values_each) for entry in groups]
    costs, total = torch.cat(each), sum(int(part.sum()) for part in each)
    if budget > total:
        expected = f"at most {total:,}, all values of these layers"
        raise RequestError("--budget", f"{budget:,} values", expected=expected, fix="Lower it, or widen --targets")
    density = torch.cat([entry.scores.double() / entry.values_each for entry in groups])
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(e.scores) for e in groups]))
    order = density.argsort(descending=True, stable=True)
    fits = int((costs[order].cumsum(0) <= budget).sum())
    if not fits:
        found = f"{budget:,} values, and the first column has {int(costs[order[0]]):,}"
        raise RequestError("--budget", found, expected="enough for one column", fix="Raise it")
    counts = torch.bincount(owner[order[:fits]], minlength=len(groups)).tolist()
    return {entry.group: count for entry, count in zip(groups, counts, strict=True) if count}


# --- what options say


def budget_values(text: str, total: int) -> int:
    """A budget in values: `100000`, or `0.5%` of a `total`. Raises: RequestError."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?|\.\d+)%", text)
    if not match:
        raise RequestError("--budget", repr(text), expected="a number of values, or a part such as 0.5%")
    values = int(match[1]) if match[1] else int(total * float(match[2]) / 100)
    if not values:
        raise RequestError("--budget", f"{text}, which is not one value", expected="more", fix="Raise it")
    return values


def resample_steps(text: str) -> int:
    """`every:500` as 500; the empty text, for never, as 0. Raises: RequestError."""
    match = re.fullmatch(r"every:([1-9]\d*)", text)
    if text and not match:
        raise RequestError("--resample", repr(text), expected="every:STEPS, such as every:500")
    return int(match[1]) if match else 0


def read_columns_file(path: Path) -> dict[str, Tensor]:
    """Columns by module from a file: (r,) int64 each, strictly increasing.

    JSON: {"model.layers.0.mlp.up_proj": [3, 8, ..], ..}; safetensors: `<module>.columns`, as in an adapter; a folder:
    that of an adapter. Raises: RequestError.
    """
    import torch

    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise RequestError(
            f"--select {FILE}{path}", "no such file", expected="JSON or an adapter", fix="Check the path"
        )
    named: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            ending = ".columns"
            named = {n.removesuffix(ending): t.tolist() for n, t in load_file(path).items() if n.endswith(ending)}
        else:
            named = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # safetensors has errors of its own kind
        found = f"it cannot be read ({shorten(str(error), 160)})"
        raise RequestError(f"--select {FILE}{path}", found, expected="JSON or safetensors") from error
    if not isinstance(named, dict) or not named:
        raise RequestError(f"--select {FILE}{path}", "no columns by module", expected='{"MODULE": [COLUMN, ..], ..}')
    for module, columns in named.items():
        is_list = isinstance(columns, list) and bool(columns) and all(type(c) is int and c >= 0 for c in columns)
        if not is_list or len(set(columns)) != len(columns):
            found = f"{module}: {shorten(str(columns), 60)}"
            raise RequestError(f"--select {FILE}{path}", found, expected="a list of distinct column numbers")
    return {module: torch.tensor(sorted(columns), dtype=torch.int64) for module, columns in named.items()}
