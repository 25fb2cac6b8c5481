"""PaCA over a quantized base: exact to the dequantized weight, nothing dense kept, and merges that say what they do."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters import dense, lora
from surgery import operate, paca_quantized, quantized
from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import Checkpoint
from surgery.compat import set_checkpointing
from surgery.delta import require_columns
from surgery.errors import BaseMismatchError, UnsupportedError
from surgery.forecast import Question, forecast
from surgery.lean_pass import rewrite
from surgery.methods.paca_spec import PacaSpec
from surgery.paca_layers import PacaLayer, layers
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.quantized import dequantize
from surgery.quantized_base import seen_weight
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.console import Command, Console
from tests.examples import NEEDS_TORCHAO, TEXTS
from tests.tiny import sample_inputs
from tests.trained import make_adapter

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
KINDS = [
    pytest.param(name, marks=[] if kind.package == "bitsandbytes" else NEEDS_TORCHAO)
    for name, kind in quantized.KINDS.items()
]
FOUR_BITS = ("nf4", "nf4-double", "fp4", "fp4-double")
BNB = (*FOUR_BITS, "int8")
TORCHAO = [kind for kind in KINDS if kind.values[0] not in BNB]
DOUBLE = PacaSpec(rank=4, quantize="nf4-double")


NEAR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}  # in such a dtype


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def layer_of(kind: str, *, bias: bool, dtype: torch.dtype = torch.float32) -> tuple[PacaLayer, Tensor]:
    """An opened quantized layer (32 -> 48) whose columns have moved, and the dense weight that it stands for.

    In double precision it is one of float32, from which alone bases are quantized, that computes so.
    """
    held = torch.float32 if dtype == torch.float64 else dtype
    model: Any = nn.Sequential(nn.Linear(32, 48, bias=bias, dtype=held))
    model[0].weight.data.copy_(drawn(48, 32))
    operate.attach(model, PacaSpec(rank=5, quantize=kind))
    opened: Any = model[0]
    for name, parameter in opened.named_parameters():
        if name != "weight" and held != dtype:
            parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        opened.paca_delta.copy_(drawn(48, 5))
    return opened, opened.dense().to(dtype)


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> Path:
    """A tiny Llama in bf16."""
    return tiny_model("llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def wide(tiny_model: TinyModel) -> Path:
    """The same with widths that every kind takes: 32 divides them."""
    return tiny_model("llama", dtype=torch.bfloat16, overrides={"intermediate_size": 64})


def bits_of(kind: str) -> Any:
    """What transformers is told to quantize by bitsandbytes when it loads a model."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    name, _, double = kind.partition("-")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=bool(double))


def loaded(base: Path, kind: str = "") -> Any:
    """A base as transformers loads it, quantized by bitsandbytes or, where it is loaded, by torchao."""
    from transformers import AutoModelForCausalLM

    settings = {"quantization_config": bits_of(kind)} if kind in BNB else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **settings).eval()
    operate.align(model)  # where a weight begins in its file decides the last bit
    if kind and not settings:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(quantized.GROUP))
        quantize_(model.model, int4 if kind == "torchao-int4" else Int8WeightOnlyConfig())
    return model


@pytest.fixture(scope="module")
def stored_as(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same as bitsandbytes' files of a kind, written by transformers; each kind's are made once."""
    root, made = tmp_path_factory.mktemp("stored"), dict[str, Path]()

    def write(kind: str) -> Path:
        if kind not in made:
            made[kind] = root / kind
            loaded(llama, kind).save_pretrained(made[kind])
            for path in llama.glob("*token*"):
                (made[kind] / path.name).write_bytes(path.read_bytes())
        return made[kind]

    return write


@pytest.fixture(scope="module")
def stored(stored_as: Callable[[str], Path]) -> Path:
    """Its files with double quantization."""
    return stored_as("nf4-double")


def logits(model: Any) -> Tensor:
    """Of the sample batch, in eval mode."""
    with operate.evaluating(model):
        result: Tensor = model(**sample_inputs("llama")).logits
    return result


# --- the interface


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_packed_weight_comes_back_near_and_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """In each dtype the values are those of float32 rounded, and near the original as so few bits allow."""
    weight = drawn(48, 64, dtype=dtype)
    holder = nn.Linear(1, 1, bias=False)
    holder.weight = quantized.pack(weight, kind)
    assert quantized.is_quantized(holder)
    assert not holder.weight.requires_grad
    assert quantized.kind_of(holder) == kind
    exact = quantized.dequantize(holder, torch.float32)
    assert torch.equal(quantized.dequantize(holder, dtype), exact.to(dtype))
    assert torch.equal(quantized.round_trip(weight, kind), exact.to(dtype))
    error = float((exact - weight.float()).norm() / weight.float().norm())
    assert (0.002 if "int8" in kind else 0.03) < error < (0.02 if "int8" in kind else 0.15)


@pytest.mark.parametrize("kind", ("nf4", "fp4"))
def test_codes_and_values_are_bitsandbytes_own(kind: str) -> None:
    """What its own functions quantize and dequantize is the same, bit for bit; double quantization to its own error."""
    weight, functional = drawn(48, 64), bitsandbytes.functional
    for is_double in (False, True):
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=is_double)
        ours = quantized.pack(weight, f"{kind}-double" if is_double else kind)
        assert torch.equal(packed, ours.data)
        theirs = functional.dequantize_4bit(packed, state)
        found = quantized.round_trip(weight, f"{kind}-double" if is_double else kind)
        torch.testing.assert_close(found, theirs, rtol=1e-6 if is_double else 0, atol=0)


@pytest.mark.parametrize("kind", BNB)
def test_the_predicted_size_is_the_real_one(kind: str) -> None:
    """Values, scales and tables: what `surgery plan` counts is what the weight holds."""
    weight: Any = quantized.pack(drawn(48, 96), kind)
    beside = [weight.SCB] if kind == "int8" else [weight.quant_state.absmax, weight.quant_state.code]
    if "double" in kind:
        nested = weight.quant_state.state2
        beside += [nested.absmax, nested.code, weight.quant_state.offset]
    assert quantized.KINDS[kind].size_bytes(48, 96) == weight.nbytes + sum(tensor.nbytes for tensor in beside)


def test_a_weight_of_another_type_is_refused() -> None:
    """Nothing is guessed by a name: a plain weight is not quantized."""
    assert not quantized.is_quantized(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"a weight of type torch\.nn\.parameter:Parameter"):
        quantized.dequantize(nn.Linear(2, 2), torch.float32)


# --- gradients, and what is kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((5, 32), (2, 3, 32), (2, 3, 2, 32)), ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_gradients_are_those_of_the_dequantized_weight(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], *, bias: bool
) -> None:
    """Forward, the input's gradient and the columns' see the dequantized weight with the trained columns in it."""
    layer, weight = layer_of(kind, bias=bias, dtype=dtype)
    near = {"rtol": NEAR[dtype], "atol": 10 * NEAR[dtype]}
    theirs = nn.Linear(32, 48, bias=bias, dtype=dtype)
    theirs.weight.data.copy_(weight)
    if bias:
        theirs.bias.data.copy_(layer.bias)
    x = drawn(*shape, dtype=dtype)
    given = [x.clone().requires_grad_() for _ in range(2)]
    results = [module(value) for module, value in zip((layer, theirs), given, strict=True)]
    assert torch.equal(*results)
    for result in results:
        (result * drawn(*result.shape, dtype=dtype)).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, **near)
    gradient = layer.paca_delta.grad
    assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gradient.to(dtype), theirs.weight.grad[:, layer.paca_columns], **near)
    held = quantized.dequantize(layer, layer.storage)[:, layer.paca_columns].to(layer.paca_delta)
    moved = (held + layer.paca_delta).to(layer.storage).to(dtype)
    torch.testing.assert_close(weight[:, layer.paca_columns], moved, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_the_trained_inputs_and_no_weight(kind: str) -> None:
    """As many channels as columns train, whatever the width; of a layer that is frozen nothing."""
    kept: list[int] = []
    for width, rank in ((32, 2), (64, 2), (32, 5), (64, 0)):
        model: Any = nn.Sequential(nn.Linear(width, 32), nn.Linear(32, 32))
        operate.attach(model, PacaSpec(rank=rank or 1, targets=("0" if rank else "1",), quantize=kind))
        count = lambda tensor: (kept.append(tensor.untyped_storage().nbytes()), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model[0](drawn(7, width).requires_grad_())
    assert kept == [7 * rank * 4 for rank in (2, 2, 5)]


def kept_bytes(model: Any) -> int:
    """What a forward keeps for backward, each storage once, the model's own left out."""
    own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            seen[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(**sample_inputs("llama")).logits.sum()
    del loss
    return sum(storage.nbytes() for storage in seen.values())


def test_backward_keeps_what_it_keeps_over_a_dense_base(llama: Path, tmp_path: Path) -> None:
    """Not a byte more: no dense weight, and one gathered input for each group of layers."""
    kept = []
    for name, spec in (("dense", PacaSpec(rank=4)), ("packed", DOUBLE)):
        operate.apply(llama, tmp_path / name, spec)
        kept.append(kept_bytes(operate.load(tmp_path / name, trainable=True)))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_weight_lives_for_one_product(
    kind: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that are made none is left when the next one is, in forward and in backward, trained layers or not."""
    operate.apply(wide, tmp_path / "a", PacaSpec(rank=4, targets=("q_proj", "up_proj"), quantize=kind))
    model = operate.load(tmp_path / "a", trainable=True)
    real, made, alive = quantized.dequantize, [], []

    def watched(module: Any, dtype: torch.dtype) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        weight = real(module, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantized, "dequantize", watched)
    monkeypatch.setattr(paca_quantized, "dequantize", watched)
    gc.disable()
    try:
        model.train()(**sample_inputs("llama")).logits.sum().backward()
    finally:
        gc.enable()
    assert len(made) >= 2 * 14 - 3  # the first layer's input asks for no gradient
    assert set(alive) == {0}


def test_a_frozen_adapter_keeps_no_dense_weight_either() -> None:
    """Where nothing trains and the input asks for its gradient, nothing at all is kept."""
    layer, weight = layer_of("nf4", bias=True)
    layer.requires_grad_(requires_grad=False)
    x, kept = drawn(3, 32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = layer(x)
    result.sum().backward()
    assert kept == []
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 32))


def test_checkpointing_gives_the_same_gradients(llama: Path, tmp_path: Path) -> None:
    """A layer that is run again sees the same weight."""
    operate.apply(llama, tmp_path / "a", DOUBLE)
    found = []
    for is_on in (False, True):
        model = operate.load(tmp_path / "a", trainable=True).train()
        if is_on:
            set_checkpointing(model, on=True)
        model(**sample_inputs("llama")).logits.float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kind", ("nf4", *TORCHAO))
def test_lean_blocks_around_packed_layers_change_nothing(kind: str, wide: Path, tmp_path: Path) -> None:
    """The same loss and gradients but for rounding, and fewer bytes kept."""
    operate.apply(wide, tmp_path / "a", PacaSpec(rank=4, exclude=("up_proj",), quantize=kind))
    inputs, found = sample_inputs("llama"), []
    for is_lean in (False, True):
        model = operate.load(tmp_path / "a", trainable=True).train()
        if is_lean:
            assert rewrite(model).norms == 5
        kept = kept_bytes(model)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found.append((kept, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert found[1][0] < found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=0)
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=0.1, atol=0.05 * float(gradient.abs().max()))


# --- in memory


@pytest.fixture
def live(llama: Path) -> Any:
    """The tiny Llama as transformers and bitsandbytes quantize it."""
    return loaded(llama, "nf4")


def training_logits(model: Any) -> Tensor:
    """As `logits`, in training: on some CPUs bitsandbytes' own layers lose precision when they run otherwise."""
    result: Tensor = model.train()(**sample_inputs("llama")).logits
    return result.detach()


def test_a_weight_that_bitsandbytes_ordered_anew_is_refused(live: Any) -> None:
    """Its scales were rounded, and its bits lie otherwise: better to load it again."""
    live.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedError, match=r"ordered anew .* Load the model again"):
        operate.attach(live, PacaSpec(rank=4))


def test_a_live_quantized_model_is_attached_as_it_is(live: Any, llama: Path, tmp_path: Path) -> None:
    """Attaching changes nothing but rounding; trained, saved over its base and loaded it is the same; then plain."""
    before = training_logits(live)
    plan = operate.attach(live, PacaSpec(rank=4))
    assert plan.quantization is not None
    assert (plan.quantization.kind, len(plan.quantization.layers), len(plan.targets)) == ("nf4", 14, 14)
    torch.testing.assert_close(logits(live), before, rtol=0.02, atol=0.25)  # bitsandbytes multiplies otherwise
    live.train()(**sample_inputs("llama")).logits.float().square().mean().backward()
    torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=1.0).step()
    moved = logits(live)
    assert not torch.equal(moved, before)
    operate.save(live, tmp_path / "a", base=llama)
    assert torch.equal(logits(operate.load(tmp_path / "a")), moved)
    operate.detach(live, merge=True)
    assert type(live.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(live), moved)


def test_a_detached_model_is_the_quantized_one_again(live: Any) -> None:
    """Without merge nothing is left of the surgery."""
    before, types = training_logits(live), [type(module) for module in live.modules()]
    operate.attach(live, PacaSpec(rank=4))
    with torch.no_grad():
        for layer in layers(live).values():
            layer.paca_delta.fill_(0.5)
    operate.detach(live, merge=False)
    assert torch.equal(training_logits(live), before)
    assert [type(module) for module in live.modules()] == types


@pytest.mark.parametrize("kind", ("nf4", "fp4", "int8", *TORCHAO))
def test_frozen_layers_of_a_live_model_are_held_as_those_that_train(
    kind: str, wide: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """So it computes what its merge does, and its weights are not ordered anew; detached it is what it was."""
    # torchao rounds its scales to the dtype that it quantizes from, and what is packed here is from float32
    base = wide if kind in BNB else tiny_model("llama", overrides={"intermediate_size": 64})
    live = loaded(base, kind)
    before, made = training_logits(live), [(type(module), sorted(vars(module))) for module in live.modules()]
    operate.attach(live, PacaSpec(rank=4, targets=("q_proj",)))
    assert sum(isinstance(module, quantized.QuantizedLinear) for module in live.modules()) == 12
    assert not any(type(module).__module__.startswith("bitsandbytes.") for module in live.modules())
    with pytest.raises(UnsupportedError, match="whose scales are in memory alone"):
        live.save_pretrained(tmp_path / "none")
    one_step(live)
    moved = logits(live)
    dense.export(operate.save(live, tmp_path / "a", base=base), tmp_path / "m", merge_base="dequantized")
    exact = 0 if kind in BNB else 1e-5  # in float32, base + difference - base has a rounding
    torch.testing.assert_close(logits(loaded(tmp_path / "m")), moved, rtol=exact, atol=exact)
    operate.detach(live, merge=False)
    assert [(type(module), sorted(vars(module))) for module in live.modules()] == made
    assert torch.equal(training_logits(live), before)


@pytest.mark.parametrize("targets", ("all-linear", "q_proj"))
def test_a_live_model_is_saved_by_transformers_once_it_is_detached(targets: str, live: Any, tmp_path: Path) -> None:
    """With dense layers where columns went in: its files say which, and are not loaded as packed ones."""
    operate.attach(live, PacaSpec(rank=4, targets=(targets,)))
    one_step(live)
    settings = live.config.quantization_config
    operate.detach(live, merge=True)
    expected = training_logits(live)
    live.save_pretrained(tmp_path / "m")
    again = loaded(tmp_path / "m")
    assert torch.equal(training_logits(again), expected)
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in again.modules()) == (12 if targets == "q_proj" else 0)
    assert settings.llm_int8_skip_modules is None  # the caller's own


def test_what_was_packed_here_is_not_saved_by_transformers(llama: Path, stored: Path, tmp_path: Path) -> None:
    """Files without scales would be useless: an error says what to do. Where nothing is packed any more, it is."""
    for number, base in enumerate((llama, stored)):
        spec = PacaSpec(rank=4, targets=("q_proj",), quantize="nf4" if base == llama else "")
        operate.apply(base, tmp_path / str(number), spec)
        for merge in (None, False, True):
            model = operate.load(tmp_path / str(number))
            if merge is not None:
                operate.detach(model, merge=merge)
            with pytest.raises(UnsupportedError, match=r"packed weights, .* `surgery export --merge`") as found:
                model.save_pretrained(tmp_path / "out")
            assert found.value.exit_code == 5
            assert not (tmp_path / "out").exists()
    model = loaded(llama)
    operate.attach(model, PacaSpec(rank=4, quantize="nf4"))
    one_step(model)
    expected = logits(operate.detach(model, merge=True))
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded(tmp_path / "whole")), expected)


def one_step(model: Any) -> None:
    """Of an optimizer, on the sample batch, in training mode."""
    model.train()(**sample_inputs("llama")).logits.float().square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True).step()


def test_a_live_model_is_saved_over_its_own_base_only(live: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The base is quantized again to see whether it is the one."""
    operate.attach(live, PacaSpec(rank=4))
    with pytest.raises(BaseMismatchError, match="not what the model started from"):
        operate.save(live, tmp_path / "a", base=tiny_model("llama", dtype=torch.bfloat16, seed=1))


def test_attaching_quantizes_a_dense_model_where_asked(llama: Path) -> None:
    """`attach(model, PacaSpec(quantize=..))` holds the base so, as loading an adapter would; heads stay."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    operate.attach(model, PacaSpec(rank=4, targets=("q_proj",), quantize="nf4"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds["model.layers.0.self_attn.q_proj"] == "QuantizedPacaLinear"
    assert kinds["model.layers.0.mlp.up_proj"] == "QuantizedLinear"
    assert kinds["lm_head"] == "Linear"


# --- columns chosen by data


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Rows to choose columns by."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("select", ("gradient", "activation"))
def test_columns_are_chosen_by_the_dense_base_before_it_is_quantized(
    select: str, llama: Path, texts: Path, tmp_path: Path
) -> None:
    """The same columns as without quantization, not the seed's; they train, and the merge is what training saw."""
    spec = PacaSpec(rank=4, select=select, calibration_data=(str(texts),), calibration_rows=4)
    dense_one = columns_by_layer(operate.apply(llama, tmp_path / "dense", spec))
    adapter = make_adapter(llama, tmp_path / "a", replace(spec, quantize="nf4"))
    chosen = columns_by_layer(adapter)
    assert chosen == dense_one
    assert chosen != columns_by_layer(operate.apply(llama, tmp_path / "drawn", PacaSpec(rank=4)))
    dense.export(adapter, tmp_path / "seen", merge_base="dequantized")
    checks = {check.name: check for check in verify(tmp_path / "seen").checks}
    assert checks["logits"].detail.startswith("largest difference to base + adapter 0 on")


def test_what_files_of_4_bits_can_be_looked_at_for(stored: Path, texts: Path, tmp_path: Path) -> None:
    """Inputs: `activation`, the way out that refusals name, chooses what it would on the dequantized base."""
    spec = PacaSpec(rank=4, select="activation", calibration_data=(str(texts),), calibration_rows=4)
    adapter = operate.apply(stored, tmp_path / "a", spec)
    dense.export(adapter, tmp_path / "seen", merge_base="dequantized")
    assert columns_by_layer(adapter) == columns_by_layer(operate.apply(tmp_path / "seen", tmp_path / "b", spec))
    assert columns_by_layer(adapter) != columns_by_layer(operate.apply(stored, tmp_path / "c", PacaSpec(rank=4)))


def test_layers_of_stored_4_bits_that_do_not_train_stay_as_they_are(stored: Path, tmp_path: Path) -> None:
    """Running in eval mode leaves their scales alone: bitsandbytes' own forward rounds them for good on some CPUs."""
    adapter = make_adapter(stored, tmp_path / "a", PacaSpec(rank=4, exclude=("up_proj",)))
    model, name = operate.load(tmp_path / "a"), "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    before = dequantize(layer, torch.bfloat16)
    logits(model)
    assert torch.equal(dequantize(layer, torch.bfloat16), before)
    assert quantized.kind_of(layer) == "nf4-double"
    held = adapter.plan.quantization
    assert held is not None
    assert torch.equal(before, seen_weight(Checkpoint.open(stored), held, held.layers[name]))
    dense.export(adapter, tmp_path / "seen", merge_base="dequantized")
    checks = {check.name: check for check in verify(tmp_path / "seen").checks}
    assert checks["logits"].detail.startswith("largest difference to base + adapter 0 on")


def test_a_live_model_that_is_quantized_has_no_gradients_to_choose_by(llama: Path) -> None:
    """Said when it is planned, before a batch is run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    quantized.quantize(model, "nf4", {"model.layers.0.mlp.up_proj": torch.bfloat16})
    with pytest.raises(UnsupportedError, match=r"--select gradient: weights that are held as nf4, first"):
        operate.attach(model, PacaSpec(rank=4, select="gradient"), calibration=[sample_inputs("llama")])


def columns_by_layer(adapter: Adapter) -> dict[str, list[int]]:
    """Which columns train."""
    return {name: patch.columns.tolist() for name, patch in require_columns(adapter.delta, "test").patches.items()}


# --- merges


@pytest.mark.parametrize("kind", KINDS)
def test_both_merges_hold_what_they_promise(kind: str, wide: Path, tmp_path: Path) -> None:
    """Original: the base but for columns, and how far that is from training. Dequantized: training's very bits."""
    adapter = make_adapter(wide, tmp_path / "a", PacaSpec(rank=4, exclude=("k_proj",), quantize=kind))
    dense.export(adapter, tmp_path / "original")
    dense.export(adapter, tmp_path / "seen", merge_base="dequantized")
    checks = {check.name: check for check in verify(tmp_path / "original").checks}
    assert checks["logits"].detail.startswith("largest difference to base + adapter 0 on")
    assert checks["merge difference"].result == "measured"
    assert f"(the base as {kind})" in checks["merge difference"].detail
    checks = {check.name: check for check in verify(tmp_path / "seen").checks}
    assert checks["logits"].detail.startswith("largest difference to base + adapter 0 on")
    assert "14 layers are those of this base, dequantized" in checks["dequantized weights"].detail
    assert "merge difference" not in checks


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_step_merge_is_the_dequantized_base(kind: str, wide: Path, tmp_path: Path) -> None:
    """Byte for byte: columns start where the quantized base has them; of the other merge see test_kinds."""
    adapter = operate.apply(wide, tmp_path / "a", PacaSpec(rank=4, quantize=kind))
    dense.export(adapter, tmp_path / "seen", merge_base="dequantized")
    base, seen, held = Checkpoint.open(wide), Checkpoint.open(tmp_path / "seen"), adapter.plan.quantization
    assert held is not None
    for weight in base:
        expected = seen_weight(base, held, weight) if weight in held.layers.values() else base.read_tensor(weight)
        assert torch.equal(seen.read_tensor(weight).view(torch.int16), expected.view(torch.int16)), weight


@pytest.mark.parametrize("kind", (*KINDS, *(f"stored {kind}" for kind in FOUR_BITS)))
def test_after_a_step_the_model_computes_what_its_merge_does(
    kind: str, wide: Path, stored_as: Callable[[str], Path], tmp_path: Path
) -> None:
    """Dequantized, right after an optimizer step, in train and in eval mode, layers that do not train among them.

    Without the columns it computes again what it did: nothing was written into the packed weights.
    """
    is_stored = kind.startswith("stored ")
    base = stored_as(kind.removeprefix("stored ")) if is_stored else wide
    operate.apply(base, tmp_path / "a", PacaSpec(rank=4, exclude=("k_proj",), quantize="" if is_stored else kind))
    model = operate.load(tmp_path / "a", trainable=True)
    before = logits(model)
    one_step(model)
    found = {train: model.train(train)(**sample_inputs("llama")).logits.detach() for train in (True, False)}
    dense.export(operate.save(model, tmp_path / "b", base=base), tmp_path / "seen", merge_base="dequantized")
    merged = loaded(tmp_path / "seen")
    for train, ours in found.items():
        assert torch.equal(merged.train(train)(**sample_inputs("llama")).logits, ours)
    assert not torch.equal(found[False], before)
    assert torch.equal(logits(operate.detach(model, merge=False)), before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the former name
def test_a_lora_on_the_quantized_base_computes_what_was_trained(llama: Path, tmp_path: Path) -> None:
    """PEFT adds to the quantized layers what training added to their columns."""
    from peft import PeftModel

    adapter = make_adapter(llama, tmp_path / "a", DOUBLE)
    lora.export(adapter, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(operate.load_base_model(llama, adapter.plan), tmp_path / "lora").eval()
    ours, base = operate.load(tmp_path / "a"), operate.load_base_model(llama, adapter.plan)
    moved = (logits(ours) - logits(base)).abs().max()
    assert (logits(theirs) - logits(ours)).abs().max() < 0.1 * moved


def test_the_whole_way(llama: Path, console: Console, tmp_path: Path) -> None:
    """apply, train, export both ways, verify, undo, inspect: with exit code 0, or the documented one."""
    data, a = tmp_path / "d.txt", tmp_path / "a"
    data.write_text("\n".join(TEXTS), encoding="utf-8")
    assert console("apply", llama, "-r", 4, "--quantize", "nf4-double", "-o", a).code == 0
    settings = ("max_length=32", "max_steps=2", "batch_size=2", "learning_rate=1e-2")
    assert console("train", a, "--data", data, *settings).code == 0
    merged = console("export", a, "--merge", "-o", tmp_path / "m")
    assert merged.code == 0
    assert "measured merge difference: to what training saw (the base as nf4-double)" in merged.out
    assert "note: training saw the base as nf4-double" in merged.out
    assert json.loads((tmp_path / "m/surgery.json").read_text())["manifest"]["export"]["merge_base"] == "original"
    assert console("undo", tmp_path / "m", "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert console("export", a, "--merge", "--merge-base", "dequantized", "-o", tmp_path / "s").code == 0
    refused = console("undo", tmp_path / "s", "-o", tmp_path / "none")
    assert (refused.code, "--merge-base dequantized" in refused.err) == (5, True)
    assert "undo" in (shown := console("inspect", tmp_path / "s").out)
    assert "not possible: with --merge-base dequantized" in shown
    assert "base held as  nf4-double, 14 layers" in console("inspect", a).out


def test_an_export_into_the_other_base_is_not_what_was_asked_for(llama: Path, command: Command, tmp_path: Path) -> None:
    """A recipe that is run again takes a folder for its own where the columns went into the base it names, or means."""
    (tmp_path / "d.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    document = {
        "model": str(llama), "adapter": "a", "paca": {"rank": 4, "quantize": "nf4"},
        "data": {"train": ["d.txt"], "max_length": 32}, "train": {"max_steps": 1, "batch_size": 2},
    }  # fmt: skip
    recipe, into = tmp_path / "recipe.yaml", "export.merge_base"
    recipe.write_text(json.dumps(document))
    assert command("run", recipe, f"{into}=dequantized")[0] == 0
    assert command("run", recipe, f"{into}=dequantized")[0] == 0
    for given in ((), (f"{into}=original",)):
        code, said = command("run", recipe, *given)
        assert (code, "not this adapter's export" in said) == (2, True)


# --- 4 bits in the files


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_base_stored_in_4_bits_is_trained_and_merged_dequantized(
    kind: str, stored_as: Callable[[str], Path], tmp_path: Path, command: Command
) -> None:
    """The files are read as they are; the merge is dense, loads without bitsandbytes and equals training."""
    adapter = make_adapter(stored_as(kind), tmp_path / "a", PacaSpec(rank=4))
    held = adapter.plan.quantization
    assert held is not None
    assert (held.kind, held.is_stored, len(held.layers)) == (kind, True, 14)
    code, said = command("export", tmp_path / "a", "--merge")
    assert (code, "it has no original, expected dequantized" in said) == (5, True)
    assert command("export", tmp_path / "a", "--merge", "--merge-base", "dequantized", "-o", tmp_path / "m")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    assert not [name for name in Checkpoint.open(tmp_path / "m") if "absmax" in name or "quant" in name]
    assert command("verify", tmp_path / "m")[0] == 0


def test_layers_of_a_stored_base_that_do_not_train_are_held_as_those_that_do(stored: Path, tmp_path: Path) -> None:
    """bitsandbytes' own layer orders its weight anew in eval mode, on some CPUs, and then computes otherwise."""
    adapter = make_adapter(stored, tmp_path / "a", PacaSpec(rank=4, targets=("q_proj",)))
    dense.export(adapter, tmp_path / "m", merge_base="dequantized")
    model, merged = (
        operate.load(tmp_path / "a"),
        operate.load_base_model(tmp_path / "m", replace(adapter.plan, quantization=None)),
    )
    assert sum(isinstance(module, quantized.QuantizedLinear) for module in model.modules()) == 12
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    assert torch.equal(logits(model), logits(merged))
    packed = [module.weight for module in model.modules() if quantized.is_quantized(module)]
    assert not any("packing_format_for_cpu" in vars(weight.quant_state) for weight in packed)


@pytest.mark.parametrize("kind", ("nf4-double", "stored", *TORCHAO))
def test_adapters_on_a_quantized_base_are_united(
    kind: str, wide: Path, stored: Path, tmp_path: Path, command: Command
) -> None:
    """Every quantized layer of the merge is what training saw, those that none of them trains among them."""
    base, kind = (stored, "") if kind == "stored" else (wide, kind)
    for name in ("q_proj", "up_proj"):
        make_adapter(base, tmp_path / name, PacaSpec(rank=4, targets=(name,), quantize=kind))
    both = (tmp_path / "q_proj", tmp_path / "up_proj")
    code, said = command("export", *both, "--merge", "--merge-base", "dequantized", "-o", tmp_path / "m")
    assert (code, "" if "torchao" in kind else said) == (0, "")  # what torchao says when it is imported
    checks = {check.name: check for check in verify(tmp_path / "m", numeric=False).checks}
    assert "14 layers are those of this base, dequantized" in checks["dequantized weights"].detail
    assert checks["trained columns"].result == "passed"


def test_inputs_of_a_stored_base_choose_columns(stored: Path, tmp_path: Path) -> None:
    """A packed weight does not have its layer's sizes; inputs are those of the dense model that it stands for."""
    (tmp_path / "d.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    looked: dict[str, Any] = {"select": "activation", "calibration_data": (str(tmp_path / "d.txt"),)}
    spec = PacaSpec(rank=4, targets=("q_proj", "down_proj"), calibration_rows=4, calibration_length=32, **looked)
    adapter = operate.apply(stored, tmp_path / "a", spec)
    dense.export(adapter, tmp_path / "m", merge_base="dequantized")
    same = operate.apply(tmp_path / "m", tmp_path / "b", spec)
    assert {m: p.columns.tolist() for m, p in adapter.delta.patches.items()} == {
        m: p.columns.tolist() for m, p in same.delta.patches.items()
    }


@pytest.mark.parametrize(("kind", "beside"), (("nf4", "absmax"), ("fp4", "quant_map"), ("nf4-double", "nested_absmax")))
def test_another_base_in_4_bits_is_refused(
    kind: str, beside: str, stored_as: Callable[[str], Path], tmp_path: Path, command: Command
) -> None:
    """A scale that was changed is another base: what lies beside a packed weight is in its digest."""
    import safetensors.torch

    stored = stored_as(kind)
    make_adapter(stored, tmp_path / "a", PacaSpec(rank=4))
    other = tmp_path / "other"
    other.mkdir()
    for path in stored.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors[f"model.layers.1.mlp.up_proj.weight.{beside}"] *= 1.5
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    line = ("export", tmp_path / "a", "--merge", "--merge-base", "dequantized", "--base", other, "-o", tmp_path / "m")
    code, said = command(*line)
    assert (code, "of the base this adapter was made for" in said) == (4, True)
    assert not (tmp_path / "m").exists()


def test_other_storages_of_bitsandbytes_are_refused(llama: Path, tmp_path: Path, command: Command) -> None:
    """8 bits, and 4 bits put into wider numbers: files that are read as dense ones would be read wrongly."""
    for name, settings in (("8", {"load_in_8bit": True}), ("wide", {"bnb_4bit_quant_storage": "bfloat16"})):
        folder = tmp_path / name
        folder.mkdir()
        for path in llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        said = {"quant_method": "bitsandbytes", "load_in_4bit": name != "8", **settings}
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
        (folder / "config.json").write_text(json.dumps(config))
        code, error = command("apply", folder, "-o", tmp_path / "a")
        assert (code, "a checkpoint quantized by bitsandbytes" in error) == (5, True), error
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    (
        ("apply {stored} --quantize nf4 -o {out}", 2, "the base is held as nf4-double already"),
        ("apply {stored} --method read -o {out}", 5, "a base held as nf4-double, and method read"),
        ("apply {llama} --quantize nf4 --resample every:5 -o {out}", 5, "into which no column can be written"),
        ("apply {stored} --select magnitude -o {out}", 5, "weights that are held as nf4-double"),
        ("apply {stored} --select gradient --calibration-data {data} -o {out}", 5, "that are held as nf4-double"),
        ("export {stored} --format onnx -o {out}", 5, "a checkpoint quantized by bitsandbytes"),
        ("apply {llama} --quantize nf5 -o {out}", 2, "The closest is 'nf4'"),
        ("apply {llama} --quantize NF4 -o {out}", 2, "The closest is 'nf4'"),
        ("apply {llama} --method read --quantize nf4 -o {out}", 2, "method read has no such setting"),
        ("apply {gpt2} --quantize nf4 -o {out}", 5, "GPT2LMHeadModel has no layer that could be"),
        ("export {plain} --merge --merge-base original -o {out}", 2, "the base of this adapter is not quantized"),
        ("export {a} --merge --merge-base middle -o {out}", 2, "expected original or dequantized"),
        ("export {a} --format lora --merge-base original -o {out}", 2, "expected --merge and --format safetensors"),
        ("export {a} --merge --format onnx -o {out}", 5, "an adapter on a quantized base"),
        ("patch {stored} {a} -o {out}", 5, "patch: an adapter on a quantized base"),
        ("train {a} --data {data} compile=true", 5, "train.compile"),
        ("plan {llama} paca.quantize=nf4 --devices 2 --sharding fsdp2", 5, "fsdp2 with a base held as nf4"),
    ),
    ids=lambda value: value if isinstance(value, str) and "{" in value else "",
)
def test_what_does_not_go_together_is_refused(
    line: str, code: int, said: str, llama: Path, stored: Path, tiny_model: TinyModel, tmp_path: Path,
    command: Command,
) -> None:  # fmt: skip
    """With the documented error and exit code, and nothing is written."""
    names = {"llama": llama, "stored": stored, "gpt2": tiny_model("gpt2"), "out": tmp_path / "out"}
    names |= {"a": tmp_path / "a", "plain": tmp_path / "plain", "data": tmp_path / "d.txt"}
    names["data"].write_text("\n".join(TEXTS), encoding="utf-8")
    if "{a}" in line:
        operate.apply(llama, names["a"], DOUBLE)
    if "{plain}" in line:
        operate.apply(llama, names["plain"], PacaSpec(rank=4))
    found, error = command(*(word.format_map(names) for word in line.split()))
    assert (found, said in error) == (code, True), error
    assert not names["out"].exists()


@pytest.mark.parametrize(("kind", "extra"), (("nf4", "bnb"), ("torchao-int8", "torchao")))
def test_a_package_that_is_missing_is_named(
    kind: str, extra: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """With the extra that brings it, before anything is written."""
    import sys

    monkeypatch.setitem(sys.modules, quantized.KINDS[kind].package, None)
    code, said = command("apply", llama, "--quantize", kind, "-o", tmp_path / "a")
    assert (code, f"checkpoint-surgery[{extra}]" in said) == (5, True), said
    assert not (tmp_path / "a").exists()


# --- plans


def test_a_plan_says_how_the_base_is_held_and_old_ones_say_nothing(llama: Path) -> None:
    """The plan round-trips; one without quantization has none of the new words in its text."""
    plan = plan_checkpoint(Checkpoint.open(llama), DOUBLE)
    assert SurgeryPlan.from_dict(json.loads(plan.to_json())) == plan
    assert plan.spec["quantize"] == "nf4-double"
    assert "quantiz" not in plan_checkpoint(Checkpoint.open(llama), PacaSpec(rank=4)).to_json()


def test_the_predicted_weights_are_those_in_memory(llama: Path, tmp_path: Path) -> None:
    """`surgery plan` needs no bitsandbytes, and counts what the loaded base then takes."""
    operate.apply(llama, tmp_path / "a", PacaSpec(rank=4, quantize="nf4"))
    found = forecast(str(llama), Question(device="cpu"), ("paca.quantize=nf4", "paca.rank=4", "train.batch_size=1"))
    model = operate.load(tmp_path / "a")
    own = [p for name, p in model.named_parameters() if "paca_" not in name]
    scales = sum(p.quant_state.absmax.nbytes + p.quant_state.code.nbytes for p in own if hasattr(p, "quant_state"))
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if "paca_" not in name)
    assert found.parts["weights"] == sum(p.nbytes for p in own) + scales + buffers
    assert any("the base is held as nf4, 14 layers" in note for note in found.notes)


def test_a_base_stored_in_4_bits_is_predicted_as_apply_predicts_it(stored: Path, tmp_path: Path) -> None:
    """By its folder, before any plan is made of it, and by an adapter's."""
    operate.apply(stored, tmp_path / "a", PacaSpec(rank=4))
    found = forecast(str(stored), Question(device="cpu"), ("paca.rank=4",))
    assert found.parts == forecast(str(tmp_path / "a"), Question(device="cpu")).parts
    assert any("the base is held as nf4-double, 14 layers, as its files have them" in note for note in found.notes)
    with pytest.raises(UnsupportedError, match="quantized by bitsandbytes"):
        forecast(str(stored), Question(device="cpu", method="lora"))


def test_what_fp16_holds_is_the_same_when_it_is_computed_in_fp32(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On a CPU an fp16 base is loaded in fp32 to train: its values are quantized and rounded as the file's."""
    base = tiny_model("llama", dtype=torch.float16)
    adapter = make_adapter(base, tmp_path / "a", DOUBLE)
    weights = []
    for dtype in (None, torch.float32):
        model = operate.load_base_model(base, adapter.plan, dtype=dtype)
        operate.attach_plan(model, adapter.plan, adapter.delta)
        layer: Any = model.model.layers[0].mlp.up_proj
        weights.append(layer.dense())
    assert weights[0].dtype == torch.float16
    assert torch.equal(*weights)
    assert math.isfinite(float(weights[0].float().sum()))


def test_an_adapter_s_file_is_read_back(llama: Path, tmp_path: Path) -> None:
    """The record holds the plan with its quantization; a reader of the folder finds the same plan."""
    adapter = operate.apply(llama, tmp_path / "a", DOUBLE)
    assert open_adapter(tmp_path / "a").plan == adapter.plan
