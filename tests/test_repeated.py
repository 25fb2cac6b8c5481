"""Beside a side network most layers only echo: what a step keeps and holds is, to the byte, what running all gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.adapter import open_adapter
from surgery.memory import saved
from surgery.memory.run import Run
from surgery.memory.saved import saved_by, saved_by_all, temporary
from surgery.memory.step import Step
from surgery.memory.subject import Subject, open_subject
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.recipe import TrainSection
from surgery.repeated import echoing
from surgery.survey import TaskSpec
from surgery.training.model import load_for_training
from tests.conftest import TinyModel

DEEP: Mapping[str, Mapping[str, int]] = {
    "llama": {"num_hidden_layers": 7},
    "gpt2": {"n_layer": 6},
    "bert": {"num_hidden_layers": 6},
    "t5": {"num_layers": 6, "num_decoder_layers": 7},
}
TASKS = {"bert": TaskSpec("sequence-classification", ("animal", "person")), "t5": TaskSpec("seq2seq")}


def subject_of(family: str, spec: ReadSpec, tiny_model: TinyModel, **sizes: int) -> Subject:
    """A deep tiny model with a side network, without storage."""
    base = tiny_model(family, overrides={**DEEP[family], **sizes})
    return open_subject(base, "read", spec, TASKS.get(family, TaskSpec()), Run())


@pytest.mark.parametrize(
    ("family", "settings"),
    (
        *(("llama", {"cell": cell}) for cell in ("gru", "lstm", "rnn")),
        *(("llama", {"cell": cell, "layers": "every:2"}) for cell in ("gru", "lstm", "rnn")),
        ("llama", {"layers": "0,3,4", "initial": "embedding"}),
        ("llama", {"reduce": "mean", "bidirectional": True, "recurrent_layers": 2}),
        ("gpt2", {"layers": "last:3"}),
        ("bert", {"pooling": "mean", "output_norm": True}),
        ("t5", {}),
        ("t5", {"stacks": "encoder", "joiner": "mean", "cell": "lstm"}),
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "step",
    (Step(2, 16), Step(3, 40, padded=True), Step(2, 16, autocast="bf16", device="cuda")),
    ids=("cpu", "padded", "cuda"),
)
def test_echoes_stand_for_all(
    step: Step, family: str, settings: Mapping[str, Any], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every cell, choice of layers, reduction and kind of stack; and both are far from what few layers keep."""
    dry = subject_of(family, ReadSpec(hidden=8, **settings), tiny_model).dry
    assert len(dry.alike) == (2 if family == "t5" else 1)
    ours = saved_by_all(dry, step), temporary(dry, step)
    monkeypatch.setattr(saved, "echoing", lambda _model, _blocks: nullcontext())
    assert ours == (saved_by(dry, step), temporary(dry, step))
    assert ours[0].total > 0


def test_no_cache_is_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Neither here nor in training: it would hold the keys and values of all of T5's layers until the loss."""
    apply(tiny_model("t5"), tmp_path / "adapter", ReadSpec(hidden=8))
    trained, _ = load_for_training(open_adapter(tmp_path / "adapter"), tiny_model("t5"), TrainSection(), "cpu")
    for model in (trained, subject_of("t5", ReadSpec(hidden=8), tiny_model).dry.model):
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        assert len({id(config) for config in configs}) == 3
        assert not any(config.use_cache for config in configs)


def test_three_layers_run(tiny_model: TinyModel) -> None:
    """The first two and the last; afterwards all do again."""
    dry = subject_of("llama", ReadSpec(hidden=8), tiny_model).dry
    ran: Counter[str] = Counter()
    for number, layer in enumerate(dry.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.update([number]))
    saved_by_all(dry, Step(2, 16))
    assert ran == Counter([0, 1, 6])
    saved_by(dry, Step(2, 16))
    assert ran == Counter([*range(7), 0, 1, 6])


def test_layers_that_differ_are_run(tiny_model: TinyModel) -> None:
    """Local and global attention: nothing echoes."""
    base = tiny_model("gemma3", overrides={"num_hidden_layers": 8})
    assert not open_subject(base, "read", ReadSpec(hidden=8), TaskSpec(), Run()).dry.alike


class _Wide(nn.Module):
    """A layer whose state is a part of a larger storage, or that returns something new beside it."""

    def __init__(self, *, returns_more: bool) -> None:
        super().__init__()
        self.returns_more, self.calls = returns_more, 0

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        self.calls += 1
        return (x + 1, mask * 2) if self.returns_more else torch.cat([x, x])[: len(x)]


@pytest.mark.parametrize("returns_more", (False, True))
def test_what_cannot_be_echoed_is_run(returns_more: bool) -> None:
    """A storage that is larger than its state, and tensors that were not given to the layer."""
    model = nn.Module()
    model.layers = nn.ModuleList(_Wide(returns_more=returns_more) for _ in range(6))
    x, mask = torch.zeros(2, 3), torch.ones(2)
    with echoing(model, ["layers"]):
        for layer in model.layers:
            out = layer(x, mask)
    assert [layer.calls for layer in model.layers] == [1] * 6
    assert float((out[0] if returns_more else out).sum()) == (6.0 if returns_more else 0.0)
