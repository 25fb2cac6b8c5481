"""A side network at its backbone's side: the hooks by which it reads the layers and corrects the last hidden state."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.side.memory import Memories, Memory
from surgery.side.padding import flat, padding_of, pool, unflat
from surgery.side.recurrence import SideStack
from surgery.side.settings import NAME, SideSettings, Stack
from surgery.side.steps import exact


@dataclass
class _Run:
    """One forward of a stack, while it lasts. tokens_n and kept_bt1 are those of `padding_of`."""

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
        self._thread, self._memories = _Thread(), Memories()
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
        tokens, kept = padding_of(state, mask, may_skip=side.joiner is None)
        with exact(state):
            self._now.runs[name] = _Run(mask, tokens, kept, side.readers(), side.start(flat(state, tokens)))
        return args, kwargs

    def _read(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        """After a layer: its output as gates of the recurrence."""
        state, run = _first(output), self._now.runs[name]
        with exact(state):
            run.steps.append(self._side(name).read(flat(state, run.tokens_n), run.readers, self._now.memory))

    def _leave(self, stack: Stack, _module: nn.Module, _args: Any, output: Any) -> Any:
        """After the exit: the recurrence, and the corrected state (or what the decoder will ask)."""
        run, side, last = self._now.runs.pop(stack.name), self._side(stack.name), _first(output).detach()
        if len(run.steps) != len(stack.read):
            seen = f"{len(run.steps)} layers were seen, expected {len(stack.read)}"
            raise RuntimeError(f"{stack.layers}: {seen}. Run each layer once, in a forward of the whole stack.")
        with exact(last):
            reduced = side(run.steps, run.start_nh)
            if side.output is None:
                self._hold(Memory(_first(output), unflat(reduced, run.tokens_n, last.shape[:2]), run.mask_bt))
                return output
            if torch.is_grad_enabled() or not torch.compiler.is_compiling():
                self._hold(None)
            correction = unflat(side.correction(reduced).to(last.dtype), run.tokens_n, last.shape[:2])
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


def _take_first(_module: nn.Module, args: Any, _output: Any) -> Any:
    """In place of a frozen pooler: every token holds the pooled state already."""
    return args[0][:, 0]


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
