"""Comparing checkpoints: what differs is found to the value, and nothing that is equal is reported."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters.dense import export
from surgery import compare as module
from surgery.compare import DTYPE, IDENTICAL, ONLY_A, ONLY_B, SHAPE, VALUES, TensorComparison, compare
from surgery.errors import DamagedError, NotAModelError, RequestError
from surgery.methods.paca_spec import PacaSpec
from surgery.survey import TaskSpec
from surgery.tensorfile import build_header
from tests.conftest import TinyModel
from tests.trained import make_adapter, make_read_adapter


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A folder that holds a checkpoint of these tensors and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # it refuses tensors that share memory
    safetensors.torch.save_file(copies, folder / "model.safetensors")
    return folder


def one(tmp_path: Path, a: Tensor, b: Tensor) -> TensorComparison:
    """The comparison of two checkpoints that hold one tensor each."""
    (result,) = compare(write(tmp_path / "a", {"x": a}), write(tmp_path / "b", {"x": b})).tensors
    return result


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_merge_differs_in_its_columns(family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Base against merge: the targets differ in exactly the planned columns, all else is identical."""
    base = tiny_model(family, dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", PacaSpec(rank=3))
    export(adapter, tmp_path / "merged")
    result = compare(base, tmp_path / "merged")
    targets = {target.weight: target for target in adapter.plan.targets}
    assert {tensor.name for tensor in result.different} == set(targets)
    for tensor in result.different:
        target = targets[tensor.name]
        patch = adapter.delta.patches[target.module]
        assert tensor.status == VALUES
        assert tensor.lines is not None
        assert (tensor.lines.axis, tensor.lines.numbers) == (target.input_axis, tuple(patch.columns.tolist()))
        gap = (patch.stored().double() - patch.original.double()).abs()
        assert tensor.largest == float(gap.max())
        assert tensor.mean == pytest.approx(float(gap.sum() / (gap > 0).sum()))
        assert tensor.changed == int((gap > 0).sum())


def test_a_folder_equals_itself_however_it_is_cut(tiny_model: TinyModel) -> None:
    """The same weights in one file and in shards are identical."""
    result = compare(tiny_model("llama"), tiny_model("llama", max_shard_size="20KB"))
    assert result.is_identical
    assert result.counts == {IDENTICAL: len(result.tensors)}
    assert result.lines()[-1] == f"{len(result.tensors)} tensors: {len(result.tensors)} identical"
    assert result.to_dict()["tensors"] == []


def test_what_one_side_lacks_is_named(tmp_path: Path) -> None:
    """Only in A, only in B, another shape: each tensor has its status, by name, with dtype and shape."""
    x = torch.ones(2, 3)
    a = write(tmp_path / "a", {"both": x, "gone": x, "reshaped": x})
    b = write(tmp_path / "b", {"both": x, "new": x.half(), "reshaped": x.reshape(3, 2)})
    result = compare(a, b)
    assert {t.name: (t.status, t.in_a, t.in_b) for t in result.tensors} == {
        "both": (IDENTICAL, "F32 [2, 3]", "F32 [2, 3]"),
        "gone": (ONLY_A, "F32 [2, 3]", ""),
        "new": (ONLY_B, "", "F16 [2, 3]"),
        "reshaped": (SHAPE, "F32 [2, 3]", "F32 [3, 2]"),
    }
    assert not result.is_identical
    text = "\n".join(result.lines())
    assert "F32 [2, 3] -> F32 [3, 2]" in text
    assert text.endswith("4 tensors: 1 identical, 1 of another shape, 1 only in A, 1 only in B")


def test_another_dtype_is_compared_by_value(tmp_path: Path) -> None:
    """float32 against bfloat16: the rounding is measured; values that both can hold do not count as changed."""
    x = torch.tensor([[1.0, 1.001], [2.0, 3.0]])
    result = one(tmp_path, x, x.bfloat16())
    gap = abs(float(x[0, 1]) - float(x[0, 1].bfloat16()))
    assert (result.status, result.changed, result.largest) == (DTYPE, 1, gap)
    assert result.lines is not None
    assert (result.lines.name, result.lines.numbers) == ("column", (1,))
    exact = one(tmp_path / "exact", x.round(), x.round().bfloat16())
    assert (exact.status, exact.changed, exact.lines) == (DTYPE, 0, None)


def test_rows_are_named_where_they_are_fewer(tmp_path: Path) -> None:
    """Two rows of an embedding changed: rows, not the columns that they cross."""
    a = torch.zeros(6, 5)
    b = a.clone()
    b[[1, 4]] = 0.5
    result = one(tmp_path, a, b)
    assert result.lines is not None
    assert (result.lines.name, result.lines.count, result.lines.total, result.lines.numbers) == ("row", 2, 6, (1, 4))
    assert "2 of 6 rows: 1,4" in "\n".join(compare(tmp_path / "a", tmp_path / "b").lines())


def test_columns_are_named_where_they_are_the_smaller_part(tmp_path: Path) -> None:
    """Four of many columns of a weight with three outputs: these columns, not all three rows."""
    a = torch.zeros(3, 48)
    b = a.clone()
    b[:, [0, 7, 8, 40]] = 0.5
    write(tmp_path / "a", {"x": a})
    write(tmp_path / "b", {"x": b})
    assert "4 of 48 columns: 0,7-8,40" in "\n".join(compare(tmp_path / "a", tmp_path / "b").lines())


def test_where_all_differ_no_list_is_kept(tmp_path: Path) -> None:
    """A tensor trained whole says so, in one word and without a list of numbers."""
    result = one(tmp_path, torch.zeros(4, 6), torch.ones(4, 6))
    assert result.lines is not None
    assert (result.lines.count, result.lines.total, result.lines.numbers) == (4, 4, ())
    assert "all 4 rows" in "\n".join(compare(tmp_path / "a", tmp_path / "b").lines())


@pytest.mark.parametrize("shape", ((), (0,), (3, 0), (0, 3), (5,), (2, 3, 4)))
def test_every_shape_is_compared(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Scalars, empty tensors, vectors and stacks of matrices, equal and with their last value changed."""
    a = torch.zeros(shape)
    assert one(tmp_path / "same", a, a).status == IDENTICAL
    if a.numel():
        b = a.clone()
        b.view(-1)[-1] = 2.0
        result = one(tmp_path, a, b)
        assert (result.status, result.changed, result.largest, result.mean) == (VALUES, 1, 2.0, 2.0)
        if shape:
            assert result.lines is not None
            assert (result.lines.axis, result.lines.numbers) == (0, (shape[0] - 1,))


def test_bits_decide(tmp_path: Path) -> None:
    """A NaN equals itself, -0.0 is not 0.0, and a difference that is no number is counted and not averaged."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 0.0, 1.0, inf, 5.0])
    assert one(tmp_path / "same", x, x).status == IDENTICAL
    result = one(tmp_path, x, torch.tensor([nan, -0.0, inf, -inf, 5.5]))
    assert (result.changed, result.not_finite, result.largest, result.mean) == (4, 2, 0.5, 0.25)
    hopeless = one(tmp_path / "hopeless", torch.tensor([nan]), torch.tensor([1.0]))
    assert (hopeless.largest, hopeless.mean, hopeless.not_finite) == (None, None, 1)
    json.loads(json.dumps(compare(tmp_path / "a", tmp_path / "b").to_dict(), allow_nan=False))


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16))
def test_every_dtype_is_compared(dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers, booleans and all float widths."""
    a = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    result = one(tmp_path, a, torch.tensor([[0, 1], [1, 1]]).to(dtype))
    assert (result.status, result.changed, result.largest) == (VALUES, 1, 1.0)


@pytest.mark.parametrize(("dtype", "is_whole"), (("F8_E4M3", True), ("U32", True), ("F4", False)))
def test_types_without_numbers_are_compared_by_bytes(dtype: str, *, is_whole: bool, tmp_path: Path) -> None:
    """Types that torch or this tool cannot read as numbers are found equal or not, without a size of the difference."""
    shape = (4, 2)
    for name, fill in (("a", 0), ("b", 255)):
        header = build_header([("x", dtype, shape)], {})
        data = bytearray({"F8_E4M3": 8, "U32": 32, "F4": 4}[dtype])
        data[-1] = fill
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(header + data)
    (result,) = compare(tmp_path / "a", tmp_path / "b").tensors
    assert (result.status, result.changed, result.largest) == (VALUES, 1, None)
    assert (result.lines is not None) is is_whole
    assert compare(tmp_path / "a", tmp_path / "a").is_identical


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    block=st.sampled_from((1, 3, 8, 1 << 18)),
)
def test_any_set_of_changed_values_is_found(
    data: st.DataObject, rows: int, columns: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever values change, and wherever blocks are cut: their count, rows or columns, largest and mean."""
    a = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    picked = data.draw(st.sets(st.integers(0, a.numel() - 1), min_size=1))
    b = a.clone()
    for number in picked:
        b.view(-1)[number] += number + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_VALUES", block)
        result = one(tmp_path_factory.mktemp("any"), a, b)
    hit = {1: {number % columns for number in picked}, 0: {number // columns for number in picked}}
    sizes = (rows, columns)
    axis = min((1, 0), key=lambda number: (len(hit[number]) / sizes[number], len(hit[number])))
    total = sizes[axis]
    expected = tuple(sorted(hit[axis])) if len(hit[axis]) < total else ()
    assert result.lines is not None
    assert (result.lines.axis, result.lines.count, result.lines.numbers) == (axis, len(hit[axis]), expected)
    assert (result.changed, result.largest) == (len(picked), max(picked) + 1)
    assert result.mean is not None
    assert math.isclose(result.mean, sum(number + 1 for number in picked) / len(picked))


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Comparing 64 MB that differ everywhere needs a few blocks."""
    write(tmp_path / "a", {"x": torch.zeros(4096, 4096)})
    write(tmp_path / "b", {"x": torch.ones(4096, 4096)})
    tracemalloc.start()
    result = compare(tmp_path / "a", tmp_path / "b")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.tensors[0].changed == 4096 * 4096
    assert peak < 24e6


def test_adapters_and_other_folders_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter is no model: the message says to export it; a folder without weights is named."""
    base = tiny_model("llama")
    make_adapter(base, tmp_path / "adapter")
    for a, b in ((base, tmp_path / "adapter"), (tmp_path / "adapter", base)):
        with pytest.raises(RequestError, match="surgery export"):
            compare(a, b)
    with pytest.raises(NotAModelError):
        compare(base, tmp_path)
    whole = (base / "model.safetensors").read_bytes()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(DamagedError):
        compare(tmp_path / "short", base)


def test_an_adapter_is_told_how_it_is_exported(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Columns are merged; a side network has no dense equivalent."""
    base = tiny_model("llama")
    make_adapter(base, tmp_path / "paca")
    make_read_adapter(base, tmp_path / "read")
    for name, way in (("paca", r"--merge\."), ("read", r"--format remote-code \(or onnx\)\.")):
        with pytest.raises(RequestError, match=rf"surgery export {tmp_path / name} {way}$"):
            compare(base, tmp_path / name)


@pytest.mark.parametrize("is_turned", (False, True))
def test_what_stands_before_all_names_is_seen_through(
    tiny_model: TinyModel, tmp_path: Path, *, is_turned: bool
) -> None:
    """A classifier's class puts `bert.` before the base's names: the tensors are still compared, and it is said."""
    base = tiny_model("bert")
    bare = {name.removeprefix("bert."): safetensors_of(base)[name] for name in safetensors_of(base)}
    a, b = write(tmp_path / "bare", bare), base
    result = compare(b, a) if is_turned else compare(a, b)
    assert (result.prefix_a, result.prefix_b) == (("bert.", "") if is_turned else ("", "bert."))
    assert result.counts == {IDENTICAL: len(bare)}
    assert not result.is_identical
    assert {tensor.name for tensor in result.tensors} == set(bare)
    side = "A" if is_turned else "B"
    assert f"{side}: {base} (where names begin with bert., left out here)" in result.lines()
    assert result.to_dict()[f"prefix_{side.lower()}"] == "bert."


def test_a_classifier_is_compared_with_its_base(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of a base without a head and its merge: the columns that moved, the new head, and nothing else."""
    base = copy_bare(tiny_model("bert"), tmp_path / "base")
    adapter = make_adapter(
        base, tmp_path / "adapter", PacaSpec(rank=3), task=TaskSpec("sequence-classification", ("a", "b"))
    )
    assert adapter.plan.prefix == "bert."
    export(adapter, tmp_path / "merged")
    result = compare(base, tmp_path / "merged")
    assert result.prefix_b == "bert."
    targets = {target.weight for target in adapter.plan.targets}
    assert {tensor.name for tensor in result.different if tensor.status == VALUES} == targets
    assert {t.name for t in result.different if t.status != VALUES} == {w.weight for w in adapter.plan.whole}


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of one file."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def copy_bare(folder: Path, to: Path) -> Path:
    """BERT without its head, under the names of the model alone."""
    shutil.copytree(folder, to)
    tensors = safetensors_of(folder)
    write(to, {name.removeprefix("bert."): value for name, value in tensors.items() if name.startswith("bert.")})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    return to


def test_long_lists_are_cut_in_text_and_whole_in_json(tmp_path: Path) -> None:
    """Text shows the first columns, JSON all of them."""
    a = torch.zeros(300, 200)
    b = a.clone()
    b[:, ::2] = 1
    one(tmp_path, a, b)
    result = compare(tmp_path / "a", tmp_path / "b")
    (line,) = [line for line in result.lines() if line.startswith("x ")]
    assert "100 of 200 columns: 0,2,4," in line
    assert ",.. " in line
    assert len(line) < 150
    assert result.to_dict()["tensors"][0]["lines"]["numbers"] == tuple(range(0, 200, 2))
