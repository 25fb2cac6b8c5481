"""Full sharding (FSDP2) of an attached model: every rank holds some rows of each parameter.

A linear layer's weight (o, i), its columns and their difference (o, r) are cut along o in the same places, so that a
rank writes its rows of the trained columns into its rows of the weight, and tells no one. GPT-2's Conv1D has its
weight as (i, o) and is cut along its second axis. Column numbers are buffers, and lie whole on every rank.

It stands on torch's fully_shard alone: the Trainer's own way through accelerate takes the model and its optimizer in
one call, so that nothing can be evaluated before the first step, and saves the whole frozen base with every checkpoint.

Source: torch.distributed.fsdp.fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UnsupportedError
from surgery.paca_layers import PacaLayer, layers
from surgery.ranks import count
from surgery.side.network import SideNetwork
from surgery.zero import gather_parts, is_in_parts


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model, which are gathered and let go one at a time: outermost lists of modules.

    A side network is none of them: its parameters are used all through the forward, and stay with the model's own.
    """
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif not isinstance(child, SideNetwork):
            yield from blocks(child)


def shard(model: nn.Module, *, device: str, cpu_offload: bool = False) -> None:
    """Leave each rank its rows of every parameter of an attached model, in place.

    Raises: UnsupportedError where a Conv1D's outputs do not divide by the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import Shard

    opened = layers(model)
    along_inputs = {id(layer.paca_weight): name for name, layer in opened.items() if layer.input_axis == 0}
    for name, layer in opened.items():
        if layer.input_axis == 0 or layer.paca_weight.dim() > 2:  # else rows of weight and difference are the same
            require_even(name, layer)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device, (count(),)),
        "shard_placement_fn": lambda parameter: Shard(1) if id(parameter) in along_inputs else None,
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for block in blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    for layer in opened.values():
        layer.paca_is_sharded = layer.paca_pending = True
    model.register_forward_pre_hook(_refresh_first, prepend=True)  # before fully_shard's own, which gathers


def require_even(name: str, layer: PacaLayer) -> None:
    """The outputs of such a layer divide by the number of ranks. Raises: UnsupportedError."""
    outputs = layer.paca_weight.shape[1 - layer.input_axis]
    if outputs % count():
        raise UnsupportedError(
            "train.strategy",
            f"fsdp2 with {count()} processes, and {name} has {outputs} outputs in a {layer.plain.__name__}",
            expected="a number of processes that divides them",
            fix="Take such a number, or strategy ddp",
        )


def _refresh_first(model: nn.Module, _args: object) -> None:
    opened = layers(model).values()
    if any(layer.is_due for layer in opened):
        settle(model)
        for layer in opened:
            layer.refresh_if_stale()


def settle(model: nn.Module) -> None:
    """Let go of whatever was gathered for the last forward: every parameter is this rank's rows again."""
    if not _may_be_sharded():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _may_be_sharded() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, or an optimizer's state, with every rank's rows, on the CPU; all ranks ask together.

    Exact: each row is its rank's own, bit for bit.
    """
    if not _may_be_sharded():
        return tensor.detach().cpu()
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        held: Tensor = tensor.full_tensor().detach()
        return held.cpu()
    return gather_parts(tensor) if is_in_parts(tensor) else tensor.detach().cpu()


def _part(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank has of another of the same shape; all of it where that is whole."""
    if not _may_be_sharded():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    there = value.to(like.device_mesh.device_type)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter from its whole value; a sharded one takes its rows."""
    parameter = model.get_parameter(name)
    parameter.copy_(_part(value, parameter))
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, PacaLayer):
        owner.paca_pending = True


def gather_optimizer(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state as one process would have it; all ranks ask together."""
    state = optimizer.state_dict()

    def gathered(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}

    return {**state, "state": {index: gathered(entry) for index, entry in state["state"].items()}}


def scatter_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load what `gather_optimizer` gave, on any number of ranks."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def parts(entry: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
        return {name: _part(value, like) if isinstance(value, Tensor) else value for name, value in entry.items()}

    scattered = {index: parts(entry, parameters[index]) for index, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": scattered})
