"""Methods side by side over a quantized base: the same packed values under each, what they weigh, and who cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.bench import peak
from surgery.bench.held import evaluated, held_layers, model_bytes
from surgery.bench.longest import predicted
from surgery.bench.measure import deployed, forward_of, merge_of
from surgery.bench.results import Results
from surgery.bench.run import run
from surgery.bench.show import lines
from surgery.bench.spec import held_as, parse_method
from surgery.bench.subject import build, draw, enter
from surgery.errors import RequestError, SurgeryError, UnsupportedError
from surgery.quantized import KINDS, dequantize, is_quantized, round_trip
from tests.benches import little, subject_of
from tests.conftest import TinyModel
from tests.console import Command

pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
pytest.importorskip("peft", reason="needs the extra lora")
ALL = ("floor", "paca", "lora", "dora")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 values, as on any real model


def packed(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by their names in the plain model."""
    found = {name: module for name, module in model.named_modules() if is_quantized(module)}
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer"): found[name] for name in found}


@pytest.mark.parametrize("kind", ("nf4", "fp4-double"))
def test_all_methods_have_one_base(kind: str, tiny_model: TinyModel) -> None:
    """The same layers, whose values are those of the checkpoint packed once, and the same logits before training."""
    subject, entries = subject_of(tiny_model("llama", overrides=WIDE), *ALL, quantize=kind)
    base = build(subject)
    wanted = {n: round_trip(m.weight, kind) for n, m in base.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    batch, logits = draw(subject, 0), []
    for entry in entries:
        model = enter(subject, entry, base).model
        layers = packed(model)
        assert set(layers) == set(wanted), entry.name
        assert all(torch.equal(dequantize(layers[name], torch.float32), wanted[name]) for name in wanted), entry.name
        logits.append(model(**batch).logits.float())
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=1e-4)
    plain = base.train()(**batch).logits.float()
    assert not torch.allclose(plain, logits[0], atol=0.02)


def test_what_trains_learns(tiny_model: TinyModel) -> None:
    """Each lowers its loss over a base that stays as it was packed, and lean blocks go with it."""
    subject, entries = subject_of(tiny_model("llama", overrides=WIDE), *ALL[1:], quantize="nf4", lean=True)
    batch = draw(subject, 0)
    for entry in entries:
        contender = enter(subject, entry, build(subject), rate=3e-2)
        before = {n: m.weight.detach().clone() for n, m in packed(contender.model).items()}  # type: ignore[union-attr, operator]
        losses = [float(contender.step(batch)) for _ in range(8)]
        assert losses[-1] < losses[0] - 0.2, entry.name
        assert all(torch.equal(m.weight, before[n]) for n, m in packed(contender.model).items()), entry.name  # type: ignore[arg-type]


def test_one_method_may_be_held_otherwise(tiny_model: TinyModel) -> None:
    """`quantize=` behind a method's name, `none` for dense, is stronger than what holds for all."""
    given = ("paca", "paca:r=4,quantize=int8", "full:quantize=none", "lora:quantize=fp4,values=paca:r=4")
    subject, entries = subject_of(tiny_model("llama", overrides=WIDE), *given, quantize="nf4")
    assert [held_as(entry, subject.spec) for entry in entries] == ["nf4", "int8", "", "fp4"]
    base = build(subject)
    counts = [len(packed(enter(subject, entry, base).model)) for entry in entries]
    assert counts == [14, 14, 0, 14]
    assert parse_method("paca").quantize is None
    assert subject.spec.plain()["quantize"] == "nf4"
    assert "quantize" not in little(tiny_model("llama"), "paca").plain()


def test_the_weights_are_counted(tiny_model: TinyModel) -> None:
    """All that a model holds: packed weights with their scales, and what a method adds; a tied tensor once."""
    subject, (floor, lora, dense) = subject_of(
        tiny_model("llama", overrides=WIDE), "floor", "lora", "floor:quantize=none", quantize="nf4-double"
    )
    base = build(subject)
    shared = subject.shared()
    names = held_layers(base, shared.layers, shared.stored, "nf4", task=shared.task, heads=shared.heads)
    whole = sum(p.nbytes for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    layers = [base.get_parameter(f"{name}.weight") for name in names]
    small = sum(KINDS["nf4-double"].size_bytes(*weight.shape) for weight in layers)
    wanted = whole - sum(weight.nbytes for weight in layers) + small
    models = [enter(subject, entry, base).model for entry in (floor, lora, dense)]
    assert model_bytes(models[0]) == wanted
    assert model_bytes(models[1]) == wanted + sum(p.nbytes for p in models[1].parameters() if p.requires_grad)
    assert model_bytes(models[2]) == whole
    models[2].lm_head.weight = models[2].get_input_embeddings().weight
    assert model_bytes(models[2]) == whole - base.lm_head.weight.nbytes


def test_deployed(tiny_model: TinyModel) -> None:
    """PaCA's columns go into what training saw, dense; PEFT's would be quantized anew, and stays beside its base."""
    subject, (floor, paca, lora) = subject_of(tiny_model("llama", overrides=WIDE), *ALL[:3], quantize="nf4")
    assert merge_of(subject, lora) is None
    base, batch = build(subject), draw(subject, 0)
    models = [deployed(subject, entry, base) for entry in (floor, paca, lora)]
    assert [len(packed(model)) for model in models] == [14, 0, 14]
    wanted, *others = (forward_of(subject, model)(batch).logits for model in models)  # type: ignore[attr-defined]
    torch.testing.assert_close(others[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(others[1], wanted, atol=0.25, rtol=0.02)  # bitsandbytes' own product in eval mode


def test_an_evaluation_changes_no_weight(tiny_model: TinyModel) -> None:
    """bitsandbytes' layers stay as they are in the midst of training, also where sizes do not fit its other order."""
    for sizes in (WIDE, {}):
        subject, (lora,) = subject_of(tiny_model("llama", overrides=sizes), "lora", quantize="nf4")
        model, batch = enter(subject, lora, build(subject)).model, draw(subject, 0)
        before = {n: m.weight.detach().clone() for n, m in packed(model).items()}  # type: ignore[union-attr, operator]
        evaluated(model)
        with torch.no_grad():
            model(**batch)
        assert not model.training
        assert all(torch.equal(m.weight, before[n]) for n, m in packed(model).items())  # type: ignore[arg-type]
        forward_of(subject, deployed(subject, lora, build(subject)))(batch)


def test_a_whole_bench(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Peaks in a process of its own included; the table has the weights, of which the packed ones are fewer."""
    methods = (*ALL[:3], "paca:r=4,quantize=none")
    spec = little(tiny_model("llama", overrides=WIDE), *methods, quantize="nf4", fit_bytes=1 << 22)
    found: Results = run(spec, tmp_path / "out", say=lambda _text: None)
    weights = {row.method: row.weight_bytes or 0 for row in found.rows}
    assert weights["floor"] < weights["paca"] < weights["paca:r=4,quantize=none"]
    assert [row.merged for row in found.rows] == [None, True, False, True]
    assert all(row.peak_bytes is not None and row.seconds for row in found.rows)
    heads = [line.split() for line in lines(found) if line.startswith("method")]
    assert heads[1][:3] == ["method", "weights", "saved"]
    longest = [row.longest_tokens for row in found.rows]
    assert longest[0] is None
    assert "floor: the longest sequence is not predicted: floor over a quantized base" in found.remarks()
    assert longest[1]


def test_a_packed_base_leaves_room(tiny_model: TinyModel) -> None:
    """What is predicted to fit is longer than over a dense base, and less is taken away for the model's peak."""
    model = tiny_model("llama", overrides={**WIDE, "max_position_embeddings": 4096})
    subject, (four, dense) = subject_of(model, "paca", "paca:r=4,quantize=none", quantize="nf4")
    assert predicted(subject, four, 1 << 21) > predicted(subject, dense, 1 << 21)
    assert peak._packed_away(subject, dense, build(subject)) == 0
    base = build(subject)
    before = model_bytes(base)
    assert peak._packed_away(subject, four, base) == before - model_bytes(
        enter(subject, subject_of(model, "floor", quantize="nf4")[1][0], base).model
    )


@pytest.mark.parametrize(
    ("methods", "given", "error", "message"),
    (
        (("full",), "nf4", UnsupportedError, "--quantize: nf4 for full, which trains the weights themselves"),
        (("paca", "read"), "nf4", UnsupportedError, "--quantize: nf4 for read, which reads a dense backbone"),
        (
            ("bitfit",),
            "nf4",
            UnsupportedError,
            "nf4 for bitfit, which is put on dense layers here, expected one",
        ),
        (
            ("lora:quantize=int8",),
            "",
            UnsupportedError,
            "--methods lora:quantize=int8: int8 for lora, expected one of",
        ),
        (("miss:quantize=nf4",), "", UnsupportedError, "--methods miss:quantize=nf4: nf4 for miss"),
        (("paca",), "nf5", RequestError, "--quantize: unknown name 'nf5'.*The closest is 'nf4'"),
        (("paca:quantize=nf5",), "", RequestError, "--methods paca:quantize=nf5: unknown name 'nf5'"),
        (("paca:quantize=",), "", RequestError, "the setting 'quantize='"),
    ),
)
def test_who_cannot(
    methods: tuple[str, ...], given: str, error: type[SurgeryError], message: str, tiny_model: TinyModel
) -> None:
    """Said before anything is read."""
    with pytest.raises(error, match=message):
        little(tiny_model("llama"), *methods, quantize=given)


def test_the_command_says_so(command: Command, tiny_model: TinyModel, tmp_path: Path) -> None:
    """In one line, with exit code 5; nothing is written."""
    asked: tuple[Any, ...] = ("bench", tiny_model("llama"), "--quantize", "nf4", "-o", tmp_path / "out")
    code, error = command(*asked)
    assert code == 5
    assert error.startswith("Error: --quantize: nf4 for read, which reads a dense backbone, expected one of floor,")
    assert "read:quantize=none" in error
    assert not (tmp_path / "out").exists()
