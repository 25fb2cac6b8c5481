"""Tiny models of every supported family, built from their configs: random, deterministic, a few hundred kilobytes.

One table, `FAMILIES`, and one function, `build_tiny`. Each folder holds what a downloaded checkpoint holds: config,
generation config, safetensors (sharded on request) and, but for ViT, a small byte-level BPE tokenizer.

Every parameter is drawn, norms and biases included, so that a fault in a bias or a norm shows in the logits. What a
parameter gets is a function of (seed, its name) only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

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


@dataclass(frozen=True)
class Family:
    """How one family is built: class names in transformers, the config's fields, what its tokenizer adds."""

    config: str
    model: str
    fields: Mapping[str, object]
    tokenizer: str = "decoder"
    ids: Mapping[str, int] = field(
        default_factory=lambda: {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    )


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

FAMILIES: Mapping[str, Family] = {
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

TEMPLATES: Mapping[str, tuple[str, str]] = {
    "decoder": ("<bos> $A", "<bos> $A $B"),
    "pair": ("<bos> $A <eos>", "<bos> $A <eos> $B:1 <eos>:1"),
    "encoder": ("<bos> $A <eos>", "<bos> $A <eos> <eos> $B <eos>"),
    "seq2seq": ("$A <eos>", "$A <eos> $B <eos>"),
}


def build_tokenizer(kind: str = "decoder") -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 128 tokens over printable ASCII: any such text survives encode and decode.

    `kind` is a key of TEMPLATES and says which special tokens are added around a sequence.
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
        model_max_length=128,
        model_input_names=[*inputs, "token_type_ids"] if kind == "pair" else inputs,
        clean_up_tokenization_spaces=False,
    )
    if kind == "decoder":
        result.chat_template = CHAT_TEMPLATE
    return result


def build_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, overrides: Mapping[str, object] | None = None
) -> transformers.PreTrainedModel:
    """A model in memory, in eval mode. `overrides` replaces fields of the config (`tie_word_embeddings`, sizes ..)."""
    entry = FAMILIES[family]
    config_class = getattr(transformers, entry.config)
    model_class = getattr(transformers, entry.model)
    config = config_class(**{**entry.fields, **entry.ids, **(overrides or {})})
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
    kind = FAMILIES[family].tokenizer
    if kind:
        build_tokenizer(kind).save_pretrained(folder)
    return folder


def sample_inputs(family: str, *, batch: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that `model(**inputs)` takes, logits out: (batch, tokens) ids, or (batch, 3, 16, 16) pixels for ViT."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if FAMILIES[family].tokenizer == "seq2seq":
        inputs["decoder_input_ids"] = ids.flip(1)[:, : tokens - 2]
    return inputs
