"""Which input columns are trained: the strategies, one function each, in one table.

A strategy draws for a *group* (layers fed by the same tensor), from the group's name and the seed alone, so that the
choice does not depend on order, device, process or what else is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery.errors import RequestError, closest

if TYPE_CHECKING:
    from torch import Tensor


def generator_seed(seed: int, name: str) -> int:
    """A 63-bit seed that is a function of (seed, name) only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def random_columns(in_features: int, rank: int, *, seed: int, group: str) -> Tensor:
    """`rank` distinct columns, uniformly at random.

    Returns (rank,) int64, strictly increasing. A smaller rank's columns are a subset of a larger one's, so layers of
    one group with different ranks still overlap. Source: PaCA, arXiv 2503.01905, section 3.
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(generator_seed(seed, group))
    return torch.randperm(in_features, generator=generator, device="cpu")[:rank].sort().values


STRATEGIES: dict[str, Callable[..., Tensor]] = {"random": random_columns}
STORED = "stored"  # columns that came with an adapter's values, from PEFT or from several adapters: never chosen


def require_strategy(name: str) -> None:
    """Raises RequestError for a strategy that is not in the table."""
    if name not in STRATEGIES and name != STORED:
        raise RequestError(
            "--select",
            f"unknown strategy {name!r}",
            expected=f"one of {', '.join(STRATEGIES)}",
            fix=closest(name, STRATEGIES),
        )


def choose_columns(strategy: str, in_features: int, rank: int, *, seed: int, group: str) -> Tensor:
    """The columns of one layer: (rank,) int64, strictly increasing. Raises RequestError for an unknown strategy."""
    require_strategy(strategy)
    refuse_stored(strategy)
    return STRATEGIES[strategy](in_features, rank, seed=seed, group=group)


def refuse_stored(strategy: str) -> None:
    """Raises RequestError where columns would have to be chosen for a plan whose columns are an adapter's own."""
    if strategy == STORED:
        raise RequestError(
            "--select",
            f"{STORED!r}, which adapters say whose columns were read from elsewhere",
            expected=f"one of {', '.join(STRATEGIES)}",
            fix="Import or unite again, with the --task that is wanted, or apply anew",
        )
