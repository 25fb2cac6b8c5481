"""The model that a run would train, without storage: from config.json, a plan, or a model with a method on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.acceleration import FLASH, is_large, set_heads, switch_attention
from surgery.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint
from surgery.combinations import facts
from surgery.combinations import require as require_together
from surgery.compat import config_dtype, input_embeddings, memory_names
from surgery.errors import require_known
from surgery.experts import require_layers, usual_experts
from surgery.generate import max_positions
from surgery.lean_pass import rewrite
from surgery.memory.dry import DryModel, dry_model, without_values
from surgery.memory.lora import LoraLayer, attach_lora
from surgery.memory.run import FULL, LORA, METHODS, Run
from surgery.memory.step import DTYPES
from surgery.operate import attach_plan
from surgery.paca_layers import layers as paca_layers
from surgery.plan import Stored, SurgeryPlan
from surgery.planning import plan_checkpoint, plan_model
from surgery.quantized import quantize
from surgery.survey import Survey, TaskSpec, own_task, read_config, survey
from surgery.table import held_text
from surgery.tensorfile import FLOAT_DTYPES, TORCH_NAMES, dtype_name


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
    seen = survey(root, TaskSpec(plan.task, plan.labels), takes_4bit=plan.quantization is not None)
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
