"""What evaluation asks of a model, as a record of functions: torch and onnxruntime each give one.

Neither torch nor transformers is imported here. Shape letters: b rows, n choices, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.errors import CheckError, UnsupportedError

Array = npt.NDArray[Any]

CLASSIFIER, DECODER, ENCODER_DECODER = "classifier", "decoder", "encoder-decoder"


@dataclass(frozen=True)
class Tokens:
    """A row as a model reads it. `is_cut`: it was longer than an encoder's positions, and its end is gone."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    is_cut: bool = False


@dataclass(frozen=True)
class Scorer:
    """A model as a few functions.

    classes: a classifier's names by number. positions: the tokens that a row may have; None: as many as there are.
    encode: one text or a pair to tokens, special ones among them; an encoder's are cut at `positions`.
    pieces: a text's tokens without special ones. answer: the tokens of an answer as a model is trained to give it.
    score: rows of tokens to a classifier's logits, or to the log-likelihoods of answers, (b, n).
    pads: whether several rows may be scored together. notes: what of the folder's own rules for writing is left out.
    write: a prompt written on, greedily, by at most so many tokens: (text, why it stopped).
    """

    kind: str
    runtime: str
    classes: tuple[str, ...]
    positions: int | None
    encode: Callable[[str, str | None], Tokens]
    pieces: Callable[[str], list[int]]
    answer: Callable[[str], list[int]]
    score: Callable[[Sequence[Tokens], Sequence[Sequence[int]]], Array]
    write: Callable[[str, int], tuple[str, str]]
    pads: bool = True
    notes: tuple[str, ...] = ()


def score_rows(
    scorer: Scorer, rows: Sequence[Tokens], answers: Sequence[Sequence[int]], *, batch: int, where: str
) -> Array:
    """All rows' numbers (b, n), in the rows' order. The longest are scored first: what does not fit fails at once.

    Raises: CheckError: a number that is none.
    """
    from tqdm import tqdm

    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n].ids), n))
    size = batch if scorer.pads else 1
    begins = tqdm(range(0, len(order), size), desc=where, unit="batch", disable=None, leave=False)
    found = [scorer.score([rows[n] for n in order[begin : begin + size]], answers) for begin in begins]
    scores = np.empty((len(rows), found[0].shape[1]), np.float64)
    scores[order] = np.concatenate(found)
    if not np.isfinite(scores).all():
        fix = "A model in fp16 may have overflowed: use bf16 or fp32"
        raise CheckError(where, "found scores that are not finite", expected="numbers", fix=fix)
    return scores


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Array, Array]:
    """Ids and mask, (b, longest) int64 each, filled up on the right: causal models never see what comes after."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), value, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def log_likelihood(logits_btv: Array, answer: Sequence[int]) -> Array:
    """The log-probability of an answer's tokens, (b,): logits at t are of the answer's token t."""
    logs_btv = _log_softmax(logits_btv[:, : len(answer)])
    picked: Array = np.take_along_axis(logs_btv, np.asarray(answer)[None, :, None], axis=-1)
    return np.asarray(picked[:, :, 0].sum(axis=1))


def _log_softmax(logits: Array) -> Array:
    """Shapes: (.., v) to the same, in double precision."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def next_token_likelihoods(
    next_logits: Callable[[Sequence[Tokens]], Array], rows: Sequence[Tokens], answers: Sequence[Sequence[int]]
) -> Array:
    """A decoder's log-likelihoods of answers, (b, n): one forward for each beginning that answers have.

    next_logits: rows to the logits (b, v) of the token that follows each. Answers of one token need one forward.
    """
    begins = dict.fromkeys(tuple(answer[:length]) for answer in answers for length in range(len(answer)))
    after = {begin: _log_softmax(next_logits([Tokens(row.ids + begin) for row in rows])) for begin in begins}
    sums = [sum(after[tuple(answer[:t])][:, token] for t, token in enumerate(answer)) for answer in answers]
    return np.stack([np.asarray(total) for total in sums], axis=1)


def answers_after(
    scorer: Scorer, last: str, answers: Sequence[str], *, where: str
) -> tuple[tuple[int, ...], list[list[int]]]:
    """The tokens of ` A`, ` B` .. after `last`, which prompts end with: what they all begin with, and the rest of each.

    Where a tokenizer joins an answer's beginning with the prompt's end, both are tokenized apart, as in training.
    Raises: UnsupportedError: a tokenizer that does not tell them apart.
    """
    before = scorer.pieces(last)
    found = []
    for answer in answers:
        joined = scorer.pieces(last + answer)
        found.append(joined[len(before) :] if joined[: len(before)] == before else scorer.pieces(answer))
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*found, strict=False))
    lead = [tokens[0] for tokens in same]
    rests = [ids[len(lead) :] for ids in found]
    if not all(rests) or len(set(map(tuple, rests))) < len(rests):
        said = ", ".join(map(repr, answers))
        raise UnsupportedError(
            where, f"a tokenizer that writes two of {said} alike", expected="one that tells them apart"
        )
    return tuple(lead), rests


def frame_of(scorer: Scorer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a text begins and ends with, found by comparing a text with and without."""
    plain, framed = tuple(scorer.pieces("a")), scorer.encode("a", None).ids
    starts = [start for start in range(len(framed)) if framed[start : start + len(plain)] == plain]
    return (framed[: starts[0]], framed[starts[0] + len(plain) :]) if starts else ((), ())
