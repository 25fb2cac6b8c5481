"""Pretrain the quickstart's base model, tokenizer included, from nothing but corpus.py.

    python recipes/quickstart/pretrain.py recipes/quickstart/model

The folder that it writes is what `from_pretrained` expects. Same seed, machine and thread count: same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import pages
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>")
VOCABULARY_SIZE = 512
TOKENIZER_PAGES = 4000
# Words, single digits, single spaces and single signs: a word has the same tokens after a space and after a quote,
# so that copying it is copying tokens.
PIECES = r"[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCK_TOKENS = 128
BATCH_BLOCKS = 32
HELD_OUT_SEED_OFFSET = 1_000_000


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 512 entries on the corpus; any text round-trips through it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pages(seed, TOKENIZER_PAGES), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=512,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build the untrained decoder: 4 layers, 128 wide, 2 key/value heads for 4 heads, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def blocks(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[Tensor]:
    """Pack pages into batches without padding.

    Shapes: each batch (BATCH_BLOCKS, BLOCK_TOKENS) int64.
    """
    needed_tokens = BATCH_BLOCKS * BLOCK_TOKENS
    pool: list[int] = []
    next_page = 0
    for _ in range(steps):
        while len(pool) < needed_tokens:
            for encoded in tokenizer(list(pages(seed, 64, start=next_page)))["input_ids"]:
                pool += [*encoded, tokenizer.eos_token_id]
            next_page += 64
        yield torch.tensor(pool[:needed_tokens]).view(BATCH_BLOCKS, BLOCK_TOKENS)
        del pool[:needed_tokens]


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over 50 steps, then fall along a cosine to a twentieth."""
    if step < 50:
        return (step + 1) / 50
    progress = (step - 50) / max(1, steps - 50)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and the norms (half the steps of AdamW alone)."""
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and ".layers." in name]
    others = [value for name, value in model.named_parameters() if not (value.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Train every value of the model on `steps` batches, with a line of progress each 100 steps."""
    optimizers = build_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    started = time.perf_counter()
    for step, batch in enumerate(blocks(tokenizer, seed, steps), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Average the loss over 8 batches of pages that were not trained on."""
    batches = list(blocks(tokenizer, seed + HELD_OUT_SEED_OFFSET, 8))
    return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / len(batches)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer under the class name that transformers 4 and 5 and other readers all know."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Pretrain and write the folder."""
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's base model.")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 32 x 128 tokens (default 1500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and text (default 0)")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer, arguments.seed)
    print(f"{sum(value.numel() for value in model.parameters())} values")
    train(model, tokenizer, arguments.seed, arguments.steps)
    print(f"held-out loss {held_out_loss(model.eval(), tokenizer, arguments.seed):.4f}")
    model.save_pretrained(arguments.out)
    save_tokenizer(tokenizer, arguments.out)


if __name__ == "__main__":
    main()
