"""Which data, and how they become batches: the request, checked where it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.errors import DataError


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how they become batches.

    `train`, `eval`: files, or ids of the hub (`org/name`, `org/name/config`, `org/name:split`).
    `eval_fraction`: the part of the training rows held out when `eval` is empty, drawn by `seed`; of plain text files
    it is the last blocks. `columns`: role -> column, or a number from 0 where a CSV or TSV has no header.
    `max_length`: tokens; a smaller limit of the tokenizer wins. `packing`: text is joined and cut to blocks of exactly
    `max_length`; `pack_examples` does the same to prompts with completions and conversations, which then share blocks
    and see each other. `max_rows`: only the first rows of the training and of the evaluation set.
    `horizontal_flip`: who trains mirrors images of the training set at random.
    `static_shapes`: every batch is padded to `max_length` (Gaudi), otherwise to its longest row.
    Raises: DataError: a value out of range, or two that exclude each other.
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    eval_fraction: float = 0.0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 1024
    packing: bool = True
    pack_examples: bool = False
    max_rows: int | None = None
    horizontal_flip: bool = False
    seed: int = 0
    static_shapes: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError("data.train", "found no file", expected="at least one file or dataset id")
        if not 0.0 <= self.eval_fraction < 1.0:
            raise DataError("data.eval_fraction", f"found {self.eval_fraction}", expected="0 up to, not including, 1")
        if self.eval and self.eval_fraction:
            raise DataError("data.eval_fraction", "found an evaluation set as well", expected="one of the two")
        if self.max_length < 2:
            raise DataError("data.max_length", f"found {self.max_length}", expected="2 tokens or more")
        if self.max_rows is not None and self.max_rows < 1:
            raise DataError("data.max_rows", f"found {self.max_rows}", expected="1 or more")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise DataError("data.pad_to_multiple_of", f"found {self.pad_to_multiple_of}", expected="1 or more")
        if self.static_shapes and self.pad_to_multiple_of is not None:
            raise DataError("data.pad_to_multiple_of", "found static_shapes as well", expected="one of the two")
