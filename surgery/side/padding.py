"""Tokens as rows without padding, and back; one state for each sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_of(state_btd: Tensor, mask_bt: Tensor | None, *, may_skip: bool) -> tuple[Tensor | None, Tensor | None]:
    """How padding goes without a correction: (tokens, kept), None where there is nothing to do.

    tokens (n,): the places in (b t) to compute, where shapes may depend on values: on the CPU, outside a graph.
    kept (b, t, 1): elsewhere, what a correction of all places is multiplied by.
    """
    if mask_bt is None or mask_bt.shape != state_btd.shape[:2]:  # that of a cache covers more tokens than there are
        return None, None
    if not may_skip or state_btd.device.type != "cpu" or torch.compiler.is_compiling():
        return None, (mask_bt != 0).unsqueeze(-1)
    tokens = mask_bt.flatten().nonzero().squeeze(1)
    return (tokens if len(tokens) < mask_bt.numel() else None), None


def flat(state_btd: Tensor, tokens_n: Tensor | None) -> Tensor:
    """(b, t, d) -> (n, d), outside autograd.

    On a Gaudi a copy: there a layer in eval mode adds to its input in place, which backward still needs.
    """
    state = state_btd.detach().reshape(-1, state_btd.shape[-1])
    if state.device.type == "hpu" and torch.is_grad_enabled():
        state = state.clone()
    return state if tokens_n is None else state.index_select(0, tokens_n)


def unflat(x_nd: Tensor, tokens_n: Tensor | None, shape: torch.Size) -> Tensor:
    """(n, d) -> (b, t, d), zero where nothing was read."""
    if tokens_n is not None:
        x_nd = x_nd.new_zeros(shape.numel(), x_nd.shape[-1]).index_copy(0, tokens_n, x_nd)
    return x_nd.view(*shape, -1)


def pool(state_btd: Tensor, mask_bt: Tensor | None, how: str) -> Tensor:
    """One state for each sequence, at every position, so that whichever a head picks, it gets that one.

    how: `first` or `last` token that is no padding, or the `mean` of those. Padding may be on either side.
    """
    if mask_bt is None:
        mask_bt = torch.ones(state_btd.shape[:2], dtype=torch.long, device=state_btd.device)
    mask_bt = mask_bt.to(state_btd.device)
    if how == "mean":
        weights = mask_bt.to(state_btd.dtype).unsqueeze(-1)
        pooled = (state_btd * weights).sum(1) / weights.sum(1).clamp_(min=1)
    else:
        positions = torch.arange(mask_bt.shape[1], device=mask_bt.device)
        seen = positions.masked_fill(mask_bt == 0, mask_bt.shape[1] if how == "first" else -1)
        picked = (seen.amin(1) if how == "first" else seen.amax(1)).clamp_(0, mask_bt.shape[1] - 1)
        pooled = state_btd[torch.arange(state_btd.shape[0], device=state_btd.device), picked]
    return pooled.unsqueeze(1).expand_as(state_btd)
