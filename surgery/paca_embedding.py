"""Embeddings some of whose rows train, in place: those of named tokens, and no others.

An embedding is a linear layer fed by one-hot vectors, and its rows are that layer's columns. Backward keeps the token
numbers, which the caller has anyway; a row's gradient is the sum of what arrives where its token stands.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from surgery.paca_layers import PacaLayer, without_autocast


class _RowsFunction(torch.autograd.Function):
    """Looks tokens up; backward keeps their numbers and nothing else."""

    @staticmethod
    def forward(ctx: Any, delta_or: Tensor, tokens: Tensor, layer: PacaEmbedding) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer, ctx.dtype = layer, delta_or.dtype
        return layer.frozen_forward(tokens)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        layer: PacaEmbedding = ctx.layer
        one_hot = tokens.unsqueeze(-1) == layer.paca_columns  # (.., r)
        return layer.column_gradient(one_hot, dy, ctx.dtype), None, None


class PacaEmbedding(PacaLayer, nn.Embedding):
    """`nn.Embedding` (weight (tokens, width)) some of whose rows train; `paca_delta` is (width, r)."""

    input_axis = 0
    plain = nn.Embedding
    paca_is_named = True

    def frozen_forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight, self.padding_idx)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: tokens (..), returns (.., width)."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return cast("Tensor", _embed_eagerly(self, tokens))
        return embed(self, tokens)


def embed(layer: PacaEmbedding, tokens: Tensor) -> Tensor:
    """The layer's forward."""
    layer.freshen()
    if not (torch.is_grad_enabled() and layer.paca_delta.requires_grad):
        return layer.frozen_forward(tokens)
    result: Tensor = _RowsFunction.apply(layer.paca_delta, tokens, layer)  # type: ignore[no-untyped-call]
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _embed_eagerly(layer: PacaEmbedding, tokens: Tensor) -> Tensor:
    return embed(layer, tokens)
