"""READ: a small recurrence over a frozen backbone's layers, and one correction of its last hidden state.

Source: READ, arXiv 2305.15348. The network itself, and the hooks by which it reads a backbone, are in `surgery.side`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from surgery.checkpoint import Checkpoint
from surgery.columns import generator_seed
from surgery.combinations import facts
from surgery.combinations import require as require_together
from surgery.delta import SideDelta, WholePatch, backbone_sha256
from surgery.errors import BaseMismatchError, RequestError, UnsupportedError, closest, option_of
from surgery.methods import Method, PlanRequest
from surgery.plan import SideTarget, SurgeryPlan
from surgery.sharding import whole as gathered
from surgery.side.network import SideNetwork, attach_side, build_side
from surgery.side.settings import GATES, NAME, SideSettings, Stack
from surgery.side.source import side_source
from surgery.stacks import BACKBONE, DECODER, ENCODER, find_stacks
from surgery.survey import TASKS

CHOICES: Mapping[str, tuple[str, ...]] = {
    "cell": tuple(GATES),
    "initial": ("zero", "embedding"),
    "reduce": ("last", "mean"),
    "stacks": ("both", "encoder", "decoder"),
    "joiner": ("auto", "attention", "mean", "none"),
    "pooling": ("own", "first", "mean", "last"),
}
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
_LAYERS = "all, every:2, last:6 or numbers from 0 such as 0,3,5"
_AUTO_TABLES = {"AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
POOLED_TASKS = ("sequence-classification", "regression", "image-classification")


@dataclass(frozen=True)
class ReadSpec:
    """What READ is asked to do.

    cell: gru, lstm or rnn; hidden: its width; recurrent_layers, bidirectional: as torch.nn.GRU has them; initial: the
    first state is zero, or a projection of the embedding output; reduce: the last state over the layers, or the mean;
    output_norm: RMS norm of the correction; scale: its factor; layers: `all`, `every:2` (the last and every second
    before it), `last:6`, or numbers from 0 such as `0,3,5`; stacks: which of an encoder and its decoder are read;
    joiner: how the encoder's side states reach the decoder's recurrence (auto: attention, where the encoder is read);
    pooling: the state that a classifier sees (own: as its class picks it); seed: with a tensor's name it decides what
    the tensor starts from.
    """

    method: ClassVar[str] = "read"
    later: ClassVar[tuple[str, ...]] = ()

    cell: str = "gru"
    hidden: int = 256
    recurrent_layers: int = 1
    bidirectional: bool = False
    initial: str = "zero"
    reduce: str = "last"
    output_norm: bool = False
    scale: float = 1.0
    layers: str = "all"
    stacks: str = "both"
    joiner: str = "auto"
    pooling: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (given := getattr(self, name)) not in known:
                expected, fix = f"one of {', '.join(known)}", closest(str(given), known)
                raise RequestError(f"--{name}", repr(given), expected=expected, fix=fix)
        for entry in fields(self):
            given, kind = getattr(self, entry.name), type(entry.default)
            wanted = (int, float) if kind is float else kind
            if not isinstance(given, wanted) or (isinstance(given, bool) and kind is not bool):
                expected = f"text: {_LAYERS}" if entry.name == "layers" else _KINDS[kind]
                raise RequestError(option_of(entry.name), repr(given), expected=expected)
        for name in ("hidden", "recurrent_layers"):
            if getattr(self, name) < 1:
                raise RequestError(option_of(name), str(getattr(self, name)), expected="at least 1")
        if not 0 < self.scale < math.inf:
            raise RequestError("--scale", str(self.scale), expected="a positive number")
        choose_layers(self.layers, None)


def choose_layers(text: str, depth: int | None, *, stack: str = BACKBONE) -> tuple[int, ...]:
    """The layers that `all`, `every:2`, `last:6` or `0,3,5` means in a stack of that depth (None: only check the form).

    stack: its name, for the message.

    Raises: RequestError.
    """
    form = re.fullmatch(r"all|(?P<kind>every|last):(?P<number>[1-9]\d*)|(?P<list>\d+(?:,\d+)*)", text.replace(" ", ""))
    if form is None:
        raise RequestError("--layers", repr(text), expected=_LAYERS)
    if depth is None:
        return ()
    number = int(form["number"] or 1)
    if form["list"]:
        chosen = sorted({int(part) for part in form["list"].split(",")})
    elif form["kind"] == "last":
        chosen = list(range(depth - number, depth))
    else:
        chosen = list(range(depth - 1, -1, -number))[::-1]
    outside = [layer for layer in chosen if not 0 <= layer < depth]
    if outside or (form["kind"] == "every" and number > depth):
        found = f"{text!r} for the {stack}"
        raise RequestError("--layers", found, expected=f"layers of a stack of {depth}, 0 to {depth - 1}")
    return tuple(chosen)


# --- planning


def plan(spec: ReadSpec, request: PlanRequest) -> dict[str, Any]:
    """The stacks that are read and the tensors of their side networks. Raises: RequestError, UnsupportedError."""
    held = request.quantization.kind if request.quantization else ""
    require_together(facts({"method": spec.method, "stored": held, "held": held}))
    stacks = _choose_stacks(spec, find_stacks(request.model))
    if spec.pooling != "own" and (request.task not in POOLED_TASKS or len(stacks) > 1):
        expected = "own, as pooling is for classifiers and regression on one stack"
        raise RequestError("--pooling", f"{spec.pooling!r} for {request.task}", expected=expected)
    with torch.device("meta"):
        side = build_side(settings_of(spec, stacks), [asdict(stack) for stack in stacks])
    tensors = tuple(SideTarget(f"{NAME}.{name}", tuple(p.shape)) for name, p in sorted(side.named_parameters()))
    frozen = tuple(name for name, _ in request.model.named_children() if name not in request.heads)
    return {"stacks": stacks, "side": tensors, "frozen": frozen}


def _choose_stacks(spec: ReadSpec, found: tuple[Stack, ...]) -> tuple[Stack, ...]:
    if found[0].name == BACKBONE:
        for option, given, default in (("--stacks", spec.stacks, "both"), ("--joiner", spec.joiner, "auto")):
            if given != default:
                of_one = f"{given!r} for a model of one stack"
                raise RequestError(option, of_one, expected="an encoder-decoder", fix=f"Leave {option} out")
        return (_read(spec, found[0]),)
    encoder, decoder = found
    if (spec.joiner == "none") != (spec.stacks == "decoder") and spec.joiner != "auto":
        expected = "none with --stacks decoder, and attention or mean where the encoder is read"
        raise RequestError("--joiner", f"{spec.joiner!r} with --stacks {spec.stacks}", expected=expected)
    if spec.stacks == DECODER:
        return (_read(spec, decoder),)
    # Without the decoder's recurrence its last layer alone asks the joiner.
    last = replace(decoder, read=(decoder.depth - 1,))
    return (_read(spec, encoder), last if spec.stacks == ENCODER else _read(spec, decoder))


def _read(spec: ReadSpec, stack: Stack) -> Stack:
    """The stack with the layers that are read of it."""
    return replace(stack, read=choose_layers(spec.layers, stack.depth, stack=stack.name))


def settings_of(spec: ReadSpec, stacks: tuple[Stack, ...]) -> dict[str, Any]:
    """A spec as the side network takes it."""
    joiner = "none" if len(stacks) == 1 else "attention" if spec.joiner == "auto" else spec.joiner
    return {entry.name: getattr(spec, entry.name) for entry in fields(SideSettings)} | {"joiner": joiner}


def draw_state(plan: SurgeryPlan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a side network starts from, by (seed, name): the projection back is zero, norms are one.

    The rest is uniform within 1 / sqrt(hidden), as torch.nn.GRU's is.
    """
    return {target.parameter: _draw(target, plan.spec, dtype) for target in plan.side}


def _draw(target: SideTarget, spec: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    name = target.parameter
    if name.endswith((".norm", ".output_norm")):
        return torch.ones(target.shape, dtype=dtype)
    if ".output." in name:
        return torch.zeros(target.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(generator_seed(spec["seed"], name))
    bound = 1 / math.sqrt(spec["hidden"])
    return (torch.rand(target.shape, generator=generator) * 2 - 1).mul_(bound).to(dtype)


def fresh(checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch]) -> SideDelta:
    """A side network that corrects nothing yet, bound to the checkpoint by its digest."""
    plan = replace(plan, backbone_sha256=backbone_sha256(checkpoint))
    kinds = {info.dtype for info in checkpoint.values()}
    return SideDelta(plan, draw_state(plan, torch.float64 if kinds == {"F64"} else torch.float32), whole)


# --- a model in memory


def attach(model: nn.Module, plan: SurgeryPlan, delta: SideDelta | None) -> None:
    """Put the side network beside a frozen model, in place. `delta` gives its tensors."""
    example = next(model.parameters())
    double = example.dtype == torch.float64
    state = delta.state if delta else draw_state(plan, torch.float64 if double else torch.float32)
    settings = settings_of(ReadSpec(**plan.spec), plan.stacks)
    with torch.device("meta"):
        side = attach_side(model, settings, [asdict(stack) for stack in plan.stacks], plan.frozen)
    plain = {name.removeprefix(f"{NAME}."): v.to(example.device, copy=True) for name, v in state.items()}
    side.load_state_dict({n: v.to(torch.float64) if double else v for n, v in plain.items()}, assign=True)
    side.requires_grad_()


def side_of(model: nn.Module) -> SideNetwork:
    """The side network of an attached model."""
    side = model.get_submodule(NAME)
    assert isinstance(side, SideNetwork)  # noqa: S101  attach put it there
    return side


def trainable_names(plan: SurgeryPlan) -> set[str]:
    """The parameters that may train, by name."""
    return {target.parameter for target in plan.side}


def collect(
    model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], _originals: Mapping[str, Tensor]
) -> SideDelta:
    """Read back the side network."""
    state = {t.parameter: gathered(model.get_parameter(t.parameter)).clone() for t in plan.side}
    return SideDelta(plan, state, whole)


def bind(
    delta: SideDelta, checkpoint: Checkpoint, disk: Mapping[str, str], whole: Mapping[str, WholePatch]
) -> SideDelta:
    """The same delta tied to a checkpoint by its digest. Raises: BaseMismatchError where it has no such layers."""
    for stack in delta.plan.stacks:
        if not any(name.startswith(f"{stack.layers}.{stack.depth - 1}.") for name in disk):
            raise BaseMismatchError(
                str(checkpoint.root),
                f"no weights for {stack.layers}.{stack.depth - 1}",
                expected="the checkpoint the model was loaded from",
            )
    return SideDelta(replace(delta.plan, backbone_sha256=backbone_sha256(checkpoint)), delta.state, whole)


def detach(model: nn.Module, *, merge: bool) -> None:
    """The plain backbone again. Raises: UnsupportedError for a merge."""
    if merge:
        raise UnsupportedError(
            "detach", f"{SideDelta.what} {SideDelta.nature}", expected="merge=False", fix=SideDelta.ways_out
        )
    side_of(model).unhook()
    delattr(model, NAME)


# --- as a model of its own, which transformers loads with trust_remote_code

MODELING_FILE = "modeling_read.py"
_TAIL = '''

# --- the model: generated by `surgery export --format remote-code`; what stands above are the modules of surgery/side


from transformers import {base}  # noqa: E402


class Read{base}({base}):
    """{base} with a READ side network, as config.json's `read` describes it."""

    def __init__(self, config):
        super().__init__(config)
        attach_side(self, **config.read)
        self._keep_in_fp32_modules_strict = {{*(self._keep_in_fp32_modules_strict or ()), NAME}}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return freeze(super().from_pretrained(*args, **kwargs))
'''


def modeling_source(architecture: str) -> str:
    """The modeling file of a READ model: the side network's own source, and a class of the backbone's that has one."""
    return side_source() + _TAIL.format(base=architecture)


def modeling_config(plan: SurgeryPlan) -> dict[str, Any]:
    """The entries of config.json by which transformers finds the class, and the class its side network."""
    name = f"Read{plan.architecture}"
    auto = next((a for a, table in _AUTO_TABLES.items() if plan.architecture in table.values()), "AutoModel")
    auto = TASKS[plan.task].auto_class if plan.task != "features" else auto
    stacks = [asdict(stack) for stack in plan.stacks]
    settings = settings_of(ReadSpec(**plan.spec), plan.stacks)
    return {
        "architectures": [name],
        "auto_map": {auto: f"{MODELING_FILE.removesuffix('.py')}.{name}"},
        "read": {"settings": settings, "stacks": stacks, "frozen": list(plan.frozen)},
    }


METHOD = Method("read", "arXiv 2305.15348", ReadSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
