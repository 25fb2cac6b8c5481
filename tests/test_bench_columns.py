"""A bench's settings of which columns train: chosen by its data, by a budget, anew in turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.bench.methods import trained
from surgery.bench.subject import build, enter, open_feed
from surgery.errors import RequestError
from surgery.paca_layers import layers
from surgery.resampling import Lane, held
from tests.benches import little, subject_of, text_data
from tests.conftest import TinyModel

METHODS = (
    "paca:r=4",
    "paca:r=4,select=gradient,calibration_rows=4",
    "paca:budget=paca:r=4,select=activation",
    "paca:budget=paca:r=4",
    "paca:r=4,resample=every:2",
)


def test_methods_that_choose_have_as_many_values(tiny_model: TinyModel, tmp_path: Path) -> None:
    """At equal values, within a column of a budget; the same data and seed give the same columns."""
    subject, entries = subject_of(tiny_model("llama"), *METHODS, data=text_data(tmp_path), learning_rates={"*": 1e-3})
    base, columns = build(subject), {}
    plain = sum(trained(enter(subject, entries[0], base).model).values())
    for entry in entries:
        model = enter(subject, entry, base).model
        values = sum(trained(model).values())
        assert plain - 64 < values <= plain, entry.name
        columns[entry.name] = {name: layer.paca_columns.tolist() for name, layer in layers(model).items()}
    assert columns[METHODS[1]] != columns[METHODS[0]]
    assert columns[METHODS[4]] == columns[METHODS[0]]
    again = enter(subject, entries[1], base).model
    assert columns[METHODS[1]] == {name: layer.paca_columns.tolist() for name, layer in layers(again).items()}


def test_columns_take_turns_in_a_bench(tiny_model: TinyModel) -> None:
    """After two steps others train, and both sets are held."""
    subject, (entry,) = subject_of(tiny_model("llama"), METHODS[4])
    contender = enter(subject, entry, build(subject))
    before = {name: layer.paca_columns.tolist() for name, layer in layers(contender.model).items()}
    for batch in open_feed(subject).batches(0, 2):
        contender.step(batch)
    after = {name: layer.paca_columns.tolist() for name, layer in layers(contender.model).items()}
    assert before != after
    for name, layer in layers(contender.model).items():
        assert held(Lane(layer)).columns.tolist() == sorted({*before[name], *after[name]})


@pytest.mark.parametrize("method", ("paca:r=4,budget=100", "paca:budget=100,values=200"))
def test_a_budget_is_a_size(method: str, tiny_model: TinyModel) -> None:
    """It stands for a rank, and beside none."""
    with pytest.raises(RequestError, match="one of the two"):
        subject_of(tiny_model("llama"), method)
    assert little(tiny_model("llama"), "paca:budget=1%").methods == ["paca:budget=1%"]
