"""Which settings cannot stand together: one table, asked before a model is read.

A request is what was asked for, by name: a recipe's keys (`train.compile`), and FACTS, which no recipe says. Who knows
part of it asks about that part: a recipe when it is read, a method's spec when it is made, a plan when it is known how
the base is held, a run when its device and its adapter are. What depends on a model's layers (experts among the
targets, grouped convolutions, tied embeddings) is not here: it is decided where layers are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from surgery.columns import FILE, STORED, STRATEGIES, takes_data
from surgery.errors import RecipeError, RequestError, SurgeryError, UnsupportedError, option_of
from surgery.lookup import EXPORTERS

if TYPE_CHECKING:
    from pydantic import BaseModel

FACTS = {
    "held": "how the frozen base is held: `paca.quantize`, or its files' own quantization",
    "stored": "how the base's files are quantized already",
    "launched": "whether a launcher counts the processes (`--nproc`, torchrun, SLURM)",
    "processes": "how many there are, where they are several",
    "patch": "`surgery patch`",
}
AUTO = "auto"


class Said(NamedTuple):
    """A setting's value, and whether it was asked for: it is not merely the default."""

    value: Any
    is_asked: bool


Request: TypeAlias = Mapping[str, Said]


@dataclass(frozen=True)
class Combination:
    """Two settings that cannot both hold, and what is said then.

    one, other: a setting that was asked for, or with `=` one whose value fits one of the patterns behind it, with `|`
    between them. where, found, fix: `{one}` and `{other}` stand for the values. mend: what the fix says, as a recipe's
    override, or a setting to leave out.
    """

    one: str
    other: str
    error: type[SurgeryError]
    where: str
    found: str
    expected: str
    fix: str
    mend: str

    def make_error(self, request: Request) -> SurgeryError:
        """What is raised for a request in which both hold."""
        values = {side: _text(request[_name(getattr(self, side))].value) for side in ("one", "other")}
        where, found, fix = (text.format_map(values) for text in (self.where, self.found, self.fix))
        return self.error(where, found, expected=self.expected, fix=fix)


def _name(when: str) -> str:
    return when.partition("=")[0]


def _text(value: object) -> str:
    """A value as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# --- the table

SHARDED, OFF_CARD = "train.strategy=fsdp2|zero2|zero3", "train.device=cpu|hpu"
BY_FILE = f"paca.select={FILE}*"
WITH_DATA = " or ".join(name for name in STRATEGIES if takes_data(name))
WITHOUT_DATA = "paca.select=" + "|".join([*(name for name in STRATEGIES if not takes_data(name)), STORED, f"{FILE}*"])
NOT_DENSE = "export.format=" + "|".join(name for name in EXPORTERS if name != "safetensors")
EITHER = "Leave one of the two out"


def _idle_calibration(name: str) -> Combination:
    found = "given with --select {other}"
    option = f"--calibration-{name}"
    return Combination(f"paca.calibration_{name}", WITHOUT_DATA, RequestError, option, found,
                       f"{WITH_DATA} with it", f"Leave {option} out", f"paca.calibration_{name}")  # fmt: skip


def _counted_by_file(name: str) -> Combination:
    option = option_of(name)
    found = "given with --select {other}, which says how many there are"
    return Combination(f"paca.{name}", BY_FILE, RequestError, option, found,
                       "the file alone", f"Leave {option} out", f"paca.{name}")  # fmt: skip


# fmt: off
COMBINATIONS: Sequence[Combination] = (
    # which columns
    Combination("paca.budget", "paca.rank", RequestError, "--budget",
                "given with --rank", "one of the two", EITHER, "paca.rank"),
    Combination("paca.budget", "paca.rank_pattern", RequestError, "--budget",
                "given with --rank-pattern", "one of the two", EITHER, "paca.rank_pattern"),
    *(_counted_by_file(name) for name in ("rank", "rank_pattern", "budget")),
    Combination("paca.resample", BY_FILE, UnsupportedError, "--resample",
                "--select {other}, which names one set of columns", "a strategy to draw others by",
                "Leave it out", "paca.resample"),
    *(_idle_calibration(name) for name in ("data", "columns", "rows", "length")),
    # a quantized base
    Combination("paca.resample", "held", UnsupportedError, "--resample",
                "a base held as {other}, into which no column can be written", "a dense base",
                "Leave out one of them", "paca.resample"),
    Combination("paca.quantize", "stored", RequestError, "--quantize",
                "{one}, and the base is held as {other} already", "a base in 16 or 32 bits",
                "Leave it out", "paca.quantize"),
    Combination("method=read", "stored", UnsupportedError, "--method",
                "a base held as {other}, and method read", "a base in 16 or 32 bits, or method paca",
                "Take method paca", "method=paca"),
    Combination(SHARDED, "held", UnsupportedError, "train.strategy",
                "{one} with a base held as {other}, whose packed weights have no rows to be divided", "ddp",
                "Leave it out; each device holds the base", "train.strategy"),
    Combination("train.compile", "held", UnsupportedError, "train.compile",
                "true with a base held as {other}", "false", "Leave it out", "train.compile"),
    Combination("train.device=hpu", "held", UnsupportedError, "train.device",
                "hpu with a base held as {other}", "cpu or cuda", "Apply without --quantize", "paca.quantize"),
    Combination("export.format=onnx", "held", UnsupportedError, "--format onnx",
                "an adapter on a quantized base", "a dense base",
                "Merge it first (`export --merge`), then `surgery export MERGED --format onnx`",
                "export.format=safetensors"),
    Combination("patch", "held", UnsupportedError, "patch",
                "an adapter on a quantized base", "a dense base",
                "Merge it first (`export --merge`), then `surgery export MERGED --format onnx`", "patch"),
    # what a device has not
    Combination("train.precision=fp16", "train.device=cpu", UnsupportedError, "train.precision",
                "fp16 on a CPU", "bf16 or fp32", "Take auto: the weights keep their dtype", "train.precision=auto"),
    Combination("train.precision=fp16", "train.device=hpu", UnsupportedError, "train.precision",
                "fp16 on hpu", "fp32 or bf16", "Train with precision=bf16", "train.precision=bf16"),
    Combination("train.tf32=on", OFF_CARD, UnsupportedError, "train.tf32",
                "on, and the device is {other}", "an NVIDIA device from Ampere on",
                "Take auto or off", "train.tf32=off"),
    Combination("train.attention=flash_attention_2", OFF_CARD, UnsupportedError, "train.attention",
                "{one}, and the device is {other}", "a CUDA device",
                "Take auto, or --device cuda", "train.attention=auto"),
    Combination("train.liger", OFF_CARD, UnsupportedError, "train.liger",
                "the device is {other}", "Liger's kernels to be usable", "Leave train.liger out", "train.liger"),
    Combination("train.lean=on", "train.device=hpu", UnsupportedError, "train.lean",
                "on, and the device is hpu, which has fused norms of its own", "cpu or cuda",
                "Leave train.lean out", "train.lean"),
    Combination("train.compile", "train.device=hpu", UnsupportedError, "train.compile",
                "true on hpu", "false", "Take train.hpu_mode=compile", "train.compile"),
    Combination("train.hpu_mode", "train.device=cpu|cuda", RecipeError, "train.hpu_mode",
                "{one} with device {other}", "device hpu", "Leave hpu_mode out", "train.hpu_mode"),
    Combination("train.hpu_warmup_steps", "train.device=cpu|cuda", RecipeError, "train.hpu_warmup_steps",
                "{one} with device {other}", "device hpu", "Leave hpu_warmup_steps out", "train.hpu_warmup_steps"),
    Combination("paca.resample", "train.device=hpu", UnsupportedError, "--resample",
                "on a Gaudi", "cpu or cuda", "Apply without --resample", "paca.resample"),
    # a step, and what it is made of
    Combination("train.lean=on", "train.liger", RecipeError, "train.lean",
                "on, given with train.liger", "one of the two",
                "Leave one of the two out: lean blocks take Liger's kernels themselves", "train.liger"),
    Combination("train.compile", "train.cache_features", RecipeError, "train.compile",
                "given with --cache-features, which runs parts of the model alone", "one of the two",
                EITHER, "train.compile"),
    Combination("train.compile", SHARDED, RecipeError, "train.compile",
                "given with strategy {other}", "strategy ddp", EITHER, "train.strategy=ddp"),
    Combination("train.warmup_ratio", "train.warmup_steps", RecipeError, "train.warmup_ratio",
                "warmup_steps as well", "one of the two", EITHER, "train.warmup_ratio"),
    Combination("train.cache_bytes", "train.cache_features=None", RecipeError, "--cache-bytes",
                "given without --cache-features", "both, or neither", "Leave --cache-bytes out", "train.cache_bytes"),
    Combination("train.cache_features", "task=image-classification", UnsupportedError, "--cache-features",
                "with images", "texts", "Leave it out", "train.cache_features"),
    Combination("train.cache_features", "method=paca", RecipeError, "--cache-features",
                "with method paca, whose backbone changes", "method read", "Leave it out", "train.cache_features"),
    Combination("train.cache_features", "processes", UnsupportedError, "--cache-features",
                "with {other} processes", "one process", "Leave it out", "train.cache_features"),
    # several processes
    Combination("train.cpu_offload", "train.strategy=ddp|none", RecipeError, "train.cpu_offload",
                "true with strategy {other}", "a strategy that shards: fsdp2, zero2 or zero3",
                "Take one of them, or leave cpu_offload out", "train.strategy=fsdp2"),
    Combination("train.cpu_offload", "train.device=cpu", RecipeError, "train.cpu_offload",
                "true on the CPU", "a device to offload from", "Leave cpu_offload out", "train.cpu_offload"),
    Combination(SHARDED, "launched=no", RecipeError, "train.strategy",
                "{one} without a launcher", "one that counts ranks",
                "Give --nproc (1 will do), or leave train.strategy out", "train.strategy"),
    Combination("train.strategy=zero2|zero3", "train.device=cpu", UnsupportedError, "train.strategy",
                "{one} on the CPU, where accelerate does not start DeepSpeed", "a CUDA device",
                "Take fsdp2", "train.strategy=fsdp2"),
    Combination(SHARDED, "train.device=hpu", UnsupportedError, "train.strategy",
                "{one} on hpu", "ddp", "Leave train.strategy out", "train.strategy"),
    Combination("paca.resample", SHARDED, UnsupportedError, "--resample",
                "strategy {other}, which cuts what columns are made of", "ddp",
                "Apply without --resample, or take ddp", "train.strategy=ddp"),
    # what is written
    Combination("export.merge_base", NOT_DENSE, RequestError, "--merge-base",
                "{one} with --format {other}", "--merge and --format safetensors",
                "Leave it out", "export.merge_base"),
)
# fmt: on


# --- a request


def of_record(section: str, record: Any) -> Request:
    """What a frozen dataclass of settings asks for."""
    found = {}
    for entry in fields(record):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = vars(record)[entry.name]
        found[f"{section}.{entry.name}"] = Said(value, value != default)
    return found


def of_section(name: str, section: BaseModel) -> Request:
    """What a section of a recipe asks for."""
    defaults = {key: entry.default for key, entry in type(section).model_fields.items()}
    return {f"{name}.{key}": Said(value, value not in (defaults[key], AUTO)) for key, value in section}


def facts(values: Mapping[str, Any]) -> Request:
    """Settings that are known by themselves; empty ones, None and False are not asked for."""
    return {name: Said(value, bool(value)) for name, value in values.items()}


# --- the check


def holds(when: str, request: Request) -> bool:
    """Whether one side of a combination holds in a request; a setting of which nothing is known does not."""
    name, equals, patterns = when.partition("=")
    if name not in request:
        return False
    if not equals:
        return request[name].is_asked
    value = _text(request[name].value)
    return any(fnmatchcase(value, pattern) for pattern in patterns.split("|"))


def require(request: Request) -> None:
    """Raises: RequestError, RecipeError, UnsupportedError: the first combination of the table that is asked for."""
    for combination in COMBINATIONS:
        if holds(combination.one, request) and holds(combination.other, request):
            raise combination.make_error(request)
