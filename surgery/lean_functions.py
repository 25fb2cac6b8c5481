"""Norms, activations, gates and the loss of a language model, each of which keeps for backward the least it needs.

Around a frozen weight autograd keeps what single operators ask for: of an RMS norm in 16 bits copies in fp32, of a gate
three tensors of the intermediate width, of a loss every logit several times. Here each is one function whose backward
computes again what is cheap: a norm keeps its input and one number a row, a gate its two inputs, an activation its
input, the loss the gradient of its hidden states, which has their size.

The forward gives the plain forward's bits. So does the backward of norms and of gates with SiLU, GELU and ReLU; where a
class writes its activation out as a formula, the backward takes torch's own derivative, which differs in rounding.

Shape suffixes: n all leading axes flattened, h hidden size, v vocabulary.

Sources: RMSNorm, arXiv 1910.07467; gated units, arXiv 2002.05202; a loss in chunks with its gradient made in forward as
in arXiv 2410.10989, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

HALF = (torch.float16, torch.bfloat16)
IGNORED = -100  # a label that does not count, as in transformers and torch
CHUNK_BYTES = 1 << 24  # of logits in fp32, of which some copies live at once; what is larger is mapped anew each time
CHUNK_ROWS = 256  # at least, whatever they take: fewer rows read the head's weight too often for what they compute
_aten = torch.ops.aten

# --- RMS norms


@dataclass(frozen=True)
class Norm:
    """How a class computes an RMS norm.

    casts: `first` to the input's dtype and then the weight (Llama), `last` (OLMo 2, Gemma), `weight`: to the weight's
    dtype where that has 16 bits (T5). offset: what is added to the weight (Gemma: 1).
    """

    casts: str
    offset: float
    eps: float


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """The norm over the last axis. Keeps x and one number a row; x may be of any shape (.., h)."""
    result: Tensor = _RmsNorm.apply(x, weight, norm)  # type: ignore[no-untyped-call]
    return result


def _normalized(x: Tensor, root: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """What the weight multiplies, in its dtype."""
    if norm.casts == "weight":
        scaled = x * root
        return scaled.to(weight.dtype) if weight.dtype in HALF else scaled
    scaled = x.to(torch.float32) * root
    return scaled.to(x.dtype) if norm.casts == "first" else scaled


def _factor(weight: Tensor, norm: Norm) -> Tensor:
    return weight if not norm.offset else norm.offset + weight.to(torch.float32)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        squares = x.to(torch.float32).pow(2)
        root = torch.rsqrt(squares.mean(-1, keepdim=True) + norm.eps)
        del squares
        ctx.save_for_backward(x, weight, root)
        ctx.norm = norm
        y = _times(_normalized(x, root, weight, norm), _factor(weight, norm))
        return y.to(x.dtype) if norm.casts == "last" else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        norm: Norm = ctx.norm
        factor = _factor(weight, norm)
        normal = _normalized(x, root, weight, norm) if ctx.needs_input_grad[1] else None
        dy = dy.to(torch.promote_types(factor.dtype, torch.float32)) if norm.casts == "last" else dy
        dweight = (dy * normal).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if normal is not None else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dnormal = dy * factor
        if norm.casts == "weight":
            return _t5_gradient(dnormal, x, root, weight), dweight, None
        if norm.casts == "first":
            dnormal = dnormal.to(x.dtype)
        return _row_gradient(dnormal.to(torch.float32), x.to(torch.float32), root).to(x.dtype), dweight, None


def _times(fresh: Tensor, factor: Tensor) -> Tensor:
    """fresh * factor, in the memory of `fresh`, which nobody else holds, where its dtype allows."""
    if torch.promote_types(fresh.dtype, factor.dtype) == fresh.dtype:
        return fresh.mul_(factor)
    return fresh * factor


def _variance_gradient(dnormal: Tensor, x: Tensor, root: Tensor) -> Tensor:
    """(.., 1): twice the gradient of the mean square, divided by the width, in the order in which autograd rounds."""
    droot = (dnormal * x).sum(-1, keepdim=True)
    return (-0.5 * droot * root.pow(3)) / x.shape[-1] * 2


def _row_gradient(dnormal: Tensor, x: Tensor, root: Tensor) -> Tensor:
    """dnormal (.., h), which is overwritten, x (.., h), root (.., 1), all fp32 -> the input's gradient."""
    along = _variance_gradient(dnormal, x, root)
    return dnormal.mul_(root).add_(x * along)


def _t5_gradient(dnormal: Tensor, x: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    """T5 multiplies x itself, so that both parts of its gradient are rounded to its dtype."""
    if weight.dtype in HALF:
        dnormal = dnormal.to(weight.dtype)
    dnormal = dnormal.to(torch.promote_types(x.dtype, torch.float32))
    droot = (dnormal * x).sum(-1, keepdim=True).to(root.dtype)
    dsquare = (-0.5 * droot * root.pow(3)) / x.shape[-1]
    return (dnormal * root).to(x.dtype) + (dsquare * (2.0 * x.to(torch.float32))).to(x.dtype)


# --- activations and gates


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative: backward(dy, x) is dy times that at x.

    keeps_input: autograd of the plain forward keeps x and nothing else, so that alone it need not be rewritten.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    keeps_input: bool


def _new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _tanh_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    result: Tensor = _aten.gelu_backward(dy, x, approximate="tanh")
    return result


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    result: Tensor = _aten.silu_backward(dy, 1.702 * x)  # x sigmoid(c x) is silu(c x) / c
    return result


def _relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    result: Tensor = _aten.threshold_backward(dy, x, 0)
    return result


def _squared_relu(x: Tensor) -> Tensor:
    return torch.square(functional.relu(x))


def _squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return dy * (2.0 * functional.relu(x))


ACTIVATIONS: Mapping[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("silu", functional.silu, _aten.silu_backward, keeps_input=True),
        Activation("gelu", functional.gelu, _aten.gelu_backward, keeps_input=True),
        Activation("gelu_tanh", _tanh_gelu, _tanh_gelu_backward, keeps_input=True),
        Activation("gelu_new", _new_gelu, _tanh_gelu_backward, keeps_input=False),
        Activation("gelu_fast", _fast_gelu, _tanh_gelu_backward, keeps_input=False),
        Activation("quick_gelu", _quick_gelu, _quick_gelu_backward, keeps_input=False),
        Activation("relu", functional.relu, _relu_backward, keeps_input=True),
        Activation("relu2", _squared_relu, _squared_relu_backward, keeps_input=False),
    )
}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """activation(x), which keeps x."""
    result: Tensor = _Activate.apply(x, activation)  # type: ignore[no-untyped-call]
    return result


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.activation.backward(dy, x), None


def gate(gates: Tensor, ups: Tensor, activation: Activation) -> Tensor:
    """activation(gates) * ups, which keeps the two. Shapes: all (.., intermediate)."""
    result: Tensor = _Gate.apply(gates, ups, activation)  # type: ignore[no-untyped-call]
    return result


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, ups: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gates, ups)
        ctx.activation = activation
        return _times(activation.forward(gates), ups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gates, ups = ctx.saved_tensors
        activation: Activation = ctx.activation
        dups = dgates = None
        if ctx.needs_input_grad[1]:
            dups = _times(activation.forward(gates), dy).to(ups.dtype)
        if ctx.needs_input_grad[0]:
            dgates = activation.backward((dy * ups).to(gates.dtype), gates)
        return dgates, dups, None


# --- the loss


@dataclass(frozen=True)
class Logits:
    """What a model does to the output of its head: `cap`: cap tanh(z / cap); else z / divisor, z * factor.

    In the order and the dtype in which transformers' classes do it.
    """

    cap: float | None = None
    divisor: float | None = None
    factor: float | None = None

    def forward(self, z: Tensor) -> Tensor:
        """z (n, v) -> the logits; z stays as it is."""
        if self.cap is not None:
            return torch.tanh(z / self.cap) * self.cap
        if self.divisor is not None:
            return z / self.divisor
        return z if self.factor is None else z * self.factor

    def backward(self, dlogits: Tensor, z: Tensor) -> Tensor:
        """dlogits (n, v), which may be overwritten -> the gradient of z."""
        if self.cap is not None:
            bent: Tensor = _aten.tanh_backward(dlogits.mul_(self.cap), torch.tanh(z / self.cap))
            return bent.div_(self.cap)
        if self.divisor is not None:
            return dlogits.div_(self.divisor)
        return dlogits if self.factor is None else dlogits.mul_(self.factor)


def shifted(labels: Tensor) -> Tensor:
    """(batch, tokens) -> (n,): at each token the label of the next, IGNORED at the last, as transformers does it."""
    return functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)


def linear_cross_entropy(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    bias_v: Tensor | None,
    labels_n: Tensor,
    *,
    items: Tensor | int | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """The mean cross-entropy (of `items` labels, where given) of a linear layer, whose logits are never all there.

    Labels may be IGNORED. Keeps the gradient of the hidden states, (n, h), made in forward, and those of the weight and
    bias where they train. Logits have the dtype of autocast or the hidden states', their softmax fp32, as is the loss.
    """
    kind = hidden_nh.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_nh.dtype
    how = _How(logits or Logits(), dtype)
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_nh, weight_vh, bias_v, labels_n.to(hidden_nh.device), items, how
    )
    return result


@dataclass(frozen=True)
class _How:
    """dtype: of the product that gives the logits."""

    logits: Logits
    dtype: torch.dtype


@dataclass(frozen=True)
class _Labels:
    """labels_n: 0 where there is none; counts_n: whether there is; scale_n: what a label counts in a gradient."""

    labels_n: Tensor
    counts_n: Tensor
    scale_n: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nh: Tensor,
        weight_vh: Tensor,
        bias_v: Tensor | None,
        labels_n: Tensor,
        items: Tensor | int | None,
        how: _How,
    ) -> Tensor:
        device, dtype = hidden_nh.device, how.dtype
        counts = labels_n != IGNORED
        divisor = counts.sum() if items is None else items
        divisor = divisor.to(device) if isinstance(divisor, Tensor) else divisor
        each = torch.ones((), dtype=torch.float32, device=device) / divisor
        # In fp16 a gradient divided by thousands of labels would vanish: it is divided in backward.
        is_late = dtype == torch.float16
        labels = _Labels(labels_n.clamp(min=0), counts, counts.to(torch.float32) * (1.0 if is_late else each))
        with torch.autocast(device.type, enabled=False):
            head = (weight_vh.to(dtype), None if bias_v is None else bias_v.to(dtype))
            total, gradients = _in_chunks(hidden_nh.to(dtype), head, labels, how, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients, each if is_late else None)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_nh, weight_vh, bias_v)]
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, each = ctx.saved_tensors
        factor = dloss if each is None else dloss * each
        scaled = [
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def chunks_of(rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of nearly one size: so many bytes of logits in fp32 at most, or CHUNK_ROWS rows."""
    most = max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary))
    count = max(1, math.ceil(rows / most))
    size = math.ceil(rows / count)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _in_chunks(
    hidden_nh: Tensor, head: tuple[Tensor, Tensor | None], labels: _Labels, how: _How, wants: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The summed loss, and the gradients of hidden states, weight and bias where they are wanted."""
    weight_vh, bias_v = head
    total = torch.zeros((), dtype=torch.float32, device=hidden_nh.device)
    dhidden = torch.empty_like(hidden_nh) if wants[0] else None
    wide = torch.promote_types(weight_vh.dtype, torch.float32)  # sums over chunks
    dweight = torch.zeros_like(weight_vh, dtype=wide) if wants[1] else None
    dbias = torch.zeros_like(bias_v, dtype=wide) if bias_v is not None and wants[2] else None
    for start, stop in chunks_of(hidden_nh.shape[0], weight_vh.shape[0]):
        part_ch = hidden_nh[start:stop]
        z_cv = [functional.linear(part_ch, weight_vh, bias_v)]  # handed over, so that it goes when it is done with
        loss, dz_cv = _one_chunk(z_cv, labels, slice(start, stop), how.logits, wants=any(wants))
        total += loss
        if dz_cv is None:
            continue
        if dhidden is not None:
            torch.mm(dz_cv, weight_vh, out=dhidden[start:stop])
        if dweight is not None:
            dweight += dz_cv.t() @ part_ch
        if dbias is not None:
            dbias += dz_cv.sum(0, dtype=wide)
    return total, [dhidden, dweight, dbias]


def _one_chunk(
    given: list[Tensor], labels: _Labels, rows: slice, logits: Logits, *, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows of the head's output, and the gradient of that output where it is wanted."""
    z_cv = given.pop()
    dtype, kept = z_cv.dtype, z_cv if logits.cap is not None else z_cv.new_empty(0)
    labels_c1 = labels.labels_n[rows].unsqueeze(1)
    log_cv = torch.log_softmax(logits.forward(z_cv).to(torch.float32), -1)
    del z_cv
    loss = -(log_cv.gather(1, labels_c1).squeeze(1) * labels.counts_n[rows]).sum()
    if not wants:
        return loss, None
    dlog_cv = torch.zeros_like(log_cv).scatter_(1, labels_c1, -labels.scale_n[rows].unsqueeze(1))
    dlogits_cv = _aten._log_softmax_backward_data(dlog_cv, log_cv, 1, torch.float32)  # noqa: SLF001  autograd's own
    del log_cv, dlog_cv
    return loss, logits.backward(dlogits_cv.to(dtype), kept)
