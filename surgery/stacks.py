"""Where a model's stacks of layers are, found by watching a forward and not by a table of names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.errors import UnsupportedError
from surgery.side.settings import Stack
from surgery.survey import dry_run, meta_twin

BACKBONE, ENCODER, DECODER = "backbone", "encoder", "decoder"


@dataclass
class _Trace:
    """Every call of a module in one forward, in the order in which they ended. Tensors are kept, so ids stay theirs."""

    calls: list[tuple[str, list[Tensor], Tensor | None]] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            module.register_forward_hook(self._recorder(name), with_kwargs=True)

    def _recorder(self, name: str) -> Any:
        def record(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            self.calls.append((name, given, first if isinstance(first, Tensor) else None))

        return record

    def of(self, name: str) -> list[int]:
        """The numbers of a module's calls."""
        return [number for number, call in enumerate(self.calls) if call[0] == name]


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model, live or on the meta device: one, or an encoder and its decoder. No layer is chosen yet.

    Raises: UnsupportedError where no module list is a stack, and where the model cannot be run dry.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError("--method read", f"{name} is no transformers model", expected="a PreTrainedModel")
    trace = _Trace()
    try:
        twin = meta_twin(model)
        trace.watch(twin)
        dry_run(twin)
    except Exception as error:
        why = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UnsupportedError(
            "--method read", f"{name} could not be run dry ({why})", expected="a model of text or images"
        ) from error
    found = sorted(_candidates(twin, trace), key=lambda entry: entry[0])
    wanted = 2 if twin.config.is_encoder_decoder else 1
    if len(found) != wanted:
        lists = ", ".join(layers for _, layers, _ in found) or "none"
        raise UnsupportedError(
            "--method read",
            f"{name} has {len(found)} stacks of layers ({lists})",
            expected=f"{wanted}: a module list whose elements are called once each, in order, and hand one hidden "
            "state (batch, tokens, width) from each to the next",
            fix="Use --method paca for this model",
        )
    names = (ENCODER, DECODER) if wanted == 2 else (BACKBONE,)
    return tuple(_describe(twin, trace, name, *entry[1:]) for name, entry in zip(names, found, strict=True))


def output_lengths(model: nn.Module, stacks: Sequence[Stack]) -> dict[str, int]:
    """How many things each stack's layers return: 0 for a tensor alone, else a tuple's length, its state first."""
    lengths: dict[str, int] = {}
    twin = meta_twin(model)
    for stack in stacks:

        def note(_module: nn.Module, _args: Any, output: Any, name: str = stack.name) -> None:
            lengths[name] = len(output) if isinstance(output, tuple) else 0

        twin.get_submodule(f"{stack.layers}.0").register_forward_hook(note)
    dry_run(twin)
    return lengths


def _candidates(model: nn.Module, trace: _Trace) -> Iterator[tuple[int, str, list[int]]]:
    """(first call, path, calls of its elements) of each outermost module list that is a chain."""
    chains: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in chains):
            continue
        each = [trace.of(f"{path}.{number}") for number in range(len(module))]
        if not each or any(len(numbers) != 1 for numbers in each):
            continue
        calls = [numbers[0] for numbers in each]
        if _is_chain(trace, calls):
            chains.append(path)
            yield calls[0], path, calls


def _is_chain(trace: _Trace, calls: list[int]) -> bool:
    outputs = [trace.calls[number][2] for number in calls]
    shapes = {tuple(output.shape) if output is not None else () for output in outputs}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3 or calls != sorted(calls):
        return False
    first = [x for x in trace.calls[calls[0]][1] if tuple(x.shape) in shapes and x.is_floating_point()]
    links = zip(outputs, calls[1:], strict=False)
    return bool(first) and all(any(x is output for x in trace.calls[number][1]) for output, number in links)


def _describe(model: nn.Module, trace: _Trace, name: str, layers: str, calls: list[int]) -> Stack:
    last = f"{layers}.{len(calls) - 1}"
    state = trace.calls[calls[-1]][2]
    assert state is not None  # noqa: S101  a chain's outputs are tensors
    after = (call for call in trace.calls[calls[-1] + 1 :] if any(x is state for x in call[1]))
    user = next(after, None)
    has_norm = user is not None and user[2] is not None and _is_norm(model.get_submodule(user[0]), user[2], state)
    leave = user[0] if user is not None and has_norm else last
    return Stack(name, layers, leave, len(calls), state.shape[-1], ())


def _is_norm(module: nn.Module, output: Tensor, state: Tensor) -> bool:
    """A module with a scale, perhaps a shift, and nothing else, that keeps the state's shape."""
    parameters = list(module.parameters())
    flat = all(parameter.dim() == 1 for parameter in parameters)
    return bool(parameters) and flat and output.shape == state.shape and not list(module.children())
