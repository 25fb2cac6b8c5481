"""Which class opens which layer, and what else of a frozen model must stay as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from surgery.paca_conv import PacaConv2d
from surgery.paca_layers import SWAPS, PacaLayer

OPENED: Mapping[type[nn.Module], type[PacaLayer]] = {**SWAPS, nn.Conv2d: PacaConv2d}


def moving_statistics(model: nn.Module) -> tuple[str, ...]:
    """The modules that, in training mode, rewrite buffers of their own: batch norms and their like, sorted.

    An export holds trained columns and nothing else that moved: with statistics that drift it would not be what was
    trained. So these modules stay in eval mode, and normalise as the base does.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # noqa: SLF001  torch's own base
    found = [name for name, module in model.named_modules() if isinstance(module, kinds) and module.track_running_stats]
    return tuple(sorted(found))


def _stay_frozen(module: nn.Module, _args: object) -> None:
    if module.training:
        module.eval()


def keep_statistics(model: nn.Module, names: Sequence[str]) -> None:
    """Keep these modules in eval mode, whatever mode the model is in."""
    for name in names:
        model.get_submodule(name).eval().register_forward_pre_hook(_stay_frozen)


def let_statistics_go(model: nn.Module) -> None:
    """The inverse of `keep_statistics`: the modules are in the model's own mode again."""
    for module in model.modules():
        hooks = module._forward_pre_hooks  # noqa: SLF001  a copied model has no handles of its hooks
        for number in [number for number, hook in hooks.items() if hook is _stay_frozen]:
            del hooks[number]
            module.training = model.training
