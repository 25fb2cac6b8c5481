"""What only a real card can show. Skipped, with the reason, where there is none; nobody has run these yet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from surgery.runs import LOG_FILE
from tests.conftest import TinyModel
from tests.gaudi.runs import case_of, largest_difference, run_on

pytestmark = pytest.mark.gaudi_hardware
TEXT = ("causal-lm", "text.txt")


@pytest.mark.parametrize("method", ("paca", "read"))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_a_run_is_near_the_cpu_s(method: str, precision: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Kernels round otherwise: losses within 1 % (bf16: 3 %), and columns that moved alike."""
    base, case = tiny_model("llama"), case_of(*TEXT)
    settings = {"method": method, "batch_size": 7, "precision": precision}
    device = run_on("hpu", base, tmp_path / "hpu", case, **settings)
    cpu = run_on("cpu", base, tmp_path / "cpu", case, **settings)
    assert all(name.startswith("hpu") for name in device.devices)
    assert device.losses == pytest.approx(cpu.losses, rel=0.03 if precision == "bf16" else 0.01)
    scale = max(float(values.abs().max()) for values in cpu.trained().values())
    assert largest_difference(device.trained(), cpu.trained()) < 0.2 * scale


def test_memory_is_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The peak is the card's, and the log has it."""
    run = run_on("hpu", tiny_model("llama"), tmp_path, case_of(*TEXT), batch_size=7)
    assert run.result.peak_memory_bytes > 0
    lines = [json.loads(line) for line in (run.folder / LOG_FILE).read_text().splitlines()]
    assert all("max_memory_allocated (GB)" in line for line in lines)


def test_nothing_compiles_after_the_first_steps(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Lazy mode's own counter of graph compilations stands still from the fourth step on."""
    from habana_frameworks.torch.hpu.metrics import metric_global

    counts: list[int] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: object = None) -> object:
        result = original(self, closure)  # type: ignore[arg-type]
        counts.append(dict(metric_global("graph_compilation").stats())["TotalNumber"])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run = run_on("hpu", tiny_model("llama"), tmp_path, case_of(*TEXT), batch_size=7, max_steps=10, watch=False)
    assert counts[4:] == [counts[4]] * len(counts[4:])
    assert math.isfinite(run.result.loss)
