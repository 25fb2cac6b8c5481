"""The bytes of the tensors that operators have made and that are still there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """The bytes of the tensors that operators have made and that are still there; `peak`, the most there were at once.

    Leaves out a model's own tensors and, once they are summed up, its parameters' gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.now = self.peak = 0
        self._own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self._live: dict[int, tuple[int, Any]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs inside."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(self._leave_out) for p in trained]  # type: ignore[no-untyped-call]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _enter(self, storage: Any) -> None:
        key = id(storage)
        if key not in self._live and key not in self._own:
            self._live[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
            self.now += storage.nbytes()

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key, (0, None))[0]

    def _leave_out(self, parameter: Tensor) -> None:
        assert parameter.grad is not None  # noqa: S101  the hook is called when there is one
        self._forget(id(parameter.grad.untyped_storage()))
