# SPDX-License-Identifier: Apache-2.0
# checkpoint-surgery 0.1.0
"""READ's side network: a recurrence over the layers of a frozen stack, and one correction of its last hidden state.

Step i of the recurrence reads the output of layer i. Nothing of the backbone is recorded by autograd: its weights are
frozen and what enters its first layer is detached; backward keeps each layer's output and, of a step, the gates. Depth
costs no parameters.

It needs torch and nothing else: `surgery export --format remote-code` writes it, as it stands, beside the weights, with
a class of the model's after it.

Shape suffixes: b sequences, t tokens, n = b * t or, where padding is left out, fewer, d width of the backbone, h width
of the side network, g gates of a step (3 h for a GRU, 4 h for an LSTM, h for a plain RNN), s tokens of the encoder.

Source: READ, arXiv 2305.15348, section 3; the order of a step's gates is torch.nn.GRU's and torch.nn.LSTM's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

NAME = "side_network"  # of the side network as a child of the model
EPSILON = 1e-6
GATES = {"gru": 3, "lstm": 4, "rnn": 1}


@dataclass(frozen=True)
class SideSettings:
    """What a side network is built from: settings of checkpoint-surgery's `ReadSpec`, which says what each means."""

    cell: str = "gru"
    hidden: int = 256
    recurrent_layers: int = 1
    bidirectional: bool = False
    initial: str = "zero"
    reduce: str = "last"
    output_norm: bool = False
    scale: float = 1.0
    joiner: str = "none"
    pooling: str = "own"


@dataclass(frozen=True)
class Stack:
    """A backbone's list of layers, by dotted paths from the model.

    layers: the module list; exit: the module whose output is the last hidden state (a final norm, or the last layer
    where none follows); read: the layers that are read, from 0.
    """

    name: str
    layers: str
    exit: str
    depth: int
    width: int
    read: tuple[int, ...]

    @property
    def around(self) -> list[str]:
        """The modules that hold both the layers and the exit, from the model itself (``) inwards."""
        pairs = zip(self.layers.split(".")[:-1], self.exit.split(".")[:-1], strict=False)
        shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return ["", *itertools.accumulate(shared, "{}.{}".format)]


# --- what a step computes


def _exact(x: Tensor) -> torch.autocast:
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
        with _exact(x_nd):
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
        with _exact(x_nd):
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
        with _exact(h_nh):
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
        with _exact(h_nh):
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
        with _exact(h_nh):
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
        with _exact(h_nh):
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
        with _exact(h_nh):
            result = gates_ng.detach().add_(bias_ih + bias_hh).addmm_(h_nh, weight_gh.t()).tanh_()
        ctx.save_for_backward(result, h_nh, weight_gh)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_nh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        result, h_nh, weight_gh = ctx.saved_tensors
        with _exact(h_nh):
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


# --- the recurrence of one stack


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


@dataclass
class Memory:
    """What the encoder left for the decoder: its output, its side states (b, s, h), its mask (b, s)."""

    source: Tensor
    states_bsh: Tensor
    mask_bs: Tensor | None


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


# --- at the backbone's side


@dataclass
class _Run:
    """One forward of a stack, while it lasts. tokens_n and kept_bt1 are those of `_padding`."""

    mask_bt: Tensor | None
    tokens_n: Tensor | None
    kept_bt1: Tensor | None
    readers: list[Tensor]
    start_nh: Tensor
    steps: list[list[Tensor]] = field(default_factory=list)


@dataclass
class _Forward:
    """What a model's forward holds while it lasts. masks, runs: by stack; memory: what the encoder left last."""

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    runs: dict[str, _Run] = field(default_factory=dict)
    memory: Memory | None = None


class _Thread(threading.local):
    """Each thread's forward, in a box: torch.compile loses what is set on a threading.local. A copy holds nothing."""

    def __init__(self) -> None:
        self.forward = _Forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Thread, ()


class _Memories:
    """What encoders left, each for as long as the output lives that it belongs to. A copy holds nothing."""

    def __init__(self) -> None:
        self._left: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Memories, ()

    def keep(self, memory: Memory) -> None:
        """Hold it by its source, which must not be held itself."""
        self._left[memory.source] = memory.states_bsh, memory.mask_bs

    def find(self, given_bsd: Tensor) -> Memory | None:
        """The memory of an encoder's output, or of rows of the latest that has them, repeated for beams or picked."""
        left = self._left.get(given_bsd)
        if left is not None:
            return Memory(given_bsd, *left)
        for reference in reversed(self._left.keyrefs()):
            source = reference()
            rows = None if source is None else _rows(given_bsd.detach(), source.detach())
            if rows is not None:
                states, mask = self._left[source]
                return Memory(given_bsd, states[rows], None if mask is None else mask[rows])
        return None


class SideNetwork(nn.Module):
    """The side networks of a model's stacks, and the hooks by which they read it and correct it.

    Where the correction is added: to the output of `Stack.exit`, the final norm of a pre-norm stack (Llama, Qwen,
    Mistral, Gemma: `norm`; GPT-2: `ln_f`; OPT, T5: `final_layer_norm`; ViT: `layernorm`) and the last layer of a
    post-norm one (BERT, RoBERTa, DistilBERT, BART), whose output is normed already. It is the last point at which the
    state has the backbone's width and nothing frozen but the head comes after it: from there alone gradients flow.
    """

    def __init__(self, settings: SideSettings, stacks: Sequence[Stack]) -> None:
        super().__init__()
        self.settings, self.descriptions = settings, tuple(stacks)
        self.is_pair = len(stacks) == 2
        self.stacks = nn.ModuleDict()
        for number, stack in enumerate(stacks):
            joiner = settings.joiner if number else "none"
            is_source = self.is_pair and not number
            self.stacks[stack.name] = SideStack(settings, stack.width, joiner=joiner, is_source=is_source)
        self._thread, self._memories = _Thread(), _Memories()
        self._handles: list[Any] = []

    def hook(self, model: nn.Module, frozen: Sequence[str]) -> None:
        """Attach to the model. `frozen`: its children that stay in eval mode, whatever mode the model is in."""
        keep = self._handles.append
        for name in {*frozen, *(name for stack in self.descriptions for name in stack.around if name)}:
            keep(model.get_submodule(name).register_forward_pre_hook(_keep_eval))
        for stack in self.descriptions:
            # Some classes call a part of their backbone and not the whole. A pair's masks are the innermost modules'.
            for number, name in enumerate(stack.around[-1:] if self.is_pair else stack.around):
                module = model.get_submodule(name)
                enter = functools.partial(self._enter, stack.name, not number, _position(module, "attention_mask"))
                keep(module.register_forward_pre_hook(enter, with_kwargs=True))
            layers = model.get_submodule(stack.layers)
            assert isinstance(layers, nn.ModuleList)  # noqa: S101  as the plan says
            begin = functools.partial(self._begin, stack.name, layers)
            keep(layers[0].register_forward_pre_hook(begin, with_kwargs=True))
            for number in stack.read:
                keep(layers[number].register_forward_hook(functools.partial(self._read, stack.name)))
            keep(model.get_submodule(stack.exit).register_forward_hook(functools.partial(self._leave, stack)))
        if self.is_pair and self.settings.joiner != "none":
            decoder = model.get_submodule(self.descriptions[1].around[-1])
            ask = functools.partial(self._ask, _position(decoder, "encoder_hidden_states"))
            keep(decoder.register_forward_pre_hook(ask, with_kwargs=True))
        if self.settings.pooling != "own":
            for module in model.modules():
                if hasattr(module, "pooler") and isinstance(module.pooler, nn.Module):
                    keep(module.pooler.register_forward_hook(_take_first))

    def swap_memory(self, memory: Memory | None) -> Memory | None:
        """Set what a decoder will ask, and return what it would have asked: for who runs the halves of a pair apart."""
        before, self._now.memory = self._now.memory, memory
        return before

    def unhook(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def _now(self) -> _Forward:
        return self._thread.forward

    # The hooks, in the order in which they are called.

    def _enter(self, name: str, first: bool, position: int, _module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: FBT001
        """Before a module around a stack: keep the mask that it is given, if it is one of tokens."""
        mask, masks = kwargs.get("attention_mask", _placed(args, position)), self._now.masks
        if first:
            masks[name] = None
        if masks.get(name) is None and isinstance(mask, Tensor) and mask.dim() == 2:
            masks[name] = mask

    def _ask(self, position: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the decoder: find the side states that belong to the encoder's output that it is given."""
        given, memory = kwargs.get("encoder_hidden_states", _placed(args, position)), self._now.memory
        if given is None:
            return
        if memory is not None:
            if torch.compiler.is_compiling() and memory.source.shape == given.shape:
                return  # a graph cannot look at values
            self._memories.keep(memory)  # a compiled encoder has not
        found = self._memories.find(given)
        if found is None:
            raise RuntimeError(
                f"encoder_outputs: no side states for {tuple(given.shape)}, expected what this model's own encoder "
                "returned, or rows of it. Run that encoder, and keep its output until the decoder has run."
            )
        self._hold(found)

    def _hold(self, memory: Memory | None) -> None:
        """Set what the decoder asks. Outside a graph the memories learn it, and what a graph may have set before."""
        before, self._now.memory = self._now.memory, memory
        if not torch.compiler.is_compiling():
            for known in (before, memory):
                if known is not None:
                    self._memories.keep(known)

    def _begin(self, name: str, layers: nn.ModuleList, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the first layer: with its input detached and its weights frozen, autograd records nothing there."""
        _keep_eval(layers)
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        kwargs = {key: x.detach() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        state = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        side, mask = self._side(name), self._now.masks.pop(name, None)
        tokens, kept = _padding(state, mask, may_skip=side.joiner is None)
        with _exact(state):
            self._now.runs[name] = _Run(mask, tokens, kept, side.readers(), side.start(_flat(state, tokens)))
        return args, kwargs

    def _read(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        """After a layer: its output as gates of the recurrence."""
        state, run = _first(output), self._now.runs[name]
        with _exact(state):
            run.steps.append(self._side(name).read(_flat(state, run.tokens_n), run.readers, self._now.memory))

    def _leave(self, stack: Stack, _module: nn.Module, _args: Any, output: Any) -> Any:
        """After the exit: the recurrence, and the corrected state (or what the decoder will ask)."""
        run, side, last = self._now.runs.pop(stack.name), self._side(stack.name), _first(output).detach()
        if len(run.steps) != len(stack.read):
            seen = f"{len(run.steps)} layers were seen, expected {len(stack.read)}"
            raise RuntimeError(f"{stack.layers}: {seen}. Run each layer once, in a forward of the whole stack.")
        with _exact(last):
            reduced = side(run.steps, run.start_nh)
            if side.output is None:
                self._hold(Memory(_first(output), _unflat(reduced, run.tokens_n, last.shape[:2]), run.mask_bt))
                return output
            if torch.is_grad_enabled() or not torch.compiler.is_compiling():
                self._hold(None)
            correction = _unflat(side.correction(reduced).to(last.dtype), run.tokens_n, last.shape[:2])
            corrected = last + (correction if run.kept_bt1 is None else correction * run.kept_bt1)
        if self.settings.pooling != "own":
            corrected = pool(corrected, run.mask_bt, self.settings.pooling)
        return (corrected, *output[1:]) if isinstance(output, tuple) else corrected

    def _side(self, name: str) -> SideStack:
        return cast("SideStack", self.stacks[name])


def _keep_eval(module: nn.Module, _args: object = None) -> None:
    """No dropout in a backbone that does not train."""
    if module.training:
        module.eval()


def _position(module: nn.Module, argument: str) -> int:
    """Where a module's forward takes an argument that is not given by name; -1 where it takes none."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index(argument) if argument in names else -1


def _placed(args: Any, position: int) -> Any:
    """The argument at a place, None where it is not given there."""
    return args[position] if 0 <= position < len(args) else None


def _first(output: Any) -> Tensor:
    """The hidden state that a layer returns, alone or as the first of several things."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state


def _rows(given_bsd: Tensor, source_bsd: Tensor) -> Tensor | None:
    """The number of the source's row that each given row is, bit for bit; None where one is not among them."""
    if given_bsd.shape[1:] != source_bsd.shape[1:] or given_bsd.dtype != source_bsd.dtype:
        return None
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source_bsd.dtype.itemsize]
    given, source = (x.to(source_bsd.device).contiguous().view(whole) for x in (given_bsd, source_bsd))
    sums = [x.sum((1, 2)) for x in (given, source)]  # of whole numbers, so the same in any order
    rows = (sums[0].unsqueeze(1) == sums[1]).int().argmax(1)
    return rows if torch.equal(source[rows], given) else None


def _padding(state_btd: Tensor, mask_bt: Tensor | None, *, may_skip: bool) -> tuple[Tensor | None, Tensor | None]:
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


def _flat(state_btd: Tensor, tokens_n: Tensor | None) -> Tensor:
    """(b, t, d) -> (n, d), outside autograd.

    On a Gaudi a copy: there a layer in eval mode adds to its input in place, which backward still needs.
    """
    state = state_btd.detach().reshape(-1, state_btd.shape[-1])
    if state.device.type == "hpu" and torch.is_grad_enabled():
        state = state.clone()
    return state if tokens_n is None else state.index_select(0, tokens_n)


def _unflat(x_nd: Tensor, tokens_n: Tensor | None, shape: torch.Size) -> Tensor:
    """(n, d) -> (b, t, d), zero where nothing was read."""
    if tokens_n is not None:
        x_nd = x_nd.new_zeros(shape.numel(), x_nd.shape[-1]).index_copy(0, tokens_n, x_nd)
    return x_nd.view(*shape, -1)


def _take_first(_module: nn.Module, args: Any, _output: Any) -> Any:
    """In place of a frozen pooler: every token holds the pooled state already."""
    return args[0][:, 0]


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


def build_side(settings: Mapping[str, Any], stacks: Sequence[Mapping[str, Any]]) -> SideNetwork:
    """A side network from plain data, with undefined weights."""
    described = [Stack(**{**entry, "read": tuple(entry["read"])}) for entry in stacks]
    return SideNetwork(SideSettings(**settings), described)


def attach_side(
    model: nn.Module, settings: Mapping[str, Any], stacks: Sequence[Mapping[str, Any]], frozen: Sequence[str]
) -> SideNetwork:
    """Give a model a side network, under `NAME`, with undefined weights."""
    side = build_side(settings, stacks)
    model.add_module(NAME, side)
    side.hook(model, frozen)
    return side


def freeze(loaded: Any) -> Any:
    """What a class's from_pretrained has returned, with all but side network and new heads frozen.

    Loading makes every parameter trainable, and autograd would record the whole backbone.
    """
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for part in (*map(model.get_submodule, model.config.read["frozen"]), model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(requires_grad=False)
    return loaded
