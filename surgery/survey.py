"""What a checkpoint's model is made of, found without loading a weight: on the meta device."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from surgery.checkpoint import CONFIG_FILE, read_json
from surgery.compat import (
    TRANSFORMERS_5,
    base_name,
    current_class,
    image_size,
    is_experts,
    load_tokenizer,
    pixels_config,
    quiet_loading,
    settle_rope,
    upstream_architecture,
)
from surgery.errors import NotAModelError, RequestError, UnsupportedError, closest, shorten
from surgery.plan import Untouched
from surgery.quantized import stored_kind
from surgery.select import ATTENTION, CONVOLUTION, EMBEDDING, LINEAR, LinearSite

TRACE_TOKENS = 8


@dataclass(frozen=True)
class Task:
    """A task: transformers' automatic class for it, its table of architectures, whether it adds a head."""

    auto_class: str
    architectures: Mapping[str, Any]
    has_head: bool = False


TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": Task("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "sequence-classification": Task(
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        has_head=True,
    ),
    "regression": Task("AutoModelForSequenceClassification", {}, has_head=True),
    "token-classification": Task(
        "AutoModelForTokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, has_head=True
    ),
    "image-classification": Task(
        "AutoModelForImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, has_head=True
    ),
    "features": Task("AutoModel", {}),
}


@dataclass(frozen=True)
class TaskSpec:
    """The task asked for. `name` empty: what the checkpoint's own architecture does. `labels`: class names by id."""

    name: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name and self.name not in TASKS:
            raise RequestError(
                "--task",
                f"unknown task {self.name!r}",
                expected=f"one of {', '.join(TASKS)}",
                fix=closest(self.name, TASKS),
            )


@dataclass(frozen=True)
class Survey:
    """A model on the meta device and how it is to be loaded.

    `config_changes` are the entries of config.json that the task changes; `heads` the modules that make the output.
    """

    model: nn.Module
    config: PretrainedConfig
    task: str
    architecture: str
    heads: tuple[str, ...]
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def read_config(root: Path, *, takes_4bit: bool = False) -> PretrainedConfig:
    """The model's configuration. takes_4bit: bitsandbytes' 4 bits may stand in the files.

    Raises: NotAModelError, UnsupportedError for a quantized checkpoint.
    """
    if not (root / CONFIG_FILE).is_file():
        raise NotAModelError(str(root), f"no {CONFIG_FILE}", expected="a Hugging Face model folder")
    document = read_json(root / CONFIG_FILE)
    if "quantization_config" in document and not (takes_4bit and stored_kind(document["quantization_config"])):
        quantized = document["quantization_config"]
        method = quantized.get("quant_method", "some") if isinstance(quantized, dict) else "some"
        raise UnsupportedError(
            str(root),
            f"a checkpoint quantized by {method}",
            expected=f"fp32, bf16 or fp16 weights{', or 4 bits with their usual storage' if takes_4bit else ''}",
            fix="Start from the checkpoint it was quantized from",
        )
    with _foreign_config(root):
        config: PretrainedConfig = AutoConfig.from_pretrained(root, trust_remote_code=False)
        settle_rope(config, document)
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"architectures {names!r}")
    return config


@contextlib.contextmanager
def _foreign_config(root: Path) -> Iterator[None]:
    """Whatever transformers' classes raise over a config.json, as one error that names the file."""
    try:
        with quiet_loading():
            yield
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAModelError(
            str(root / CONFIG_FILE),
            f"transformers cannot read it ({shorten(first_line, 200)})",
            expected="a model that transformers knows",
        ) from error


def own_architecture(config: PretrainedConfig) -> str:
    """The architecture config.json names, or the empty string."""
    names = config.architectures or [""]
    return upstream_architecture(names[0])


def own_task(config: PretrainedConfig) -> str:
    """The task of the checkpoint's own architecture."""
    architecture = own_architecture(config)
    if architecture.endswith("ForSequenceClassification") and config.problem_type == "regression":
        return "regression"
    return next((name for name, task in TASKS.items() if architecture in task.architectures.values()), "features")


def class_for(config: PretrainedConfig, task: str) -> Any:
    """The class that loads a checkpoint for a task. Raises UnsupportedError where transformers has none."""
    architecture = own_architecture(config)
    if task == own_task(config) and hasattr(transformers, architecture):
        return current_class(getattr(transformers, architecture))
    auto = getattr(transformers, TASKS[task].auto_class)
    if type(config) not in auto._model_mapping:  # noqa: SLF001  transformers offers no public question
        raise UnsupportedError(
            f"--task {task}",
            f"transformers has no {task} model for {config.model_type}",
            expected=f"one that {TASKS[task].auto_class} knows",
        )
    return current_class(auto._model_mapping[type(config)])  # noqa: SLF001


def _task_config(root: Path, config: PretrainedConfig, spec: TaskSpec, task: str) -> dict[str, Any]:
    """The entries of config.json that a task's head needs. Raises: RequestError for labels that cannot be its."""
    _require_labels(spec.labels, task)
    if not TASKS[task].has_head:
        return {}
    changes: dict[str, Any] = {}
    if spec.labels:
        changes["id2label"] = {str(number): label for number, label in enumerate(spec.labels)}
        changes["label2id"] = {label: number for number, label in enumerate(spec.labels)}
    elif task == "regression":
        changes["id2label"], changes["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    if task in ("sequence-classification", "regression"):
        changes["problem_type"] = "regression" if task == "regression" else "single_label_classification"
        if config.pad_token_id is None and not config.is_encoder_decoder:
            changes["pad_token_id"] = _pad_token_id(root)
    return {name: value for name, value in changes.items() if value is not None}


def _require_labels(labels: Sequence[str], task: str) -> None:
    """Raises: RequestError where no head has classes, or one of them is named twice."""
    if labels and not TASKS[task].has_head:
        fix = "Leave --labels out, or name a classifier's task with --task"
        raise RequestError("--labels", f"given for {task}", expected="a task with classes", fix=fix)
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise RequestError("--labels", f"{twice!r} named twice", expected="each class once")


def _pad_token_id(root: Path) -> int | None:
    """What the tokenizer pads with (its end token where it has no other): a decoder's classifier must know it."""
    try:
        with quiet_loading():
            tokenizer = load_tokenizer(root)
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return None if pad is None else int(pad)


def survey(root: Path, spec: TaskSpec, *, takes_4bit: bool = False) -> Survey:
    """Build the model that `spec` asks for on the meta device, from config.json alone; see `read_config`."""
    config = read_config(root, takes_4bit=takes_4bit)
    task = spec.name or own_task(config)
    model_class = class_for(config, task)
    changes = _task_config(root, config, spec, task)
    architecture = upstream_architecture(model_class.__name__)
    if [architecture] != (config.architectures or [])[:1]:  # also where optimum-habana has saved the base
        changes["architectures"] = [architecture]
    with _foreign_config(root), torch.device("meta"):
        config = configured(config, changes)
        model = model_class(config)
        model.tie_weights()
    heads = find_heads(model, has_head=TASKS[task].has_head)
    return Survey(model, config, task, architecture, heads, changes)


def configured(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of a configuration with a task's entries."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        numbered = {int(number): label for number, label in value.items()} if name == "id2label" else value
        setattr(config, name, numbered)
    return config


def find_heads(model: Any, *, has_head: bool) -> tuple[str, ...]:
    """The modules that make the output: a task's head is all that lies outside the base model."""
    base = base_name(model)
    if has_head and base:
        return tuple(name for name, _ in model.named_children() if name != base)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(name for name, module in model.named_modules() if module is output and output is not None)


def _trace_inputs(model: Any) -> dict[str, Tensor]:
    config = model.config
    if model.main_input_name == "pixel_values":
        config = pixels_config(config)
        return {"pixel_values": torch.zeros((1, config.num_channels, *image_size(config)))}
    tokens = torch.zeros((1, TRACE_TOKENS), dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    return inputs


def trace_groups(model: nn.Module, sites: Sequence[LinearSite], others: Iterable[str] = ()) -> dict[str, str]:
    """Each layer's group: the first name among the layers fed by the same tensor objects along the same axis.

    Other modules join the layers' groups, or have one of their own; no group gets another name for it.

    One forward of a twin's base model (heads may look at values) with fake tensors, which have sizes and no values. A
    model that cannot be traced, or a layer that was not reached, shares with no one.
    """
    names = [*sorted(site.module for site in sites), *sorted(others)]
    seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in names}

    kinds = {site.module: site.kind for site in sites}

    def watch(name: str) -> Any:
        return lambda _module, args, kwargs: seen[name].extend(_fed(kinds.get(name, LINEAR), args, kwargs))

    try:
        twin = meta_twin(model)
        for name in seen:
            twin.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
        dry_run(twin)
    except Exception:  # noqa: BLE001  any failure of foreign code in a dry run means: no sharing, and nothing else
        seen = {name: [] for name in seen}
    groups: dict[tuple[tuple[int, int], ...], str] = {}
    result = {}
    for name in names:
        key = tuple((id(tensor), axis) for tensor, axis in seen[name])
        result[name] = groups.setdefault(key, name) if key else name
    return result


def _fed(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
    """What a layer is given in one call, and which axis of it the channels run along, counted from the front."""
    if kind == EMBEDDING:
        return []
    if kind != ATTENTION:
        behind = 3 if kind == CONVOLUTION else 1
        return [(tensor, tensor.dim() - behind) for tensor in args[:1] if isinstance(tensor, Tensor)]
    named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    given = {id(named[name]): named[name] for name in ("query", "key", "value")}
    return [(tensor, tensor.dim() - 1) for tensor in given.values()]


def meta_twin(model: Any) -> Any:
    """The same model on the meta device, so that tracing leaves mode, hooks and settings of the model alone.

    In implementations that can be traced: others look at the mask's values or at how tokens are routed.
    """
    with torch.device("meta"), quiet_loading():
        twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")  # noqa: SLF001
        if TRANSFORMERS_5:
            twin.set_experts_implementation("batched_mm")
    return twin.eval()


def dry_run(twin: Any) -> None:
    """One forward of a twin's base model with fake tensors, for what its hooks see."""
    base = twin.get_submodule(base_name(twin))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), quiet_loading():
        _leave_meta(base)
        base(**_trace_inputs(base))


def find_idle(model: Any) -> frozenset[str]:
    """The parameters of an image classifier that none of its logits depend on: no gradient will ever reach them.

    SigLIP's head, for one, which pools with attention: its classifier averages the patches instead. One forward and
    backward of a twin with fake tensors; of a model that cannot be run so, none are known.
    """
    try:
        twin = meta_twin(model)
        with FakeTensorMode(allow_non_fake_inputs=True), quiet_loading():
            _leave_meta(twin)
            twin.requires_grad_()
            twin(**_trace_inputs(twin)).logits.sum().backward()
    except Exception:  # noqa: BLE001  as above: what foreign code does without values says nothing about the model
        return frozenset()
    return frozenset(name for name, parameter in twin.named_parameters() if parameter.grad is None)


def _leave_meta(module: nn.Module) -> None:
    """As `to_empty(device="cpu")`, which cannot give fake tensors to parameters that modules share."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cpu"))


def list_untouched(model: nn.Module, touched: Mapping[str, Any], reasons: Mapping[str, str]) -> tuple[Untouched, ...]:
    """Matrices of the model that will not train, layer numbers folded into `*`. `reasons`: by parameter name."""
    counts: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name not in touched:
            reason = reasons.get(name) or _why_untouched(model, name)
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason)
            counts[key] = counts.get(key, 0) + 1
    return tuple(Untouched(pattern, count, reason) for (pattern, reason), count in counts.items())


def _why_untouched(model: nn.Module, name: str) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_experts(module):
        return "fused experts"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    return f"in {type(module).__name__}"


def new_parameters(model: nn.Module, present: set[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that the checkpoint does not hold under any of their names (tied ones have several)."""
    known = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in present}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            yield name, parameter
