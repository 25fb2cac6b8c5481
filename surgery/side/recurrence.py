"""The side network of one stack: a recurrence over its layers, a joiner from the encoder, the projection back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from surgery.side.memory import Memory
from surgery.side.settings import GATES, SideSettings
from surgery.side.steps import EPSILON, GruStep, LstmStep, ReadLayer, RnnStep, plain_step


class Direction(nn.Module):
    """One recurrent layer in one direction, with the parameters of torch.nn.GRU, LSTM or RNN."""

    def __init__(self, cell: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.hidden = cell, hidden
        gates = GATES[cell] * hidden
        self.weight_ih = nn.Parameter(torch.empty(gates, inputs))
        self.weight_hh = nn.Parameter(torch.empty(gates, hidden))
        self.bias_ih = nn.Parameter(torch.empty(gates))
        self.bias_hh = nn.Parameter(torch.empty(gates))

    def forward(self, gates: Sequence[Tensor], start_nh: Tensor) -> list[Tensor]:
        """Gates of each step (n, g), which are overwritten -> the states after each (n, h)."""
        states: list[Tensor] = []
        h_nh, rest = start_nh, (self.weight_hh, self.bias_ih, self.bias_hh)
        c_nh = torch.zeros_like(start_nh)
        is_compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting() and torch.is_grad_enabled()
        for gates_ng in gates:
            if is_compiling:
                h_nh, c_nh = plain_step(self.cell, gates_ng, h_nh, c_nh, *rest)
            elif self.cell == "lstm":
                h_nh, c_nh = LstmStep.apply(gates_ng, h_nh, c_nh, *rest)  # type: ignore[no-untyped-call]
            else:
                h_nh = (GruStep if self.cell == "gru" else RnnStep).apply(gates_ng, h_nh, *rest)  # type: ignore[no-untyped-call]
            states.append(h_nh)
        return states


class Joiner(nn.Module):
    """Brings the encoder's side states into each step of the decoder's recurrence.

    attention: the decoder's layer asks, in the side network's width, with one head; mean: over the encoder's tokens.
    Shapes: x_nd, query_hd (with the norm's scale; none for mean), memory (b, s, w) -> (n, g), added to the gates.
    """

    def __init__(self, kind: str, width: int, memory: int, hidden: int, gates: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.empty(hidden, width))
            self.key = nn.Parameter(torch.empty(hidden, memory))
        self.mix = nn.Parameter(torch.empty(gates, memory))

    def forward(self, x_nd: Tensor, query_hd: Tensor | None, memory: Memory) -> Tensor:
        states, mask = memory.states_bsh, memory.mask_bs
        batch = states.shape[0]
        tokens = x_nd.shape[0] // batch
        if query_hd is None:
            weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
            weights = weights.to(states.dtype)
            mean_bw = torch.einsum("bs,bsw->bw", weights, states) / weights.sum(1, keepdim=True).clamp_(min=1)
            return mean_bw.matmul(self.mix.t()).repeat_interleave(tokens, dim=0)
        query = ReadLayer.apply(x_nd, query_hd).view(batch, 1, tokens, -1)  # type: ignore[no-untyped-call]
        keys, values = states.matmul(self.key.t()).unsqueeze(1), states.unsqueeze(1)
        seen = None if mask is None else mask.bool()[:, None, None, :]
        found = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return found.reshape(x_nd.shape[0], -1).matmul(self.mix.t())


class SideStack(nn.Module):
    """The side network of one stack: norm, recurrence over its layers, projection back.

    `norm` (d,) scales every layer's RMS-normed output; it is folded into the input weights. In an encoder that feeds a
    decoder there is no projection back: its states go to the decoder's joiner.
    """

    def __init__(self, settings: SideSettings, width: int, *, joiner: str, is_source: bool) -> None:
        super().__init__()
        self.settings = settings
        hidden, directions = settings.hidden, 1 + settings.bidirectional
        self.directions = nn.ModuleList()
        for layer in range(settings.recurrent_layers):
            inputs = hidden * directions if layer else width
            self.directions.extend(Direction(settings.cell, inputs, hidden) for _ in range(directions))
        self.norm = nn.Parameter(torch.empty(width))
        self.initial = nn.Linear(width, hidden) if settings.initial == "embedding" else None
        self.joiner = None
        if joiner != "none":
            gates = GATES[settings.cell] * hidden
            self.joiner = Joiner(joiner, width, hidden * directions, hidden, gates)
        self.output = None if is_source else nn.Linear(hidden * directions, width)
        self.output_norm = nn.Parameter(torch.empty(width)) if settings.output_norm and not is_source else None

    def readers(self) -> list[Tensor]:
        """What multiplies a layer's output, with the norm's scale: each direction's weights, the joiner's query."""
        weights = [direction.weight_ih for direction in self._cells(0)]
        if self.joiner is not None and self.joiner.kind == "attention":
            weights.append(self.joiner.query)
        return [weight * self.norm for weight in weights]

    def read(self, x_nd: Tensor, readers: Sequence[Tensor], memory: Memory | None) -> list[Tensor]:
        """A layer's output -> the gates (n, g) it gives to each direction of the first recurrent layer."""
        count = 1 + self.settings.bidirectional
        gates: list[Tensor] = [ReadLayer.apply(x_nd, weight) for weight in readers[:count]]  # type: ignore[no-untyped-call]
        if self.joiner is None or memory is None:
            return gates
        joined_ng = self.joiner(x_nd, next(iter(readers[count:]), None), memory)
        return [gates_ng + joined_ng for gates_ng in gates]

    def _cells(self, layer: int) -> list[Direction]:
        """The directions of a recurrent layer."""
        count = 1 + self.settings.bidirectional
        return cast("list[Direction]", list(self.directions)[layer * count : (layer + 1) * count])

    def start(self, x_nd: Tensor) -> Tensor:
        """The embedding output -> the recurrence's first state (n, h)."""
        if self.initial is None:
            return self.norm.new_zeros(x_nd.shape[0], self.settings.hidden)
        projected: Tensor = ReadLayer.apply(x_nd, self.initial.weight * self.norm)  # type: ignore[no-untyped-call]
        return projected + self.initial.bias

    def forward(self, steps: Sequence[list[Tensor]], start_nh: Tensor) -> Tensor:
        """Gates of each step and direction -> the reduced state (n, h * directions)."""
        directions = 1 + self.settings.bidirectional
        gates = [[step[number] for step in steps] for number in range(directions)]
        states: list[list[Tensor]] = []
        for layer in range(self.settings.recurrent_layers):
            cells = self._cells(layer)
            if layer:
                joined = [torch.cat(parts, dim=-1) for parts in zip(*states, strict=True)]
                gates = [[x.matmul(cell.weight_ih.t()) for x in joined] for cell in cells]
            states = [cells[0](gates[0], start_nh)]
            if directions > 1:
                states.append(cells[1](gates[1][::-1], start_nh)[::-1])
        if self.settings.reduce == "mean":
            return torch.cat([torch.stack(list(run)).mean(0) for run in states], dim=-1)
        return torch.cat([run[0 if number else -1] for number, run in enumerate(states)], dim=-1)

    def correction(self, state_nh: Tensor) -> Tensor:
        """The reduced state -> what is added to the backbone's last hidden state (n, d)."""
        assert self.output is not None  # noqa: S101  a source has none, and is never asked
        result: Tensor = self.output(state_nh)
        if self.output_norm is not None:
            result = nn.functional.rms_norm(result, result.shape[-1:], self.output_norm, EPSILON)
        return result * self.settings.scale if self.settings.scale != 1.0 else result
