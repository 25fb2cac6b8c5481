"""READ's side network as an ONNX graph has it: one node of ONNX's own GRU, LSTM or RNN a recurrent layer.

The layers are the node's time, the tokens its batch. Gates are put into ONNX's order, and the norm's scale into the
weights, by nodes that read nothing but weights: onnxruntime computes them once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.side.memory import Memory
from surgery.side.network import SideNetwork
from surgery.side.recurrence import Direction, SideStack
from surgery.side.settings import NAME
from surgery.side.steps import EPSILON

_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {  # ONNX's node, its order of the gates, attributes
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "rnn": ("RNN", (0,), {}),
}


def for_graph(model: nn.Module) -> None:
    """Have an attached model's side network compute in a way that exports well. It can no longer be run."""
    side = cast("SideNetwork", model.get_submodule(NAME))
    for stack in side.stacks.values():
        stack.__class__ = GraphStack


class GraphStack(SideStack):
    """A stack whose steps are inputs of the recurrence and not yet gates."""

    def readers(self) -> list[Tensor]:
        return []

    def start(self, x_nd: Tensor) -> Tensor:
        if self.initial is None:
            return x_nd.new_zeros((x_nd.shape[0], self.settings.hidden), dtype=torch.float32)
        return _normed(x_nd).matmul((self.initial.weight * self.norm).t()) + self.initial.bias

    def read(self, x_nd: Tensor, readers: Sequence[Tensor], memory: Memory | None) -> list[Tensor]:  # noqa: ARG002
        normed = _normed(x_nd)
        if self.joiner is None or memory is None:
            return [normed]
        return [torch.cat([normed, self._joined(normed, memory)], dim=-1)]

    def _joined(self, x_nd: Tensor, memory: Memory) -> Tensor:
        """What the encoder's side states add to a step's inputs (n, w)."""
        assert self.joiner is not None  # noqa: S101  who calls knows
        states, mask = memory.states_bsh, memory.mask_bs
        assert mask is not None  # noqa: S101  graphs have it as an input
        batch = states.shape[0]
        if self.joiner.kind == "mean":
            weights = mask.to(states.dtype)
            mean_bw = (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
            tokens = x_nd.view(batch, -1, x_nd.shape[-1]).shape[1]
            return mean_bw.unsqueeze(1).expand(-1, tokens, -1).reshape(x_nd.shape[0], -1)
        query = x_nd.matmul((self.joiner.query * self.norm).t()).view(batch, -1, self.settings.hidden)
        scores = query.matmul(states.matmul(self.joiner.key.t()).transpose(1, 2)) * self.settings.hidden**-0.5
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
        found: Tensor = scores.softmax(-1).matmul(states)
        return found.reshape(x_nd.shape[0], -1)

    def forward(self, steps: Sequence[list[Tensor]], start_nh: Tensor) -> Tensor:
        x = torch.stack([step[0] for step in steps])
        for layer in range(self.settings.recurrent_layers):
            y = self._recurrence(x, layer, start_nh)  # (steps, directions, n, h)
            x = y.transpose(1, 2).flatten(2)
        if self.settings.reduce == "mean":
            return x.mean(0)
        return torch.cat([y[0 if number else -1, number] for number in range(y.shape[1])], dim=-1)

    def _recurrence(self, x: Tensor, layer: int, start_nh: Tensor) -> Tensor:
        cells = self._cells(layer)
        node, order, attributes = _NODES[self.settings.cell]
        hidden = self.settings.hidden
        weights = [[_ordered(w, order) for w in self._weights(cell, layer)] for cell in cells]
        w, r, bias_ih, bias_hh = (torch.stack(each) for each in zip(*weights, strict=True))
        start = start_nh.expand(len(cells), *start_nh.shape)
        direction = "bidirectional" if len(cells) > 1 else "forward"
        result: Tensor = torch.onnx.ops.symbolic(
            node,
            (x, w, r, torch.cat([bias_ih, bias_hh], dim=-1), None, start),
            {"hidden_size": hidden, "direction": direction, **attributes},
            dtype=torch.float32,
            shape=(x.shape[0], len(cells), x.shape[1], hidden),
        )
        return result

    def _weights(self, cell: Direction, layer: int) -> list[Tensor]:
        """Of the input (norm and joiner's mix included, in the first layer), of the state, and the biases."""
        inputs: Tensor = cell.weight_ih
        if not layer:
            inputs = inputs * self.norm
            if self.joiner is not None:
                inputs = torch.cat([inputs, self.joiner.mix], dim=-1)
        return [inputs, cell.weight_hh, cell.bias_ih, cell.bias_hh]


def _normed(x_nd: Tensor) -> Tensor:
    x_nd = x_nd.float()
    return x_nd * torch.rsqrt(x_nd.square().mean(-1, keepdim=True) + EPSILON)


def _ordered(weight: Tensor, order: Sequence[int]) -> Tensor:
    """torch's order of a step's gates -> ONNX's."""
    parts = weight.chunk(len(order))
    return torch.cat([parts[number] for number in order]) if len(order) > 1 else weight
