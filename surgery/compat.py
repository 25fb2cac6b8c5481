"""The one place that knows how transformers 4.55 and 5.x differ, and what their models call things.

transformers 5 renames some tensors between disk and memory and fuses or splits others (`core_model_loading`); in 4.55
both sides agree but for the base model's prefix.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5.0")
ANY_IMAGE_SIZE = 224
_LEGACY_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


class Place(NamedTuple):
    """Where a tensor on disk goes in a parameter of experts: which expert's, and which of equal parts of its outputs.

    `part` of `parts`: 0 of 2 is `gate` and 1 of 2 `up` in `gate_up_proj`.
    """

    expert: int
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class MemoryName:
    """Where a tensor on disk goes in memory, whether its values arrive as they are, whether the prefix was added.

    place: where in a parameter of experts; None for a tensor that is a whole parameter, or is changed otherwise.
    """

    name: str
    is_verbatim: bool
    is_prefixed: bool
    place: Place | None = None


def memory_names(model: nn.Module, disk_names: Iterable[str]) -> dict[str, MemoryName]:
    """What each tensor of a checkpoint is called in `model` (which may be on the meta device).

    A tensor that transformers fuses, splits or permutes on the way has `is_verbatim` False. The experts' have a place
    where they are only put beside each other: their values arrive as they are, too.
    """
    known = dict.fromkeys(name for name, _ in _named_tensors(model))
    prefix = base_prefix(model)
    rename = _renamer_5(model) if TRANSFORMERS_5 else _rename_4
    result = {}
    for disk in disk_names:
        name, is_verbatim, place = rename(disk)
        fitted = _fit_prefix(name, prefix, known)
        result[disk] = MemoryName(fitted, is_verbatim, is_prefixed=len(fitted) > len(name), place=place)
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


def _rename_4(disk: str) -> tuple[str, bool, None]:
    for old, new in _LEGACY_NAMES:
        disk = disk.replace(old, new)
    return disk, True, None


def _renamer_5(model: nn.Module) -> Any:
    from transformers.core_model_loading import WeightRenaming, apply_renamings, rename_source_key

    transforms, converters = _transforms(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]

    def rename(disk: str) -> tuple[str, bool, Place | None]:
        name, pattern = rename_source_key(disk, renamings, converters)
        if pattern is None:
            return name, True, None
        return name, False, _place(apply_renamings(disk, renamings), pattern, converters)

    return rename


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What transformers does to a checkpoint's tensors on the way into a model, and the part that is no renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model)
    return transforms, [t for t in transforms if isinstance(t, WeightConverter)]


def _place(name: str, pattern: str, converters: Iterable[Any]) -> Place | None:
    """An expert's place, from its tensor's name and the pattern that means it; None where more is done to it."""
    for converter in converters:
        if pattern in converter.source_patterns and _parts(converter):
            numbers = re.search(pattern.replace("*", r"(\d+)"), name)
            if numbers:
                part = converter.source_patterns.index(pattern)
                return Place(int(numbers.group(1)), part, len(converter.source_patterns))
    return None


def _parts(converter: Any) -> int:
    """Of how many equal parts, tensors of their own, a converter puts an expert together; 0: it does otherwise."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = list(converter.operations)
    is_list = bool(operations) and type(operations[0]) is MergeModulelist and operations[0].dim == 0
    rest = [(type(operation), operation.dim) for operation in operations[1:]] if is_list else []
    if not is_list or any(source.count("*") != 1 for source in converter.source_patterns):
        return 0
    count = len(converter.source_patterns)
    return count if rest == ([(Concatenate, 1)] if count > 1 else []) else 0


def usual_parts(model: nn.Module, parameter: str) -> int:
    """Of how many tensors on disk an expert's part of a parameter is usually put together; 0: all are one tensor."""
    if not TRANSFORMERS_5:
        return 0
    for converter in _transforms(model)[1]:
        target = converter.target_patterns[0]
        if _parts(converter) and re.search(rf"{target}$", parameter):
            return _parts(converter)
    return 0


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's experts as transformers 5 has them: no class, a decorator sets these attributes."""
    marks = {"num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"}
    return marks <= vars(module).keys() and "down_proj" in module._parameters  # noqa: SLF001  its own, not its parts'


def grouped_product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (n, i), sorted by expert, times each row's expert's weight (e, i, o): as transformers computes it.

    ends: (e,) int32, where each expert's rows end. In double precision too, which transformers' own call has not.
    """
    from transformers.integrations import moe

    if x.dtype == torch.float64:
        exact: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)
        return exact
    product: torch.Tensor = moe._grouped_mm(x, weight, offs=ends)  # noqa: SLF001  its choice decides the last bit
    return product


def base_prefix(model: nn.Module) -> str:
    """The name of the base model inside a task model (`model`, `bert`, ..), or the empty string."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and hasattr(model, prefix) else ""


def base_name(model: nn.Module) -> str:
    """Where the base model lies in a task model, also in a class that calls it otherwise than its family does.

    Such are classifiers of images of SigLIP and CLIP: their only child that is a model is called vision_model.
    """
    from transformers import PreTrainedModel

    models = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    return base_prefix(model) or (models[0] if len(models) == 1 else "")


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

    transformers 5 would otherwise build a mask for every such tensor. Who runs a model so answers
    (`surgery.memory.step`).
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


def forget_quantizer(model: Any) -> None:
    """Take off what transformers notes of a model whose files were quantized: its trainer takes no such model.

    PEFT's adapters alone would be let through, and what we put into the layers it does not know.
    """
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def settle_quantizer(model: Any) -> None:
    """Let what transformers notes of a live model fit what lies dense in it now: else it would be saved as quantized.

    With no packed layer left it is as if there had never been one; else files say which layers are not.
    """
    if vars(model).get("hf_quantizer") is None:
        return
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear and _is_dense(module.weight)]
    if not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if n not in dense):
        forget_quantizer(model)
        return
    settings = copy.copy(model.config.quantization_config)  # who loaded the model may use theirs again
    key = "llm_int8_skip_modules" if "llm_int8_skip_modules" in vars(settings) else "modules_to_not_convert"
    setattr(settings, key, dense)
    model.config.quantization_config = settings


def _is_dense(weight: torch.Tensor) -> bool:
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor


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


def pixels_config(config: Any) -> Any:
    """What says how large a model's images are: its config, or of a model of texts and images the images' part."""
    names = config.to_dict()
    return config.vision_config if "vision_config" in names and "num_channels" not in names else config


def load_image_processor(folder: Path) -> Any:
    """A folder's image processor, on Pillow: torchvision need not scale alike. Raises: what transformers raises."""
    from transformers import AutoImageProcessor

    given: dict[str, Any] = {"backend": "pil"} if TRANSFORMERS_5 else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, **given)


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """What looks a model's tokens up; None where transformers 5 says that it knows of none (ConvNeXt has none)."""
    try:
        return model.get_input_embeddings()  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


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
