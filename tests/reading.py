"""READ models whose side networks have moved, made without training; and what autograd keeps of a forward."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import surgery
from surgery import ReadSpec
from surgery.columns import generator_seed
from surgery.runs import LOG_FILE
from surgery.side.settings import NAME
from tests.tiny import FAMILIES, build_model, draw_parameters

WIDTH = 7  # of side networks: no multiple of it is a width of a tiny model
SPEC = ReadSpec(hidden=WIDTH)
DEPTHS: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("n_layer",),
    "distilbert": ("n_layers",),
    "t5": ("num_layers", "num_decoder_layers"),
    "bart": ("encoder_layers", "decoder_layers"),
}


def depth_of(family: str, layers: int) -> dict[str, object]:
    """The fields of a family's config that give it so many layers (in each stack)."""
    fields: dict[str, object] = dict.fromkeys(DEPTHS.get(family, ("num_hidden_layers",)), layers)
    return fields


def dropout_of(family: str) -> dict[str, object]:
    """Dropout of a half everywhere in the backbone, none in a classifier's head."""
    fields = getattr(transformers, FAMILIES[family].config)().to_dict()
    return {name: 0.0 if "classif" in name else 0.5 for name in fields if "drop" in name}


def classifier_of(family: str) -> Any:
    """The family's class for sequence (or image) classification, None where it has none."""
    config_class = getattr(transformers, FAMILIES[family].config)
    images = family == "vit"
    auto = transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification
    return auto._model_mapping.get(config_class, None)


def build_classifier(family: str, *, seed: int = 0, overrides: Mapping[str, object] | None = None) -> Any:
    """A tiny classifier of three labels, each parameter drawn, in eval mode."""
    entry = FAMILIES[family]
    fields = {**entry.fields, **entry.ids, "num_labels": 3, **(overrides or {})}
    model = classifier_of(family)(getattr(transformers, entry.config)(**fields))
    draw_parameters(model, seed=seed)
    return model.eval()


@torch.no_grad()
def move(model: nn.Module, seed: int = 0) -> Any:
    """Change every value of a side network, as training would, by noise from (seed, name). Returns the model."""
    for name, parameter in model.get_submodule(NAME).named_parameters():
        generator = torch.Generator().manual_seed(generator_seed(seed, name))
        parameter.add_((0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def attached(family: str, spec: ReadSpec = SPEC, **building: Any) -> Any:
    """A tiny model in eval mode, with a side network that has moved. building: as `build_model` takes it."""
    model = build_model(family, **building)
    surgery.attach(model, spec)
    return move(model)


def twins(family: str, spec: ReadSpec = SPEC, **building: Any) -> tuple[Any, Any]:
    """An attached model that has moved, and the plain one it was made of."""
    plain = build_model(family, **building)
    ours = copy.deepcopy(plain)
    surgery.attach(ours, spec)
    return move(ours), plain


def side_gradients(model: nn.Module) -> dict[str, Tensor]:
    """A side network's gradients, by name; each parameter has one."""
    found = {name: parameter.grad for name, parameter in model.get_submodule(NAME).named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, missing
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits without gradients, in the mode the model is in."""
    logits: Tensor = model(**inputs).logits
    return logits


def losses_of(folder: Path) -> list[float]:
    """The loss of each logged step of an adapter's run, in order."""
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class Kept:
    """The tensors that autograd keeps, each with what `label` was when it was kept; those it let go are not listed."""

    def __init__(self) -> None:
        self.label = ""
        self._packed: list[tuple[str, weakref.ref[_Packed]]] = []

    def pack(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor.detach())  # an output that were packed as it is would keep its own node alive
        self._packed.append((self.label, weakref.ref(packed)))
        return packed

    def alive(self) -> list[tuple[str, Tensor]]:
        """(label, tensor) of what is still kept."""
        found = ((label, packed()) for label, packed in self._packed)
        return [(label, packed.tensor) for label, packed in found if packed is not None]

    def bytes_besides(self, model: nn.Module) -> int:
        """Bytes of the distinct storages that are kept, without the model's own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in self.alive()}
        return sum(size for pointer, size in storages.items() if pointer not in own)


class _Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def keeping() -> Iterator[Kept]:
    """Watch what autograd keeps."""
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor):
        yield kept
