"""What a bench is asked: its specification, and what the names of its methods mean.

A method is a name of the table, or a name with settings: `paca`, `paca:r=4`, `read:cell=lstm,hidden=64`,
`lora:values=paca:r=16` (the rank whose trained values come nearest to those of the other), `lora:values=100000`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from surgery.bench.held import DENSE, require_kind_for
from surgery.bench.methods import VARIANTS, Variant, require_peft
from surgery.checkpoint import RECIPE_ENDINGS
from surgery.errors import RecipeError, RequestError, closest, require_known, shorten
from surgery.metrics import metric_names
from surgery.recipe import DataSection
from surgery.recipe_keys import apply_override, check
from surgery.strict_yaml import parse_yaml
from surgery.writing import parse_size

DEFAULT_METHODS = ("floor", "paca", "read", "lora", "full")
VALUES = "values"
OPTION = "--methods"
ANY = "*"  # all methods that have no learning rate of their own
DEFAULT_SEQUENCE = 128
QUANTIZE = "quantize"
LATER = ("lean", QUANTIZE)  # keys that the first results do not have


class BenchSpec(BaseModel):
    """Everything that decides what a bench measures; it stands in its results, and a resumed bench has the same.

    equal: sized methods without a size of their own get the rank (READ `hidden`), or as many trained values as PaCA has
    at that rank. fit_bytes: the memory whose longest sequence is sought; None for no search. learning_rates: by the
    method's full name or by its first part; `*` for all others. tune: learning rates to try, instead. quantize: how
    every method's base is held, where a method does not say it of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    methods: list[str] = list(DEFAULT_METHODS)
    task: str = ""
    labels: list[str] = []
    targets: list[str] = ["all-linear"]
    exclude: list[str] = []
    equal: Literal["rank", "values"] = "rank"
    rank: int = Field(16, ge=1)
    hidden: int = Field(64, ge=1)
    data: DataSection | None = None
    batch: int = Field(8, ge=1)
    sequence: int = Field(DEFAULT_SEQUENCE, ge=2)
    rounds: int = Field(15, ge=2)
    warmup: int = Field(3, ge=1)
    fit_bytes: int | None = Field(None, ge=1)
    checkpointing: bool = False
    lean: bool = False
    quantize: str = ""
    dropout: float = Field(0.0, ge=0, lt=1)
    dtype: Literal["", "fp32", "bf16", "fp16"] = ""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    seeds: int = Field(3, ge=1)
    steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    learning_rates: dict[str, float] = {}
    tune: list[float] = []
    tune_fraction: float = Field(0.1, gt=0, lt=1)
    tune_steps: int | None = Field(None, ge=1)
    warmup_ratio: float = Field(0.06, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    metric: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON has it. What came later stands there only where it is given: results from before stay the same."""
        return self.model_dump(mode="json", exclude={name for name in LATER if not getattr(self, name)})


def read_spec(model: str, options: Mapping[str, Any], settings: Sequence[str] = ()) -> BenchSpec:
    """The specification of a command line: a model or a YAML file of these keys, options by name, and `key=value`.

    Raises: RequestError, RecipeError.
    """
    document: dict[str, Any] = _read_document(Path(model)) if model.endswith(RECIPE_ENDINGS) else {"model": model}
    data = document.setdefault("data", None) or {}
    section: dict[str, Any] = {"model": document.get("model", ""), "data": data}
    for text in settings:
        apply_override(section, text)
    strange = sorted(set(section) - {"model", "data"})
    if strange:
        found = f"settings of {strange[0]}"
        raise RequestError("bench", found, expected="keys of the section data", fix="See `surgery bench --help`")
    if "max_length" in data:
        raise RequestError("data.max_length", str(data["max_length"]), expected="--sequence instead")
    for option, value in options.items():
        name, parse = _OPTIONS.get(option, (option, _as_given))
        (data if name in ("train", "eval") else document)[name] = parse(value)
    if data:
        document["data"] = {**data, "max_length": document.get("sequence", DEFAULT_SEQUENCE)}
    return make_spec(document, model if model.endswith(RECIPE_ENDINGS) else "bench")


def _read_document(path: Path) -> dict[str, Any]:
    """A file of a specification's keys; relative paths that exist beside it are paths to there. Raises: RecipeError."""
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        found = f"it cannot be read ({shorten(str(error), 200)})"
        raise RecipeError(str(path), found, expected="a YAML file") from error
    if not isinstance(document, dict) or not isinstance(document.get("data") or {}, dict):
        raise RecipeError(str(path), "no mapping", expected="keys such as model, methods and data")

    def rooted(text: Any) -> Any:
        return str(path.parent / text) if isinstance(text, str) and (path.parent / text).exists() else text

    document["model"] = rooted(document.get("model", ""))
    for name in ("train", "eval"):
        if isinstance(files := (document.get("data") or {}).get(name), list):
            document["data"][name] = [rooted(file) for file in files]
    return document


def make_spec(document: dict[str, Any], where: str = "bench") -> BenchSpec:
    """The specification, checked. Raises: RecipeError, RequestError, UnsupportedError for a missing extra."""
    spec: BenchSpec = check(BenchSpec, document, where)
    spec = spec.model_copy(update={"methods": split_methods(spec.methods)})
    _require_consistent(spec)
    return spec


def _as_given(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_list(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    return [part.strip() for text in texts for part in ([text] if text.startswith("re:") else text.split(",")) if part]


def _as_numbers(value: str) -> list[float]:
    return [_as_number("--tune", text) for text in _as_list(value)]


def _as_number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(option, repr(text), expected="a number such as 1e-3") from error


def _as_rates(values: Sequence[str]) -> dict[str, float]:
    """`method=rate` pairs; a rate alone is that of all others. A method's name may hold `=` itself."""
    pairs = (text.rpartition("=") for text in values)
    return {name or ANY: _as_number("--lr", rate) for name, _, rate in pairs}


def _as_bytes(value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise RequestError("--fit", str(error), expected="a size such as 80GB") from error


_OPTIONS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {  # of the command line: the key, and how it is read
    "data": ("train", _as_given),
    "eval_data": ("eval", _as_given),
    "labels": ("labels", _as_list),
    "targets": ("targets", _as_list),
    "exclude": ("exclude", _as_list),
    "rates": ("learning_rates", _as_rates),
    "tune": ("tune", _as_numbers),
    "fit": ("fit_bytes", _as_bytes),
}


def _require_consistent(spec: BenchSpec) -> None:
    """No option that another makes idle. Raises: RequestError."""
    if spec.data is not None and not spec.data.train:
        raise RequestError("--eval-data", "given without --data", expected="data to train on", fix="Give --data FILE")
    needs_data = {
        "--tune": bool(spec.tune), "--lr": bool(spec.learning_rates), "--steps": spec.steps is not None,
        "--metric": bool(spec.metric),
    }  # fmt: skip
    given = [name for name, is_given in needs_data.items() if is_given]
    if given and spec.data is None:
        raise RequestError(given[0], "given without --data", expected="data to train on", fix="Give --data FILE")
    if spec.tune_steps and not spec.tune:
        raise RequestError("--tune-steps", "given without --tune", expected="learning rates to try")
    if spec.tune and spec.learning_rates:
        raise RequestError("--tune", "given with --lr", expected="one of the two")
    if any(rate <= 0 for rate in (*spec.tune, *spec.learning_rates.values())):
        raise RequestError("--lr", "a learning rate of 0 or less", expected="positive numbers")
    if spec.tune and len(set(spec.tune)) < 2:
        raise RequestError("--tune", f"{len(set(spec.tune))} learning rate", expected="two or more to choose from")
    if spec.metric and spec.task:
        require_known("--metric", spec.metric, ("loss", *metric_names(spec.task)))
    entries = parse_methods(spec.methods)
    _require_quantizable(spec, entries)
    names = {entry.name for entry in entries}
    names |= {name.partition(":")[0] for name in names} | {ANY}
    for name in spec.learning_rates:
        require_known("--lr", name, sorted(names))


def _require_quantizable(spec: BenchSpec, entries: Sequence[Entry]) -> None:
    """Each method can train over its base as it is held. Raises: RequestError, UnsupportedError."""
    for entry in entries:
        if entry.quantize is not None:
            require_kind_for(entry.variant.name, entry.quantize, f"{OPTION} {entry.name}")
        elif spec.quantize:
            require_kind_for(entry.variant.name, spec.quantize, "--quantize")


# --- methods by name


@dataclass(frozen=True)
class Entry:
    """One method asked for. settings: as given; values: how many values, or a method's name, to come near to.

    quantize: how its base is held, `none` for as it is; None where the bench says it for all.
    """

    name: str
    variant: Variant
    settings: Mapping[str, Any]
    values: str | int | None = None
    quantize: str | None = None

    @property
    def size(self) -> int | None:
        """The size that was given, if one was."""
        found: int | None = self.settings.get(self.variant.size) if self.variant.size else None
        return found


def split_methods(texts: Iterable[str]) -> list[str]:
    """Methods separated by commas; `hidden=64` behind a comma is a setting of the method before it."""
    found: list[str] = []
    for text in texts:
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            if re.match(r"\w+=", part) and found and ":" in found[-1]:
                found[-1] += f",{part}"
            else:
                found.append(part)
    return found


def parse_methods(texts: Sequence[str]) -> tuple[Entry, ...]:
    """What the methods' names mean. Raises: RequestError; UnsupportedError for a missing extra."""
    entries = tuple(parse_method(text) for text in split_methods(texts))
    if not entries:
        raise RequestError(OPTION, "no method", expected=f"some of {', '.join(VARIANTS)}")
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RequestError(OPTION, f"{twice} stands twice", expected="each once")
    if any(entry.variant.extra for entry in entries):
        require_peft()
    return entries


def parse_method(text: str) -> Entry:
    """One method's name. Raises: RequestError."""
    name, _, rest = text.partition(":")
    require_known(OPTION, name, VARIANTS)
    variant = VARIANTS[name]
    values, kind, settings = None, None, dict[str, Any]()
    known = [setting for setting in (variant.size, *variant.takes) if setting]
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key == VALUES and variant.size and value:
            values = int(value) if value.isdigit() else value
            continue
        if key == QUANTIZE and value:
            kind = value
            continue
        if key not in known or not equals:
            many = [*known, VALUES, QUANTIZE] if variant.size else [QUANTIZE]
            expected = f"one of {', '.join(many)}, as key=value"
            raise RequestError(f"{OPTION} {text}", f"the setting {part!r}", expected=expected, fix=closest(key, known))
        try:
            settings[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise RequestError(f"{OPTION} {text}", repr(part), expected="key=value") from error
    _require_size(text, variant, settings, values)
    return Entry(text, variant, settings, values, kind)


def _require_size(text: str, variant: Variant, settings: Mapping[str, Any], values: str | int | None) -> None:
    size = settings.get(variant.size) if variant.size else None
    if "budget" in settings and (size is not None or values is not None):
        raise RequestError(f"{OPTION} {text}", "budget and another size", expected="one of the two")
    if size is not None and values is not None:
        raise RequestError(f"{OPTION} {text}", f"{variant.size} and {VALUES}", expected="one of the two")
    if size is not None and (type(size) is not int or size < 1):
        raise RequestError(f"{OPTION} {text}", f"{variant.size}={size}", expected="a whole number from 1 on")
    if isinstance(values, str):
        other = parse_method(values)
        if other.values is not None or not other.variant.size:
            expected = "a number, or a method that has a size, such as paca:r=16"
            raise RequestError(f"{OPTION} {text}", f"{VALUES}={values}", expected=expected)


def default_size(entry: Entry, spec: BenchSpec) -> int:
    """The size of a method that was given none, at equal rank."""
    return spec.hidden if entry.variant.name == "read" else spec.rank


def wanted_values(entry: Entry, spec: BenchSpec) -> str | int | None:
    """What a method's trained values shall come near to, where its size is to be found from that; else None."""
    if entry.values is not None or not entry.variant.size or "budget" in entry.settings:
        return entry.values
    is_reference = entry.variant.name == "paca"
    return f"paca:r={spec.rank}" if spec.equal == "values" and entry.size is None and not is_reference else None


def held_as(entry: Entry, spec: BenchSpec) -> str:
    """How a method's base is held; empty for as it is."""
    kind = spec.quantize if entry.quantize is None else entry.quantize
    return "" if kind == DENSE else kind


def learning_rate(entry: Entry, spec: BenchSpec) -> float:
    """The rate that was given for a method, or for all. Raises: RequestError."""
    rates = spec.learning_rates
    for name in (entry.name, entry.variant.name, ANY):
        if name in rates:
            return rates[name]
    raise RequestError("--lr", f"none for {entry.name}", expected=f"--lr {entry.variant.name}=RATE, or one for all")
