"""Convolutions, rows of an embedding and packed attention under what a training run does to a model.

Each property once for each of the three kinds, on modules of a few hundred values.
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from exporters import dense
from surgery.compare import compare
from surgery.images import TASK
from surgery.inspection import inspect
from surgery.memory.predict import predict
from surgery.memory.run import Run
from surgery.memory.subject import open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, detach
from surgery.paca_layers import SharedGather, layers, read_columns
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from tests.conftest import TinyModel
from tests.console import Console
from tests.measured import measure_ours
from tests.test_images import COLOURS, with_processor, write_folder
from tests.test_paca import OPTIMIZERS, trainable
from tests.tiny import sample_inputs
from tests.trained import make_adapter

ROWS = (3, 9)
KINDS = ("convolution", "embedding", "attention")
SPECS = {
    "convolution": PacaSpec(rank=2, targets=("all-conv",), alpha=3.0),
    "embedding": PacaSpec(rank=2, targets=("words", "out"), rows=ROWS, alpha=3.0),
    "attention": PacaSpec(rank=3, alpha=6.0),
}
IMAGES = PacaSpec(rank=4, targets=("all-conv", "all-linear"))
TURNS = PacaSpec(targets=("all-conv", "all-linear"), budget="20%", resample="every:1")


class Convolutions(nn.Module):
    """Two, and what is normalised between them."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.far = nn.Conv2d(5, 4, (2, 3), stride=2, padding_mode="reflect", padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.far(self.norm(self.near(x)).sigmoid())


class Words(nn.Module):
    """An embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.words(tokens).tanh())


class Mixer(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


BUILT: dict[str, Callable[[], nn.Module]] = {"convolution": Convolutions, "embedding": Words, "attention": Mixer}


def fed(kind: str, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input of a kind of model."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, 11, (4, 7), generator=generator)
    shape = (2, 6, 8, 7) if kind == "convolution" else (3, 5, 8)
    return torch.randn(shape, generator=generator, dtype=dtype)


def pair(kind: str, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """An opened model, and the same one as torch has it. Batch norms are in eval mode."""
    torch.manual_seed(0)
    theirs = BUILT[kind]().to(dtype).eval()
    ours = copy.deepcopy(theirs)
    attach(ours, SPECS[kind])
    return ours, theirs


def weigh(result: Tensor) -> Tensor:
    """A number that weighs each output by another factor."""
    return (result * torch.arange(result.numel(), dtype=result.dtype).reshape(result.shape).cos()).sum()


def dense_columns(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Of each opened layer its columns' parameter, and what torch's own gradient makes of it."""
    for name, layer in layers(ours).items():
        weight = "in_proj_weight" if isinstance(theirs.get_submodule(name), nn.MultiheadAttention) else "weight"
        gradient = theirs.get_parameter(f"{name}.{weight}").grad
        assert gradient is not None
        yield layer.paca_delta, read_columns(gradient, layer.paca_columns, layer.input_axis) * layer.paca_scale


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_and_the_columns_right_after_a_step(kind: str) -> None:
    """Two micro-batches add up to the dense gradient; the next forward, in either mode, is the merged model's."""
    ours, theirs = pair(kind)
    optimizers = [OPTIMIZERS[name](trainable(ours)) for name in ("AdamW fused", "no Optimizer")]
    for number, optimizer in enumerate(optimizers):
        before = ours(fed(kind)).detach()
        for model in (ours, theirs):
            model.zero_grad()
            for seed in (2 * number, 2 * number + 1):
                weigh(model(fed(kind, seed))).backward()
        if number == 0:  # later the columns are others than theirs
            for delta, expected in dense_columns(ours, theirs):
                torch.testing.assert_close(delta.grad, expected, rtol=1e-10, atol=1e-12)
        optimizer.step()
        merged = copy.deepcopy(ours)
        for train in (number == 0, number == 1):
            ours.train(train)
            after = ours(fed(kind)).detach()
            if train == (number == 0):
                detach(merged, merge=True)
                merged.eval()
            torch.testing.assert_close(after, merged(fed(kind)).detach(), rtol=1e-12, atol=1e-13)
        assert not torch.allclose(after, before, rtol=1e-3)
        ours.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_nothing_and_gives_the_same_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was gathered is let go with the forward and gathered again in backward; gradients are equal bit for bit."""
    held: list[weakref.ref[Tensor]] = []
    gather = SharedGather.__call__

    def note(*args: Any) -> Tensor:
        kept = gather(*args)
        held.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(SharedGather, "__call__", note)
    plain, _ = pair(kind)
    again = copy.deepcopy(plain)
    weigh(plain(fed(kind))).backward()
    held.clear()
    outputs = checkpoint(again, fed(kind), use_reentrant=False)
    gc.collect()
    assert held
    assert not any(reference() is not None for reference in held)
    weigh(outputs).backward()
    for mine, other in zip(trainable(again), trainable(plain), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_outputs_and_gradients_are_torch_s(kind: str) -> None:
    """Outputs in bf16, bit for bit; the columns' gradients in fp32, the dense ones but for rounding."""
    ours, theirs = pair(kind, dtype=torch.float32)
    x = fed(kind, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [model(x) for model in (ours, theirs)]
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    assert torch.equal(*results)
    for result in results:
        weigh(result.float()).backward()
    for delta, expected in dense_columns(ours, theirs):
        assert delta.grad is not None
        assert delta.grad.dtype == torch.float32
        torch.testing.assert_close(delta.grad, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_between_compiled_graphs_they_run_as_they_are(kind: str) -> None:
    """A compiled model trains as the eager one does, over steps whose columns are fresh, and compiles nothing anew."""
    torch._dynamo.reset()
    eager, _ = pair(kind)
    ours: Any = copy.deepcopy(eager)
    ours.compile(backend="aot_eager")
    optimizers = [torch.optim.SGD(trainable(model), lr=0.1) for model in (ours, eager)]
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            results = [model(fed(kind, step)) for model in (ours, eager)]
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
            for result, optimizer in zip(results, optimizers, strict=True):
                optimizer.zero_grad()
                weigh(result).backward()
            for mine, other in zip(trainable(ours), trainable(eager), strict=True):
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-10)
            for optimizer in optimizers:
                optimizer.step()
    merged = copy.deepcopy(eager)
    detach(merged, merge=True)
    torch.testing.assert_close(ours(fed(kind)), merged(fed(kind)), rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


# --- the files' side


@pytest.fixture(scope="module")
def convnext(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an image processor."""
    return with_processor(tiny_model("convnext"), tmp_path_factory.mktemp("convnext") / "base", "convnext")


@pytest.fixture(scope="module")
def moved(convnext: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of it, all of whose columns moved, and beside it its merge."""
    folder = tmp_path_factory.mktemp("moved") / "adapter"
    dense.export(make_adapter(convnext, folder, IMAGES), folder.with_name("merged"))
    return folder


def test_a_difference_is_said_in_input_channels(convnext: Path, moved: Path) -> None:
    """`surgery diff` of base and merge: the trained channels of each kernel, and no row of it."""
    adapter = surgery.adapter.open_adapter(moved)
    found = {tensor.name: tensor.lines for tensor in compare(convnext, moved.with_name("merged")).different}
    assert {"classifier.weight", "classifier.bias"} == set(found) - {target.weight for target in adapter.plan.targets}
    for target in adapter.plan.targets:
        columns = tuple(adapter.delta.patches[target.module].columns.tolist())
        lines = found[target.weight]
        assert lines is not None
        assert (lines.axis, lines.numbers, lines.total) == (1, columns, target.in_features)


def test_a_kernel_s_size_is_in_the_table(convnext: Path, moved: Path, console: Console) -> None:
    """Output and input channels, then height and width, in the plan and in what `surgery inspect` says."""
    code, out, _ = console("apply", convnext, "--plan", "--rank", 4, "--targets", "all-conv,all-linear")
    assert code == 0
    shown = "12 x 8 x 2 x 2"
    assert shown in out
    assert shown in "\n".join(inspect(moved).lines())
    rows = inspect(moved).to_dict()["plan"]["targets"]
    assert [(row["shape"], row["kernel"]) for row in rows if row["kernel"]] == [((12, 8), (2, 2))]


@pytest.mark.parametrize("spec", (IMAGES, TURNS), ids=("rank", "budget"))
def test_what_a_step_keeps_is_predicted(
    spec: PacaSpec, convnext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`surgery plan` on a ConvNeXt: its bytes are those that a real step keeps, columns and optimizer included.

    Also under a budget, and where columns will be drawn anew, of which a device holds one set.
    """
    task = TaskSpec(TASK, tuple(sorted(COLOURS)))
    surgery.apply(convnext, tmp_path / "adapter", spec, task=task)
    data = DataSection(train=[str(write_folder(tmp_path / "photos"))])
    settings = TrainSection(max_steps=1, batch_size=4, device="cpu")
    found = measure_ours(monkeypatch, tmp_path / "adapter", data, settings, task)
    run = Run(batch=4, sequence=1)
    predicted = predict(open_subject(convnext, "paca", spec, task, run), run)
    assert sum(predicted.activations.values()) == found.saved
    assert predicted.activations["gathered columns"] > 0
    assert predicted.parts["optimizer"] == found.optimizer_bytes()
    assert predicted.parts["weights"] + predicted.parts["columns"] == found.weight_bytes()


@pytest.mark.parametrize(
    ("family", "arguments", "first"),
    (
        ("convnext", ("--targets", "all-conv"), r"1 of the targets are no linear layers, first convnext\."),
        ("llama", ("--targets", "embed_tokens", "--rows", "id:7"), "first model.embed_tokens.weight"),
        ("siglip", (), "in_proj_weight"),
    ),
)
def test_as_lora_they_are_refused(
    family: str, arguments: tuple[str, ...], first: str, tiny_model: TinyModel, console: Console, tmp_path: Path
) -> None:
    """Exit code 5, nothing written, and the way that there is."""
    base, adapter = tiny_model(family), tmp_path / "adapter"
    assert console("apply", base, "-o", adapter, "--rank", 4, *arguments)[0] == 0
    code, _, said = console("export", adapter, "--format", "lora", "-o", tmp_path / "out")
    assert code == 5
    assert re.search(first, said)
    assert "--merge" in said
    assert not (tmp_path / "out").exists()


class Logits(nn.Module):
    """A model as its exporter wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def test_a_graph_of_the_base_is_patched(convnext: Path, moved: Path, tmp_path: Path) -> None:
    """Kernels are found by content, and the patched graph computes what the merged model does."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import transformers

    from exporters.onnx_patch import patch
    from surgery.exported import load_merged
    from tests.graphs import Graph

    model = transformers.ConvNextForImageClassification.from_pretrained(convnext).eval()
    pixels, file = sample_inputs("convnext"), tmp_path / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(model), (pixels["pixel_values"],), str(file), input_names=["pixel_values"],
                          output_names=["logits"], dynamo=False, do_constant_folding=False)  # fmt: skip
    result = patch(file, moved, tmp_path / "patched", base=convnext)
    patched = {block.weight for blocks in result.blocks.values() for block in blocks}
    assert patched >= {target.weight for target in surgery.adapter.open_adapter(moved).plan.targets}
    with torch.no_grad():
        expected = load_merged(moved.with_name("merged"))(**pixels).logits
        before = model(**pixels).logits
    found = Graph(result.onnx)(pixels)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(found, before, rtol=0, atol=1e-2 * float(before.abs().max()))
