"""The trained columns are a function of the seed and the group's name, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.columns import choose_columns, generator_seed, read_columns_file
from surgery.errors import RequestError

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)


def drawn(in_features: int, rank: int, *, seed: int = 0, group: str = "model.layers.0.self_attn.q_proj") -> list[int]:
    """Columns as a list."""
    return choose_columns("random", in_features, rank, seed=seed, group=group).tolist()


def test_the_choice_never_changes() -> None:
    """Columns of a seed and a name are these, on any machine and in any version: adapters are made again from them."""
    assert drawn(64, 8) == [6, 16, 18, 37, 44, 49, 51, 58]
    assert drawn(64, 8, seed=1) == [16, 19, 31, 43, 45, 55, 59, 61]
    assert drawn(4096, 4, seed=-7, group="ünï.cødé") == [174, 2601, 3495, 3752]
    assert generator_seed(0, "a") == 8_342_909_361_095_637_454


@PROPERTY
@given(width=st.integers(1, 200), data=st.data(), seed=st.integers(), group=st.text())
def test_columns_are_strictly_increasing_and_nested(width: int, data: st.DataObject, seed: int, group: str) -> None:
    """int64, distinct, in range, sorted; a smaller rank's columns are among a larger one's."""
    rank = data.draw(st.integers(1, width))
    columns = choose_columns("random", width, rank, seed=seed, group=group)
    assert (columns.dtype, columns.shape) == (torch.int64, (rank,))
    assert bool((columns[1:] > columns[:-1]).all())
    assert int(columns[0]) >= 0
    assert int(columns[-1]) < width
    smaller = data.draw(st.integers(1, rank))
    assert set(drawn(width, smaller, seed=seed, group=group)) <= set(columns.tolist())


def test_nothing_around_the_call_matters() -> None:
    """Not the global generator, the default dtype, the device in force, the number of threads or earlier draws."""
    expected = drawn(64, 8)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    drawn(32, 8, group="another")
    assert drawn(64, 8) == expected
    assert torch.equal(torch.get_rng_state(), before)
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        with torch.device("meta"):
            assert drawn(64, 8) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_seeds_and_names_give_different_columns() -> None:
    """A hundred groups and a hundred seeds give a hundred choices each."""
    assert len({tuple(drawn(64, 8, group=str(n))) for n in range(100)}) == 100
    assert len({tuple(drawn(64, 8, seed=n)) for n in range(100)}) == 100
    assert drawn(64, 8, seed=1, group="2:x") != drawn(64, 8, seed=12, group="x")


def test_every_column_is_as_likely() -> None:
    """Over 2,000 groups each of 16 columns is drawn 500 times, give or take five standard deviations (19.4 each)."""
    counts = torch.zeros(16, dtype=torch.int64)
    for number in range(2000):
        counts[torch.tensor(drawn(16, 4, group=str(number)))] += 1
    assert int((counts - 500).abs().max()) < 97


def test_all_columns_are_all_columns() -> None:
    """The full rank is every column, in order."""
    assert drawn(7, 7) == list(range(7))


def test_an_unknown_strategy_is_named() -> None:
    """The error says which strategies there are and which is closest."""
    with pytest.raises(RequestError, match=r"unknown strategy 'randon'.*The closest is 'random'"):
        choose_columns("randon", 8, 2, seed=0, group="g")


def test_a_file_of_columns_that_is_not_there_is_said_without_the_systems_number(tmp_path: Path) -> None:
    """And so is a folder that is no adapter's."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RequestError, match=r"no such file, expected JSON or an adapter\. Check the path"):
            read_columns_file(path)
