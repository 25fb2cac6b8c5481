"""DeepSpeed's ZeRO on an attached model: what is whole, what is in parts, and how checkpoints do not tell.

Stage 2 cuts the optimizer's state, stage 3 the parameters as well: flat, wherever the parts end, and put together for
each use. A layer's weight, columns and difference are put together at once, so each rank writes the trained columns
into the weight by itself, before it multiplies with it. Nothing is cast: DeepSpeed's bf16 mode would round the columns.

Source: DeepSpeed's tensor fragments, https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UnsupportedError
from surgery.paca_layers import layers

STAGES = {"zero2": 2, "zero3": 3}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def settings(strategy: str, *, cpu_offload: bool, autocast: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration, or None for another strategy. `auto`: the trainer fills in its own arguments."""
    if strategy not in STAGES:
        return None
    zero: dict[str, Any] = {"stage": STAGES[strategy]}
    if cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cpu_offload and strategy == "zero3":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(autocast)
    # No module's gradients or parameters travel in fewer bits than they have.
    mixed = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []} if dtype else {"enabled": False}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": mixed,
    }


def require_deepspeed() -> None:
    """It is installed. Raises: UnsupportedError."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        fix = "pip install 'checkpoint-surgery[deepspeed]', or take strategy fsdp2"
        raise UnsupportedError("train.strategy", "deepspeed is not installed", expected="the package", fix=fix)


def prepare(model: nn.Module, strategy: str) -> None:
    """Tell the layers of an attached model whether their parameters will be put together anew for each use."""
    for layer in layers(model).values():
        layer.paca_is_gathered = strategy == "zero3"


def describe_optimizer(
    parameters: Sequence[nn.Parameter], groups: Sequence[Mapping[str, Any]], rate: float, steps: int
) -> dict[str, Any]:
    """AdamW's state as one process would have it; all ranks ask together.

    parameters, groups: the optimizer's, as they were before DeepSpeed cut them; rate: the learning rate now.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        state[index] = {"step": torch.tensor(float(steps)), **{n: m.detach().cpu().clone() for n, m in moments.items()}}
    return {"state": state, "param_groups": [{**group, "initial_lr": group["lr"], "lr": rate} for group in groups]}


def describe_scheduler(state: Mapping[str, Any], groups: int) -> dict[str, Any]:
    """A schedule's state for an optimizer of so many groups: DeepSpeed drops those that are empty, and all go alike."""
    return {name: value[:1] * groups if isinstance(value, list) else value for name, value in state.items()}


def is_in_parts(tensor: Tensor) -> bool:
    """Whether it is a parameter that stage 3 has cut."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    return bool(is_zero_param(tensor))


def gather_parts(parameter: Tensor) -> Tensor:
    """A parameter that stage 3 has cut, whole, on the CPU; all ranks ask together."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()
