"""The device `hpu` for torch's CPU build: a Python-backed PrivateUse1.

An HPUTensor holds a CPU tensor and computes with it; mixing one with a CPU tensor is an error, as on a device, but for
scalars and copies. Every operator that ran on it is recorded, with the shapes of what it gave.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
OPERATORS: list[tuple[str, tuple[tuple[int, ...], ...]]] = []  # (operator, shapes of its results), in order
MODE_AT_IMPORT = os.environ.get("PT_HPU_LAZY_MODE")  # the vendor's plugin reads it once, too
ENTRIES = ("empty.memory_format", "empty_strided", "_to_copy", "copy_", "_copy_from")  # how tensors come to the device
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm")  # what autocast runs in bf16
_registered: list[torch.library.Library] = []  # a library that is collected takes its kernels along


def install(module: Any) -> None:
    """Give torch the device, with `module` as `torch.hpu`."""
    registration._setup_privateuseone_for_python_backend(rename="hpu", backend_module=module)
    tensors = torch.library.Library("aten", "IMPL")
    for name in ENTRIES:
        tensors.impl(name, _kernel(name), "PrivateUse1")
    for name in LOWERED:
        tensors.impl(name, _lowered(name), "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _registered.extend((tensors, others))


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _kernel(name: str) -> Any:
    operator = _operator(name)
    return lambda *args, **kwargs: run(operator, args, kwargs)


def _lowered(name: str) -> Any:
    """An operator under autocast: its floating-point tensors in autocast's dtype, then the operator without autocast."""
    operator = _operator(name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype("hpu")) if is_float else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


class HPUTensor(torch.Tensor):
    """A tensor on `hpu:0`; `_raw` is the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "HPUTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device("hpu", 0),
            requires_grad=False,
        )
        tensor._raw = raw
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"HPUTensor({self._raw}, device='hpu:0')"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})


def run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operator: computed on the CPU tensors, recorded, and its results wrapped."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    has_hpu = any(isinstance(x, HPUTensor) for x in given)
    if has_hpu and operator not in COPIES:
        _require_one_device(operator, given)
    raw_args = tree_map(_unwrap, args)
    if operator is torch.ops.c10d._allgather_base_.default:  # hccl takes any shape of that size, gloo wants equal ones
        output, mine, *rest = raw_args
        _, work = operator(output.view(-1), mine.reshape(-1), *rest)
        return args[0], work
    out = operator(*raw_args, **tree_map(_unwrap, dict(kwargs)))
    results = tree_flatten(out)[0]
    by_mask = str(operator).startswith("aten.index") and any(x.dtype == torch.bool and x.dim() for x in given[1:])
    shapes = tuple(tuple(x.shape) for x in results if isinstance(x, torch.Tensor))
    OPERATORS.append((f"{operator} by a boolean mask" if by_mask else str(operator), shapes))
    if isinstance(out, torch.Tensor) and operator._schema.is_mutable:  # in place: the same object comes back
        for x in given:
            if x is out or (isinstance(x, HPUTensor) and x._raw is out):
                return x
    device = kwargs.get("device")
    to_hpu = has_hpu if device is None else torch.device(device).type == "hpu"
    if operator is aten.copy_.default:
        to_hpu = isinstance(args[0], HPUTensor)
    return tree_map(lambda x: HPUTensor(x) if isinstance(x, torch.Tensor) and to_hpu else x, out)


def _require_one_device(operator: Any, given: Sequence[torch.Tensor]) -> None:
    for x in given:
        if not isinstance(x, HPUTensor) and x.dim() > 0:
            raise RuntimeError(f"Expected all tensors on one device, but found hpu:0 and {x.device} ({operator})")


def _unwrap(value: Any) -> Any:
    if isinstance(value, HPUTensor):
        return value._raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "hpu" else value
