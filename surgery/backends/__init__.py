"""Where training runs: one module for each kind of device, and what such a module offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """Where training runs: which Trainer, which arguments, which device. Knows nothing about methods.

    launch: run `python -m surgery.train *arguments` in so many processes on this machine; returns the exit code.
    environment: the variables that a run with these settings needs before torch is imported, and that are not set.
    prepare: what has to happen in this process before the model is loaded.
    static_shapes: every training batch has the same shape: rows are padded to `data.max_length`, and an epoch's last,
    smaller batch is left out.
    """

    name: str
    devices: tuple[str, ...]
    choose_device: Any
    trainer_class: Any
    training_arguments: Any
    peak_memory_bytes: Any
    launch: Callable[[Sequence[str], int], int]
    environment: Callable[[Any], Mapping[str, str]]
    prepare: Callable[[], None]
    static_shapes: bool = False
