"""Weights that are held in few bits while they are frozen: how each kind is made, and how its values come back.

The interface is one function, `dequantize(module)`: it looks the type of the module's weight up in one table. What the
libraries call a quantized layer has a class of its own in bitsandbytes and not in torchao, whose weights alone tell.

Quantizing is done on the CPU, from the values as the file has them, whatever they are computed in: then a base that is
quantized anew for training, for loading and for checking is the same to the last bit.

Sources: NF4, FP4 and double quantization: QLoRA, arXiv 2305.14314, section 3; int8 by rows: LLM.int8(), arXiv
2208.07339, section 2; both as bitsandbytes has them. torchao: https://docs.pytorch.org/ao.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from surgery.errors import UnsupportedError, require_known

BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes' own: values that share a scale, and scales that share one
BYTE = 8
CODES_4BIT, CODES_8BIT = 16, 256  # a table of values lies beside each weight
GROUP = 32  # torchao's int4: values that share a scale


@dataclass(frozen=True)
class Kind:
    """A way to hold a weight. pack: (o, i) float32 -> a frozen parameter; bits: of one value; side_bytes: (o, i) ->."""

    name: str
    package: str
    bits: int
    side_bytes: Callable[[int, int], int]
    pack: Callable[[Tensor], nn.Parameter]

    def size_bytes(self, out_features: int, in_features: int) -> int:
        """What a weight takes, its scales and tables included."""
        values = out_features * in_features
        return math.ceil(values * self.bits / BYTE) + self.side_bytes(out_features, in_features)


# --- bitsandbytes


def _pack_4bit(weight: Tensor, quant_type: str, *, is_double: bool) -> nn.Parameter:
    """Double quantization is put together here: bitsandbytes' mean of the scales depends on the number of threads."""
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type=quant_type)
    if is_double:
        offset = state.absmax.double().mean().float()
        scales, nested = quantize_blockwise(state.absmax - offset, blocksize=NESTED_BLOCK)
        state = QuantState(
            absmax=scales, shape=state.shape, code=state.code, blocksize=BLOCK, quant_type=quant_type,
            dtype=state.dtype, offset=offset, state2=nested,
        )  # fmt: skip
    return Params4bit(  # type: ignore[no-any-return]
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=is_double,
        quant_type=quant_type, bnb_quantized=True,
    )  # fmt: skip


def _dequantize_4bit(module: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    weight = module.weight
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    settings = (state.blocksize, state.quant_type, tuple(state.shape), dtype)
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(weight.data, scales.float(), *settings)
    return values


def _side_4bit(out_features: int, in_features: int) -> int:
    blocks = math.ceil(out_features * in_features / BLOCK)
    return 4 * blocks + 4 * CODES_4BIT


def _side_double(out_features: int, in_features: int) -> int:
    blocks = math.ceil(out_features * in_features / BLOCK)
    nested = math.ceil(blocks / NESTED_BLOCK)
    return blocks + 4 * nested + 4 * CODES_8BIT + 4 + 4 * CODES_4BIT


def _pack_int8(weight: Tensor) -> nn.Parameter:
    """In 16 bits, as bitsandbytes has it: values beyond fp16's are not held."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    values, scales, _ = int8_vectorwise_quant(weight.half())
    return Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)  # type: ignore[no-any-return]


def _dequantize_int8(module: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' own layer moves the scales from the weight to its state when it runs first."""
    weight = module.weight
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    if weight.dtype != torch.int8 or scales is None:
        found = f"a weight of {weight.dtype} that is not quantized yet"
        raise UnsupportedError("attach", found, expected="int8", fix="Move the model to its device first")
    scale = scales.float().to(weight.device).view(-1, 1)
    values: Tensor = (weight.data.float() * (scale * (1 / 127))).to(dtype)
    return values


# --- torchao


def _pack_torchao(weight: Tensor, name: str) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    four: Any = torch.int4  # type: ignore[attr-defined]
    int4 = IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP))
    quantize_(layer, int4 if name == "torchao-int4" else Int8WeightOnlyConfig())
    packed: nn.Parameter = layer.weight
    packed.requires_grad = False
    return packed


def _dequantize_torchao(module: Any, dtype: torch.dtype) -> Tensor:
    values: Tensor = module.weight.dequantize()
    return values.detach().to(dtype)


# --- the tables

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("nf4", "bitsandbytes", 4, _side_4bit, lambda w: _pack_4bit(w, "nf4", is_double=False)),
        Kind("nf4-double", "bitsandbytes", 4, _side_double, lambda w: _pack_4bit(w, "nf4", is_double=True)),
        Kind("fp4", "bitsandbytes", 4, _side_4bit, lambda w: _pack_4bit(w, "fp4", is_double=False)),
        Kind("fp4-double", "bitsandbytes", 4, _side_double, lambda w: _pack_4bit(w, "fp4", is_double=True)),
        Kind("int8", "bitsandbytes", 8, lambda o, _i: 4 * o, _pack_int8),
        Kind("torchao-int8", "torchao", 8, lambda o, _i: 4 * o, lambda w: _pack_torchao(w, "torchao-int8")),
        # one value a byte: the layouts of torchao that put two into one need a card's libraries
        Kind(
            "torchao-int4", "torchao", 8, lambda o, i: 5 * o * (i // GROUP), lambda w: _pack_torchao(w, "torchao-int4")
        ),
    )
}

_DEQUANTIZE: dict[str, Callable[[Any, torch.dtype], Tensor]] = {  # by the type of a module's weight
    "bitsandbytes.nn.modules:Params4bit": _dequantize_4bit,
    "bitsandbytes.nn.modules:Int8Params": _dequantize_int8,
    "torchao.quantization:Int8Tensor": _dequantize_torchao,
    "torchao.quantization:IntxUnpackedToInt8Tensor": _dequantize_torchao,
    "torchao.quantization:Int4Tensor": _dequantize_torchao,
    "torchao.quantization:Int4TilePackedTo4dTensor": _dequantize_torchao,
    "sized": lambda module, dtype: module.weight.new_empty(module.shape, dtype=dtype),
}


def weight_type(module: nn.Module) -> str:
    """`package.module:Class` of a module's weight; empty where it has none, `sized` where it is a mere size."""
    if vars(module).get("is_sized"):
        return "sized"
    weight = module._parameters.get("weight")  # noqa: SLF001  its own, not a property of some class
    return "" if weight is None else f"{type(weight).__module__}:{type(weight).__qualname__}"


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer with a weight that `dequantize` knows."""
    return isinstance(module, nn.Linear) and weight_type(module) in _DEQUANTIZE


def dequantize(module: Any, dtype: torch.dtype) -> Tensor:
    """The dense weight (o, i) of a quantized layer: each value in float32, and then rounded to `dtype`.

    A tensor of its own, which may be written into. Raises: UnsupportedError for a weight of another type.
    """
    kind = weight_type(module)
    if kind not in _DEQUANTIZE:
        raise UnsupportedError("quantized", f"a weight of type {kind}", expected=f"one of {', '.join(_DEQUANTIZE)}")
    return _DEQUANTIZE[kind](module, dtype)


def require_kind(name: str, option: str = "--quantize") -> None:
    """Raises: RequestError for a name that is not in the table."""
    require_known(option, name, KINDS)


def pack(weight: Tensor, kind: str) -> nn.Parameter:
    """A dense weight (o, i), on the CPU, as a frozen parameter of so many bits. Raises: RequestError: no such kind."""
    require_kind(kind)
    return KINDS[kind].pack(weight.detach().to(torch.float32).contiguous())


def round_trip(weight: Tensor, kind: str) -> Tensor:
    """What is left of a dense weight's values once they have been quantized, in their dtype."""
    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = pack(weight, kind)
    return dequantize(holder, weight.dtype)


def kind_of(module: Any) -> str:
    """The kind in `KINDS` that a live layer's weight is of. Raises: UnsupportedError: other blocks, or none of ours."""
    name = weight_type(module)
    if name.endswith(":Params4bit"):
        state = module.weight.quant_state
        if state is None:
            found = "a 4-bit weight that is not quantized yet"
            raise UnsupportedError("attach", found, expected="one that is", fix="Move the model to its device first")
        if "packing_format_for_cpu" in vars(state):  # its scales were rounded to bfloat16 then, for good
            found = "a 4-bit weight that bitsandbytes has ordered anew to run in eval mode on this CPU"
            raise UnsupportedError("attach", found, expected="one that has not run so", fix="Load the model again")
        if state.blocksize == BLOCK:
            return f"{state.quant_type}-double" if state.nested else str(state.quant_type)
    kinds = {"Int8Params": "int8", "Int8Tensor": "torchao-int8", "IntxUnpackedToInt8Tensor": "torchao-int4"}
    kind = kinds.get(name.rpartition(":")[2], "")
    if not kind:
        found = f"a weight of {name.rpartition(':')[2]}, or with blocks of a size of its own"
        raise UnsupportedError("attach", found, expected=f"one of {', '.join(KINDS)} with their usual blocks")
    return kind


def live_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    """The dtype that a live layer's values are rounded to: what it was quantized from, else the model's."""
    if isinstance(module, QuantizedLinear):
        return module.storage
    if weight_type(module).endswith(":Params4bit") and module.weight.quant_state is not None:
        dtype: torch.dtype = module.weight.quant_state.dtype
        return dtype
    return module.weight.dtype if module.weight.is_floating_point() else default


def live_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """`live_dtype` of each packed layer of a model, by name; the model's own is that of its first dense parameter."""
    packed = {name: module for name, module in model.named_modules() if is_quantized(module)}
    floats = (p.dtype for n, p in model.named_parameters() if p.is_floating_point() and n[:-7] not in packed)
    default = next(floats, torch.float32)
    return {name: live_dtype(module, default) for name, module in packed.items()}


def stored_kind(settings: object) -> str:
    """The kind of a checkpoint whose config.json has these quantization settings; the empty string for other ones."""
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "bitsandbytes":
        return ""
    kind, is_double = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_use_double_quant", False)
    name = f"{kind}-double" if is_double else str(kind)
    is_plain = settings.get("bnb_4bit_quant_storage", "uint8") == "uint8"
    return name if settings.get("load_in_4bit") and name in KINDS and is_plain else ""


# --- the frozen layer


class _FrozenFunction(torch.autograd.Function):
    """y = x W^T + b with a weight that is there for one product only: nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.dense(x), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(dy.device.type, enabled=False):
            return dy.matmul(ctx.layer.dense(dy).to(dy.dtype)).to(ctx.dtype), None


def frozen_product(x: Tensor, layer: nn.Linear) -> Tensor:
    """A layer's output, where nothing of the layer trains; its `dense(x)` gives the weight."""
    result: Tensor = _FrozenFunction.apply(x, layer)  # type: ignore[no-untyped-call]
    return result


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a packed, frozen weight. `storage`: what its values are rounded to; `shape`: (o, i)."""

    storage: torch.dtype
    shape: tuple[int, int]

    def dense(self, x: Tensor) -> Tensor:
        """The weight (o, i) for a product with `x`; under autocast that does the casting."""
        weight = dequantize(self, self.storage)
        return weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        require_eager()
        if torch.is_grad_enabled() and x.requires_grad:
            return frozen_product(x, self)
        return nn.functional.linear(x, self.dense(x), self.bias)


def forbid_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of a model with weights that are packed here be an error, until `permit_saving`.

    transformers would write them without their scales. Adapters that PEFT put on it are saved by PEFT's own.
    """
    vars(model)["save_pretrained"] = _refuse_to_save


def permit_saving(model: nn.Module) -> None:
    """The inverse of `forbid_saving`, where no weight is packed here any more."""
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        vars(model).pop("save_pretrained", None)


def _refuse_to_save(*_args: object, **_settings: object) -> NoReturn:
    found = "packed weights, whose scales are in memory alone"
    fix = (
        "Save the adapter with surgery.save while it is attached, and write a checkpoint with `surgery export --merge`"
    )
    raise UnsupportedError("save_pretrained", found, expected="dense ones", fix=fix)


def require_eager() -> None:
    """Raises: UnsupportedError under torch.compile."""
    if torch.compiler.is_compiling():
        found, fix = "torch.compile with a quantized base", "Run it uncompiled"
        raise UnsupportedError("compile", found, expected="an uncompiled model", fix=fix)


def quantize_layer(module: Any, kind: str, storage: torch.dtype) -> None:
    """Make a linear layer (`nn.Linear`, on the CPU) one whose weight is packed, in place.

    storage: the dtype in the file. The values are those of the file also where they have been loaded in another.
    """
    shape = tuple(module.weight.shape)
    packed = pack(module.weight.to(storage), kind)
    _install(module, packed, storage, shape)


def hold_layer(module: Any, storage: torch.dtype) -> None:
    """Make a layer whose weight came packed one that multiplies as those do that are packed here, in place.

    bitsandbytes' own layer computes otherwise in eval mode on some CPUs: it orders the weight anew, for good, with its
    scales rounded to bfloat16, and fails where the number of outputs does not suit the kernel.
    """
    _install(module, module.weight, storage, (module.out_features, module.in_features))


def hold_live(model: nn.Module, layers: Mapping[str, torch.dtype]) -> dict[str, type[nn.Module]]:
    """`hold_layer` for those that are not held so already. layers: each one's storage. Returns what each was."""
    plain: dict[str, type[nn.Module]] = {}
    for name, storage in layers.items():
        module = model.get_submodule(name)
        if not isinstance(module, QuantizedLinear):
            plain[name] = type(module)
            hold_layer(module, storage)
    return plain


def let_live(model: nn.Module, plain: Mapping[str, type[nn.Module]]) -> None:
    """The inverse of `hold_live`: the weights have not been touched."""
    for name, kind in plain.items():
        module: Any = model.get_submodule(name)
        del module.storage, module.shape
        module.__class__ = kind


def size_layer(module: Any, kind: str, storage: torch.dtype) -> None:
    """The same without values: what takes the packed weight's place has its size."""
    out_features, in_features = module.weight.shape
    size = KINDS[kind].size_bytes(out_features, in_features)
    packed = torch.empty(size, dtype=torch.uint8, device=module.weight.device)
    _install(module, nn.Parameter(packed, requires_grad=False), storage, (out_features, in_features))
    module.is_sized = True


def _install(module: Any, packed: nn.Parameter, storage: torch.dtype, shape: tuple[int, ...]) -> None:
    module.weight = packed
    module.__class__ = QuantizedLinear
    module.storage, module.shape = storage, shape


def quantize(model: nn.Module, kind: str, layers: Mapping[str, torch.dtype], *, only_sizes: bool = False) -> None:
    """Pack the weights of the named layers, in place, one after the other. layers: each one's dtype in the file."""
    for name, storage in layers.items():
        (size_layer if only_sizes else quantize_layer)(model.get_submodule(name), kind, storage)


def quantizable(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of layers, those that can be: `nn.Linear` itself, and none that the model's class keeps in float32."""
    kept: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    found = []
    for name in names:
        is_kept = any(part in kept for part in name.split("."))
        if type(model.get_submodule(name)) is nn.Linear and not is_kept:
            found.append(name)
    return found
