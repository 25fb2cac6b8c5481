"""A model as an ONNX graph, built without loading a weight: parameters have sizes and no values.

Each graph is a plain module with a flat list of inputs and outputs around a transformers model, exported by PyTorch's
own exporter and simplified by passes that never look into a weight, so that each keeps its name and shape.

Axes: batch, sequence (new tokens), past_sequence (cached tokens), encoder_sequence (tokens of the encoder).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from onnx_ir.passes import common
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from surgery.checkpoint import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from surgery.compat import TRANSFORMERS_5, memory_names, pixels_config, quiet_loading
from surgery.errors import UnsupportedError, shorten
from surgery.side.memory import Memory
from surgery.side.network import SideNetwork
from surgery.side.settings import NAME
from surgery.survey import class_for, own_task

FOLDED_VALUES = 4096  # constants up to so many values are computed at export
SIZES = {"batch": 2, "sequence": 3, "past_sequence": 5, "encoder_sequence": 7}  # while tracing: none is 0 or 1
MIN_OPSET, MAX_OPSET = 20, 23


@dataclass(frozen=True)
class Port:
    """An input or output: its name, the names (or sizes) of its axes, its dtype."""

    name: str
    axes: tuple[str | int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class GraphSpec:
    """A graph to be: its file, the module to trace (its only child is `model`), and what goes in and comes out."""

    file: str
    module: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


# --- the model, with sizes and no values


def build_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attach: Callable[[Any], Any] | None = None,
    *,
    stored: Iterable[str] = (),
) -> Any:
    """The model of a configuration in eval mode, on no device: parameters without values, buffers with theirs.

    dtype: what it computes in. attach: called with the model before its parameters are replaced. stored: the names of
    its checkpoint's tensors: what stands there twice is not tied, whatever the configuration says.
    """
    with quiet_loading(), init_empty_weights(include_buffers=False):
        model_class = class_for(config, own_task(config))
        attention = "sdpa" if model_class._supports_sdpa else "eager"  # noqa: SLF001
        model: Any = model_class._from_config(config, attn_implementation=attention)  # noqa: SLF001
        if attach is not None:
            attach(model)
    if TRANSFORMERS_5:
        model.set_experts_implementation("batched_mm")
    model.tie_weights()
    model.export_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    wide = {NAME, *(model._keep_in_fp32_modules or () if dtype == torch.float16 else ())}  # noqa: SLF001
    untied = _stored_apart(model, stored) if TRANSFORMERS_5 else set()
    empty: dict[int | str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = name if name in untied else id(parameter)
        if key not in empty:
            kind = torch.float32 if wide & set(name.split(".")) else dtype
            with model.export_mode:
                values = torch.empty(parameter.shape, dtype=kind, device="cpu")
            empty[key] = nn.Parameter(values, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, empty[key])
    return model.eval()


def _stored_apart(model: nn.Module, stored: Iterable[str]) -> set[str]:
    """Tied parameters that a checkpoint holds besides another of their tie: transformers 5 loads each by itself."""
    held = {found.name for found in memory_names(model, stored).values() if found.is_verbatim}
    tied = [(id(p), name) for name, p in model.named_parameters(remove_duplicate=False) if name in held]
    first = dict(reversed(tied))
    return {name for key, name in tied if first[key] != name}


# --- what is traced


class _Plain(nn.Module):
    """Whatever has one forward: encoders, classifiers, models of images."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        result: Tensor = self.model(**dict(zip(self.names, values, strict=True)))[0]
        return (result,)


class _Decoder(nn.Module):
    """One step, or the prefill, of a decoder with its cache as inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        given = {"position_ids": position_ids} if _takes(self.model, "position_ids") else {}
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))  # no config: nothing is dropped from it
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        )
        return (out.logits, *_entries(out.past_key_values))


def _side(model: nn.Module) -> SideNetwork | None:
    """The side network of a pair whose decoder asks the encoder's side states."""
    side = getattr(model, NAME, None)
    return side if side is not None and side.is_pair and side.settings.joiner != "none" else None


class _Encoder(nn.Module):
    """The encoder of a pair: its states, and the keys and values that each layer of the decoder makes of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        start = torch.zeros_like(input_ids[:, :1])
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start, use_cache=True)
        result = [out.encoder_last_hidden_state, *_entries(out.past_key_values.cross_attention_cache)]
        side = _side(self.model)
        if side is not None:
            memory = side.swap_memory(None)
            assert memory is not None  # noqa: S101  the encoder has just left it
            result.append(memory.states_bsh)
        return tuple(result)


class _PairDecoder(nn.Module):
    """One step of the decoder of a pair: its own cache grows, the encoder's keys and values stay."""

    def __init__(self, model: Any, layers: int, width: int) -> None:
        super().__init__()
        self.model, self.layers, self.width = model, layers, width

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        own, crossed = past[: 2 * self.layers], past[2 * self.layers : 4 * self.layers]
        caches = [DynamicCache(list(zip(x[::2], x[1::2], strict=True))) for x in (own, crossed)]
        unseen = crossed[0].new_zeros(*encoder_attention_mask.shape, self.width)  # keys and values are there already
        side = _side(self.model)
        if side is not None:
            side.swap_memory(Memory(unseen, past[-1], encoder_attention_mask))
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=unseen), attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids, past_key_values=EncoderDecoderCache(*caches), use_cache=True,
        )  # fmt: skip
        if side is not None:
            side.swap_memory(None)
        return (out.logits, *_entries(out.past_key_values.self_attention_cache))


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _entries(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def describe(model: Any, dtype: torch.dtype) -> list[GraphSpec]:
    """The graphs of a model: one, or an encoder's and its decoder's. Raises UnsupportedError."""
    try:
        return _describe(model, dtype)
    except AttributeError as error:  # a configuration without the sizes that all known families have
        raise _unknown(model, str(error)) from error


def _unknown(model: Any, why: str) -> UnsupportedError:
    found = f"{type(model).__name__} could not be exported ({why})"
    return UnsupportedError(
        "--format onnx", found, expected="a family that the README names, with one graph for all inputs"
    )


def _describe(model: Any, dtype: torch.dtype) -> list[GraphSpec]:
    config, task = model.config, own_task(model.config)
    if task == "causal-lm" and not config.is_encoder_decoder:
        return [_decoder(model, dtype)]
    if task == "seq2seq":
        return _pair(model, dtype)
    if model.main_input_name == "pixel_values":
        config = pixels_config(config)
        size = config.image_size  # a graph takes images of one size: a class that names none is refused
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs = [Port("pixel_values", ("batch", config.num_channels, height, width), dtype)]
    elif model.main_input_name == "input_ids":
        names = ["input_ids", "attention_mask"]
        if _takes(model, "token_type_ids") and getattr(config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        inputs = [Port(name, ("batch", "sequence"), torch.int64) for name in names]
    else:
        found = f"{type(model).__name__} takes {model.main_input_name}"
        raise UnsupportedError("--format onnx", found, expected="a model of text or images")
    module = _Plain(model, [port.name for port in inputs])
    return [GraphSpec(MODEL_FILE, module, tuple(inputs), (_plain_output(model, task, dtype),))]


def _plain_output(model: Any, task: str, dtype: torch.dtype) -> Port:
    config = model.config
    if task in ("sequence-classification", "regression", "image-classification"):
        return Port("logits", ("batch", config.num_labels), dtype)
    if task == "token-classification":
        return Port("logits", ("batch", "sequence", config.num_labels), dtype)
    if model.get_output_embeddings() is not None:
        if type(model).__name__ not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            raise _unknown(model, "it gives more than the logits of tokens")
        return Port("logits", ("batch", "sequence", config.vocab_size), dtype)
    axis: str | int = "sequence"
    if model.main_input_name == "pixel_values":
        axis = "patches"
    return Port("last_hidden_state", ("batch", axis, config.hidden_size), dtype)


def _cache_ports(
    prefix: str, middle: str, axis: str, sizes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[Port]:
    """sizes: of each layer, the heads of keys and values and their width."""
    return [
        Port(f"{prefix}.{number}.{middle}{kind}", ("batch", heads, axis, width), dtype)
        for number, (heads, width) in enumerate(sizes)
        for kind in ("key", "value")
    ]


def _decoder(model: Any, dtype: torch.dtype) -> GraphSpec:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [(heads, width)] * config.num_hidden_layers
    inputs = [
        Port(name, ("batch", "sequence"), torch.int64) for name in ("input_ids", "attention_mask", "position_ids")
    ]
    inputs[1] = Port("attention_mask", ("batch", "past_sequence + sequence"), torch.int64)
    inputs += _cache_ports("past_key_values", "", "past_sequence", sizes, dtype)
    outputs = [Port("logits", ("batch", "sequence", config.vocab_size), dtype)]
    outputs += _cache_ports("present", "", "past_sequence + sequence", sizes, dtype)
    return GraphSpec(MODEL_FILE, _Decoder(model), tuple(inputs), tuple(outputs))


def _pair(model: Any, dtype: torch.dtype) -> list[GraphSpec]:
    config = model.config
    width = config.d_model
    layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
    heads = getattr(config, "num_heads", None) or config.decoder_attention_heads
    sizes = [(heads, getattr(config, "d_kv", None) or width // heads)] * layers
    ids = Port("input_ids", ("batch", "encoder_sequence"), torch.int64)
    mask = Port("attention_mask", ("batch", "encoder_sequence"), torch.int64)
    states = Port("last_hidden_state", ("batch", "encoder_sequence", width), dtype)
    crossed = _cache_ports("present", "encoder.", "encoder_sequence", sizes, dtype)
    side = _side(model)
    asked: list[Port] = []
    if side is not None:
        joined = side.settings.hidden * (1 + side.settings.bidirectional)
        asked = [Port("side_states", ("batch", "encoder_sequence", joined), torch.float32)]
    encoder = GraphSpec(ENCODER_FILE, _Encoder(model), (ids, mask), (states, *crossed, *asked))
    inputs = [
        Port("input_ids", ("batch", "sequence"), torch.int64),
        Port("encoder_attention_mask", mask.axes, mask.dtype),
    ]
    inputs += _cache_ports("past_key_values", "decoder.", "past_sequence", sizes, dtype)
    inputs += _cache_ports("past_key_values", "encoder.", "encoder_sequence", sizes, dtype)
    inputs += [replace(port, name=f"encoder_{port.name}") for port in asked]
    outputs = [Port("logits", ("batch", "sequence", config.vocab_size), dtype)]
    outputs += _cache_ports("present", "decoder.", "past_sequence + sequence", sizes, dtype)
    return [encoder, GraphSpec(DECODER_FILE, _PairDecoder(model, layers, width), tuple(inputs), tuple(outputs))]


# --- tracing


def trace(spec: GraphSpec, opset: int) -> ir.Model:
    """The graph. Its initializers are named as the model's parameters are, and have no values.

    Raises: UnsupportedError where the model cannot be exported.
    """
    args, shapes = _samples(spec)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(spec.module, args, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=opset, verbose=False,
                input_names=[port.name for port in spec.inputs], output_names=[port.name for port in spec.outputs],
            )  # fmt: skip
    except Exception as error:
        why = shorten(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
        raise _unknown(spec.module.model, why) from error
    assert exported is not None  # noqa: S101  as dynamo exporters return
    model: ir.Model = exported.model
    for value, port in zip(model.graph.outputs, spec.outputs, strict=True):
        if value.shape is None or len(value.shape) != len(port.axes):
            raise _unknown(spec.module.model, f"its first output is no {port.name} of {len(port.axes)} axes")
    weights = spec.module.model.state_dict()
    for name, value in model.graph.initializers.items():
        if name.removeprefix("model.") in weights:
            value.const_value = None  # what stands there has a size and no values, which no pass must ask for
    _simplify(model)
    _name_axes(model, spec)
    return model


def _samples(spec: GraphSpec) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs without values, and which of their axes may change, in the form of the module's parameters."""
    sizes = {**SIZES, "past_sequence + sequence": SIZES["past_sequence"] + SIZES["sequence"]}
    with spec.module.model.export_mode:
        args = tuple(
            torch.zeros([a if isinstance(a, int) else sizes[a] for a in port.axes], dtype=port.dtype)
            for port in spec.inputs
        )
    axes = [{n: torch.export.Dim.DYNAMIC for n, a in enumerate(p.axes) if isinstance(a, str)} for p in spec.inputs]
    parameters = inspect.signature(spec.module.forward).parameters.values()
    alone = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    has_rest = alone < len(parameters)
    return args, (*axes[:alone], *([tuple(axes[alone:])] if has_rest else []))


def _simplify(model: ir.Model) -> None:
    """Passes that keep every weight as it is: none is folded, merged with its equals or renamed."""
    weights = {id(value) for value in without_values(model).values()}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(id(value) in weights for value in node.inputs) else None

    for step in (
        common.InlinePass(),
        FoldConstantsPass(
            shape_inference=True,
            input_size_limit=FOLDED_VALUES,
            output_size_limit=FOLDED_VALUES,
            should_fold=should_fold,
        ),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Inputs and outputs say their axes; what lies between is left to be inferred."""
    for value, port in zip([*model.graph.inputs, *model.graph.outputs], [*spec.inputs, *spec.outputs], strict=True):
        value.shape = ir.Shape(port.axes)
    outer = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in outer:
                value.shape = value.type = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress and advice kept off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def without_values(model: ir.Model) -> dict[str, ir.Value]:
    """The initializers that are a model's weights, by the name that the weight has in memory."""
    initializers = model.graph.initializers
    return {name.removeprefix("model."): value for name, value in initializers.items() if value.const_value is None}
