"""The model that a bench is run on, each method put on a copy of it, and the batches that all of them see."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.acceleration import choose_autocast
from surgery.adapter import find_model
from surgery.backends.local import choose_device
from surgery.bench.methods import Shared, explained, trained
from surgery.bench.spec import BenchSpec, Entry, held_as
from surgery.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from surgery.choosing import draw_batches
from surgery.compat import config_dtype, keep_inputs_frozen, quiet_loading, set_checkpointing
from surgery.data import Prepared, inspect_labels, prepare
from surgery.errors import RequestError, UnsupportedError
from surgery.experts import require_layers
from surgery.generate import max_positions
from surgery.lean_kernels import choose_kernels
from surgery.lean_pass import rewrite
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import load_base_model, resample
from surgery.plan import Stored, SurgeryPlan
from surgery.planning import plan_checkpoint, plan_model
from surgery.survey import Survey, TaskSpec, class_for, configured, read_config, survey
from surgery.tensorfile import dtype_name
from surgery.tokens import read_tokenizer

Batch = Mapping[str, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_GRAD_NORM = 1.0  # as a recipe's default
RANDOM_BATCHES = 4


@dataclass(frozen=True)
class Subject:
    """The checkpoint as the bench sees it; no weight is read yet.

    seen: its model on the meta device; plan: of one column on all wanted layers, for the layers and the head;
    has_weights: False for a folder with config.json alone, whose weights are drawn; autocast: fp32 for none; held: the
    training set, once it has been read to choose columns by.
    """

    spec: BenchSpec
    root: Path
    seen: Survey
    plan: SurgeryPlan
    has_weights: bool
    device: str
    autocast: str
    held: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def shared(self, seed: int = 0, quantize: str = "") -> Shared:
        """What all methods have in common, and how the base is held."""
        new = {target.parameter for target in self.plan.whole if not target.sha256}
        kept = {n: p for n, p in self.seen.model.named_parameters(remove_duplicate=False) if n not in new}
        stored = {name: Stored(name, dtype_name(p.dtype), tuple(p.shape)) for name, p in kept.items()}
        return Shared(
            self.seen.task,
            self.seen.heads,
            tuple(target.module for target in self.plan.targets),
            tuple(target.parameter for target in self.plan.whole),
            stored,
            self.spec.dropout,
            seed,
            lambda select, rows: calibration(self, select, rows, seed, "cpu" if quantize else self.device),
            quantize,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a task that has them."""
        return self.plan.labels

    def computing(self) -> AbstractContextManager[Any]:
        """Autocast, where there is any."""
        if self.autocast == "fp32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.autocast])


def open_subject(spec: BenchSpec) -> Subject:
    """Find the model, and what is to be trained in it.

    Raises: NotAModelError, SelectorError, UnsupportedError, DataError.
    """
    root = find_model(spec.model)[0]
    task = TaskSpec(spec.task, tuple(spec.labels) or _labels(spec))
    seen = survey(root, task)
    has_weights = any((root / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
    wanted = PacaSpec(rank=1, targets=tuple(spec.targets), exclude=tuple(spec.exclude))
    plan = plan_checkpoint(Checkpoint.open(root), wanted, task) if has_weights else _plan_without(seen, wanted)
    require_layers(plan, "--targets")
    if seen.task in ("features", "image-classification"):
        raise UnsupportedError("--task", seen.task, expected="a task on text", fix="Name one with --task")
    device = choose_device(spec.device)
    autocast = choose_autocast(spec.precision, device)
    if autocast == "fp16":
        raise UnsupportedError(
            "--precision", "this card has no bf16", expected="fp32 or bf16", fix="Give --precision fp32"
        )
    return Subject(spec, root, seen, plan, has_weights, device, _head_autocast(spec, plan, seen, autocast))


def _labels(spec: BenchSpec) -> tuple[str, ...]:
    is_classes = spec.task in ("sequence-classification", "token-classification")
    return inspect_labels(spec.data.spec(), spec.task) if spec.data and is_classes else ()


def _plan_without(seen: Survey, wanted: PacaSpec) -> SurgeryPlan:
    """The plan for an architecture without a checkpoint."""
    parameters = seen.model.named_parameters(remove_duplicate=False)
    stored = {name: Stored(name, dtype_name(p.dtype), tuple(p.shape)) for name, p in parameters}
    plan = plan_model(seen.model, wanted, stored, {}, task=seen.task, heads=seen.heads)
    return replace(plan, config=dict(seen.config_changes))


def _head_autocast(spec: BenchSpec, plan: SurgeryPlan, seen: Survey, autocast: str) -> str:
    """Heads train in fp32, as in our runs: beside 16-bit weights that needs autocast."""
    dtype = DTYPES[spec.dtype] if spec.dtype else config_dtype(seen.config)
    return "bf16" if plan.whole and dtype == torch.bfloat16 else autocast


def build(subject: Subject, seed: int = 0) -> Any:
    """The plain model on the CPU: the checkpoint's weights, or drawn ones; what is new is drawn by the seed."""
    dtype = DTYPES[subject.spec.dtype] if subject.spec.dtype else None
    with torch.random.fork_rng(), quiet_loading():
        torch.manual_seed(seed)
        model = (
            load_base_model(subject.root, subject.plan, dtype=dtype) if subject.has_weights else _drawn(subject, dtype)
        )
    if subject.device == "cpu" and model.dtype == torch.float16:
        model = model.float()
    set_dropout(model, subject.spec.dropout)
    model.config.use_cache = False
    for name in subject.shared().whole:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    return model


def set_dropout(model: nn.Module, rate: float) -> None:
    """One rate of dropout wherever a model has any; whole layers are never dropped."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in [name for name, value in vars(module).items() if isinstance(value, float)]:
            if name == "layerdrop" or name.endswith("dropout"):  # functional dropout, as transformers' classes hold it
                setattr(module, name, 0.0 if name == "layerdrop" else rate)


def _drawn(subject: Subject, dtype: torch.dtype | None) -> Any:
    config = configured(read_config(subject.root), subject.plan.config)
    kind = dtype or config_dtype(config) or torch.float32
    return class_for(config, subject.seen.task)._from_config(config, dtype=kind)  # noqa: SLF001


# --- a method on it


@dataclass
class Contender:
    """One method's model, ready to train."""

    entry: Entry
    model: Any
    subject: Subject
    optimizer: torch.optim.Optimizer | None
    steps_done: int = 0

    def loss(self, batch: Batch) -> Tensor:
        """The forward pass."""
        with self.subject.computing():
            loss: Tensor = self.model(**batch).loss
        return loss

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward, clipping and optimizer, as a trainer does it."""
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer:
            parameters = self.optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps_done += 1
            if self.entry.settings.get("resample"):
                resample(self.model, self.optimizer, step=self.steps_done)
        return loss.detach()


def enter(
    subject: Subject, entry: Entry, base: Any, *, rate: float = 1e-4, seed: int = 0, in_place: bool = False
) -> Contender:
    """A method on a copy of the plain model, ready to train. Raises: RequestError, UnsupportedError."""
    model = put_on(subject, entry, base, seed=seed, in_place=in_place).train()
    if subject.spec.lean:
        rewrite(model, kernels=choose_kernels(subject.device))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = subject.spec.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True) if trained(model) else None
    return Contender(entry, model, subject, optimizer if entry.variant.name != "floor" else None)


def put_on(subject: Subject, entry: Entry, base: Any, *, seed: int = 0, in_place: bool = False) -> Any:
    """A method on a copy of the plain model (or, `in_place`, on itself), on the device."""
    kind = held_as(entry, subject.spec)
    plain = base if in_place else copy.deepcopy(base)
    if not kind:
        plain = plain.to(subject.device)
    with explained(entry.name):
        model = entry.variant.attach(plain, subject.shared(seed, kind), entry.settings)
    model = model.to(subject.device)  # packed on the CPU, whatever it computes on
    if subject.spec.checkpointing:
        _checkpoint(plain)
    return model


def _checkpoint(plain: Any) -> None:
    try:
        set_checkpointing(plain, on=True)
    except ValueError as error:
        raise UnsupportedError("--checkpointing", str(error), expected="a model that has it") from error
    keep_inputs_frozen(plain)


# --- batches


@dataclass(frozen=True)
class Feed:
    """Where batches come from: a data set, or drawn tokens where `prepared` is None."""

    subject: Subject
    prepared: Prepared | None

    def batches(self, seed: int, count: int) -> Iterator[Batch]:
        """So many training batches, the same for the same seed; each epoch has an order of its own."""
        if self.prepared is None:
            yield from (draw(self.subject, seed * 1_000_003 + number % RANDOM_BATCHES) for number in range(count))
            return
        rows, size = self.prepared.train, self.subject.spec.batch
        generator = torch.Generator().manual_seed(seed)
        left = count
        while left:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, min(len(rows), left * size), size):
                yield self._collate(rows, order[start : start + size])
                left -= 1

    def eval_batches(self) -> Iterator[Batch]:
        """The evaluation set in its order."""
        assert self.prepared is not None  # noqa: S101
        assert self.prepared.eval is not None  # noqa: S101
        rows, size = self.prepared.eval, 4 * self.subject.spec.batch
        for start in range(0, len(rows), size):
            yield self._collate(rows, list(range(start, min(start + size, len(rows)))))

    def _collate(self, rows: Any, numbers: list[int]) -> Batch:
        assert self.prepared is not None  # noqa: S101
        return to_device(self.prepared.collator([rows[number] for number in numbers]), self.subject.device)


def to_device(batch: Mapping[str, Any], device: str) -> Batch:
    """A batch's tensors on the device."""
    return {name: value.to(device) for name, value in batch.items()}


def open_feed(subject: Subject, *, data: Any = None) -> Feed:
    """The data of the specification (or others) as batches. Raises: DataError, RequestError for too long a sequence."""
    spec = subject.spec
    section = data or spec.data
    if section is None:
        limit = max_positions(subject.seen.config.to_dict())
        if limit and spec.sequence > limit:
            raise RequestError(
                "--sequence", f"{spec.sequence} tokens", expected=f"at most {limit}, the model's positions"
            )
        return Feed(subject, None)
    tokenizer = read_tokenizer(subject.root)
    return Feed(subject, prepare(section.spec(), task=subject.seen.task, tokenizer=tokenizer, labels=subject.labels))


def calibration(subject: Subject, select: str, rows: int, seed: int, device: str) -> list[Batch]:
    """Batches of the training set (or drawn ones) to choose columns by, on the device."""
    if "feed" not in subject.held:
        subject.held["feed"] = open_feed(subject)
    feed: Feed = subject.held["feed"]
    if feed.prepared is None:
        found = list(feed.batches(seed, RANDOM_BATCHES))
    else:
        found = draw_batches(feed.prepared, rows=rows, select=select, seed=seed)
    return [to_device(batch, device) for batch in found]


def draw(subject: Subject, seed: int) -> Batch:
    """Drawn tokens without padding, and labels."""
    spec, config, task = subject.spec, subject.seen.config, subject.seen.task
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (spec.batch, spec.sequence), generator=generator)
    labels = ids
    if task == "regression":
        labels = torch.rand(spec.batch, generator=generator)
    elif task == "sequence-classification":
        labels = torch.randint(0, config.num_labels, (spec.batch,), generator=generator)
    elif task == "token-classification":
        labels = torch.randint(0, config.num_labels, ids.shape, generator=generator)
    return to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, subject.device)


def tokens_of(batch: Batch) -> int:
    """Tokens without padding: of an encoder-decoder those that it reads."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()
