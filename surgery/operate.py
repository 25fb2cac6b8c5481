"""Plan, attach, collect: the surgery itself, on a checkpoint's files and on a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from surgery.adapter import Adapter, find_base, find_model, fresh_delta, open_adapter, write_adapter
from surgery.checkpoint import Checkpoint
from surgery.choosing import carried, choose, choose_live, classes_in_data, looks, require_data
from surgery.columns import resample_steps
from surgery.compat import TRANSFORMERS_5, base_prefix, forget_quantizer, memory_names, quiet_loading, settle_quantizer
from surgery.delta import ColumnDelta, Delta, WholePatch, require_backbone
from surgery.errors import CheckError, DamagedError, RequestError, ResourceError, UnsupportedError
from surgery.experts import expert_name, lane_groups, usual_experts
from surgery.lean_pass import restore
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.manifest import Base, Manifest, relative_path
from surgery.methods.paca_files import fresh_live
from surgery.methods.paca_spec import PacaSpec
from surgery.plan import Quantization, Stored, SurgeryPlan
from surgery.planning import plan_checkpoint, plan_model, trainable_names
from surgery.quantized import (
    KINDS,
    forbid_saving,
    hold_layer,
    hold_live,
    is_quantized,
    kind_of,
    let_live,
    live_dtypes,
    permit_saving,
    quantize,
)
from surgery.quantized_base import require_package, stored_weight
from surgery.resampling import resample_model
from surgery.sharding import settle, whole
from surgery.survey import TASKS, TaskSpec, class_for, configured, find_heads, own_architecture, read_config
from surgery.tensorfile import dtype_name, tensor_bytes, torch_dtype
from surgery.writing import CheckpointWriter, require_apart

STATE = "surgery_state"
ALIGNED_BYTES = 64


@dataclass
class AttachedState:
    """What an attached model remembers: its plan, the base's values, what was trainable before.

    `originals`: of whole tensors, by parameter; `columns`: of trained columns, by module, as the base's file has them
    (empty without a file) - the model may hold them in another dtype; `held`: what layers were that came packed and do
    not train, by name.
    """

    plan: SurgeryPlan
    originals: dict[str, Tensor] = field(default_factory=dict)
    trainable_before: tuple[str, ...] = ()
    columns: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, type[nn.Module]] = field(default_factory=dict)


# --- applying to a folder


def apply(
    model: str | Path,
    out: str | Path,
    spec: Any = None,
    *,
    task: TaskSpec | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Plan a surgery on a model folder or hub id and write a fresh adapter folder, which changes nothing yet.

    spec: PacaSpec (the default, as it stands) or ReadSpec.
    Raises: see plan_checkpoint; OutputExistsError; ResourceError.
    """
    root, base = find_model(model)
    require_apart(Path(out), [root])
    checkpoint = Checkpoint.open(root)
    plan = _planned(checkpoint, spec or PacaSpec(), task or TaskSpec())
    if plan.quantization:
        require_package(plan.quantization.kind)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        plan, choice = choose(checkpoint, plan, load_base_model)
        delta = fresh_delta(checkpoint, plan, choice)
        if base.path:
            base = Base(path=relative_path(root, Path(out)))
        return write_adapter(writer.path, Path(out), checkpoint, delta, Manifest(base))


def _planned(checkpoint: Checkpoint, spec: Any, task: TaskSpec) -> SurgeryPlan:
    """The plan, with the classes of the data that will be looked at where a new head is given none."""
    plan = plan_checkpoint(checkpoint, spec, task)
    labels = task.labels or classes_in_data(plan)
    return plan if labels == task.labels else plan_checkpoint(checkpoint, spec, TaskSpec(plan.task, labels))


def replanned(adapter: Adapter, checkpoint: Checkpoint, task: TaskSpec) -> Delta:
    """A fresh adapter's state for another task. Columns that were chosen by looking are the same ones."""
    plan = adapter.plan
    spec = lookup(METHODS, plan.method, "--method").spec_type(**plan.spec)
    if not isinstance(adapter.delta, ColumnDelta) or not looks(plan):
        return fresh_delta(checkpoint, plan_checkpoint(checkpoint, spec, task))
    layers = PacaSpec(rank=1, targets=spec.targets, exclude=spec.exclude, seed=spec.seed, rows=spec.rows)
    return fresh_delta(checkpoint, *carried(adapter.delta, plan_checkpoint(checkpoint, layers, task)))


def plan_in_full(checkpoint: Checkpoint, spec: Any, task: TaskSpec) -> SurgeryPlan:
    """The plan that `apply` would carry out: where a budget is spread by scores, weights or data are looked at.

    Raises: as `apply`; nothing is written.
    """
    plan = _planned(checkpoint, spec, task)
    if looks(plan):
        require_data(PacaSpec(**plan.spec))
    return choose(checkpoint, plan, load_base_model)[0] if plan.spec.get("budget") else plan


# --- a model in memory


def require_memory(root: Path, dtype: torch.dtype | None, held: Quantization | None = None) -> None:
    """The weights fit into the memory that is free; what is quantized at load is read from a mapped file.

    Raises: ResourceError.
    """
    checkpoint = Checkpoint.open(root)
    packed = set(held.layers.values()) if held and not held.is_stored and dtype is None else set()
    infos = [info for name, info in checkpoint.items() if name not in packed]
    needed = sum(tensor_bytes(dtype_name(dtype) if dtype else info.dtype, info.shape) for info in infos)
    needed += sum(KINDS[held.kind].size_bytes(*checkpoint[name].shape) for name in packed) if held else 0
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            str(root),
            f"{free:,} bytes of memory are free",
            expected=f"{needed:,} bytes for the weights",
            fix="Use a machine with more; export and verify --no-numeric need a few tens of MB only",
        )


def load_base_model(root: Path, plan: SurgeryPlan, *, dtype: torch.dtype | None = None) -> Any:
    """The base under the plan's class, on the CPU, in the checkpoint's dtype or in `dtype`.

    Raises: DamagedError; BaseMismatchError where the plan names the whole base and this is another.
    """
    config = configured(read_config(root, takes_4bit=True), plan.config)
    model_class = class_for(config, plan.task)
    held = plan.quantization
    if held:
        require_package(held.kind)
    require_memory(root, dtype, held)
    require_backbone(Checkpoint.open(root), plan)
    wanted = {"dtype" if TRANSFORMERS_5 else "torch_dtype": dtype or "auto"}
    with quiet_loading():
        model, info = model_class.from_pretrained(
            root, config=config, output_loading_info=True, ignore_mismatched_sizes=bool(plan.whole), **wanted
        )
    whole = {target.parameter for target in plan.whole}
    lost = [name for name in info["missing_keys"] if name not in whole]
    lost += [entry[0] for entry in info["mismatched_keys"] if entry[0] not in whole]
    if lost:
        raise DamagedError(
            str(root),
            f"{len(lost)} tensors did not load, first {min(lost)}",
            expected="a whole checkpoint",
            fix="Fetch it again",
        )
    if held:
        checkpoint = Checkpoint.open(root)
        stored = {w: stored_weight(checkpoint, w) if held.is_stored else checkpoint[w] for w in held.layers.values()}
        _hold_quantized(model, held, {name: torch_dtype(stored[w].dtype) for name, w in held.layers.items()})
    align(model)
    return model


def _hold_quantized(model: Any, held: Quantization, dtypes: Mapping[str, torch.dtype]) -> None:
    """Quantize what the plan says, or take what the files hold so as it is. dtypes: of each layer, the file's.

    Raises: DamagedError.
    """
    if not held.is_stored:
        quantize(model, held.kind, dtypes)
        return
    forget_quantizer(model)
    packed = {name for name, module in model.named_modules() if is_quantized(module)}
    if packed != set(held.layers):
        found = f"{len(packed ^ set(held.layers))} layers are quantized otherwise than planned"
        raise DamagedError("base", found, expected=f"{len(held.layers)} quantized layers")
    for name, dtype in dtypes.items():
        hold_layer(model.get_submodule(name), dtype)


def align(model: nn.Module) -> None:
    """Move parameters that do not begin at a multiple of 64 bytes, as in a mapped file, to memory of their own.

    Where a tensor begins decides, on some processors, in which order a product is summed: two models of equal weights
    would differ in the last bit.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNED_BYTES:
            parameter.data = parameter.data.clone()


def attach(model: nn.Module, spec: Any = None, *, calibration: Iterable[Mapping[str, Any]] = ()) -> SurgeryPlan:
    """Open a model in place: what the spec's method trains, and a task's head; all else is frozen.

    spec: PacaSpec (the default, as it stands) or ReadSpec. calibration: batches that the model is called with, for
    columns chosen by inputs or gradients. Returns the plan.
    Raises: SelectorError, UnsupportedError; RequestError when the model is attached already, or batches are missing.
    """
    _require_plain(model)
    task = _live_task(model)
    heads = find_heads(model, has_head=TASKS[task].has_head)
    stored = {
        n: Stored(n, dtype_name(p.dtype), tuple(p.shape)) for n, p in model.named_parameters(remove_duplicate=False)
    }
    parts = usual_experts(model, lambda weight: dtype_name(weight.dtype))
    stored = {name: entry for name, entry in stored.items() if name not in parts}
    held = _held_live(model, stored)
    plan = plan_model(model, spec or PacaSpec(), stored, {}, task=task, heads=heads, parts=parts, held=held)
    return attach_chosen(model, plan, calibration)


def attach_chosen(model: nn.Module, plan: SurgeryPlan, calibration: Iterable[Mapping[str, Any]]) -> SurgeryPlan:
    """Carry out a new plan on a model in memory, its columns chosen first. Returns the plan that this gave."""
    plan, choice = choose_live(model, plan, calibration)
    delta = None
    if choice:
        held = {w.parameter: model.get_parameter(w.parameter).detach().cpu() for w in plan.whole}
        whole = {name: WholePatch(value.float(), value.clone()) for name, value in held.items()}
        delta = fresh_live(model, plan, whole, choice)
    _hold_as_planned(model, plan)
    attach_plan(model, plan, delta)
    return plan


def _hold_as_planned(model: nn.Module, plan: SurgeryPlan) -> None:
    """Quantize the layers of a dense model that its plan says are held so."""
    names = plan.quantization.layers if plan.quantization else ()
    if plan.quantization and not any(is_quantized(model.get_submodule(name)) for name in names):
        require_package(plan.quantization.kind)
        _hold_quantized(model, plan.quantization, {n: model.get_parameter(f"{n}.weight").dtype for n in names})


def resample(model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> bool:
    """Let other columns train where the plan says so: to be called after each optimizer step, of which `step` is done.

    Returns whether columns were drawn. Raises: RequestError for a plain model, or a plan without `resample`.
    """
    plan = state_of(model).plan
    every = resample_steps(plan.spec.get("resample", ""))
    if not every:
        raise RequestError("resample", "the plan draws no columns anew", expected="PacaSpec(resample='every:500')")
    groups, seed = lane_groups(plan), plan.spec["seed"]
    return resample_model(model, optimizer, groups=groups, every=every, seed=seed, step=step)


def _held_live(model: nn.Module, stored: dict[str, Stored]) -> Quantization | None:
    """How a live model holds its weights; the quantized ones are entered into `stored` as what they stand for.

    Raises: UnsupportedError for several kinds, or one that is not known.
    """
    packed: dict[str, Any] = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not packed:
        return None
    kinds = sorted({kind_of(module) for module in packed.values()})
    if len(kinds) > 1:
        raise UnsupportedError("attach", f"weights of {' and '.join(kinds)}", expected="one kind of quantization")
    for name, dtype in live_dtypes(model).items():
        shape = (packed[name].out_features, packed[name].in_features)
        stored[f"{name}.weight"] = Stored(f"{name}.weight", dtype_name(dtype), shape)
    return Quantization(kinds[0], is_stored=False, layers={name: f"{name}.weight" for name in packed})


def _live_task(model: nn.Module) -> str:
    config: Any = model.config if hasattr(model, "config") else None
    if config is None:
        return "features"
    name = type(model).__name__
    if name.endswith("ForSequenceClassification") and config.problem_type == "regression":
        return "regression"
    return next((task for task, entry in TASKS.items() if name in entry.architectures.values()), "features")


def _require_plain(model: nn.Module) -> None:
    if hasattr(model, STATE):
        raise RequestError("attach", "the model is attached already", expected="a plain model", fix="Call detach first")


def attach_plan(model: nn.Module, plan: SurgeryPlan, delta: Delta | None) -> None:
    """Carry out a plan on a model in memory, with an adapter's values if given.

    Raises: BaseMismatchError, CheckError.
    """
    _require_plain(model)
    method = lookup(METHODS, plan.method, "--method")
    before = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    originals = (
        {name: patch.original for name, patch in delta.whole.items() if patch.original is not None}
        if delta
        else {w.parameter: model.get_parameter(w.parameter).detach().cpu().clone() for w in plan.whole}
    )
    columns = {m: p.original for m, p in delta.patches.items()} if isinstance(delta, ColumnDelta) else {}
    opened = {target.module for target in plan.targets}
    frozen = {name: dtype for name, dtype in live_dtypes(model).items() if name not in opened}
    model.requires_grad_(requires_grad=False)
    method.attach(model, plan, delta)
    _open_whole(model, plan, delta)
    setattr(model, STATE, AttachedState(plan, originals, before, columns, hold_live(model, frozen)))
    if plan.quantization:
        forbid_saving(model)
    require_contract(model, plan)


@torch.no_grad()
def _open_whole(model: nn.Module, plan: SurgeryPlan, delta: Delta | None) -> None:
    for target in plan.whole:
        parameter = model.get_parameter(target.parameter)
        if delta:
            parameter.copy_(delta.whole[target.parameter].values)
        parameter.requires_grad_()


def require_contract(model: nn.Module, plan: SurgeryPlan) -> None:
    """What trains is exactly what the plan says. Raises: CheckError."""
    expected = trainable_names(plan)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found != expected:
        difference = sorted(found ^ expected)
        raise CheckError(
            "attach",
            f"{len(difference)} parameters differ from the plan, first {difference[0]}",
            expected="exactly the planned parameters to be trainable",
        )


def state_of(model: nn.Module) -> AttachedState:
    """What an attached model remembers. Raises RequestError for a plain one."""
    if not hasattr(model, STATE):
        raise RequestError("model", "it is not attached", expected="a model given to surgery.attach or made by load")
    state: AttachedState = getattr(model, STATE)
    return state


def collect(model: nn.Module) -> Delta:
    """What training has changed so far; of a sharded model every rank's rows, and all ranks collect together.

    Raises: RequestError, DamagedError where values are not finite.
    """
    state = state_of(model)
    settle(model)
    heads = {
        w.parameter: WholePatch(whole(model.get_parameter(w.parameter)).clone(), state.originals.get(w.parameter))
        for w in state.plan.whole
    }
    method = lookup(METHODS, state.plan.method, "--method")
    delta: Delta = method.collect(model, state.plan, heads, state.columns)
    return delta


def detach(model: nn.Module, *, merge: bool) -> nn.Module:
    """A plain model again, in place: with the trained columns (`merge`), or with the base's. Returns it."""
    state = state_of(model)
    restore(model)
    lookup(METHODS, state.plan.method, "--method").detach(model, merge=merge)
    let_live(model, state.held)
    permit_saving(model)
    if merge and state.plan.quantization:
        settle_quantizer(model)
    if not merge:
        with torch.no_grad():
            for name, original in state.originals.items():
                model.get_parameter(name).copy_(original)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)
    delattr(model, STATE)
    return model


def load(folder: str | Path, *, trainable: bool = False, base: str | Path | None = None) -> Any:
    """Base and adapter as one model: in eval mode for inference, or ready to train on.

    Raises: NotAModelError, DamagedError, BaseMismatchError.
    """
    adapter = open_adapter(folder)
    model = load_attached(adapter, base)
    if not trainable:
        model.requires_grad_(requires_grad=False)
        model.eval()
    return model


def load_attached(adapter: Adapter, base: str | Path | None = None) -> Any:
    """The base with an adapter's plan carried out on it, trainable."""
    model = load_base_model(find_base(adapter.record, adapter.folder, base), adapter.plan)
    attach_plan(model, adapter.plan, adapter.delta)
    return model


def save(model: nn.Module, out: str | Path, *, base: str | Path, overwrite: bool = False) -> Adapter:
    """Write an attached model's columns as an adapter folder. `base`: the folder or hub id the model was loaded from.

    Raises: BaseMismatchError where the base's columns are not those the model started from; OutputExistsError.
    """
    root, origin = find_model(base)
    require_apart(Path(out), [root])
    checkpoint = Checkpoint.open(root)
    delta = _bind(collect(model), model, checkpoint)
    if origin.path:
        origin = Base(path=relative_path(root, Path(out)))
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        return write_adapter(writer.path, Path(out), checkpoint, delta, Manifest(origin))


def _bind(delta: Delta, model: nn.Module, checkpoint: Checkpoint) -> Delta:
    """The same delta tied to a checkpoint's files by name, dtype and digest."""
    names = memory_names(model, checkpoint)
    disk = {m.name: name for name, m in names.items() if m.is_verbatim}
    disk |= {expert_name(m.name, m.place): name for name, m in names.items() if m.place}
    prefix = f"{base_prefix(model)}." if any(m.is_prefixed for m in names.values()) else ""
    whole_targets, whole = [], {}
    for target in delta.plan.whole:
        weight = disk.get(target.parameter)
        original = checkpoint.read_tensor(weight) if weight else None
        digest = checkpoint.sha256(weight) if weight else ""
        whole_targets.append(replace(target, weight=weight or target.parameter, sha256=digest))
        whole[target.parameter] = WholePatch(delta.whole[target.parameter].values, original)
    config = _live_config(model, checkpoint, delta.plan)
    plan = replace(delta.plan, whole=tuple(whole_targets), prefix=prefix, config=config)
    bound: Delta = lookup(METHODS, plan.method, "--method").bind(replace(delta, plan=plan), checkpoint, disk, whole)
    return bound


def _live_config(model: nn.Module, checkpoint: Checkpoint, plan: SurgeryPlan) -> dict[str, Any]:
    """The entries of config.json that a live task model has otherwise than its base."""
    config: Any = model.config
    if not plan.whole or own_architecture(read_config(checkpoint.root, takes_4bit=True)) == plan.architecture:
        return {}
    labels = {"id2label": {str(k): v for k, v in config.id2label.items()}, "label2id": dict(config.label2id)}
    optional = {"problem_type": config.problem_type, "pad_token_id": config.pad_token_id}
    return {"architectures": [plan.architecture], **labels, **{k: v for k, v in optional.items() if v is not None}}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and the former modes of all its parts again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[0][1])
        for module, was_training in modes:
            module.training = was_training
