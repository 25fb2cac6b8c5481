"""Several adapters of one base in one checkpoint: the union of their columns, and an error where they overlap."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surgery
from surgery.adapter import Adapter, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import ColumnDelta, require_columns
from surgery.errors import BaseMismatchError, CheckError, DamagedError, RequestError, UnsupportedError
from surgery.manifest import UNDO_FILE, parse_record, read_record
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply, attach_plan, load_base_model
from surgery.survey import TaskSpec
from surgery.union import unite
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.console import Console
from tests.test_merge import tensors_of, weights
from tests.test_verify import flip_bit
from tests.tiny import sample_inputs
from tests.trained import make_adapter, make_read_adapter

LAYER = "model.layers.0.self_attn.q_proj"
CLASSIFY = TaskSpec("sequence-classification", ("a", "b"))
ALL = ("names", "untouched tensors", "planned columns", "trained columns", "logits")


def disjoint(base: Path, root: Path) -> list[Path]:
    """Three adapters: a on attention; b on q_proj alone, with columns that a has not; c on one layer's MLP."""
    make_adapter(base, root / "a", PacaSpec(rank=4, targets=("self_attn.*",)), seed=1)
    taken = require_columns(open_adapter(root / "a").delta, "").patches[LAYER].columns
    for seed in range(100):
        b = apply(base, root / "b", PacaSpec(rank=3, targets=("q_proj",), seed=seed), overwrite=True)
        columns = [p.columns for p in require_columns(b.delta, "").patches.values()]
        others = [
            p.columns for m, p in require_columns(open_adapter(root / "a").delta, "").patches.items() if "q_p" in m
        ]
        if not any(torch.isin(mine, theirs).any() for mine, theirs in zip(columns, others, strict=True)):
            break
    assert not torch.isin(columns[0], taken).any()
    make_adapter(base, root / "b2", PacaSpec(rank=3, targets=("q_proj",), seed=seed), seed=2)
    shutil.rmtree(root / "b")
    make_adapter(base, root / "c", PacaSpec(rank=2, targets=("model.layers.1.mlp.*",)), seed=3)
    return [root / "a", root / "b2", root / "c"]


@pytest.fixture
def three(tiny_model: TinyModel, tmp_path: Path) -> list[Path]:
    """Three adapters of a tiny Llama that do not overlap."""
    return disjoint(tiny_model("llama", dtype=torch.bfloat16), tmp_path)


def test_three_adapters_make_one_verified_checkpoint(
    three: list[Path], tiny_model: TinyModel, tmp_path: Path, console: Console
) -> None:
    """Each column is that of the adapter that trained it, all else the base's; the record names all; undo works."""
    base, out = tiny_model("llama", dtype=torch.bfloat16), tmp_path / "out"
    done = console("export", *three, "--merge", "-o", out)
    assert done.code == 0, done.err
    merged, plain = Checkpoint.open(out), Checkpoint.open(base)
    expected = {name: plain.read_tensor(name) for name in plain}
    for folder in three:
        for patch in require_columns(open_adapter(folder).delta, "").patches.values():
            expected[patch.target.weight][:, patch.columns] = patch.stored()
    assert all(torch.equal(merged.read_tensor(name), value) for name, value in expected.items())
    record = read_record(out, "merged")
    assert [(out / parent["path"]).resolve() for parent in record.manifest.parents] == three
    assert {check.name: check.result for check in record.manifest.checks} == dict.fromkeys(ALL, "passed")
    assert record.manifest.adapter == {}
    assert {t.rank for t in record.plan.targets if "q_proj" in t.module} == {7}
    described = console("inspect", out)
    assert (described.code, "columns as they came" in described.out) == (0, True)
    assert console("undo", out, "-o", tmp_path / "again").code == 0
    assert tensors_of(tmp_path / "again") == tensors_of(base)
    assert weights(tmp_path / "again") == weights(base)


def test_the_order_of_the_adapters_does_not_matter(three: list[Path], tmp_path: Path) -> None:
    """Columns replace, nothing is added up: any order gives the same weights, and twice is once."""
    surgery.export(three, tmp_path / "one", check=False)
    surgery.export(three[::-1], tmp_path / "two", check=False)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert (tmp_path / "one" / UNDO_FILE).read_bytes() == (tmp_path / "two" / UNDO_FILE).read_bytes()


def test_rows_of_an_embedding_are_united(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The united target names the rows of both adapters, as the merge has them."""
    base = tiny_model("llama")
    for name, rows in (("a", (9, 3)), ("b", (5,))):
        make_adapter(base, tmp_path / name, PacaSpec(targets=("embed_tokens",), rows=rows))
    united = unite([open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")])
    (target,) = united.plan.targets
    assert target.rows == (3, 5, 9)
    assert require_columns(united.delta, "").patches[target.module].columns.tolist() == [3, 5, 9]
    surgery.export([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert read_record(tmp_path / "out", "merged").plan.targets[0].rows == (3, 5, 9)


def test_a_union_attached_computes_what_its_merge_does(
    three: list[Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Layers of one input whose columns now differ gather for themselves; those that are equal still share."""
    union = unite([open_adapter(folder) for folder in three])
    model = load_base_model(tiny_model("llama", dtype=torch.bfloat16), union.plan)
    attach_plan(model, union.plan, union.delta)
    surgery.export(three, tmp_path / "out", check=False)
    with torch.no_grad():
        expected = surgery.detach(model, merge=True).eval()(**sample_inputs("llama")).logits
        merged = load_base_model(tmp_path / "out", replace(union.plan, config={}))
        assert torch.equal(merged.eval()(**sample_inputs("llama")).logits, expected)
    groups = {
        target.module.rsplit(".", 1)[1]: target.group for target in union.plan.targets if "layers.0" in target.module
    }
    assert groups["k_proj"] == groups["v_proj"] != groups["q_proj"]


def test_experts_of_one_and_attention_of_another_are_united(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Experts are tensors of their own on disk, and one in memory: their union is verified, also by running it."""
    base = tiny_model("mixtral")
    make_adapter(base, tmp_path / "a", PacaSpec(rank=4, targets=("self_attn.*",)), seed=1)
    make_adapter(base, tmp_path / "b", PacaSpec(rank=3, targets=("experts",), experts="own"), seed=2)
    done = surgery.export([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert done.verification is not None
    assert {check.name: check.result for check in done.verification.checks} == dict.fromkeys(ALL, "passed")


def test_columns_that_were_drawn_anew_count_all(three: list[Path], tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter that trained other columns later holds all of them: each is in the union, by all ways out."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    drawn = apply(base, tmp_path / "drawn", PacaSpec(rank=2, targets=("down_proj",), resample="every:5", seed=1))
    delta = require_columns(drawn.delta, "")
    patches = {}
    for module, patch in delta.patches.items():
        more = torch.tensor([c for c in range(48) if c not in patch.columns][:3])
        columns = torch.cat([patch.columns, more]).sort().values
        original = Checkpoint.open(base).read_tensor(f"{module}.weight")[:, columns].contiguous()
        patches[module] = replace(
            patch, columns=columns, values=original.float() + 1, original=original, active=more[:2]
        )
    update_adapter(drawn, ColumnDelta(delta.plan, patches, {}), drawn.record.manifest)
    done = surgery.export([*three[:2], tmp_path / "drawn"], tmp_path / "out")
    assert done.verification is not None
    assert {check.name: check.result for check in done.verification.checks} == dict.fromkeys(ALL, "passed")
    merged = Checkpoint.open(tmp_path / "out")
    for module, patch in patches.items():
        assert torch.equal(merged.read_tensor(f"{module}.weight")[:, patch.columns], patch.stored())
    assert not read_record(tmp_path / "out", "merged").plan.spec.get("resample")
    notes = surgery.export(tmp_path / "drawn", tmp_path / "peft", format="peft-paca").notes
    assert not any("further columns" in note for note in notes)
    surgery.import_peft(tmp_path / "peft", tmp_path / "back", base=base)
    back = require_columns(open_adapter(tmp_path / "back").delta, "").patches
    assert all(torch.equal(back[m].stored(), p.stored()) for m, p in patches.items())


def test_what_is_still_untouched_is_counted(three: list[Path]) -> None:
    """The MLPs of the layer that nobody trains, and no attention."""
    union = unite([open_adapter(folder) for folder in three])
    left = {
        entry.pattern: entry.count
        for entry in union.plan.untouched
        if "mlp" in entry.pattern or "attn" in entry.pattern
    }
    assert left == {f"model.layers.*.mlp.{name}_proj.weight": 1 for name in ("gate", "up", "down")}


def test_an_overlap_is_an_error_that_lists_it(
    three: list[Path], tiny_model: TinyModel, tmp_path: Path, console: Console
) -> None:
    """By layer, column and adapter; nothing is written."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "d", PacaSpec(rank=4, targets=(f"{LAYER[:-6]}[qk]_proj",)), seed=4)
    code, _, error = console("export", *three, tmp_path / "d", "--merge", "-o", tmp_path / "out")
    columns = require_columns(open_adapter(tmp_path / "d").delta, "").patches[LAYER].columns.tolist()
    assert code == UnsupportedError.exit_code
    assert "8 columns of 2 layers trained more than once" in error
    assert f"{LAYER}, columns {', '.join(map(str, columns))} by {three[0]} and {tmp_path / 'd'}" in error
    assert str(three[1]) not in error
    assert not (tmp_path / "out").exists()


def test_a_head_trained_twice_is_an_overlap(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Whole tensors are named; columns of one and a head of another are none."""
    base = tiny_model("llama")
    one = make_adapter(base, tmp_path / "one", PacaSpec(rank=2, targets=("q_proj",)), task=CLASSIFY)
    two = make_adapter(base, tmp_path / "two", PacaSpec(rank=2, targets=("up_proj",)), task=CLASSIFY)
    with pytest.raises(UnsupportedError, match=r"score\.weight whole by .*one and .*two"):
        unite([one, two])


def test_many_overlapping_layers_are_counted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The same seed for both: the first layers are listed, the rest counted."""
    base = tiny_model("llama")
    one, two = (make_adapter(base, tmp_path / name, PacaSpec(rank=12), seed=1) for name in ("one", "two"))
    with pytest.raises(UnsupportedError, match=r"168 columns of 14 layers .* \.\. \(12\) by .*; and 2 more layers\)"):
        unite([one, two])


def test_adapters_of_other_bases_tasks_and_methods_are_refused(
    three: list[Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Two bases, by digest, also where they touch other layers; a head's task; a side network; one twice."""
    a = open_adapter(three[0])
    elsewhere = tiny_model("llama", dtype=torch.bfloat16, seed=1)
    same_layer = make_adapter(elsewhere, tmp_path / "x", PacaSpec(rank=1, targets=("k_proj",), seed=9))
    with pytest.raises(
        BaseMismatchError, match=r"k_proj\.weight of its base has sha256 .* the base that .*/a was made for"
    ):
        unite([a, same_layer])
    other_layer = make_adapter(elsewhere, tmp_path / "y", PacaSpec(rank=1, targets=("up_proj",)))
    with pytest.raises(BaseMismatchError, match=f"for {other_layer.folder}: .*up_proj.weight has sha256"):
        unite([a, other_layer])
    base = tiny_model("llama", dtype=torch.bfloat16)
    classifier = make_adapter(base, tmp_path / "z", PacaSpec(rank=1, targets=("up_proj",)), task=CLASSIFY)
    with pytest.raises(RequestError, match="its model is LlamaForSequenceClassification, expected LlamaForCausalLM"):
        unite([a, classifier])
    with pytest.raises(UnsupportedError, match="side network"):
        unite([a, make_read_adapter(base, tmp_path / "read", ReadSpec(hidden=4))])
    with pytest.raises(RequestError, match="stands 2 times, expected each adapter once"):
        unite([a, open_adapter(three[0])])
    with pytest.raises(RequestError, match="no -o"):
        surgery.export(three)


# --- verify


def test_verify_finds_each_adapter_s_columns(three: list[Path], tmp_path: Path) -> None:
    """A bit in a column of any adapter, a column that belongs to none, and adapters that are gone or named by hand."""
    out = tmp_path / "out"
    surgery.export(three, out, check=False)
    assert verify(out, numeric=False, adapter=three[::-1]).checks[3].result == "passed"
    for folder in three:
        patch = next(iter(require_columns(open_adapter(folder).delta, "").patches.values()))
        flip_bit(out, patch.target.weight, (3, int(patch.columns[1])))
        with pytest.raises(CheckError, match="its columns are not what was trained"):
            verify(out, numeric=False)
        flip_bit(out, patch.target.weight, (3, int(patch.columns[1])))
    verify(out, numeric=False)
    with pytest.raises(RequestError, match="2 folders, expected all 3"):
        verify(out, numeric=False, adapter=three[:2])
    with pytest.raises(CheckError, match="it is not the adapter that was exported"):
        verify(out, numeric=False, adapter=[*three[:2], three[0]])
    three[1].rename(tmp_path / "gone")
    checks = {check.name: check for check in verify(out, numeric=False).checks}
    assert (checks["trained columns"].result, "one of 3" in checks["trained columns"].detail) == ("not run", True)


def test_a_column_of_no_adapter_is_found(three: list[Path], tmp_path: Path) -> None:
    """A record that forgets a parent would leave its columns unexplained."""
    out = tmp_path / "out"
    surgery.export(three, out, check=False)
    document = json.loads((out / RECORD_FILE).read_text())
    document["manifest"]["parents"] = document["manifest"]["parents"][:2]
    (out / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(CheckError, match="2 columns of no adapter"):
        verify(out, numeric=False)


def test_an_adapter_that_changed_meanwhile_is_said(three: list[Path], tmp_path: Path) -> None:
    """Training went on with one of them: the rest is still checked by bytes against the base."""
    out = tmp_path / "out"
    surgery.export(three, out, check=False)
    adapter: Adapter = open_adapter(three[2])
    delta = require_columns(adapter.delta, "")
    patches = {m: replace(p, values=p.values + 1) for m, p in delta.patches.items()}
    update_adapter(adapter, ColumnDelta(delta.plan, patches, {}), adapter.record.manifest)
    checks = {check.name: check for check in verify(out, numeric=False).checks}
    assert checks["planned columns"].result == "passed"
    assert "its adapter has changed since" in checks["trained columns"].detail


def test_a_union_leaves_by_the_other_ways_too(three: list[Path], tiny_model: TinyModel, tmp_path: Path) -> None:
    """LoRA and PEFT's PaCA hold the union; the latter read again merges to the same weights."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    surgery.export(three, tmp_path / "out", check=False)
    assert surgery.export(three, tmp_path / "lora", format="lora").out.is_dir()
    surgery.export(three, tmp_path / "peft", format="peft-paca")
    surgery.import_peft(tmp_path / "peft", tmp_path / "back", base=base)
    surgery.export(tmp_path / "back", tmp_path / "back-merged", check=False)
    assert weights(tmp_path / "back-merged") == weights(tmp_path / "out")


def test_records_without_parents_read_as_before(three: list[Path], tmp_path: Path) -> None:
    """A merge of one adapter says nothing of parents; malformed ones are damage."""
    surgery.export(three[0], tmp_path / "out", check=False)
    document = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert "parents" not in document["manifest"]
    document["manifest"]["parents"] = [{"path": 3}]
    with pytest.raises(DamagedError, match="parents: path is 3"):
        parse_record(document, "here")
