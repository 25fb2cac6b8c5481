"""What a CUDA card runs in place of the CPU's kernels, for a dry run that has to save the same tensors.

Attention: the choice of kernel is that of PyTorch 2.9 to 2.13's scaled_dot_product_attention on cards of compute
capability 8 and 9 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). Nothing here was compared with a card.

Shape suffixes: b sequences, h heads, t tokens, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

FLASH_WIDTH = 256  # the widest head that the flash kernel takes
_aten = torch.ops.aten


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Attention and dropout as on a card. Private to this process's dry runs: nothing else runs meanwhile."""
    before = functional.scaled_dot_product_attention, functional.dropout
    functional.scaled_dot_product_attention, functional.dropout = _cuda_attention, _cuda_dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = before


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: FBT001, FBT002, ARG001  torch's signature
    """Keeps a mask of one byte for each value; on the CPU it has the values' own dtype."""
    result: Tensor = torch.native_dropout(input, p, training)[0] if training and p else input
    return result


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002  torch's signature
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """scaled_dot_product_attention with the kernel that PyTorch picks on a card of compute capability 8 or 9.

    Flash: 16-bit values, no mask; keeps no scores. Memory-efficient: fp32, or with a mask, which becomes an addend of
    the values' dtype; keeps none either. Math, which keeps them: where neither takes the heads as they are.

    Shapes: query (b, h, t, d); key and value (b, h or fewer, t, d).
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and is_half and query.shape[-1] == value.shape[-1] <= FLASH_WIDTH:
        pad = -query.shape[-1] % 8
        q, k, v = (functional.pad(x, (0, pad)) if pad else x for x in (query, key, value))
        flash: Tensor = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]  # noqa: SLF001
        return flash[..., : query.shape[-1]]
    if query.shape[-3] == key.shape[-3]:
        bias = None if attn_mask is None else _efficient_bias(attn_mask, query, key)
        efficient: Tensor = _aten._scaled_dot_product_efficient_attention(  # noqa: SLF001
            query,
            key,
            value,
            bias,
            True,  # noqa: FBT003  compute_log_sumexp
            dropout_p,
            is_causal,
            scale=scale,
        )[0]
        return efficient
    math: Tensor = _aten._scaled_dot_product_attention_math(  # noqa: SLF001
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return math


def _efficient_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernel takes it: in the values' dtype, for all heads, its rows at multiples of 16 values."""
    mask = mask.to(query.dtype)
    pad = -mask.shape[-1] % 16
    if pad:
        mask = functional.pad(mask, (0, pad))[..., : key.shape[-2]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
