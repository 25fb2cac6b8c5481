"""What the Gaudi backend refuses where there is no Gaudi: unfit versions, modes, settings. See tests/gaudi."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from surgery import compat
from surgery.backends import gaudi
from surgery.backends.gaudi import FITTING, Installation, environment, require_mode, shortcomings
from surgery.compat import settle_rope
from surgery.errors import RecipeError, RequestError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.paca_layers import SharedGather, open_layer
from surgery.recipe import DataSection, TrainSection
from surgery.train import train
from tests.conftest import TinyModel
from tests.console import Console
from tests.examples import CASES

WHOLE = Installation("1.24.0.695", "1.21.2", "2.11.0+hpu.1.24.0.695.git1a2b3c4", "4.55.4")


def test_what_was_validated_together_has_no_shortcoming() -> None:
    """Both pairs, with either way in which a vendor's version may be written."""
    assert shortcomings(WHOLE) == []
    assert shortcomings(replace(WHOLE, torch="2.10.0+hpu_1.24.0-12.git8598e6d")) == []
    assert shortcomings(Installation("1.23.1.25", "1.20.0", "2.9.0+hpu_1.23.1-25.git8598e6d", "4.55.2")) == []
    assert set(FITTING) == {"1.20", "1.21"}


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"plugin": ""}, "habana-torch-plugin is not installed, expected the Gaudi software"),
        ({"package": ""}, "optimum-habana is not installed"),
        ({"package": "1.19.0"}, "optimum-habana 1.19.0, expected optimum-habana 1.20 or 1.21"),
        ({"torch": "2.13.0"}, "torch 2.13.0, expected the build that came with"),
        ({"torch": "2.11.0+cpu"}, "pip has replaced it"),
        ({"torch": "2.11.0+cu130"}, "pip has replaced it"),
        ({"torch": ""}, "torch is not installed"),
        ({"torch": "2.9.0+hpu.1.23.1.25"}, "Install both from one Gaudi software"),
        ({"torch": "2.12.0+hpu.1.24.0.695"}, "expected torch 2.10 or 2.11"),
        ({"package": "1.20.0"}, "Install optimum-habana 1.21"),
        ({"plugin": "1.25.0.1", "torch": "2.12.0+hpu.1.25.0.1"}, "Install the Gaudi software 1.24"),
        ({"transformers": "5.23.0"}, "transformers 5.23.0, expected transformers >=4.55,<4.56"),
        ({"transformers": ""}, "transformers is not installed"),
    ),
)
def test_what_does_not_fit_is_named_with_its_remedy(change: dict[str, str], words: str) -> None:
    """One shortcoming each, of exit code 5."""
    (problem,) = shortcomings(replace(WHOLE, **change))
    assert words in str(problem)
    assert problem.exit_code == 5


def test_the_mode_s_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for where it is not set, agreed with where it fits, and refused where it contradicts."""
    monkeypatch.setattr(Installation, "here", classmethod(lambda cls: WHOLE))
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    wanted = {mode: environment(TrainSection(device="hpu", hpu_mode=mode)) for mode in ("lazy", "eager", "compile")}
    assert [values["PT_HPU_LAZY_MODE"] for values in wanted.values()] == ["1", "0", "0"]
    with pytest.raises(UnsupportedError, match=r"PT_HPU_LAZY_MODE: not set, expected 0 for hpu_mode=compile"):
        require_mode("compile")
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "0")
    assert environment(TrainSection(device="hpu", hpu_mode="eager")) == {}
    with pytest.raises(UnsupportedError, match=r"lazy with PT_HPU_LAZY_MODE=0.*hpu_mode=eager or compile"):
        environment(TrainSection(device="hpu"))


@pytest.mark.parametrize("more", ((), ("--nproc", "2")))
def test_without_the_plugin_training_is_refused(
    more: tuple[str, ...], tiny_model: TinyModel, tmp_path: Path, console: Console
) -> None:
    """Exit code 5, one line on standard error, and the adapter as it was."""
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    before = (tmp_path / "adapter" / "surgery.json").read_bytes()
    (tmp_path / "data.txt").write_text("a text")
    ended = console("train", tmp_path / "adapter", "--data", tmp_path / "data.txt", "--device", "hpu", *more)
    assert ended.code == 5
    said = ended.err
    assert said.startswith("Error: --device hpu: habana-torch-plugin is not installed")
    assert len(said.splitlines()) == 1
    assert (tmp_path / "adapter" / "surgery.json").read_bytes() == before
    assert not (tmp_path / "adapter" / "checkpoints").exists()


def test_a_gaudi_s_setting_on_another_device_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    """It would be ignored."""
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    data: DataSection = CASES[0].write(tmp_path)
    with pytest.raises(RecipeError, match=r"train.hpu_mode: eager with device cpu, expected device hpu"):
        train(tmp_path / "adapter", data, TrainSection(device="cpu", hpu_mode="eager"))


def test_a_launcher_s_own_arguments_are_refused() -> None:
    """DistributedRunner takes none: they would be ignored."""
    with pytest.raises(UnsupportedError, match=r"'--nnodes=2' after `--`, expected none on hpu"):
        gaudi.launch(["adapter", "--", "--nnodes=2"], 2)


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules of the vendor's names, of a machine whose versions fit and that has no card: `device` may get one."""
    device = ModuleType("habana_frameworks.torch.hpu")
    device.is_available = lambda: False  # type: ignore[attr-defined]
    packages = ("habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.distributed")
    modules = {name: ModuleType(name) for name in (*packages, "habana_frameworks.torch.distributed.hccl")}
    modules["habana_frameworks.torch"].hpu = device  # type: ignore[attr-defined]
    for name, module in {**modules, "habana_frameworks.torch.hpu": device}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Installation, "here", classmethod(lambda cls: WHOLE))
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    return SimpleNamespace(device=device)


def test_a_plugin_that_sees_no_card_is_refused(bridge: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded; with a card there is the device, and without the mode's variable there is none."""
    with pytest.raises(UnsupportedError, match="plugin is installed, but sees no device, expected a Gaudi"):
        gaudi.choose_device("hpu")
    bridge.device.is_available = lambda: True
    assert gaudi.choose_device("hpu") == "hpu"
    monkeypatch.delenv("PT_HPU_LAZY_MODE")
    with pytest.raises(UnsupportedError, match=r"PT_HPU_LAZY_MODE: not set, expected 1 for hpu_mode=lazy"):
        gaudi.choose_device("hpu")


def test_a_device_that_is_none_of_its_own_is_refused(
    bridge: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """optimum-habana trains wherever accelerate finds a device, and says nothing."""
    package = ModuleType("optimum.habana")

    def build(**_settings: object) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device("cpu"))

    package.GaudiTrainingArguments = build  # type: ignore[attr-defined]
    for name, module in (("optimum", ModuleType("optimum")), ("optimum.habana", package)):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UnsupportedError, match=r"--device hpu: training would run on cpu, expected a Gaudi"):
        gaudi.training_arguments(
            TrainSection(device="hpu"), folder=tmp_path, device="hpu", autocast="bf16", steps=1, has_eval=False
        )


def test_no_more_processes_than_cards(bridge: SimpleNamespace) -> None:
    """Before anything is launched."""
    bridge.device.device_count = lambda: 4
    with pytest.raises(RequestError, match="--nproc: 5, expected at most 4, as this machine has 4 Gaudis"):
        gaudi.launch(["adapter"], 5)


# --- what transformers 5 wrote, read by 4.55


@pytest.mark.parametrize(
    ("written", "expected"),
    (
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
        (
            {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        ),
    ),
)
def test_rotary_settings_survive(
    written: dict[str, object], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.55 passes over `rope_parameters` in silence; where both forms stand, or under 5, nothing is changed."""
    config = SimpleNamespace(rope_theta=1e4, rope_local_base_freq=0.0)
    monkeypatch.setattr(compat, "TRANSFORMERS_5", False)
    settle_rope(config, {"rope_parameters": written, "rope_theta": 7.0})
    assert config.rope_theta == 1e4
    settle_rope(config, json.loads(json.dumps({"rope_parameters": written})))
    assert {name: getattr(config, name) for name in expected} == expected


def test_rotary_settings_without_a_place_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kinds of layers that 4.55 cannot tell apart."""
    monkeypatch.setattr(compat, "TRANSFORMERS_5", False)
    with pytest.raises(ValueError, match="no place"):
        settle_rope(SimpleNamespace(), {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})


def test_a_backward_under_autocast_gives_the_same_bits() -> None:
    """Whoever calls backward inside the autocast region, the layer casts what it casts by name."""
    layer = torch.nn.Linear(12, 8)
    open_layer(layer, torch.tensor([0, 3, 6]), input_axis=1, storage=torch.float32, shared=SharedGather(1), scale=1.0)
    x = torch.randn(6, 12, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        out = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out, (layer.paca_delta, x), torch.full_like(out, 1.001)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
