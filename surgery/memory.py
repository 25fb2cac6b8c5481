"""How much memory a training run needs on each device, predicted from config.json: no weight is read, none allocated.

Counted are weights, what trains and its originals, gradients, AdamW's moments, what the forward pass keeps for the
backward pass, and what else lives at the step's peak (`surgery.saved` runs one to see). Not counted are what operators
free before they return, kernels' workspace, what an allocator cannot use, and the device's own context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.acceleration import FLASH, is_large, set_heads, switch_attention
from surgery.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from surgery.combinations import facts
from surgery.combinations import require as require_together
from surgery.compat import config_dtype, input_embeddings, memory_names
from surgery.errors import RequestError, counted, require_known
from surgery.experts import require_layers, usual_experts
from surgery.generate import max_positions
from surgery.images import TASK as IMAGES
from surgery.lean_pass import rewrite
from surgery.operate import attach_plan
from surgery.paca_layers import layers as paca_layers
from surgery.plan import Stored, SurgeryPlan
from surgery.planning import plan_checkpoint, plan_model
from surgery.quantized import quantize
from surgery.saved import (
    DTYPES,
    DryModel,
    LoraLayer,
    Step,
    attach_lora,
    dry_model,
    saved_by_all,
    temporary,
    without_values,
)
from surgery.survey import Survey, TaskSpec, own_task, read_config, survey
from surgery.table import align, held_text, size_text
from surgery.tensorfile import FLOAT_DTYPES, TORCH_NAMES, dtype_name

FULL, LORA = "full", "lora"
METHODS = ("paca", "read", LORA, FULL)
MOMENTS = 2  # of AdamW, in the dtype of what trains
STEP_BYTES = 4  # of AdamW's count of steps, a tensor for each parameter
MASTER_BYTES = 4
GUESSES_FROM, GUESSES_TO = 3, 12  # so many lengths are tried before a parabola is believed, and so long
ADDED = {"paca": "columns", "read": "side network", LORA: "adapters", FULL: "added"}
NOT_COUNTED = (
    "counted are tensors, those that live for a moment too; not counted: kernels' workspace, the allocator's gaps, the "
    "device's context"
)
FURTHEST = 1 << 22  # tokens; where positions set no limit, no longer sequence is tried


@dataclass(frozen=True)
class Sharding:
    """How a run's tensors are divided among its devices.

    weights, gradients, optimizer: each device holds its part. buckets: gradients are copied into buckets to be summed.
    master: the optimizer keeps an fp32 copy of what trains. gathers: a layer's weights are put together to run it.
    offloaded: the parts that `cpu_offload` keeps in the CPU's memory.
    """

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    buckets: bool = False
    master: bool = False
    gathers: bool = False
    offloaded: tuple[str, ...] = ()


STATE = ("weights", "columns", "gradients", "optimizer")
SHARDINGS = {
    sharding.name: sharding
    for sharding in (
        Sharding("none"),
        Sharding("ddp", buckets=True),
        Sharding("fsdp2", weights=True, gradients=True, optimizer=True, gathers=True, offloaded=STATE),
        Sharding("zero2", gradients=True, optimizer=True, master=True, offloaded=("gradients", "optimizer")),
        Sharding("zero3", weights=True, gradients=True, optimizer=True, master=True, gathers=True, offloaded=STATE),
    )
}


@dataclass(frozen=True)
class Run:
    """What is to be run, on how many devices.

    batch: sequences of one forward on each device; target: tokens of an encoder-decoder's output, 0 for as many as of
    its input; dtype: of the weights, fp32, bf16, fp16 or empty for the checkpoint's own; precision: of the computation,
    as in a recipe; padded: rows differ in length; attention, cpu_offload: as in a recipe; lean: off, on, or auto for
    what can be lean, if anything, in a run of the size that gains by it.
    """

    batch: int = 8
    sequence: int = 1024
    target: int = 0
    padded: bool = False
    dtype: str = ""
    precision: str = "auto"
    device: str = "cpu"
    devices: int = 1
    sharding: str = ""
    checkpointing: bool = False
    attention: str = "auto"
    cpu_offload: bool = False
    lean: str = "off"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "devices"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name}", str(getattr(self, name)), expected="at least 1")
        if self.target < 0:
            raise RequestError("--target-sequence", str(self.target), expected="at least 1")
        for option, found, known in (
            ("--dtype", self.dtype, ("", *DTYPES)),
            ("--precision", self.precision, ("auto", *DTYPES)),
            ("--device", self.device, ("cpu", "cuda")),
            ("--sharding", self.sharding, ("", *SHARDINGS)),
            ("--lean", self.lean, ("off", "on", "auto")),
        ):
            if found or "" not in known:
                require_known(option, found, [name for name in known if name])
        if not self.sharding:
            object.__setattr__(self, "sharding", "none" if self.devices == 1 else "ddp")
        if (self.sharding == "none") != (self.devices == 1):
            many = ", ".join(name for name in SHARDINGS if name != "none")
            expected = "more than one" if self.devices == 1 else f"one of {many}"
            found = f"{self.sharding} with {self.devices} device{'s' * (self.devices > 1)}"
            fix = "Say with --devices how many there are" if self.devices == 1 else ""
            raise RequestError("--sharding", found, expected=expected, fix=fix)
        offload = {"train.cpu_offload": self.cpu_offload}
        require_together(facts({"train.attention": self.attention, "train.device": self.device, **offload}))
        require_together(facts({"train.strategy": self.sharding, **offload}))  # whatever the device: it is only planned


@dataclass(frozen=True)
class Tensor:
    """One parameter or buffer. `is_added`: no weight of the base, but what the method put there."""

    shape: tuple[int, ...]
    itemsize: int
    layer: str
    is_trained: bool
    is_added: bool

    def values(self, parts: int = 1) -> int:
        """The values that the first of so many devices holds: rows are divided, the last devices have fewer."""
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / parts) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Subject:
    """A model with a method in it, without storage: what one run and the next have in common."""

    dry: DryModel
    tensors: tuple[Tensor, ...]
    architecture: str
    method: str
    trained_values: int
    dtype: str
    autocast: str
    positions: int | None
    held: str = ""
    lean: str = ""


@dataclass(frozen=True)
class Prediction:
    """Bytes on each device. `longest`: the longest sequence that fits `fit_bytes`, 0 where none does (images: None).

    lean: what is lean, in words (empty where nothing is).
    """

    architecture: str
    method: str
    trained_values: int
    dtype: str
    autocast: str
    run: Run
    parts: Mapping[str, int]
    activations: Mapping[str, int]
    notes: tuple[str, ...]
    fit_bytes: int | None = None
    fits: bool | None = None
    longest: int | None = None
    positions: int | None = None
    is_of_images: bool = False
    lean: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + sum(self.activations.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the sum among them."""
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[str]:
        """A table for people, and what follows from it."""
        return _lines(self)


# --- the subject


def open_subject(root: Path, method: str, spec: Any, task: TaskSpec, run: Run) -> Subject:
    """The model that `run` would train, without storage. `spec`: the method's; of LoRA PaCA's, for its layers and rank.

    Raises: NotAModelError, SelectorError, UnsupportedError, DamagedError.
    """
    require_known("--method", method, METHODS)
    seen = survey(root, task, takes_4bit=method not in (FULL, LORA) and _has_weights(root))  # PEFT has a way of its own
    dtype = _weight_dtype(root, seen, run)
    plan = None if method == FULL else _plan(root, seen, spec, task, dtype, method=method)
    if method == LORA and plan:
        require_layers(plan, "--method lora")
    return _subject(seen, plan, method, dtype, run)


def open_planned(root: Path, plan: SurgeryPlan, run: Run) -> Subject:
    """The same for a plan that exists: an adapter's. Raises: as `open_subject`."""
    labels = plan.config.get("id2label", {})
    names = tuple(labels[key] for key in sorted(labels, key=int))
    task = TaskSpec(plan.task, () if plan.task == "regression" else names)
    seen = survey(root, task, takes_4bit=plan.quantization is not None)
    return _subject(seen, plan, plan.method, _weight_dtype(root, seen, run), run)


def open_attached(model: Any, seen: Survey, method: str, dtype: torch.dtype, run: Run) -> Subject:
    """The same for a model on the meta device that another method has been put on. Raises: UnsupportedError."""
    dry = dry_model(model, seen.task, seen.heads, dtype=dtype)
    lean = _make_lean(model, run)
    tensors = tuple(_tensors(dry))
    trained = sum(tensor.values() for tensor in tensors if tensor.is_trained)
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    return Subject(dry, tensors, seen.architecture, method, trained, kind, _autocast(run), _positions(model), lean=lean)


def _make_lean(model: Any, run: Run) -> str:
    """What was made lean, in words. Raises: UnsupportedError where it was asked for and nothing can be."""
    tokens = run.batch * min(run.sequence, _positions(model) or run.sequence)
    if run.lean == "off" or (run.lean == "auto" and not is_large(model, tokens)):
        return ""
    found = rewrite(model, is_required=run.lean == "on")
    return found.line() if found else ""


def _plan(root: Path, seen: Survey, spec: Any, task: TaskSpec, dtype: torch.dtype, *, method: str) -> SurgeryPlan:
    """The method's plan, from the files' headers; where there is config.json alone, for its own architecture's tensors.

    PEFT does not ask what a checkpoint holds: LoRA is planned as if it held everything.
    """
    if _has_weights(root) and method != LORA:
        return plan_checkpoint(Checkpoint.open(root), spec, task)
    is_own = method == LORA or seen.task == own_task(read_config(root))
    own = seen.model if is_own else survey(root, TaskSpec()).model
    held = dict(own.named_parameters(remove_duplicate=False))
    names = memory_names(seen.model, held)
    kind = dtype_name(dtype)
    parts = usual_experts(seen.model, lambda _weight: kind)
    present = {m.name: Stored(name, kind, tuple(held[name].shape)) for name, m in names.items()}
    stored = {name: entry for name, entry in present.items() if name not in parts}
    return plan_model(seen.model, spec, stored, {}, task=seen.task, heads=seen.heads, parts=parts)


def _has_weights(root: Path) -> bool:
    return any((root / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def _subject(seen: Survey, plan: SurgeryPlan | None, method: str, dtype: torch.dtype, run: Run) -> Subject:
    model: Any = seen.model
    if run.attention not in ("auto", FLASH):  # flash is what sdpa takes on a card by itself
        switch_attention(model, run.attention)
    dry = dry_model(model, seen.task, seen.heads, dtype=dtype)
    if plan is not None and plan.quantization:
        require_together(facts({"train.strategy": run.sharding, "held": plan.quantization.kind}))
    with without_values(dry.mode):
        if plan is not None and plan.quantization:
            quantize(model, plan.quantization.kind, dict.fromkeys(plan.quantization.layers, dtype), only_sizes=True)
        if plan is None:
            model.requires_grad_()
        elif method == LORA:
            attach_lora(model, {t.module: t.rank for t in plan.targets}, [t.parameter for t in plan.whole])
        else:
            attach_plan(model, plan, None)
        is_ours = plan is not None and method != LORA
        autocast = (_heads_in_fp32(model, plan, dtype) if is_ours else "") or _autocast(run)
    lean = _make_lean(model, run)
    dry = replace(dry, is_side=bool(plan and plan.stacks))
    tensors = tuple(_tensors(dry))
    trained = sum(tensor.values() for tensor in tensors if tensor.is_trained)
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    held = _held(plan, dtype) if plan and plan.quantization else ""
    return Subject(dry, tensors, seen.architecture, method, trained, kind, autocast, _positions(model), held, lean)


def _held(plan: SurgeryPlan, dtype: torch.dtype) -> str:
    """What quantizing the base saves: of its layers, and beside what is not quantized."""
    held = plan.quantization
    assert held is not None  # noqa: S101  the caller's question
    return f"the base is held as {held_text(held)}; all else of it, embeddings and heads too, in {dtype_name(dtype)}"


def _positions(model: Any) -> int | None:
    """How long a sequence may be: RoBERTa's kind counts positions from behind the padding's."""
    limit = max_positions(model.config.to_dict())
    words = input_embeddings(model)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words]
    skipped = [t.padding_idx + 1 for t in tables if t.num_embeddings == limit and t.padding_idx is not None]
    return limit - max(skipped, default=0) if limit is not None else None


def _weight_dtype(root: Path, seen: Survey, run: Run) -> torch.dtype:
    """What the weights have in training: what config.json says, else what the files do; on a CPU no fp16."""
    wanted = DTYPES[run.dtype] if run.dtype else config_dtype(seen.config)
    if wanted is None:
        infos = Checkpoint.open(root).values() if _has_weights(root) else ()
        kind = next((info.dtype for info in infos if info.dtype in FLOAT_DTYPES), "F32")
        wanted = getattr(torch, TORCH_NAMES[kind])
    return torch.float32 if run.device == "cpu" and wanted == torch.float16 else wanted


def _autocast(run: Run) -> str:
    if run.precision != "auto":
        return run.precision
    return "bf16" if run.device == "cuda" else "fp32"


def _heads_in_fp32(model: Any, plan: SurgeryPlan | None, dtype: torch.dtype) -> str:
    """Heads train in fp32, which beside 16-bit weights needs autocast: that, or the empty string."""
    if plan is None or not plan.whole or dtype == torch.float32:
        return ""
    set_heads(model, {target.parameter: torch.empty(target.shape, dtype=torch.float32) for target in plan.whole})
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def _tensors(dry: DryModel) -> Iterable[Tensor]:
    """Every parameter and buffer, once."""
    model = dry.model
    added = {id(p) for layer in paca_layers(model).values() for p in (layer.paca_original, layer.paca_columns)}
    for beside in (module for module in model.modules() if isinstance(module, LoraLayer)):
        added |= {id(p) for part in (beside.a, beside.b) for p in part.parameters()}
    is_full = all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_added = id(tensor) in added or (tensor.requires_grad and not is_full)
        yield Tensor(tuple(tensor.shape), tensor.itemsize, dry.layer_of(name), tensor.requires_grad, is_added)


# --- the sum


def predict(subject: Subject, run: Run, *, fit_bytes: int | None = None) -> Prediction:
    """Bytes on each device, and with `fit_bytes` whether that is enough and the longest sequence for which it is.

    Raises: RequestError for a sequence beyond the model's positions; UnsupportedError.
    """
    if subject.positions is not None and run.sequence > subject.positions:
        raise RequestError(
            "--sequence", f"{run.sequence} tokens", expected=f"at most {subject.positions}, the model's positions"
        )
    found = _predict(subject, run)
    if fit_bytes is None:
        return found
    if found.is_of_images:
        return replace(found, fit_bytes=fit_bytes, fits=found.total <= fit_bytes)
    longest = _longest(lambda tokens: _predict(subject, replace(run, sequence=tokens)).total, run, subject, fit_bytes)
    return replace(found, fit_bytes=fit_bytes, fits=found.total <= fit_bytes, longest=longest)


def _predict(subject: Subject, run: Run) -> Prediction:
    step = Step(run.batch, run.sequence, run.target, run.padded, subject.autocast, run.checkpointing, run.device)
    saved = saved_by_all(subject.dry, step)
    parts = _state(subject.tensors, SHARDINGS[run.sharding], run.devices, cpu_offload=run.cpu_offload)
    parts["temporary"] = temporary(subject.dry, step)
    return Prediction(
        subject.architecture, subject.method, subject.trained_values, subject.dtype, subject.autocast, run,
        parts, saved.kinds, _notes(subject, run), positions=subject.positions,
        is_of_images=subject.dry.task == IMAGES, lean=subject.lean,
    )  # fmt: skip


def _state(tensors: Sequence[Tensor], sharding: Sharding, devices: int, *, cpu_offload: bool = False) -> dict[str, int]:
    """What lives on a device between two steps, and the gradients."""

    def count(chosen: Iterable[Tensor], *, is_divided: bool, itemsize: int = 0) -> int:
        return sum(t.values(devices if is_divided else 1) * (itemsize or t.itemsize) for t in chosen)

    trained = [tensor for tensor in tensors if tensor.is_trained]
    gradients = count(trained, is_divided=sharding.gradients)
    optimizer = MOMENTS * count(trained, is_divided=sharding.optimizer) + STEP_BYTES * len(trained)
    if sharding.master:
        optimizer += count(trained, is_divided=True, itemsize=MASTER_BYTES)
    parts = {
        "weights": count((t for t in tensors if not t.is_added), is_divided=sharding.weights),
        "columns": count((t for t in tensors if t.is_added), is_divided=sharding.weights),
        "gradients": gradients,
        "optimizer": optimizer,
    }
    if sharding.buckets:
        parts["gradient buckets"] = gradients
    if sharding.gathers:
        parts["gathered weights"] = _gathered(tensors)
    return parts | (dict.fromkeys(sharding.offloaded, 0) if cpu_offload else {})


def _gathered(tensors: Sequence[Tensor]) -> int:
    """What is put together at once: all that is in no layer, a layer, and the next one, fetched meanwhile."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.values() * tensor.itemsize
    outside = sizes.pop("", 0)
    return outside + sum(sorted(sizes.values())[-2:])


def _longest(total: Callable[[int], int], run: Run, subject: Subject, fit_bytes: int) -> int:
    """The longest sequence that fits, 0 where a single token does not.

    The next to be tried is where a parabola through the last three says that the bytes are used up, as bytes are one of
    the length but for alignment; else twice the length, and halves between one that fits and one that does not.
    """
    end = subject.positions or FURTHEST
    low, high = 0, min(run.sequence, end)
    tried = [(high, total(high))]
    while tried[-1][1] <= fit_bytes:
        if high == end:
            return end
        further = _crossing(tried[-GUESSES_FROM:], fit_bytes) + 1 if _may_guess(tried) else 2 * high
        low, high = high, min(max(further, high + 1), end)
        tried.append((high, total(high)))
    while high - low > 1:
        middle = _crossing(tried[-GUESSES_FROM:], fit_bytes) if _may_guess(tried) else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        tried.append((middle, total(middle)))
        low, high = (middle, high) if tried[-1][1] <= fit_bytes else (low, middle)
    return low


def _may_guess(tried: Sequence[tuple[int, int]]) -> bool:
    return GUESSES_FROM <= len(tried) < GUESSES_TO


def _crossing(points: Sequence[tuple[int, int]], wanted: int) -> int:
    """The last length at which a parabola through three points is at most `wanted`."""
    (t0, y0), (t1, y1), (t2, y2) = points
    slope = (y1 - y0) / (t1 - t0)
    bend = ((y2 - y1) / (t2 - t1) - slope) / (t2 - t0)
    linear, offset = slope - bend * (t0 + t1), y0 - slope * t0 + bend * t0 * t1 - wanted
    root = linear * linear - 4 * bend * offset
    if root <= 0 or linear + math.sqrt(root) == 0:
        return (min(t0, t1, t2) + max(t0, t1, t2)) // 2
    return math.floor(-2 * offset / (linear + math.sqrt(root)))


# --- what people read


def _notes(subject: Subject, run: Run) -> tuple[str, ...]:
    """What the figures assume."""
    found = [subject.held] if subject.held else []
    if run.device == "cuda":
        found.append(
            "CUDA: flash attention where there is no mask and values have 16 bits, else the memory-efficient kernel, "
            "which keeps no scores either; masks of dropout have one byte a value"
        )
    if run.device == "cuda" and subject.autocast != "fp32":
        found.append("CUDA: what autocast leaves in fp32 is taken from the CPU's list, which is shorter for norms")
    if run.padded:
        found.append("rows are padded: attention holds a mask")
    if run.padded and run.attention == FLASH:
        found.append(f"{FLASH} takes the padding out, and keeps less than is said here")
    if subject.method == FULL and subject.dtype != "fp32":
        found.append(f"weights of {subject.dtype} train in it, and AdamW's moments have it too")
    if run.sharding not in ("none", "ddp"):
        found.append(f"{run.sharding} by arithmetic: rows are divided, all activations stay on their device")
    if run.cpu_offload:
        found.append(f"not on the device but in the CPU's memory: {', '.join(SHARDINGS[run.sharding].offloaded)}")
    return (*found, NOT_COUNTED)


def _lines(found: Prediction) -> list[str]:
    run = found.run
    many = f" on each of {run.devices} devices, {run.sharding}" if run.devices > 1 else ""
    compute = f", autocast {found.autocast}" if found.autocast != "fp32" else ""
    shape = f"{_batch(found)}, weights {found.dtype}{compute}, {run.device}{many}"
    names = {"columns": ADDED[found.method]}
    rows = [(names.get(name, name), size_text(size)) for name, size in found.parts.items() if size]
    kept = [(f"  {kind}", size_text(size)) for kind, size in found.activations.items() if size]
    total = size_text(sum(found.activations.values()))
    table = align([*rows, ("kept for backward", total), *kept, ("sum", size_text(found.total))], right=(1,))
    checkpointing = ", gradient checkpointing" * run.checkpointing + ", lean blocks" * bool(found.lean)
    head = f"{found.architecture}, {found.method}, {found.trained_values:,} trained values"
    notes = [f"note: {note}" for note in found.notes]
    return [head, f"{shape}{checkpointing}", "", *table, *_fit_lines(found), "", *notes]


def _batch(found: Prediction) -> str:
    run = found.run
    return counted(run.batch, "image") if found.is_of_images else f"{run.batch} x {run.sequence} tokens"


def _fit_lines(found: Prediction) -> list[str]:
    if found.fit_bytes is None:
        return []
    left = found.fit_bytes - found.total
    limit = size_text(found.fit_bytes)
    verdict = (
        f"fits {limit}: {size_text(left)} are left" if found.fits else f"does not fit {limit}: {size_text(-left)} lack"
    )
    if found.longest is None:
        return ["", verdict]
    if not found.longest:
        return ["", verdict, "not even one token fits: shard, take a smaller batch or another method"]
    is_all = " (all the model's positions)" if found.longest == found.positions else ""
    return ["", verdict, f"longest sequence that fits: {found.longest:,} tokens{is_all}"]


def brief_line(found: Prediction) -> str:
    """The short form, for `surgery apply --plan`."""
    run, kept = found.run, sum(found.activations.values())
    state = sum(size for name, size in found.parts.items() if name != "temporary")
    device = f"{run.device}, lean blocks," if found.lean else run.device
    return (
        f"a step of {_batch(found)} on {device} holds {size_text(found.total)}: "
        f"{size_text(state)} for weights, what trains, gradients and AdamW, {size_text(kept)} for the backward pass, "
        f"{size_text(found.parts['temporary'])} for a moment "
        "(`surgery plan` says more)"
    )
