"""What a training step keeps for its backward pass, found by running it on tensors that have sizes and no values.

The model is the real class with the real surgery in it; only its storage is missing, so that a step of a 70B takes
seconds and no memory. Autograd's own hooks say what is saved; a storage counts once, and not where it is a parameter's
or a buffer's.

On the CPU the kernels are those that PyTorch picks there. A step on CUDA is run in the same way, with attention and
dropout replaced by the operators that PyTorch picks on a card: the rest saves the same tensors on both.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from surgery.compat import (
    image_size,
    is_conv1d,
    keep_inputs_frozen,
    keep_no_cache,
    pixels_config,
    quiet_loading,
    reading_values,
    set_checkpointing,
)
from surgery.cuda_kernels import as_on_cuda
from surgery.errors import UnsupportedError, shorten
from surgery.images import TASK as IMAGES
from surgery.paca_layers import PacaLayer
from surgery.quantized import QuantizedLinear
from surgery.repeated import FEW, echoing, few_layers, is_alike, set_submodule

ATTENTION, NORMS, MLP, COLUMNS, SIDE, LOGITS, OTHER = KINDS = (
    "attention",
    "norms",
    "MLP",
    "gathered columns",
    "side network",
    "logits and loss",
    "other",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORES_DIM = 4  # (b, h, t, t)
_aten = torch.ops.aten
ATTENTION_OPERATORS = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
        _aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
        _aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
        _aten._safe_softmax.default,  # noqa: SLF001  where neither is taken
    }
)


@dataclass(frozen=True)
class Step:
    """One forward and backward on one device.

    target: tokens of an encoder-decoder's output, 0 for as many as of its input. padded: rows differ in length, so that
    attention gets a mask; else all are `sequence` long. autocast: fp32 (none), bf16 or fp16. checkpointing: each layer
    keeps its input and is run again in backward.
    """

    batch: int
    sequence: int
    target: int = 0
    padded: bool = False
    autocast: str = "fp32"
    checkpointing: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward, by the kind of module that saved them first."""

    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class DryModel:
    """A model without storage.

    `heads`: modules of the output; `blocks`: its outermost lists of layers; `is_side`: a side network reads it;
    `known`: what has been found, by step and lengths of lists.
    """

    model: Any
    mode: FakeTensorMode
    task: str
    heads: tuple[str, ...]
    blocks: tuple[str, ...]
    is_side: bool = False
    known: dict[Any, Saved] = field(default_factory=dict, compare=False)

    def layer_of(self, name: str) -> str:
        """The path of the layer that a module or tensor is in, or is; the empty string outside."""
        block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
        return f"{block}.{name.removeprefix(f'{block}.').split('.')[0]}" if block else ""

    @cached_property
    def alike(self) -> dict[str, int]:
        """The lists whose layers are alike but for the first, and their lengths: a few stand for all of them."""
        lengths = {block: len(self.model.get_submodule(block)) for block in self.blocks}
        return {block: length for block, length in lengths.items() if is_alike(self.model, block)}


# --- a model without storage


def dry_model(model: Any, task: str, heads: tuple[str, ...], *, dtype: torch.dtype) -> DryModel:
    """Turn a model on the meta device, in place, into one that believes to lie on the CPU with weights of `dtype`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):  # noqa: SLF001  the only way to replace both in place
                for name, tensor in tensors.items():
                    if tensor is not None:
                        known.setdefault(id(tensor), _without_storage(tensor, dtype))
                        tensors[name] = known[id(tensor)]
    keep_no_cache(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return DryModel(model, mode, task, heads, tuple(blocks))


def _without_storage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_like(tensor, device="cpu")
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return nn.Parameter(torch.empty(tensor.shape, dtype=kind, device="cpu"), requires_grad=tensor.requires_grad)


@contextmanager
def without_values(mode: FakeTensorMode) -> Iterator[None]:
    """Everything inside computes sizes only. PaCA's layers compare addresses, which are all 0 here: that may be.

    What PyTorch logs about an operator that fails here, our own error says.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), mode:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.setLevel(level)


class LoraLayer(nn.Module):
    """A frozen linear layer and a LoRA adapter beside it, as PEFT computes it, without dropout.

    Source: LoRA, arXiv 2106.09685; the order of casts is that of PEFT 0.21's `lora.Linear.forward`.
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        axis = 0 if is_conv1d(base) else 1
        is_packed = isinstance(base, QuantizedLinear)
        shape, kind = (base.shape, base.storage) if is_packed else (base.weight.shape, base.weight.dtype)
        dtype = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
        self.base = base
        self.a = nn.Linear(shape[axis], rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, shape[1 - axis], bias=False, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The base's: some classes ask a layer for its weight's dtype."""
        weight: Tensor = self.base.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        plain = self.base(x)
        result = plain + self.b(self.a(x.to(self.a.weight.dtype))) * 1.0
        back: Tensor = result.to(plain.dtype)
        return back


def attach_lora(model: nn.Module, ranks: Mapping[str, int], whole: Sequence[str]) -> None:
    """LoRA on the named layers of a frozen model; `whole`: parameters that train as they are, beside a copy."""
    model.requires_grad_(requires_grad=False)
    for name, rank in ranks.items():
        set_submodule(model, name, LoraLayer(model.get_submodule(name), rank))
    for name in whole:
        owner, _, last = name.rpartition(".")
        parameter = model.get_parameter(name).requires_grad_()
        model.get_submodule(owner).register_buffer(f"original_{last}", torch.empty_like(parameter, requires_grad=False))


# --- one step


def saved_by(dry: DryModel, step: Step) -> Saved:
    """What a step keeps for backward. Raises: UnsupportedError where the model cannot be run without values."""
    watch = _Watch(dry)
    with _explained(dry), _running(dry, step, watch), watch, saved_tensors_hooks(watch.keep, lambda tensor: tensor):
        loss = dry.model(**_inputs(dry, step)).loss
        del loss
    return watch.saved()


@contextmanager
def _explained(dry: DryModel) -> Iterator[None]:
    """Whatever a foreign forward raises without values, as one error."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        why = shorten(str(error), 160) or type(error).__name__
        raise UnsupportedError(
            "plan",
            f"a step of {type(dry.model).__name__} cannot be run without values ({type(error).__name__}: {why})",
            expected="a forward whose shapes do not depend on them",
            fix="Measure a short run instead: `surgery train` reports its peak memory",
        ) from error


@contextmanager
def _running(dry: DryModel, step: Step, watch: _Watch | None = None) -> Iterator[None]:
    model = dry.model
    model.train()
    _set_checkpointing(model, on=step.checkpointing)
    if dry.is_side or any(isinstance(module, PacaLayer) for module in model.modules()):
        keep_inputs_frozen(model)  # as our runs do, others not
    dtype = DTYPES[step.autocast]
    with ExitStack() as stack:
        stack.enter_context(quiet_loading())
        stack.enter_context(reading_values())
        stack.enter_context(without_values(dry.mode))
        stack.enter_context(_Answers(watch, is_full=not step.padded))
        stack.enter_context(as_on_cuda() if step.device == "cuda" else nullcontext())
        if step.autocast != "fp32":
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
        yield


def _set_checkpointing(model: Any, *, on: bool) -> None:
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)  # of PEFT's, around it
    try:
        set_checkpointing(inner, on=on)
    except ValueError as error:
        if on:
            found = shorten(str(error), 160)
            raise UnsupportedError("--checkpointing", found, expected="a model that has it") from error


def _inputs(dry: DryModel, step: Step) -> dict[str, Tensor]:
    """A batch as the collator gives it."""
    config = dry.model.config
    if dry.task == IMAGES:
        config = pixels_config(config)
        pixels = torch.zeros((step.batch, config.num_channels, *image_size(config)))
        return {"pixel_values": pixels, "labels": torch.zeros(step.batch, dtype=torch.long)}
    ids = torch.zeros((step.batch, step.sequence), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.to_dict().get("type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if dry.task in ("sequence-classification", "regression"):
        kind = torch.float32 if dry.task == "regression" else torch.long
        return {**inputs, "labels": torch.zeros(step.batch, dtype=kind)}
    if dry.task not in ("causal-lm", "seq2seq", "token-classification"):
        raise UnsupportedError(
            "plan", f"the task {dry.task}", expected="a task that `surgery train` has", fix="Name one with --task"
        )
    length = step.target or step.sequence if dry.task == "seq2seq" else step.sequence
    return {**inputs, "labels": torch.zeros((step.batch, length), dtype=torch.long)}


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Answers for what a forward asks of values: whether a mask is all ones, and where tokens are.

    Padding is a single token: READ on the CPU leaves it out, and keeps most where there is least to leave out. It also
    tells `watch` when attention's own operators run.
    """

    def __init__(self, watch: _Watch | None, *, is_full: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch, self.is_full = watch, is_full

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].dtype is torch.bool:  # noqa: SLF001
            return self.is_full
        if func is _aten.nonzero.default and args[0].dim() == 1:
            return torch.arange(args[0].shape[0] - (not self.is_full)).unsqueeze(1)
        if func is _aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:  # noqa: SLF001
            return _grouped_size(*args, **(kwargs or {}))
        if self.watch is None:
            return func(*args, **(kwargs or {}))
        if func in ATTENTION_OPERATORS or (func is _aten._softmax.default and args[0].dim() == SCORES_DIM):  # noqa: SLF001
            self.watch.attention.add(self.watch.path[-1])
        return func(*args, **(kwargs or {}))


def _grouped_size(x: Tensor, other: Tensor, ends: Tensor, *_rest: Any, **_settings: Any) -> Tensor:
    """A product by groups, without values: PyTorch's own is for bfloat16 alone, its kernels are not.

    Shapes: (n, i) x (g, i, o) -> (n, o); of a gradient by weight (i, n) x (n, o) -> (g, i, o). ends: (g,).
    """
    shape = (len(x), other.shape[-1]) if other.dim() == 3 else (len(ends), len(x), other.shape[-1])
    return x.new_empty(shape)


# --- who saved what


class _Watch:
    """Which module is running when something is saved.

    `path`: the running modules from the outside in; `kept`: (module, bytes) of each storage; `attention`: the modules
    in which scores were computed.
    """

    def __init__(self, dry: DryModel) -> None:
        self.dry = dry
        self.modules = dict(dry.model.named_modules())
        self.path: list[str] = []
        self.called: set[str] = set()
        self.kept: list[tuple[str, int]] = []
        self.attention: set[str] = set()
        self._seen: dict[int, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        own = (*self.dry.model.parameters(), *self.dry.model.buffers())
        self._seen = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in own)}
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(_module: nn.Module, _args: Any) -> None:
            self.called.add(name)
            self.path.append(name)

        return enter

    def _leaving(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.path.pop()

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd saves a tensor: its storage counts the first time."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen[id(storage)] = storage  # kept alive: an id must not be used twice
            self.kept.append((self.path[-1], storage.nbytes()))
        return tensor

    def saved(self) -> Saved:
        """The sums by kind."""
        attention = {self._block_of(name) for name in self.attention}
        kinds = Counter(dict.fromkeys(KINDS, 0))
        for name, size in self.kept:
            kinds[self._kind(name, attention)] += size
        return Saved(dict(kinds))

    def _block_of(self, name: str) -> str:
        """The outermost module inside the layer that holds this one: attention with its projections."""
        layer = self.dry.layer_of(name)
        parts = name.removeprefix(f"{layer}.").split(".")
        inside = [f"{layer}.{'.'.join(parts[: number + 1])}" for number in range(len(parts))]
        return next((path for path in inside if path in self.called), name)

    def _kind(self, name: str, attention: set[str]) -> str:
        module, layer = self.modules[name], self.dry.layer_of(name)
        if not name or any(name == head or name.startswith(f"{head}.") for head in self.dry.heads):
            return LOGITS
        if self.dry.is_side:
            return SIDE
        if isinstance(module, PacaLayer):
            return COLUMNS
        if _is_norm(module):
            return NORMS
        if not layer or name == layer:
            return OTHER
        return ATTENTION if self._block_of(name) in attention else MLP


def _is_norm(module: nn.Module) -> bool:
    """A scale, perhaps a shift, and nothing else."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.dim() == 1 for p in parameters) and not list(module.children())


# --- many layers from few


def saved_by_all(dry: DryModel, step: Step) -> Saved:
    """As `saved_by`; of stacks whose layers are alike two and three are run, and the rest follows.

    The first layer may differ from the others (its input may ask for no gradient), so it is no model for them. Beside a
    side network see `surgery.repeated.echoing`.
    """
    few = _saved_by_few(dry, step, dict.fromkeys(dry.alike, FEW))
    if dry.is_side:
        return few
    kinds = Counter(few.kinds)
    for block, length in dry.alike.items():
        more = _saved_by_few(dry, step, {**dict.fromkeys(dry.alike, FEW), block: FEW + 1})
        for kind in KINDS:
            kinds[kind] += (more.kinds[kind] - few.kinds[kind]) * (length - FEW)
    return Saved(dict(kinds))


def _saved_by_few(dry: DryModel, step: Step, lengths: Mapping[str, int]) -> Saved:
    """What a step keeps with lists of these lengths; what has been asked before is not run again."""
    asked = step, tuple(lengths.items())
    if asked not in dry.known:
        with _shortened(dry, lengths):
            dry.known[asked] = saved_by(dry, step)
    return dry.known[asked]


def _shortened(dry: DryModel, lengths: Mapping[str, int]) -> AbstractContextManager[None]:
    """Lists of these lengths; beside a side network, whose every step counts, whole lists of which few layers run."""
    return echoing(dry.model, list(lengths)) if dry.is_side else few_layers(dry.model, lengths)


def temporary(dry: DryModel, step: Step) -> int:
    """What lives at the peak of a step beside what is kept for backward, and beside gradients that are done.

    The loss's copies of the logits, a layer that checkpointing runs again, gradients on their way: from a few layers,
    as none of it grows with their number; what a side network needs may, and of that every step is run. Raises: as
    `saved_by`.
    """
    few = dict.fromkeys(dry.alike, FEW)
    kept = _saved_by_few(dry, step, few).total
    with _shortened(dry, few):
        live = LiveBytes(dry.model)
        with _explained(dry), _running(dry, step), live.watching():
            dry.model(**_inputs(dry, step)).loss.backward()
        dry.model.zero_grad(set_to_none=True)
    return max(live.peak - kept, 0)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """The bytes of the tensors that operators have made and that are still there; `peak`, the most there were at once.

    Leaves out a model's own tensors and, once they are summed up, its parameters' gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.now = self.peak = 0
        self._own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self._live: dict[int, tuple[int, Any]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs inside."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._leave_out) for p in trained]  # type: ignore[no-untyped-call]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _enter(self, storage: Any) -> None:
        key = id(storage)
        if key not in self._live and key not in self._own:
            self._live[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
            self.now += storage.nbytes()

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key, (0, None))[0]

    def _leave_out(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # noqa: S101  the hook is called when there is one
        self._forget(id(parameter.grad.untyped_storage()))
