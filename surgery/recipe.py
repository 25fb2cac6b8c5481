"""Recipes: one YAML file for a whole run, checked strictly before anything starts.

Every key is known or an error that names the nearest one. Overrides (`train.max_steps=50`, or `max_steps=50` where only
one section has such a key) go through the same checks.

`variants` are named changes to the rest, one of which `variant=NAME` makes; `smoke` are those that `smoke=true` makes,
on top. All are checked whenever the recipe is read, and what they write lies in folders of their own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from surgery.columns import FILE, STRATEGIES, is_file, takes_data
from surgery.combinations import Request, Said, facts, of_section
from surgery.combinations import require as require_together
from surgery.data import DataSpec
from surgery.errors import RecipeError, closest, require_known, shorten
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.planning import make_spec
from surgery.survey import TaskSpec


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everyone who writes a learning rate expects, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """A YAML text as plain data. Raises: yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PacaSection(_Section):
    """What PaCA does; see `PacaSpec`."""

    rank: int = Field(16, ge=1, description="trained input columns of each layer")
    targets: list[str] = Field(
        ["all-linear"], description="names, globs, re: patterns, all-linear, all-conv or experts"
    )
    exclude: list[str] = Field([], description="patterns of layers to leave out")
    rank_pattern: dict[str, int] = Field({}, description="rank by pattern; the last match decides")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank while training")
    select: str = Field("random", description=f"{', '.join(STRATEGIES)} or {FILE}PATH")
    seed: int = Field(0, ge=0, description="decides the columns that are random, and rows to choose others by")
    quantize: str = Field("", description="hold the frozen base as nf4, nf4-double, fp4, fp4-double, int8, ..")
    rows: list[int | str] = Field([], description="tokens, or numbers, whose rows of the input embedding train")
    experts: str = Field("shared", description="columns of a mixture's experts: shared by all, or each its own")
    budget: int | str = Field("", description="so many values, or a part of the targets' such as 0.5%, for a rank")
    resample: str = Field("", description="every:500: draw other columns every so many steps")
    calibration_data: list[str] = Field([], description="to choose columns by; data.train where not given")
    calibration_columns: dict[str, str] = Field({}, description="role: column name; those of data where not given")
    calibration_rows: int = Field(64, ge=1, description="rows to choose columns by, drawn by the seed")
    calibration_length: int = Field(512, ge=2, description="tokens of each at most")


def _layers(value: object) -> object:
    """`3` and `[0, 3]` as the text that they stand for."""
    numbers = value if isinstance(value, list) else [value]
    is_numbers = bool(numbers) and all(type(number) is int for number in numbers)
    return ",".join(map(str, numbers)) if is_numbers else value


class ReadSection(_Section):
    """What READ does; see `ReadSpec`."""

    cell: str = Field("gru", description="gru, lstm or rnn")
    hidden: int = Field(256, ge=1, description="width of the side network")
    recurrent_layers: int = Field(1, ge=1, description="recurrent layers on each other")
    bidirectional: bool = Field(default=False, description="run over the layers both ways")
    initial: str = Field("zero", description="first state: zero or (projected) embedding")
    reduce: str = Field("last", description="last state over the layers, or their mean")
    output_norm: bool = Field(default=False, description="RMS norm of the correction")
    scale: float = Field(1.0, gt=0, description="factor of the correction")
    layers: Annotated[str, BeforeValidator(_layers)] = Field(
        "all", description="all, every:2, last:6 or numbers such as 0,3,5"
    )
    stacks: str = Field("both", description="encoder, decoder or both, of an encoder-decoder")
    joiner: str = Field("auto", description="attention, mean or none, from encoder to decoder")
    pooling: str = Field("own", description="first, mean or last state for a classifier; own: as its class picks it")
    seed: int = Field(0, ge=0, description="decides what the side network starts from")


class DataSection(_Section):
    """Which data and how they become batches; see `DataSpec`."""

    train: list[str] = Field([], description="files or hub ids")
    eval: list[str] = Field([], description="files or hub ids held out for evaluation")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="part of the training rows to hold out")
    format: str = Field("auto", description="messages, prompt-completion, alpaca, sharegpt, text, pair, ..")
    columns: dict[str, str] = Field({}, description="role: column name (or its number where there is no header)")
    max_length: int = Field(1024, ge=2, description="tokens")
    packing: bool = Field(default=True, description="join text and cut it to blocks of max_length")
    pack_examples: bool = Field(default=False, description="pack prompts with completions and conversations as well")
    max_rows: int | None = Field(None, ge=1, description="use only the first rows")
    horizontal_flip: bool = Field(default=False, description="images: half of them, drawn anew, left for right")
    seed: int = Field(0, ge=0, description="decides which rows eval_fraction holds out")

    def spec(self) -> DataSpec:
        """The data module's own record. Raises DataError."""
        return DataSpec(**{**self.model_dump(), "train": tuple(self.train), "eval": tuple(self.eval)})


def _switch(value: object) -> object:
    """YAML reads a bare `on` as true."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _several(value: object) -> object:
    """One name stands for a list of it."""
    return [value] if isinstance(value, str) else value


class TrainSection(_Section):
    """How to train. Steps are optimizer steps."""

    learning_rate: float = Field(1e-3, gt=0)
    max_steps: int | None = Field(None, ge=1, description="overrules epochs")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="examples of one forward, on each device")
    gradient_accumulation: int = Field(1, ge=1, description="forwards before each optimizer step")
    eval_batch_size: int | None = Field(None, ge=1, description="batch_size where not given")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="part of the steps, in place of warmup_steps")
    weight_decay: float = Field(0.0, ge=0, description="pulls the columns towards the pretrained ones")
    max_grad_norm: float = Field(1.0, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    seed: int = Field(0, ge=0, description="order of the data and dropout")
    device: Literal["auto", "cpu", "cuda", "hpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on hpu and on CUDA, or fp16 where that has none"
    )
    tf32: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="products of fp32 in TF32; auto: beside 16 bits only"
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto", description="auto: flash where flash-attn, model and 16 bits allow, uncompiled; else the model's own"
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    liger: bool = Field(default=False, description="Liger's Triton kernels, on CUDA")
    lean: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="norms, gated MLPs and the loss keep the least for backward; auto: on the CPU, uncompiled"
    )
    gradient_checkpointing: bool = False
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="evaluate every so many steps; at the end in any case")
    eval_on_start: bool = Field(default=True, description="evaluate the untrained model first")
    save_steps: int | None = Field(None, ge=1, description="checkpoint every so many steps; default a tenth")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without improvement")
    metric_for_best: str = Field("loss", description="what early stopping looks at: loss, accuracy, f1, ..")
    cache_features: str | None = Field(None, description="READ: folder for the backbone's states of the training set")
    cache_bytes: str | None = Field(None, description="READ: what the states may take, for example 20GB")
    threads: int | None = Field(None, ge=1, description="torch's threads on the CPU")
    hpu_mode: Literal["lazy", "eager", "compile"] = Field("lazy", description="Gaudi: how operators reach the device")
    hpu_warmup_steps: int = Field(3, ge=0, description="Gaudi: first steps, which compile, left out of the throughput")
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field("ddp", description="how several processes share work")
    cpu_offload: bool = Field(default=False, description="fsdp2, zero2, zero3: keep shards in the CPU's memory")
    report_to: Annotated[list[Literal["tensorboard", "trackio"]], BeforeValidator(_several)] = Field(
        [], description="log to these as well, on this machine"
    )


class ExportSection(_Section):
    """What to write in the end."""

    out: str | None = Field(None, description="folder; the adapter's name with -merged if not given")
    format: str = "safetensors"
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    max_shard_size: str | None = Field(None, description="for example 5GB; the base's own files if not given")
    merge_base: Literal["original", "dequantized"] | None = Field(
        None, description="of a quantized base: what the columns are written into; original if not given"
    )
    verify: bool = True


class Recipe(_Section):
    """A whole run. Relative paths are relative to the recipe's folder."""

    model: str = Field(description="folder or hub id; tiny:llama, tiny:t5 or tiny:vit: a random one, made in code")
    adapter: str | None = Field(None, description="folder; the model's name with -paca if not given")
    method: str = "paca"
    task: str = Field("", description="what the checkpoint's own architecture does, if not given")
    labels: list[str] = Field([], description="class names; read from the data if not given")
    paca: PacaSection = PacaSection()
    read: ReadSection = ReadSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    variants: dict[str, dict[str, Any]] = Field({}, description="changes by name, of which variant=NAME makes one")
    smoke: dict[str, Any] = Field({}, description="changes that smoke=true makes: a tiny model, a few rows")

    def spec(self) -> Any:
        """The method's own record. Raises: RequestError; RecipeError for settings of a method that is not chosen."""
        lookup(METHODS, self.method, "method")
        sections: dict[str, BaseModel] = {"paca": self.paca, "read": self.read}
        for name, section in sections.items():
            if name != self.method and section.model_fields_set:
                found = f"settings of {name} ({', '.join(sorted(section.model_fields_set))}), and method {self.method}"
                raise RecipeError("recipe", found, expected=f"the settings of {self.method}", fix=f"Set method: {name}")
        settings = sections[self.method].model_dump()
        if self.method == "paca" and takes_data(self.paca.select) and not self.paca.calibration_data:
            settings |= {"calibration_data": self.data.train, "calibration_columns": self.data.columns}
        return make_spec(self.method, settings, "")

    def task_spec(self) -> TaskSpec:
        """The task as the surgery takes it. Raises RequestError."""
        return TaskSpec(self.task, tuple(self.labels))


def asked_of(recipe: Recipe) -> Request:
    """What a recipe asks for, as the table of combinations has it."""
    parts = {**of_section("train", recipe.train), **of_section("export", recipe.export)}
    whole = facts({"method": recipe.method, "task": recipe.task, "export.format": recipe.export.format})
    if recipe.method != "paca":
        return {**parts, **whole}
    columns = of_section("paca", recipe.paca)
    rank = Said(recipe.paca.rank, "rank" in recipe.paca.model_fields_set)
    return {**parts, **whole, **columns, "paca.rank": rank, **facts({"held": recipe.paca.quantize})}


def read_recipe(path: Path, overrides: Sequence[str] = (), *, outputs: Path | None = None) -> Recipe:
    """A recipe from YAML, with `key=value` overrides, `variant=NAME` and `smoke=true` among them.

    outputs: the folder that outputs are relative to (`..` left out), where it is not the recipe's.
    Raises: RecipeError, RequestError for an unknown variant.
    """
    document = _read_document(path)
    switches, given = split_switches(overrides)
    inner = next((text for text in given if text.startswith((f"{SMOKE}.", f"{VARIANTS}.", f"{VARIANTS}="))), None)
    if inner:
        raise RecipeError(
            "override", repr(inner), expected="the key that it changes", fix="Leave out what is before it"
        )
    for layers in _combinations(document, str(path)):
        _settled(document, layers, given, path)
    recipe = _settled(document, _chosen(document, switches, str(path)), given, path)
    require_together(asked_of(recipe))
    return _rooted(recipe, path.parent, outputs)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path), f"it cannot be read ({shorten(str(error), 200)})", expected="a YAML file"
        ) from error
    if not isinstance(document, dict):
        raise RecipeError(str(path), "no mapping", expected="keys such as model, data and train")
    return document


# --- variants and smoke runs

SMOKE, VARIANTS = "smoke", "variants"
Layers = tuple[str, ...]  # what is laid over a recipe: a variant's name or none, and `smoke` or not


def split_switches(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`variant=NAME` and `smoke=true` by their names, and all other overrides."""
    pairs = [(text, *text.partition("=")) for text in overrides]
    switches = {key: value for _, key, equals, value in pairs if equals and key in ("variant", SMOKE)}
    return switches, [text for text, key, _, _ in pairs if key not in switches]


def _combinations(document: dict[str, Any], where: str) -> Iterator[Layers]:
    """Every variant, with the smoke run and without. Raises: RecipeError for layers that are no mappings."""
    named, smoke = document.get(VARIANTS, {}), document.get(SMOKE, {})
    is_mapping = isinstance(named, dict) and all(isinstance(changes, dict) for changes in named.values())
    if not is_mapping or not all(isinstance(name, str) and name != SMOKE for name in named):
        raise RecipeError(where, f"{VARIANTS}: {named!r:.60}", expected="a mapping of names to changes")
    if not isinstance(smoke, dict):
        raise RecipeError(where, f"{SMOKE}: {smoke!r:.60}", expected="a mapping of changes")
    for name in named:
        yield (name,)
        if smoke or SMOKE in named[name]:
            yield (name, SMOKE)
    if smoke and not named:
        yield (SMOKE,)


def _chosen(document: dict[str, Any], switches: Mapping[str, str], where: str) -> Layers:
    """The layers that the switches ask for. Raises: RecipeError, RequestError."""
    names, variant = list(document.get(VARIANTS, {})), switches.get("variant")
    if variant is None and names:
        raise RecipeError(where, "no variant chosen", expected=f"variant=NAME, one of {', '.join(names)}")
    if variant is not None:
        require_known("variant", variant, names)
    asked = parse_yaml(switches.get(SMOKE, "false"))
    if not isinstance(asked, bool):
        raise RecipeError("override", f"{SMOKE}={switches[SMOKE]}", expected=f"{SMOKE}=true or {SMOKE}=false")
    layers = (() if variant is None else (variant,)) + ((SMOKE,) if asked else ())
    if asked and layers not in list(_combinations(document, where)):
        raise RecipeError(where, f"{SMOKE}=true, and no section {SMOKE}", expected="one that says what it changes")
    return layers


def _settled(document: dict[str, Any], layers: Layers, overrides: Sequence[str], path: Path) -> Recipe:
    """The recipe with its layers and then the overrides laid over it. Raises: RecipeError."""
    where = ", ".join([str(path), *layers])
    document = copy.deepcopy(document)
    for name in layers:
        changes = document.pop(SMOKE) if name == SMOKE else document[VARIANTS][name]
        wrong = next((key for key in (VARIANTS, SMOKE) if key in changes and (name == SMOKE or key == VARIANTS)), None)
        if wrong:
            raise RecipeError(where, f"unknown key {wrong!r}", expected="keys that can be changed")
        document = _overlay(document, changes)
    _set_apart(document, layers, path.stem)
    for text in overrides:
        apply_override(document, text)
    recipe: Recipe = check(Recipe, document, where)
    return recipe


def _overlay(document: Mapping[str, Any], changes: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Changes laid over a recipe: sections key by key, and each key's value as a whole."""
    whole = set(known_keys(Recipe)) - {SMOKE}
    result = dict(document)
    for key, value in changes.items():
        before, full = document.get(key), f"{at}{key}"
        if isinstance(before, dict) and isinstance(value, dict) and full.removeprefix(f"{SMOKE}.") not in whole:
            result[key] = _overlay(before, value, f"{full}.")
        else:
            result[key] = value
    return result


def _set_apart(document: dict[str, Any], layers: Layers, stem: str) -> None:
    """What a variant or a smoke run writes lies in a folder of its own."""

    def own(text: object) -> object:
        return str(Path(text).parent.joinpath(*layers, Path(text).name)) if isinstance(text, str) else text

    if layers:
        document["adapter"] = own(document.get("adapter") or f"{stem}-{document.get('method', 'paca')}")
    export = document.get("export")
    if isinstance(export, dict) and "out" in export:
        document["export"] = {**export, "out": own(export["out"])}


def apply_override(document: dict[str, Any], text: str) -> None:
    """Set `section.key=value`, the value read as YAML. Raises: RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError("override", repr(text), expected="key=value, such as train.max_steps=50")
    *parents, last = qualified(key).split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise RecipeError("override", f"{key!r}: {parent} is no section", expected="section.key=value")
    try:
        document[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError("override", f"{text!r} does not parse", expected="a YAML value") from error


def qualified(key: str) -> str:
    """`max_steps` as `train.max_steps`. Raises: RecipeError for an unknown key, or one that several sections have."""
    known = list(known_keys(Recipe))
    first = key.split(".", maxsplit=1)[0]
    if key in known or (first in Recipe.model_fields and "." in key) or first in Recipe.model_fields:
        return key
    homes = [full for full in known if full.split(".")[-1] == key]
    if len(homes) > 1:
        raise RecipeError("override", f"{key!r} could be {' or '.join(homes)}", expected="section.key=value")
    if not homes:
        tails = {full.split(".")[-1]: full for full in known}
        raise RecipeError(
            "override", f"unknown key {key!r}", expected="a key of the recipe", fix=closest(key, [*known, *tails])
        )
    return homes[0]


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, dotted."""
    for name, entry in model.model_fields.items():
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def describe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, dotted."""
    rows: list[tuple[str, str, str]] = []
    for name, entry in model.model_fields.items():
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += describe_keys(kind, f"{prefix}{name}.")
        else:
            default = "required" if entry.is_required() else json.dumps(entry.default)
            rows.append((f"{prefix}{name}", default, entry.description or ""))
    return rows


def check(model: type[Any], document: dict[str, Any], where: str) -> Any:
    """A section from plain data. Raises: RecipeError that names the first wrong key, and the nearest right one."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            siblings = _fields_at(model, first["loc"][:-1])
            raise RecipeError(
                where,
                f"unknown key {key!r}",
                expected=f"one of {', '.join(siblings)}",
                fix=closest(str(first["loc"][-1]), siblings),
            ) from error
        if first["type"] == "missing":
            raise RecipeError(where, f"{key} is missing", expected="it to be given") from error
        raise RecipeError(where, f"{key}: {first['input']!r}", expected=_plain(first)) from error


def _plain(entry: Mapping[str, Any]) -> str:
    """What pydantic expected, as the end of a sentence that begins with `expected`."""
    if entry["type"] == "model_type":
        return "a section with keys of its own"
    message = str(entry["msg"]).removeprefix("Input should be ").removesuffix(".")
    return f"a number {message}" if message.startswith(("greater", "less")) else message[:1].lower() + message[1:]


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        kind = model.model_fields[str(part)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)


def _rooted(recipe: Recipe, folder: Path, outputs: Path | None) -> Recipe:
    """Relative paths that exist beside the recipe become paths to there; outputs always do, or to below `outputs`."""

    def source(text: str) -> str:
        return str(folder / text) if (folder / text).exists() else text

    def output(text: str | None) -> str | None:
        if text and outputs is not None and not Path(text).is_absolute():
            return str(outputs.joinpath(*(part for part in Path(text).parts if part != "..")))
        return str(folder / text) if text else None

    train, evals = [source(t) for t in recipe.data.train], [source(t) for t in recipe.data.eval]
    changes: dict[str, Any] = {
        "model": source(recipe.model),
        "adapter": output(recipe.adapter),
        "data": recipe.data.model_copy(update={"train": train, "eval": evals}),
        "export": recipe.export.model_copy(update={"out": output(recipe.export.out)}),
    }
    if "paca" in recipe.model_fields_set:
        changes["paca"] = _rooted_columns(recipe.paca, source)
    return recipe.model_copy(update=changes)


def _rooted_columns(section: PacaSection, source: Callable[[str], str]) -> PacaSection:
    """What columns are chosen by: files beside the recipe."""
    changes: dict[str, Any] = {}
    if is_file(section.select):
        changes["select"] = FILE + source(section.select.removeprefix(FILE))
    if section.calibration_data:
        changes["calibration_data"] = [source(name) for name in section.calibration_data]
    return section.model_copy(update=changes)
