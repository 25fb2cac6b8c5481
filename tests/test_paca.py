"""PaCA in memory: exact gradients, columns that are never stale, a model that can be closed again without a trace."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from exporters import dense
from surgery import paca_layers
from surgery.adapter import open_adapter
from surgery.checkpoint import Checkpoint
from surgery.errors import DamagedError, RequestError, SelectorError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, collect, detach, evaluating, load, save
from surgery.paca_layers import PacaLayer
from surgery.planning import plan_checkpoint
from tests.conftest import TinyModel
from tests.tiny import FAMILIES, build_model, sample_inputs

RANK_4 = PacaSpec(rank=4)


def built(folder: Path, family: str = "llama", *, dtype: torch.dtype | None = None) -> Any:
    """A family's model from a folder, in eval mode."""
    return getattr(transformers, FAMILIES[family].model).from_pretrained(folder, dtype=dtype or "auto")


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A number that depends on every logit."""
    return model(**inputs).logits.double().square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def trained_columns(layer: PacaLayer) -> Tensor:
    """A layer's columns as training has them, in the master copy's dtype."""
    return paca_layers.combine(layer.paca_original, layer.paca_delta, layer.paca_scale)


def logits_of(model: Any, inputs: dict[str, Tensor], *, train: bool = False) -> Tensor:
    """Logits in the mode asked for, dropout drawn from one seed."""
    model.train(train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**inputs).logits.detach()


def merged_model(model: Any, base: Path, work: Path, family: str = "llama") -> Any:
    """The attached model saved, exported and loaded as anyone would load it."""
    save(model, work / "adapter", base=base)
    dense.export(open_adapter(work / "adapter"), work / "merged")
    return built(work / "merged", family)


@pytest.fixture
def llama(tiny_model: TinyModel) -> Any:
    """An attached tiny Llama in training mode."""
    model = built(tiny_model("llama")).train()
    attach(model, RANK_4)
    return model


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """A batch for a decoder."""
    return sample_inputs("llama")


# --- the gradients are the dense ones


class Layers(nn.Module):
    """Two layers fed by one input, of which one is called again on its own output's head."""

    def __init__(self, kind: str, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = (lambda i, o: nn.Linear(i, o, bias=bias)) if kind == "linear" else (lambda i, o: Conv1D(o, i))
        self.first, self.second = make(6, 7), make(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.second(x).tanh()
        return self.first(x) + self.first(middle) * 0.5


@pytest.mark.parametrize("shape", ((5, 6), (2, 3, 6), (2, 3, 2, 6), (6,), (0, 6)), ids=str)
@pytest.mark.parametrize(("kind", "bias"), (("linear", True), ("linear", False), ("conv1d", True)))
def test_gradients_are_the_dense_ones(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    """In double precision: the columns' gradient is the dense weight's at those columns, the input's is the same."""
    if kind == "conv1d" and shape == (6,):
        pytest.skip("Conv1D itself takes no vector")
    ours, theirs = Layers(kind, bias=bias).double(), Layers(kind, bias=bias).double()
    attach(ours, PacaSpec(rank=3))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = [x.clone().requires_grad_() for _ in range(2)]
    for model, value in zip((ours, theirs), given, strict=True):
        result = model(value)
        (result * torch.arange(result.numel(), dtype=torch.float64).reshape(result.shape).cos()).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-12, atol=1e-14)
    for name, layer in paca_layers.layers(ours).items():
        expected = paca_layers.read_columns(
            theirs.get_submodule(name).weight.grad, layer.paca_columns, layer.input_axis
        )
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-12, atol=1e-14)
        assert layer.weight.grad is None
        assert layer.paca_delta.dtype == torch.float64


@pytest.mark.parametrize("kind", ("linear", "conv1d"))
def test_numerical_differentiation_agrees(kind: str) -> None:
    """torch.autograd.gradcheck over the input and the trained columns."""
    model = Layers(kind, bias=True).double()
    attach(model, PacaSpec(rank=3, alpha=6.0))
    layer: Any = model.first

    def compute(x: Tensor, delta: Tensor) -> Tensor:
        layer.paca_delta.data.copy_(delta.detach())
        layer.refresh()
        return paca_layers._PacaFunction.apply(x, delta, paca_layers.gather(x, layer.paca_columns), layer)

    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (x, delta))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_s_gradients_are_the_dense_ones(family: str) -> None:
    """In every family, shared inputs and cross-attention included, in double precision."""
    ours: Any = build_model(family, dtype=torch.float64)
    if family in ("mixtral", "qwen3_moe"):
        ours.set_experts_implementation("eager")  # the default takes no double precision
    theirs = copy.deepcopy(ours)
    attach(ours, RANK_4)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in sample_inputs(family).items()}
    for model in (ours, theirs):
        loss_of(model, inputs).backward()
    for name, layer in paca_layers.layers(ours).items():
        weight = theirs.get_submodule(name).weight
        expected = paca_layers.read_columns(weight.grad, layer.paca_columns, layer.input_axis)
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-9, atol=1e-14)


def test_alpha_multiplies_the_update(tiny_model: TinyModel, inputs: dict[str, Tensor]) -> None:
    """With alpha / rank = 2 a plain gradient step moves the columns four times as far: twice by each of two factors."""
    moved = {}
    for alpha in (None, 8.0):
        model = built(tiny_model("llama"), dtype=torch.float64)
        attach(model, PacaSpec(rank=4, alpha=alpha))
        loss_of(model, inputs).backward()
        torch.optim.SGD(trainable(model), lr=0.1).step()
        moved[alpha] = {name: trained_columns(layer) - layer.paca_original for name, layer in
                        paca_layers.layers(model).items()}  # fmt: skip
    for name, difference in moved[None].items():
        torch.testing.assert_close(moved[8.0][name], 4 * difference, rtol=1e-9, atol=1e-14)


def test_layers_of_a_group_may_have_different_ranks(tiny_model: TinyModel, inputs: dict[str, Tensor]) -> None:
    """Each gets its own columns' gradient, the smaller's columns among the larger's."""
    ours, theirs = (built(tiny_model("llama"), dtype=torch.float64) for _ in range(2))
    attach(ours, PacaSpec(rank=2, rank_pattern={"q_proj": 6, "layers.1.*.v_proj": 6}))
    for model in (ours, theirs):
        loss_of(model, inputs).backward()
    opened = paca_layers.layers(ours)
    for name, layer in opened.items():
        expected = theirs.get_submodule(name).weight.grad[:, layer.paca_columns]
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-9, atol=1e-14)
    q, k = (opened[f"model.layers.0.self_attn.{part}_proj"].paca_columns.tolist() for part in "qk")
    assert set(k) < set(q)


class Reused(nn.Module):
    """Layers of one group that see one tensor object twice, changed in between (or two tensors)."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.in_place = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = self.q(x)
        x = x.add_(1.0) if self.in_place else x + 1.0
        return first + self.k(x) + self.q(x)


def test_a_tensor_changed_in_place_is_gathered_again() -> None:
    """Sharing goes by the tensor and its version, so that an in-place change in between is seen."""
    ours, theirs = Reused(in_place=True).double(), Reused(in_place=False).double()
    attach(ours, PacaSpec(rank=2))
    shared, columns = paca_layers.SharedGather(2), torch.tensor([0, 3])
    for layer in paca_layers.layers(ours).values():
        layer.paca_gather = shared
        layer.paca_columns.copy_(columns)
        layer.paca_original.data.copy_(layer.weight[:, columns])
    x = torch.randn(4, 5, dtype=torch.float64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for name, layer in paca_layers.layers(ours).items():
        torch.testing.assert_close(layer.paca_delta.grad, theirs.get_submodule(name).weight.grad[:, columns])


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_autocast_computes_as_the_dense_layer_does(family: str, tiny_model: TinyModel) -> None:
    """Under bf16 autocast logits equal the dense model's; gradients are fp32, the dense ones up to bf16's rounding."""
    ours, theirs = (built(tiny_model(family), family) for _ in range(2))
    attach(ours, RANK_4)
    logits = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            result = model(**sample_inputs(family)).logits
        logits.append(result.detach())
        result.double().square().mean().backward()
    assert torch.equal(*logits)
    for name, layer in paca_layers.layers(ours).items():
        expected = paca_layers.read_columns(
            theirs.get_submodule(name).weight.grad, layer.paca_columns, layer.input_axis
        )
        assert layer.paca_delta.grad.dtype == torch.float32
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


# --- never stale: right after any step the attached model is the merged one


class DataWriter(torch.optim.Optimizer):
    """Writes through `.data`, which no version counter sees, as DeepSpeed does."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, swaps: bool = False) -> None:
        super().__init__(parameters, {})
        self.swaps = swaps

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if self.swaps:
                parameter.data = parameter.data - 0.5 * parameter.grad
            else:
                parameter.data.copy_(parameter.data - 0.5 * parameter.grad)


class Bare:
    """No torch.optim.Optimizer at all: no hook of torch's can see it step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        for parameter in self.parameters:
            parameter.data.sub_(0.5 * parameter.grad)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "writes .data": DataWriter,
    "swaps .data": lambda p: DataWriter(p, swaps=True),
    "no Optimizer": Bare,
}


def train_steps(model: Any, optimizer: Any, *, steps: int = 2, micro_batches: int = 1, family: str = "llama") -> None:
    """Some optimizer steps; the last act is a step."""
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            loss_of(model, sample_inputs(family, seed=10 * step + micro)).backward()
        optimizer.step()


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_step_the_model_is_the_merged_one(
    name: str, train: bool, tiny_model: TinyModel, llama: Any, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """Logits right after a step, whoever made it, are those of the merged checkpoint bit for bit, and have moved."""
    before = logits_of(llama, inputs, train=train)
    train_steps(llama, OPTIMIZERS[name](trainable(llama)))
    after = logits_of(llama, inputs, train=train)
    assert torch.equal(after, logits_of(merged_model(llama, tiny_model("llama"), tmp_path), inputs, train=train))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5"))
def test_other_dtypes_and_families_too(family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Low precision rounds the columns once, in the model as in the file."""
    if (family, dtype) == ("t5", torch.float16):
        pytest.skip(
            "transformers loads T5's wo in fp32 from an fp16 file, which a live model cannot tell: see test_merge"
        )
    folder = tiny_model(family, dtype=dtype)
    model = built(folder, family)
    attach(model, PacaSpec(rank=4, alpha=3.0))
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family=family)
    mine = logits_of(model, sample_inputs(family), train=True)
    assert torch.equal(
        mine, logits_of(merged_model(model, folder, tmp_path, family), sample_inputs(family), train=True)
    )


def test_accumulated_gradients_are_the_sum(tiny_model: TinyModel, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """Three micro-batches, evaluated in between, give the sum of the dense gradients; then the step shows."""
    ours, theirs = (built(tiny_model("llama"), dtype=torch.float64) for _ in range(2))
    attach(ours, RANK_4)
    for seed in range(3):
        for model in (ours, theirs):
            loss_of(model, sample_inputs("llama", seed=seed)).backward()
        logits_of(ours, inputs)
    for name, layer in paca_layers.layers(ours).items():
        expected = theirs.get_submodule(name).weight.grad[:, layer.paca_columns]
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-9, atol=1e-14)
    before = logits_of(ours, inputs)
    torch.optim.SGD(trainable(ours), lr=0.1, fused=True).step()
    assert not torch.equal(logits_of(ours, inputs), before)


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("evaluations", (0, 1, 2))
def test_gradient_checkpointing_changes_nothing(
    reentrant: bool, evaluations: int, tiny_model: TinyModel, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """Losses and columns after three steps are those without it, whatever number of evaluations came between."""
    results = []
    for checkpointing in (False, True):
        model = built(tiny_model("llama"))
        attach(model, RANK_4)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.config.use_cache = False
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02, fused=True)
        for _ in range(3):
            train_steps(model, optimizer, steps=1, micro_batches=2)
            for _ in range(evaluations):
                logits_of(model, inputs)
        results.append(
            (logits_of(model, inputs), [trained_columns(layer) for layer in paca_layers.layers(model).values()])
        )
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("assign", (False, True))
def test_loaded_state_shows_at_once(assign: bool, tiny_model: TinyModel, llama: Any, inputs: dict[str, Tensor]) -> None:
    """After load_state_dict the next forward computes with the loaded columns, without a change of mode."""
    other = built(tiny_model("llama"))
    attach(other, RANK_4)
    base = logits_of(other, inputs)
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    state = {name: value.clone() for name, value in llama.state_dict().items() if name.endswith("paca_delta")}
    other.load_state_dict(state, strict=False, assign=assign)
    with torch.no_grad():
        mine = other(**inputs).logits
    assert torch.equal(mine, logits_of(llama, inputs))
    assert not torch.equal(mine, base)


def test_loading_plain_weights_keeps_the_trained_columns(
    tiny_model: TinyModel, llama: Any, inputs: dict[str, Tensor]
) -> None:
    """The base's state dict loaded over an attached model overwrites `weight`; the next forward writes it anew."""
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    expected = logits_of(llama, inputs)
    llama.load_state_dict(built(tiny_model("llama")).state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(llama(**inputs).logits, expected)


def test_two_models_do_not_disturb_each_other(tiny_model: TinyModel, inputs: dict[str, Tensor]) -> None:
    """Trained in turns they end as they do trained one after the other."""
    ends = []
    for in_turns in (True, False):
        models = [built(tiny_model("llama")) for _ in range(2)]
        optimizers = []
        for seed, model in enumerate(models):
            attach(model, PacaSpec(rank=4, seed=seed))
            optimizers.append(torch.optim.AdamW(trainable(model), lr=0.02, fused=True))
        order = [0, 1, 0, 1] if in_turns else [0, 0, 1, 1]
        for number in order:
            train_steps(models[number], optimizers[number], steps=1)
        ends.append([logits_of(model, inputs) for model in models])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert not torch.equal(*ends[0])


def test_a_copy_lives_on_its_own(llama: Any, inputs: dict[str, Tensor]) -> None:
    """A deep copy trains without moving the original, shares no column, and can be detached."""
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    before = logits_of(llama, inputs)
    twin = copy.deepcopy(llama)
    assert torch.equal(logits_of(twin, inputs), before)
    train_steps(twin, torch.optim.AdamW(trainable(twin), lr=0.02))
    assert torch.equal(logits_of(llama, inputs), before)
    after = logits_of(twin, inputs)
    assert not torch.equal(after, before)
    assert torch.equal(logits_of(detach(twin, merge=True), inputs), after)
    gathers = {id(layer.paca_gather) for layer in paca_layers.layers(llama).values()}
    assert len(gathers) == 8


@pytest.mark.parametrize(
    "way", ("data.copy_ before eval()", "copy_ in eval", "data swapped in eval", "data.copy_, refresh")
)
def test_averaged_weights_can_be_swapped_in_and_out(way: str, llama: Any, inputs: dict[str, Tensor]) -> None:
    """The ways of exponential moving averages: swapped in they count, swapped out they do not."""
    parameters = trainable(llama)
    train_steps(llama, torch.optim.AdamW(parameters, lr=0.02))
    trained = logits_of(llama, inputs)
    average = [parameter.detach() * 0.5 for parameter in parameters]
    reference = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter, value in zip(trainable(reference), average, strict=True):
            parameter.copy_(value)
    wanted = logits_of(reference, inputs)
    assert not torch.equal(wanted, trained)
    for values, expected in ((average, wanted), ([parameter.detach().clone() for parameter in parameters], trained)):
        llama.train(way == "data.copy_ before eval()")
        swap(parameters, values, way)
        if way == "data.copy_, refresh":
            for layer in paca_layers.layers(llama).values():
                layer.refresh()
        assert torch.equal(logits_of(llama, inputs), expected)


def swap(parameters: list[nn.Parameter], values: list[Tensor], way: str) -> None:
    """Put values into parameters in one of the ways that are in use."""
    for parameter, value in zip(parameters, values, strict=True):
        if way == "copy_ in eval":
            with torch.no_grad():
                parameter.copy_(value)
        elif way == "data swapped in eval":
            parameter.data = value.clone()
        else:
            parameter.data.copy_(value)


def test_the_saved_weight_is_the_trained_one_after_a_forward(llama: Any, inputs: dict[str, Tensor]) -> None:
    """Once a forward has run, `weight` in the state dict holds the trained columns."""
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    logits_of(llama, inputs)
    for name, layer in paca_layers.layers(llama).items():
        stored = llama.state_dict()[f"{name}.weight"]
        assert torch.equal(stored[:, layer.paca_columns], trained_columns(layer))


# --- cost: what is kept for backward, and how often columns are written


@contextmanager
def counting_saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of the distinct storages that autograd keeps, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def saved_bytes(hidden: int, rank: int | None, *, family: str = "llama", tokens: int = 9) -> int:
    """Bytes kept by one forward of a model of that width; rank None: all of it frozen."""
    overrides: dict[str, object] = {"n_embd": hidden} if family == "gpt2" else {"hidden_size": hidden}
    model: Any = build_model(family, overrides=overrides)
    model.requires_grad_(requires_grad=False)
    if rank:
        attach(model, PacaSpec(rank=rank))
    embeddings = torch.randn(2, tokens, hidden, requires_grad=True)
    with counting_saved_bytes(model) as count:
        result = model(inputs_embeds=embeddings).logits
        total = count()
    result.sum().backward()
    assert embeddings.grad is not None
    return total


@pytest.mark.parametrize("rank", (1, 4, 16))
@pytest.mark.parametrize(("family", "inputs_per_block"), (("llama", 4), ("gpt2", 4)))
def test_backward_keeps_the_floor_and_r_channels_of_each_input(family: str, inputs_per_block: int, rank: int) -> None:
    """Exactly r * tokens * 4 bytes for each distinct input above a frozen model, whatever the width."""
    extra = {hidden: saved_bytes(hidden, rank, family=family) - saved_bytes(hidden, None, family=family) for hidden in
             (32, 64)}  # fmt: skip
    expected = 2 * inputs_per_block * rank * (2 * 9) * 4
    assert extra == {32: expected, 64: expected}


@pytest.mark.parametrize("kind", ("linear", "conv1d"))
def test_nothing_else_is_held_until_backward(kind: str) -> None:
    """What the node holds besides saved tensors is the weight itself, not a copy of it."""
    model = Layers(kind, bias=True)
    attach(model, PacaSpec(rank=3))
    node: Any = model.first(torch.randn(4, 6)).grad_fn
    held = [value for value in vars(node).values() if isinstance(value, Tensor)]
    assert [tensor.data_ptr() for tensor in held] == [model.first.weight.data_ptr()]


def test_a_group_gathers_once(llama: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen layers with eight distinct inputs gather eight times a forward, and keep nothing afterwards."""
    calls: Counter[str] = Counter()
    real = paca_layers.gather
    monkeypatch.setattr(paca_layers, "gather", lambda *given: (calls.update(["gather"]), real(*given))[1])
    for forwards in (1, 2):
        loss_of(llama, inputs)
        assert calls["gather"] == 8 * forwards
    assert all(layer.paca_gather._kept is None for layer in paca_layers.layers(llama).values())


def test_columns_are_written_once_a_step(
    llama: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer once for each optimizer step; evaluation without a step writes nothing."""
    writes: Counter[PacaLayer] = Counter()
    real = PacaLayer.refresh
    monkeypatch.setattr(PacaLayer, "refresh", lambda layer: (writes.update([layer]), real(layer))[1])
    optimizer = torch.optim.AdamW(trainable(llama), lr=0.02, fused=True)
    loss_of(llama, inputs)
    assert not writes
    for step in range(1, 4):
        train_steps(llama, optimizer, steps=1)
        loss_of(llama, inputs)
        assert set(writes.values()) == {step}
    logits_of(llama, inputs)
    before = dict(writes)
    for _ in range(3):
        logits_of(llama, inputs)
    assert writes == before


# --- opening and closing


def test_exactly_the_plan_trains(llama: Any, tiny_model: TinyModel) -> None:
    """Trainable are the planned columns and nothing else, as many values as the plan says."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("llama")), RANK_4)
    names = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert names == {f"{target.module}.paca_delta" for target in plan.targets}
    assert sum(parameter.numel() for parameter in trainable(llama)) == plan.trained_values


def test_a_task_s_head_trains_whole(tiny_model: TinyModel) -> None:
    """A classifier's head is trainable as it stands, its backbone by columns."""
    model = built(tiny_model("vit"), "vit")
    plan = attach(model, RANK_4)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if not name.endswith("paca_delta")} == {"classifier.weight", "classifier.bias"}
    assert sum(parameter.numel() for parameter in trainable(model)) == plan.trained_values


@pytest.mark.parametrize("family", ("llama", "bart", "mixtral"))
def test_a_live_model_is_planned_as_its_checkpoint_is(family: str, tiny_model: TinyModel) -> None:
    """attach on a model in memory opens the same columns of the same groups as a plan from files."""
    live = attach(built(tiny_model(family), family), RANK_4)
    stored = plan_checkpoint(Checkpoint.open(tiny_model(family)), RANK_4)
    assert live.targets == stored.targets


def test_attaching_changes_no_logit_no_mode_and_no_random_state(
    tiny_model: TinyModel, inputs: dict[str, Tensor]
) -> None:
    """A freshly opened model computes what it computed, in the modes its parts were in."""
    model = built(tiny_model("llama"))
    before = logits_of(model, inputs)
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calls: Counter[str] = Counter()
    model.model.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
    random_state = torch.get_rng_state()
    attach(model, RANK_4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not calls
    assert torch.equal(logits_of(model, inputs), before)


def test_parameters_of_other_types_do_not_stand_in_the_way() -> None:
    """An fp8 parameter elsewhere in the model is left alone; an fp8 layer that is asked for is unsupported."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        attach(model, PacaSpec(rank=2))
    assert [target.module for target in attach(model, PacaSpec(rank=2, targets=("0",))).targets] == ["0"]


@pytest.mark.parametrize("device", ("meta", "cpu"))
def test_a_default_device_does_not_matter(device: str, tiny_model: TinyModel, inputs: dict[str, Tensor]) -> None:
    """Attaching inside `with torch.device(..)` puts everything where the weights are."""
    model = built(tiny_model("llama"))
    with torch.device(device):
        attach(model, RANK_4)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    loss_of(model, inputs).backward()


def test_hooks_and_references_survive(tiny_model: TinyModel, inputs: dict[str, Tensor]) -> None:
    """A layer stays the same object with the same hooks, opened and closed again."""
    model = built(tiny_model("llama"))
    layer = model.model.layers[0].mlp.up_proj
    calls: Counter[str] = Counter()
    layer.register_forward_pre_hook(lambda *_: calls.update(["before"]))
    layer.register_forward_hook(lambda *_: calls.update(["after"]))
    layer.register_full_backward_hook(lambda *_: calls.update(["backward"]))
    attach(model, RANK_4)
    assert model.model.layers[0].mlp.up_proj is layer
    loss_of(model, inputs).backward()
    assert calls == {"before": 1, "after": 1, "backward": 1}
    detach(model, merge=False)
    logits_of(model, inputs)
    assert calls == {"before": 2, "after": 2, "backward": 1}


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model, byte for byte."""
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_detaching_gives_the_base_back(family: str, dtype: torch.dtype, tiny_model: TinyModel) -> None:
    """merge=False after training: the base bit for bit, plain classes, no attribute left, trainable what was."""
    model = built(tiny_model(family, dtype=dtype), family)
    model.get_input_embeddings().requires_grad_(requires_grad=False)
    before, fields = bits(model), [sorted(vars(module)) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attach(model, RANK_4)
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family=family)
    logits_of(model, sample_inputs(family))
    assert bits(model) != before
    assert detach(model, merge=False) is model
    assert bits(model) == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert [sorted(vars(module)) for module in model.modules()] == fields
    assert {type(module) for module in model.modules() if "proj" in repr(type(module))}.isdisjoint(
        paca_layers.SWAPS.values()
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_detaching_with_merge_is_the_merged_checkpoint(
    family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """merge=True, called right after a step: bit for bit the tensors of the exported folder."""
    folder = tiny_model(family, dtype=dtype)
    model = built(folder, family)
    attach(model, PacaSpec(rank=4, alpha=3.0))
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02, fused=True), family=family)
    merged = merged_model(model, folder, tmp_path, family)
    assert bits(detach(model, merge=True)) == bits(merged)


def test_a_detached_model_can_be_attached_again(llama: Any, inputs: dict[str, Tensor]) -> None:
    """Closing with the columns kept and opening anew goes on from there."""
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    expected = logits_of(llama, inputs)
    detach(llama, merge=True)
    attach(llama, PacaSpec(rank=2, seed=5))
    assert torch.equal(logits_of(llama, inputs), expected)


def test_negative_zero_stays_negative() -> None:
    """Columns that did not move keep their bits, through refreshes and steps with no gradient."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
    attach(model, PacaSpec(rank=4))
    model(torch.zeros(2, 4)).sum().backward()
    torch.optim.SGD(trainable(model), lr=1.0).step()
    model(torch.zeros(2, 4))
    assert bool(torch.signbit(model[0].weight).all())
    assert bool(torch.signbit(collect(model).patches["0"].values).all())


def test_attaching_twice_is_refused(llama: Any) -> None:
    """And so is detaching or collecting from a plain model; the messages say what to do."""
    with pytest.raises(RequestError, match=r"attached already.*Call detach first"):
        attach(llama, RANK_4)
    detach(llama, merge=True)
    for call in (lambda: detach(llama, merge=True), lambda: collect(llama)):
        with pytest.raises(RequestError, match="not attached"):
            call()


@pytest.mark.parametrize("spec", ({"targets": ("qproj",)}, {"rank": 1000}, {"exclude": ("*",)}))
def test_a_refused_attach_leaves_the_model_alone(spec: dict[str, Any], tiny_model: TinyModel) -> None:
    """No parameter is frozen and no layer opened when the request cannot be met."""
    model = built(tiny_model("llama"))
    with pytest.raises(SelectorError):
        attach(model, PacaSpec(**spec))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not paca_layers.layers(model)
    attach(model, RANK_4)


def test_diverged_columns_are_not_collected(llama: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    """NaN in a column is an error that says what to do, and nothing is written."""
    next(iter(paca_layers.layers(llama).values())).paca_delta.data[0, 0] = float("nan")
    with pytest.raises(DamagedError, match=r"1 of .* not finite.*lower the learning rate"):
        save(llama, tmp_path / "adapter", base=tiny_model("llama"))
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_the_file_are_not_collected(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A finite fp32 value that fp16 cannot hold would be infinite in the merged file: refused."""
    folder = tiny_model("llama", dtype=torch.float16)
    model = built(folder)
    attach(model, RANK_4)
    next(iter(paca_layers.layers(model).values())).paca_delta.data[0, 0] = 1e6
    with pytest.raises(DamagedError, match=r"1 of .* too large for F16"):
        save(model, tmp_path / "adapter", base=folder)


def test_loading_gives_the_state_that_was_saved(
    llama: Any, tiny_model: TinyModel, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    """An adapter loaded for inference or to go on computes what the saved model computed, bit for bit."""
    train_steps(llama, torch.optim.AdamW(trainable(llama), lr=0.02))
    save(llama, tmp_path / "adapter", base=tiny_model("llama"))
    expected = logits_of(llama, inputs)
    for going_on in (False, True):
        model = load(tmp_path / "adapter", trainable=going_on)
        assert bool(trainable(model)) == going_on
        assert torch.equal(logits_of(model, inputs), expected)
        again = save(model, tmp_path / f"again-{going_on}", base=tiny_model("llama"))
        assert again.delta.to_bytes() == open_adapter(tmp_path / "adapter").delta.to_bytes()


def test_evaluating_restores_every_part_s_mode(llama: Any) -> None:
    """A part that its owner keeps in eval mode is in eval mode afterwards."""
    llama.model.layers[1].eval()
    modes = {name: module.training for name, module in llama.named_modules()}
    with evaluating(llama):
        assert not any(module.training for module in llama.modules())
    assert {name: module.training for name, module in llama.named_modules()} == modes


def test_inference_mode_sees_a_step_and_training_goes_on(llama: Any, inputs: dict[str, Tensor]) -> None:
    """The first forward after a step may be one in inference mode; the next backward works all the same."""
    optimizer = torch.optim.AdamW(trainable(llama), lr=0.02, fused=True)
    train_steps(llama, optimizer)
    with torch.inference_mode():
        seen = llama(**inputs).logits.clone()
    assert torch.equal(seen, logits_of(llama, inputs, train=True))
    train_steps(llama, optimizer, steps=1)
    assert not torch.equal(logits_of(llama, inputs, train=True), seen)
