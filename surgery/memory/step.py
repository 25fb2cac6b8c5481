"""One step of a model without storage: its batch, its devices' kernels, and answers for what asks of values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from surgery.compat import (
    image_size,
    keep_inputs_frozen,
    pixels_config,
    quiet_loading,
    reading_values,
    set_checkpointing,
)
from surgery.cuda_kernels import as_on_cuda
from surgery.errors import UnsupportedError, shorten
from surgery.images import TASK as IMAGES
from surgery.memory.dry import DryModel, without_values
from surgery.memory.watch import Watch
from surgery.paca_layers import PacaLayer

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


@contextmanager
def explained(dry: DryModel) -> Iterator[None]:
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
def running(dry: DryModel, step: Step, watch: Watch | None = None) -> Iterator[None]:
    """What runs inside is a step in training, as the device would run it. Raises: UnsupportedError."""
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


def inputs_of(dry: DryModel, step: Step) -> dict[str, Tensor]:
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

    def __init__(self, watch: Watch | None, *, is_full: bool) -> None:
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
