"""Examples to token rows with labels, cut or packed, and counted on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from surgery.data_report import Counts
from surgery.data_spec import DataSpec
from surgery.examples import Document, Example, Labelled, Pictured, PromptCompletion, Tagged
from surgery.images import TASK as IMAGES
from surgery.images import encode_pictured
from surgery.tokens import (
    IGNORED,
    CausalEncoder,
    CausalTokens,
    TokenRow,
    batches,
    class_id,
    encode_labelled,
    encode_tagged,
    encode_target,
    pack,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenizing:
    """How the examples of one run become token rows; those of images, which have no tokenizer, rows with bytes."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    class_ids: Mapping[str, int]
    max_length: int
    packed: bool

    @staticmethod
    def of(
        spec: DataSpec, *, task: str, packed: bool, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
    ) -> Tokenizing:
        max_length = min(spec.max_length, tokenizer.model_max_length)
        ids = {name: index for index, name in enumerate(names)}
        return Tokenizing(task, tokenizer, ids, max_length, packed)

    def rows(self, examples: Iterator[Example], counts: Counts) -> Iterator[TokenRow]:
        """Token rows with `labels`; `counts` is complete when they are used up."""
        if self.task == "causal-lm":
            yield from self._causal(examples, counts)
            return
        encoders = {"token-classification": self._tagged, "seq2seq": self._targets, IMAGES: self._pictured}
        encode = encoders.get(self.task, self._labelled)
        for batch in batches(examples):
            for row, cut in encode(batch):
                labels = row["labels"]
                counts.rows += 1
                counts.examples += 1
                counts.truncated_rows += cut
                counts.tokens += len(row.get("input_ids", ()))
                counts.loss_tokens += sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1
                yield row

    def _labelled(self, batch: list[Example]) -> Iterable[tuple[TokenRow, bool]]:
        examples = cast("list[Labelled]", batch)
        return encode_labelled(self.tokenizer, examples, ids=self.class_ids, max_length=self.max_length)

    def _tagged(self, batch: list[Example]) -> Iterable[tuple[TokenRow, bool]]:
        for example in cast("list[Tagged]", batch):
            yield encode_tagged(self.tokenizer, example, ids=self.class_ids, max_length=self.max_length)

    def _pictured(self, batch: list[Example]) -> Iterable[tuple[TokenRow, bool]]:
        for example in cast("list[Pictured]", batch):
            label = class_id(example.label, ids=self.class_ids, place=example.place)
            yield encode_pictured(example, label=label), False

    def _targets(self, batch: list[Example]) -> Iterable[tuple[TokenRow, bool]]:
        for example in cast("list[PromptCompletion]", batch):
            yield encode_target(self.tokenizer, example, max_length=self.max_length)

    def _causal(self, examples: Iterator[Example], counts: Counts) -> Iterator[TokenRow]:
        encoded = self._encoded(examples, counts)
        for example in pack(encoded, block=self.max_length) if self.packed else self._cut(encoded, counts):
            loss_tokens = example.carries_loss()
            counts.tail_tokens -= len(example) if self.packed else 0
            if not loss_tokens:  # a batch of nothing else would give a loss of NaN
                counts.dropped_rows += 1
                continue
            counts.examples += 1
            counts.tokens += len(example)
            counts.loss_tokens += loss_tokens
            yield {"input_ids": example.ids, "labels": example.labels}

    def _encoded(self, examples: Iterator[Example], counts: Counts) -> Iterator[CausalTokens]:
        encoder = CausalEncoder(self.tokenizer)
        for batch in batches(examples):
            for example, tokens in zip(batch, encoder.encode(batch), strict=True):
                counts.rows += example.begins if isinstance(example, Document) else 1
                counts.tail_tokens += len(tokens) if self.packed else 0
                yield tokens

    def _cut(self, encoded: Iterator[CausalTokens], counts: Counts) -> Iterator[CausalTokens]:
        for tokens in encoded:
            short = tokens.cut(self.max_length)
            counts.truncated_rows += len(tokens) > self.max_length and short.carries_loss() > 0
            yield short
