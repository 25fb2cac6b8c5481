"""What is asked about a training run's memory: a model, an adapter or a recipe, and settings, to a prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.acceleration import choose_lean
from surgery.adapter import find_base
from surgery.backends.local import choose_device
from surgery.checkpoint import CONFIG_FILE, RECIPE_ENDINGS, RECORD_FILE, require_model
from surgery.compat import download_config
from surgery.data import is_packed
from surgery.errors import BaseMismatchError, NotAModelError, RequestError, UnsupportedError, require_known, shorten
from surgery.images import TASK as IMAGES
from surgery.manifest import ADAPTER, parse_record, read_document
from surgery.memory.predict import predict
from surgery.memory.prediction import Prediction
from surgery.memory.run import FULL, LORA, METHODS, Run
from surgery.memory.subject import Subject, open_planned, open_subject
from surgery.plan import SurgeryPlan
from surgery.planning import make_spec
from surgery.recipe import Recipe, TrainSection
from surgery.recipe_file import read_recipe
from surgery.recipe_keys import apply_override, check

DEFAULT_METHOD = "paca"


@dataclass(frozen=True)
class Question:
    """What a recipe does not say. `method`, `device`: empty for the recipe's; `padded`: None where the data decide."""

    method: str = ""
    target: int = 0
    padded: bool | None = None
    dtype: str = ""
    device: str = ""
    devices: int = 1
    sharding: str = ""
    fit_bytes: int | None = None


def forecast(path: str, question: Question, settings: Sequence[str] = ()) -> Prediction:
    """Predict a run's memory. `settings`: `key=value`, a recipe's keys.

    Raises: RequestError, RecipeError, NotAModelError, SelectorError, UnsupportedError.
    """
    method = question.method
    if method:
        require_known("--method", method, METHODS)
    is_recipe = path.endswith(RECIPE_ENDINGS)
    recipe = read_recipe(Path(path), settings) if is_recipe else _recipe(path, settings)
    method = method or recipe.method
    run = _run(recipe, question, method)
    if not is_recipe and (Path(path) / RECORD_FILE).is_file():
        subject = _open_adapter(Path(path), recipe, question, run)
    else:
        spec = _spec(recipe, method, is_recipe=is_recipe)
        subject = open_subject(config_folder(recipe.model), method, spec, recipe.task_spec(), run)
    run = _fitted(subject, recipe, question, run)
    found = predict(subject, run, fit_bytes=question.fit_bytes)
    return replace(found, notes=(*_unpredicted(recipe), *found.notes))


def forecast_plan(root: Path, plan: SurgeryPlan) -> Prediction:
    """A step of a plan with a recipe's defaults, on the device that is here. Raises: UnsupportedError."""
    recipe = _recipe(str(root), ())
    run = _run(recipe, Question(), plan.method)
    subject = open_planned(root, plan, run)
    return predict(subject, _fitted(subject, recipe, Question(), run))


def config_folder(model: str) -> Path:
    """A model's folder; of a hub id that of its config.json, the only file that is fetched. Raises: NotAModelError."""
    require_model(model)
    if Path(model).is_dir():
        return Path(model)
    try:
        return download_config(model)
    except OSError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAModelError(
            model,
            f"no such folder, and the hub did not give its {CONFIG_FILE} ({shorten(first_line, 160)})",
            expected="a model folder or a hub id such as org/name",
        ) from error


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Flags as a recipe's `key=value`; those that were not given are None."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _recipe(model: str, settings: Sequence[str]) -> Recipe:
    document: dict[str, Any] = {"model": model}
    for text in settings:
        apply_override(document, text)
    recipe: Recipe = check(Recipe, document, "settings")
    return recipe


def _spec(recipe: Recipe, method: str, *, is_recipe: bool) -> Any:
    """The method's spec. Raises: RequestError, RecipeError for settings of another method.

    A recipe's own settings may be there when LoRA or full tuning is asked about in its method's place.
    """
    idle = {FULL: ("paca", "read"), LORA: ("read",)}.get(method, ())
    given = [name for name in idle if name in recipe.model_fields_set]
    if given and not is_recipe:
        raise RequestError("settings", f"those of {given[0]}, and method {method}", expected="none that it has not")
    if method == FULL:
        return None
    if method == LORA:
        return make_spec(DEFAULT_METHOD, recipe.paca.model_dump(), "")
    return recipe.model_copy(update={"method": method}).spec()


def _unpredicted(recipe: Recipe) -> list[str]:
    """Settings of the recipe that change what is kept, and that no dry run has."""
    section = recipe.train
    notes = []
    if recipe.method == "paca" and recipe.paca.budget and recipe.paca.select != "random":
        notes.append("the budget is spread evenly here: scores, which take the weights, decide where it goes")
    if recipe.method == "paca" and recipe.paca.resample:
        notes.append("columns that no longer train take the CPU's memory, 8 bytes a value at most, beside these bytes")
    asked = {"compile": section.compile, "liger": section.liger, "cache_features": section.cache_features is not None}
    return notes + [
        f"train.{name} is not predicted: these are the bytes without it" for name, on in asked.items() if on
    ]


def _run(recipe: Recipe, question: Question, method: str) -> Run:
    """`ddp`, a recipe's default, says nothing of a single device."""
    section = recipe.train
    device = question.device or section.device
    if device == "hpu":
        raise UnsupportedError("--device hpu", "no prediction for it", expected="cpu or cuda")
    kind = choose_device(device) if device == "auto" else device
    return Run(
        batch=section.batch_size,
        sequence=recipe.data.max_length,
        target=question.target,
        dtype=question.dtype,
        precision=section.precision,
        device=kind,
        devices=question.devices,
        sharding=question.sharding or ("" if section.strategy == "ddp" else section.strategy),
        checkpointing=section.gradient_checkpointing,
        attention=section.attention,
        cpu_offload=section.cpu_offload,
        lean=_lean(section, kind, method),
    )


def _lean(section: TrainSection, device: str, method: str) -> str:
    """As `surgery train` has it; of what others train, LoRA and full tuning, only where it was asked for."""
    if section.lean == "auto" and (method in (LORA, FULL) or not choose_lean(section, device)):
        return "off"
    return str(section.lean)


def _open_adapter(folder: Path, recipe: Recipe, question: Question, run: Run) -> Subject:
    """An adapter's own plan. Raises: RequestError for a setting that it has decided."""
    record = parse_record(read_document(folder), str(folder / RECORD_FILE))
    if record.kind != ADAPTER:
        raise NotAModelError(
            str(folder), f"a folder of kind {record.kind!r}", expected="a model, an adapter or a recipe"
        )
    decided = sorted({"method", "paca", "read", "task", "labels"} & recipe.model_fields_set)
    if question.method or decided:
        found = f"{', '.join(decided) or '--method'} with an adapter, whose plan is made"
        raise RequestError(str(folder), found, expected="none", fix="Name the base instead to ask about another plan")
    try:
        root = folder if record.manifest.base.hub_id else find_base(record, folder)
    except BaseMismatchError:
        root = folder  # its config.json is the base's
    return open_planned(root, record.plan, run)


def _fitted(subject: Subject, recipe: Recipe, question: Question, run: Run) -> Run:
    """With what the model and the data decide: the default length, and whether rows differ in length."""
    if subject.dry.task == IMAGES:
        if "max_length" in recipe.data.model_fields_set:
            raise RequestError("--sequence", "given for images", expected="texts with it", fix="Leave it out")
        return replace(run, sequence=1)
    if "max_length" not in recipe.data.model_fields_set and subject.positions is not None:
        run = replace(run, sequence=min(run.sequence, subject.positions))
    padded, task = question.padded, subject.dry.task
    if question.target and task != "seq2seq":
        raise RequestError("--target-sequence", f"given for {task}", expected="the task seq2seq with it")
    if padded is None:
        files = recipe.data.train
        is_known = bool(files) and all(Path(name).is_file() for name in files)
        packs = is_packed(recipe.data.spec(), task) if is_known else not files
        padded = not (packs and task == "causal-lm")
    return replace(run, padded=padded)
