"""What holds of files for every kind of layer and every way to hold a base: DESIGN.md's properties 1, 2, 3, 6, 8, 9.

What a kind computes (4: right after a step; 5: gradients) and keeps for backward (7) is in its own test file, by tests
whose names begin so; 1 with `--merge-base dequantized` in test_quantized.

| file | 4 | 5 | 7 |
|---|---|---|---|
| test_paca_conv | after_a_step | gradients_are_the_dense, one_image_without | what_backward_keeps |
| test_embedding_rows | after_a_step | gradients_are_the_dense | backward_keeps |
| test_paca_attention | after_a_step, an_encoder_layer | it_computes_what_torch_s, one_sequence | what_backward_keeps |
| test_experts | after_a_step | every_way_gives | backward_keeps, other_ways_keep |
| test_quantized | after_a_step, frozen_layers_of_a_live | gradients_are_those | backward_keeps, a_dense_weight_lives |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import dense
from exporters.undo import undo
from surgery import quantized
from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import require_columns
from surgery.errors import BaseMismatchError, RequestError
from surgery.lookup import require_extra
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, load
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from tests.conftest import TinyModel
from tests.failing import failing_at
from tests.trained import make_adapter

EXPERTS = PacaSpec(rank=4, targets=("experts",))
LAYERS: Mapping[str, tuple[str, PacaSpec, PacaSpec]] = {  # a family, a spec, and one that trains other layers beside
    "convolution": ("efficientnet", PacaSpec(rank=4, targets=("top_conv",)), PacaSpec(rank=4, targets=("all-conv",))),
    "embedding": (
        "llama", PacaSpec(rank=4, targets=("embed_tokens",), rows=(9, 3, 5)), PacaSpec(rank=4, rows=(3, 5, 9)),
    ),
    "attention": ("siglip", PacaSpec(rank=4, targets=("head.attention",)), PacaSpec(rank=4)),
    "experts, shared": ("mixtral", EXPERTS, replace(EXPERTS, targets=("all-linear", "experts"))),
    "experts, own": (
        "mixtral", replace(EXPERTS, experts="own"), replace(EXPERTS, experts="own", targets=("all-linear", "experts")),
    ),
}  # fmt: skip
HELD = tuple(quantized.KINDS)
KINDS = (*LAYERS, *HELD)


def spec_of(kind: str) -> tuple[str, PacaSpec, PacaSpec]:
    """The family of a kind, a spec, and one that trains more; of a base that is held so, the dense one's columns."""
    if kind in LAYERS:
        return LAYERS[kind]
    package = quantized.KINDS[kind].package
    pytest.importorskip(package, reason=f"needs the extra of {package}; of torchao: make test-torchao has it")
    require_extra(kind, package)
    narrow = PacaSpec(rank=4, targets=("o_proj", "up_proj"), quantize=kind)
    return "llama", narrow, PacaSpec(rank=4)


def overrides_of(kind: str) -> dict[str, Any]:
    """torchao's int4 takes widths that 32 divides."""
    return {"intermediate_size": 64} if kind in HELD else {}


def weights(folder: Path) -> bytes:
    """The bytes of a folder's weights."""
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    (*((kind, torch.float16) for kind in KINDS), *((kind, torch.bfloat16) for kind in HELD)),  # others: in their files
    ids=str,
)
def test_a_zero_step_merge_is_the_base(kind: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Byte for byte; also where training would see the base in fewer bits."""
    family, spec, _ = spec_of(kind)
    base = tiny_model(family, dtype=dtype, overrides=overrides_of(kind))
    dense.export(apply(base, tmp_path / "a", spec), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(base)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_twice_is_merging_once_and_can_be_undone(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The same bytes, the base's but for what trained; a merge is refused as a base; undo gives the base."""
    family, spec, _ = spec_of(kind)
    base = tiny_model(family, overrides=overrides_of(kind))
    adapter = make_adapter(base, tmp_path / "a", spec)
    once, twice = dense.export(adapter, tmp_path / "once"), dense.export(adapter, tmp_path / "twice")
    assert weights(once) == weights(twice) != weights(base)
    _require_rest_untouched(adapter, Checkpoint.open(base), Checkpoint.open(once))
    assert (once / "surgery.undo").read_bytes() == (twice / "surgery.undo").read_bytes()
    with pytest.raises(BaseMismatchError):
        dense.export(adapter, tmp_path / "thrice", base=once)
    assert weights(undo(once, tmp_path / "again")) == weights(base)


def _require_rest_untouched(adapter: Adapter, base: Checkpoint, merged: Checkpoint) -> None:
    """Of each tensor of a merge only the planned columns differ from the base's, bit for bit."""
    patches = require_columns(adapter.delta, "test").patches.values()
    trained = {patch.target.weight: patch for patch in patches}
    assert base.keys() == merged.keys()
    assert len(trained) == len(patches)
    for name in base.keys() - {whole.weight for whole in adapter.plan.whole}:
        before, after = base.read_tensor(name), merged.read_tensor(name)
        if name not in trained:
            assert torch.equal(after, before), name
            continue
        columns, axis = trained[name].columns, trained[name].target.input_axis
        differs = (before != after).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        assert torch.equal(differs, columns), name


@pytest.mark.parametrize("kind", HELD)
def test_merging_twice_into_what_training_saw_is_the_same(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Quantizing is a function of the file: each time it gives the same bytes."""
    family, spec, _ = spec_of(kind)
    adapter = make_adapter(tiny_model(family, overrides=overrides_of(kind)), tmp_path / "a", spec)
    once, twice = (dense.export(adapter, tmp_path / name, merge_base=dense.DEQUANTIZED) for name in ("once", "twice"))
    assert weights(once) == weights(twice)


def chosen(adapter: Adapter) -> dict[str, list[int]]:
    """Each layer's columns."""
    return {m: patch.columns.tolist() for m, patch in require_columns(adapter.delta, "test").patches.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_depend_on_seed_and_name_alone(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Not on what trains beside them, nor on how the base is held; another seed draws others, of rows none."""
    family, spec, wider = spec_of(kind)
    base = tiny_model(family, overrides=overrides_of(kind))
    alone = chosen(apply(base, tmp_path / "a", spec))
    beside = chosen(apply(base, tmp_path / "b", wider))
    assert alone == {module: beside[module] for module in alone}
    other = chosen(apply(base, tmp_path / "c", replace(spec, seed=1)))
    assert (other == alone) == bool(spec.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_comes_back_from_its_file(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """From JSON it is the same value with the same text; so is an adapter's from its folder."""
    family, spec, _ = spec_of(kind)
    base = tiny_model(family, overrides=overrides_of(kind))
    plan = plan_checkpoint(Checkpoint.open(base), spec)
    again = SurgeryPlan.from_dict(json.loads(plan.to_json()))
    assert (again, again.to_json()) == (plan, plan.to_json())
    written = apply(base, tmp_path / "a", spec)
    assert open_adapter(tmp_path / "a").plan == written.plan


def test_a_base_held_in_a_way_that_is_not_known_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As a later version may have it: with the documented error, and nothing is written."""
    spec_of("nf4")
    apply(tiny_model("llama"), tmp_path / "a", PacaSpec(rank=4, quantize="nf4"))
    record = json.loads((tmp_path / "a/surgery.json").read_text())
    record["plan"]["quantization"]["kind"] = "nf3"
    (tmp_path / "a/surgery.json").write_text(json.dumps(record))
    for read in (load, partial(dense.export, out=tmp_path / "out", merge_base=dense.DEQUANTIZED)):
        with pytest.raises(RequestError, match="unknown name 'nf3', expected one of nf4,"):
            read(open_adapter(tmp_path / "a") if read is not load else tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("merge_base", ("", dense.DEQUANTIZED), ids=("original", "dequantized"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_at_any_write_leaves_nothing(
    kind: str, merge_base: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever piece of the weights or small file cannot be written: no output, no remains, the inputs untouched."""
    if merge_base and kind not in HELD:
        pytest.skip("a dense base has one merge")
    family, spec, _ = spec_of(kind)
    base = tiny_model(family, overrides=overrides_of(kind))
    adapter = make_adapter(base, tmp_path / "a", spec)
    before = weights(base), (tmp_path / "a/adapter.safetensors").read_bytes()
    failures = 0
    for name in ("_pieces", "write_file", "write_undo"):
        for number in (1, 2, 3, 5, 8, 13, 1000):
            calls: list[int] = []
            with monkeypatch.context() as patched:
                patched.setattr(dense, name, _failing_pieces(number, calls) if name == "_pieces" else
                                failing_at(number, getattr(dense, name), calls))  # fmt: skip
                with suppress(OSError):
                    dense.export(adapter, tmp_path / "out", merge_base=merge_base)
            if len(calls) < number:
                break
            failures += 1
            assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
        shutil.rmtree(tmp_path / "out")
    assert failures > 3
    assert (weights(base), (tmp_path / "a/adapter.safetensors").read_bytes()) == before


def _failing_pieces(number: int, calls: list[int]) -> Callable[..., Any]:
    real = dense._pieces

    def pieces(*args: Any, **settings: Any) -> Any:
        for piece in real(*args, **settings):
            calls.append(1)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            yield piece

    return pieces
