"""What a run asks of its device is had as asked for, or refused before anything is read."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import acceleration
from surgery.acceleration import choose_autocast, choose_tf32, prepare, require, state
from surgery.backends.local import training_arguments
from surgery.errors import RecipeError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply, attach
from surgery.recipe import Recipe, TrainSection
from surgery.recipe_keys import apply_override, check
from surgery.train import train
from tests.conftest import TinyModel
from tests.examples import CASES
from tests.test_paca import built

CASE = next(case for case in CASES if (case.family, case.task) == ("llama", "causal-lm"))
BF16_CHECKPOINTING: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True}


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, bf16: bool = True, capability: tuple[int, int] = (9, 0)) -> None:
    """Let there be a CUDA device, as far as anyone asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card 1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str, missing: bool = False) -> None:
    """Let these modules be there, or not."""
    real = importlib.util.find_spec
    found = None if missing else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name in names else real(name))


# --- refused before anything is read


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"precision": "fp16"}, r"train\.precision: fp16 on a CPU, expected bf16 or fp32\."),
        ({"tf32": "on"}, r"train\.tf32: on, and the device is cpu, expected an NVIDIA device from Ampere on\."),
        ({"attention": "flash_attention_2"}, r"train\.attention: flash_attention_2, and the device is cpu, expected"),
        ({"liger": True}, r"train\.liger: the device is cpu, expected Liger's kernels to be usable\. Leave"),
    ),
    ids=str,
)
def test_a_cpu_has_not_everything(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The run ends before it looks at the adapter folder, with exit code 5."""
    with pytest.raises(UnsupportedError, match=message) as caught:
        train(tmp_path / "absent", CASE.write(tmp_path), TrainSection(**settings, device="cpu"))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"precision": "bf16"}, r"train\.precision: bf16 on Card 1, which has none, expected fp16 or fp32\."),
        ({"tf32": "on"}, r"train\.tf32: on, and the device is Card 1, expected an NVIDIA device from Ampere on\."),
        ({"attention": "flash_attention_2"}, r"flash_attention_2, and flash-attn is not installed, expected"),
        ({"liger": True}, r"liger-kernel is not installed, expected .* pip install 'checkpoint-surgery\[liger\]'\."),
    ),
    ids=str,
)
def test_an_old_card_has_not_everything(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each setting names what is missing; what the card does have is not refused."""
    pretend_cuda(monkeypatch, bf16=False, capability=(7, 5))
    pretend_installed(monkeypatch, "flash_attn", "liger_kernel", missing=True)
    with pytest.raises(UnsupportedError, match=message):
        require(TrainSection(**settings), "cuda")
    require(TrainSection(precision="fp16", tf32="off", attention="sdpa"), "cuda")


def test_a_new_card_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the packages installed nothing is refused."""
    pretend_cuda(monkeypatch)
    pretend_installed(monkeypatch, "flash_attn", "liger_kernel")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    require(TrainSection(precision="bf16", tf32="on", attention="flash_attention_2", liger=True), "cuda")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(UnsupportedError, match="the installed flash-attn is not for this torch, device or version"):
        require(TrainSection(attention="flash_attention_2"), "cuda")


def test_a_compiler_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile says to one line of code stands in the message; any kind of failure counts."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("\nno working C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UnsupportedError, match=r"torch\.compile fails here \(no working C\+\+ compiler\), expected it"):
        require(TrainSection(compile=True), "cpu")


def test_a_compiler_that_works_is_asked_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles and runs a function; a device that is not ours is refused."""
    ran: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: (ran.append(x.device.type), f(x)))
    assert acceleration.compile_failure("cpu") == ""
    assert ran == ["cpu"]
    assert acceleration.compile_failure("hpu") == "the device is hpu"


@pytest.mark.parametrize(("text", "value"), (("tf32=on", "on"), ("tf32=off", "off"), ("tf32=auto", "auto")))
def test_on_and_off_are_words(text: str, value: str) -> None:
    """YAML takes a bare `on` for true."""
    document: dict[str, Any] = {"model": "model"}
    apply_override(document, f"train.{text}")
    assert check(Recipe, document, "recipe").train.tf32 == value


@pytest.mark.parametrize("word", ("yes", 1, "fast"))
def test_other_words_are_errors(word: object) -> None:
    """A switch has three positions."""
    document = {"model": "model", "train": {"tf32": word}}
    with pytest.raises(RecipeError, match=r"train\.tf32"):
        check(Recipe, document, "recipe")


# --- what auto means


def test_auto_takes_the_precision_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA bf16, or fp16 where bf16 would be emulated; on a CPU fp32. What is asked for is taken."""
    assert choose_autocast("auto", "cpu") == "fp32"
    pretend_cuda(monkeypatch)
    assert choose_autocast("auto", "cuda") == "bf16"
    pretend_cuda(monkeypatch, bf16=False)
    assert choose_autocast("auto", "cuda") == "fp16"
    assert choose_autocast("fp32", "cuda") == "fp32"


def test_auto_takes_tf32_beside_sixteen_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set where there is nothing; on a card that has it, it is set one way or the other."""
    assert choose_tf32("auto", "cpu", "bf16") is None
    pretend_cuda(monkeypatch)
    wanted = {(t, a): choose_tf32(t, "cuda", a) for t in ("auto", "on", "off") for a in ("fp32", "bf16")}
    assert [key for key, value in wanted.items() if value] == [("auto", "bf16"), ("on", "fp32"), ("on", "bf16")]
    assert set(wanted.values()) == {True, False}
    pretend_cuda(monkeypatch, capability=(7, 5))
    assert choose_tf32("auto", "cuda", "fp16") is None


def test_the_trainer_is_given_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The setting reaches TrainingArguments, and pinned memory is off without a card."""
    monkeypatch.setattr("surgery.backends.local.choose_tf32", lambda tf32, device, autocast: (tf32 == "off") and None)
    arguments = training_arguments(
        TrainSection(tf32="off"), folder=tmp_path, device="cpu", autocast="fp32", steps=1, has_eval=False
    )
    assert arguments.tf32 is None
    assert arguments.dataloader_pin_memory is False


# --- on the model


def attention_of(folder: Path, family: str = "llama", **settings: Any) -> str:
    """What a run would compute attention with, on a card that is only said to be there."""
    model = built(folder, family)
    chosen = prepare(model, TrainSection(**settings), device="cuda", autocast=settings.get("precision", "bf16"))
    assert chosen.attention == model.config._attn_implementation
    return chosen.attention


def test_attention_is_what_was_asked_for(tiny_model: TinyModel) -> None:
    """sdpa and eager are set by name; auto without flash-attn leaves the model its own."""
    folder = tiny_model("llama")
    assert attention_of(folder, attention="eager") == "eager"
    assert attention_of(folder, attention="sdpa") == "sdpa"
    assert attention_of(folder) == "sdpa"


def test_auto_takes_flash_where_everything_allows_it(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Package, model and 16 bits; compiled it keeps sdpa; in fp32 a request for it is refused."""
    monkeypatch.setattr(acceleration, "missing_flash", lambda _device: "")
    switched: list[str] = []
    monkeypatch.setattr(acceleration, "switch_attention", lambda _model, wanted: switched.append(wanted))
    monkeypatch.setattr(nn.Module, "compile", lambda _self: None)
    for settings in ({}, {"compile": True}, {"precision": "fp32"}):
        attention_of(tiny_model("llama"), **settings)
    assert switched == ["flash_attention_2"]
    with pytest.raises(UnsupportedError, match=r"train\.attention: flash_attention_2 in fp32, expected 16 bits"):
        attention_of(tiny_model("llama"), precision="fp32", attention="flash_attention_2")


def test_an_attention_that_the_model_has_not_is_refused(tiny_model: TinyModel) -> None:
    """Never another one in silence: flash without its package, sdpa where the class has none."""
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM cannot have flash_attention_2 \(.+\), expected one"):
        attention_of(tiny_model("llama"), attention="flash_attention_2")
    model = built(tiny_model("llama"))
    type(model)._supports_sdpa, before = False, type(model)._supports_sdpa
    try:
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="cannot have sdpa"):
            prepare(model, TrainSection(attention="sdpa"), device="cpu", autocast="fp32")
    finally:
        type(model)._supports_sdpa = before


def test_a_class_that_keeps_its_attention_is_refused(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers says nothing, and leaves the model as it was."""
    model = built(tiny_model("llama"))
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda _self, _wanted: None)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no eager, expected one that it has"):
        prepare(model, TrainSection(attention="eager"), device="cpu", autocast="fp32")


def stand_in(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]) -> list[Any]:
    """A package that has the names of liger-kernel that we call. Returns the models it was given."""
    given: list[Any] = []

    def given_model(model: Any) -> None:
        given.append(model)

    package, patch = types.ModuleType("liger_kernel.transformers"), types.ModuleType("monkey_patch")
    package._apply_liger_kernel_to_instance = given_model  # type: ignore[attr-defined]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(kinds)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    return given


def test_liger_takes_architectures_that_it_knows(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance is patched; an unknown architecture is refused, and so is a head that trains."""
    given = stand_in(monkeypatch, ("llama", "mistral"))
    model = built(tiny_model("llama"))
    attach(model, PacaSpec(rank=2))
    section = TrainSection(liger=True)
    assert prepare(model, section, device="cuda", autocast="bf16").liger
    assert given == [model]
    with pytest.raises(UnsupportedError, match="architecture gpt2, expected one of llama, mistral"):
        prepare(built(tiny_model("gpt2"), "gpt2"), section, device="cuda", autocast="bf16")
    with pytest.raises(UnsupportedError, match="the output head trains"):
        prepare(built(tiny_model("llama")), section, device="cuda", autocast="bf16")


# --- whole runs


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """nn.Module.compile without a C++ compiler, which takes a minute a graph; returns how many graphs there were."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend=counter))
    monkeypatch.setattr(acceleration, "compile_failure", lambda _device: "")
    return lambda: counter.frame_count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's, of READ's functions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*cache_size_limit:UserWarning")
@pytest.mark.parametrize(
    ("spec", "settings"),
    (
        pytest.param(PacaSpec(rank=4), {}, marks=pytest.mark.long, id="paca-fp32"),
        pytest.param(PacaSpec(rank=4), BF16_CHECKPOINTING, id="paca-bf16"),
        pytest.param(ReadSpec(hidden=8), BF16_CHECKPOINTING, marks=pytest.mark.long, id="read-bf16"),
    ),
)
def test_a_compiled_run_trains_as_an_eager_one(
    spec: Any, settings: dict[str, Any], tiny_model: TinyModel, tmp_path: Path, quick_compiler: Callable[[], int]
) -> None:
    """The same losses before and after, up to rounding; no graph breaks, and the record says what was used."""
    data, results = CASE.write(tmp_path), []
    torch._dynamo.utils.counters.clear()
    environment = dict(os.environ)
    for compiled in (False, True):
        out = tmp_path / f"compiled-{compiled}"
        apply(tiny_model("llama"), out, spec)
        section = {**CASE.train_section().model_dump(), "max_steps": 4, "compile": compiled, **settings}
        results.append(train(out, data, TrainSection(**section)))
        kernels = json.loads((out / "surgery.json").read_text())["manifest"]["training"]["kernels"]
        assert kernels["compile"] is compiled
        assert kernels["autocast"] == settings.get("precision", "fp32")
    eager, other = results
    tolerance = 2e-2 if settings else 1e-4
    assert other.before["loss"] == pytest.approx(eager.before["loss"], rel=tolerance)
    assert other.after["loss"] == pytest.approx(eager.after["loss"], rel=tolerance)
    assert eager.after["loss"] != eager.before["loss"]
    assert quick_compiler() >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert dict(os.environ) == environment  # which would make the next run compile, too


def test_what_is_usable_is_said() -> None:
    """Each of the kernels by name: usable, or the reason."""
    found = state("cpu")
    assert set(found) == {"bf16", "tf32", "flash-attn", "liger", "triton", "torch.compile"}
    assert all(text == "usable" or text.startswith("not usable: ") for text in found.values())
    assert found["bf16"] == "not usable: no CUDA device"
    assert found["liger"] == "not usable: the device is cpu"


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an old card lacks is said of it; compiling on CUDA needs triton."""
    pretend_cuda(monkeypatch, bf16=False, capability=(7, 5))
    pretend_installed(monkeypatch, "flash_attn", "liger_kernel", "triton", missing=True)
    assert state("cuda") == {
        "bf16": "not usable: Card 1 has none; auto takes fp16",
        "tf32": "not usable: Card 1 has none",
        "flash-attn": "not usable: flash-attn is not installed",
        "liger": "not usable: liger-kernel is not installed",
        "triton": "not usable: not installed",
        "torch.compile": "not usable: triton is not installed",
    }
