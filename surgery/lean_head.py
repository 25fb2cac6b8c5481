"""The loss of a language model without its logits: the head's product and the cross-entropy in chunks.

A model in training that is given labels computes its loss where its head is called, from the hidden states, and gives
no logits. In eval mode, without gradients or labels, or where a call asks for more than the loss (`logits_to_keep`,
`return_dict=False`, labels that are shifted already), it does what it did.

What a class does to its logits (a cap, a scale) and how it asks for its loss is found by running a stand-in of it, a
few channels wide, beside the lean one: it is taken only where losses and gradients agree.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.compat import base_prefix
from surgery.lean_blocks import Lean, nearly, stand_in
from surgery.lean_functions import IGNORED, Logits, shifted
from surgery.lean_kernels import OURS, Kernels

WIDTH, VOCABULARY, BATCH, TOKENS = 8, 11, 2, 6  # of the stand-in
OTHER_LABELS = ("shift_labels", "ignore_index")
CHANGES: Mapping[str, Callable[[float], Logits]] = {  # of logits, by the name that a configuration has for the number
    "final_logit_softcapping": lambda number: Logits(cap=number),
    "logits_scaling": lambda number: Logits(divisor=number),
    "logit_scale": lambda number: Logits(factor=number),
}


@dataclass
class Asked:
    """One call's labels, and the loss once the head has run. items: what the loss is divided by, if given."""

    labels: Tensor
    items: Tensor | int | None
    loss: Tensor | None = None

    def answer(self, *_: Any, **__: Any) -> Tensor:
        """In place of the class's loss function."""
        assert self.loss is not None  # noqa: S101
        return self.loss


class LeanHead(Lean):
    """A linear layer that makes a loss of hidden states where one is asked for."""

    lean: Logits
    weight: Tensor
    bias: Tensor | None
    lean_asked: Asked | None

    def forward(self, x: Tensor) -> Tensor:
        asked = self.lean_asked
        if asked is None:
            plain: Tensor = self.lean_plain.forward(self, x)
            return plain
        labels_n, rows = shifted(asked.labels), x.reshape(-1, x.shape[-1])
        loss = self.lean_kernels.loss
        asked.loss = loss(rows, self.weight, self.bias, labels_n, items=asked.items, logits=self.lean)
        return x.detach().new_zeros((*x.shape[:-1], 1))  # what a class does to its logits, it does to nothing


class LeanModel(Lean):
    """A language model that asks its head for the loss."""

    lean_plain: ClassVar[Any]
    lean: LeanHead
    training: bool

    def lean_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward; with labels, in training, without logits."""
        labels, forward = kwargs.get("labels"), self.lean_plain.forward
        if labels is None or _asks_for_more(kwargs) or not (self.training and torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)
        with _asking(self.lean, Asked(labels, kwargs.get("num_items_in_batch"))) as asked:
            output = forward(self, *args, **kwargs)
        if asked.loss is None:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def lean_loss_function(self) -> Any:
        """The head's answer while it has one."""
        asked = self.lean.lean_asked
        return asked.answer if asked and asked.loss is not None else self.lean_plain.loss_function.fget(self)


def _asks_for_more(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with labels wants some logits, a tuple that holds them, or a loss of another kind."""
    keep = kwargs.get("logits_to_keep")
    is_whole = keep is None or (isinstance(keep, int) and keep == 0)
    return not is_whole or kwargs.get("return_dict") is False or any(kwargs.get(n) is not None for n in OTHER_LABELS)


@contextmanager
def _asking(head: LeanHead, asked: Asked) -> Iterator[Asked]:
    head.lean_asked = asked
    try:
        yield asked
    finally:
        head.lean_asked = None


_models: dict[type[nn.Module], type[nn.Module]] = {}
_heads: dict[type[nn.Module], type[nn.Module]] = {}


def become(model: Any, head_name: str, logits: Logits, kernels: Kernels = OURS) -> None:
    """Give a model and its head the lean loss, in place. The model's class keeps its name: files are written by it."""
    head = model.get_submodule(head_name)
    for module, lean, known in ((head, LeanHead, _heads), (model, LeanModel, _models)):
        plain: Any = type(module)
        if plain not in known:
            names: dict[str, Any] = {"lean_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
            names["__qualname__"] = plain.__qualname__
            if lean is LeanModel:
                names["forward"] = functools.wraps(plain.forward)(_forward)
                names["loss_function"] = property(LeanModel.lean_loss_function, plain.loss_function.fset)
            known[plain] = type(plain.__name__, (lean, plain), names)
        module.__class__ = known[plain]
    head.lean, head.lean_kernels, head.lean_asked = logits, kernels, None
    vars(model)["lean"] = head  # not as a child: it is one already


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return LeanModel.lean_forward(self, *args, **kwargs)


def unbecome(module: LeanHead | LeanModel) -> None:
    """The plain module again, in place."""
    plain = type(module).lean_plain
    for name in ("lean", "lean_kernels", "lean_asked"):
        vars(module).pop(name, None)
    module.__class__ = plain  # type: ignore[assignment]


# --- whether a class can have it


def find_loss(model: Any) -> tuple[str, Logits] | str:
    """The head's name and what happens to logits, or why the loss is left as it is."""
    name, inner = type(model).__name__, base_prefix(model)
    head = model.get_output_embeddings()
    if head is None:
        return f"{name} has no language model's head"
    path = next(path for path, module in model.named_modules() if module is head)
    if not inner or "." in path:
        return f"{name} has its head at {path}, not beside its base model"
    if type(head) is not nn.Linear:
        return f"{path} is a {type(head).__name__}, which trains or is wrapped"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return f"{path} trains, and a gradient of its size would be kept"
    return _try_out(model, path)


def _try_out(model: Any, path: str) -> tuple[str, Logits] | str:
    """Run stand-ins of the class with each change of logits that its configuration may mean."""
    name = type(model).__name__
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            for logits in _candidates(model.config.to_dict()):
                if _agrees(model, path, logits):
                    return path, logits
    except Exception as error:  # noqa: BLE001  whatever a foreign forward raises on a stand-in: it is left as it is
        return f"{name} cannot be tried out ({type(error).__name__})"
    return f"{name} computes its loss in another way"


def _candidates(config: Mapping[str, Any]) -> Iterator[Logits]:
    for key, change in CHANGES.items():
        if config.get(key) is not None:
            yield change(config[key])
    yield Logits()


class _Outputs:
    """What a base model returns: hidden states, and nothing else that one may ask for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Base(nn.Module):
    """In place of a base model, and of the decoder that some have inside it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> _Base:
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Outputs(self.hidden)


def _stand_in(model: Any, path: str, hidden: Tensor, head: nn.Module) -> Any:
    other = stand_in(model, {base_prefix(model): _Base(hidden), path: head}, {})
    other.config = copy.deepcopy(model.config)
    vocabulary = model.config.vocab_size
    other.config.vocab_size = VOCABULARY
    for name, value in list(vars(other).items()):
        if type(value) is int and value == vocabulary:
            setattr(other, name, VOCABULARY)
    return other.train()


def _agrees(model: Any, path: str, logits: Logits) -> bool:
    """Losses and gradients, with labels that do not count, by their mean and by a number of items, in two dtypes."""
    given = model.get_submodule(path)
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS), device="cpu")
    labels[0, :3] = IGNORED
    for dtype in (torch.float32, torch.bfloat16):
        head = nn.Linear(WIDTH, VOCABULARY, bias=given.bias is not None, dtype=dtype, device="cpu")
        head.weight.data.mul_(20)  # so that a cap is felt
        for items in (None, torch.tensor(7.0)):
            hidden = (4 * torch.randn(BATCH, TOKENS, WIDTH, device="cpu")).to(dtype).requires_grad_()
            twin = hidden.detach().clone().requires_grad_()
            plain = _stand_in(model, path, hidden, head)
            lean = _stand_in(model, path, twin, copy.deepcopy(head))
            become(lean, path, logits)
            given_items = {} if items is None else {"num_items_in_batch": items}
            ids = labels.clamp(min=0)
            one, other = (stand(input_ids=ids, labels=labels, **given_items) for stand in (plain, lean))
            if other.loss is None or other.logits is not None or not nearly(one.loss, other.loss):
                return False
            gradients = [torch.autograd.grad(output.loss, x)[0] for output, x in ((one, hidden), (other, twin))]
            if not nearly(*gradients):
                return False
    return True
