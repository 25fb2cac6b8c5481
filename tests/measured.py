"""What a real training step keeps, measured on the CPU: the trainer's own forward under autograd's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from surgery.backends.local import BACKEND
from surgery.data import prepare
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec, class_for, read_config
from surgery.tokens import read_tokenizer
from surgery.train import train
from surgery.trainer import SurgeryCheckpoints


@dataclass
class Measured:
    """One step. `batch`, `sequence`, `padded`: what the collator gave; `saved`: bytes kept for backward."""

    batch: int = 0
    sequence: int = 0
    target: int = 0
    padded: bool = False
    saved: int = 0
    trainer: Any = None
    _alive: list[Any] = field(default_factory=list)

    def step(self, trainer: Any, inputs: Mapping[str, Tensor], compute_loss: Any) -> Any:
        """Run the trainer's own `compute_loss`; the last step of a run counts."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                self._alive.append(storage)
            return tensor

        self.trainer = trainer
        is_text = "input_ids" in inputs
        self.batch, self.sequence = inputs["input_ids"].shape if is_text else (len(inputs["pixel_values"]), 1)
        labels = inputs["labels"]
        self.target = labels.shape[1] if labels.dim() > 1 else 0
        self.padded = is_text and not bool(inputs["attention_mask"].all())
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = compute_loss()
        self.saved = sum(kept.values())
        self._alive.clear()
        return result

    def trained(self) -> list[torch.nn.Parameter]:
        """What the run trained."""
        return [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]

    def optimizer_bytes(self) -> int:
        """What the optimizer keeps."""
        states = self.trainer.optimizer.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def weight_bytes(self) -> int:
        """Parameters and buffers, whatever they are for."""
        model = self.trainer.model
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def measure_ours(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, data: DataSection, settings: TrainSection, task: TaskSpec
) -> Measured:
    """A step of `surgery train`."""
    found = Measured()
    original = SurgeryCheckpoints.compute_loss

    def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            return original(trainer, model, inputs, *args, **kwargs)

        return found.step(trainer, inputs, run) if torch.is_grad_enabled() else run()

    monkeypatch.setattr(SurgeryCheckpoints, "compute_loss", compute_loss)
    train(adapter, data, settings, task=task)
    return found


def measure_theirs(
    base: Path, out: Path, data: DataSection, settings: TrainSection, *, task: str, lora_rank: int = 0, **load: Any
) -> Measured:
    """A step of transformers' own trainer with our arguments: full tuning, or PEFT's LoRA."""
    found = Measured()
    prepared = prepare(data.spec(), task=task, tokenizer=read_tokenizer(base), labels=())
    config = read_config(base)
    if prepared.labels:
        config.id2label = dict(enumerate(prepared.labels))
        config.problem_type = "single_label_classification"
    config.use_cache = False
    model = class_for(config, task).from_pretrained(base, config=config, **load)
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        kind = {"seq2seq": "SEQ_2_SEQ_LM", "causal-lm": "CAUSAL_LM"}.get(task, "SEQ_CLS")
        model = get_peft_model(
            model, LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear", task_type=kind)
        )

    class Trainer(BACKEND.trainer_class()):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return found.step(self, inputs, lambda: super(Trainer, self).compute_loss(model, inputs, *args, **kwargs))

    arguments = BACKEND.training_arguments(
        settings, folder=out, device="cpu", autocast=settings.precision, steps=1, has_eval=False
    )
    arguments.save_strategy = "no"
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=prepared.train, data_collator=prepared.collator)
    trainer.train()
    return found
