"""Which layers a request means: sites, patterns, and an error where a pattern means nothing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import SelectorError, closest

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
EXPERTS = "experts"


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of a model.

    `input_axis` is the axis of the weight that the inputs run along: 1 for `nn.Linear` (out, in), 0 for GPT-2's
    `Conv1D` (in, out). `is_head`: it makes the model's output. `tied_with`: another module holding the same storage.
    `parameter` and `sizes` are as a `Target` has them.
    A tensor of a mixture's experts is no layer: of it `holder` and `place` are as a `Target` has them, too.
    """

    module: str
    out_features: int
    in_features: int
    input_axis: int
    is_head: bool = False
    tied_with: str = ""
    parameter: str = "weight"
    sizes: tuple[int, ...] = ()
    holder: str = ""
    place: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        return f"{self.holder or self.module}.{self.parameter}"


def find_sites(model: nn.Module, heads: Iterable[str] = ()) -> tuple[LinearSite, ...]:
    """Every linear layer of a model, by name. `heads` are module names that make the output.

    Only the exact classes count: a subclass may read its weight without calling `forward` (nn.MultiheadAttention's
    output projection does), and would go untrained in silence.
    """
    from torch import nn as torch_nn

    from surgery.compat import is_conv1d
    from surgery.quantized import is_quantized

    heads = tuple(heads)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():  # noqa: SLF001  the module's own, not its children's
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    sites = []
    for name, module in model.named_modules():
        packed = is_quantized(module)
        if type(module) is not torch_nn.Linear and not is_conv1d(module) and not packed:
            continue
        axis = 0 if is_conv1d(module) else 1
        sizes = (module.out_features, module.in_features) if packed else tuple(module.weight.shape)
        out_features, in_features = int(sizes[1 - axis]), int(sizes[axis])
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        is_head = any(name == head or name.startswith(f"{head}.") for head in heads)
        sites.append(LinearSite(name, out_features, in_features, axis, is_head, others[0] if others else ""))
    return tuple(sorted(sites, key=lambda site: site.module))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a dotted name.

    `re:..` is a regular expression over the whole name; anything else is a glob over the whole name or over its last
    components, so `q_proj`, `self_attn.*_proj` and `model.layers.0.*` all work. `*` crosses dots.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def means(pattern: str, site: LinearSite) -> bool:
    """Whether a pattern means a site. `experts` means all tensors of experts."""
    return bool(site.holder) if pattern == EXPERTS else matches(pattern, site.module)


def check_pattern(pattern: str, option: str) -> None:
    """Raises SelectorError for a regular expression that does not compile or an empty pattern."""
    if not pattern:
        raise SelectorError(option, "an empty pattern", expected="a name, a glob or re:..")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise SelectorError(option, f"{pattern!r} is no regular expression ({error})") from error


def _nothing_matches(pattern: str, option: str, sites: Sequence[LinearSite]) -> SelectorError:
    names = [site.module for site in sites]
    tails = {name.rsplit(".", 1)[-1] for name in names}
    hint = closest(pattern, [*sorted(tails), *names])
    known = "" if hint else f"This model's linear layers end in: {', '.join(sorted(tails)[:20])}"
    return SelectorError(option, f"{pattern!r} matches no linear layer", expected="at least one", fix=hint or known)


def resolve(
    sites: Sequence[LinearSite], selectors: Sequence[str], *, exclude: Sequence[str] = ()
) -> tuple[LinearSite, ...]:
    """The sites that `selectors` mean and `exclude` does not, ordered by name.

    `all-linear` is every linear layer but heads and tied ones, `experts` every tensor of experts.
    Raises: SelectorError: a selector or an exclusion that matches nothing, a tied layer asked for by name, or nothing
    left.
    """
    chosen: dict[str, LinearSite] = {}
    for selector in selectors:
        chosen.update({site.module: site for site in _select_one(sites, selector)})
    for pattern in exclude:
        check_pattern(pattern, "--exclude")
        hit = [name for name, site in chosen.items() if means(pattern, site)]
        if not hit:
            raise _nothing_matches(pattern, "--exclude", list(chosen.values()))
        for name in hit:
            del chosen[name]
    if not chosen:
        raise SelectorError(
            "--targets",
            "no layer is left to train",
            expected="at least one linear layer",
            fix="Widen --targets or drop an --exclude",
        )
    return tuple(chosen[name] for name in sorted(chosen))


def _select_one(sites: Sequence[LinearSite], selector: str) -> list[LinearSite]:
    check_pattern(selector, "--targets")
    if selector == ALL_LINEAR:
        return [site for site in sites if not site.is_head and not site.tied_with and not site.holder]
    hit = [site for site in sites if means(selector, site)]
    if not hit:
        raise _nothing_matches(selector, "--targets", sites)
    for site in hit:
        if site.tied_with:
            found = f"{selector!r} matches {site.module}, whose weight is also {site.tied_with}'s"
            raise SelectorError(
                "--targets", found, expected="a weight of its own", fix=f"Leave it out with --exclude {site.module}"
            )
    return hit


def rank_of(site: LinearSite, rank: int, rank_pattern: Mapping[str, int]) -> int:
    """A site's number of trained columns: the last pattern that means it decides, else `rank`.

    Raises: SelectorError: not between 1 and the layer's width.
    """
    ranks = [rank, *(value for pattern, value in rank_pattern.items() if means(pattern, site))]
    if not 1 <= ranks[-1] <= site.in_features:
        raise SelectorError(
            "--rank",
            f"{ranks[-1]} for {site.module}",
            expected=f"1 to {site.in_features}, its width",
            fix="Lower --rank, or give this layer its own with --rank-pattern",
        )
    return ranks[-1]


def ranks_of(sites: Sequence[LinearSite], rank: int, rank_pattern: Mapping[str, int]) -> dict[str, int]:
    """Every site's rank. Raises SelectorError also for a rank pattern that decides no layer."""
    for pattern in rank_pattern:
        check_pattern(pattern, "--rank-pattern")
    ranks = {site.module: rank_of(site, rank, rank_pattern) for site in sites}
    for number, pattern in enumerate(rank_pattern):
        later = list(rank_pattern)[number + 1 :]
        decided = [s for s in sites if means(pattern, s) and not any(means(p, s) for p in later)]
        if not decided:
            raise _nothing_matches(pattern, "--rank-pattern", sites)
    return ranks
