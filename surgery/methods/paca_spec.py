"""What PaCA can be asked for. Source: PaCA, arXiv 2503.01905 (ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from surgery.columns import budget_values, require_strategy, resample_steps
from surgery.combinations import facts, of_record, require
from surgery.errors import RequestError, require_known
from surgery.paca_experts import OWN, SHARED
from surgery.quantized import require_kind
from surgery.select import ALL_LINEAR

CALIBRATION = ("calibration_data", "calibration_columns", "calibration_rows", "calibration_length")


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them; experts: whether a mixture's experts
    have `shared` columns or each its `own`, where `targets` name them; quantize: how the base is held while it is
    frozen, a kind of `surgery.quantized.KINDS` or empty for as it is.

    budget: so many values, or such a part of the targets' (`0.5%`), in place of a rank: spread over the layers by the
    columns' scores. resample: `every:500` draws other columns every so many optimizer steps. What looks at inputs or
    gradients takes calibration_data: files or ids, of which calibration_rows are drawn by the seed and cut to
    calibration_length tokens; calibration_columns: role -> column, as of any data.

    rows: tokens, as numbers or, for a folder with a tokenizer, as texts, whose rows of the input embedding train too.
    """

    method: ClassVar[str] = "paca"
    later: ClassVar[tuple[str, ...]] = ("experts", "quantize", "budget", "resample", *CALIBRATION, "rows")

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    experts: str = SHARED
    quantize: str = ""
    budget: str = ""
    resample: str = ""
    calibration_data: tuple[str, ...] = ()
    calibration_columns: Mapping[str, str] = field(default_factory=dict)
    calibration_rows: int = 64
    calibration_length: int = 512
    rows: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        require_known("--experts", self.experts, (SHARED, OWN))
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
        if self.quantize:
            require_kind(self.quantize)
        for name in ("targets", "exclude", "calibration_data", "rows"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, (str, int)) else tuple(given))
        object.__setattr__(self, "budget", str(self.budget))
        self._require_columns()

    def _require_columns(self) -> None:
        """What says which columns fits together, and nothing of it would be ignored.

        Raises: RequestError, UnsupportedError.
        """
        if self.budget:
            budget_values(self.budget, 1 << 62)
        resample_steps(self.resample)
        require({**of_record("paca", self), **facts({"held": self.quantize})})
        if self.calibration_rows < 1 or self.calibration_length < 2:
            option = "--calibration-rows" if self.calibration_rows < 1 else "--calibration-length"
            found = f"{self.calibration_rows} rows of {self.calibration_length} tokens"
            raise RequestError(option, found, expected="1 row of 2 tokens, or more")

    def scale(self, rank: int) -> float:
        """What the stored difference is multiplied by while training."""
        return 1.0 if self.alpha is None else self.alpha / rank
