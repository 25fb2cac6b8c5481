"""torch.compile: one graph, the gradients of the eager model, columns that are never stale, nothing compiled twice.

Most tests take the backend that runs the compiled graph's operators one by one. It computes some of them (norms,
activations) in other parts than eager mode does, so that results agree up to rounding, whatever the layers do.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition

from surgery import ReadSpec, paca_layers
from surgery.compat import keep_inputs_frozen, set_checkpointing
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach
from tests.conftest import TinyModel
from tests.examples import mostly_long
from tests.reading import move
from tests.test_paca import OPTIMIZERS, built, logits_of, loss_of, trainable
from tests.tiny import build_model, sample_inputs

RANK_4 = PacaSpec(rank=4)
# One for each way in which a parameter is written: by torch's kernels, through `.data`, by no torch.optim.Optimizer.
WRITERS = ("AdamW", "AdamW fused", "SGD foreach", "writes .data", "swaps .data", "no Optimizer")
FAST_WRITERS = (("AdamW fused", False), ("no Optimizer", True))
# What torch warns of while it traces its own autograd functions and tensors that are no leaves.
TRACING = (
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
)


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[Any]:
    """Nothing compiled is left from another test, nor for the next."""
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: Any = "aot_eager") -> Any:
    """The model, compiled in place as one graph: a break in it is an error."""
    model.compile(backend=backend, fullgraph=True)
    return model


def pair(family: str, folder: Any, spec: Any = RANK_4, *, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A compiled and an eager model with equal weights, in eval mode: dropout draws otherwise where it is compiled."""
    model = built(folder, family, dtype=dtype).eval()
    attach(model, spec)
    return compiled(copy.deepcopy(model)), model


def agree(mine: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to a part of the largest value."""
    largest = float(other.detach().abs().max())
    assert largest > 0
    torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * largest)


def same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-6) -> None:
    """The gradients of all that trains agree, and are there."""
    for mine, other in zip(trainable(ours), trainable(theirs), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        agree(mine.grad, other.grad, tolerance)


def no_more_compiling() -> Any:
    """From here on, a recompilation is an error."""
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.parametrize(
    ("family", "alpha"),
    mostly_long(itertools.product(("llama", "gpt2", "bert", "t5"), (None, 6.0)), ("gpt2", None), ("llama", 6.0)),
)
def test_one_graph_trains_as_the_eager_model_does(family: str, alpha: float | None, tiny_model: TinyModel) -> None:
    """Losses and gradients of three steps; the second step and the third compile nothing."""
    models = pair(family, tiny_model(family), PacaSpec(rank=4, alpha=alpha))
    optimizers = [torch.optim.AdamW(trainable(model), lr=0.02) for model in models]
    inputs = sample_inputs(family)

    def step() -> None:
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model, inputs))
            losses[-1].backward()
        same_gradients(*models)
        agree(*losses)
        for optimizer in optimizers:
            optimizer.step()

    step()
    with no_more_compiling():
        step()
        step()


@pytest.mark.parametrize(("name", "train"), mostly_long(itertools.product(WRITERS, (True, False)), *FAST_WRITERS))
def test_after_a_step_the_compiled_model_has_the_new_columns(name: str, train: bool, tiny_model: TinyModel) -> None:
    """Whoever made the step: logits are those of a plain copy with the trained columns, and have moved."""
    ours, _ = pair("llama", tiny_model("llama"))
    inputs = sample_inputs("llama")
    optimizer = OPTIMIZERS[name](trainable(ours))
    for _ in range(2):
        before = logits_of(ours, inputs, train=train)
        ours.train()
        optimizer.zero_grad()
        loss_of(ours, inputs).backward()
        optimizer.step()
        after = logits_of(ours, inputs, train=train)
        assert not torch.allclose(before, after)
        fresh = copy.deepcopy(ours)  # eager: a copy is not compiled
        for layer in paca_layers.layers(fresh).values():
            layer.refresh()
        agree(after, logits_of(fresh, inputs, train=train))


def test_columns_are_written_once_a_step(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a compiled model too: every layer once for each optimizer step, none in an evaluation without one."""
    ours, _ = pair("llama", tiny_model("llama"))
    inputs = sample_inputs("llama")
    loss_of(ours, inputs)
    written: list[int] = []
    real = paca_layers.write_columns
    monkeypatch.setattr(paca_layers, "write_columns", lambda *args: (written.append(1), real(*args))[1])
    optimizer = torch.optim.AdamW(trainable(ours), lr=0.01)
    for steps in (1, 2, 3):
        loss_of(ours, inputs).backward()
        optimizer.step()
        loss_of(ours, inputs)
        loss_of(ours, inputs)
        assert len(written) == steps * len(paca_layers.layers(ours))


def test_a_refresh_between_forward_and_backward_is_no_error(tiny_model: TinyModel) -> None:
    """It changes no value, and torch's version check does not trip over it."""
    ours, theirs = pair("llama", tiny_model("llama"))
    losses = [loss_of(model, sample_inputs("llama")) for model in (ours, theirs)]
    for layer in paca_layers.layers(ours).values():
        layer.refresh()
    for loss in losses:
        loss.backward()
    same_gradients(ours, theirs)


# --- what the graphs hold


def graphs_of(model: nn.Module, run: Callable[[], Tensor]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The forward graph of a model in training, and what it returns: the result and what backward keeps."""
    found: list[torch.fx.GraphModule] = []
    returned: list[Tensor] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        found.append(graph)
        compute = torch._functorch.aot_autograd.make_boxed_func(graph.forward)

        def forward(args: Any) -> Any:
            results = compute(args)
            returned.extend(x for x in results if isinstance(x, Tensor))
            return results

        forward._boxed_call = True  # type: ignore[attr-defined]
        return forward

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _inputs: torch._functorch.aot_autograd.make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled(model, backend)
    run().backward()
    return found[0], returned


def test_a_group_gathers_once_in_a_graph(tiny_model: TinyModel) -> None:
    """Fourteen layers with eight distinct inputs: eight gathers, also after the model was moved and copied."""
    model = built(tiny_model("llama")).train()
    attach(model, RANK_4)
    for version in (model, copy.deepcopy(model).to(torch.float64)):
        graph, _ = graphs_of(version, lambda version=version: loss_of(version, sample_inputs("llama")))  # type: ignore[misc]
        targets = [str(node.target) for node in graph.graph.nodes]
        assert sum("index_select" in target for target in targets) == 8
        assert sum("paca_linear" in target for target in targets) == 14
        torch._dynamo.reset()


def compiled_bytes(hidden: int, rank: int | None) -> int:
    """Bytes that a compiled Llama of that width keeps for backward, besides its own tensors; rank None: all frozen."""
    model: Any = build_model("llama", overrides={"hidden_size": hidden})
    model.requires_grad_(requires_grad=False)
    if rank:
        attach(model, PacaSpec(rank=rank))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    embeddings = torch.randn(2, 9, hidden, requires_grad=True)
    _, returned = graphs_of(model, lambda: model(inputs_embeds=embeddings).logits.sum())  # noqa: PLW0108  once it is compiled
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in returned}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize(("rank", "hidden"), mostly_long(itertools.product((1, 16), (32, 64)), (16, 64)))
def test_a_graph_keeps_r_channels_of_each_input(rank: int, hidden: int) -> None:
    """At most r * tokens * 4 bytes for each distinct input above a frozen model, whatever the width.

    And a layer's number: 8 bytes.
    """
    expected = 2 * 4 * rank * (2 * 9) * 4 + 14 * 8
    assert compiled_bytes(hidden, rank) - compiled_bytes(hidden, None) <= expected


# --- in company


@pytest.mark.parametrize("family", mostly_long(("llama", "gpt2"), "llama"))
def test_autocast_computes_as_in_eager_mode(family: str, tiny_model: TinyModel) -> None:
    """Under bf16 autocast logits and gradients are eager's; gradients are fp32."""
    models = pair(family, tiny_model(family), dtype=torch.float32)
    logits = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(**sample_inputs(family)).logits
        logits.append(result.detach())
        result.double().square().mean().backward()
    assert logits[0].dtype == logits[1].dtype == torch.bfloat16
    agree(*logits, 0.02)
    same_gradients(*models, 0.03)
    gradients = [parameter.grad for parameter in trainable(models[0])]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def enable_checkpointing(model: Any) -> None:
    """Non-reentrant, with inputs that stay frozen."""
    set_checkpointing(model, on=True)
    keep_inputs_frozen(model)


@pytest.mark.parametrize("family", mostly_long(("llama", "gpt2"), "llama"))
def test_gradient_checkpointing_compiles(family: str, tiny_model: TinyModel) -> None:
    """With the layers recomputed in backward the graph is one, gradients are the same, and the next step shows."""
    models = pair(family, tiny_model(family))
    for model in models:
        enable_checkpointing(model.train())
        model.config.use_cache = False  # transformers says so itself, in a warning that breaks the graph
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    optimizers = [torch.optim.AdamW(trainable(model), lr=0.02) for model in models]
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, sample_inputs(family)).backward()
        same_gradients(*models)
        for optimizer in optimizers:
            optimizer.step()


@TRACING[1]
def test_layers_compiled_one_by_one_share_a_graph(tiny_model: TinyModel) -> None:
    """Regional compilation: no number of a layer is compiled in, so that blocks run the graph of an earlier one.

    The first has its own: nothing before it trains, so its input has no gradient.
    """
    _, model = pair("llama", tiny_model("llama", overrides={"num_hidden_layers": 4}))
    model.config.use_cache = False  # else each layer looks whether its part of the cache is there
    ours = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in ours.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for version in (ours, model):
        loss_of(version, sample_inputs("llama")).backward()
    same_gradients(ours, model)
    assert counter.frame_count == 2


@pytest.mark.long
def test_a_copy_of_a_compiled_model_lives_on_its_own(tiny_model: TinyModel) -> None:
    """Training the copy leaves the first model alone, in its graph too."""
    ours, _ = pair("llama", tiny_model("llama"))
    inputs = sample_inputs("llama")
    before = logits_of(ours, inputs)
    other = compiled(copy.deepcopy(ours))
    loss_of(other.train(), inputs).backward()
    torch.optim.SGD(trainable(other), lr=0.5).step()
    assert not torch.equal(logits_of(other, inputs), before)
    assert torch.equal(logits_of(ours, inputs), before)


@pytest.mark.parametrize("mode", mostly_long((torch.no_grad, torch.inference_mode), torch.inference_mode))
def test_inference_sees_a_step(mode: Any, tiny_model: TinyModel) -> None:
    """A compiled model that generates between steps has the columns of the last one."""
    ours, theirs = pair("llama", tiny_model("llama"))
    inputs = sample_inputs("llama")
    for _ in range(2):
        for model in (ours, theirs):
            loss_of(model, inputs).backward()
            torch.optim.SGD(trainable(model), lr=0.5).step()
            model.zero_grad()
        with mode():
            agree(ours(**inputs).logits, theirs(**inputs).logits)


@TRACING[0]
@pytest.mark.parametrize(
    ("family", "cell"), mostly_long((("llama", "gru"), ("bert", "lstm"), ("t5", "rnn")), ("llama", "gru"))
)
def test_read_compiles_as_one_graph(family: str, cell: str, tiny_model: TinyModel) -> None:
    """A backbone with a side network: the hooks break no graph, and three steps compile once."""
    models = [built(tiny_model(family), family) for _ in range(2)]
    for model in models:
        attach(model, ReadSpec(hidden=8, cell=cell))
        move(model)
    compiled(models[0])
    optimizers = [torch.optim.AdamW(trainable(model), lr=0.02) for model in models]
    inputs = sample_inputs(family)

    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
        same_gradients(*models, 1e-5)  # in single precision
        for optimizer in optimizers:
            optimizer.step()

    step()
    with no_more_compiling():
        step()
        step()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's, of torch's own functions
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++ on the path")
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_inductor_agrees(family: str, tiny_model: TinyModel) -> None:
    """The default backend, which writes kernels of its own: gradients within rounding, steps that compile nothing."""
    ours, model = pair(family, tiny_model(family))
    compiled(ours, "inductor")
    inputs = sample_inputs(family)
    for number in range(2):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            for version in (ours, model):
                version.zero_grad()
                loss_of(version, inputs).backward()
                torch.optim.SGD(trainable(version), lr=0.05).step()
        same_gradients(ours, model, 1e-5)  # norms compute in fp32, here in kernels that join several operations
