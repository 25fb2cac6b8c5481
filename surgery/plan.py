"""What a surgery will do, as a value: printed, stored, compared, and never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from surgery.errors import DamagedError, RequestError

SCHEMA = 1


@dataclass(frozen=True)
class Target:
    """One layer whose columns train.

    `module` is its dotted path in the model, `weight` its key in the checkpoint. `dtype` is the file's (safetensors'
    name). `group` names the layers fed by the same tensor: they share one set of columns. `sha256` is the digest of
    the weight's bytes in the base, empty while no file has been read.
    """

    module: str
    weight: str
    out_features: int
    in_features: int
    input_axis: int
    dtype: str
    rank: int
    group: str
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.input_axis not in (0, 1) or not 1 <= self.rank <= self.in_features or self.out_features < 1:
            raise DamagedError(
                f"target {self.module}",
                f"rank {self.rank} of {self.in_features} inputs, input axis {self.input_axis}",
                expected="a rank within the width and an axis of 0 or 1",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape as stored."""
        sizes = (self.out_features, self.in_features)
        return sizes if self.input_axis == 1 else (sizes[1], sizes[0])

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

    @property
    def trained_values(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Untouched:
    """Weights that could have been meant and are not trained: a name with `*` for layer numbers, and why."""

    pattern: str
    count: int
    reason: str


@dataclass(frozen=True)
class SurgeryPlan:
    """Targets are sorted by module, unique, and not empty.

    `prefix` is what the task's class puts before the base's names (`bert.`); `architecture` the class that loads the
    result; `config` the entries of config.json that change.
    """

    method: str
    spec: Mapping[str, Any]
    architecture: str
    task: str
    targets: tuple[Target, ...]
    whole: tuple[WholeTarget, ...] = ()
    untouched: tuple[Untouched, ...] = ()
    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        modules = [target.module for target in self.targets]
        if not modules or modules != sorted(set(modules)):
            raise DamagedError("plan", f"{len(modules)} targets", expected="a sorted list without repetition")

    @property
    def trained_values(self) -> int:
        return sum(t.trained_values for t in self.targets) + sum(w.trained_values for w in self.whole)

    def merged_name(self, base_name: str) -> str:
        """What a tensor of the base is called in the merged checkpoint."""
        return base_name if base_name.startswith(self.prefix) else self.prefix + base_name

    @property
    def id(self) -> str:
        """A digest of everything the plan says."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Canonical: the same plan gives the same text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

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
            fields = dict(document)
            fields["targets"] = tuple(Target(**entry) for entry in document["targets"])
            whole = ({**entry, "shape": tuple(entry["shape"])} for entry in document["whole"])
            fields["whole"] = tuple(WholeTarget(**entry) for entry in whole)
            fields["untouched"] = tuple(Untouched(**entry) for entry in document["untouched"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise DamagedError(where, f"the plan is malformed ({error})", expected="a whole plan") from error

    def with_targets(self, targets: tuple[Target, ...], whole: tuple[WholeTarget, ...]) -> SurgeryPlan:
        """The same plan over other targets (with digests filled in, or names bound to a file)."""
        return replace(self, targets=targets, whole=whole)
