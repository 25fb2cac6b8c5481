"""Methods of a bench on a base that is held in few bits: who can, the layers that are packed, and what a model weighs.

PaCA's and the floor's layers are this package's; LoRA and DoRA get bitsandbytes' own layers, as QLoRA has them: PEFT
looks for their class. All hold the same packed values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surgery.errors import UnsupportedError, require_known
from surgery.methods.paca_spec import PacaSpec
from surgery.planning import plan_model
from surgery.quantized import BLOCK, KINDS, is_quantized, kind_of, pack, quantize
from surgery.quantized_base import require_package

if TYPE_CHECKING:
    from surgery.plan import Stored

CPU_ROWS = 32  # of bitsandbytes' order of weights in eval mode on a CPU
DENSE = "none"  # of one method, where all others are quantized
OWN, BITSANDBYTES = "own", "bitsandbytes"  # whose layers hold the base
HOLDERS: Mapping[str, str] = {"floor": OWN, "paca": OWN, "lora": BITSANDBYTES, "dora": BITSANDBYTES}
FOUR_BITS = ("nf4", "nf4-double", "fp4", "fp4-double")  # what PEFT trains over in bitsandbytes' layers as they are here


def require_kind_for(method: str, kind: str, option: str) -> None:
    """A method can train over a base of that kind. Raises: RequestError for no kind; UnsupportedError, with the reason.

    method: a name of the bench's table; option: where it was asked for.
    """
    require_known(option, kind, (*KINDS, DENSE))
    if kind == DENSE:
        return
    able = ", ".join(HOLDERS)
    fix = f"Leave {method} out, or let it have a dense base: {method}:quantize={DENSE}"
    if method not in HOLDERS:
        found = f"{kind} for {method}, which {_why(method)}"
        raise UnsupportedError(option, found, expected=f"one of {able}", fix=fix)
    if HOLDERS[method] == BITSANDBYTES and kind not in FOUR_BITS:
        raise UnsupportedError(option, f"{kind} for {method}", expected=f"one of {', '.join(FOUR_BITS)}", fix=fix)
    require_package(kind, option)


def _why(method: str) -> str:
    if method == "full":
        return "trains the weights themselves"
    return "reads a dense backbone" if method == "read" else "is put on dense layers here"


def held_layers(
    model: nn.Module, layers: tuple[str, ...], stored: Mapping[str, Stored], kind: str, **where: Any
) -> list[str]:
    """The layers that `surgery apply --quantize` would pack, trained or not. where: the task and its heads."""
    plan = plan_model(model, PacaSpec(rank=1, targets=layers, quantize=kind), stored, {}, **where)
    assert plan.quantization is not None  # noqa: S101  it was asked for
    return list(plan.quantization.layers)


def hold(model: nn.Module, names: list[str], kind: str, holder: str) -> None:
    """Pack these layers of a dense model on the CPU, in place, each from the dtype that it has."""
    if holder == OWN:
        quantize(model, kind, {name: model.get_parameter(f"{name}.weight").dtype for name in names})
        return
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _four_bits(model.get_submodule(name), kind))
    vars(model)["is_loaded_in_4bit"] = True  # what PEFT looks at


def _four_bits(dense: Any, kind: str) -> nn.Module:
    """bitsandbytes' layer with the dense one's values, which are given back in the dtype they had."""
    from bitsandbytes.nn import Linear4bit

    dtype, has_bias = dense.weight.dtype, dense.bias is not None
    name, _, double = kind.partition("-")
    layer: nn.Module = Linear4bit(
        dense.in_features, dense.out_features, has_bias, compute_dtype=dtype, compress_statistics=bool(double),
        quant_type=name, device="meta",
    )  # fmt: skip
    packed: Any = pack(dense.weight, kind)
    packed.quant_state.dtype = dtype
    layer.weight, layer.bias = packed, dense.bias
    return layer


def evaluated(model: nn.Module, *, is_final: bool = False) -> nn.Module:
    """Eval mode, but for bitsandbytes' layers: on some CPUs they would order and round their weights anew, for good.

    is_final: nothing trains any more, so that they may, where their sizes allow it.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
            fits = module.in_features % BLOCK == 0 and module.out_features % CPU_ROWS == 0
            module.train(not (is_final and fits))
    return model


def model_bytes(model: nn.Module) -> int:
    """Parameters and buffers, what trains among them, each storage once; packed ones with what lies beside them."""
    packed = [module for module in model.modules() if is_quantized(module)]
    total, inside = 0, set[int]()
    for module in packed:
        total += _packed_bytes(module)
        inside.add(id(module.weight))
    seen: dict[int, int] = {}
    for tensor in _tensors(model):
        if id(tensor) not in inside:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), storage.nbytes())
    return total + sum(seen.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _packed_bytes(module: Any) -> int:
    return KINDS[kind_of(module)].size_bytes(module.out_features, module.in_features)


def saved_by_packing(model: nn.Module, names: list[str], kind: str) -> int:
    """Bytes that a dense model is larger by than the packed one."""
    saved = 0
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        saved += weight.nbytes - KINDS[kind].size_bytes(*weight.shape)
    return saved
