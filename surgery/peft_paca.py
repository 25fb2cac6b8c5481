"""Adapters of PEFT's own PaCA, read into adapter folders of ours: to train on, merge and verify.

Every layer keeps the columns it has there, also where q, k and v draw different ones. Values are base + paca_alpha / r
x delta in the master's precision, which is the sum that PEFT itself puts into the weight.

The file is foreign: nothing in it is believed before it is checked against the base's headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.adapter import Adapter, find_model, write_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint, path_inside, read_json
from surgery.columns import STORED, columns_key
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target, require_base
from surgery.errors import (
    BaseMismatchError,
    DamagedError,
    NotAModelError,
    RequestError,
    UnsupportedError,
    closest,
    counted,
)
from surgery.manifest import Base, Manifest, read_record, relative_path
from surgery.methods.paca_spec import PacaSpec
from surgery.paca_layers import combine
from surgery.peft_files import (
    ALL_LINEAR,
    CONFIG_FILE,
    DELTA,
    INDICES,
    LIMITS,
    PACA,
    PACA_FIELDS,
    PEFT_PACA,
    PICKLE_FILES,
    PREFIX,
    TASKS,
    WEIGHTS_FILE,
    WITHOUT_EFFECT,
)
from surgery.plan import SurgeryPlan, Target, WholeTarget
from surgery.planning import plan_checkpoint
from surgery.select import LinearSite, find_sites
from surgery.survey import TaskSpec, own_task, read_config, survey
from surgery.tensorfile import FLOAT_DTYPES, TensorFile, file_sha256
from surgery.union import shared_groups
from surgery.writing import CheckpointWriter, require_apart


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT folder, opened and checked in itself: nothing of its base is known yet.

    r, alpha: of all layers; modules: those with columns, sorted; whole: what else is in the file, without the prefix.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFile
    r: int
    alpha: float
    modules: tuple[str, ...]
    whole: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def columns(self, module: str) -> tuple[Tensor, Tensor]:
        """The columns (r,), strictly increasing, and their deltas (out, r) as in the file. Raises: DamagedError."""
        where = f"{self.folder / WEIGHTS_FILE}, {module}"
        indices, delta = (self.tensors.read(f"{PREFIX}{module}{part}") for part in (INDICES, DELTA))
        ordered, order = indices.sort()
        if len(ordered) and bool((ordered[1:] == ordered[:-1]).any()):
            twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
            raise DamagedError(where, f"column {twice} stands twice", expected="each column once")
        return ordered, delta[:, order]


@dataclass(frozen=True)
class Imported:
    """An adapter folder made from PEFT's, and what its users must know, one sentence each."""

    adapter: Adapter
    notes: tuple[str, ...]


# --- the folder


def open_peft(folder: str | Path) -> PeftAdapter:
    """Read the header and the configuration of a PEFT folder.

    Raises: NotAModelError: no such folder, or pickle files; UnsupportedError: another method's, or a setting that we
    do not have; DamagedError: files that contradict themselves.
    """
    folder = Path(folder)
    if not folder.is_dir() or not (folder / CONFIG_FILE).is_file():
        found = f"no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
        raise NotAModelError(str(folder), found, expected="a PEFT adapter's folder")
    config = read_json(path_inside(folder, CONFIG_FILE))
    rank, alpha = _read_config(folder / CONFIG_FILE, config)
    path = path_inside(folder, WEIGHTS_FILE)
    if not path.is_file():
        pickled = next((name for name in PICKLE_FILES if (folder / name).exists()), "")
        found = f"its weights are {pickled}, which can run code when loaded" if pickled else f"no {WEIGHTS_FILE}"
        fix = "Save it again with PEFT's save_pretrained on a machine you trust it on" if pickled else ""
        raise NotAModelError(str(folder), found, expected="safetensors", fix=fix)
    tensors = TensorFile(path)
    modules, whole = _read_names(path, tensors, rank)
    return PeftAdapter(folder, config, tensors, rank, alpha, modules, whole)


def _read_config(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """r and paca_alpha, once every field means what we take it for."""
    kind = config.get("peft_type")
    if kind != PACA:
        fix = "Merge it with PEFT, and start from what it writes"
        raise UnsupportedError(str(path), f"a PEFT adapter of type {kind!r}", expected=PACA, fix=fix)
    unknown = [
        k for k, v in config.items() if k not in (*PACA_FIELDS, *WITHOUT_EFFECT) and v not in (None, False, [], {})
    ]
    if unknown:
        found = f"the field {unknown[0]!r} is {config[unknown[0]]!r}"
        raise UnsupportedError(str(path), found, expected="the fields of PEFT 0.22's PacaConfig")
    rank, alpha = config.get("r"), config.get("paca_alpha")
    if type(rank) is not int or rank < 1:
        raise DamagedError(str(path), f"r is {rank!r}", expected="a positive number of columns")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise DamagedError(str(path), f"paca_alpha is {alpha!r}", expected="a positive number")
    task = config.get("task_type")
    if task is not None and task not in TASKS:
        raise UnsupportedError(str(path), f"task_type {task!r}", expected=f"one of {', '.join(TASKS)}")
    return rank, float(alpha)


def _read_names(path: Path, tensors: TensorFile, rank: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules with columns, each with both its tensors, and the names of all else. Raises: DamagedError."""
    parts: dict[str, set[str]] = {DELTA: set(), INDICES: set()}
    whole = []
    for name in tensors.infos:
        if not name.startswith(PREFIX):
            raise DamagedError(f"{path}, {name!r}", "a key without PEFT's prefix", expected=f"{PREFIX}..")
        bare = name.removeprefix(PREFIX)
        ending = next((part for part in parts if bare.endswith(part)), "")
        parts[ending].add(bare.removesuffix(ending)) if ending else whole.append(bare)
    halves = sorted(parts[DELTA] ^ parts[INDICES])
    if halves or not parts[DELTA]:
        found = f"{halves[0]} has only one of {DELTA} and {INDICES}" if halves else "no trained columns"
        raise DamagedError(str(path), found, expected="both for each layer")
    for module in sorted(parts[DELTA]):
        _require_sizes(path, module, tensors, rank)
    return tuple(sorted(parts[DELTA])), tuple(sorted(whole))


def _require_sizes(path: Path, module: str, tensors: TensorFile, rank: int) -> None:
    delta, indices = (tensors.infos[f"{PREFIX}{module}{part}"] for part in (DELTA, INDICES))
    if indices.dtype != "I64" or indices.shape != (rank,):
        found = f"{INDICES} {indices.dtype} {list(indices.shape)}"
        raise DamagedError(f"{path}, {module}", found, expected=f"I64 [{rank}], by r of {CONFIG_FILE}")
    if delta.dtype not in FLOAT_DTYPES or len(delta.shape) != 2 or delta.shape[1] != rank:
        found = f"{DELTA} {delta.dtype} {list(delta.shape)}"
        raise DamagedError(f"{path}, {module}", found, expected=f"floats [out, {rank}], by r of {CONFIG_FILE}")


# --- the import


def import_peft(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    task: TaskSpec | None = None,
    overwrite: bool = False,
) -> Imported:
    """Read a PEFT PaCA adapter and write it as an adapter folder of ours.

    base: the model it was trained on; without it the one that its configuration names. task: where the configuration
    does not say enough, such as a classifier's labels.
    Raises: NotAModelError, UnsupportedError, DamagedError, BaseMismatchError, OutputExistsError, RequestError.
    """
    peft, out = open_peft(folder), Path(out)
    root, origin = _find_base(peft, base)
    require_apart(out, [root, peft.folder])
    checkpoint = Checkpoint.open(root)
    plan = _plan(peft, checkpoint, task or TaskSpec())
    rounding = Rounding()
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        delta = _delta(peft, plan, checkpoint, rounding)
        if origin.path:
            origin = Base(path=relative_path(root, out))
        source = {
            "path": relative_path(peft.folder, out),
            "sha256": file_sha256(peft.tensors.path),
            "format": PEFT_PACA,
        }
        adapter = write_adapter(writer.path, out, checkpoint, delta, Manifest(origin, adapter=source))
    return Imported(adapter, (*_notes(peft, adapter, root), rounding.note()))


def _find_base(peft: PeftAdapter, base: str | Path | None) -> tuple[Path, Base]:
    """The base that was named, or the configuration's, at its revision. Raises: RequestError, NotAModelError."""
    if base is not None:
        return find_model(base)
    named, revision = peft.config.get("base_model_name_or_path"), peft.config.get("revision")
    if not named or not isinstance(named, str):
        found = "its configuration names no base"
        raise RequestError(str(peft.folder), found, expected="the model it was trained on", fix="Name it with --base")
    return find_model(named, revision=revision if isinstance(revision, str) else None)


def _plan(peft: PeftAdapter, checkpoint: Checkpoint, task: TaskSpec) -> SurgeryPlan:
    """The plan of what the file holds: its layers are the base's, and all that its configuration means are there."""
    wanted = _task(peft, checkpoint, task)
    seen = survey(checkpoint.root, wanted)
    linear = find_sites(seen.model, seen.heads)
    sites = {site.module: site for site in linear}
    for module in peft.modules:
        if module not in sites:
            raise BaseMismatchError(
                f"{peft.folder}, {module}",
                f"{checkpoint.root} has no such linear layer",
                expected="a layer of the base",
                fix=closest(module, sites) or "Name the right base with --base",
            )
        _require_fits(peft, sites[module], checkpoint)
    _require_complete(peft, sites.values())
    seed, alpha = peft.config.get("random_seed"), None if peft.alpha == peft.r else peft.alpha
    spec = PacaSpec(rank=peft.r, targets=peft.modules, alpha=alpha, seed=seed if type(seed) is int else 0)
    plan = plan_checkpoint(checkpoint, spec, wanted)
    if tuple(target.module for target in plan.targets) != peft.modules:
        raise DamagedError(str(peft.folder), "a layer's name is a pattern", expected="names of layers")
    return replace(plan, spec={**plan.spec, "select": STORED})


def _require_fits(peft: PeftAdapter, site: LinearSite, checkpoint: Checkpoint) -> None:
    rows = peft.tensors.infos[f"{PREFIX}{site.module}{DELTA}"].shape[0]
    if rows != site.out_features or peft.r > site.in_features:
        raise BaseMismatchError(
            f"{peft.folder}, {site.module}",
            f"{peft.r} columns of {rows} values",
            expected=f"at most {site.in_features} of {site.out_features}, as {checkpoint.root} has them",
            fix="Name the right base with --base",
        )


def _require_complete(peft: PeftAdapter, sites: Iterable[LinearSite]) -> None:
    """No layer is missing that target_modules names. A pattern is not run: it is the file's.

    Raises: DamagedError.
    """
    names, is_limited = peft.config.get("target_modules"), any(peft.config.get(key) for key in LIMITS)
    if is_limited or not (names == ALL_LINEAR or isinstance(names, list)):
        return
    linear = [site.module for site in sites if not site.tied_with and not (site.is_head and names == ALL_LINEAR)]
    meant = linear if names == ALL_LINEAR else [m for m in linear if any(f".{m}".endswith(f".{n}") for n in names)]
    missing = sorted(set(meant) - set(peft.modules))
    if missing:
        found = f"{counted(len(missing), 'layer')} of target_modules missing, first {missing[0]}"
        raise DamagedError(f"{peft.folder / WEIGHTS_FILE}", found, expected="every layer that was trained")


def _task(peft: PeftAdapter, checkpoint: Checkpoint, task: TaskSpec) -> TaskSpec:
    """The task asked for, or the configuration's; labels are numbered where nobody names them."""
    config = read_config(checkpoint.root)
    name = task.name or TASKS.get(peft.config.get("task_type") or "", "")
    if name in ("", own_task(config)) or task.labels or not name.endswith("-classification"):
        return TaskSpec(name, task.labels)
    rows = [info.shape[0] for n in peft.whole if len((info := peft.tensors.infos[PREFIX + n]).shape) == 2]
    return TaskSpec(name, tuple(f"LABEL_{number}" for number in range(min(rows, default=0))))


def _known_targets(peft: PeftAdapter) -> dict[str, Target]:
    """The targets, with the base's digests, of a folder that is an export of ours."""
    if not (peft.folder / RECORD_FILE).is_file():
        return {}
    return {target.module: target for target in read_record(peft.folder, PEFT_PACA).plan.targets}


def _delta(peft: PeftAdapter, plan: SurgeryPlan, checkpoint: Checkpoint, rounding: Rounding) -> ColumnDelta:
    """Every target read once from the base, its columns and values from the file."""
    patches, keys, known = {}, {}, _known_targets(peft)
    for target in plan.targets:
        columns, delta_or = peft.columns(target.module)
        if int(columns[0]) < 0 or int(columns[-1]) >= target.in_features:
            found = f"columns from {int(columns[0])} to {int(columns[-1])}"
            where = f"{peft.folder / WEIGHTS_FILE}, {target.module}"
            raise DamagedError(where, found, expected=f"0 to {target.in_features - 1}")
        digest, original = read_target(checkpoint, target, columns)
        require_base(known.get(target.module, target), digest, str(checkpoint.root))
        master = torch.float64 if original.dtype == torch.float64 else torch.float32
        values = combine(original, delta_or.to(master), peft.scale)
        rounding.add(original, delta_or, values, peft.scale)
        patches[target.module] = ColumnPatch(replace(target, sha256=digest), columns, values, original)
        keys[target.module] = (target.group, columns_key(columns))
    groups = shared_groups(keys)
    patches = {m: replace(p, target=replace(p.target, group=groups[m])) for m, p in patches.items()}
    whole = _whole(peft, plan, checkpoint)
    heads = tuple(_with_digest(target, checkpoint) for target in plan.whole)
    bound = replace(plan, targets=tuple(p.target for p in patches.values()), whole=heads)
    return ColumnDelta(bound, patches, whole)


def _with_digest(target: WholeTarget, checkpoint: Checkpoint) -> WholeTarget:
    return replace(target, sha256=checkpoint.sha256(target.weight) if target.sha256 else "")


def _whole(peft: PeftAdapter, plan: SurgeryPlan, checkpoint: Checkpoint) -> dict[str, WholePatch]:
    """What was trained whole: from the file, or the base's own where PEFT left it alone.

    Raises: UnsupportedError for tensors that no head has; DamagedError for a head that nobody has.
    """
    planned = {target.parameter for target in plan.whole}
    foreign = [name for name in peft.whole if name not in planned]
    if foreign:
        found = f"{counted(len(foreign), 'tensor')} trained whole beside the columns, first {foreign[0]}"
        expected = f"only those of a {plan.task} head ({', '.join(sorted(planned)) or 'it has none'})"
        raise UnsupportedError(str(peft.folder), found, expected=expected, fix="Name its task with --task")
    result = {}
    for target in plan.whole:
        original = checkpoint.read_tensor(target.weight) if target.sha256 else None
        stored = peft.tensors.read(PREFIX + target.parameter) if target.parameter in peft.whole else original
        if stored is None:
            found = f"{target.parameter} is new in a {plan.architecture}, and the file does not have it"
            raise DamagedError(str(peft.folder), found, expected="every tensor of the head")
        if not stored.is_floating_point():
            raise DamagedError(f"{peft.folder}, {target.parameter}", f"{stored.dtype}", expected="floats")
        result[target.parameter] = WholePatch(stored.to(torch.float32, copy=True), original)
    return result


# --- what is said


@dataclass
class Rounding:
    """What the sum of base and delta loses in the master's precision."""

    values: int = 0
    rounded: int = 0
    largest: float = 0.0

    def add(self, original: Tensor, delta_or: Tensor, values: Tensor, scale: float) -> None:
        """Count one layer: (out, r) each."""
        lost = (values.double() - (original.double() + scale * delta_or.double())).abs()
        self.values += lost.numel()
        self.rounded += int((lost > 0).sum())
        self.largest = max(self.largest, float(lost.max()))

    def note(self) -> str:
        """One sentence."""
        if not self.rounded:
            return f"exact: all {self.values:,} columns' values are base + delta without rounding"
        return (
            f"read as PEFT computes them; base + delta is rounded in {self.rounded:,} of {self.values:,} values,"
            f" by up to {self.largest:.3g}: deltas given back to PEFT differ by as much"
        )


def _notes(peft: PeftAdapter, adapter: Adapter, root: Path) -> Iterator[str]:
    named = peft.config.get("base_model_name_or_path")
    is_known = (peft.folder / RECORD_FILE).is_file()
    if not is_known:
        yield f"PEFT's files hold no digest of the base: that it is {root} is believed (they name {named!r})"
    if "id2label" in adapter.plan.config and any(
        str(v).startswith("LABEL_") for v in adapter.plan.config["id2label"].values()
    ):
        yield "labels are numbered: PEFT's files do not name them; --labels does"
    targets = peft.config.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        yield f"target_modules is a pattern ({targets!r}) and is not run: the layers in the file are taken as they are"
