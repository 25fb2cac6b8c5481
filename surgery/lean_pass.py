"""The lean pass: a model, whatever trains in it, whose frozen blocks keep for backward the least they need.

It runs on a model in memory after a method has been attached, and is undone by `restore` (and by `surgery.detach`). No
parameter, buffer or name changes, so that nothing of it reaches a file; outside training with gradients every module
runs its own class's forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery import lean_head
from surgery.errors import CheckError, RequestError, UnsupportedError
from surgery.lean_blocks import Lean, LeanActivation, Prober, become, looks_gated, looks_like_norm, unbecome
from surgery.lean_kernels import OURS, Kernels
from surgery.side.network import SideNetwork


@dataclass(frozen=True)
class Pass:
    """A change of a model in memory, and what it says about itself; the runner checks what it ensures."""

    name: str
    requires: str
    does: str
    ensures: str
    rewrite: Callable[..., Rewritten]
    restore: Callable[[Any], None]


@dataclass(frozen=True)
class Rewritten:
    """How many modules were made lean, whether the loss was, and what was left, with the reason."""

    norms: int = 0
    gates: int = 0
    activations: int = 0
    loss: bool = False
    left: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.norms or self.gates or self.activations or self.loss)

    def line(self) -> str:
        """For people."""
        many = {"norms": self.norms, "gated MLPs": self.gates, "activations": self.activations}
        parts = [f"{count} {name}" for name, count in many.items() if count]
        return ", ".join([*parts, *(["the loss"] if self.loss else [])]) or "nothing"


def rewrite(model: nn.Module, *, kernels: Kernels = OURS, is_required: bool = True) -> Rewritten:
    """Make a model lean, in place, with these kernels; its parameters and buffers are checked to be what they were.

    is_required: that nothing can be made so is an error; else nothing has been done then.
    Raises: RequestError where it is lean already; UnsupportedError, with the reasons, where nothing can be made so.
    """
    if is_lean(model):
        raise RequestError("lean", "the model is lean already", expected="a plain one", fix="Call restore first")
    before = _tensors(model)
    found = _rewrite(model, kernels)
    if not found and is_required:
        why = "; ".join(found.left) or "no norm, gated MLP, activation or loss"
        raise UnsupportedError(
            "lean",
            f"nothing in {type(_inner(model)).__name__} can be made lean ({why})",
            expected="an RMS norm, a gated MLP, a GELU written as a formula, or a language model's loss",
            fix="Leave lean out: this model keeps what it kept",
        )
    _require_same(before, _tensors(model))
    return found


def restore(model: nn.Module) -> None:
    """The plain model again, in place; one that is not lean stays as it is."""
    before = _tensors(model)
    for module in list(model.modules()):
        if isinstance(module, (lean_head.LeanHead, lean_head.LeanModel)):
            lean_head.unbecome(module)
        elif isinstance(module, Lean):
            unbecome(module)
    _require_same(before, _tensors(model))


LEAN = Pass(
    name="lean",
    requires="a transformers model, plain or with any method attached; not sharded yet",
    does="norms keep their input and one number a row, gated MLPs gate and up, activations their input, a language "
    "model's loss the gradient of its hidden states",
    ensures="the same parameters and buffers under the same names; outputs bit for bit, gradients but for rounding",
    rewrite=rewrite,
    restore=restore,
)


def is_lean(model: nn.Module) -> bool:
    """Whether any module of it is."""
    return any(isinstance(module, Lean) for module in model.modules())


def _inner(model: nn.Module) -> Any:
    """transformers' model, of PEFT's that is around it."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def _rewrite(model: nn.Module, kernels: Kernels) -> Rewritten:
    prober, count, left = Prober(), Counter[str](), dict[str, None]()
    within: set[int] = set()  # activations of MLPs that are lean as a whole
    for module in list(_own_modules(model)):
        name = type(module).__name__
        if looks_like_norm(module):
            norm = prober.norm(module)
            if norm is None:
                left[f"{name} is no RMS norm known here"] = None
            else:
                become(module, norm.lean, norm.record, kernels)
                count["norms"] += 1
        elif looks_gated(module):
            gated = prober.gated(module)
            if gated is None:
                left[f"{name} is no gated MLP known here"] = None
            else:
                within |= {id(child) for child in module.children()}
                become(module, gated.lean, gated.record, kernels)
                count["gates"] += 1
        elif _is_bare(module) and id(module) not in within:
            activation = prober.activation(module)
            if activation and not activation.keeps_input:
                become(module, LeanActivation, activation, kernels)
                count["activations"] += 1
    loss = _rewrite_loss(_inner(model), kernels, left)
    return Rewritten(count["norms"], count["gates"], count["activations"], loss, tuple(left))


def _own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but those of a side network, from the outside in."""
    beside = {id(part) for side in model.modules() if isinstance(side, SideNetwork) for part in side.modules()}
    yield from (module for module in model.modules() if id(module) not in beside)


def _is_bare(module: nn.Module) -> bool:
    """Neither children nor tensors: an activation, or dropout and the like."""
    is_empty = not list(module.children()) and not list(module.parameters()) and not list(module.buffers())
    return is_empty and not isinstance(module, (nn.Dropout, nn.Identity))


def _rewrite_loss(model: Any, kernels: Kernels, left: dict[str, None]) -> bool:
    if not isinstance(model, PreTrainedModel):
        left[f"{type(model).__name__} is no model of transformers"] = None
        return False
    found = lean_head.find_loss(model)
    if isinstance(found, str):
        left[found] = None
        return False
    lean_head.become(model, *found, kernels)
    return True


def _tensors(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Every parameter and buffer under each of its names, and whether it trains."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (id(tensor), tensor.requires_grad) for name, tensor in named}


def _require_same(before: dict[str, tuple[int, bool]], after: dict[str, tuple[int, bool]]) -> None:
    """Raises: CheckError where the pass did not keep its word."""
    if before != after:
        differ = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        found = f"it changed {len(differ)} tensors, first {differ[0]}"
        raise CheckError("lean", found, expected="the same parameters and buffers")
