"""What a surgery will do, as a value: printed, stored, compared, and never changed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from surgery.errors import DamagedError, RequestError
from surgery.side.settings import Stack
from surgery.tensorfile import FLOAT_DTYPES

SCHEMA = 1

T = TypeVar("T")
_JSON_TYPES = {"str": str, "int": int, "Mapping[str, Any]": dict, "Mapping[str, str]": dict}


def from_json(kind: type[T], entry: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object. Raises TypeError where a field is missing, surplus or of another type."""
    for item in fields(kind):  # type: ignore[arg-type]  # every kind is one of our dataclasses
        wanted = _JSON_TYPES.get(str(item.type))
        if wanted and item.name in entry and type(entry[item.name]) is not wanted:
            raise TypeError(f"{kind.__name__}.{item.name} is {entry[item.name]!r}")
    return kind(**entry)


def without_later(kind: type[Any], entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON objects of a dataclass without the fields in its `later` that are at their default.

    These were added to the class later: what was written before them, and what has no use for them, stays as it was.
    """
    usual = {item.name: item.default if item.default_factory is MISSING else item.default_factory()
             for item in fields(kind) if item.name in kind.later}  # fmt: skip
    defaults = json.loads(json.dumps(usual))
    return [{k: v for k, v in entry.items() if k not in defaults or v != defaults[k]} for entry in entries]


def _require_float(name: str, dtype: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise DamagedError(f"target {name}", f"dtype {dtype!r}", expected=f"one of {', '.join(FLOAT_DTYPES)}")


@dataclass(frozen=True)
class Target:
    """One layer whose columns train.

    `module` is its dotted path in the model, `weight` its key in the checkpoint. `dtype` is the file's (safetensors'
    name). `group` names the layers fed by the same tensor: they share one set of columns. `sha256` is the digest of
    the weight's bytes in the base, empty while no file has been read.

    `parameter` is the module's attribute that holds the weight. Of a weight that is no matrix `sizes` is the shape, and
    `out_features` the values of one column: the product of the other axes.

    Of a mixture's experts `module` is a name and no module. `holder` is the module whose `parameter` holds them all,
    `place` where in it this one lies: (expert, part, of so many equal parts of its outputs), empty where it is all.
    Of an embedding `rows` are the tokens whose rows train, where no strategy chooses.
    """

    later: ClassVar[tuple[str, ...]] = ("parameter", "sizes", "holder", "place", "rows")

    module: str
    weight: str
    out_features: int
    in_features: int
    input_axis: int
    dtype: str
    rank: int
    group: str
    sha256: str = ""
    parameter: str = "weight"
    sizes: tuple[int, ...] = ()
    holder: str = ""
    place: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where, shape = f"target {self.module}", self.shape
        if not 0 <= self.input_axis < len(shape) or not 1 <= self.rank <= self.in_features or self.out_features < 1:
            raise DamagedError(
                where,
                f"rank {self.rank} of {self.in_features} inputs, input axis {self.input_axis}",
                expected="a rank within the width and an axis of the weight",
            )
        if shape[self.input_axis] != self.in_features or math.prod(shape) != self.out_features * self.in_features:
            expected = f"{self.in_features} along axis {self.input_axis} and {self.out_features} values of each column"
            raise DamagedError(where, f"sizes {list(shape)}", expected=expected)
        if self.place and (not self.holder or len(self.place) != 3 or not 0 <= self.place[1] < self.place[2]):
            raise DamagedError(where, f"place {list(self.place)}", expected="an expert and a part of its outputs")
        if self.rows and len(self.rows) != self.rank:
            raise DamagedError(where, f"{len(self.rows)} rows and rank {self.rank}", expected="as many")
        _require_float(self.module, self.dtype)

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        return f"{self.holder or self.module}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as stored."""
        pair = (self.out_features, self.in_features)
        return self.sizes or (pair if self.input_axis == 1 else pair[::-1])

    @property
    def trained_values(self) -> int:
        return self.out_features * self.rank


@dataclass(frozen=True)
class WholeTarget:
    """A parameter trained whole (a task's head). `sha256` is empty where the base has no such tensor."""

    parameter: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str = ""

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise DamagedError(f"target {self.parameter}", f"shape {self.shape}", expected="sizes")
        _require_float(self.parameter, self.dtype)

    @property
    def trained_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SideTarget:
    """A tensor of a side network, under its name in the attached model."""

    parameter: str
    shape: tuple[int, ...]

    @property
    def trained_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """Where a model's parameter lies in a file (or, without a file, in the live model): key, dtype, shape."""

    weight: str
    dtype: str
    shape: tuple[int, ...]


# by the name of a parameter of experts: the tensors that are put together to it, and the place of each in it
Parts = Mapping[str, Sequence[tuple[Stored, tuple[int, ...]]]]


@dataclass(frozen=True)
class Untouched:
    """Weights that could have been meant and are not trained: a name with `*` for layer numbers, and why."""

    pattern: str
    count: int
    reason: str


@dataclass(frozen=True)
class Quantization:
    """How the base's weights are held in memory, while it is frozen.

    `kind` is a key of `surgery.quantized.KINDS`; `is_stored`: the base's files hold them so already, otherwise they are
    quantized when it is loaded; `layers`: of each quantized layer its weight's key in the checkpoint, by module.
    """

    kind: str
    is_stored: bool
    layers: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.kind or not self.layers or type(self.is_stored) is not bool:
            raise DamagedError("plan", f"a quantization {self.kind!r} of {len(self.layers)} layers", expected="some")


NO_METHOD = "none"


@dataclass(frozen=True)
class SurgeryPlan:
    """What a method does to a model: `targets` (PaCA) sorted by module and unique, or `stacks` (READ).

    It is never neither, but for the method `none`: a checkpoint that is exported as it is.

    `prefix` is what the task's class puts before the base's names (`bert.`); `architecture` the class that loads the
    result; `config` the entries of config.json that change. `side`: the tensors of the stacks' side networks, sorted;
    `frozen`: the model's children that stay in eval mode; `backbone_sha256`: the digest of the whole base, empty while
    no file has been read; `calibration`: the digests of the files that columns were chosen by, by name; `quantization`:
    None where the base is held as its files have it.
    """

    later: ClassVar[tuple[str, ...]] = ("stacks", "side", "frozen", "backbone_sha256", "calibration", "quantization")

    method: str
    spec: Mapping[str, Any]
    architecture: str
    task: str
    targets: tuple[Target, ...] = ()
    whole: tuple[WholeTarget, ...] = ()
    untouched: tuple[Untouched, ...] = ()
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    side: tuple[SideTarget, ...] = ()
    frozen: tuple[str, ...] = ()
    backbone_sha256: str = ""
    calibration: Mapping[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        modules = [target.module for target in self.targets]
        if modules != sorted(set(modules)) or bool(modules) + bool(self.stacks) != (self.method != NO_METHOD):
            raise DamagedError("plan", f"{len(modules)} targets", expected="a sorted list without repetition")
        side = [target.parameter for target in self.side]
        if side != sorted(set(side)) or bool(side) != bool(self.stacks):
            raise DamagedError("plan", f"{len(side)} side tensors", expected="a sorted list without repetition")
        if self.architecture and not self.architecture.isidentifier():  # it goes into a modeling file, which is run
            raise DamagedError("plan", f"architecture {self.architecture!r}", expected="the name of a class")
        weights = [target.weight for target in self.targets] + [target.weight for target in self.whole]
        if len(set(weights)) != len(weights):
            raise DamagedError("plan", "two targets in one weight", expected="a weight for each")

    @property
    def trained_values(self) -> int:
        return sum(sum(t.trained_values for t in kind) for kind in (self.targets, self.side, self.whole))

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names in id order; empty where the task has none."""
        names = self.config.get("id2label", {})
        return () if self.task == "regression" else tuple(names[key] for key in sorted(names, key=int))

    def merged_name(self, base_name: str) -> str:
        """What a tensor of the base is called in the merged checkpoint; a head stands outside the prefix."""
        is_head = any(head.weight == head.parameter == base_name for head in self.whole)
        return base_name if is_head or base_name.startswith(self.prefix) else self.prefix + base_name

    @property
    def id(self) -> str:
        """A digest of everything the plan says."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Canonical: the same plan gives the same text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text; see `without_later`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        plain["targets"] = without_later(Target, plain["targets"])
        return without_later(type(self), [plain])[0]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str = "plan") -> SurgeryPlan:
        """The inverse of `to_dict`. Raises: DamagedError, RequestError for a schema we do not know."""
        schema = document.get("schema")
        if schema != SCHEMA:
            raise RequestError(
                where,
                f"plan schema {schema!r}",
                expected=str(SCHEMA),
                fix="Use the version of checkpoint-surgery that wrote it",
            )
        try:
            parts = dict(document)
            tuples = ("sizes", "place", "rows")
            targets = ({**e, **{key: tuple(e.get(key, ())) for key in tuples}} for e in document["targets"])
            parts["targets"] = tuple(from_json(Target, entry) for entry in targets)
            whole = ({**entry, "shape": tuple(entry["shape"])} for entry in document["whole"])
            parts["whole"] = tuple(from_json(WholeTarget, entry) for entry in whole)
            parts["untouched"] = tuple(from_json(Untouched, entry) for entry in document["untouched"])
            stacks = ({**entry, "read": tuple(entry["read"])} for entry in document.get("stacks", ()))
            parts["stacks"] = tuple(from_json(Stack, entry) for entry in stacks)
            side = ({**entry, "shape": tuple(entry["shape"])} for entry in document.get("side", ()))
            parts["side"] = tuple(from_json(SideTarget, entry) for entry in side)
            parts["frozen"] = tuple(document.get("frozen", ()))
            if "quantization" in document:
                parts["quantization"] = from_json(Quantization, document["quantization"])
            return from_json(cls, parts)
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedError(where, f"the plan is malformed ({error})", expected="a whole plan") from error

    def without_digests(self) -> SurgeryPlan:
        """The same plan as it was before a file was read."""
        targets = tuple(replace(target, sha256="") for target in self.targets)
        whole = tuple(replace(target, sha256="") for target in self.whole)
        return replace(self, targets=targets, whole=whole, backbone_sha256="")

    def as_asked(self) -> SurgeryPlan:
        """The same plan without what files have decided: digests, and under a budget which layer gets how much."""
        plan = self.without_digests()
        if not self.spec.get("budget"):
            return plan
        return replace(plan, targets=(Target("*", "*", 1, 1, 1, "F32", 1, "*"),), untouched=())
