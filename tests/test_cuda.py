"""On a CUDA device: runs in bf16, what they report, torch.compile, TF32, and exports of what was trained there.

python -m pytest -m gpu tests
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.dense import export
from surgery import ReadSpec, acceleration, paca_layers
from surgery.adapter import open_adapter
from surgery.backends import local
from surgery.delta import SideDelta, require_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach
from surgery.recipe import DataSection, TrainSection
from surgery.train import TrainResult, train
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.examples import CASES
from tests.test_compile import agree, enable_checkpointing, same_gradients
from tests.test_paca import built, loss_of, trainable, trained_columns
from tests.tiny import sample_inputs

# Drivers and compilers warn of their versions, which differ from machine to machine: no error there.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CASE = next(case for case in CASES if (case.family, case.task) == ("llama", "causal-lm"))
SPECS: dict[str, Any] = {"paca": PacaSpec(rank=4), "read": ReadSpec(hidden=8)}
STEPS = 8


def section(**settings: Any) -> TrainSection:
    """Some steps on the first CUDA device."""
    return TrainSection(
        **{**CASE.train_section().model_dump(), "device": "cuda", "max_steps": STEPS, "logging_steps": 1, **settings}
    )


def run(base: Path, out: Path, method: str, data: DataSection, **settings: Any) -> TrainResult:
    """A fresh adapter, trained."""
    apply(base, out, SPECS[method])
    return train(out, data, section(**settings))


def losses(folder: Path) -> Tensor:
    """The loss of each step."""
    lines = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def changes(folder: Path) -> Tensor:
    """All that was trained, less what it started from, as one vector."""
    delta = open_adapter(folder).delta
    if isinstance(delta, SideDelta):
        return torch.cat([value.flatten() for _, value in sorted(delta.state.items())])
    patches = require_columns(delta, "test").patches
    return torch.cat([(p.values - p.original.float()).flatten() for _, p in sorted(patches.items())])


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """AdamW of single operations in place of the fused one; call it to have that from then on."""

    def start() -> None:
        real = local.training_arguments

        def plain(*args: Any, **kwargs: Any) -> Any:
            arguments = real(*args, **kwargs)
            arguments.optim = type(arguments.optim)("adamw_torch")
            arguments.optim_args = "foreach=False"
            return arguments

        backend = replace(local.BACKEND, training_arguments=plain)
        monkeypatch.setattr(local, "BACKEND", backend)

    return start


@pytest.mark.parametrize("method", SPECS)
def test_a_run_in_bf16_equals_one_without_anything_fused(
    method: str, tiny_model: TinyModel, tmp_path: Path, unfused: Any
) -> None:
    """Fused AdamW, sdpa and TF32 against single operations, eager attention, no TF32: equal up to bf16's rounding."""
    data, base = CASE.write(tmp_path), tiny_model("llama", dtype=torch.bfloat16)
    first = run(base, tmp_path / "fused", method, data, precision="bf16")
    unfused()
    second = run(base, tmp_path / "plain", method, data, precision="bf16", attention="eager", tf32="off")
    assert first.device == second.device == "cuda"
    torch.testing.assert_close(losses(tmp_path / "fused"), losses(tmp_path / "plain"), rtol=0.02, atol=0.02)
    fused, plain = changes(tmp_path / "fused"), changes(tmp_path / "plain")
    assert float(torch.nn.functional.cosine_similarity(fused, plain, dim=0)) > 0.95
    assert first.after["loss"] < first.before["loss"]


@pytest.mark.parametrize("method", SPECS)
def test_a_run_in_fp32_is_the_cpu_s(method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Without TF32 both devices compute the same, up to the order of sums."""
    data, base = CASE.write(tmp_path), tiny_model("llama")
    for device in ("cuda", "cpu"):
        run(base, tmp_path / device, method, data, device=device, precision="fp32")
    torch.testing.assert_close(losses(tmp_path / "cuda"), losses(tmp_path / "cpu"), rtol=1e-3, atol=1e-3)
    ours, theirs = changes(tmp_path / "cuda"), changes(tmp_path / "cpu")
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.999


def test_peak_memory_is_the_device_s(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What the allocator held at most, in the result and in the record; `auto` means this device, and bf16."""
    torch.cuda.reset_peak_memory_stats()
    result = run(tiny_model("llama"), tmp_path / "adapter", "paca", CASE.write(tmp_path), device="auto")
    assert 0 < result.peak_memory_bytes <= torch.cuda.max_memory_allocated()
    training = json.loads((tmp_path / "adapter" / "surgery.json").read_text())["manifest"]["training"]
    assert training["peak_memory_bytes"] == result.peak_memory_bytes
    assert training["kernels"]["autocast"] == ("bf16" if acceleration.has_bf16() else "fp16")
    weights = sum(path.stat().st_size for path in tiny_model("llama").glob("*.safetensors"))
    assert result.peak_memory_bytes > weights // 2


@pytest.mark.parametrize("checkpointing", (False, True), ids=("kept", "checkpointed"))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_what_was_trained_here_exports_and_verifies(
    precision: str, checkpointing: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The merged checkpoint is the base with the trained columns, and computes what was trained, on the CPU."""
    base = tiny_model("llama", dtype=torch.bfloat16 if precision == "bf16" else None)
    run(base, tmp_path / "adapter", "paca", CASE.write(tmp_path), precision=precision,
        gradient_checkpointing=checkpointing)  # fmt: skip
    export(open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert verify(tmp_path / "merged").checks
    assert open_adapter(tmp_path / "adapter").delta.moved == 14


@pytest.mark.slow
@pytest.mark.parametrize("method", SPECS)
def test_a_compiled_run_agrees(method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """With the default compiler: losses of each step up to rounding, no graph break, no environment left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data, base = CASE.write(tmp_path), tiny_model("llama")
    for compiled in (False, True):
        run(base, tmp_path / str(compiled), method, data, precision="fp32", tf32="off", compile=compiled)
    torch.testing.assert_close(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
@pytest.mark.parametrize("checkpointing", (False, True), ids=("kept", "checkpointed"))
def test_a_compiled_model_is_never_stale(checkpointing: bool, mode: str, tiny_model: TinyModel) -> None:
    """Gradients are eager's and each step shows in the next forward, also where CUDA graphs replay what they can."""
    torch._dynamo.reset()
    model = built(tiny_model("llama")).cuda()
    attach(model, PacaSpec(rank=4))
    model.config.use_cache = False
    if checkpointing:
        enable_checkpointing(model.train())
    ours = copy.deepcopy(model)
    ours.compile(mode=mode, fullgraph=True)
    inputs = {name: value.cuda() for name, value in sample_inputs("llama").items()}
    before = None
    for number in range(4):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            for version in (ours, model):
                version.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                loss_of(version, inputs).backward()
        same_gradients(ours, model, 1e-3)
        for version in (ours, model):
            torch.optim.AdamW(trainable(version), lr=0.02, fused=True).step()
        after = [version(**inputs).logits.detach().clone() for version in (ours, model)]
        agree(*after, 1e-3)
        assert before is None or not torch.allclose(after[0], before)
        before = after[0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_right_after_a_fused_step_columns_are_in_the_weight(
    family: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    """In the next forward the weight holds the trained columns, rounded once; the others have not moved."""
    model = built(tiny_model(family, dtype=dtype), family).cuda().train()
    attach(model, PacaSpec(rank=4))
    before = {name: layer.weight.detach().clone() for name, layer in paca_layers.layers(model).items()}
    inputs = {name: value.cuda() for name, value in sample_inputs(family).items()}
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, fused=True)
    for _ in range(2):
        loss_of(model, inputs).backward()
        optimizer.step()
    model.eval()
    model(**inputs)
    for name, layer in paca_layers.layers(model).items():
        held = paca_layers.read_columns(layer.weight, layer.paca_columns, layer.input_axis)
        assert torch.equal(held, trained_columns(layer).to(dtype))
        moved = (layer.weight != before[name]).any(1 - layer.input_axis).nonzero().flatten()
        assert len(moved)
        assert set(moved.tolist()) <= set(layer.paca_columns.tolist())


@pytest.mark.parametrize("autocast", (False, True), ids=("as it is", "autocast"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_gradients_are_the_dense_ones(dtype: torch.dtype, autocast: bool, tiny_model: TinyModel) -> None:
    """The columns' gradients on the device are those of the whole weights there."""
    ours = built(tiny_model("llama", dtype=dtype)).cuda()
    theirs = copy.deepcopy(ours)
    attach(ours, PacaSpec(rank=4))
    inputs = {name: value.cuda() for name, value in sample_inputs("llama").items()}
    for model in (ours, theirs):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, inputs)
        loss.backward()
    for name, layer in paca_layers.layers(ours).items():
        weight: Any = theirs.get_submodule(name).weight
        expected = paca_layers.read_columns(weight.grad, layer.paca_columns, layer.input_axis).float()
        agree(layer.paca_delta.grad, expected, 0.03 if autocast or dtype == torch.bfloat16 else 1e-4)


def product_error() -> float:
    """How far a product in fp32 is from the exact one, relative to its largest value."""
    torch.manual_seed(0)
    a, b = (torch.randn(512, 512, device="cuda", dtype=torch.float64) for _ in range(2))
    exact = a @ b
    return float(((a.float() @ b.float()).double() - exact).abs().max() / exact.abs().max())


def test_tf32_is_what_the_run_says(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On, products in fp32 are rounded as TF32's; off, or with auto in fp32, they are not; each run sets it anew."""
    if not acceleration.has_tf32():
        pytest.skip(f"needs TF32: {torch.cuda.get_device_name()} has none")
    data, errors = CASE.write(tmp_path), {}
    for number, (tf32, precision) in enumerate((("on", "fp32"), ("auto", "fp32"), ("auto", "bf16"), ("off", "bf16"))):
        run(tiny_model("llama"), tmp_path / str(number), "paca", data, tf32=tf32, precision=precision, max_steps=1)
        errors[tf32, precision] = product_error()
    coarse = {key for key, error in errors.items() if error > 1e-5}
    assert coarse == {("on", "fp32"), ("auto", "bf16")}


def test_memory_is_pinned_and_adamw_fused(tmp_path: Path) -> None:
    """What the trainer is given for this device."""
    arguments = local.training_arguments(
        section(), folder=tmp_path, device="cuda", autocast="bf16", steps=3, has_eval=False
    )
    assert arguments.dataloader_pin_memory
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.bf16
    assert not arguments.fp16
    assert arguments.device.type == "cuda"


def test_backward_holds_no_copy_of_the_weight() -> None:
    """A layer's backward keeps r channels of its input: the allocator's own figure."""
    layer = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    holder = nn.Sequential(layer)
    attach(holder, PacaSpec(rank=16))
    x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    holder(x)  # kernels' workspaces
    before = torch.cuda.memory_allocated()
    result = holder(x)
    kept = torch.cuda.memory_allocated() - before - result.numel() * 2
    assert kept <= 1024 * 16 * 2 + 1024
    assert result.requires_grad
