"""Plan, attach, collect: the surgery itself, on a checkpoint's files and on a model in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, Checkpoint, path_inside, read_json
from surgery.columns import generator_seed
from surgery.compat import TRANSFORMERS_5, base_prefix, memory_names, quiet_loading
from surgery.delta import ADAPTER_FILE, ColumnDelta, ColumnPatch, WholePatch, bytes_sha256, read_delta, read_target
from surgery.errors import BaseMismatchError, CheckError, DamagedError, NotAModelError, RequestError, UnsupportedError
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.manifest import ADAPTER, Base, Manifest, Record, parse_record, read_document, relative_path, versions
from surgery.methods.paca import PacaSpec
from surgery.plan import SurgeryPlan, Target, WholeTarget
from surgery.select import LinearSite, find_sites, ranks_of, resolve
from surgery.survey import (
    TASKS,
    TaskSpec,
    class_for,
    configured,
    find_heads,
    list_untouched,
    new_parameters,
    own_architecture,
    read_config,
    survey,
    trace_groups,
)
from surgery.tensorfile import FLOAT_DTYPES, TensorInfo, dtype_name, file_sha256
from surgery.writing import CheckpointWriter, replace_file, require_apart, write_file

STATE = "surgery_state"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Stored:
    """Where a model's parameter lies in a file (or, without a file, in the live model): key, dtype, shape."""

    weight: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class AttachedState:
    """What an attached model remembers: its plan, the base's values, what was trainable before.

    `originals`: of whole tensors, by parameter; `columns`: of trained columns, by module, as the base's file has them
    (empty without a file) - the model may hold them in another dtype.
    """

    plan: SurgeryPlan
    originals: dict[str, Tensor] = field(default_factory=dict)
    trainable_before: tuple[str, ...] = ()
    columns: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read and checked."""

    folder: Path
    record: Record
    delta: ColumnDelta

    @property
    def plan(self) -> SurgeryPlan:
        return self.record.plan


# --- the base


def find_model(model: str | Path, *, revision: str | None = None) -> tuple[Path, Base]:
    """A model folder, or a hub id's snapshot (fetched if need be). Raises: NotAModelError."""
    text = str(model)
    if Path(text).is_dir():
        return Path(text), Base(path=text)
    looks_like_path = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") != 1
    if looks_like_path:
        raise NotAModelError(text, "no such folder", expected="a model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(text, revision=revision, allow_patterns=_HUB_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAModelError(
            text,
            f"no such folder, and the hub did not give it ({first_line[:160]})",
            expected="a model folder or a hub id such as org/name",
        ) from error
    return Path(folder), Base(hub_id=text, revision=Path(folder).name)


def find_base(record: Record, folder: Path, base: str | Path | None = None) -> Path:
    """The base of an adapter or merged folder: the one named, else the one recorded. Raises: BaseMismatchError."""
    if base is not None:
        return find_model(base)[0]
    recorded = record.manifest.base
    if recorded.hub_id:
        return find_model(recorded.hub_id, revision=recorded.revision)[0]
    path = folder / recorded.path
    if not recorded.path or not path.is_dir():
        found = f"its base {recorded.path!r} is not there"
        raise BaseMismatchError(str(folder), found, expected="the base's folder", fix="Name it with --base")
    return path.resolve()


# --- planning


def plan_checkpoint(checkpoint: Checkpoint, spec: PacaSpec, task: TaskSpec | None = None) -> SurgeryPlan:
    """The plan for a checkpoint, from its headers and a model on the meta device; no weight is read.

    Raises: SelectorError, UnsupportedError, NotAModelError, DamagedError.
    """
    seen = survey(checkpoint.root, task or TaskSpec())
    names = memory_names(seen.model, checkpoint)
    stored = {m.name: _stored(checkpoint[disk]) for disk, m in names.items() if m.is_verbatim}
    converted = {m.name: "changed by transformers on loading" for m in names.values() if not m.is_verbatim}
    prefix = f"{base_prefix(seen.model)}." if any(m.is_prefixed for m in names.values()) else ""
    plan = _plan_model(seen.model, spec, stored, converted, task=seen.task, heads=seen.heads)
    return replace(plan, architecture=seen.architecture, prefix=prefix, config=dict(seen.config_changes))


def _stored(info: TensorInfo) -> Stored:
    return Stored(info.name, info.dtype, info.shape)


def _plan_model(
    model: nn.Module,
    spec: PacaSpec,
    stored: Mapping[str, Stored],
    converted: Mapping[str, str],
    *,
    task: str,
    heads: tuple[str, ...],
) -> SurgeryPlan:
    sites = find_sites(model, heads)
    groups = trace_groups(model, sites)
    whole = _plan_whole(model, stored, converted, task=task, heads=heads)
    whole_names = {target.parameter for target in whole}
    candidates = [s for s in sites if f"{s.module}.weight" in stored and f"{s.module}.weight" not in whole_names]
    chosen = resolve(candidates, spec.targets, exclude=spec.exclude)
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    targets = tuple(_target(site, stored[f"{site.module}.weight"], ranks[site.module], groups) for site in chosen)
    touched = {f"{t.module}.weight": t for t in targets} | {w.parameter: w for w in whole}
    reasons = dict(converted) | {f"{s.module}.weight": "output head" for s in sites if s.is_head}
    reasons |= {f"{s.module}.weight": f"tied with {s.tied_with}" for s in sites if s.tied_with}
    reasons |= {f"{s.module}.weight": "not selected" for s in candidates if not s.is_head and not s.tied_with}
    untouched = list_untouched(model, touched, reasons)
    architecture = type(model).__name__
    return SurgeryPlan("paca", json.loads(json.dumps(asdict(spec))), architecture, task, targets, whole, untouched)


def _target(site: LinearSite, stored: Stored, rank: int, groups: Mapping[str, str]) -> Target:
    if stored.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            stored.weight,
            f"dtype {stored.dtype}",
            expected=f"one of {', '.join(FLOAT_DTYPES)}",
            fix=f"Leave it out with --exclude {site.module}",
        )
    target = Target(
        site.module,
        stored.weight,
        site.out_features,
        site.in_features,
        site.input_axis,
        stored.dtype,
        rank,
        groups[site.module],
    )
    if stored.shape != target.shape:
        raise DamagedError(stored.weight, f"shape {stored.shape}", expected=f"{target.shape}, by config.json")
    return target


def _plan_whole(
    model: nn.Module,
    stored: Mapping[str, Stored],
    converted: Mapping[str, str],
    *,
    task: str,
    heads: tuple[str, ...],
) -> tuple[WholeTarget, ...]:
    """The head of a task that has one, and whatever such a model has that the checkpoint has not."""
    new = dict(new_parameters(model, set(stored) | set(converted)))
    if not TASKS[task].has_head:
        if new:
            found = f"it lacks {len(new)} tensors of {type(model).__name__}, first {next(iter(new))}"
            raise DamagedError("checkpoint", found, expected="a whole checkpoint", fix="Fetch it again, or name --task")
        return ()
    in_head = {n: p for n, p in model.named_parameters() if any(n.startswith(f"{head}.") for head in heads)}
    kinds = Counter(found.dtype for found in stored.values() if found.dtype in FLOAT_DTYPES)
    dtype = kinds.most_common(1)[0][0] if kinds else "F32"
    result = []
    for name, parameter in sorted((new | in_head).items()):
        found_at = stored.get(name)
        weight, kind = (found_at.weight, found_at.dtype) if found_at else (name, dtype)
        digest = "unread" if found_at else ""
        result.append(WholeTarget(name, weight, tuple(parameter.shape), kind, digest))
    return tuple(result)


# --- applying to a folder


def apply(
    model: str | Path,
    out: str | Path,
    spec: PacaSpec | None = None,
    *,
    task: TaskSpec | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Plan a surgery on a model folder or hub id and write a fresh adapter folder, which changes nothing yet.

    Raises: see plan_checkpoint; OutputExistsError; ResourceError.
    """
    root, base = find_model(model)
    require_apart(Path(out), [root])
    checkpoint = Checkpoint.open(root)
    plan = plan_checkpoint(checkpoint, spec or PacaSpec(), task)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        delta = fresh_delta(checkpoint, plan)
        if base.path:
            base = Base(path=relative_path(root, Path(out)))
        return write_adapter(writer.path, Path(out), checkpoint, delta, Manifest(base))


def fresh_delta(checkpoint: Checkpoint, plan: SurgeryPlan) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged; heads newly drawn from the plan's seed."""
    method = lookup(METHODS, plan.method, "--method")
    patches, targets = {}, []
    for target in plan.targets:
        columns = planned(method, plan, target)
        digest, original = read_target(checkpoint, target, columns)
        bound = replace(target, sha256=digest)
        master = torch.float64 if original.dtype == torch.float64 else torch.float32
        patches[target.module] = ColumnPatch(bound, columns, original.to(master, copy=True), original)
        targets.append(bound)
    whole, heads = _fresh_whole(checkpoint, plan)
    return ColumnDelta(plan.with_targets(tuple(targets), heads), patches, whole)


def planned(method: Any, plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns that a plan's seed gives a target."""
    columns: Tensor = method.planned_columns(plan, target)
    return columns


def _fresh_whole(checkpoint: Checkpoint, plan: SurgeryPlan) -> tuple[dict[str, WholePatch], tuple[WholeTarget, ...]]:
    if not plan.whole:
        return {}, ()
    fresh = draw_parameters(checkpoint.root, plan)
    patches, targets = {}, []
    for target in plan.whole:
        original = checkpoint.read_tensor(target.weight) if target.sha256 else None
        keep = original is not None and tuple(original.shape) == target.shape
        values = cast("Tensor", original) if keep else fresh[target.parameter]
        patches[target.parameter] = WholePatch(values.to(torch.float32, copy=True), original)
        targets.append(replace(target, sha256=checkpoint.sha256(target.weight) if target.sha256 else ""))
    return patches, tuple(targets)


def draw_parameters(root: Path, plan: SurgeryPlan) -> dict[str, Tensor]:
    """New parameters, drawn as the model's class draws them, from (seed, module name)."""
    config = configured(read_config(root), plan.config)
    with torch.device("meta"), quiet_loading():
        model: Any = class_for(config, plan.task)(config)
    result: dict[str, Tensor] = {}
    for name in sorted({target.parameter.rpartition(".")[0] for target in plan.whole}):
        module = model.get_submodule(name).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(generator_seed(plan.spec["seed"], name))
            model._init_weights(module)  # noqa: SLF001  the only door to a class's own initialisation
        result |= {f"{name}.{key}": p.detach() for key, p in module.named_parameters(recurse=False)}
    return result


def write_adapter(folder: Path, out: Path, checkpoint: Checkpoint, delta: ColumnDelta, manifest: Manifest) -> Adapter:
    """Fill an empty folder: the base's small files, the adapter file, and the record last."""
    copy_small_files(checkpoint, folder, delta.plan)
    data = delta.to_bytes()
    write_file(folder / ADAPTER_FILE, data)
    record = _record(delta, manifest, data)
    write_file(folder / RECORD_FILE, record.to_json())
    return Adapter(out, record, delta)


def _record(delta: ColumnDelta, manifest: Manifest, data: bytes) -> Record:
    manifest = replace(manifest, versions=versions(), files={ADAPTER_FILE: bytes_sha256(data)})
    return Record(ADAPTER, delta.plan, manifest)


def copy_small_files(checkpoint: Checkpoint, folder: Path, plan: SurgeryPlan | None) -> None:
    """Configuration, tokenizer and licence files; config.json with the plan's changes, if there are any."""
    for name in checkpoint.small_files():
        data = path_inside(checkpoint.root, name).read_bytes()
        if name == CONFIG_FILE and plan and plan.config:
            data = (json.dumps(read_json(checkpoint.root / name) | dict(plan.config), indent=2) + "\n").encode()
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, data)


def update_adapter(adapter: Adapter, delta: ColumnDelta, manifest: Manifest) -> Adapter:
    """Put a new state into an adapter folder. At every moment a reader finds the old state or the new one.

    The new record is written first and carries the old one along; which of the two holds is decided by the digest of
    the adapter file, whose rename comes second.
    """
    data = delta.to_bytes()
    record = _record(delta, manifest, data)
    previous = open_adapter(adapter.folder).record  # what holds, also after an update that was cut short
    replace_file(adapter.folder / RECORD_FILE, record.to_json(previous))
    replace_file(adapter.folder / ADAPTER_FILE, data)
    replace_file(adapter.folder / RECORD_FILE, record.to_json())
    return Adapter(adapter.folder, record, delta)


def open_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder and check it. Raises: NotAModelError, DamagedError, RequestError."""
    folder = Path(folder)
    record = _holding_record(folder) or _holding_record(folder)  # an update may come between two reads
    path = folder / ADAPTER_FILE
    if record is None:
        raise DamagedError(
            str(path),
            "its digest is not the one recorded",
            expected="the file that was written",
            fix="Restore it from a copy or a training checkpoint, or run apply again",
        )
    return Adapter(folder, record, read_delta(path, record.plan))


def _holding_record(folder: Path) -> Record | None:
    """The record whose digest the adapter file has: the one that stands there, or the one that it carries along."""
    document = read_document(folder)
    where, path = str(folder / RECORD_FILE), path_inside(folder, ADAPTER_FILE)
    if document.get("kind") != ADAPTER:
        raise NotAModelError(str(folder), f"a folder of kind {document.get('kind')!r}", expected="an adapter folder")
    if not path.is_file():
        raise DamagedError(str(folder), f"no {ADAPTER_FILE}", expected="an adapter folder", fix="Run apply again")
    records = [parse_record(document, where)]
    if isinstance(document.get("previous"), dict):
        records.append(parse_record(document["previous"], where))
    digest = file_sha256(path)
    record = next((r for r in records if r.manifest.files.get(ADAPTER_FILE) == digest), None)
    if record:
        _require_spec(record.plan, where)
    return record


def _require_spec(plan: SurgeryPlan, where: str) -> None:
    """The method is known and takes the plan's settings. Raises: RequestError, DamagedError."""
    try:
        lookup(METHODS, plan.method, where).spec_type(**plan.spec)
    except TypeError as error:
        raise DamagedError(where, f"the plan's spec is malformed ({error})", expected="a whole plan") from error


# --- a model in memory


def load_base_model(root: Path, plan: SurgeryPlan, *, dtype: torch.dtype | None = None) -> Any:
    """The base under the plan's class, on the CPU, in the checkpoint's dtype or in `dtype`. Raises: DamagedError."""
    config = configured(read_config(root), plan.config)
    model_class = class_for(config, plan.task)
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
    return model


def attach(model: nn.Module, spec: PacaSpec | None = None) -> SurgeryPlan:
    """Open a model in place: columns of its linear layers train, and a task's head; all else is frozen.

    Returns the plan. Raises: SelectorError; RequestError when the model is attached already.
    """
    _require_plain(model)
    task = _live_task(model)
    heads = find_heads(model, has_head=TASKS[task].has_head)
    stored = {
        n: Stored(n, dtype_name(p.dtype), tuple(p.shape)) for n, p in model.named_parameters(remove_duplicate=False)
    }
    plan = _plan_model(model, spec or PacaSpec(), stored, {}, task=task, heads=heads)
    attach_plan(model, plan, None)
    return plan


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


def attach_plan(model: nn.Module, plan: SurgeryPlan, delta: ColumnDelta | None) -> None:
    """Carry out a plan on a model in memory, with an adapter's values if given.

    Raises: BaseMismatchError, CheckError.
    """
    _require_plain(model)
    method = lookup(METHODS, plan.method, "--method")
    if delta:
        _require_originals(model, delta)
    before = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    originals = (
        {name: patch.original for name, patch in delta.whole.items() if patch.original is not None}
        if delta
        else {w.parameter: model.get_parameter(w.parameter).detach().cpu().clone() for w in plan.whole}
    )
    method.attach(model, plan, delta)
    columns = {module: patch.original for module, patch in delta.patches.items()} if delta else {}
    setattr(model, STATE, AttachedState(plan, originals, before, columns))
    require_contract(model, plan)


def _require_originals(model: nn.Module, delta: ColumnDelta) -> None:
    """The model holds, in the planned columns, what the adapter's base held there."""
    for module, patch in delta.patches.items():
        weight = cast("Tensor", model.get_submodule(module).weight)
        here = weight.detach().index_select(patch.target.input_axis, patch.columns.to(weight.device))
        here = here if patch.target.input_axis == 1 else here.t()
        if not torch.equal(here.cpu(), patch.original.to(weight.dtype)):
            raise BaseMismatchError(
                f"adapter, {module}",
                "the model's columns are not its base's",
                expected="the base this adapter was made for",
                fix="Name the right base with --base",
            )


def require_contract(model: nn.Module, plan: SurgeryPlan) -> None:
    """What trains is exactly what the plan says. Raises: CheckError."""
    expected = lookup(METHODS, plan.method, "--method").trainable_names(plan)
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


def collect(model: nn.Module) -> ColumnDelta:
    """What training has changed so far. Raises: RequestError, DamagedError where values are not finite."""
    state = state_of(model)
    originals = state.originals | state.columns
    delta: ColumnDelta = lookup(METHODS, state.plan.method, "--method").collect(model, state.plan, originals)
    return delta


def detach(model: nn.Module, *, merge: bool) -> nn.Module:
    """A plain model again, in place: with the trained columns (`merge`), or with the base's. Returns it."""
    state = state_of(model)
    lookup(METHODS, state.plan.method, "--method").detach(model, merge=merge)
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


def _bind(delta: ColumnDelta, model: nn.Module, checkpoint: Checkpoint) -> ColumnDelta:
    """The same delta with its targets tied to a checkpoint's files by name, dtype and digest."""
    names = memory_names(model, checkpoint)
    disk = {m.name: name for name, m in names.items() if m.is_verbatim}
    prefix = f"{base_prefix(model)}." if any(m.is_prefixed for m in names.values()) else ""
    patches = {module: _bind_patch(patch, checkpoint, disk) for module, patch in delta.patches.items()}
    whole_targets, whole = [], {}
    for target in delta.plan.whole:
        weight = disk.get(target.parameter)
        original = checkpoint.read_tensor(weight) if weight else None
        digest = checkpoint.sha256(weight) if weight else ""
        whole_targets.append(replace(target, weight=weight or target.parameter, sha256=digest))
        whole[target.parameter] = WholePatch(delta.whole[target.parameter].values, original)
    plan = delta.plan.with_targets(tuple(patch.target for patch in patches.values()), tuple(whole_targets))
    plan = replace(plan, prefix=prefix, config=_live_config(model, checkpoint, plan))
    return ColumnDelta(plan, patches, whole)


def _bind_patch(patch: ColumnPatch, checkpoint: Checkpoint, disk: Mapping[str, str]) -> ColumnPatch:
    weight = disk.get(f"{patch.target.module}.weight", "")
    if not weight or checkpoint[weight].shape != patch.target.shape:
        raise BaseMismatchError(
            str(checkpoint.root),
            f"no weight for {patch.target.module}",
            expected=f"one of shape {patch.target.shape}",
            fix="Name the right base",
        )
    target = replace(patch.target, weight=weight, dtype=checkpoint[weight].dtype)
    digest, original = read_target(checkpoint, target, patch.columns)
    if not torch.equal(original.to(patch.original.dtype), patch.original):
        raise BaseMismatchError(
            str(checkpoint.root),
            f"{weight} is not what the model started from",
            expected="the checkpoint the model was loaded from",
        )
    is_same = patch.values == patch.original.to(patch.values.dtype)  # unmoved: the file may say it more exactly
    values = torch.where(is_same, original.to(patch.values.dtype), patch.values)
    return ColumnPatch(replace(target, sha256=digest), patch.columns, values, original)


def _live_config(model: nn.Module, checkpoint: Checkpoint, plan: SurgeryPlan) -> dict[str, Any]:
    """The entries of config.json that a live task model has otherwise than its base."""
    config: Any = model.config
    if not plan.whole or own_architecture(read_config(checkpoint.root)) == plan.architecture:
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
