"""Who saved what: the running module of each tensor that autograd keeps, by kinds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from surgery.memory.dry import DryModel, Saved
from surgery.paca_layers import PacaLayer

ATTENTION, NORMS, MLP, COLUMNS, SIDE, LOGITS, OTHER = KINDS = (
    "attention",
    "norms",
    "MLP",
    "gathered columns",
    "side network",
    "logits and loss",
    "other",
)


class Watch:
    """Which module is running when something is saved.

    `path`: the running modules from the outside in; `kept`: (module, bytes) of each storage; `attention`: the modules
    in which scores were computed.
    """

    def __init__(self, dry: DryModel) -> None:
        self.dry = dry
        self.modules = dict(dry.model.named_modules())
        self.path: list[str] = []
        self.called: set[str] = set()
        self.kept: list[tuple[str, int]] = []
        self.attention: set[str] = set()
        self._seen: dict[int, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        own = (*self.dry.model.parameters(), *self.dry.model.buffers())
        self._seen = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in own)}
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(_module: nn.Module, _args: Any) -> None:
            self.called.add(name)
            self.path.append(name)

        return enter

    def _leaving(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.path.pop()

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd saves a tensor: its storage counts the first time."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen[id(storage)] = storage  # kept alive: an id must not be used twice
            self.kept.append((self.path[-1], storage.nbytes()))
        return tensor

    def saved(self) -> Saved:
        """The sums by kind."""
        attention = {self._block_of(name) for name in self.attention}
        kinds = Counter(dict.fromkeys(KINDS, 0))
        for name, size in self.kept:
            kinds[self._kind(name, attention)] += size
        return Saved(dict(kinds))

    def _block_of(self, name: str) -> str:
        """The outermost module inside the layer that holds this one: attention with its projections."""
        layer = self.dry.layer_of(name)
        parts = name.removeprefix(f"{layer}.").split(".")
        inside = [f"{layer}.{'.'.join(parts[: number + 1])}" for number in range(len(parts))]
        return next((path for path in inside if path in self.called), name)

    def _kind(self, name: str, attention: set[str]) -> str:
        module, layer = self.modules[name], self.dry.layer_of(name)
        if not name or any(name == head or name.startswith(f"{head}.") for head in self.dry.heads):
            return LOGITS
        if self.dry.is_side:
            return SIDE
        if isinstance(module, PacaLayer):
            return COLUMNS
        if _is_norm(module):
            return NORMS
        if not layer or name == layer:
            return OTHER
        return ATTENTION if self._block_of(name) in attention else MLP


def _is_norm(module: nn.Module) -> bool:
    """A scale, perhaps a shift, and nothing else."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() == 1 for p in parameters) and not list(module.children())
