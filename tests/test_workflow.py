"""The whole way: default names, finding the adapter, exports that appear only after their check, undo."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import surgery
from exporters import dense
from surgery import workflow
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import SideDelta
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    NotAModelError,
    OutputExistsError,
    RequestError,
    UnsupportedError,
)
from surgery.methods.paca_spec import PacaSpec
from surgery.verify import Verification
from surgery.workflow import default_adapter_folder, default_export_folder, export, find_adapter, undo
from tests.conftest import TinyModel, digest_folder
from tests.trained import make_adapter


@pytest.fixture
def adapter(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """`model-paca`, beside a copy of its model."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    return make_adapter(tmp_path / "model", tmp_path / "model-paca", PacaSpec(rank=4)).folder


# --- names


def test_an_adapter_is_named_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a folder, however it is written; in this folder for a hub id."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_adapter_folder(str(tmp_path / "model"), "paca") == tmp_path / "model-paca"
    assert default_adapter_folder(f"{tmp_path}/model/", "read") == tmp_path / "model-read"
    assert default_adapter_folder(".", "paca").resolve() == tmp_path / "model-paca"
    assert default_adapter_folder("org/name", "paca") == Path("name-paca")


def test_an_export_is_named_after_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-merged` for a checkpoint, else the format's name; beside the adapter, also when we are in it."""
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "adapter")
    assert default_export_folder(tmp_path / "adapter", "safetensors") == tmp_path / "adapter-merged"
    assert default_export_folder(tmp_path / "adapter", "lora") == tmp_path / "adapter-lora"
    for here in (Path(), Path(), Path("../adapter")):
        assert default_export_folder(here, "safetensors").resolve() == tmp_path / "adapter-merged"


# --- finding


def test_the_adapter_named_is_the_one(tmp_path: Path) -> None:
    """Whatever it is: the error comes from opening it."""
    assert find_adapter(tmp_path / "any") == tmp_path / "any"


def test_the_adapter_we_are_in_or_the_only_one_here(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model and its export beside it are no adapters."""
    export(adapter, check=False)
    assert find_adapter(None, here=adapter) == adapter
    assert find_adapter(None, here=tmp_path) == adapter
    monkeypatch.chdir(tmp_path)
    assert find_adapter(None) == adapter


def test_none_or_several_adapters_are_named_in_the_error(adapter: Path, tmp_path: Path) -> None:
    """Guessing would be wrong half of the time."""
    shutil.copytree(adapter, tmp_path / "second")
    with pytest.raises(RequestError, match=r"2 adapter folders here \(model-paca, second\).*Name the adapter's folder"):
        find_adapter(None, here=tmp_path)
    with pytest.raises(RequestError, match=r"0 adapter folders here \(none\)"):
        find_adapter(None, here=tmp_path / "model")


def test_a_damaged_record_is_no_adapter(adapter: Path, tmp_path: Path) -> None:
    """It is passed over in the search, not tripped over."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD_FILE).write_text("{")
    assert find_adapter(None, here=tmp_path) == adapter


# --- export


def test_an_export_is_checked_and_measured(adapter: Path, tmp_path: Path) -> None:
    """The checks are in the result and in the folder's record; sizes are those of the files."""
    result = export(adapter)
    assert result.out == tmp_path / "model-paca-merged"
    assert result.verification is not None
    assert result.verification.max_logit_difference == 0
    assert result.size_bytes == sum(path.stat().st_size for path in result.out.rglob("*") if path.is_file())
    checks = json.loads((result.out / RECORD_FILE).read_text())["manifest"]["checks"]
    assert {check["result"] for check in checks} == {"passed"}


def test_an_export_is_checked_on_the_prompts_given(adapter: Path) -> None:
    """As many as there are."""
    held = export(adapter, prompts=("one", "two")).verification
    assert held is not None
    assert "on 2 prompts" in held.checks[-1].detail


def test_a_base_that_moved_can_be_named(adapter: Path, tmp_path: Path) -> None:
    """Without its name the export is refused; with it, written and checked."""
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(BaseMismatchError, match="--base"):
        export(adapter)
    held = export(adapter, base=moved).verification
    assert held is not None
    assert held.max_logit_difference == 0


def test_an_export_of_what_was_not_trained_says_so(adapter: Path, tmp_path: Path) -> None:
    """It is right, equals its base, and is hardly what was wanted; an interrupted run is named as the reason."""
    assert export(adapter).notes == ()
    surgery.apply(tmp_path / "model", tmp_path / "fresh", PacaSpec(rank=4))
    assert "it has not been trained" in export(tmp_path / "fresh", check=False).notes[0]
    (tmp_path / "fresh" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    assert "--resume auto" in export(tmp_path / "fresh", check=False, overwrite=True).notes[0]


def test_an_export_that_does_not_hold_does_not_appear(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed check leaves nothing: neither the output nor a part of it; and what was there stays."""

    def fail(folder: Path, **_: object) -> Verification:
        assert (folder / "model.safetensors").is_file()
        raise CheckError("x", "it differs")

    before = digest_folder(tmp_path)
    monkeypatch.setattr(workflow, "verify", fail)
    with pytest.raises(CheckError):
        export(adapter)
    assert digest_folder(tmp_path) == before
    export(adapter, check=False)
    before = digest_folder(tmp_path)
    with pytest.raises(CheckError):
        export(adapter, overwrite=True)
    assert digest_folder(tmp_path) == before


def test_an_unchecked_export_says_so(adapter: Path) -> None:
    """No verification in the result, none in the record; the bytes are the same."""
    result = export(adapter, check=False)
    assert result.verification is None
    assert json.loads((result.out / RECORD_FILE).read_text())["manifest"]["checks"] == []


def test_an_existing_output_is_refused(adapter: Path, tmp_path: Path) -> None:
    """Until --overwrite, which replaces an export whole, but nothing that is none."""
    out = export(adapter, tmp_path / "out").out
    (out / "notes").write_text("x")
    with pytest.raises(OutputExistsError, match="it exists"):
        export(adapter, out)
    assert (out / "notes").exists()
    export(adapter, out, overwrite=True)
    assert not (out / "notes").exists()
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    before = digest_folder(tmp_path)
    with pytest.raises(OutputExistsError, match="expected a folder that surgery made"):
        export(adapter, tmp_path / "other", overwrite=True)
    assert digest_folder(tmp_path) == before


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda folder: export(folder, format="safetensor"), r"--format: unknown name.*The closest is 'safetensors'"),
        (lambda folder: export(folder, max_shard_size="5 apples"), r"--max-shard-size: '5 apples' is no size"),
        (lambda folder: export(folder, dtype="fp8"), r"--dtype.*'fp8'"),
        (lambda folder: export(folder.parent / "model"), "surgery.json"),
        (lambda folder: export(folder.parent / "nothing"), "surgery.json"),
    ),
)
def test_a_wrong_request_writes_nothing(call: Callable[[Path], object], message: str, adapter: Path) -> None:
    """Exit code 2, before the first byte."""
    before = digest_folder(adapter.parent)
    with pytest.raises((RequestError, NotAModelError), match=message) as caught:
        call(adapter)
    assert caught.value.exit_code == 2
    assert digest_folder(adapter.parent) == before


def test_shards_are_cut_as_asked(adapter: Path) -> None:
    """And verified all the same."""
    result = export(adapter, max_shard_size="20KB")
    merged = Checkpoint.open(result.out)
    assert merged.is_sharded
    assert len(merged.headers) > 3
    assert result.verification is not None
    assert result.verification.max_logit_difference == 0


def test_folders_that_move_together_still_know_each_other(adapter: Path, tmp_path: Path) -> None:
    """Base, adapter and merge refer to each other by relative paths."""
    export(adapter)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(elsewhere)
    try:
        result = surgery.verify(elsewhere / "model-paca-merged")
        assert {check.result for check in result.checks} == {"passed"}
        export(elsewhere / "model-paca", elsewhere / "again")
    finally:
        elsewhere.rename(tmp_path)


def test_undo_gives_the_base_back(adapter: Path, tmp_path: Path) -> None:
    """By the library's own name for it."""
    merged = export(adapter).out
    assert undo(merged, tmp_path / "again") == tmp_path / "again"
    assert digest_folder(tmp_path / "again") == digest_folder(tmp_path / "model")


def test_the_facade_names_what_it_offers() -> None:
    """Each public name loads, is no module, and stays what it is; an unknown one is an AttributeError."""
    for name in surgery.__all__:
        assert not isinstance(getattr(surgery, name), types.ModuleType)
        assert getattr(surgery, name) is getattr(surgery, name)
    assert surgery.train.__module__ == "surgery.train"
    assert set(surgery.__all__) <= set(dir(surgery))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        surgery.nonsense  # noqa: B018


def test_an_exporter_refuses_by_type_what_it_cannot_write(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an exporter accepts is a type in its record; anything else is exit code 5 and writes nothing."""
    make_adapter(tiny_model("llama"), tmp_path / "adapter")
    monkeypatch.setattr(dense, "EXPORTER", replace(dense.EXPORTER, accepts=(SideDelta,)))
    with pytest.raises(UnsupportedError, match=r"a PaCA adapter .*, expected a READ adapter"):
        surgery.export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
