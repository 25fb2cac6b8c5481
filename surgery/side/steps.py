"""What a step of the recurrence computes, and what its backward keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-6


def exact(x: Tensor) -> torch.autocast:
    """No autocast: what is cast here, is cast by name."""
    return torch.autocast(x.device.type, enabled=False)


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """bf16 states are multiplied as they are where a device has fast products of them, others as the weights are.

    In fp16 large states would overflow, and the gradients of a mean over many tokens vanish.
    """
    return x.dtype if x.dtype == torch.bfloat16 and x.device.type != "cpu" else weight.dtype


class ReadLayer(torch.autograd.Function):
    """rms_norm(x) W^T of a layer's output, of which backward keeps x itself, in the backbone's dtype, and no copy.

    Shapes: x_nd, weight_gd (the norm's scale is folded into it) -> (n, g).
    """

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, weight_gd: Tensor) -> Tensor:
        with exact(x_nd):
            wide = torch.float64 if weight_gd.dtype == torch.float64 else torch.float32
            square_n1 = torch.linalg.vector_norm(x_nd, dim=-1, keepdim=True, dtype=wide).square_()
            rstd_n1 = square_n1.div_(x_nd.shape[-1]).add_(EPSILON).rsqrt_()
            dtype = _product_dtype(x_nd, weight_gd)
            result = x_nd.to(dtype).mm(weight_gd.to(dtype).t()).to(weight_gd.dtype).mul_(rstd_n1)
        ctx.save_for_backward(x_nd, rstd_n1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ng: Tensor) -> tuple[None, Tensor]:
        x_nd, rstd_n1 = ctx.saved_tensors
        with exact(x_nd):
            dtype = _product_dtype(x_nd, dy_ng)
            scaled_ng = (dy_ng * rstd_n1).to(dtype)
            return None, scaled_ng.t().mm(x_nd.to(dtype)).to(dy_ng.dtype)


class GruStep(torch.autograd.Function):
    """One step of torch.nn.GRU. `gates_ng`, W_ih x without biases, is overwritten by the step's gates.

    Shapes: gates_ng (n, 3 h), h_nh, weight_gh (3 h, h), biases (3 h,) -> (n, h). Kept for backward: 5 h a token.
    """

    @staticmethod
    def forward(
        ctx: Any, gates_ng: Tensor, h_nh: Tensor, weight_gh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> Tensor:
        width = h_nh.shape[-1]
        both, last = slice(0, 2 * width), slice(2 * width, None)
        with exact(h_nh):
            rz = gates_ng[:, both].add_(bias_ih[both] + bias_hh[both]).addmm_(h_nh, weight_gh[both].t()).sigmoid_()
            inner = torch.addmm(bias_hh[last], h_nh, weight_gh[last].t())
            new = gates_ng[:, last].add_(bias_ih[last]).addcmul_(rz[:, :width], inner).tanh_()
            result = torch.lerp(new, h_nh, rz[:, width:])
        ctx.save_for_backward(gates_ng, h_nh, inner, weight_gh)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_nh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        gates_ng, h_nh, inner, weight_gh = ctx.saved_tensors
        width = h_nh.shape[-1]
        both = slice(0, 2 * width)
        r, z, new = gates_ng.chunk(3, dim=-1)
        with exact(h_nh):
            d_ng = torch.empty_like(gates_ng)
            dr, dz, dnew = d_ng.chunk(3, dim=-1)
            torch.mul(dh_nh, (h_nh - new).mul_(z).mul_(1 - z), out=dz)
            torch.mul(dh_nh, (1 - z).mul_(1 - new.square()), out=dnew)
            torch.mul(dnew, (1 - r).mul_(r).mul_(inner), out=dr)
            dinner = dnew * r
            before = (dh_nh * z).addmm_(d_ng[:, both], weight_gh[both]).addmm_(dinner, weight_gh[2 * width :])
            dweight = torch.cat([d_ng[:, both].t().mm(h_nh), dinner.t().mm(h_nh)])
            dbias = d_ng.sum(0)
            dbias_hh = torch.cat([dbias[both], dinner.sum(0)])
        return d_ng, before, dweight, dbias, dbias_hh


class LstmStep(torch.autograd.Function):
    """One step of torch.nn.LSTM: (h, c). `gates_ng` (n, 4 h) is overwritten. Kept for backward: 7 h a token."""

    @staticmethod
    def forward(
        ctx: Any, gates_ng: Tensor, h_nh: Tensor, c_nh: Tensor, weight_gh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = h_nh.shape[-1]
        with exact(h_nh):
            gates_ng.add_(bias_ih + bias_hh).addmm_(h_nh, weight_gh.t())
            gates_ng[:, : 2 * width].sigmoid_()
            gates_ng[:, 2 * width : 3 * width].tanh_()
            gates_ng[:, 3 * width :].sigmoid_()
            i, f, new, o = gates_ng.chunk(4, dim=-1)
            cell = (f * c_nh).addcmul_(i, new)
            wave = cell.tanh()
        ctx.save_for_backward(gates_ng, h_nh, c_nh, wave, weight_gh)
        return o * wave, cell

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_nh: Tensor, dcell_nh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        gates_ng, h_nh, c_nh, wave, weight_gh = ctx.saved_tensors
        i, f, new, o = gates_ng.chunk(4, dim=-1)
        with exact(h_nh):
            dcell = dcell_nh + dh_nh * o * (1 - wave.square())
            d_ng = torch.empty_like(gates_ng)
            di, df, dnew, do = d_ng.chunk(4, dim=-1)
            torch.mul(dcell * new, i * (1 - i), out=di)
            torch.mul(dcell * c_nh, f * (1 - f), out=df)
            torch.mul(dcell * i, 1 - new.square(), out=dnew)
            torch.mul(dh_nh * wave, o * (1 - o), out=do)
            dbias = d_ng.sum(0)
            return d_ng, d_ng.mm(weight_gh), dcell * f, d_ng.t().mm(h_nh), dbias, dbias.clone()


class RnnStep(torch.autograd.Function):
    """One step of torch.nn.RNN: tanh(gates + W_hh h + b). `gates_ng` (n, h) is overwritten by the result."""

    @staticmethod
    def forward(
        ctx: Any, gates_ng: Tensor, h_nh: Tensor, weight_gh: Tensor, bias_ih: Tensor, bias_hh: Tensor
    ) -> Tensor:
        with exact(h_nh):
            result = gates_ng.detach().add_(bias_ih + bias_hh).addmm_(h_nh, weight_gh.t()).tanh_()
        ctx.save_for_backward(result, h_nh, weight_gh)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_nh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        result, h_nh, weight_gh = ctx.saved_tensors
        with exact(h_nh):
            d_ng = dh_nh * (1 - result.square())
            dbias = d_ng.sum(0)
            return d_ng, d_ng.mm(weight_gh), d_ng.t().mm(h_nh), dbias, dbias.clone()


def plain_step(
    cell: str, gates_ng: Tensor, h_nh: Tensor, c_nh: Tensor, weight_gh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """The same steps for torch.compile, which cannot trace what is overwritten, and decides itself what to keep.

    Shapes as theirs; returns (h, c), the latter as it was where the cell is no LSTM.
    """
    gates_ng = gates_ng + bias_ih
    inner_ng = torch.addmm(bias_hh, h_nh, weight_gh.t())
    if cell == "rnn":
        return (gates_ng + inner_ng).tanh(), c_nh
    if cell == "gru":
        (r, z, new), (inner_r, inner_z, inner) = gates_ng.chunk(3, dim=-1), inner_ng.chunk(3, dim=-1)
        new = (new + (r + inner_r).sigmoid() * inner).tanh()
        return torch.lerp(new, h_nh, (z + inner_z).sigmoid()), c_nh
    i, f, new, o = (gates_ng + inner_ng).chunk(4, dim=-1)
    c_nh = f.sigmoid() * c_nh + i.sigmoid() * new.tanh()
    return o.sigmoid() * c_nh.tanh(), c_nh
