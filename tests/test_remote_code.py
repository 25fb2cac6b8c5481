"""READ as a model that transformers loads with its own code: the same logits, an untouched base, and faults found."""

from __future__ import annotations

import ast
import inspect as introspection
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import surgery
from surgery import PacaSpec, ReadSpec, TaskSpec, workflow
from surgery.adapter import Adapter
from surgery.checkpoint import INDEX_FILE, RECORD_FILE, WEIGHTS_FILE, Checkpoint
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DamagedError,
    NotAModelError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.exported import own_class
from surgery.inspection import inspect
from surgery.manifest import ONNX, REMOTE_CODE, read_record
from surgery.methods.read import MODELING_FILE
from surgery.operate import align
from surgery.side.settings import NAME
from surgery.side.source import PARTS, side_source
from surgery.workflow import default_export_folder
from tests.conftest import TinyModel, digest_folder
from tests.console import Command
from tests.reading import SPEC, logits_of
from tests.tiny import sample_inputs
from tests.trained import make_adapter, make_read_adapter

DYNAMIC = "transformers_modules"  # transformers' package for code that lies with a model


@dataclass(frozen=True)
class Kind:
    """A model that is exported, and transformers' automatic class for it."""

    name: str
    family: str
    auto: str
    spec: ReadSpec = SPEC
    dtype: torch.dtype = torch.float32
    task: TaskSpec | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    shard: str | None = None


CLASSES = TaskSpec("sequence-classification", ("a", "b", "c"))
RICH = ReadSpec(cell="lstm", hidden=6, recurrent_layers=2, bidirectional=True, initial="embedding", reduce="mean",
                output_norm=True, scale=0.5, layers="last:1")  # fmt: skip
KINDS = (
    Kind("llama", "llama", "AutoModelForCausalLM"),
    Kind("llama-bf16", "llama", "AutoModelForCausalLM", dtype=torch.bfloat16),
    Kind("llama-fp64", "llama", "AutoModelForCausalLM", dtype=torch.float64),
    Kind("llama-shards", "llama", "AutoModelForCausalLM", RICH, shard="20KB"),
    Kind("llama-tied", "llama", "AutoModelForCausalLM", overrides={"tie_word_embeddings": True}),
    Kind("gpt2", "gpt2", "AutoModelForCausalLM"),
    Kind("bert", "bert", "AutoModelForMaskedLM"),
    Kind("bert-classes", "bert", "AutoModelForSequenceClassification", replace(SPEC, pooling="mean"), task=CLASSES),
    Kind("bert-classes-bf16", "bert", "AutoModelForSequenceClassification", dtype=torch.bfloat16, task=CLASSES),
    Kind("llama-classes", "llama", "AutoModelForSequenceClassification", task=CLASSES),
    Kind("t5", "t5", "AutoModelForSeq2SeqLM", RICH),
    Kind("bart", "bart", "AutoModelForSeq2SeqLM", replace(SPEC, joiner="mean")),
    Kind("vit", "vit", "AutoModelForImageClassification", replace(SPEC, pooling="first")),
)  # fmt: skip
BY_NAME = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True)
class Exported:
    """A base, an adapter that has moved, and the folder that was made of both."""

    kind: Kind
    base: Path
    adapter: Adapter
    folder: Path
    result: Any


def make(kind: Kind, tiny_model: TinyModel, root: Path) -> Exported:
    """Export one kind, with the check that every export has."""
    base = tiny_model(kind.family, dtype=kind.dtype, overrides=kind.overrides, max_shard_size=kind.shard)
    adapter = make_read_adapter(base, root / "adapter", kind.spec, task=kind.task)
    return Exported(kind, base, adapter, root / "out", surgery.export(adapter.folder, root / "out", format=REMOTE_CODE))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def exported(
    request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Each kind, exported once."""
    return make(request.param, tiny_model, tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A decoder's export, to be read and copied."""
    return make(BY_NAME["llama"], tiny_model, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copied(plain: Exported, tmp_path: Path) -> Exported:
    """A copy of it that may be spoiled: adapter and folder lie beside each other as before."""
    for name in ("adapter", "out"):
        shutil.copytree(plain.folder.parent / name, tmp_path / name)
    for name in ("adapter", "out"):
        document = json.loads((tmp_path / name / RECORD_FILE).read_text())
        document["manifest"]["base"]["path"] = str(plain.base)
        (tmp_path / name / RECORD_FILE).write_text(json.dumps(document))
    return replace(plain, folder=tmp_path / "out")


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies a model's code into a folder of its own and imports it from there: into tmp_path, here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {name for name in sys.modules if name.partition(".")[0] == DYNAMIC}
    assert not before
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == DYNAMIC]:
        del sys.modules[name]


def remote(exported: Exported, **options: Any) -> Any:
    """The folder as any user of transformers loads it."""
    auto = getattr(transformers, exported.kind.auto)
    return auto.from_pretrained(exported.folder, trust_remote_code=True, dtype="auto", **options)


def inputs_of(exported: Exported) -> dict[str, Tensor]:
    """A batch in the model's dtype, the second sequence padded."""
    inputs = sample_inputs(exported.kind.family)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, -3:] = 0
        inputs["input_ids"][1, -3:] = 0
    return {name: x.to(exported.kind.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


# --- the same model


def test_transformers_loads_the_trained_model(exported: Exported) -> None:
    """With the automatic class: the logits of surgery.load, bit for bit, and not the base's."""
    model, info = remote(exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert type(model).__module__.startswith(DYNAMIC)
    assert type(model).__name__ == f"Read{exported.adapter.plan.architecture}"
    assert type(model).__mro__[1].__name__ == exported.adapter.plan.architecture
    inputs, ours = inputs_of(exported), surgery.load(exported.adapter.folder)
    align(model)  # where tensors begin decides about a last bit
    found = logits_of(model.eval(), inputs)
    assert torch.equal(found, logits_of(ours, inputs))
    surgery.detach(ours, merge=False)
    assert not torch.equal(found, logits_of(ours, inputs))


def test_the_side_network_is_never_16_bit(exported: Exported) -> None:
    """fp32 beside 16 bits, also where a user asks for a dtype; fp64 beside fp64; all else is as in the base."""
    wanted = torch.float64 if exported.kind.dtype == torch.float64 else torch.float32
    state = remote(exported).state_dict()
    names = {name for name in state if name.startswith(f"{NAME}.")}
    assert {state[name].dtype for name in names} == {wanted}
    assert {state[name].dtype for name in state.keys() - names if state[name].is_floating_point()} == {
        exported.kind.dtype
    }
    assert names == {target.parameter for target in exported.adapter.plan.side}


def test_the_export_was_verified(exported: Exported) -> None:
    """Every check passes, before the folder appears and after; the outcome is in its record."""
    names = ["names", "untouched tensors", "modeling file", "side network", "logits"]
    for verification in (exported.result.verification, surgery.verify(exported.folder)):
        assert [(check.name, check.result) for check in verification.checks] == [(name, "passed") for name in names]
        assert verification.max_logit_difference == 0
    checks = read_record(exported.folder, REMOTE_CODE).manifest.checks
    assert [check.name for check in checks] == names


def test_the_base_lies_in_it_untouched(exported: Exported) -> None:
    """Each tensor but a head, byte for byte in its file; small files too, but for entries that config.json gains."""
    base, ours = Checkpoint.open(exported.base), Checkpoint.open(exported.folder)
    heads = {target.weight for target in exported.adapter.plan.whole}
    assert set(base) <= set(ours) == set(base) | heads | {target.parameter for target in exported.adapter.plan.side}
    for name, info in base.items():
        if name not in heads:
            assert (ours[name].file, ours[name].dtype, ours[name].shape) == (info.file, info.dtype, info.shape)
            assert ours.sha256(name) == base.sha256(name)
    changed = {"architectures", "auto_map", "read"} | set(exported.adapter.plan.config)
    theirs, mine = (json.loads((folder / "config.json").read_text()) for folder in (exported.base, exported.folder))
    assert {key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key)} <= changed
    for path in exported.base.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX_FILE):
            assert (exported.folder / path.name).read_bytes() == path.read_bytes()
    surplus = {path.name for path in exported.folder.iterdir()} - {path.name for path in exported.base.iterdir()}
    assert surplus == {MODELING_FILE, RECORD_FILE}


def test_the_modeling_file_is_the_project_s_module(exported: Exported) -> None:
    """It begins with the side network's modules as they stand, needs nothing of ours, and ends with one small class."""
    text = (exported.folder / MODELING_FILE).read_text()
    assert text.startswith(side_source())
    for part in PARTS:
        assert introspection.getsource(part).split("\n\n\n", 1)[1].strip() in text
    rest = text.removeprefix(side_source())
    assert len(rest.splitlines()) < 20
    assert f"class Read{exported.adapter.plan.architecture}({exported.adapter.plan.architecture}):" in rest
    assert "import surgery" not in text
    assert "from surgery" not in text
    body = ast.parse(text).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)]
    assert len(names) == len(set(names)), "two modules of the side network define one name"


def test_an_index_names_every_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base in several files stays so, and the side network lies in the last; other sizes cut it anew."""
    made = make(BY_NAME["llama-shards"], tiny_model, tmp_path)
    index = json.loads((made.folder / INDEX_FILE).read_text())
    ours = Checkpoint.open(made.folder)
    assert index["weight_map"] == {name: ours[name].file for name in sorted(ours)}
    assert index["metadata"]["total_size"] == sum(info.size_bytes for info in ours.values())
    last = max(Checkpoint.open(made.base).headers)
    assert {ours[t.parameter].file for t in made.adapter.plan.side} == {last}
    single = surgery.export(made.adapter.folder, tmp_path / "single", format=REMOTE_CODE, max_shard_size="1GB")
    assert set(Checkpoint.open(single.out).headers) == {WEIGHTS_FILE}
    assert not (single.out / INDEX_FILE).exists()
    assert single.verification is not None
    assert single.verification.max_logit_difference == 0


@pytest.mark.parametrize("name", ("llama", "t5", "bart", "llama-bf16"))
@pytest.mark.parametrize("beams", (1, 2))
def test_it_generates_the_same_text(name: str, beams: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    """With a cache, greedily and with beams."""
    made = make(BY_NAME[name], tiny_model, tmp_path)
    inputs = {key: value for key, value in inputs_of(made).items() if key != "decoder_input_ids"}
    if name.startswith("llama"):
        inputs["attention_mask"][:] = 1
    given = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    theirs, ours = remote(made), surgery.load(made.adapter.folder)
    align(theirs)
    assert torch.equal(theirs.generate(**inputs, **given), ours.generate(**inputs, **given))


def test_a_text_generation_pipeline_takes_it(plain: Exported) -> None:
    """From the folder, and around the model that surgery.load gives: the same text, and not the base's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain.folder)
    given = {"max_new_tokens": 8, "do_sample": False}
    theirs = transformers.pipeline("text-generation", model=str(plain.folder), trust_remote_code=True)
    ours = transformers.pipeline("text-generation", model=surgery.load(plain.adapter.folder), tokenizer=tokenizer)
    base = transformers.pipeline("text-generation", model=str(plain.base))
    texts = [pipe("the quick brown", **given)[0]["generated_text"] for pipe in (theirs, ours, base)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_classification_pipeline_takes_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    """With the class names of the task, and the same scores, one text at a time or several."""
    made = make(BY_NAME["bert-classes"], tiny_model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    theirs = transformers.pipeline("text-classification", model=str(made.folder), trust_remote_code=True)
    ours = transformers.pipeline("text-classification", model=surgery.load(made.adapter.folder), tokenizer=tokenizer)
    texts = ["the quick brown fox", "a user"]
    found, expected = theirs(texts, batch_size=2), ours(texts, batch_size=2)
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)
    assert {entry["label"] for entry in found} <= {"a", "b", "c"}


def test_a_saved_copy_is_the_same_model(plain: Exported, tmp_path: Path) -> None:
    """transformers' own save_pretrained takes the code along."""
    model, inputs = remote(plain), inputs_of(plain)
    model.save_pretrained(tmp_path / "again")
    again = remote(replace(plain, folder=tmp_path / "again"))
    assert torch.equal(logits_of(again.eval(), inputs), logits_of(model.eval(), inputs))


def test_without_trust_it_is_the_base(plain: Exported) -> None:
    """transformers then takes its own class, runs nothing of the folder, and reports the side network as unexpected."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        plain.folder, trust_remote_code=False, output_loading_info=True
    )
    assert type(model) is transformers.LlamaForCausalLM
    assert set(info["unexpected_keys"]) == {target.parameter for target in plain.adapter.plan.side}
    base = transformers.AutoModelForCausalLM.from_pretrained(plain.base)
    assert torch.equal(logits_of(model.eval(), inputs_of(plain)), logits_of(base.eval(), inputs_of(plain)))


# --- what verify finds


def tampered(exported: Exported, match: str, kind: type[SurgeryError] = CheckError) -> None:
    """Both ways of checking find it, and the record does not say that anything passed."""
    record = (exported.folder / RECORD_FILE).read_bytes()
    for numeric in (False, True):
        with pytest.raises(kind, match=match):
            surgery.verify(exported.folder, numeric=numeric)
    assert (exported.folder / RECORD_FILE).read_bytes() == record


def flip(folder: Path, name: str, value: int = 0) -> None:
    """Turn over the lowest bit of one value."""
    info = Checkpoint.open(folder)[name]
    data = bytearray((folder / info.file).read_bytes())
    data[info.begin + value * 4] ^= 1
    (folder / info.file).write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the weights anew with a change."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


SIDE = f"{NAME}.stacks.backbone.output.weight"


def test_a_flipped_bit_is_found(copied: Exported) -> None:
    """In any tensor of the side network, and in one of the backbone."""
    for target in copied.adapter.plan.side:
        flip(copied.folder, target.parameter)
        tampered(copied, rf"{target.parameter}: it is not what was trained")
        flip(copied.folder, target.parameter)
    assert surgery.verify(copied.folder).max_logit_difference == 0
    flip(copied.folder, "model.layers.1.mlp.up_proj.weight", 77)
    tampered(copied, r"up_proj\.weight: it differs from the base")


def test_a_flipped_bit_in_a_head_is_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What was trained whole counts as well."""
    made = make(BY_NAME["bert-classes"], tiny_model, tmp_path)
    flip(made.folder, "classifier.weight", 5)
    tampered(made, r"classifier\.weight: it is not what was trained")


@pytest.mark.parametrize("name", (SIDE, "model.norm.weight"))
def test_a_missing_tensor_is_found(name: str, copied: Exported) -> None:
    """Of either part; and one too many."""
    rewrite(copied.folder, lambda tensors: tensors.pop(name))
    tampered(copied, r"1 tensors missing or surplus, first '" + name.replace(".", r"\."))
    rewrite(copied.folder, lambda tensors: tensors.update({"x": torch.zeros(2)}))
    tampered(copied, r"2 tensors missing or surplus")


def test_a_rounded_side_network_is_found(copied: Exported) -> None:
    """Its values as 16 bits are others."""
    rewrite(copied.folder, lambda tensors: tensors.update({SIDE: tensors[SIDE].to(torch.bfloat16)}))
    tampered(copied, r"output\.weight: ")


@pytest.mark.parametrize("place", ("beginning", "end"))
def test_edited_code_is_found_and_not_run(place: str, copied: Exported, tmp_path: Path) -> None:
    """The file is compared before anything of it could run; what verify runs is ours, whatever lies there."""
    path, trace = copied.folder / MODELING_FILE, tmp_path / "it ran"
    line = f"open({str(trace)!r}, 'w').close()\n"
    text = path.read_text()
    path.write_text(text.replace("import torch\n", f"{line}import torch\n", 1) if place == "beginning" else text + line)
    tampered(copied, r"modeling_read\.py: it is not what this version writes")
    own_class(copied.folder, read_record(copied.folder, REMOTE_CODE))
    assert not trace.exists()
    remote(copied)
    assert trace.exists(), "the line would have run"


def test_absent_code_is_found(copied: Exported) -> None:
    """Without its modeling file it is no model."""
    (copied.folder / MODELING_FILE).unlink()
    tampered(copied, r"modeling_read\.py: it is not what this version writes")


CONFIGS: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "auto_map": lambda config: config["auto_map"].update(AutoModelForCausalLM="evil.Evil"),
    "architectures": lambda config: config.update(architectures=["LlamaForCausalLM"]),
    "read": lambda config: config["read"]["settings"].update(scale=2.0),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_an_edited_configuration_is_found(key: str, copied: Exported) -> None:
    """It says which code transformers runs, and what that builds."""
    path = copied.folder / "config.json"
    config = json.loads(path.read_text())
    CONFIGS[key](config)
    path.write_text(json.dumps(config))
    tampered(copied, rf"config\.json: {key} is not what the plan says")


def test_another_configuration_of_the_backbone_is_found(copied: Exported) -> None:
    """The same bytes, read in another way, give other logits."""
    path = copied.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(CheckError, match="logits differ"):
        surgery.verify(copied.folder)


def test_without_its_adapter_the_byte_checks_remain(copied: Exported) -> None:
    """What could not be compared is said."""
    shutil.rmtree(copied.folder.parent / "adapter")
    results = {check.name: check.result for check in surgery.verify(copied.folder).checks}
    assert results == {"names": "passed", "untouched tensors": "passed", "modeling file": "passed",
                       "side network": "not run", "logits": "not run"}  # fmt: skip
    flip(copied.folder, "model.norm.weight")
    with pytest.raises(CheckError, match=r"model\.norm\.weight: it differs"):
        surgery.verify(copied.folder)


def test_another_adapter_is_not_this_one(copied: Exported) -> None:
    """One that was named must be the one that was exported."""
    other = make_read_adapter(copied.base, copied.folder.parent / "other", SPEC, seed=1)
    with pytest.raises(CheckError, match="not the adapter that was exported"):
        surgery.verify(copied.folder, adapter=other.folder)


# --- what else is done with the folder


def test_inspect_describes_it(plain: Exported) -> None:
    """What it is, where it came from, its checks, and why there is nothing to undo."""
    found = inspect(plain.folder)
    assert found.kind == REMOTE_CODE
    text = "\n".join(found.lines())
    for part in ("a model with a side network, which transformers loads with trust_remote_code",
                 "ReadLlamaForCausalLM (llama)", "nothing to undo: the base's tensors are untouched",
                 "read, gru 7 wide", "logits: passed", "modeling file: passed", "(found)"):  # fmt: skip
        assert part in text
    document = json.loads(json.dumps(found.to_dict()))
    assert document["kind"] == REMOTE_CODE
    assert document["plan"]["stacks"][0]["layers"] == "model.layers"


BARE = r"a model with a side network, which would be lost, expected a plain or merged checkpoint\. Train the adapter"


@pytest.mark.parametrize("spec", (PacaSpec(rank=2), SPEC), ids=("paca", "read"))
def test_it_is_no_base(spec: PacaSpec | ReadSpec, copied: Exported, command: Command) -> None:
    """Transformers would load its backbone alone. Without our record its configuration still says so."""
    out = copied.folder.parent / "new"
    for _ in range(2):
        with nothing_written(copied.folder.parent):
            with pytest.raises(UnsupportedError, match=BARE):
                surgery.apply(copied.folder, out, spec)
            code, said = command("apply", copied.folder, "--plan", "--method", spec.method)
            assert (code, bool(re.search(BARE, said))) == (5, True)
        (copied.folder / RECORD_FILE).unlink(missing_ok=True)


def test_graphs_beside_a_side_network_are_no_base_either(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Those beside a checkpoint as it is, or merged, are: its weights are all there is."""
    base, options = tiny_model("llama"), {"format": ONNX, "check": False}
    for name, make_one in (("merged", make_adapter), ("side", make_read_adapter)):
        surgery.export(make_one(base, tmp_path / name).folder, tmp_path / f"{name}-onnx", **options)
    workflow.export_checkpoint(base, tmp_path / "plain-onnx", check=False)
    for name in ("merged-onnx", "plain-onnx"):
        surgery.apply(tmp_path / name, tmp_path / f"{name}-again", SPEC)
    with nothing_written(tmp_path), pytest.raises(UnsupportedError, match=BARE):
        surgery.apply(tmp_path / "side-onnx", tmp_path / "new", PacaSpec(rank=2))


def test_it_is_named_after_its_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`adapter-remote-code`, beside it."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert default_export_folder(adapter.folder, REMOTE_CODE) == tmp_path / "adapter-remote-code"
    assert surgery.export(adapter.folder, format=REMOTE_CODE, check=False).out == tmp_path / "adapter-remote-code"


def test_there_is_nothing_to_undo(plain: Exported, tmp_path: Path) -> None:
    """Undo takes merged folders; an adapter's commands take none of these."""
    with pytest.raises(NotAModelError, match=r"remote-code"):
        surgery.undo(plain.folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(NotAModelError, match=r"'remote-code', expected an adapter"):
        surgery.load(plain.folder)


# --- refused


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Every name and byte below a folder stays."""
    before = digest_folder(folder)
    yield
    assert digest_folder(folder) == before


WAYS_OUT = r"Write --format onnx, .* or --format remote-code, which transformers loads with it, or use surgery\.load"


@pytest.mark.parametrize("arguments", (("--merge",), ("--format", "lora")), ids=" ".join)
def test_a_side_network_is_not_merged(
    arguments: tuple[str, ...], tiny_model: TinyModel, tmp_path: Path, command: Command
) -> None:
    """On the command line and in Python: exit code 5, why, and what to do instead; nothing is written."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    with nothing_written(tmp_path):
        code, said = command("export", adapter.folder, *arguments)
        assert code == 5
        assert "a side network runs beside the layers and has no dense equivalent" in said
        assert re.search(WAYS_OUT, said)
        assert said.count("\n") == 1
        name = "lora" if "lora" in arguments else "safetensors"
        with pytest.raises(UnsupportedError, match=rf"a READ adapter .*has no dense equivalent.*{WAYS_OUT}"):
            surgery.export(adapter.folder, tmp_path / "out", format=name)


def test_columns_need_no_code(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A PaCA adapter merges: there is no side network to write."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=2))
    with nothing_written(tmp_path), pytest.raises(UnsupportedError, match=r"a PaCA adapter .*expected a READ adapter"):
        surgery.export(adapter.folder, tmp_path / "out", format=REMOTE_CODE)


def test_another_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """One other value anywhere is another base: a side network reads all of it."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    other = Path(shutil.copytree(tiny_model("llama"), tmp_path / "other"))
    flip(other, "model.layers.0.self_attn.q_proj.weight", 3)
    for check in (True, False):
        with nothing_written(tmp_path), pytest.raises(BaseMismatchError, match="its tensors have digest") as caught:
            surgery.export(adapter.folder, tmp_path / "out", format=REMOTE_CODE, base=other, check=check)
        assert caught.value.exit_code == 4
    with pytest.raises(BaseMismatchError):
        surgery.load(adapter.folder, base=other)


@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_a_cast_is_refused(dtype: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """It would change the states that the side network was trained to read."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    with nothing_written(tmp_path), pytest.raises(RequestError, match=r"--dtype: .*expected 'keep' with --format rem"):
        surgery.export(adapter.folder, tmp_path / "out", format=REMOTE_CODE, dtype=dtype)


def test_a_damaged_adapter_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its digest is checked before it is used."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    path = adapter.folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with nothing_written(tmp_path), pytest.raises(DamagedError, match="digest"):
        surgery.export(adapter.folder, tmp_path / "out", format=REMOTE_CODE)


def test_an_export_whose_check_fails_does_not_appear(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the writer is found before the folder has its name."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    monkeypatch.setattr("exporters.remote_code.modeling_source", lambda _name: "x = 1\n")
    with nothing_written(tmp_path), pytest.raises(CheckError, match="modeling_read"):
        surgery.export(adapter.folder, tmp_path / "out", format=REMOTE_CODE)


def test_the_command_exports_and_verifies(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    """Without --merge; the second time the folder is there already."""
    adapter = make_read_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert command("export", adapter.folder, "--format", "remote-code", "-o", tmp_path / "out") == (0, "")
    assert command("verify", tmp_path / "out")[0] == 0
    with nothing_written(tmp_path):
        code, said = command("export", adapter.folder, "--format", "remote-code", "-o", tmp_path / "out")
        assert (code, "it exists" in said) == (2, True)
        code, said = command("export", adapter.folder, "--merge", "--format", "remote-code")
        assert (code, "Leave out --merge" in said) == (5, True)
        assert command("undo", tmp_path / "out", "-o", tmp_path / "again")[0] == 2
    flip(tmp_path / "out", SIDE)
    assert command("verify", tmp_path / "out")[0] == 3
