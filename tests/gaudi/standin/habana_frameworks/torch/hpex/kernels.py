"""The fused kernels that optimum-habana's models call, in plain torch."""

import torch


class FusedSDPA:
    @staticmethod
    def apply(
        q, k, v, mask=None, dropout=0.0, is_causal=False, scale=None, softmax_mode="None", recompute=False, *rest
    ):
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        if is_causal:
            shape = (q.shape[-2], k.shape[-2])
            scores = scores + torch.full(shape, float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v


class RotaryPosEmbeddingHelperV2:
    @staticmethod
    def apply(p, cos, sin, position_ids):
        if cos.dim() == 4:
            cos, sin = cos[0, 0], sin[0, 0]
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
        half = p.shape[-1] // 2
        return p * cos + torch.cat((-p[..., half:], p[..., :half]), -1) * sin
