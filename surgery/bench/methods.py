"""The methods that a bench compares, one literal table: how each opens a model for training, and how it is merged.

PaCA and READ are this package's own, through the same plans as `surgery apply`; LoRA, DoRA, MiSS, SHiRA and prompt
tuning are PEFT's; BitFit, adapters, full tuning and the frozen floor are a few lines here. All are put on the same
layers, and what a task adds to its model (a classifier's head) trains whole with every one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.bench.held import HOLDERS, held_layers, hold
from surgery.columns import takes_data
from surgery.errors import RequestError, UnsupportedError
from surgery.lookup import require_extra
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach_chosen, detach
from surgery.plan import Stored
from surgery.planning import make_spec, plan_model
from surgery.select import find_sites
from surgery.survey import dry_run, meta_twin

if TYPE_CHECKING:
    from collections.abc import Iterator

PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
}


@dataclass(frozen=True)
class Shared:
    """What all methods have in common on one model.

    layers: the linear layers that the targets mean; whole: parameters that train as they are with every method;
    stored: the parameters that the checkpoint holds; dropout: that of the methods' own layers; seed: for their values;
    calibration: (strategy, rows) -> batches of the training set to choose columns by; quantize: how the base is held
    while it is frozen, empty for as it is.
    """

    task: str
    heads: tuple[str, ...]
    layers: tuple[str, ...]
    whole: tuple[str, ...]
    stored: Mapping[str, Stored] = field(repr=False)
    dropout: float = 0.0
    seed: int = 0
    calibration: Callable[[str, int], Sequence[Mapping[str, Any]]] = field(
        default=lambda _select, _rows: (), repr=False
    )
    quantize: str = ""


Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method as the bench sees it.

    attach: turns a plain model into the one to train; merge: turns that into a plain model again, None where there is
    no such; size: the setting that says how large it is, empty where nothing does; takes: its other settings; extra:
    what it needs installed; source: where it comes from.
    """

    name: str
    attach: Callable[[Any, Shared, Settings], Any]
    merge: Callable[[Any], Any] | None
    source: str
    size: str = ""
    takes: tuple[str, ...] = ()
    extra: str = ""


def freeze(model: nn.Module, shared: Shared) -> None:
    """Nothing trains but what trains with every method."""
    model.requires_grad_(requires_grad=False)
    for name in shared.whole:
        model.get_parameter(name).requires_grad_()


# --- this package's own


def attach_paca(model: Any, shared: Shared, settings: Settings) -> Any:
    """PaCA on the layers, its columns chosen by the training set where it looks at data."""
    rows = settings.get("calibration_rows", PacaSpec.calibration_rows)
    return _attach_ours("paca", model, shared, paca_settings(shared, settings), rows=rows)


def paca_settings(shared: Shared, settings: Settings) -> dict[str, Any]:
    """The settings of a bench as those of PaCA; the rows to look at are those of the bench."""
    rank = {"rank": settings["r"]} if "r" in settings else {}
    rest = {name: value for name, value in settings.items() if name not in ("r", "calibration_rows")}
    held = {"quantize": shared.quantize} if shared.quantize else {}
    return {**rest, **rank, **held, "targets": shared.layers}


def hold_base(model: Any, shared: Shared, method: str) -> None:
    """Pack the layers of the base that can be, where it is to be held so, as that method needs them."""
    if shared.quantize:
        names = held_layers(model, shared.layers, shared.stored, shared.quantize, task=shared.task, heads=shared.heads)
        hold(model, names, shared.quantize, HOLDERS[method])


def attach_read(model: Any, shared: Shared, settings: Settings) -> Any:
    """READ beside the backbone."""
    return _attach_ours("read", model, shared, settings)


def _attach_ours(method: str, model: Any, shared: Shared, settings: Settings, *, rows: int = 0) -> Any:
    spec = make_spec(method, {"seed": shared.seed, **settings}, "")
    plan = plan_model(model, spec, shared.stored, {}, task=shared.task, heads=shared.heads)
    select = plan.spec.get("select", "random")
    batches = shared.calibration(select, rows) if takes_data(select) else ()
    attach_chosen(model, plan, batches)
    return model


def merge_paca(model: Any) -> Any:
    """The trained columns stay in the weights."""
    return detach(model, merge=True)


# --- PEFT's


def require_peft() -> None:
    """Raises: UnsupportedError where PEFT is not installed."""
    require_extra("--methods", "peft")


def attach_lora(model: Any, shared: Shared, settings: Settings) -> Any:
    """PEFT's LoRA; its alpha is the rank where none is given, so that its update has the factor 1."""
    return _lora(model, shared, settings, is_dora=False)


def attach_dora(model: Any, shared: Shared, settings: Settings) -> Any:
    """PEFT's DoRA: LoRA on the direction of each weight, and a trained magnitude."""
    return _lora(model, shared, settings, is_dora=True)


def _lora(model: Any, shared: Shared, settings: Settings, *, is_dora: bool) -> Any:
    from peft import LoraConfig

    rank = settings["r"]
    hold_base(model, shared, "dora" if is_dora else "lora")
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.get("alpha", rank),
        lora_dropout=shared.dropout,
        target_modules=list(shared.layers),
        use_dora=is_dora,
    )
    return _wrap(model, shared, config)


def attach_miss(model: Any, shared: Shared, settings: Settings) -> Any:
    """PEFT's MiSS: one matrix of rank x out, shared by the shards of the input."""
    from peft import MissConfig

    config = MissConfig(r=settings["r"], miss_dropout=shared.dropout, target_modules=list(shared.layers))
    return _wrap(model, shared, config)


def attach_shira(model: Any, shared: Shared, settings: Settings) -> Any:
    """PEFT's SHiRA: as many single entries of each weight as a LoRA of that rank has values."""
    from peft import ShiraConfig

    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    config = ShiraConfig(r=settings["r"], random_seed=shared.seed, target_modules=list(shared.layers))
    return _wrap(model, shared, config)


def attach_prompt(model: Any, shared: Shared, settings: Settings) -> Any:
    """PEFT's prompt tuning: trained embeddings before each sequence."""
    from peft import PromptTuningConfig

    if shared.task not in PEFT_TASKS:
        raise UnsupportedError("--methods", f"prompt for {shared.task}", expected=f"one of {', '.join(PEFT_TASKS)}")
    config = PromptTuningConfig(task_type=PEFT_TASKS[shared.task], num_virtual_tokens=settings["tokens"])
    return _wrap(model, shared, config)


def _wrap(model: Any, shared: Shared, config: Any) -> Any:
    """PEFT's model around ours, drawn by our seed; heads are opened in place, but where PEFT trains a copy of them."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    whole = {id(model.get_parameter(name)) for name in shared.whole}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on how it was called
        torch.manual_seed(shared.seed)
        wrapped = get_peft_model(model, config)
    copied = [m.original_module for m in wrapped.modules() if isinstance(m, ModulesToSaveWrapper)]
    replaced = {id(parameter) for module in copied for parameter in module.parameters()}
    for parameter in wrapped.parameters():
        if id(parameter) in whole - replaced:
            parameter.requires_grad_()
    return wrapped


def merge_peft(model: Any) -> Any:
    """A plain model with the adapters' product in its weights."""
    return model.merge_and_unload()


# --- baselines


def attach_bitfit(model: Any, shared: Shared, settings: Settings) -> Any:  # noqa: ARG001  one signature for all
    """Biases train, and nothing else."""
    freeze(model, shared)
    biases = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"]
    if not biases:
        raise UnsupportedError(
            "--methods",
            f"bitfit, and {type(model).__name__} has no bias",
            expected="a model with biases",
            fix="Leave bitfit out",
        )
    for parameter in biases:
        parameter.requires_grad_()
    return model


class Adapter(nn.Module):
    """A bottleneck with a residual: x + up(gelu(down(x))). Up is zero at first, so that nothing changes.

    Shapes: (.., width) to the same. Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1; norms are not trained.
    """

    def __init__(self, width: int, bottleneck: int, *, like: Tensor) -> None:
        super().__init__()
        dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
        self.down = nn.Linear(width, bottleneck, dtype=dtype, device=like.device)
        self.up = nn.Linear(bottleneck, width, dtype=dtype, device=like.device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.down(x.to(self.down.weight.dtype)))
        result: Tensor = x + self.up(inner).to(x.dtype)
        return result


def attach_adapter(model: Any, shared: Shared, settings: Settings) -> Any:
    """An adapter behind attention and MLP of each layer, before their output is added to what went in."""
    freeze(model, shared)
    widths = {site.module: site.out_features for site in find_sites(model, shared.heads)}
    with torch.random.fork_rng():
        torch.manual_seed(shared.seed)
        for name in residual_layers(model, shared.heads):
            layer = model.get_submodule(name)
            layer.adapter = Adapter(widths[name], settings["bottleneck"], like=layer.weight)
            layer.register_forward_hook(_run_adapter)
    return model


def _run_adapter(layer: Any, _args: Any, output: Tensor) -> Tensor:
    adapted: Tensor = layer.adapter(output)
    return adapted


def residual_layers(model: Any, heads: tuple[str, ...]) -> tuple[str, ...]:
    """The linear layers whose output, but for dropout, is added to the residual stream, in the order of the forward.

    Found by watching a forward without values, not by their names; GELU's formula, too, adds a layer's output to
    something, but of another width. Raises: UnsupportedError where there are none.
    """
    width = model.config.hidden_size
    names = [site.module for site in find_sites(model, heads) if site.out_features == width]
    watch = _Additions()
    twin = meta_twin(model)
    for name in names:
        twin.get_submodule(name).register_forward_hook(watch.hook(name))
    with watch:
        dry_run(twin)
    if not watch.found:
        raise UnsupportedError(
            "--methods",
            f"adapter, and in {type(model).__name__} no linear layer's output is added to the layer's input",
            expected="attention and MLPs that end in a linear layer",
            fix="Leave adapter out",
        )
    return tuple(watch.found)


class _Additions(torch.overrides.TorchFunctionMode):
    """Which modules' outputs become one side of a sum of two tensors of equal shape."""

    ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # tensors stay alive, so that ids stay theirs

    def hook(self, name: str) -> Any:
        """What to register as a forward hook of the module of that name."""

        def remember(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._outputs[id(output)] = name, output

        return remember

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = [self._outputs[id(a)][0] for a in args if isinstance(a, Tensor) and id(a) in self._outputs]
        if known and func is nn.functional.dropout:
            self._outputs[id(result)] = known[0], result
        elif known and func in self.ADDITIONS:
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            if len(shapes) == 2 and shapes[0] == shapes[1]:
                self.found.update(dict.fromkeys(known))
        return result


def attach_full(model: Any, shared: Shared, settings: Settings) -> Any:  # noqa: ARG001  one signature for all
    """All weights train."""
    return model.requires_grad_()


def attach_floor(model: Any, shared: Shared, settings: Settings) -> Any:  # noqa: ARG001  one signature for all
    """Nothing trains."""
    hold_base(model, shared, "floor")
    return as_floor(model)


def as_floor(model: Any) -> Any:
    """Frozen, in place; the embeddings' output asks for a gradient, which then flows through every layer."""
    model.requires_grad_(requires_grad=False)
    words = model.get_input_embeddings()
    for module in model.modules():  # an encoder-decoder looks the same words up by several modules
        if isinstance(module, nn.Embedding) and (module is words or module.weight is words.weight):
            module.register_forward_hook(_ask_for_gradient)
    return model


def _ask_for_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else None


def keep_plain(model: Any) -> Any:
    """What trained its own weights is a plain model already."""
    return model


_PACA = ("alpha", "select", "rank_pattern", "exclude", "budget", "resample", "calibration_rows")
_READ = ("cell", "recurrent_layers", "bidirectional", "initial", "reduce", "output_norm", "scale", "layers", "stacks",
         "joiner", "pooling")  # fmt: skip
VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("paca", attach_paca, merge_paca, "arXiv 2503.01905", "r", _PACA),
        Variant("read", attach_read, None, "arXiv 2305.15348", "hidden", _READ),
        Variant("lora", attach_lora, merge_peft, "arXiv 2106.09685", "r", ("alpha",), extra="lora"),
        Variant("dora", attach_dora, merge_peft, "arXiv 2402.09353", "r", ("alpha",), extra="lora"),
        Variant("miss", attach_miss, merge_peft, "arXiv 2409.15371", "r", extra="lora"),
        Variant("shira", attach_shira, merge_peft, "arXiv 2406.13175", "r", extra="lora"),
        Variant("prompt", attach_prompt, None, "arXiv 2104.08691", "tokens", extra="lora"),
        Variant("bitfit", attach_bitfit, keep_plain, "arXiv 2106.10199"),
        Variant("adapter", attach_adapter, None, "arXiv 1902.00751", "bottleneck"),
        Variant("full", attach_full, keep_plain, "every weight, in its own dtype"),
        Variant("floor", attach_floor, None, "what any method on a frozen model must do"),
    )
}


def trained(model: nn.Module) -> dict[str, int]:
    """Values by name of the parameters that train."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Whatever PEFT raises where a method's size does not suit a model, as a request that is wrong."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise RequestError(
            f"--methods {name}", f"it cannot be put on this model ({error})", expected="one that can"
        ) from error
