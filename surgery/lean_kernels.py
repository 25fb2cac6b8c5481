"""What lean modules compute with: the functions of `lean_functions`, or Liger's Triton kernels on a CUDA device.

Liger's keep the same tensors (a norm's input and one number a row, gate and up, the gradient of the hidden states) and
read and write memory fewer times. They are tried on the device, beside ours, before a model is given to them: a version
that computes something else is refused and never trains. What they do not have, ours compute on any device.

Source: Liger Kernel, arXiv 2410.10989, through its functional interface.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import UnsupportedError, shorten
from surgery.lean_functions import ACTIVATIONS, IGNORED, Activation, Logits, Norm, gate, linear_cross_entropy, rms_norm

LIGER = "liger_kernel"
TOLERANCE = 0.02  # of the largest value, in bf16, in which Liger rounds in other places
SIZES = (16, 64)  # rows and width of what is tried


@dataclass(frozen=True)
class Kernels:
    """norm: (x, weight, Norm); gate: (gates, ups, Activation); loss: as `linear_cross_entropy`."""

    name: str
    norm: Callable[[Tensor, Tensor, Norm], Tensor]
    gate: Callable[[Tensor, Tensor, Activation], Tensor]
    loss: Callable[..., Tensor]


OURS = Kernels("torch", rms_norm, gate, linear_cross_entropy)


def choose_kernels(device: str) -> Kernels:
    """Liger's where it is installed and the device is a CUDA card, else ours. Raises: UnsupportedError."""
    if device != "cuda" or importlib.util.find_spec(LIGER) is None:
        return OURS
    kernels = liger_kernels()
    require_alike(kernels, device)
    return kernels


def liger_kernels() -> Kernels:
    """Liger's functions where they compute what is asked for, else ours."""
    from liger_kernel.transformers import functional as liger

    casting = {("first", 0.0): "llama", ("last", 1.0): "gemma"}
    gates = {"silu": liger.liger_swiglu, "gelu_tanh": liger.liger_geglu, "gelu_new": liger.liger_geglu}

    def norm(x: Tensor, weight: Tensor, how: Norm) -> Tensor:
        mode = casting.get((how.casts, how.offset))
        if mode is None or x.dtype != weight.dtype:
            return rms_norm(x, weight, how)
        result: Tensor = liger.liger_rms_norm(x, weight, how.eps, how.offset, mode, in_place=False)
        return result

    def gated(one: Tensor, other: Tensor, activation: Activation) -> Tensor:
        function = gates.get(activation.name)
        result: Tensor = function(one, other) if function else gate(one, other, activation)
        return result

    def loss(
        hidden_nh: Tensor,
        weight_vh: Tensor,
        bias_v: Tensor | None,
        labels_n: Tensor,
        *,
        items: Tensor | int | None = None,
        logits: Logits | None = None,
    ) -> Tensor:
        logits = logits or Logits()
        trains = weight_vh.requires_grad or (bias_v is not None and bias_v.requires_grad)
        if trains or logits not in (Logits(), Logits(cap=logits.cap)):
            return linear_cross_entropy(hidden_nh, weight_vh, bias_v, labels_n, items=items, logits=logits)
        reduction = "mean" if items is None else "sum"
        found: Any = liger.liger_fused_linear_cross_entropy(
            hidden_nh, weight_vh, labels_n, bias_v, ignore_index=IGNORED, reduction=reduction, softcap=logits.cap
        )
        total: Tensor = found if isinstance(found, Tensor) else found[0]
        return total if items is None else total / items

    return Kernels("liger", norm, gated, loss)


def require_alike(kernels: Kernels, device: str) -> None:
    """Outputs and gradients of kernels are those of ours, on a few rows there. Raises: UnsupportedError."""
    rows, width = SIZES
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        weight = torch.randn(width, device=device, dtype=torch.bfloat16)
        head = torch.randn(2 * width, width, device=device, dtype=torch.bfloat16)
        labels = torch.randint(2 * width, (rows,), device=device)
        labels[:3] = IGNORED
        tried: dict[str, Callable[[Kernels, Tensor], Tensor]] = {
            "RMS norm": lambda k, x: k.norm(x, weight, Norm("first", 0.0, 1e-6)),
            "RMS norm of Gemma": lambda k, x: k.norm(x, weight, Norm("last", 1.0, 1e-6)),
            "SwiGLU": lambda k, x: k.gate(x * 1.0, x * 0.5, ACTIVATIONS["silu"]),
            "GeGLU": lambda k, x: k.gate(x * 1.0, x * 0.5, ACTIVATIONS["gelu_tanh"]),
            "loss": lambda k, x: k.loss(x, head, None, labels),
            "loss by items": lambda k, x: k.loss(x, head, None, labels, items=7),
            "loss with a cap": lambda k, x: k.loss(x, head, None, labels, logits=Logits(cap=30.0)),
        }
        for name, run in tried.items():
            _require_one(name, run, kernels, torch.randn(rows, width, device=device, dtype=torch.bfloat16))


def _require_one(name: str, run: Callable[[Kernels, Tensor], Tensor], kernels: Kernels, x: Tensor) -> None:
    def both(which: Kernels) -> tuple[Tensor, Tensor]:
        own = x.detach().clone().requires_grad_()
        y = run(which, own)
        return y.detach(), torch.autograd.grad(y.sum(), own)[0]

    try:
        wanted, found = both(OURS), both(kernels)
    except Exception as error:
        why = shorten(str(error), 160) or type(error).__name__
        raise _refused(f"its {name} fails here ({type(error).__name__}: {why})") from error
    for ours, theirs in zip(wanted, found, strict=True):
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > TOLERANCE * ours.abs().max():
            raise _refused(f"its {name} computes something else")


def _refused(found: str) -> UnsupportedError:
    fix = "Install another version, or remove it: lean blocks then compute with this package's functions"
    return UnsupportedError("lean, liger-kernel", found, expected="the values of the plain functions", fix=fix)
