"""Convolutions some of whose input channels train, in place.

A column of a weight (o, i, h, w) is what it holds of one input channel: o x h x w values. Backward keeps the trained
channels of the input and nothing else; the columns' gradient is that of a convolution of those channels alone.

In a grouped convolution (a depthwise one is its extreme) an input channel reaches the outputs of its own group only,
so that the columns of a random few channels would change a few outputs and leave all others as they were: refused.

Shape suffixes: o output channels, i input channels, r trained ones, n images, h and w a kernel's sizes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.paca_layers import PacaLayer, run_paca

CHANNELS = -3  # the axis of images (n, i, height, width), and of a single one without n


class PacaConv2d(PacaLayer, nn.Conv2d):
    """`nn.Conv2d` with one group, some of whose input channels train; `paca_delta` is (o * h * w, r)."""

    input_axis = 1
    plain = nn.Conv2d

    def margins(self) -> tuple[list[int], str, tuple[int, int]]:
        """What is put around an input before the convolution (left, right, top, bottom), how, and what within it.

        The convolution itself pads with zeros, alike on both sides: other kinds, and the odd rest of `same`, come first
        and are part of autograd's graph, where they keep nothing.
        """
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            return [left, right, top, bottom], self.padding_mode, (0, 0)
        return [0, right - left, 0, bottom - top], "constant", (top, left)

    def widen(self, x: Tensor) -> Tensor:
        """The input with what is put around it; itself where nothing is."""
        margins, mode, _ = self.margins()
        return functional.pad(x, margins, mode=mode) if any(margins) else x

    def frozen_forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.margins()[2], self.dilation)

    def laid_out(self, dy: Tensor) -> Tensor:
        """As it is: convolutions are for both orders."""
        return dy

    def input_gradient(self, dy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """dy (n, o, ..) -> dx (n, i, ..) of this shape, in dy's dtype."""
        if self.is_product(dy):
            return weight.to(dy.dtype).flatten(1).t().matmul(dy.flatten(2)).reshape(shape)
        whole = (1, *shape)[-4:]
        gradient = self._gradients(dy, dy.new_empty(whole), weight.to(dy.dtype), wanted=0)
        return gradient.reshape(shape)

    def is_product(self, dy: Tensor) -> bool:
        """Whether the input's gradient is a matrix product image by image, which on the CPU is the faster way."""
        is_plain = self.kernel_size == self.stride == (1, 1) and self.margins()[2] == (0, 0)
        is_known = dy.device.type == "cpu" and dy.dtype in (torch.float32, torch.float64)
        return is_plain and is_known and dy.dim() == 4 and dy.is_contiguous()

    def column_gradient(self, kept: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """kept (n, r, ..), dy (n, o, ..) -> (o * h * w, r), after which the columns count as stale."""
        kept = self.widen(kept.to(dy.dtype))
        kept = kept if kept.dim() == 4 else kept.unsqueeze(0)
        sizes = (self.out_channels, kept.shape[1], *self.kernel_size)
        gradient = self._gradients(dy, kept, dy.new_empty(sizes), wanted=1)
        gradient_or = gradient.movedim(1, -1).reshape(-1, kept.shape[1]).to(dtype)
        self.paca_pending = True  # whatever uses this gradient, the next forward refreshes
        return gradient_or if self.paca_scale == 1.0 else gradient_or * self.paca_scale

    def _gradients(self, dy: Tensor, x: Tensor, weight: Tensor, *, wanted: int) -> Tensor:
        """The input's gradient (wanted=0), for which x gives its sizes alone, or the weight's (1), likewise."""
        dy = dy if dy.dim() == 4 else dy.unsqueeze(0)
        settings = (list(self.stride), list(self.margins()[2]), list(self.dilation), False, [0, 0], 1)
        mask = [wanted == 0, wanted == 1, False]
        found = torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, mask)
        return cast("Tensor", found[wanted])

    def forward(self, x: Tensor) -> Tensor:
        return run_paca(self, self.widen(x), x, CHANNELS)
