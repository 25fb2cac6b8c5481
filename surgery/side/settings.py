"""What a side network is built from, as plain data: its settings, and the stacks that it reads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

NAME = "side_network"  # of the side network as a child of the model
GATES = {"gru": 3, "lstm": 4, "rnn": 1}


@dataclass(frozen=True)
class SideSettings:
    """What a side network is built from: settings of checkpoint-surgery's `ReadSpec`, which says what each means."""

    cell: str = "gru"
    hidden: int = 256
    recurrent_layers: int = 1
    bidirectional: bool = False
    initial: str = "zero"
    reduce: str = "last"
    output_norm: bool = False
    scale: float = 1.0
    joiner: str = "none"
    pooling: str = "own"


@dataclass(frozen=True)
class Stack:
    """A backbone's list of layers, by dotted paths from the model.

    layers: the module list; exit: the module whose output is the last hidden state (a final norm, or the last layer
    where none follows); read: the layers that are read, from 0.
    """

    name: str
    layers: str
    exit: str
    depth: int
    width: int
    read: tuple[int, ...]

    @property
    def around(self) -> list[str]:
        """The modules that hold both the layers and the exit, from the model itself (``) inwards."""
        pairs = zip(self.layers.split(".")[:-1], self.exit.split(".")[:-1], strict=False)
        shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return ["", *itertools.accumulate(shared, "{}.{}".format)]
