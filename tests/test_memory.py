"""Predicted memory beside what real training steps keep; sharding, fit, and what cannot be predicted."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from surgery.adapter import open_adapter
from surgery.checkpoint import CONFIG_FILE
from surgery.compat import keep_inputs_frozen, set_checkpointing
from surgery.cuda_kernels import as_on_cuda
from surgery.errors import RequestError, UnsupportedError
from surgery.memory.live import LiveBytes
from surgery.memory.predict import _gathered, _state, predict
from surgery.memory.run import SHARDINGS, Run
from surgery.memory.saved import saved_by, saved_by_all, temporary
from surgery.memory.step import Step
from surgery.memory.subject import Subject, Tensor, open_planned, open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply, attach
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.training.model import load_for_training
from tests.conftest import TinyModel
from tests.examples import LABELLED, QUESTIONS, TEXTS, fast, mostly_long, write_rows
from tests.measured import Measured, measure_ours, measure_theirs
from tests.tiny import build_model, sample_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
TOLERANCE = 0.01
CLASSES = ("animal", "person")
SPECS: Mapping[str, Any] = {
    "paca": PacaSpec(rank=4), "read": ReadSpec(hidden=8), "lora": PacaSpec(rank=4), "full": None,
}  # fmt: skip
TASKS = {
    "llama": "causal-lm", "qwen3": "causal-lm", "gemma3": "causal-lm", "bert": "sequence-classification",
    "t5": "seq2seq",
}  # fmt: skip


def spec_of(task: str) -> TaskSpec:
    """A task, with classes where it has them."""
    return TaskSpec(task, CLASSES if task == "sequence-classification" else ())


def write_data(folder: Path, task: str, *, padded: bool) -> DataSection:
    """Rows of one length, or of several, for a task."""
    pairs = [(" ".join([q] * (1 + n % 3)), a) for n, (q, a) in enumerate(QUESTIONS)] if padded else QUESTIONS[:1] * 8
    if task == "causal-lm" and not padded:
        path = folder / "text.txt"
        path.write_text("\n".join(TEXTS) * 4, encoding="utf-8")
        return DataSection(train=[str(path)], max_length=40)
    if task == "sequence-classification":
        one = [{"text": LABELLED[0]["text"], "label": label} for label in CLASSES]
        rows: Any = LABELLED if padded else one * 8
    elif task == "seq2seq":
        rows = [{"source": q, "target": a} for q, a in pairs]
    else:
        rows = [{"prompt": q, "completion": a} for q, a in pairs]
    return DataSection(train=[str(write_rows(folder / "rows.jsonl", rows))], max_length=64)


def measure(
    method: str,
    family: str,
    base: Path,
    folder: Path,
    patch: pytest.MonkeyPatch,
    *,
    padded: bool,
    settings: TrainSection,
) -> Measured:
    """A real step of a method on a tiny model."""
    task = TASKS[family]
    data = write_data(folder, task, padded=padded)
    if SPECS[method] and method != "lora":
        apply(base, folder / "adapter", SPECS[method])
        return measure_ours(patch, folder / "adapter", data, settings, spec_of(task))
    rank = SPECS[method].rank if SPECS[method] else 0
    return measure_theirs(base, folder / "out", data, settings, task=task, lora_rank=rank)


def subject_of(family: str, method: str, base: Path, run: Run) -> Subject:
    """A tiny model with a method in it, without storage."""
    return open_subject(base, method, SPECS[method], spec_of(TASKS[family]), run)


def require_equal(found: Measured, family: str, method: str, base: Path, **settings: Any) -> None:
    """Activations within 1 %; weights, columns, gradients and the optimizer to the byte."""
    run = Run(found.batch, found.sequence, found.target, found.padded, **settings)
    predicted = predict(subject_of(family, method, base, run), run)
    saved = sum(predicted.activations.values())
    assert abs(saved / found.saved - 1) < TOLERANCE, (saved, found.saved, predicted.activations)
    assert predicted.parts["optimizer"] == found.optimizer_bytes()
    assert predicted.parts["weights"] + predicted.parts["columns"] == found.weight_bytes()
    assert predicted.parts["gradients"] == sum(parameter.nbytes for parameter in found.trained())
    assert predicted.trained_values == sum(parameter.numel() for parameter in found.trained())


# --- beside real steps


@pytest.mark.parametrize(
    ("family", "method"),
    mostly_long(
        itertools.product(TASKS, SPECS),
        *(("llama", method) for method in SPECS),
        ("qwen3", "full"), ("gemma3", "paca"), ("bert", "lora"), ("t5", "paca"), ("t5", "read"),
    ),
)  # fmt: skip
def test_full_rows(
    family: str, method: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step on rows of one length keeps, for every method and kind of model."""
    base = tiny_model(family)
    found = measure(method, family, base, tmp_path, monkeypatch, padded=False, settings=_one_step())
    assert not found.padded
    require_equal(found, family, method, base)


@pytest.mark.parametrize(
    ("family", "method"),
    mostly_long(
        itertools.product(("llama", "gemma3", "bert", "t5"), ("paca", "full")),
        ("llama", "full"), ("gemma3", "paca"), ("bert", "full"), ("t5", "paca"),
    ),
)  # fmt: skip
def test_padded_rows(
    family: str, method: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding there is a mask, and attention takes another path."""
    base = tiny_model(family)
    found = measure(method, family, base, tmp_path, monkeypatch, padded=True, settings=_one_step())
    assert found.padded
    require_equal(found, family, method, base)


@pytest.mark.parametrize("targets", (("all-linear",), ("all-linear", "experts")), ids=("attention", "experts"))
def test_experts_in_fp32(
    targets: tuple[str, ...], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products by groups have sizes in every dtype, frozen experts' and trained ones', forward and backward."""
    base, spec = tiny_model("mixtral"), PacaSpec(rank=4, targets=targets)
    data = write_data(tmp_path, "causal-lm", padded=False)
    apply(base, tmp_path / "adapter", spec)
    found = measure_ours(monkeypatch, tmp_path / "adapter", data, _one_step(), spec_of("causal-lm"))
    run = Run(found.batch, found.sequence, found.target, found.padded)
    predicted = predict(open_subject(base, "paca", spec, spec_of("causal-lm"), run), run)
    assert abs(sum(predicted.activations.values()) / found.saved - 1) < TOLERANCE
    assert predicted.parts["weights"] + predicted.parts["columns"] == found.weight_bytes()


def test_read_leaves_padding_out(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU READ keeps tokens and no padding: the prediction is that of a single token of padding."""
    base = tiny_model("bert")
    found = measure("read", "bert", base, tmp_path, monkeypatch, padded=True, settings=_one_step())
    run = Run(found.batch, found.sequence, padded=True)
    predicted = predict(subject_of("bert", "read", base, run), run)
    assert found.padded
    assert found.saved <= sum(predicted.activations.values()) < 1.1 * found.saved


@pytest.mark.parametrize(
    ("case", "family", "method"),
    mostly_long(
        itertools.product(("checkpointing", "bf16", "autocast"), ("llama", "bert"), SPECS),
        *(("checkpointing", "bert", method) for method in SPECS), ("checkpointing", "llama", "paca"),
        ("bf16", "llama", "lora"), ("bf16", "bert", "paca"),
        ("autocast", "llama", "paca"), ("autocast", "bert", "full"),
    ),
)  # fmt: skip
def test_settings(
    case: str, family: str, method: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing, weights of 16 bits (beside which heads train in fp32), and autocast on weights of 32."""
    base = tiny_model(family, dtype=torch.bfloat16 if case == "bf16" else None)
    changes: Mapping[str, Any] = {
        "checkpointing": {"gradient_checkpointing": True}, "bf16": {}, "autocast": {"precision": "bf16"},
    }[case]  # fmt: skip
    found = measure(method, family, base, tmp_path, monkeypatch, padded=False, settings=_one_step(**changes))
    precision = changes.get("precision", "fp32")
    require_equal(found, family, method, base, checkpointing=case == "checkpointing", precision=precision)


def _one_step(**changes: Any) -> TrainSection:
    return fast(**{"max_steps": 1, "batch_size": 4, "precision": "fp32", **changes})


@pytest.mark.parametrize("checkpointing", (False, True), ids=["kept", "checkpointing"])
@pytest.mark.parametrize("method", ("paca", "full"))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_peak(family: str, method: str, checkpointing: bool, tiny_model: TinyModel) -> None:
    """What is kept and what is temporary make the peak of a real forward and backward."""
    real: Any = build_model(family).train()
    real.config.use_cache = False
    if method == "paca":
        attach(real, SPECS["paca"])
    if checkpointing:
        set_checkpointing(real, on=True)
    if method == "paca":
        keep_inputs_frozen(real)
    inputs = sample_inputs(family, batch=3, tokens=40)
    live = LiveBytes(real)
    with live.watching():
        real(**inputs, labels=inputs["input_ids"]).loss.backward()
    run = Run(3, 40, checkpointing=checkpointing)
    predicted = predict(open_subject(tiny_model(family), method, SPECS[method], TaskSpec(), run), run)
    peak = sum(predicted.activations.values()) + predicted.parts["temporary"]
    assert abs(peak / live.peak - 1) < TOLERANCE


def test_live_bytes() -> None:
    """What operators have made counts while it is there; parameters and their finished gradients do not."""
    model = torch.nn.Linear(100, 50, bias=False)
    live = LiveBytes(model)
    with live.watching():
        x = torch.ones(10, 100)
        y = x * 2  # 4000 bytes each
        del x
        z = y + 1
        assert (live.now, live.peak) == (8000, 8000)
        loss = model(z).sum()
        loss.backward()
        assert model.weight.grad is not None
        assert model.weight.grad.nbytes == 20000
        del loss
    assert live.now == 8000
    assert 8000 + 20000 <= live.peak < 8000 + 20000 + 5000


def test_rules_of_precision(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Dtypes and autocast are those that the training run loads its model with."""
    for family, dtype, task in (("bert", torch.bfloat16, "sequence-classification"), ("llama", torch.float16, "")):
        base, folder = tiny_model(family, dtype=dtype), tmp_path / family
        adapter = apply(base, folder, SPECS["paca"], task=spec_of(task) if task else None)
        model, autocast = load_for_training(open_adapter(folder), base, TrainSection(), "cpu")
        subject = open_planned(base, adapter.plan, Run())
        assert subject.autocast == autocast
        dtypes = {name: parameter.dtype for name, parameter in subject.dry.model.named_parameters()}
        assert dtypes == {name: parameter.dtype for name, parameter in model.named_parameters()}


# --- without weights


@pytest.mark.parametrize(
    ("family", "method"),
    mostly_long(itertools.product(("llama", "bert", "t5"), SPECS), ("llama", "paca"), ("bert", "read"), ("t5", "lora")),
)
def test_config_alone(family: str, method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A folder that holds config.json and nothing else gives the same figures as the whole checkpoint."""
    base = tiny_model(family)
    shutil.copy(base / CONFIG_FILE, tmp_path)
    run = Run(4, 24)
    whole, alone = (predict(subject_of(family, method, folder, run), run) for folder in (base, tmp_path))
    assert whole == alone


def test_dtype_of_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    """config.json's dtype, else the file's, else fp32; --dtype overrules it; a CPU computes in no fp16."""
    folder = tiny_model("llama", dtype=torch.bfloat16)
    assert subject_of("llama", "full", folder, Run()).dtype == "bf16"
    assert subject_of("llama", "full", folder, Run(dtype="fp32")).dtype == "fp32"
    assert subject_of("llama", "full", folder, Run(dtype="fp16")).dtype == "fp32"
    assert subject_of("llama", "full", folder, Run(dtype="fp16", device="cuda")).dtype == "fp16"
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = (copy / CONFIG_FILE).read_text(encoding="utf-8")
    (copy / CONFIG_FILE).write_text(text.replace('"dtype": "bfloat16",', ""), encoding="utf-8")
    assert subject_of("llama", "full", copy, Run()).dtype == "bf16"
    (copy / "model.safetensors").unlink()
    assert subject_of("llama", "full", copy, Run()).dtype == "fp32"


# --- few layers for many


MANY_LAYERS: Mapping[str, Mapping[str, int]] = {
    "llama": {"num_hidden_layers": 7},
    "t5": {"num_layers": 6, "num_decoder_layers": 7},
    "bert": {"num_hidden_layers": 6},
}


@pytest.mark.parametrize(
    ("family", "method"),
    mostly_long(
        itertools.product(MANY_LAYERS, ("paca", "lora", "full")), ("llama", "paca"), ("t5", "lora"), ("bert", "full")
    ),
)
def test_few_layers_stand_for_all(family: str, method: str, tiny_model: TinyModel) -> None:
    """Bytes taken from two and three layers equal those of the whole model, by kind, with checkpointing and without."""
    sizes = MANY_LAYERS[family]
    dry = subject_of(family, method, tiny_model(family, overrides=sizes), Run()).dry
    assert sorted(dry.alike.values()) == sorted(sizes.values())
    for step in (Step(2, 16), Step(2, 16, checkpointing=True)):
        assert saved_by_all(dry, step) == saved_by(dry, step)


def test_temporary_does_not_grow(tiny_model: TinyModel) -> None:
    """What is temporary in a model of two layers is so in one of seven."""
    subjects = [
        subject_of("llama", "paca", tiny_model("llama", overrides={"num_hidden_layers": n}), Run()) for n in (2, 7)
    ]
    for step in (Step(2, 32), Step(2, 32, checkpointing=True)):
        assert len({temporary(subject.dry, step) for subject in subjects}) == 1


def test_layers_that_differ_are_all_run(tiny_model: TinyModel) -> None:
    """Local and global attention, another rank in one layer, a target in some: nothing is taken from few layers."""
    sizes = {"num_hidden_layers": 8}
    assert not subject_of("gemma3", "paca", tiny_model("gemma3", overrides=sizes), Run()).dry.alike
    base = tiny_model("llama", overrides=sizes)
    for spec in (PacaSpec(rank=4, rank_pattern={"layers.3.*": 2}), PacaSpec(rank=4, targets=("layers.[0-3].*",))):
        assert not open_subject(base, "paca", spec, TaskSpec(), Run()).dry.alike


def test_kinds(tiny_model: TinyModel) -> None:
    """What is kept is told apart: PaCA keeps its gathered columns, full tuning attention's inputs in their place."""
    by_method = {}
    for method in ("paca", "full", "read"):
        subject = subject_of("t5", method, tiny_model("t5"), Run())
        by_method[method] = saved_by(subject.dry, Step(2, 16)).kinds
    assert by_method["paca"]["gathered columns"] > 0
    assert by_method["full"]["gathered columns"] == by_method["full"]["side network"] == 0
    assert by_method["full"]["attention"] > by_method["paca"]["attention"] > 0
    assert by_method["full"]["MLP"] > by_method["paca"]["MLP"] > 0
    assert {kind for kind, size in by_method["read"].items() if size} == {"side network", "logits and loss"}


# --- devices


def test_sharding() -> None:
    """Each device holds its part of the rows, the first the larger; DDP copies gradients into buckets."""
    trained, frozen = Tensor((5, 3), 4, "l.0", True, True), Tensor((8, 2), 2, "l.1", False, False)
    head = Tensor((4,), 4, "", False, False)
    tensors = (trained, frozen, head)
    states = {name: _state(tensors, sharding, 2) for name, sharding in SHARDINGS.items()}
    assert states["none"] == {"weights": 48, "columns": 60, "gradients": 60, "optimizer": 124}
    assert states["ddp"] == {**states["none"], "gradient buckets": 60}
    zero2 = {"weights": 48, "columns": 60, "gradients": 36, "optimizer": 2 * 36 + 4 + 36}
    assert states["zero2"] == zero2
    fsdp2 = {"weights": 24, "columns": 36, "gradients": 36, "optimizer": 76, "gathered weights": 16 + 60 + 32}
    assert states["fsdp2"] == fsdp2
    assert states["zero3"] == {**fsdp2, "optimizer": 76 + 36}
    assert _gathered((*tensors, Tensor((1,), 4, "l.2", False, False))) == 16 + 60 + 32


@pytest.mark.parametrize(
    ("query", "heads", "mask", "kept"),
    (
        # q and output of 4 heads, k and v of 2: flash keeps them and the logarithms of sums
        (torch.bfloat16, 2, False, 2 * (2 * 4 + 2 * 2) * 32 * 16 * 2 + 2 * 4 * 32 * 4),
        # with a mask, all heads: the mask in 16 bits as well
        (torch.bfloat16, 4, True, 2 * 4 * 4 * 32 * 16 * 2 + 2 * 4 * 32 * 4 + 2 * 32 * 32 * 2),
    ),
    ids=["flash", "efficient"],
)
def test_attention_on_cuda(query: torch.dtype, heads: int, mask: bool, kept: int, tiny_model: TinyModel) -> None:
    """On a card no scores are kept, by arithmetic."""
    dry = subject_of("llama", "full", tiny_model("llama"), Run()).dry
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        sizes[id(storage)] = storage.nbytes()
        return tensor

    with dry.mode, as_on_cuda(), saved_tensors_hooks(pack, lambda tensor: tensor):
        q = torch.empty((2, 4, 32, 16), dtype=query, requires_grad=True)
        k, v = (torch.empty((2, heads, 32, 16), dtype=query, requires_grad=True) for _ in range(2))
        rows = torch.ones((2, 1, 32, 32), dtype=torch.bool) if mask else None
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(q, k, v, attn_mask=rows, is_causal=not mask, enable_gqa=heads == 2)
    seed_bytes = 64  # the generator's state, for dropout
    assert kept <= sum(sizes.values()) <= kept + seed_bytes


def test_cuda_target(tiny_model: TinyModel) -> None:
    """A step for a card keeps no more of attention than on the CPU, and dropout's masks take a byte a value."""
    bert = subject_of("bert", "full", tiny_model("bert"), Run()).dry
    cpu, cuda = (saved_by(bert, Step(4, 32, device=device)).kinds for device in ("cpu", "cuda"))
    assert cuda["MLP"] < cpu["MLP"]
    assert cuda["attention"] < cpu["attention"]
    before = torch.nn.functional.scaled_dot_product_attention
    with as_on_cuda():
        assert torch.nn.functional.scaled_dot_product_attention is not before
    assert torch.nn.functional.scaled_dot_product_attention is before


# --- the longest sequence


@pytest.mark.parametrize(("tokens", "sequence"), ((1, 128), (2, 1), (37, 50), (90, 50)))
def test_longest(tokens: int, sequence: int, tiny_model: TinyModel) -> None:
    """The longest sequence is the last that fits, whatever length one asks about."""
    subject = subject_of("llama", "paca", tiny_model("llama"), Run())
    limit = predict(subject, Run(2, tokens)).total
    found = predict(subject, Run(2, sequence), fit_bytes=limit)
    assert found.longest == tokens
    assert found.fits == (sequence <= tokens)


def test_longest_at_the_ends(tiny_model: TinyModel) -> None:
    """0 where not even one token fits, all positions where all do."""
    subject = subject_of("llama", "paca", tiny_model("llama"), Run())
    assert predict(subject, Run(2, 16), fit_bytes=1000).longest == 0
    assert predict(subject, Run(2, 16), fit_bytes=10**9).longest == 128


# --- what cannot be


def test_too_long(tiny_model: TinyModel) -> None:
    """A sequence beyond the model's positions; RoBERTa's kind begins behind the padding's."""
    for family, positions in (("llama", 128), ("roberta", 129)):
        task = TaskSpec("token-classification" if family == "roberta" else "")
        subject = open_subject(tiny_model(family), "full", None, task, Run())
        with pytest.raises(RequestError, match=rf"--sequence: {positions + 1} tokens, expected at most {positions}"):
            predict(subject, Run(1, positions + 1))
        predict(subject, Run(1, positions))


def test_no_task(tiny_model: TinyModel) -> None:
    """A masked language model has no task to train."""
    subject = open_subject(tiny_model("bert"), "full", None, TaskSpec(), Run(1, 8))
    with pytest.raises(UnsupportedError, match="the task features"):
        predict(subject, Run(1, 8))


def test_no_checkpointing(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that cannot checkpoint is refused where that is asked for, and only there."""
    subject = subject_of("llama", "full", tiny_model("llama"), Run())
    monkeypatch.setattr(type(subject.dry.model), "supports_gradient_checkpointing", False)
    with pytest.raises(UnsupportedError, match=r"--checkpointing: .*does not support.*expected a model that has it"):
        predict(subject, Run(1, 8, checkpointing=True))
    assert predict(subject, Run(1, 8)).total


def test_shapes_that_depend_on_values(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that looks at values is refused with the reason, and the model is whole again."""
    subject = subject_of("llama", "full", tiny_model("llama"), Run())
    model = subject.dry.model
    norm = model.model.norm
    original = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, x: original(self, x[x > 0].unsqueeze(0)))
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM cannot be run without values \(DynamicOutputShape"):
        predict(subject, Run(1, 8))
    monkeypatch.undo()
    assert (
        predict(subject, Run(1, 8)).total
        == predict(subject_of("llama", "full", tiny_model("llama"), Run()), Run(1, 8)).total
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"sharding": "fsdp", "devices": 2}, r"--sharding: unknown name 'fsdp'.*closest is 'fsdp2'"),
        ({"sharding": "fsdp2"}, r"--sharding: fsdp2 with 1 device, expected more than one"),
        ({"sharding": "none", "devices": 2}, r"--sharding: none with 2 devices, expected one of ddp"),
        ({"dtype": "bf32"}, r"--dtype: unknown name 'bf32'.*closest is 'bf16'|'fp32'"),
        ({"device": "hpu"}, r"--device: unknown name 'hpu', expected one of cpu, cuda"),
        ({"batch": 0}, r"--batch: 0, expected at least 1"),
        ({"devices": 0}, r"--devices: 0, expected at least 1"),
        ({"sequence": 0}, r"--sequence: 0, expected at least 1"),
        ({"target": -1}, r"--target-sequence: -1, expected at least 1"),
        ({"precision": "tf32"}, r"--precision: unknown name 'tf32', expected one of auto, fp32, bf16, fp16"),
        (
            {"cpu_offload": True, "sharding": "fsdp2", "devices": 2},
            r"train.cpu_offload: true on the CPU",
        ),
    ),
)
def test_wrong_requests(changes: Mapping[str, Any], message: str) -> None:
    """Each names the option, what was found and what is expected."""
    with pytest.raises(RequestError, match=message):
        replace(Run(), **changes)
