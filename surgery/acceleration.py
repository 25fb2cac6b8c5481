"""What a run asks of its device beyond the plain kernels: precision, TF32, attention, torch.compile, Liger.

Each is had as asked for, or refused with the reason: nothing is replaced by something slower in silence.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.compat import input_embeddings
from surgery.errors import UnsupportedError, shorten
from surgery.lean_kernels import choose_kernels
from surgery.lean_pass import rewrite
from surgery.paca_experts import opened_experts
from surgery.paca_layers import PacaLayer
from surgery.recipe import TrainSection

FLASH, FLASH_PACKAGE, LIGER_PACKAGE = "flash_attention_2", "flash_attn", "liger_kernel"
TF32_CAPABILITY = (8, 0)  # Ampere
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernels:
    """What a run computed with; kept in the record of the run."""

    autocast: str
    tf32: bool
    attention: str
    compile: bool
    liger: bool
    lean: str = ""  # what was made so, in words


# --- before anything is read


def require(section: TrainSection, device: str) -> None:
    """Refuse what this card or this installation does not have. What no such device has is in `combinations`.

    Raises: UnsupportedError.
    """
    _require_precision(section.precision, device)
    if section.tf32 == "on" and not has_tf32():
        found = f"on, and the device is {_card()}"
        raise UnsupportedError("train.tf32", found, expected="an NVIDIA device from Ampere on", fix="Take auto or off")
    if section.attention == FLASH:
        _require_flash(device)
    if section.liger:
        _require_liger(device)
    if section.compile:
        _require_compile(device)


def _require_precision(precision: str, device: str) -> None:
    if precision == "bf16" and device == "cuda" and not has_bf16():
        raise UnsupportedError(
            "train.precision", f"bf16 on {_card()}, which has none", expected="fp16 or fp32", fix="Take fp16, or auto"
        )


def has_bf16() -> bool:
    """Whether the CUDA device computes in bf16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def has_tf32() -> bool:
    """Whether the CUDA device has TF32: NVIDIA's, from Ampere on."""
    is_nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    return is_nvidia and torch.cuda.get_device_capability() >= TF32_CAPABILITY


def _card() -> str:
    return str(torch.cuda.get_device_name())


def _require_flash(device: str) -> None:
    missing = missing_flash(device)
    if missing:
        found = f"{FLASH}, and {missing}"
        raise UnsupportedError("train.attention", found, expected="it to be usable", fix="Take auto")


def missing_flash(device: str) -> str:
    """Why flash attention cannot be used there; the empty string where it can."""
    if device != "cuda":
        return f"the device is {device}"
    if importlib.util.find_spec(FLASH_PACKAGE) is None:
        return "flash-attn is not installed"
    from transformers.utils import is_flash_attn_2_available

    return "" if is_flash_attn_2_available() else "the installed flash-attn is not for this torch, device or version"


def _require_liger(device: str) -> None:
    missing = missing_liger(device)
    if missing:
        fix = "pip install 'checkpoint-surgery[liger]'"
        raise UnsupportedError("train.liger", missing, expected="Liger's kernels to be usable", fix=fix)


def missing_liger(device: str) -> str:
    """Why Liger's kernels cannot be used there; the empty string where they can."""
    if device != "cuda":
        return f"the device is {device}"
    return "" if importlib.util.find_spec(LIGER_PACKAGE) else "liger-kernel is not installed"


def _require_compile(device: str) -> None:
    failure = compile_failure(device)
    if failure:
        fix = "Leave train.compile out; `surgery doctor` says what is missing"
        raise UnsupportedError("train.compile", f"torch.compile fails here ({failure})", expected="it to run", fix=fix)


def compile_failure(device: str) -> str:
    """What torch.compile says to a function of one line; the empty string where it compiles and runs."""
    if device not in ("cpu", "cuda"):
        return f"the device is {device}"

    def two_kernels(x: torch.Tensor) -> torch.Tensor:
        return x.sin().add(1.0).softmax(-1)

    try:
        torch.compile(two_kernels, fullgraph=True)(torch.ones(8, 8, device=device))
    except Exception as error:  # noqa: BLE001  compilers, headers, drivers: whatever is wrong is the finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        return shorten(lines[0] if lines else type(error).__name__, 200)
    return ""


def state(device: str) -> dict[str, str]:
    """What of all this is usable on cuda or cpu, and why not: for `surgery doctor`. Nothing is compiled to find out."""
    no_card = "" if device == "cuda" else "no CUDA device"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    missing = {
        "bf16": no_card or ("" if has_bf16() else f"{_card()} has none; auto takes fp16"),
        "tf32": no_card or ("" if has_tf32() else f"{_card()} has none"),
        "flash-attn": missing_flash(device),
        "liger": missing_liger(device),
        "triton": "" if importlib.util.find_spec("triton") else "not installed",
        "torch.compile": "" if compiler else "no C++ compiler (CXX, g++ or clang++)",
    }
    if device == "cuda" and missing["triton"]:
        missing["torch.compile"] = "triton is not installed"
    return {name: f"not usable: {why}" if why else "usable" for name, why in missing.items()}


# --- what auto means


def choose_autocast(precision: str, device: str) -> str:
    """fp32 (none), bf16 or fp16. `auto` is 16 bits on an accelerator, of the kind that it has, and none on a CPU."""
    if precision != "auto":
        return precision
    if device == "cpu":
        return "fp32"
    return "bf16" if device == "hpu" or has_bf16() else "fp16"


def choose_tf32(tf32: str, device: str, autocast: str) -> bool | None:
    """What the trainer sets; None where there is nothing to set. `auto`: where precision is 16 bits anyway."""
    if device != "cuda" or not has_tf32():
        return None
    return tf32 == "on" or (tf32 == "auto" and autocast != "fp32")


LEAN_WINS = ("cpu",)  # where lean blocks were measured, and a step took no longer: docs/performance.md
LEAN_VALUES = 1 << 16  # of what a forward hands from layer to layer; below, the blocks' fixed cost shows in a step


def choose_lean(section: TrainSection, device: str) -> bool:
    """Whether blocks are to be lean. `auto`: on devices where that was measured to cost nothing, and see `is_large`."""
    wins = device in LEAN_WINS and not (section.liger or section.compile)
    return section.lean == "on" or (section.lean == "auto" and wins)


def is_large(model: Any, tokens: float) -> bool:
    """Whether a forward over so many tokens is of the size from which on lean blocks cost nothing.

    tokens: 0 where they are not known, as of images.
    """
    words = input_embeddings(model)
    width = words.weight.shape[-1] if isinstance(words, nn.Embedding) else 0
    return not (tokens and width) or tokens * width >= LEAN_VALUES


# --- on the model


def prepare(model: Any, section: TrainSection, *, device: str, autocast: str) -> Kernels:
    """Give an attached model the attention, the kernels and the compilation that were asked for.

    Raises: UnsupportedError where its architecture does not have them.
    """
    attention = _set_attention(model, section, device=device, autocast=autocast)
    if section.liger:
        _apply_liger(model)
    lean = _make_lean(model, section, device) if choose_lean(section, device) else ""
    if section.compile:
        model.compile()  # not the trainer's own way: that sets an environment variable, and later runs compile too
    tf32 = bool(choose_tf32(section.tf32, device, autocast))
    return Kernels(autocast, tf32, attention, section.compile, section.liger, lean)


def _make_lean(model: nn.Module, section: TrainSection, device: str) -> str:
    """What was made lean, in words. Raises: UnsupportedError where nothing can be; `auto` then leaves all as it is."""
    found = rewrite(model, kernels=choose_kernels(device), is_required=section.lean == "on")
    return found.line() if found else ""


def set_heads(model: nn.Module, heads: Mapping[str, torch.Tensor]) -> None:
    """Let new heads train as these values, in their dtype."""
    for parameter, values in heads.items():
        module, _, name = parameter.rpartition(".")
        setattr(model.get_submodule(module), name, nn.Parameter(values))


def _set_attention(model: Any, section: TrainSection, *, device: str, autocast: str) -> str:
    is_half = autocast != "fp32" or model.dtype in HALF
    wanted: str = section.attention
    if wanted == "auto":
        # compiled, flash attention's unpadding would break the graph in every layer
        fits = is_half and not section.compile and _has_flash(model) and not missing_flash(device)
        wanted = FLASH if fits else ""
    if wanted == FLASH and not is_half:
        raise UnsupportedError(
            "train.attention", f"{FLASH} in fp32", expected="16 bits", fix="Set train.precision to bf16, or take sdpa"
        )
    if wanted and wanted != model.config._attn_implementation:  # noqa: SLF001  transformers has no other name for it
        switch_attention(model, wanted)
    return str(model.config._attn_implementation)  # noqa: SLF001


def _has_flash(model: Any) -> bool:
    return bool(model._supports_flash_attn)  # noqa: SLF001  how a class of transformers says it


def switch_attention(model: Any, wanted: str) -> None:
    """Give a model that attention. Raises: UnsupportedError where its class does not have it."""
    name = type(model).__name__
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        first = shorten(str(error).splitlines()[0], 200)
        raise UnsupportedError(
            "train.attention", f"{name} cannot have {wanted} ({first})", expected="one that it has", fix="Take auto"
        ) from error
    if model.config._attn_implementation != wanted:  # noqa: SLF001
        raise UnsupportedError(
            "train.attention", f"{name} has no {wanted}", expected="one that it has", fix="Take auto"
        )


def _apply_liger(model: Any) -> None:
    """Liger's kernels in this instance (its rotary embedding: in the whole process). Raises: UnsupportedError."""
    if opened_experts(model):
        found = "columns of experts train, and its kernels run experts of their own"
        raise UnsupportedError("train.liger", found, expected="frozen experts", fix="Leave liger or the experts out")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind, head = model.config.model_type, model.get_output_embeddings()
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UnsupportedError("train.liger", f"architecture {kind}", expected=f"one of {known}")
    if head is not None and _trains(head):
        raise UnsupportedError(
            "train.liger", "the output head trains, and its fused loss reads the weight alone", expected="a frozen head"
        )
    _apply_liger_kernel_to_instance(model=model)


def _trains(module: nn.Module) -> bool:
    return isinstance(module, PacaLayer) or any(parameter.requires_grad for parameter in module.parameters())
