"""What encoders leave for their decoders, and which memory belongs to an output that a decoder is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class Memory:
    """What the encoder left for the decoder: its output, its side states (b, s, h), its mask (b, s)."""

    source: Tensor
    states_bsh: Tensor
    mask_bs: Tensor | None


class Memories:
    """What encoders left, each for as long as the output lives that it belongs to. A copy holds nothing."""

    def __init__(self) -> None:
        self._left: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memories, ()

    def keep(self, memory: Memory) -> None:
        """Hold it by its source, which must not be held itself."""
        self._left[memory.source] = memory.states_bsh, memory.mask_bs

    def find(self, given_bsd: Tensor) -> Memory | None:
        """The memory of an encoder's output, or of rows of the latest that has them, repeated for beams or picked."""
        left = self._left.get(given_bsd)
        if left is not None:
            return Memory(given_bsd, *left)
        for reference in reversed(self._left.keyrefs()):
            source = reference()
            rows = None if source is None else _rows(given_bsd.detach(), source.detach())
            if rows is not None:
                states, mask = self._left[source]
                return Memory(given_bsd, states[rows], None if mask is None else mask[rows])
        return None


def _rows(given_bsd: Tensor, source_bsd: Tensor) -> Tensor | None:
    """The number of the source's row that each given row is, bit for bit; None where one is not among them."""
    if given_bsd.shape[1:] != source_bsd.shape[1:] or given_bsd.dtype != source_bsd.dtype:
        return None
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[source_bsd.dtype.itemsize]
    given, source = (x.to(source_bsd.device).contiguous().view(whole) for x in (given_bsd, source_bsd))
    sums = [x.sum((1, 2)) for x in (given, source)]  # of whole numbers, so the same in any order
    rows = (sums[0].unsqueeze(1) == sums[1]).int().argmax(1)
    return rows if torch.equal(source[rows], given) else None
