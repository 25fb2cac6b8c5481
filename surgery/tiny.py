"""Tiny models, made in code: random, deterministic, some hundred kilobytes, to see that a run works.

A recipe names one as `tiny:llama`. The folder holds what a downloaded checkpoint holds: config, generation config,
safetensors, and a byte-level tokenizer with a chat template, or an image processor's settings.

Every parameter is drawn, norms and biases included, so that a fault in a bias or a norm shows in the logits. What a
parameter gets is a function of (seed, its name) only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from surgery.compat import quiet_loading
from surgery.errors import require_known
from surgery.writing import CheckpointWriter, write_file

SCHEME = "tiny:"
PREPROCESSOR_FILE = "preprocessor_config.json"
VOCABULARY = 128
PAD, EOS, BOS, UNK, MASK = range(5)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a user asks a question and the assistant gives the answer",
    "what is the sum of two and three? the answer is five",
    "there was a little girl who wanted to play in the garden with the other children",
)
TEMPLATES: Mapping[str, tuple[str, str]] = {
    "decoder": ("<bos> $A", "<bos> $A $B"),
    "pair": ("<bos> $A <eos>", "<bos> $A <eos> $B:1 <eos>:1"),
    "encoder": ("<bos> $A <eos>", "<bos> $A <eos> <eos> $B <eos>"),
    "seq2seq": ("$A <eos>", "$A <eos> $B <eos>"),
}


@dataclass(frozen=True)
class Family:
    """How one family is built: class names in transformers, the config's fields, what its tokenizer adds.

    tokenizer: a key of TEMPLATES, or empty for a model of images.
    """

    config: str
    model: str
    fields: Mapping[str, object]
    tokenizer: str = "decoder"
    ids: Mapping[str, int] = field(
        default_factory=lambda: {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    )


TOKENS = 1024
# Wide enough for the ranks that the papers trained with, and every width another.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 80,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": TOKENS,
        },
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": PAD,
        },
        tokenizer="seq2seq",
        ids={"pad_token_id": PAD, "eos_token_id": EOS},
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 80,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 3,
        },
        tokenizer="",
        ids={},
    ),
}


def is_tiny(model: str) -> bool:
    """Whether a recipe's model is one of these."""
    return model.startswith(SCHEME)


def write_tiny(model: str, folder: Path) -> Path:
    """The folder of `tiny:FAMILY`, whole or absent; one that is there already stays as it is.

    Raises: RequestError for an unknown family.
    """
    name = model.removeprefix(SCHEME)
    require_known("model", name, FAMILIES)
    if not folder.is_dir():
        family = FAMILIES[name]
        with CheckpointWriter(folder) as writer, quiet_loading():
            build_model(family).save_pretrained(writer.path)
            if family.tokenizer:
                build_tokenizer(family.tokenizer, length=TOKENS).save_pretrained(writer.path)
            else:
                write_file(writer.path / PREPROCESSOR_FILE, json.dumps(image_settings(family), indent=2) + "\n")
    return folder


def image_settings(family: Family) -> dict[str, Any]:
    """An image processor's settings, as ViT's checkpoints have them."""
    size = family.fields["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def build_tokenizer(kind: str = "decoder", *, length: int = 128) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 128 tokens over printable ASCII: any such text survives encode and decode.

    `kind` is a key of TEMPLATES and says which special tokens are added around a sequence; length: its limit in tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = [
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(c))[0][0] for c in range(33, 127)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=[*printable, "\u0120", "\u010a"],  # the byte-level forms of space and newline
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    single, pair = TEMPLATES[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    inputs = ["input_ids", "attention_mask"]
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<bos>",
        sep_token="<eos>",
        model_max_length=length,
        model_input_names=[*inputs, "token_type_ids"] if kind == "pair" else inputs,
        clean_up_tokenization_spaces=False,
    )
    if kind == "decoder":
        result.chat_template = CHAT_TEMPLATE
    return result


def build_model(
    family: Family, *, dtype: torch.dtype = torch.float32, seed: int = 0, overrides: Mapping[str, object] | None = None
) -> Any:
    """A model in memory, in eval mode. `overrides` replaces fields of the config (`tie_word_embeddings`, sizes ..)."""
    config_class = getattr(transformers, family.config)
    model_class = getattr(transformers, family.model)
    config = config_class(**{**family.fields, **family.ids, **(overrides or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # only buffers could depend on it: every parameter is drawn anew
        model = model_class(config)
    draw_parameters(model, seed=seed)
    return model.to(dtype).eval()


@torch.no_grad()
def draw_parameters(model: nn.Module, *, seed: int) -> None:
    """Draw every parameter from (seed, name). Matrices keep a signal's size; vectors move a little from where they are.

    Tied parameters are one and are drawn once, under the first of their names.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
