"""Which modules can be made lean, found by what they compute: norms, gated MLPs, activations.

There is no table of classes. A module that looks like one of the forms below (by its parameters and children) is
rebuilt a few channels wide, with random weights and all its settings, and run beside the lean form in every dtype:
only where outputs agree bit for bit, and gradients but for rounding, the class is taken. So a family, or a version of
transformers, that computes something else is left as it is, with the reason.

A module is made lean by its class, as PaCA's layers are: it stays the same object, its names, hooks and parameters too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from surgery.lean_functions import ACTIVATIONS, HALF, Activation, Norm, activate, rms_norm
from surgery.lean_kernels import OURS, Kernels

WIDTH, INNER, ROWS = 16, 24, 6  # of what is probed
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)  # fmt: skip  of inputs and of weights
ROUNDING = 16  # units in the last place that gradients may differ by, of their largest value
STYLES = (("first", 0.0), ("last", 0.0), ("last", 1.0), ("weight", 0.0))


# --- what a lean module is


class Lean(nn.Module):
    """What lean modules share. `lean_plain`: the class that the module had; `lean`: what it computes, and with what."""

    lean_plain: ClassVar[type[nn.Module]]
    lean: Any
    lean_kernels: Kernels


class LeanNorm(Lean):
    """An RMS norm that keeps its input and one number a row."""

    lean: Norm
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            plain: Tensor = self.lean_plain.forward(self, x)
            return plain
        return self.lean_kernels.norm(x, self.weight, self.lean)


class LeanActivation(Lean):
    """An activation that keeps its input."""

    lean: Activation

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            plain: Tensor = self.lean_plain.forward(self, x)
            return plain
        return activate(x, self.lean)


class _LeanGated(Lean):
    lean: Activation
    down_proj: nn.Module


class LeanGatedUp(_LeanGated):
    """down(act(gate(x)) * up(x)): Llama's MLP and most others."""

    gate_proj: nn.Module
    up_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.lean_kernels.gate(self.gate_proj(x), self.up_proj(x), self.lean))
        return result


class LeanPacked(_LeanGated):
    """The same with gate and up in one layer: Phi-3's, GLM's."""

    gate_up_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gates, ups = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(self.lean_kernels.gate(gates, ups, self.lean))
        return result


class LeanNumbered(Lean):
    """w2(act(w1(x)) * w3(x)): experts, as some versions name them."""

    lean: Activation
    w1: nn.Module
    w2: nn.Module
    w3: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w2(self.lean_kernels.gate(self.w1(x), self.w3(x), self.lean))
        return result


class LeanT5(Lean):
    """T5's gated MLP, with dropout behind the gate, and the last layer in fp32 if it is kept so."""

    lean: Activation
    wi_0: nn.Module
    wi_1: nn.Module
    wo: Any
    dropout: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(self.lean_kernels.gate(self.wi_0(x), self.wi_1(x), self.lean))
        if inner.dtype != self.wo.weight.dtype and self.wo.weight.is_floating_point():
            inner = inner.to(self.wo.weight.dtype)
        result: Tensor = self.wo(inner)
        return result


@dataclass(frozen=True)
class Form:
    """A gated MLP by its children: linear layers with their (in, out) sizes, its activation, and what else it has."""

    lean: type[Lean]
    linears: Mapping[str, tuple[int, int]]
    activation: str
    others: tuple[str, ...] = ()

    def fits(self, module: nn.Module) -> bool:
        """Whether the module's children are these, whatever they compute."""
        return {name for name, _ in module.named_children()} == {*self.linears, self.activation, *self.others}


_UP, _DOWN = (WIDTH, INNER), (INNER, WIDTH)
_NAMED = {"gate_proj": _UP, "up_proj": _UP, "down_proj": _DOWN}
_PACKED = {"gate_up_proj": (WIDTH, 2 * INNER), "down_proj": _DOWN}
FORMS = (
    Form(LeanGatedUp, _NAMED, "act_fn"),
    Form(LeanGatedUp, _NAMED, "activation_fn"),
    Form(LeanPacked, _PACKED, "activation_fn"),
    Form(LeanPacked, _PACKED, "act_fn"),
    Form(LeanNumbered, {"w1": _UP, "w2": _DOWN, "w3": _UP}, "act_fn"),
    Form(LeanT5, {"wi_0": _UP, "wi_1": _UP, "wo": _DOWN}, "act", ("dropout",)),
)


# --- to become one, and back

_classes: dict[tuple[type[nn.Module], type[Lean]], type[nn.Module]] = {}


def become(module: nn.Module, lean: type[Lean], record: Any, kernels: Kernels = OURS) -> None:
    """Make a module lean, in place."""
    plain, it = type(module), cast("Any", module)
    if (plain, lean) not in _classes:
        names = {"lean_plain": plain, "__module__": plain.__module__, "__doc__": lean.__doc__}
        _classes[plain, lean] = type(f"Lean{plain.__name__}", (lean, plain), names)
    module.__class__ = _classes[plain, lean]
    it.lean, it.lean_kernels = record, kernels


def unbecome(module: Lean) -> None:
    """The plain module again, in place."""
    plain = type(module).lean_plain
    del module.lean, module.lean_kernels
    module.__class__ = plain  # type: ignore[assignment]


# --- what a module is


@dataclass(frozen=True)
class Found:
    """What a module can become."""

    lean: type[Lean]
    record: Any


class Prober:
    """Asks each kind of module once. A kind: a class with its settings."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def _once(self, module: nn.Module, ask: Callable[[Any], Any]) -> Any:
        kind = (type(module), ask.__name__, repr(sorted(_settings(module).items(), key=lambda item: item[0])))
        if kind not in self._known:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                self._known[kind] = ask(module)
        return self._known[kind]

    def norm(self, module: nn.Module) -> Found | None:
        """Of a module that has a weight of one axis and nothing else: the RMS norm that it computes, or None."""
        found: Found | None = self._once(module, _probe_norm)
        return found

    def activation(self, module: nn.Module) -> Activation | None:
        """Of a module without parameters: the activation that it computes, or None."""
        found: Activation | None = self._once(module, _probe_activation)
        return found

    def gated(self, module: nn.Module) -> Found | None:
        """Of a module whose children are a form's: the gated MLP that it computes, or None."""
        form = next(form for form in FORMS if form.fits(module))
        inner = self.activation(module.get_submodule(form.activation))
        if inner is None:
            return None

        def ask(_module: Any) -> bool:
            return _agrees_gated(module, form, inner)

        ask.__name__ = f"{form.lean.__name__} {inner.name}"
        return Found(form.lean, inner) if self._once(module, ask) else None


def looks_like_norm(module: nn.Module) -> bool:
    """A weight of one axis, and nothing else."""
    own = dict(module.named_parameters())
    return list(own) == ["weight"] and own["weight"].dim() == 1 and not list(module.children())


def looks_gated(module: nn.Module) -> bool:
    """The children of one of the forms."""
    return any(form.fits(module) for form in FORMS)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Everything plain that a module holds beside parameters, buffers, children and torch's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or isinstance(value, (str, bool, int, float, tuple)))
    }


def stand_in(module: nn.Module, children: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> Any:
    """A module of the same class and settings with other children and parameters, in the same mode."""
    plain = type(module)
    other = plain.__new__(plain)
    nn.Module.__init__(other)
    held = vars(module)
    known = vars(nn.Module())
    vars(other).update({name: value for name, value in held.items() if name not in known or name == "training"})
    for name, child in children.items():
        other.add_module(name, child)
    for name, tensor in parameters.items():
        other.register_parameter(name, nn.Parameter(tensor))
    return other


def _rows(width: int, dtype: torch.dtype) -> Tensor:
    """Inputs large and small: some at which an epsilon decides, some of nothing."""
    scale = torch.tensor([1.0, 1e-3, 20.0, 0.0, 1.0, 5.0]).unsqueeze(1)
    return (torch.randn(ROWS, width) * scale).to(dtype).requires_grad_()


def agree(plain: Tensor, lean: Tensor, inputs: tuple[Tensor, Tensor]) -> bool:
    """Equal outputs, and gradients of equal inputs that differ by rounding only."""
    if plain.dtype != lean.dtype or not torch.equal(plain, lean):
        return False
    direction = torch.randn(plain.shape).to(plain.dtype)
    one, other = (torch.autograd.grad(y, x, direction)[0] for y, x in zip((plain, lean), inputs, strict=True))
    return nearly(one, other)


def nearly(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding of the narrowest dtype in it; norms and losses round to fp32 even in a double's model."""
    kind = one.dtype if one.dtype in HALF else torch.float32
    tolerance = ROUNDING * torch.finfo(kind).eps * float(one.detach().abs().max())
    return one.dtype == other.dtype and bool((one - other).abs().max() <= tolerance)


def _run_both(plain: Callable[[Tensor], Tensor], lean: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    x = _rows(WIDTH, dtype)
    twin = x.detach().clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    one = plain(x)
    torch.manual_seed(1)
    return agree(one, lean(twin), (x, twin))


def _probe_norm(module: nn.Module) -> Found | None:
    epsilons = {value for value in _settings(module).values() if isinstance(value, float)}
    for casts, offset in STYLES:
        for eps in epsilons:
            norm = Norm(casts, offset, eps)
            if all(_agrees_norm(module, norm, x, weight) for x, weight in DTYPES):
                return Found(LeanNorm, norm)
    return None


def _agrees_norm(module: nn.Module, norm: Norm, x: torch.dtype, weight: torch.dtype) -> bool:
    other = stand_in(module, {}, {"weight": torch.randn(WIDTH).to(weight)})
    try:
        return _run_both(other, lambda rows: rms_norm(rows, other.weight, norm), x)
    except Exception:  # noqa: BLE001  it is something else, and says so
        return False


def _probe_activation(module: Any) -> Activation | None:
    if list(module.parameters()) or list(module.buffers()) or list(module.children()):
        return None
    other = stand_in(module, {}, {})  # without hooks, which would see what is no input
    for activation in ACTIVATIONS.values():
        try:
            if all(_run_both(other, lambda x, one=activation: activate(x, one), kind) for kind, _ in DTYPES):  # type: ignore[misc]
                return activation
        except Exception:  # noqa: BLE001  whatever a foreign forward says of a stand-in's inputs: it is something else
            return None
    return None


def _agrees_gated(module: nn.Module, form: Form, activation: Activation) -> bool:
    """In its own mode and in training, where dropout shows where it stands."""
    for dtype in (torch.float32, torch.bfloat16):
        children: dict[str, nn.Module] = {
            name: nn.Linear(*sizes, dtype=dtype, device="cpu") for name, sizes in form.linears.items()
        }
        children |= {n: stand_in(module.get_submodule(n), {}, {}) for n in (form.activation, *form.others)}
        plain = stand_in(module, children, {}).train()
        lean = stand_in(module, children, {}).train()
        become(lean, form.lean, activation)
        try:
            if not _run_both(plain, lean, dtype):
                return False
        except Exception:  # noqa: BLE001  as above
            return False
    return True
