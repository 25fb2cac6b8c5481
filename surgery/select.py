"""Which layers a request means: sites, patterns, and an error where a pattern means nothing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import SelectorError, UnsupportedError, closest, counted

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"
LINEAR, CONVOLUTION, ATTENTION, EMBEDDING = "linear", "convolution", "attention", "embedding"
# What a selector for all of a kind means; packed attention is made of linear layers.
ALL: Mapping[str, tuple[str, ...]] = {ALL_LINEAR: (LINEAR, ATTENTION), ALL_CONV: (CONVOLUTION,)}
EXPERTS = "experts"


@dataclass(frozen=True)
class LinearSite:
    """A layer of a model whose columns could train: a linear one, or of another `kind`.

    `input_axis` is the axis of the weight that the inputs run along: 1 for `nn.Linear` (out, in), 0 for GPT-2's
    `Conv1D` (in, out). `is_head`: it makes the model's output. `tied_with`: another module holding the same storage.
    `parameter` and `sizes` are as a `Target` has them. `unfit`: why it cannot be opened; empty where it can.
    `is_narrow`: it has fewer inputs than the rank asked for, and all-conv leaves it out.

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
    kind: str = LINEAR
    unfit: str = ""
    is_narrow: bool = False

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

    heads, owners = tuple(heads), owners_of(model)
    sites = []
    for name, module in model.named_modules():
        packed = is_quantized(module)
        if type(module) is not torch_nn.Linear and not is_conv1d(module) and not packed:
            continue
        axis = 0 if is_conv1d(module) else 1
        sizes = (module.out_features, module.in_features) if packed else tuple(module.weight.shape)
        out_features, in_features = int(sizes[1 - axis]), int(sizes[axis])
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        tied_with = others[0] if others else ""
        sites.append(LinearSite(name, out_features, in_features, axis, is_within(name, heads), tied_with))
    return tuple(sorted(sites, key=lambda site: site.module))


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a dotted name is one of these, or of a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():  # noqa: SLF001  the module's own, not its children's
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


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
    hint = closest(pattern, [*ALL, *sorted(tails), *names])
    what = "layer" if any(site.kind != LINEAR for site in sites) else "linear layer"
    known = "" if hint else f"This model's {what}s end in: {', '.join(sorted(tails)[:20])}"
    if pattern == EXPERTS:
        hint = "This model holds no experts in one parameter: name layers"
    return SelectorError(option, f"{pattern!r} matches no {what}", expected="at least one", fix=hint or known)


def resolve(
    sites: Sequence[LinearSite], selectors: Sequence[str], *, exclude: Sequence[str] = ()
) -> tuple[LinearSite, ...]:
    """The sites that `selectors` mean and `exclude` does not, ordered by name.

    `all-linear` is every linear layer but heads and tied ones, `all-conv` every convolution likewise,
    `experts` every tensor of experts. Raises:
    SelectorError: a selector or an exclusion that matches nothing, a tied layer asked for by name, or nothing left;
    UnsupportedError: a selector that means layers alone that cannot be opened.
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
        raise _nothing_left(sites, selectors)
    return tuple(chosen[name] for name in sorted(chosen))


def _nothing_left(sites: Sequence[LinearSite], selectors: Sequence[str]) -> SelectorError:
    found, expected = "no layer is left to train", "at least one linear layer"
    fits = [site for site in sites if site.kind == CONVOLUTION and not site.unfit]
    if fits and ALL_CONV not in selectors:
        fix = f"Name its {len(fits)} convolutions with --targets {ALL_CONV}"
        return SelectorError("--targets", found, expected=expected, fix=fix)
    if ALL_CONV in selectors and not fits:
        found += f": {ALL_CONV} is named, and no convolution here can be opened"
        return SelectorError("--targets", found, expected="layers that can", fix=f"Name others, such as {ALL_LINEAR}")
    narrow = [site.in_features for site in fits if site.is_narrow]
    if narrow:
        found += (
            f": of {counted(len(narrow), 'convolution')} each has fewer channels than the rank, {max(narrow)} at most"
        )
        fix = "Lower -r, or give them a rank of their own with --rank-pattern"
        return SelectorError("--targets", found, expected="channels for that rank", fix=fix)
    return SelectorError("--targets", found, expected=expected, fix="Widen --targets or drop an --exclude")


def _select_one(sites: Sequence[LinearSite], selector: str) -> list[LinearSite]:
    check_pattern(selector, "--targets")
    if selector in ALL:
        kinds = ALL[selector]
        free = [
            site
            for site in sites
            if not (site.is_head or site.tied_with or site.unfit or site.is_narrow or site.holder)
        ]
        return [site for site in free if site.kind in kinds]
    named = [site for site in sites if means(selector, site) or _is_parameter(selector, site)]
    if not named:
        raise _nothing_matches(selector, "--targets", sites)
    hit = [site for site in named if not site.unfit]
    if not hit:
        raise UnsupportedError(
            "--targets",
            f"{selector!r} means {named[0].module}, a {named[0].unfit}",
            expected="a layer whose columns can train",
            fix="Name others",
        )
    for site in hit:
        if site.tied_with:
            found = f"{selector!r} matches {site.module}, whose weight is also {site.tied_with}'s"
            raise SelectorError(
                "--targets", found, expected="a weight of its own", fix=f"Leave it out with --exclude {site.module}"
            )
    return hit


def _is_parameter(selector: str, site: LinearSite) -> bool:
    """Of several weights in one module each can be named."""
    return site.kind == ATTENTION and matches(selector, site.name)


def asked_rank(site: LinearSite, rank: int, rank_pattern: Mapping[str, int]) -> int:
    """The number of columns asked for: the last pattern that means a site decides, else `rank`.

    Raises: SelectorError for a pattern that is none.
    """
    for pattern in rank_pattern:
        check_pattern(pattern, "--rank-pattern")
    return [rank, *(value for pattern, value in rank_pattern.items() if means(pattern, site))][-1]


def rank_of(site: LinearSite, rank: int, rank_pattern: Mapping[str, int]) -> int:
    """A site's number of trained columns. Raises: SelectorError: not between 1 and the layer's width."""
    asked = asked_rank(site, rank, rank_pattern)
    if not 1 <= asked <= site.in_features:
        raise SelectorError(
            "--rank",
            f"{asked} for {site.module}",
            expected=f"1 to {site.in_features}, its width",
            fix="Lower --rank, or give this layer its own with --rank-pattern",
        )
    return asked


def ranks_of(sites: Sequence[LinearSite], rank: int, rank_pattern: Mapping[str, int]) -> dict[str, int]:
    """Every site's rank. Raises SelectorError also for a rank pattern that decides no layer."""
    ranks = {site.module: rank_of(site, rank, rank_pattern) for site in sites}
    for number, pattern in enumerate(rank_pattern):
        later = list(rank_pattern)[number + 1 :]
        decided = [s for s in sites if means(pattern, s) and not any(means(p, s) for p in later)]
        if not decided:
            raise _nothing_matches(pattern, "--rank-pattern", sites)
    return ranks
