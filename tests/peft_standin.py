"""PaCA as a method of the installed PEFT, which may be older than its own: PEFT's saver and loader are the real ones.

The parameters have the names, shapes and meaning of PEFT 0.22's (see surgery.peft_files); what a layer computes is
written out plainly. So what is saved here has the keys and the configuration that PEFT gives such a method, and what
loads here is what PEFT takes for one. PEFT's own PaCA takes the place of all this where the installed one has it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

HAS_OWN = hasattr(PeftType, "PACA")
if not HAS_OWN:
    _kind = str.__new__(PeftType, "PACA")
    _kind._name_, _kind._value_ = "PACA", "PACA"
    PeftType._member_map_["PACA"] = PeftType._value2member_map_["PACA"] = _kind
    PeftType._member_names_.append("PACA")
    type.__setattr__(PeftType, "PACA", _kind)


@dataclass
class StandinConfig(PeftConfig):
    """The fields of PEFT 0.22's PacaConfig."""

    r: int = 8
    paca_alpha: int = 8
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    random_seed: int | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PACA")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class StandinLinear(nn.Module, BaseTunerLayer):
    """A linear layer; `paca_delta` (out, r), times paca_alpha / r, is added to the columns `paca_indices` (r,)."""

    adapter_layer_names = ("paca_delta",)
    other_param_names = ("scaling", "paca_indices")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: StandinConfig, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.paca_delta, self.paca_indices = nn.ParameterDict(), BufferDict({}, persistent=True)
        self.scaling: dict[str, float] = {}
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter_name
        self.open(adapter_name, config, key)

    def open(self, adapter_name: str, config: StandinConfig, key: str) -> None:
        """Add an adapter: columns by (seed, layer), sorted; a delta of zero."""
        seed = (config.random_seed or 0) + zlib.crc32(key.encode())
        order = torch.randperm(self.base_layer.in_features, generator=torch.Generator().manual_seed(seed))
        self.paca_indices[adapter_name] = order[: config.r].sort().values
        self.paca_delta[adapter_name] = nn.Parameter(torch.zeros(self.base_layer.out_features, config.r))
        self.scaling[adapter_name] = config.paca_alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def weight(self, adapter_name: str = "default") -> Tensor:
        """The weight with the adapter's columns, summed as PEFT sums them: in the wider dtype, and then rounded."""
        base = self.base_layer.weight.detach()
        index, delta = self.paca_indices[adapter_name], self.paca_delta[adapter_name]
        columns = torch.add(base.index_select(1, index), delta, alpha=self.scaling[adapter_name]).to(base.dtype)
        return base.index_copy(1, index, columns)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.base_layer.bias)


class StandinModel(BaseTuner):
    """Replaces linear layers."""

    prefix = "paca_"
    tuner_layer_cls = StandinLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **_: Any,
    ) -> None:
        self._replace_module(parent, target_name, StandinLinear(target, adapter_name, peft_config, current_key), target)


if not HAS_OWN:
    register_peft_method(name="paca", config_cls=StandinConfig, model_cls=StandinModel, prefix="paca_")
PacaConfig: Any = peft.PacaConfig if HAS_OWN else StandinConfig


def save_with_peft(model: Any, folder: Path, *, move: float = 0.05, **settings: Any) -> Any:
    """Train `model`'s columns by noise under PEFT and save them there. Returns the PEFT model."""
    wrapped = peft.get_peft_model(model, PacaConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(move * noise) if "paca_delta" in name else parameter.copy_(noise)
    wrapped.save_pretrained(folder)
    return wrapped.eval()
