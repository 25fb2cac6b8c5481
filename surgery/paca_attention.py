"""`nn.MultiheadAttention`, whose packed projections have columns that train.

Its forward reads the weights of both projections and calls neither as a layer. So the class is replaced by one that
computes the same from the same operators in the same order, bit for bit on the CPU, with the projections as layers.

Shape suffixes: l queries, s keys, b sequences, e width, h heads.
Source: Attention Is All You Need, arXiv 1706.03762, section 3.2; torch.nn.MultiheadAttention's documentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from surgery.paca_layers import PacaLayer, PacaLinear, input_gradient, without_autocast


class _PackedFunction(torch.autograd.Function):
    """Some rows of a packed projection: y = x W[rows]^T + b[rows]; backward keeps `kept` (.., r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta_or: Tensor, kept: Tensor, layer: PacaAttention, rows: slice) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.layer, ctx.rows, ctx.dtypes = layer, rows, (x.dtype, delta_or.dtype)
        ctx.weight = None if layer.paca_is_gathered else layer.in_proj_weight.detach()[rows]
        return layer.frozen_rows(x, rows)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        layer: PacaAttention = ctx.layer
        x_dtype, delta_dtype = ctx.dtypes
        dx = ddelta_or = None
        dy = layer.laid_out(dy)
        if ctx.needs_input_grad[0]:
            if ctx.weight is None:
                layer.refresh()
            weight = layer.in_proj_weight.detach()[ctx.rows] if ctx.weight is None else ctx.weight
            dx = input_gradient(dy, weight, 1).to(x_dtype)
        if ctx.needs_input_grad[1]:
            (kept,) = ctx.saved_tensors
            ddelta_or = layer.column_gradient(kept, dy, delta_dtype)
        return dx, ddelta_or, None, None, None


class OpenAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that runs its projections as layers."""

    def frozen_rows(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection, as they stand."""
        packed: Tensor | None = self.in_proj_bias
        bias = None if packed is None else packed[rows]
        return functional.linear(x, self.in_proj_weight[rows], bias)

    def project(self, x: Tensor, fed: Tensor, rows: slice) -> Tensor:  # noqa: ARG002  opened, it keeps channels of `fed`
        """Some rows of the packed projection of x, which is `fed` with the length first."""
        return self.frozen_rows(x, rows)

    def freshen_all(self) -> None:
        """Let both projections hold their trained columns."""
        for part in (self, self.out_proj):
            if isinstance(part, PacaLayer):
                part.freshen()

    def trains(self) -> bool:
        """Whether a gradient of a projection's columns is asked for."""
        parts = [part for part in (self, self.out_proj) if isinstance(part, PacaLayer)]
        return torch.is_grad_enabled() and any(part.paca_delta.requires_grad for part in parts)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002  torch's signature
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's, masks and all."""
        settings = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return cast("tuple[Tensor, Tensor | None]", _attend_eagerly(self, query, key, value, *settings))
        self.freshen_all()
        if not self.trains():
            return nn.MultiheadAttention.forward(self, query, key, value, *settings)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        padding = key_padding_mask if is_batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q_lbe, k_sbe, v_sbe = self._projected(query, key, value, is_batched=is_batched)
        # a causal mask is left to the kernel where nothing else masks and no weights are wanted
        is_causal = is_causal and padding is None and not need_weights
        mask = None if is_causal else self._mask(attn_mask, padding, q_lbe, k_sbe)
        run = self._weighted if need_weights else self._fused
        output, weights = run(q_lbe, k_sbe, v_sbe, mask, is_causal)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, *, is_batched: bool) -> list[Tensor]:
        """q (l, b, e), k and v (s, b, e), from as few products as torch takes: equal inputs are projected at once."""
        width: int = self.embed_dim
        inputs: tuple[tuple[Tensor, int, int], ...]
        placed: dict[int, Tensor] = {}
        for fed in (query, key, value):
            batched = fed if is_batched else fed.unsqueeze(1)
            placed[id(fed)] = batched.transpose(0, 1) if is_batched and self.batch_first else batched
        if key is not value:
            inputs = ((query, 0, 1), (key, 1, 2), (value, 2, 3))
        else:
            inputs = ((query, 0, 3),) if query is key else ((query, 0, 1), (key, 1, 3))
        result: list[Tensor] = []
        for fed, begin, end in inputs:
            rows = slice(begin * width, end * width)
            packed = self.project(placed[id(fed)], fed, rows)
            parts = packed.reshape(*packed.shape[:-1], end - begin, width).movedim(-2, 0).contiguous()
            result += parts.unbind(0)
        return result

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q_lbe: Tensor, k_sbe: Tensor) -> Tensor | None:
        """What is added to the scores: (1 or b x h, l or 1, s)."""
        batch, dtype = q_lbe.shape[1], q_lbe.dtype
        mask = None if attn_mask is None else _addend(attn_mask, dtype)
        mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
        if padding is None:
            return mask
        added = _addend(padding, dtype).view(batch, 1, 1, -1).expand(-1, self.num_heads, -1, -1)
        added = added.reshape(batch * self.num_heads, 1, k_sbe.shape[0])
        return added if mask is None else mask + added

    def _heads(self, x_lbe: Tensor) -> Tensor:
        """(b x h, l, e / h)."""
        length, batch, _ = x_lbe.shape
        return x_lbe.reshape(length, batch * self.num_heads, self.head_dim).transpose(0, 1)

    def _weighted(
        self, q_lbe: Tensor, k_sbe: Tensor, v_sbe: Tensor, mask: Tensor | None, _is_causal: object
    ) -> tuple[Tensor, Tensor | None]:
        """With the weights, which are (b, h, l, s)."""
        length, batch, width = q_lbe.shape
        q, k, v = map(self._heads, (q_lbe, k_sbe, v_sbe))
        scaled, k = q * math.sqrt(1.0 / float(self.head_dim)), k.transpose(-2, -1)
        scores = torch.bmm(scaled, k) if mask is None else torch.baddbmm(mask, scaled, k)
        weights = functional.dropout(scores.softmax(dim=-1), self.dropout, training=self.training)
        output = self.out_proj(torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, width))
        return output.view(length, batch, width), weights.view(batch, self.num_heads, length, -1)

    def _fused(
        self,
        q_lbe: Tensor,
        k_sbe: Tensor,
        v_sbe: Tensor,
        mask: Tensor | None,
        is_causal: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor | None]:
        """By one operator, without the weights."""
        length, batch, width = q_lbe.shape
        parts = (batch, self.num_heads, -1, self.head_dim)
        q, k, v = (self._heads(x).reshape(parts) for x in (q_lbe, k_sbe, v_sbe))
        if mask is not None:
            is_one = mask.shape[0] == 1
            mask = mask.unsqueeze(0) if is_one else mask.view(batch, self.num_heads, -1, k_sbe.shape[0])
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = self.out_proj(mixed.permute(2, 0, 1, 3).reshape(length * batch, width))
        return output.view(length, batch, width), None


def _addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, True where nothing is seen, as what is added to scores; others are that already."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_eagerly(layer: OpenAttention, *args: Any) -> Any:
    return layer.forward(*args)


class _SeenAttention(OpenAttention):
    """Attention as it is, which calls its output projection as a layer, so that hooks on that see its inputs."""

    def trains(self) -> bool:
        return True


@contextmanager
def calling_projections(model: nn.Module, watched: Sequence[nn.Module]) -> Iterator[None]:
    """Have torch's own attention call its output projection where that is among `watched`."""
    ids = {id(module) for module in watched}
    mine = [m for m in model.modules() if type(m) is nn.MultiheadAttention and id(m.out_proj) in ids]
    try:
        for module in mine:
            module.__class__ = _SeenAttention
        yield
    finally:
        for module in mine:
            module.__class__ = nn.MultiheadAttention


class PacaAttention(PacaLayer, OpenAttention):
    """Attention the columns of whose packed projection train; `paca_delta` is (3 e, r)."""

    input_axis = 1
    plain = nn.MultiheadAttention

    @property
    def paca_weight(self) -> Any:
        return self.in_proj_weight

    def frozen_forward(self, x: Tensor) -> Tensor:
        """The packed projection."""
        return self.frozen_rows(x, slice(None))

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # torch's own signature, which OpenAttention has
        return OpenAttention.forward(self, *args, **kwargs)

    def project(self, x: Tensor, fed: Tensor, rows: slice) -> Tensor:
        kept = self.paca_gather(fed, self.paca_columns)
        kept = kept.transpose(0, 1) if self.batch_first and fed.dim() == 3 else kept  # as x has been turned
        found: Tensor = _PackedFunction.apply(x, self.paca_delta[rows], kept, self, rows)  # type: ignore[no-untyped-call]
        return found


class PacaOutProjection(PacaLinear, NonDynamicallyQuantizableLinear):
    """Attention's output projection, a subclass of `nn.Linear`, with trained columns."""

    plain = NonDynamicallyQuantizableLinear
