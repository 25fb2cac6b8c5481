"""The base of a plan with quantized weights, in its files: what they hold, and what training sees of it.

bitsandbytes' 4-bit files have each weight packed under its own name, and beside it tensors called `<weight>.absmax`,
`<weight>.quant_map`, with double quantization `<weight>.nested_absmax` and `<weight>.nested_quant_map`, and
`<weight>.quant_state.bitsandbytes__<type>`, a JSON text of bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.errors import DamagedError
from surgery.lookup import require_extra
from surgery.plan import Quantization, Stored, SurgeryPlan, Target
from surgery.quantized import KINDS, dequantize, require_kind, round_trip
from surgery.tensorfile import dtype_name
from surgery.terminal import hush_libraries

_STATE = ".quant_state.bitsandbytes__"
_SIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)


def require_package(kind: str, option: str = "--quantize") -> None:
    """The package that a kind needs is there. Raises: UnsupportedError; RequestError: there is no such kind."""
    require_kind(kind, option)
    hush_libraries()
    require_extra(f"{option} {kind}", KINDS[kind].package)


def packed_names(checkpoint: Checkpoint) -> Iterator[str]:
    """The weights that lie packed in 4-bit files."""
    for name in checkpoint:
        weight, _, rest = name.partition(_STATE)
        if rest:
            yield weight


def is_beside(name: str, packed: set[str]) -> bool:
    """Whether a tensor is one of those beside a packed weight."""
    return any(name.partition(end)[0] in packed for end in _SIDE if end in name)


def is_packed(plan: SurgeryPlan, module: str) -> bool:
    """Whether a layer's weight lies packed in the base's files."""
    held = plan.quantization
    return held is not None and held.is_stored and module in held.layers


def stored_weight(checkpoint: Checkpoint, weight: str) -> Stored:
    """A packed weight as what it stands for: its dtype and shape. Raises: DamagedError."""
    state = _state(checkpoint, weight)
    try:
        dtype = dtype_name(getattr(torch, str(state["dtype"])))
        return Stored(weight, dtype, tuple(int(size) for size in state["shape"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"the quantization state of {weight} is malformed ({error})"
        raise DamagedError(str(checkpoint.root), found, expected="what bitsandbytes writes") from error


def _state(checkpoint: Checkpoint, weight: str) -> Mapping[str, Any]:
    name = next((name for name in checkpoint if name.startswith(f"{weight}{_STATE}")), "")
    try:
        document = json.loads(bytes(checkpoint.read_tensor(name).tolist())) if name else None
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{checkpoint.root}, {name}", f"it does not parse ({error})", expected="JSON") from error
    if not isinstance(document, dict):
        raise DamagedError(str(checkpoint.root), f"no quantization state of {weight}", expected="one")
    return document


def _stored_values(checkpoint: Checkpoint, weight: str) -> Tensor:
    from bitsandbytes.nn import Params4bit

    names = [name for name in checkpoint if name.startswith(f"{weight}.")]
    beside = {name.removeprefix(f"{weight}."): checkpoint.read_tensor(name) for name in names}
    holder: Any = nn.Linear(1, 1, bias=False, device="meta")
    packed = checkpoint.read_tensor(weight)
    holder.weight = Params4bit.from_prequantized(packed, beside, requires_grad=False, device="cpu")
    dtype: torch.dtype = holder.weight.quant_state.dtype
    return dequantize(holder, dtype)


def seen_weight(checkpoint: Checkpoint, quantization: Quantization, weight: str) -> Tensor:
    """What training sees of a weight of the base, (o, i) in the dtype in the file: one tensor in memory at a time."""
    if quantization.is_stored:
        return _stored_values(checkpoint, weight)
    return round_trip(checkpoint.read_tensor(weight), quantization.kind)


def stored_sha256(checkpoint: Checkpoint, weight: str) -> str:
    """One digest of a packed weight and of all that lies beside it."""
    digest = hashlib.sha256()
    for name in sorted([weight, *(name for name in checkpoint if name.startswith(f"{weight}."))]):
        digest.update(f"{name} {checkpoint.sha256(name)}\n".encode())
    return digest.hexdigest()


def base_digest(checkpoint: Checkpoint, plan: SurgeryPlan, target: Target) -> str:
    """The digest that a target's weight has in the base's files."""
    is_stored = is_packed(plan, target.module)
    return stored_sha256(checkpoint, target.weight) if is_stored else checkpoint.sha256(target.weight)
