"""A checkpoint that was written, as transformers loads and runs it: its own class, inputs for it, its outputs."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from surgery.compat import TRANSFORMERS_5, image_size, pixels_config, quiet_loading
from surgery.errors import CheckError
from surgery.images import TASK as IMAGES
from surgery.manifest import REMOTE_CODE, Record
from surgery.methods.read import MODELING_FILE, modeling_source
from surgery.operate import align, evaluating
from surgery.survey import class_for, own_task, read_config

RANDOM_TOKENS = 24


def load_merged(folder: Path, model_class: Any = None) -> Any:
    """A merged (or any) checkpoint as transformers loads it, in its own dtype."""
    if model_class is None:
        config = read_config(folder)
        model_class = class_for(config, own_task(config) if config.architectures else "features")
    dtype_key = "dtype" if TRANSFORMERS_5 else "torch_dtype"
    with quiet_loading():
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **{dtype_key: "auto"})
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = [*info["missing_keys"], *info["mismatched_keys"]]
        raise CheckError(str(folder), f"transformers misses {lost[0]!r}", expected="every weight of the model")
    align(model)
    return model


def own_class(folder: Path, record: Record) -> Any:
    """The class in a folder's modeling file, which is compared with ours before it runs; None where it has none."""
    if record.kind != REMOTE_CODE:
        return None
    module = types.ModuleType(f"surgery_modeling_{record.plan.id}")
    sys.modules[module.__name__] = module  # transformers looks the class's module up by its name
    exec(compile(modeling_source(record.plan.architecture), str(folder / MODELING_FILE), "exec"), module.__dict__)  # noqa: S102
    return getattr(module, f"Read{record.plan.architecture}")


def model_inputs(folder: Path, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """One batch a prompt; without a tokenizer, token numbers or pixels drawn from a fixed seed."""
    config = read_config(folder)
    pictured = pixels_config(config) if own_task(config) == IMAGES else config
    if hasattr(pictured, "num_channels"):
        return [{"pixel_values": pixels} for pixels in _random_pixels(pictured, len(prompts))]
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        batches = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        return [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in batches]
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        size = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(0, size, (1, RANDOM_TOKENS), generator=generator)} for _ in prompts]


def _random_pixels(config: Any, count: int) -> list[Tensor]:
    generator, sizes = torch.Generator().manual_seed(0), (1, config.num_channels, *image_size(config))
    return [torch.randn(sizes, generator=generator) for _ in range(count)]


def _end_with(input_ids: Tensor, eos_token_id: int | None) -> Tensor:
    """An encoder-decoder's classifier looks for the end token."""
    return input_ids if eos_token_id is None else torch.nn.functional.pad(input_ids[:, :-1], (0, 1), value=eos_token_id)


def run_model(model: Any, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The model's first output (logits, or the last hidden state) for each batch."""
    results = []
    with evaluating(model):
        for batch in inputs:
            given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
            if type(model).__name__.endswith("ForSequenceClassification"):
                given["input_ids"] = _end_with(given["input_ids"], model.config.eos_token_id)
            elif model.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"][:, :4]
            results.append(model(**given)[0])
    return results
