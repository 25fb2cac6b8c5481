"""What training changed: columns that replace columns, and heads that are new. The adapter file.

Keys of `adapter.safetensors`: for each target `<module>.columns` (r,) int64, `<module>.values` (out, r) and
`<module>.original` (out, r) in the base's dtype; for each whole tensor `<parameter>.whole` and, where the base has
one, `<parameter>.original`; for each tensor of a side network, under its name in the model, its values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.columns import RANDOM
from surgery.errors import BaseMismatchError, DamagedError, UnsupportedError
from surgery.plan import SurgeryPlan, Target
from surgery.tensorfile import TensorFile, dtype_name, torch_dtype

ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class ColumnPatch:
    """The trained columns of one target.

    Shapes: columns (r,) int64, strictly increasing; values (out, r) float32 (float64 for a float64 base), finite: they
    replace, they are not added; original (out, r) in the base's dtype. Raises: DamagedError.

    Where columns are drawn anew during training there are more than the target's rank: `active` (rank,) int64 are those
    that train now, and `scores` (in,) float64, where there are any, say how likely each column is drawn later.
    """

    target: Target
    columns: Tensor
    values: Tensor
    original: Tensor
    active: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        rank = self.target.rank if self.active is None else max(self.target.rank, self.columns.numel())
        where, wanted = f"adapter, {self.target.module}", (self.target.out_features, rank)
        if self.columns.dtype != torch.int64 or tuple(self.columns.shape) != (rank,):
            found = f"columns {self.columns.dtype} {tuple(self.columns.shape)}"
            raise DamagedError(where, found, expected=f"int64 ({rank},)")
        rising = bool((self.columns[1:] > self.columns[:-1]).all())
        if not rising or int(self.columns[0]) < 0 or int(self.columns[-1]) >= self.target.in_features:
            expected = f"strictly increasing ones below {self.target.in_features}"
            raise DamagedError(where, "columns out of order or out of range", expected=expected)
        self._require_draws(where)
        for name, tensor in (("values", self.values), ("original", self.original)):
            if tuple(tensor.shape) != wanted:
                raise DamagedError(where, f"{name} {tuple(tensor.shape)}", expected=str(wanted))
        if self.values.dtype not in (torch.float32, torch.float64):
            raise DamagedError(where, f"values {self.values.dtype}", expected="float32 or float64")
        if dtype_name(self.original.dtype) != self.target.dtype:
            raise DamagedError(where, f"original {self.original.dtype}", expected=self.target.dtype)
        require_finite(where, self.values)
        require_fits(where, self.stored())

    def _require_draws(self, where: str) -> None:
        """What is drawn from, and what was drawn last. Raises: DamagedError."""
        active, scores, rank = self.active, self.scores, self.target.rank
        if active is not None:
            is_whole = active.dtype == torch.int64 and tuple(active.shape) == (rank,)
            if not is_whole or not bool((active[1:] > active[:-1]).all() and torch.isin(active, self.columns).all()):
                found = f"active {active.dtype} {tuple(active.shape)}"
                raise DamagedError(where, found, expected=f"{rank} of its columns, strictly increasing")
        if scores is not None:
            if scores.dtype != torch.float64 or tuple(scores.shape) != (self.target.in_features,):
                found = f"scores {scores.dtype} {tuple(scores.shape)}"
                raise DamagedError(where, found, expected=f"float64 ({self.target.in_features},)")
            if not bool((scores.isfinite() & (scores >= 0)).all()):
                raise DamagedError(where, "scores below zero or not finite", expected="likelihoods")

    def stored(self) -> Tensor:
        """The values in the base's dtype: the one cast there is. (out, r)."""
        return self.values.to(torch_dtype(self.target.dtype))

    @property
    def is_moved(self) -> bool:
        """Whether anything changed once the values are in the base's dtype."""
        return not torch.equal(self.stored().view(torch.uint8), self.original.contiguous().view(torch.uint8))

    @property
    def unmoved(self) -> tuple[int, ...]:
        """The columns that are equal to the base's once the values are in its dtype."""
        return tuple(self.columns[(self.stored() == self.original).all(dim=0)].tolist())


def count_not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite. By numpy: for tensors so small torch's threads cost more than they save."""
    wide = values.detach().cpu() if values.dtype == torch.float64 else values.detach().cpu().to(torch.float32)
    return int(np.count_nonzero(~np.isfinite(wide.numpy())))


def require_finite(where: str, values: Tensor) -> None:
    """Raises DamagedError for NaN and infinity."""
    bad = count_not_finite(values)
    if bad:
        raise DamagedError(
            where,
            f"{bad} of {values.numel()} trained values are not finite",
            expected="finite values",
            fix="Training diverged: lower the learning rate, or go back to an earlier checkpoint",
        )


def require_fits(where: str, stored: Tensor) -> None:
    """Raises DamagedError where finite values became infinite in the base's dtype."""
    bad = count_not_finite(stored)
    if bad:
        raise DamagedError(
            where,
            f"{bad} of {stored.numel()} trained values are too large for {dtype_name(stored.dtype)}",
            expected="values that the base's dtype can hold",
            fix="Training diverged: lower the learning rate, or go back to an earlier checkpoint",
        )


@dataclass(frozen=True)
class WholePatch:
    """A tensor trained whole, and what the base had in its place (None where it is new)."""

    values: Tensor
    original: Tensor | None

    def stored(self, dtype: str) -> Tensor:
        return self.values.to(torch_dtype(dtype))


@dataclass(frozen=True)
class ColumnDelta:
    """Everything a PaCA adapter changes. The keys equal the plan's targets. Raises: DamagedError."""

    what: ClassVar[str] = "a PaCA adapter"
    nature: ClassVar[str] = "(columns of the base's own weights)"
    ways_out: ClassVar[str] = "Write the merged checkpoint with --merge, or --format lora"

    plan: SurgeryPlan
    patches: Mapping[str, ColumnPatch]
    whole: Mapping[str, WholePatch]

    def __post_init__(self) -> None:
        planned = {target.module for target in self.plan.targets}
        if set(self.patches) != planned or set(self.whole) != _whole_names(self.plan):
            raise DamagedError("adapter", "its tensors are not the plan's", expected=f"{len(planned)} targets")
        _require_whole(self.plan, self.whole)

    @property
    def movable(self) -> int:
        """How many targets there are."""
        return len(self.patches)

    @property
    def moved(self) -> int:
        """How many targets differ from the base once in its dtype."""
        return sum(patch.is_moved for patch in self.patches.values())

    def to_bytes(self) -> bytes:
        """The adapter file's content. The same delta gives the same bytes."""
        tensors: dict[str, Tensor] = {}
        for module, patch in self.patches.items():
            tensors[f"{module}.columns"] = patch.columns.contiguous()
            tensors[f"{module}.values"] = patch.values.contiguous()
            tensors[f"{module}.original"] = patch.original.contiguous()
            draws = {"active": patch.active, "scores": patch.scores}
            tensors |= {
                f"{module}.{part}": t.clone() for part, t in draws.items() if t is not None
            }  # shared in a group
        return _file_bytes(tensors, self.whole)

    def widths(self) -> dict[str, int]:
        """How many columns of each target are there: its rank, or more where they were drawn anew."""
        if isinstance(self.patches, _StoredPatches):
            return self.patches.widths()
        return {module: len(patch.columns) for module, patch in self.patches.items()}


@dataclass(frozen=True)
class SideDelta:
    """Everything a READ adapter adds: a side network's tensors, by name. It has no dense equivalent.

    Raises: DamagedError.
    """

    what: ClassVar[str] = "a READ adapter"
    nature: ClassVar[str] = "(a side network runs beside the layers and has no dense equivalent)"
    ways_out: ClassVar[str] = (
        "Write --format onnx, whose graph holds the side network, or --format remote-code, which transformers loads "
        "with it, or use surgery.load in Python"
    )

    plan: SurgeryPlan
    state: Mapping[str, Tensor]
    whole: Mapping[str, WholePatch]

    def __post_init__(self) -> None:
        if set(self.state) != {t.parameter for t in self.plan.side} or set(self.whole) != _whole_names(self.plan):
            expected = f"{len(self.plan.side)} of the side network"
            raise DamagedError("adapter", "its tensors are not the plan's", expected=expected)
        for target in self.plan.side:
            values, where = self.state[target.parameter], f"adapter, {target.parameter}"
            if tuple(values.shape) != target.shape or values.dtype not in (torch.float32, torch.float64):
                found = f"{values.dtype} {tuple(values.shape)}"
                raise DamagedError(where, found, expected=f"float32 or float64 {target.shape}")
            require_finite(where, values)
        _require_whole(self.plan, self.whole)

    @property
    def movable(self) -> int:
        """How many stacks are corrected."""
        return len(self._projections)

    @property
    def moved(self) -> int:
        """How many corrections are any: projections back are zero until training moves them."""
        return sum(bool(values.any()) for values in self._projections)

    @property
    def _projections(self) -> list[Tensor]:
        return [values for name, values in self.state.items() if name.endswith(".output.weight")]

    def to_bytes(self) -> bytes:
        """The adapter file's content. The same delta gives the same bytes."""
        return _file_bytes({name: self.state[name].contiguous() for name in sorted(self.state)}, self.whole)


Delta = ColumnDelta | SideDelta


def require_side(delta: Delta, where: str) -> SideDelta:
    """A side network's delta. Raises: UnsupportedError for any other."""
    if not isinstance(delta, SideDelta):
        found = f"{delta.what} {delta.nature}"
        raise UnsupportedError(where, found, expected=SideDelta.what, fix=delta.ways_out)
    return delta


def require_columns(delta: Delta, where: str) -> ColumnDelta:
    """A delta that can be merged. Raises: UnsupportedError for any other."""
    if not isinstance(delta, ColumnDelta):
        found = f"{delta.what} {delta.nature}"
        raise UnsupportedError(where, found, expected=ColumnDelta.what, fix=delta.ways_out)
    return delta


def _whole_names(plan: SurgeryPlan) -> set[str]:
    return {target.parameter for target in plan.whole}


def _require_whole(plan: SurgeryPlan, whole: Mapping[str, WholePatch]) -> None:
    """What was trained whole has the planned shape, and values that its dtype holds. Raises: DamagedError."""
    for target in plan.whole:
        patch, where = whole[target.parameter], f"adapter, {target.parameter}"
        if tuple(patch.values.shape) != target.shape:
            raise DamagedError(where, f"shape {tuple(patch.values.shape)}", expected=str(target.shape))
        require_finite(where, patch.values)
        require_fits(where, patch.stored(target.dtype))


def _file_bytes(tensors: dict[str, Tensor], whole: Mapping[str, WholePatch]) -> bytes:
    for parameter, patch in whole.items():
        tensors[f"{parameter}.whole"] = patch.values.contiguous()
        if patch.original is not None:
            tensors[f"{parameter}.original"] = patch.original.contiguous()
    data: bytes = safetensors.torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    return data


class _StoredPatches(Mapping[str, ColumnPatch]):
    """The patches of an adapter file, read one at a time: a merge needs the memory of one."""

    def __init__(self, tensors: TensorFile, plan: SurgeryPlan) -> None:
        self._tensors = tensors
        self._targets = {target.module: target for target in plan.targets}
        self._spec = plan.spec

    def __getitem__(self, module: str) -> ColumnPatch:
        read, draws = self._tensors.read, _draws(self._spec, self._targets[module])
        return ColumnPatch(
            self._targets[module],
            read(f"{module}.columns"),
            read(f"{module}.values"),
            read(f"{module}.original"),
            read(f"{module}.active") if "active" in draws else None,
            read(f"{module}.scores") if "scores" in draws else None,
        )

    def widths(self) -> dict[str, int]:
        return {module: self._tensors.infos[f"{module}.columns"].shape[0] for module in self}

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def _draws(spec: Mapping[str, Any], target: Target) -> tuple[str, ...]:
    """What a patch has beside its columns: where they are drawn anew those that train now, and what is drawn by.

    Rows, which are named, are never drawn.
    """
    if not spec.get("resample") or target.rows:
        return ()
    return ("active",) if spec["select"] == RANDOM else ("active", "scores")


def adapter_names(plan: SurgeryPlan) -> set[str]:
    """The tensors of a plan's adapter file."""
    parts = ("columns", "values", "original")
    names = {f"{t.module}.{part}" for t in plan.targets for part in (*parts, *_draws(plan.spec, t))}
    names |= {t.parameter for t in plan.side} | {f"{w.parameter}.whole" for w in plan.whole}
    return names | {f"{w.parameter}.original" for w in plan.whole if w.sha256}


def read_delta(path: Path, plan: SurgeryPlan) -> Delta:
    """An adapter file; columns are read as they are asked for, a side network at once. Raises: DamagedError."""
    tensors = TensorFile(path)
    difference = sorted(adapter_names(plan) ^ set(tensors.infos))
    if difference:
        found = f"{len(difference)} tensors missing or surplus, first {difference[0]!r}"
        raise DamagedError(str(path), found, expected="exactly those of its plan")
    whole = {
        w.parameter: WholePatch(
            tensors.read(f"{w.parameter}.whole"), tensors.read(f"{w.parameter}.original") if w.sha256 else None
        )
        for w in plan.whole
    }
    if plan.stacks:
        return SideDelta(plan, {t.parameter: tensors.read(t.parameter) for t in plan.side}, whole)
    return ColumnDelta(plan, _StoredPatches(tensors, plan), whole)


def backbone_sha256(checkpoint: Checkpoint) -> str:
    """One digest of every tensor of a checkpoint, by name, dtype, shape and bytes: files may be cut otherwise."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        info = checkpoint[name]
        digest.update(f"{name} {info.dtype} {info.shape} {checkpoint.sha256(name)}\n".encode())
    return digest.hexdigest()


def require_backbone(checkpoint: Checkpoint, plan: SurgeryPlan) -> None:
    """Raises BaseMismatchError where a plan names a whole base and this is another."""
    if plan.backbone_sha256 and (found := backbone_sha256(checkpoint)) != plan.backbone_sha256:
        raise BaseMismatchError(
            str(checkpoint.root),
            f"its tensors have digest {found[:12]}..",
            expected=f"{plan.backbone_sha256[:12]}.., of the base this adapter was made for",
            fix="Name the right base with --base, or apply again to this one",
        )


def require_base(target: Target, digest: str, where: str) -> None:
    """Raises BaseMismatchError where a weight's bytes are not those the adapter was made for."""
    if target.sha256 and digest != target.sha256:
        found = f"{target.weight} has sha256 {digest[:12]}.."
        raise BaseMismatchError(
            where,
            found,
            expected=f"{target.sha256[:12]}.., of the base this adapter was made for",
            fix="Name the right base with --base, or apply again to this one",
        )


def bytes_sha256(data: bytes) -> str:
    """The digest of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


# --- a weight's bytes with columns read or replaced


def bits(tensor: Tensor) -> npt.NDArray[np.unsignedinteger[Any]]:
    """A tensor's values as unsigned integers of the same width: numpy knows no bfloat16."""
    width = tensor.element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return tensor.detach().contiguous().cpu().view(signed).numpy().view(f"u{width}")


@dataclass(frozen=True)
class ColumnsHere:
    """A target's columns within some whole rows of its weight.

    shape: those rows as (outer, lines, inner), where lines run along the inputs; lines: where the columns lie there;
    span: which of a patch's (out, r) values they hold.
    """

    shape: tuple[int, int, int]
    lines: npt.NDArray[np.int64]
    span: tuple[slice, slice]

    def read(self, rows: npt.NDArray[Any], into: npt.NDArray[Any]) -> None:
        """Copy the columns from the rows into values (out, r)."""
        outer, _, inner = self.shape
        picked = rows.reshape(self.shape)[:, self.lines]
        into[self.span] = picked.swapaxes(1, 2).reshape(outer * inner, len(self.lines))

    def write(self, rows: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Replace the columns in the rows by values (out, r)."""
        outer, _, inner = self.shape
        rows.reshape(self.shape)[:, self.lines] = (
            values[self.span].reshape(outer, inner, len(self.lines)).swapaxes(1, 2)
        )


def columns_here(target: Target, columns: npt.NDArray[np.int64], first: int, values: int) -> ColumnsHere:
    """The target's columns in so many values of its weight, which begin with row `first`."""
    axis, shape = target.input_axis, target.shape
    inner = math.prod(shape[axis + 1 :])
    if axis == 0:
        lines = values // inner
        low, high = np.searchsorted(columns, (first, first + lines))
        return ColumnsHere((1, lines, inner), columns[low:high] - first, (slice(None), slice(low, high)))
    begin = first * math.prod(shape[1:axis]) * inner
    outer = values // (target.in_features * inner)
    return ColumnsHere((outer, target.in_features, inner), columns, (slice(begin, begin + outer * inner), slice(None)))


def read_target(checkpoint: Checkpoint, target: Target, columns: Tensor) -> tuple[str, Tensor]:
    """The sha256 of a target's bytes and its columns (out, r), in one pass and constant memory."""
    digest = hashlib.sha256()
    original = torch.empty((target.out_features, len(columns)), dtype=torch_dtype(target.dtype))
    picked, wanted = bits(original), columns.numpy()
    for first, chunk in checkpoint.row_chunks(target.weight):
        digest.update(chunk)
        rows = np.frombuffer(chunk, picked.dtype)
        columns_here(target, wanted, first, rows.size).read(rows, picked)
    return digest.hexdigest(), original


def patched_chunks(
    checkpoint: Checkpoint,
    weight: str,
    target: Target,
    columns: Tensor,
    values: Tensor,
    before: Callable[[memoryview], object] | None = None,
) -> Iterator[memoryview]:
    """The bytes of tensor `weight` with the target's columns replaced by `values` (out, r), of the file's dtype.

    `before` sees each chunk as it is in the file.
    """
    wanted, new = columns.numpy(), bits(values)
    for first, chunk in checkpoint.row_chunks(weight):
        if before:
            before(chunk)
        rows = np.frombuffer(chunk, new.dtype)
        columns_here(target, wanted, first, rows.size).write(rows, new)
        yield chunk
