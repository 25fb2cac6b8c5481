"""What became of a data set's rows: counts, and the lines that say so."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import counted


@dataclass
class Counts:
    """What became of one set. `loss_tokens` are labelled rows where a row has one label."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated_rows: int = 0
    dropped_rows: int = 0
    tail_tokens: int = 0


def _counted(counts: Counts) -> str:
    parts = [counted(counts.rows, "row"), counted(counts.examples, "example")]
    parts += [counted(counts.tokens, "token")] if counts.tokens else []
    parts.append(f"{counts.loss_tokens} {'carries' if counts.loss_tokens == 1 else 'carry'} loss")
    special = {"cut": counts.truncated_rows, "dropped without loss": counts.dropped_rows}
    parts += [f"{number} {what}" for what, number in special.items() if number]
    return ", ".join(parts + ([f"{counted(counts.tail_tokens, 'token')} left over"] if counts.tail_tokens else []))


def share_of(counts: Counts, examples: int) -> Counts:
    """The part of `counts` that `examples` equal blocks are; what was left over stays with neither."""
    part = [number * examples // counts.examples for number in (counts.tokens, counts.loss_tokens)]
    return Counts(rows=counts.rows, examples=examples, tokens=part[0], loss_tokens=part[1])


@dataclass(frozen=True)
class Report:
    """For printing: the format recognised, the length that held, and the counts."""

    format: str
    packed: bool
    max_length: int
    train: Counts
    eval: Counts | None

    def lines(self) -> list[str]:
        how = f"packed to {self.max_length} tokens" if self.packed else f"up to {self.max_length} tokens"
        how = how if self.max_length else "decoded batch by batch"
        sets = [("train", self.train)] + ([("eval", self.eval)] if self.eval else [])
        return [f"format {self.format}, {how}", *(f"{name}: {_counted(counts)}" for name, counts in sets)]
