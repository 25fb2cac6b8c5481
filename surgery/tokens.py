"""Examples to token rows: what a model reads and which of its tokens carry loss.

Rules, by kind of example:

- A document is `prefix + text + end`, and all of it carries loss. `prefix` is what the tokenizer itself puts in front
  (a Llama's `<s>`, a GPT-2's nothing), `end` is its end-of-text token unless the text already ends with it.
- A prompt with completion is `prefix + prompt + completion + end`; the completion and the end carry loss.
- A conversation is what the chat template renders; the assistant's turns carry loss: what stands between the template's
  `{% generation %}` marks, else everything the template writes for a turn after its generation prompt.

Texts of several pieces are tokenized as one, since a tokenizer may treat the start of a text apart. Where a token would
lie across two pieces (a GPT-2 token " c" of "a b " and "c") the pieces of that text are tokenized one by one, as at
inference: no token is half prompt, half answer.

Too long examples are cut on the right. A row of which no token then carries loss is dropped and counted, never cut on
the left: an answer whose question was cut away teaches invention.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from surgery.errors import DataError, RequestError, closest, shorten
from surgery.examples import (
    Conversation,
    Document,
    Example,
    Labelled,
    PromptCompletion,
    Tagged,
    class_name,
    target_number,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
BATCH_ROWS = 512

TokenRow: TypeAlias = dict[str, Any]  # column -> list of ids, or a label


class Piece(NamedTuple):
    """A part of a text, with whether its tokens carry loss."""

    text: str
    loss: bool


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies with a model or an adapter. Raises: RequestError."""
    from surgery.compat import load_tokenizer, quiet_loading

    try:
        with quiet_loading():
            return load_tokenizer(folder)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            str(folder),
            f"its tokenizer does not load ({shorten(first_line, 160)})",
            expected="the base's tokenizer files",
        ) from error


@dataclass(frozen=True)
class CausalTokens:
    """Ids and labels of equal length; a label is the id itself or -100."""

    ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def carries_loss(self) -> int:
        """Tokens the model is trained to say: the first has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> CausalTokens:
        return CausalTokens(self.ids[:length], self.labels[:length])


def batches(examples: Iterable[Example], size: int = BATCH_ROWS) -> Iterator[list[Example]]:
    """Lists of `size`, the last one shorter: tokenizers are faster on many texts at once."""
    held: list[Example] = []
    for example in examples:
        held.append(example)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def pack(examples: Iterable[CausalTokens], *, block: int) -> Iterator[CausalTokens]:
    """Join everything in order and cut it into blocks of exactly `block` tokens; an incomplete last one is dropped."""
    ids: list[int] = []
    labels: list[int] = []
    for example in examples:
        ids += example.ids
        labels += example.labels
        whole = len(ids) // block * block
        for begin in range(0, whole, block):
            yield CausalTokens(ids[begin : begin + block], labels[begin : begin + block])
        del ids[:whole], labels[:whole]


# --- causal language modelling -


class CausalEncoder:
    """Documents, prompts with completions and conversations to tokens, at full length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            fix = "Set eos_token in the tokenizer's configuration"
            raise DataError("tokenizer", "found no end-of-text token", expected="one, to end documents with", fix=fix)
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.prefix = prefix_ids(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[CausalTokens]:
        """As many as came, in order. Raises: DataError: no chat template, or one that breaks its own prefix."""
        pieces = [self._pieces(example) for example in examples]
        tokens = encode_pieces(self.tokenizer, pieces)
        return [self._framed(example, encoded) for example, encoded in zip(examples, tokens, strict=True)]

    def _pieces(self, example: Example) -> list[Piece]:
        if isinstance(example, Document):
            return [Piece(example.text, loss=True)]
        if isinstance(example, PromptCompletion):
            return [Piece(example.prompt, loss=False), Piece(example.completion, loss=True)]
        if isinstance(example, Conversation):
            return conversation_pieces(self.tokenizer, example)
        raise DataError(example.place, f"found a row for {type(example).__name__}", expected="text for a causal LM")

    def _framed(self, example: Example, tokens: CausalTokens) -> CausalTokens:
        """Prefix and end; a chat template writes its own."""
        if isinstance(example, Conversation):
            return tokens
        whole_document = isinstance(example, Document)
        begins = example.begins if isinstance(example, Document) else True
        ends = example.ends if isinstance(example, Document) else True
        prefix = self.prefix if begins else []
        end = [self.end] if ends and tokens.ids[-1:] != [self.end] else []
        prefix_labels = prefix if whole_document else [IGNORED] * len(prefix)
        return CausalTokens(prefix + tokens.ids + end, prefix_labels + tokens.labels + end)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer puts before a text, found by comparing with and without."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = [start for start in range(len(framed)) if framed[start : start + len(plain)] == plain]
    return list(framed[: starts[0]]) if starts else []


def encode_pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Piece]]) -> list[CausalTokens]:
    """Tokens of each text, with the labels of the piece each token begins in; no special token is added."""
    if not tokenizer.is_fast:
        return [_one_by_one(tokenizer, pieces) for pieces in texts]
    joined = ["".join(piece.text for piece in pieces) for pieces in texts]
    encoded = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True)
    return [_by_offset(ids, offsets, pieces) or _one_by_one(tokenizer, pieces) for ids, offsets, pieces in rows]


def _by_offset(ids: list[int], offsets: Iterable[tuple[int, int]], pieces: Sequence[Piece]) -> CausalTokens | None:
    """None when a token lies across two pieces."""
    labels: list[int] = []
    current, end = 0, len(pieces[0].text)
    for token, (token_begin, token_end) in zip(ids, offsets, strict=True):
        while token_begin >= end and current + 1 < len(pieces):
            current += 1
            end += len(pieces[current].text)
        if token_end > end:
            return None
        labels.append(token if pieces[current].loss else IGNORED)
    return CausalTokens(ids, labels)


def _one_by_one(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> CausalTokens:
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        own = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"] if piece.text else []
        ids += own
        labels += own if piece.loss else [IGNORED] * len(own)
    return CausalTokens(ids, labels)


# --- conversations -------------------------------------------------------------------------------------------------

GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(generation|endgeneration)(?=\s*[-+]?%\})")
OPEN_MARK, CLOSE_MARK = "\ue0f0", "\ue0f1"  # private use: no tokenizer or template gives them a meaning


def conversation_pieces(tokenizer: PreTrainedTokenizerBase, example: Conversation) -> list[Piece]:
    """What the template renders, cut where the loss begins and ends.

    transformers' own mask of assistant tokens is not used: it runs on to the end of the text when a turn ends in a
    character that has no token (whitespace, in many tokenizers), and stops for good when one begins so.
    Raises: DataError: no template, one that refuses the conversation, or one whose rendering of the first turns changes
    with the turns that follow.
    """
    template = _chat_template(tokenizer)
    messages = list(example.messages)
    whole = _render(tokenizer, example, messages, template=template, ask=False)
    if GENERATION_TAG.search(template):
        return _marked_pieces(tokenizer, example, whole, template=template)
    pieces: list[Piece] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, example, messages[:index], template=template, ask=True)
        after = _render(tokenizer, example, messages[: index + 1], template=template, ask=False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise _not_a_prefix(example, index)
        pieces += [Piece(whole[done : len(before)], loss=False), Piece(whole[len(before) : len(after)], loss=True)]
        done = len(after)
    return [*pieces, Piece(whole[done:], loss=False)]


def _not_a_prefix(example: Conversation, index: int) -> DataError:
    found = f"found that the chat template writes turn {index + 1} differently when other turns stand around it"
    fix = "Let the template mark answers with {% generation %} and {% endgeneration %}, or give one answer a row"
    return DataError(example.place, found, expected="each turn to be written once and for all", fix=fix)


def _marked_pieces(
    tokenizer: PreTrainedTokenizerBase, example: Conversation, whole: str, *, template: str
) -> list[Piece]:
    """Let the template print a mark where it says generation begins and ends; `print` keeps its whitespace control."""
    marks = {"generation": OPEN_MARK, "endgeneration": CLOSE_MARK}
    marked = GENERATION_TAG.sub(lambda tag: f'{tag[1]}print "{marks[tag[2]]}" ', template)
    text = _render(tokenizer, example, list(example.messages), template=marked, ask=False)
    if text.replace(OPEN_MARK, "").replace(CLOSE_MARK, "") != whole:
        found = "found {% generation %} marks that change what the chat template writes"
        raise DataError(example.place, found, expected="marks that only enclose text")
    head, *turns = text.split(OPEN_MARK)
    pieces = [Piece(head, loss=False)]
    for turn in turns:
        inside, close, outside = turn.partition(CLOSE_MARK)
        if not close or CLOSE_MARK in outside:
            raise DataError(example.place, "found {% generation %} marks that do not pair", expected="one end a begin")
        pieces += [Piece(inside, loss=True), Piece(outside, loss=False)]
    return pieces


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        fix = "Take the instruct model's tokenizer, put a chat_template.jinja beside it, or give prompt and completion"
        raise DataError("tokenizer", "found no chat template", expected="one, as the data are conversations", fix=fix)
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError("tokenizer", f"found chat templates none of which is the default ({error})") from error


def _render(
    tokenizer: PreTrainedTokenizerBase,
    example: Conversation,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    ask: bool,
) -> str:
    from jinja2 import TemplateError

    copies = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(copies, chat_template=template, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
        found = f"found a conversation that the chat template refuses ({error})".rstrip(".")
        raise DataError(example.place, found, fix="Mend the conversation's roles and their order") from error
    return str(text)


# --- classes, numbers, tags, targets -------------------------------------------------------------------------------


def class_id(label: object, *, ids: Mapping[str, int], place: str) -> int:
    """Raises: DataError: a class that the training set does not have."""
    name = class_name(label, place=place)
    if name not in ids:
        shown = ", ".join(list(ids)[:8]) + (", ..." if len(ids) > 8 else "")
        fix = closest(name, ids) or "Put at least one row of each class into the training set"
        raise DataError(place, f"found the class {name!r}", expected=f"one of {shown}", fix=fix)
    return ids[name]


def encode_labelled(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Labelled], *, ids: Mapping[str, int], max_length: int
) -> list[tuple[TokenRow, bool]]:
    """Token rows with `labels`, and whether each was cut. Without class ids the labels are numbers (regression)."""
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    encoded = tokenizer(texts, pairs, verbose=False)
    rows: list[tuple[TokenRow, bool]] = []
    for index, example in enumerate(examples):
        row = {column: values[index] for column, values in encoded.items()}
        cut = len(row["input_ids"]) > max_length
        if cut:
            row = dict(tokenizer(example.text, example.pair, truncation=True, max_length=max_length))
        if not row["input_ids"]:
            raise DataError(example.place, "found a text without a token", expected="text")
        label = example.label
        row["labels"] = (
            class_id(label, ids=ids, place=example.place) if ids else target_number(label, place=example.place)
        )
        rows.append((row, cut))
    return rows


def encode_tagged(
    tokenizer: PreTrainedTokenizerBase, example: Tagged, *, ids: Mapping[str, int], max_length: int
) -> tuple[TokenRow, bool]:
    """A word's first piece carries its tag, its other pieces -100."""
    words = list(example.words)
    try:
        encoded = tokenizer(words, is_split_into_words=True, verbose=False)
        cut = len(encoded["input_ids"]) > max_length
        if cut:
            encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        owners = encoded.word_ids()
    except (AssertionError, ValueError) as error:
        fix = "Use a fast tokenizer, made with add_prefix_space=True where it is of the GPT-2 kind"
        raise DataError("tokenizer", f"found one that cannot take words ({error})".rstrip("."), fix=fix) from error
    previous = [None, *owners[:-1]]
    labels = [
        IGNORED if owner is None or owner == before else class_id(example.tags[owner], ids=ids, place=example.place)
        for owner, before in zip(owners, previous, strict=True)
    ]
    return {**encoded, "labels": labels}, cut


def encode_target(
    tokenizer: PreTrainedTokenizerBase, example: PromptCompletion, *, max_length: int
) -> tuple[TokenRow, bool]:
    """Source and target, each with the special tokens the tokenizer gives it and each cut to `max_length`."""
    source = tokenizer(example.prompt, verbose=False)
    target = tokenizer(text_target=example.completion, verbose=False)
    cut = max(len(source["input_ids"]), len(target["input_ids"])) > max_length
    if cut:
        source = tokenizer(example.prompt, truncation=True, max_length=max_length)
        target = tokenizer(text_target=example.completion, truncation=True, max_length=max_length)
    return {**source, "labels": target["input_ids"]}, cut


# --- batches -------------------------------------------------------------------------------------------------------


def padder_of(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with the end of text. Padding is masked by position, never by its id."""
    if tokenizer.pad_token_id is not None:
        return tokenizer
    if tokenizer.eos_token is None:
        fix = "Set pad_token in the tokenizer's configuration"
        raise DataError("tokenizer", "found neither a padding nor an end-of-text token", expected="one", fix=fix)
    padder = copy.deepcopy(tokenizer)
    padder.pad_token = tokenizer.eos_token
    return padder


def collator_of(
    task: str, padder: PreTrainedTokenizerBase, *, fixed_length: int | None, pad_to_multiple_of: int | None
) -> Any:
    """transformers' own collator for the task, padding labels with -100; with `fixed_length` to one shape."""
    import transformers

    kinds = {
        "causal-lm": transformers.DataCollatorForSeq2Seq,
        "seq2seq": transformers.DataCollatorForSeq2Seq,
        "token-classification": transformers.DataCollatorForTokenClassification,
    }
    return kinds.get(task, transformers.DataCollatorWithPadding)(
        tokenizer=padder,
        padding="max_length" if fixed_length is not None else True,
        max_length=fixed_length,
        pad_to_multiple_of=pad_to_multiple_of,
    )
