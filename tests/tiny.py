"""Tiny models of every supported family, built from their configs: random, deterministic, a few hundred kilobytes.

One table, `FAMILIES`, and one function, `build_tiny`. Each folder holds what a downloaded checkpoint holds: config,
generation config, safetensors (sharded on request) and, but for ViT, a small byte-level BPE tokenizer.

Every parameter is drawn, norms and biases included, so that a fault in a bias or a norm shows in the logits. What a
parameter gets is a function of (seed, its name) only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from surgery import tiny
from surgery.tiny import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    VOCABULARY,
    Family,
    build_tokenizer,
    draw_parameters,
)

__all__ = [
    "BOS",
    "EOS",
    "FAMILIES",
    "OTHERS",
    "PAD",
    "SPECIAL",
    "VOCABULARY",
    "Family",
    "build_model",
    "build_tiny",
    "build_tokenizer",
    "draw_parameters",
    "sample_inputs",
]

# Widths differ from each other on purpose: a swapped pair of axes must not go unnoticed.
SIZES: Mapping[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: Mapping[str, object] = {**SIZES, "num_key_value_heads": 2}
HEAD_DIM: Mapping[str, object] = {**GROUPED, "head_dim": 12}
LOCAL_AND_GLOBAL: Mapping[str, object] = {**HEAD_DIM, "sliding_window": 16, "query_pre_attn_scalar": 12}
EXPERTS: Mapping[str, object] = {**GROUPED, "num_experts_per_tok": 2}
NO_IDS: Mapping[str, int] = {}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", HEAD_DIM),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 16}),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", HEAD_DIM),
    "gemma2": Family("Gemma2Config", "Gemma2ForCausalLM", LOCAL_AND_GLOBAL),
    "gemma3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", LOCAL_AND_GLOBAL),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {**GROUPED, "sliding_window": 16}),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "bert": Family("BertConfig", "BertForMaskedLM", SIZES, tokenizer="pair"),
    "roberta": Family(
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**SIZES, "max_position_embeddings": 130, "type_vocab_size": 1},  # two positions go to the padding offset
        tokenizer="encoder",
    ),
    "distilbert": Family(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 128,
        },
        tokenizer="encoder",
    ),
    "t5": tiny.FAMILIES["t5"],
    "bart": Family(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 40,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": EOS,
        },
        tokenizer="seq2seq",
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 3,
        },
        tokenizer="",
        ids=NO_IDS,
    ),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "head_dim": 12, "num_experts": 4, "moe_intermediate_size": 24},
    ),
}

# Models whose layers are not, or not only, linear ones: in a table of their own, for what all families have in common
# are stacks of layers alike, and these have none.
OTHERS: dict[str, Family] = {
    "convnext": Family(
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {
            "hidden_sizes": (8, 12),
            "depths": (1, 2),
            "num_stages": 2,
            "image_size": 16,
            "patch_size": 2,
            "num_labels": 3,
            "layer_scale_init_value": 0.5,
        },
        tokenizer="",
        ids=NO_IDS,
    ),
    "efficientnet": Family(
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {
            "image_size": 16,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "depth_divisor": 4,
            "kernel_sizes": (3, 5),
            "in_channels": (32, 12),
            "out_channels": (12, 16),
            "strides": (1, 2),
            "num_block_repeats": (1, 2),
            "expand_ratios": (1, 4),
            "hidden_dim": 1280,
            "num_labels": 3,
            "dropout_rate": 0.0,
            "drop_connect_rate": 0.0,
        },
        tokenizer="",
        ids=NO_IDS,
    ),
    "resnet": Family(
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": (8, 12), "depths": (1, 2), "layer_type": "basic", "num_labels": 3},
        tokenizer="",
        ids=NO_IDS,
    ),
    "siglip": Family(
        "SiglipVisionConfig",
        "SiglipVisionModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        tokenizer="",
        ids=NO_IDS,
    ),
}


def build_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, overrides: Mapping[str, object] | None = None
) -> transformers.PreTrainedModel:
    """A model in memory, in eval mode. `overrides` replaces fields of the config (`tie_word_embeddings`, sizes ..)."""
    return tiny.build_model((FAMILIES | OTHERS)[family], dtype=dtype, seed=seed, overrides=overrides)


def build_tiny(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    overrides: Mapping[str, object] | None = None,
) -> Path:
    """Write a tiny checkpoint of `family` into `folder` and return it. `max_shard_size` in bytes, or as `"50KB"`."""
    model = build_model(family, dtype=dtype, seed=seed, overrides=overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size or "5GB")
    kind = (FAMILIES | OTHERS)[family].tokenizer
    if kind:
        build_tokenizer(kind).save_pretrained(folder)
    return folder


def sample_inputs(family: str, *, batch: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that `model(**inputs)` takes, logits out: (batch, tokens) ids, or (batch, 3, 16, 16) pixels for ViT."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit" or family in OTHERS:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if FAMILIES[family].tokenizer == "seq2seq":
        inputs["decoder_input_ids"] = ids.flip(1)[:, : tokens - 2]
    return inputs
