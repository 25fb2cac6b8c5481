"""Convolutions: columns are input channels, gradients are the dense ones, and batch norms stay the base's."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import surgery
from exporters import dense, undo
from surgery import paca_layers
from surgery.adapter import open_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import ADAPTER_FILE, require_columns
from surgery.errors import SelectorError, UnsupportedError
from surgery.exported import load_merged
from surgery.images import TASK
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, detach, load, save
from surgery.paca_conv import PacaConv2d
from surgery.paca_layers import SharedGather, gather, layers, open_layer, read_columns
from surgery.planning import plan_checkpoint
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.train import train as run_training
from surgery.trainer import SurgeryCheckpoints
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.test_images import with_processor, write_folder
from tests.test_paca import OPTIMIZERS, logits_of, loss_of, train_steps, trainable
from tests.tiny import OTHERS, build_model, sample_inputs
from tests.trained import make_adapter

# What torch's own layer, with which ours is compared, remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
SPEC = PacaSpec(rank=4, targets=("all-conv",))
CONVOLUTIONAL = ("convnext", "efficientnet", "resnet")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "no bias": {"kernel_size": 2, "stride": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, odd": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of each of three classes."""
    return write_folder(tmp_path / "photos")


@pytest.mark.parametrize(("family", "resampled"), (("convnext", ""), ("convnext", "every:1"), ("efficientnet", "")))
def test_a_run_trains_is_resumed_and_exported(
    family: str, resampled: str, tiny_model: TinyModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`surgery train` on images: stopped and resumed it is the uninterrupted run, and its merge is verified.

    Also where other channels train after each step. Running statistics are the base's all along: no export would hold
    others.
    """
    base = with_processor(tiny_model(family), tmp_path / "base", family)
    targets = ("all-conv", "all-linear") if family == "convnext" else ("all-conv",)
    data, results = DataSection(train=[str(photos)]), {}

    def fit(name: str, resume: str = "no") -> None:
        if not (tmp_path / name).exists():
            select = "magnitude" if resampled else "random"
            spec = PacaSpec(rank=4, targets=targets, select=select, resample=resampled)
            surgery.apply(base, tmp_path / name, spec, task=TaskSpec(TASK))
        settings = TrainSection(
            device="cpu", max_steps=4, batch_size=6, learning_rate=1e-2, save_steps=2, gradient_accumulation=2
        )
        results[name] = run_training(tmp_path / name, data, settings, resume=resume)

    trained: list[Any] = []
    loss = SurgeryCheckpoints.compute_loss

    def note(trainer: Any, model: Any, *args: Any, **settings: Any) -> Any:
        trained.append(trainer.accelerator.unwrap_model(model))
        return loss(trainer, model, *args, **settings)

    monkeypatch.setattr(SurgeryCheckpoints, "compute_loss", note)
    fit("whole")
    assert results["whole"].steps == 4
    adapter = open_adapter(tmp_path / "whole")
    assert adapter.delta.moved == len(adapter.plan.targets)
    assert (max(require_columns(adapter.delta, "test").widths().values()) > 4) == bool(resampled)
    original = PacaConv2d.column_gradient
    with monkeypatch.context() as patch:
        patch.setattr(
            PacaConv2d,
            "column_gradient",
            _stop_after(original, 5 * sum(len(t.sizes) == 4 for t in adapter.plan.targets)),
        )
        with pytest.raises(Stop):
            fit("cut")
    fit("cut", resume="auto")
    assert (tmp_path / "cut" / ADAPTER_FILE).read_bytes() == (tmp_path / "whole" / ADAPTER_FILE).read_bytes()
    stored = Checkpoint.open(base)
    for model in (trained[0], trained[-1]):
        statistics = {name: value for name, value in model.named_buffers() if name in stored}
        assert bool(statistics) == (family == "efficientnet")
        assert all(torch.equal(value, stored.read_tensor(name)) for name, value in statistics.items())
    dense.export(adapter, tmp_path / "merged")
    assert verify(tmp_path / "merged").max_logit_difference == 0


class Stop(Exception):  # noqa: N818  no error: a plug that is pulled
    """The machine stops."""


def _stop_after(original: Any, count: int) -> Any:
    calls: list[int] = []

    def run(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > count:
            raise Stop
        return original(*args)

    return run


def pixels(family: str, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """A batch of images."""
    return {name: values.to(dtype) for name, values in sample_inputs(family, seed=seed).items()}


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model, byte for byte."""
    return {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}


def opened(kind: str, columns: tuple[int, ...] = (0, 2, 5), *, scale: float = 1.0) -> tuple[Any, nn.Conv2d]:
    """A convolution of six channels, opened, and the same one as it was, in double precision."""
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, **KINDS[kind]).double()
    ours = copy.deepcopy(plain).requires_grad_(requires_grad=False)
    settings = {"input_axis": 1, "storage": torch.float64, "shared": SharedGather(1), "scale": scale}
    return open_layer(ours, torch.tensor(columns), opened=PacaConv2d, **settings), plain


def images(*shape: int, channels_last: bool = False) -> Tensor:
    """Noise."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def backward(layer: nn.Module, x: Tensor) -> Tensor:
    """Run both ways with an output's every value weighing another; the input's gradient."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = layer(x)
    (result * torch.arange(result.numel(), dtype=x.dtype).reshape(result.shape).cos()).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_dense_ones(kind: str, channels_last: bool) -> None:
    """In double precision, whatever the stride, padding and dilation: those of the channels, and of the input."""
    ours, theirs = opened(kind)
    if channels_last:
        ours, theirs = (layer.to(memory_format=torch.channels_last) for layer in (ours, theirs))
    x = images(2, 6, 7, 9, channels_last=channels_last)
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(backward(ours, x), backward(theirs, x), rtol=1e-12, atol=1e-13)
    expected = read_columns(theirs.weight.grad, ours.paca_columns, 1)
    torch.testing.assert_close(ours.paca_delta.grad, expected, rtol=1e-12, atol=1e-13)
    assert ours.weight.grad is None


@pytest.mark.parametrize("shape", ((6, 7, 9), (0, 6, 7, 9), (1, 6, 3, 3)), ids=str)
def test_one_image_without_a_batch_and_none_at_all(shape: tuple[int, ...]) -> None:
    """As nn.Conv2d takes them."""
    ours, theirs = opened("plain")
    x = images(*shape)
    torch.testing.assert_close(backward(ours, x), backward(theirs, x), rtol=1e-12, atol=1e-13)
    expected = read_columns(theirs.weight.grad, ours.paca_columns, 1)
    torch.testing.assert_close(ours.paca_delta.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ("uneven", "same, odd", "circular"))
def test_numerical_differentiation_agrees(kind: str) -> None:
    """torch.autograd.gradcheck over the input and the trained columns."""
    layer, _ = opened(kind, scale=1.5)

    def compute(x: Tensor, delta: Tensor) -> Tensor:
        layer.paca_delta.data.copy_(delta.detach())
        layer.refresh()
        return paca_layers._PacaFunction.apply(layer.widen(x), delta, gather(x, layer.paca_columns, -3), layer)

    delta = torch.randn(layer.paca_delta.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (images(2, 6, 4, 5).requires_grad_(), delta))


@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
def test_what_backward_keeps_are_the_trained_channels(channels_last: bool) -> None:
    """And nothing of the others: bytes grow with the rank, not with the width."""
    kept = {}
    for columns in ((1,), (0, 2, 5)):
        layer, _ = opened("stride", columns)
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            layer(images(2, 6, 8, 8, channels_last=channels_last).requires_grad_())
        kept[len(columns)] = sizes
    assert kept == {r: [2 * r * 8 * 8 * 8] for r in (1, 3)}


class Forked(nn.Module):
    """Two convolutions fed by one tensor, and a linear layer along its last axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.near(x) + self.far(x)).mean() + self.last(x).mean()


def test_layers_fed_by_one_tensor_keep_it_once() -> None:
    """Convolutions of a group share one gathered input; another axis of the same tensor is another input."""
    model = Forked()
    attach(model, PacaSpec(rank=2, targets=("all-conv", "all-linear")))
    shared = SharedGather(2)
    for name in ("near", "far"):
        layer = layers(model)[name]
        layer.paca_gather = shared
        layer.paca_columns = shared.one_tensor(torch.tensor([1, 4]))
        layer.paca_original.data = read_columns(layer.weight, torch.tensor([1, 4]), 1)
    storages: set[int] = set()
    held = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(2, 6, 5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x).backward()
    assert sum(tensor.shape == (2, 2, 5, 6) for tensor in held) == 2
    assert len({tensor.untyped_storage().data_ptr() for tensor in held if tensor.shape == (2, 2, 5, 6)}) == 1


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_a_whole_model_s_gradients_are_the_dense_ones(family: str) -> None:
    """Convolutions and linear layers together, in double precision."""
    ours: Any = build_model(family, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    targets = ("all-conv", "all-linear") if family == "convnext" else ("all-conv",)
    attach(ours, PacaSpec(rank=4, targets=targets))
    inputs = pixels(family, torch.float64)
    for model in (ours, theirs):
        loss_of(model, inputs).backward()
    assert len(layers(ours)) > 4
    for name, layer in layers(ours).items():
        expected = read_columns(theirs.get_submodule(name).weight.grad, layer.paca_columns, layer.input_axis)
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("AdamW fused", "writes .data"))
@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_after_a_step_the_model_is_the_merged_one(
    family: str, name: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In training and in eval mode, right after a step, bit for bit: batch norms included."""
    base = tiny_model(family, dtype=dtype)
    model = getattr(transformers, OTHERS[family].model).from_pretrained(base)
    attach(model, SPEC)
    inputs = pixels(family, dtype, seed=3)
    before = logits_of(model, inputs)
    optimizer = OPTIMIZERS[name](trainable(model))
    model.train()
    for seed in range(2):
        optimizer.zero_grad()
        for micro in range(2):
            logits = model(**pixels(family, dtype, seed=10 * seed + micro)).logits
            (-0.01 * logits.double().log_softmax(-1)[:, 0].mean()).backward()
        optimizer.step()
    seen = [logits_of(model, inputs, train=train) for train in (True, False)]
    save(model, tmp_path / "adapter", base=base)
    dense.export(open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    merged = getattr(transformers, OTHERS[family].model).from_pretrained(tmp_path / "merged")
    attach(merged, SPEC)  # which keeps its batch norms as they are, and changes nothing
    for train, ours in zip((True, False), seen, strict=True):
        assert torch.equal(logits_of(merged, inputs, train=train), ours)
    assert not torch.allclose(seen[1].float(), before.float())


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_detaching_gives_the_base_back(family: str) -> None:
    """The base bit for bit with its running statistics, plain classes, no attribute or hook left."""
    model: Any = build_model(family)
    before, fields = bits(model), [sorted(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attach(model, SPEC)
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family=family)
    assert bits(model) != before
    detach(model, merge=False)
    assert bits(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == fields
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert {module.training for module in model.modules()} == {True}
    assert not any(isinstance(module, paca_layers.PacaLayer) for module in model.modules())


def test_the_plan_says_what_trains_and_why_the_rest_does_not(tiny_model: TinyModel) -> None:
    """Grouped convolutions with the number of groups, narrow ones with their channels; statistics stay."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("efficientnet")), SPEC)
    reasons = {entry.pattern: entry.reason for entry in plan.untouched}
    depthwise = "efficientnet.encoder.blocks.*.depthwise_conv.depthwise_conv.weight"
    assert "depthwise convolution (" in reasons[depthwise]
    assert reasons["efficientnet.embeddings.convolution.weight"] == "convolution of 3 channels, fewer than the rank"
    assert {target.sizes[1] for target in plan.targets} == {target.in_features for target in plan.targets}
    assert all(len(target.sizes) == 4 for target in plan.targets)
    assert plan.frozen
    assert all(name.endswith(("bn", "norm")) for name in plan.frozen)
    assert type(plan).from_dict(json.loads(plan.to_json())) == plan


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    (
        (("dwconv",), UnsupportedError, r"'dwconv' means convnext\..*dwconv, a depthwise convolution \(8 groups\)"),
        (("dwconf",), SelectorError, r"matches no layer, .*closest is 'dwconv'"),
        (("all-convs",), SelectorError, r"matches no layer, .*closest is 'all-conv'"),
        (("re:.*downsampling_layer.1",), SelectorError, r"--rank: 9 for .*expected 1 to 8"),
    ),
)
def test_what_cannot_be_opened_is_refused(
    targets: tuple[str, ...], error: type[Exception], message: str, tiny_model: TinyModel
) -> None:
    """With the reason: a channel of a grouped convolution reaches some outputs only."""
    with pytest.raises(error, match=message):
        plan_checkpoint(Checkpoint.open(tiny_model("convnext")), PacaSpec(rank=9, targets=targets))


def test_a_model_of_convolutions_alone_says_how_to_name_them(tiny_model: TinyModel) -> None:
    """`all-linear`, the default, means none of its layers."""
    with pytest.raises(SelectorError, match=r"Name its \d+ convolutions with --targets all-conv"):
        plan_checkpoint(Checkpoint.open(tiny_model("efficientnet")), PacaSpec())


def test_all_conv_that_leaves_narrow_ones_alone_says_so(tiny_model: TinyModel) -> None:
    """Where the rank is above all of them; not that `all-conv` should be named, which it was."""
    with pytest.raises(
        SelectorError, match=r"2 convolutions each has fewer channels than the rank, 8 at most.*Lower -r"
    ):
        plan_checkpoint(Checkpoint.open(tiny_model("convnext")), PacaSpec(targets=("all-conv",)))


@pytest.mark.parametrize("family", CONVOLUTIONAL)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_way_through_files(family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An untouched merge is the base byte for byte; a moved one differs where planned, is verified and undone."""
    base = tiny_model(family, dtype=dtype)
    fresh = surgery.apply(base, tmp_path / "fresh", SPEC)
    dense.export(fresh, tmp_path / "same")
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (base / weights).read_bytes()
    adapter = make_adapter(base, tmp_path / "moved", SPEC)
    dense.export(adapter, tmp_path / "merged")
    found = verify(tmp_path / "merged")
    assert found.max_logit_difference == 0
    assert re.search(rf"\b{len(adapter.plan.targets)} layers? differs? from the base", " ".join(found.lines()))
    undo.undo(tmp_path / "merged", tmp_path / "undone")
    assert (tmp_path / "undone" / weights).read_bytes() == (base / weights).read_bytes()
    patches = require_columns(adapter.delta, "test").patches
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "merged")
    for target in adapter.plan.targets:
        rows = (before.read_tensor(target.weight) != after.read_tensor(target.weight)).any(dim=0)
        assert rows.flatten(1).any(dim=1).nonzero().flatten().tolist() == patches[target.module].columns.tolist()
    loaded = load(tmp_path / "moved")
    inputs = pixels(family, dtype)
    assert torch.equal(logits_of(loaded, inputs), logits_of(load_merged(tmp_path / "merged"), inputs))
