"""The same run on the CPU, through transformers' own Trainer, and on `hpu:0`, through optimum-habana's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from surgery.adapter import Adapter, open_adapter
from surgery.backends import gaudi
from surgery.delta import ColumnDelta
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.train import TrainResult, train
from tests.examples import CASES, Case, fast

POOL: list[ProcessPoolExecutor] = []  # the session's process of upstream's classes; empty in that process itself
SPECS = {"paca": PacaSpec(rank=4), "read": ReadSpec(hidden=8)}
# Dropout draws by a batch's shape, and shapes differ: on hpu every batch is padded to data.max_length.
NO_DROPOUT: dict[str, dict[str, object]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "opt": {"dropout": 0.0},
    # Rows beyond a window are refused; and upstream's own sdpa leaves out Gemma 2's soft cap, which optimum-habana has.
    "gemma3": {"sliding_window": 128},
    "mistral": {"sliding_window": 128},
    "gemma2": {"sliding_window": 128, "attn_logit_softcapping": None},
}


def case_of(task: str, file: str) -> Case:
    """The first example of that task in a file of that name."""
    return next(case for case in CASES if case.task == task and case.file == file)


@dataclass
class Run:
    """A finished run: its folder, what it said, what each part of a batch had for a loss, and where the model was."""

    folder: Path
    result: TrainResult
    losses: list[float] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)
    trainers: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainers": []}

    def adapter(self) -> Adapter:
        return open_adapter(self.folder)

    def trained(self) -> dict[str, Tensor]:
        """What training changed, by name."""
        delta = self.adapter().delta
        whole = {name: patch.values for name, patch in delta.whole.items()}
        if isinstance(delta, ColumnDelta):
            return {**whole, **{name: patch.values for name, patch in delta.patches.items()}}
        return {**whole, **delta.state}


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Note losses and devices of every training step, of either Trainer."""
    gaudi_trainer = gaudi_base() if run.folder.name.startswith("hpu") else transformers.Trainer
    original = gaudi_trainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, *args, **kwargs)
        run.losses.append(float(loss))
        run.devices |= {str(p.device) for p in (*model.parameters(), *model.buffers())}
        run.trainers = [self]
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaudi_trainer, "training_step", training_step)
        yield


def gaudi_base() -> Any:
    """GaudiTrainer, through the backend, which alone names its package."""
    gaudi.choose_device("hpu")
    gaudi.prepare()
    return gaudi.trainer_class().__mro__[1]


def run_on(
    device: str,
    base: Path,
    root: Path,
    case: Case,
    *,
    method: str = "paca",
    data: DataSection | None = None,
    watch: bool = True,
    **changes: Any,
) -> Run:
    """Apply and train one example on a device; `changes` are settings. watch: note losses, which asks for values."""
    root.mkdir(exist_ok=True)
    folder = root / f"{device}-{len(list(root.iterdir()))}"
    task = TaskSpec(case.task)
    plan_upstream(base, folder, SPECS[method], task)
    run = Run(folder, None)  # type: ignore[arg-type]
    with watched(run) if watch else nullcontext():
        run.result = train(folder, data or case.write(root), settings_of(case, device, changes), task=task)
    return run


def plan_upstream(base: Path, folder: Path, spec: Any, task: TaskSpec) -> None:
    """`apply`, in a process of upstream's classes: as on a machine where it comes before any training."""
    if POOL:
        POOL[0].submit(_apply, base, folder, spec, task).result()
    else:
        _apply(base, folder, spec, task)


def _apply(base: Path, folder: Path, spec: Any, task: TaskSpec) -> None:
    apply(base, folder, spec, task=task)


def settings_of(case: Case, device: str, changes: dict[str, Any]) -> TrainSection:
    """Settings of an example: few steps, in fp32."""
    usual = {"batch_size": 6, "max_steps": 5, "precision": "fp32", **case.settings, "device": device}
    return fast(**{**usual, **changes})


def rows_of(case: Case, root: Path, rows: int) -> DataSection:
    """The example's data with so many rows in both sets."""
    cut = replace(case, rows=case.rows[:rows])
    return cut.write(root)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between tensors of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
