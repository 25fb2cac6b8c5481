"""Which class opens which layer, and what else of a frozen model must stay as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from surgery.paca_attention import OpenAttention, PacaAttention, PacaOutProjection
from surgery.paca_conv import PacaConv2d
from surgery.paca_embedding import PacaEmbedding
from surgery.paca_layers import SWAPS, PacaLayer

OPENED: Mapping[type[nn.Module], type[PacaLayer]] = {
    **SWAPS,
    nn.Conv2d: PacaConv2d,
    nn.Embedding: PacaEmbedding,
    nn.MultiheadAttention: PacaAttention,
    NonDynamicallyQuantizableLinear: PacaOutProjection,
}


def route(model: nn.Module) -> None:
    """Have opened layers called where torch's own classes read their weights alone.

    Attention calls its output projection; an encoder layer, any of whose parts has a hook, takes no path of its own
    around its parts' forwards.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and isinstance(module.out_proj, PacaLayer):
            module.__class__ = OpenAttention
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, PacaLayer) for m in module.modules()):
            module.register_forward_pre_hook(_call_parts)


def _call_parts(_module: nn.Module, _args: object) -> None:
    pass


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


def let_go(model: nn.Module) -> None:
    """The inverse of `route` and `keep_statistics`: the modules are in the model's own mode again."""
    for module in model.modules():
        if type(module) is OpenAttention:
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
        hooks = module._forward_pre_hooks  # noqa: SLF001  a copied model has no handles of its hooks
        for number in [number for number, hook in hooks.items() if hook in (_stay_frozen, _call_parts)]:
            module.training = model.training if hooks.pop(number) is _stay_frozen else module.training
