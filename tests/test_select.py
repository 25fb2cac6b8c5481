"""Which layers a request means, and the sentence it gets when it means none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from surgery.errors import SelectorError
from surgery.select import LinearSite, find_sites, matches, rank_of, ranks_of, resolve

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SITES = (
    *(LinearSite(f"model.layers.{n}.{layer}", 32, 48 if "down" in layer else 32, 1) for n in (0, 1, 10) for layer in
      LAYERS),
    LinearSite("lm_head", 128, 32, 1, is_head=True),
    LinearSite("model.shared_proj", 32, 32, 1, tied_with="model.embed"),
)  # fmt: skip


def chosen(*selectors: str, exclude: tuple[str, ...] = ()) -> list[str]:
    """The names that a request means, `model.layers.` left out."""
    return [site.module.removeprefix("model.layers.") for site in resolve(SITES, selectors, exclude=exclude)]


def test_all_linear_leaves_out_the_head_and_tied_weights() -> None:
    """Every linear layer but those two, sorted by name."""
    assert chosen("all-linear") == sorted(f"{n}.{layer}" for n in (0, 1, 10) for layer in LAYERS)


@pytest.mark.parametrize(
    ("selector", "expected"),
    (
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj", "10.self_attn.q_proj"]),
        ("mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj", "10.mlp.up_proj"]),
        ("model.layers.1.mlp.*", ["1.mlp.down_proj", "1.mlp.up_proj"]),
        ("layers.1.*_proj", [f"1.{layer}" for layer in sorted(LAYERS)]),
        ("layers.[01].mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (r"re:model\.layers\.\d\.mlp\.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (r"re:.*\.10\..*k_proj", ["10.self_attn.k_proj"]),
        ("lm_head", ["lm_head"]),
    ),
)
def test_a_pattern_means_whole_components(selector: str, expected: list[str]) -> None:
    """Names, tails, globs and regular expressions over the whole name; a head is trained when it is named."""
    assert chosen(selector) == expected


@pytest.mark.parametrize(
    ("pattern", "name"),
    (("proj", "a.q_proj"), ("q_proj", "a.xq_proj"), ("re:q_proj", "a.q_proj"), ("Q_PROJ", "a.q_proj"), ("a", "a.b")),
)
def test_a_part_of_a_component_means_nothing(pattern: str, name: str) -> None:
    """No identity by substring, and case counts."""
    assert not matches(pattern, name)


def test_exclude_takes_away() -> None:
    """What one selector brings in an exclusion takes out again."""
    assert chosen("self_attn.*", exclude=("layers.1.*", "o_proj", "re:.*10.*")) == [
        "0.self_attn.k_proj",
        "0.self_attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("selectors", "exclude", "text"),
    (
        (("q_porj",), (), "'q_porj' matches no linear layer, expected at least one. The closest is 'q_proj'"),
        (("wqkv",), (), "This model's linear layers end in: down_proj, k_proj, lm_head"),
        (("q_proj", "embed"), (), "'embed' matches no linear layer"),
        (("q_proj",), ("v_proj",), "--exclude: 'v_proj' matches no linear layer"),
        (("q_proj",), ("up_proj",), "--exclude: 'up_proj' matches no linear layer"),
        (("q_proj",), ("q_proj",), "no layer is left to train"),
        ((), (), "no layer is left to train"),
        (("",), (), "an empty pattern"),
        (("re:(",), (), "is no regular expression"),
        (("q_proj",), ("re:[",), "is no regular expression"),
        (("shared_proj",), (), "whose weight is also model.embed's"),
    ),
)
def test_a_request_that_means_nothing_is_an_error(
    selectors: tuple[str, ...], exclude: tuple[str, ...], text: str
) -> None:
    """Every selector and every exclusion has to match; the message names the closest layer."""
    with pytest.raises(SelectorError) as caught:
        resolve(SITES, selectors, exclude=exclude)
    assert text in str(caught.value)
    assert caught.value.exit_code == 2


@PROPERTY
@given(
    selectors=st.lists(st.sampled_from(["all-linear", *LAYERS, "layers.1.*", "re:.*mlp.*", "lm_head"]), min_size=1),
    data=st.data(),
)
def test_order_and_repetition_of_selectors_mean_nothing(selectors: list[str], data: st.DataObject) -> None:
    """The result is sorted, without repetition, and the union of what each selector means."""
    result = resolve(SITES, selectors)
    assert result == resolve(SITES, data.draw(st.permutations(selectors)))
    assert result == resolve(data.draw(st.permutations(SITES)), selectors)
    names = [site.module for site in result]
    assert names == sorted(set(names))
    assert set(result) == {site for selector in selectors for site in resolve(SITES, [selector])}


def test_the_last_rank_pattern_decides() -> None:
    """Patterns are read in order; a layer that none means has the common rank."""
    sites = resolve(SITES, ["q_proj", "up_proj"])
    ranks = ranks_of(sites, 4, {"q_proj": 8, "layers.1.*": 2, "layers.1.mlp.*": 3})
    assert {name.removeprefix("model.layers."): rank for name, rank in ranks.items()} == {
        "0.mlp.up_proj": 4,
        "0.self_attn.q_proj": 8,
        "1.mlp.up_proj": 3,
        "1.self_attn.q_proj": 2,
        "10.mlp.up_proj": 4,
        "10.self_attn.q_proj": 8,
    }


@pytest.mark.parametrize(
    "pattern", ({"v_proj": 8}, {"down_proj": 8}, {"q_proj": 8, "self_attn.*": 2}, {"": 2}, {"re:(": 2})
)
def test_a_rank_pattern_that_decides_nothing_is_an_error(pattern: dict[str, int]) -> None:
    """Unknown, not selected, or overruled everywhere by a later one: a setting that would be ignored is refused."""
    with pytest.raises(SelectorError, match="--rank-pattern"):
        ranks_of(resolve(SITES, ["q_proj"]), 4, pattern)


@pytest.mark.parametrize("rank", (-1, 0, 33))
def test_a_rank_beyond_the_width_is_an_error(rank: int) -> None:
    """Between one and the layer's number of inputs, in the rank pattern too."""
    site = SITES[0]
    with pytest.raises(SelectorError, match=f"--rank: {rank} for {site.module}, expected 1 to 32"):
        rank_of(site, rank, {})
    with pytest.raises(SelectorError, match="expected 1 to 32"):
        rank_of(site, 4, {"q_proj": rank})
    assert rank_of(site, 32, {}) == 32


class Mixed(nn.Module):
    """A bit of everything that looks linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.conv1d = Conv1D(5, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.head = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
        self.header = nn.Linear(5, 7)
        self.embed = nn.Embedding(6, 5)
        self.tied = nn.Linear(5, 6, bias=False)
        self.tied.weight = self.embed.weight
        self.shared = self.linear


def test_sites_of_a_model() -> None:
    """Linear and Conv1D with their axes; no subclass, no other class; heads by module, not by prefix of a name."""
    found = {site.module: site for site in find_sites(Mixed(), heads=["head"])}
    assert list(found) == ["conv1d", "head.0", "head.1", "header", "linear", "tied"]
    assert found["linear"] == LinearSite("linear", 5, 3, 1)
    assert found["conv1d"] == LinearSite("conv1d", 5, 3, 0)
    assert [name for name, site in found.items() if site.is_head] == ["head.0", "head.1"]
    assert (found["tied"].tied_with, found["header"].tied_with) == ("embed", "")


def test_a_parametrized_layer_is_no_site() -> None:
    """Its weight is computed, so that trained columns of it would be lost."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    assert [site.module for site in find_sites(model)] == ["1"]
