"""The one place that knows how transformers 4.55 and 5.x differ, and what their models call things.

transformers 5 renames some tensors between disk and memory and fuses or splits others (`core_model_loading`); in 4.55
both sides agree but for the base model's prefix.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5.0")
ANY_IMAGE_SIZE = 224
_LEGACY_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class MemoryName:
    """Where a tensor on disk goes in memory, whether its values arrive as they are, whether the prefix was added."""

    name: str
    is_verbatim: bool
    is_prefixed: bool


def memory_names(model: nn.Module, disk_names: Iterable[str]) -> dict[str, MemoryName]:
    """What each tensor of a checkpoint is called in `model` (which may be on the meta device).

    A tensor that transformers fuses, splits or permutes on the way has `is_verbatim` False.
    """
    known = dict.fromkeys(name for name, _ in _named_tensors(model))
    prefix = base_prefix(model)
    rename = _renamer_5(model) if TRANSFORMERS_5 else _rename_4
    result = {}
    for disk in disk_names:
        name, is_verbatim = rename(disk)
        fitted = _fit_prefix(name, prefix, known)
        result[disk] = MemoryName(fitted, is_verbatim, is_prefixed=len(fitted) > len(name))
    return result


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _fit_prefix(name: str, prefix: str, known: dict[str, None]) -> str:
    """Add or drop the base model's prefix where only that makes the name known, as from_pretrained does."""
    if name not in known and prefix:
        if name.removeprefix(f"{prefix}.") in known:
            return name.removeprefix(f"{prefix}.")
        if f"{prefix}.{name}" in known:
            return f"{prefix}.{name}"
    return name


def _rename_4(disk: str) -> tuple[str, bool]:
    for old, new in _LEGACY_NAMES:
        disk = disk.replace(old, new)
    return disk, True


def _renamer_5(model: nn.Module) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def rename(disk: str) -> tuple[str, bool]:
        name, converted_by = rename_source_key(disk, renamings, converters)
        return name, converted_by is None

    return rename


def base_prefix(model: nn.Module) -> str:
    """The name of the base model inside a task model (`model`, `bert`, ..), or the empty string."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and hasattr(model, prefix) else ""


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers' warnings and progress bars off: what they would say, our own checks say as errors."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def reading_values() -> Iterator[None]:
    """transformers asks tensors without values what it asks others: whether a mask is all ones.

    transformers 5 would otherwise build a mask for every such tensor. Who runs a model so answers (`surgery.saved`).
    """
    from transformers.utils import import_utils

    known = vars(import_utils)
    before = known.get("is_fake_tensor")
    if before is not None:
        known["is_fake_tensor"] = lambda _tensor: False
    try:
        yield
    finally:
        if before is not None:
            known["is_fake_tensor"] = before


def checkpointing_name(owner: Any) -> str:
    """What a model's methods, or the arguments of a training run, begin with: newer versions renamed it."""
    is_new = any(name.startswith("activation_checkpointing") for name in dir(owner))
    return "activation_checkpointing" if is_new else "gradient_checkpointing"


def set_checkpointing(model: Any, *, on: bool) -> None:
    """Gradient checkpointing without reentrance, on or off. Raises ValueError for a model that has none."""
    name = checkpointing_name(model)
    if on:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()


def keep_no_cache(model: Any) -> None:
    """Training needs no keys and values of earlier tokens; T5's decoder goes by a configuration of its own there."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False


def keep_inputs_frozen(model: Any) -> None:
    """Take off what transformers 5 puts on with checkpointing: that the embeddings' output asks for a gradient.

    The reentrant kind needs that; ours does not, and would compute a gradient that nobody uses, and break a graph.
    """
    if TRANSFORMERS_5:
        model.disable_input_require_grads()


def download_config(hub_id: str) -> Path:
    """The folder of a hub id's config.json, fetched alone where it is not in the cache. Raises: OSError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(str(error)) from error


def fall_silent() -> None:
    """No remark, warning or bar from this process: another one says it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"


def config_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a configuration gives its weights when they are loaded; None where the files decide."""
    dtype: torch.dtype | None = config.dtype if TRANSFORMERS_5 else config.torch_dtype
    return dtype


def settle_rope(config: Any, document: Mapping[str, Any]) -> None:
    """Give a configuration the rotary settings that transformers 5 wrote, which 4.55 passes over in silence.

    config: what 4.55 made of `document`, the content of config.json.
    Raises: ValueError for settings by kind of layer that 4.55 has no place for.
    """
    given = document.get("rope_parameters")
    if TRANSFORMERS_5 or not given or "rope_theta" in document:
        return
    if "full_attention" in given:
        if not hasattr(config, "rope_local_base_freq") or set(given) != {"full_attention", "sliding_attention"}:
            raise ValueError(f"rope_parameters of {', '.join(given)}, for which transformers 4.55 has no place")
        config.rope_local_base_freq = given["sliding_attention"]["rope_theta"]
        given = given["full_attention"]
    scaling = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    config.rope_theta = given["rope_theta"]
    config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    if "partial_rotary_factor" in given:
        config.partial_rotary_factor = given["partial_rotary_factor"]


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer. transformers 4.55 does not know the class name that 5 writes for those in tokenizer.json.

    Raises: what transformers raises.
    """
    path = folder / "tokenizer_config.json"
    if not TRANSFORMERS_5 and path.is_file():
        written = json.loads(path.read_text(encoding="utf-8"))
        if written.get("tokenizer_class") == "TokenizersBackend":
            extra = written.get("extra_special_tokens")  # a list there, names for each here
            is_list = isinstance(extra, list)
            changes: dict[str, Any] = (
                {"extra_special_tokens": {}, "additional_special_tokens": extra} if is_list else {}
            )
            return PreTrainedTokenizerFast.from_pretrained(folder, **changes)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images that a model was made for; convolutional ones that name none take any size."""
    size = config.to_dict().get("image_size") or ANY_IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def load_image_processor(folder: Path) -> Any:
    """A folder's image processor, on Pillow: torchvision need not scale alike. Raises: what transformers raises."""
    from transformers import AutoImageProcessor

    given: dict[str, Any] = {"backend": "pil"} if TRANSFORMERS_5 else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **given)


def current_class(model_class: Any) -> Any:
    """The class that stands under this class's name in transformers now.

    An accelerator's package may have replaced it after someone, transformers' own tables included, took hold of it.
    """
    module = sys.modules[model_class.__module__]
    return getattr(module, model_class.__name__) if module.__name__.startswith("transformers.") else model_class


def forget_replaced_classes() -> None:
    """Let transformers' own modules name the classes that stand there now.

    They keep each class that was asked for; a model built through them would be half of one kind, half of the other.
    """
    for module_name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        kept = vars(sys.modules[module_name])
        for name, value in list(kept.items()):
            if isinstance(value, type) and value.__module__ != module_name and name == value.__name__:
                owner = sys.modules.get(value.__module__)
                if value.__module__.startswith("transformers.models.") and name in vars(owner):
                    kept[name] = vars(owner)[name]


def upstream_architecture(name: str) -> str:
    """The architecture's own name, without the prefix optimum-habana gives its subclasses."""
    return re.sub(r"^Gaudi(?=[A-Z])", "", name)
