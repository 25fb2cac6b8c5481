"""checkpoint-surgery: train a few columns of a checkpoint's frozen weights, merge them exactly.

What stands here is loaded on demand, so that importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of the table below
    from surgery.methods.paca_spec import PacaSpec as PacaSpec
    from surgery.methods.read import ReadSpec as ReadSpec
    from surgery.operate import apply as apply
    from surgery.operate import attach as attach
    from surgery.operate import collect as collect
    from surgery.operate import detach as detach
    from surgery.operate import load as load
    from surgery.operate import resample as resample
    from surgery.operate import save as save
    from surgery.peft_paca import import_peft as import_peft
    from surgery.planning import plan_checkpoint as plan_checkpoint
    from surgery.recipe import DataSection as DataSection
    from surgery.recipe import TrainSection as TrainSection
    from surgery.survey import TaskSpec as TaskSpec
    from surgery.train import train as train
    from surgery.verify import verify as verify
    from surgery.workflow import export as export
    from surgery.workflow import export_checkpoint as export_checkpoint
    from surgery.workflow import patch as patch
    from surgery.workflow import run as run
    from surgery.workflow import undo as undo

__version__ = "0.1.0"

_NAMES = {
    "PacaSpec": "surgery.methods.paca_spec",
    "ReadSpec": "surgery.methods.read",
    "TaskSpec": "surgery.survey",
    "DataSection": "surgery.recipe",
    "TrainSection": "surgery.recipe",
    "apply": "surgery.operate",
    "attach": "surgery.operate",
    "collect": "surgery.operate",
    "detach": "surgery.operate",
    "import_peft": "surgery.peft_paca",
    "load": "surgery.operate",
    "resample": "surgery.operate",
    "plan_checkpoint": "surgery.planning",
    "save": "surgery.operate",
    "train": "surgery.train",
    "verify": "surgery.verify",
    "export": "surgery.workflow",
    "export_checkpoint": "surgery.workflow",
    "patch": "surgery.workflow",
    "run": "surgery.workflow",
    "undo": "surgery.workflow",
}

__all__ = ["__version__", *_NAMES]  # noqa: PLE0604  the table is the list


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Facade(types.ModuleType):
    """The package itself. Loading a submodule sets it as an attribute here, over the function of the same name.

    `surgery.train(...)` and `surgery.verify(...)` are the functions all the same; the modules are reached by
    `from surgery.train import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        is_hiding = isinstance(value, types.ModuleType) and _NAMES.get(name) == value.__name__
        super().__setattr__(name, getattr(value, name) if is_hiding else value)


sys.modules[__name__].__class__ = _Facade
