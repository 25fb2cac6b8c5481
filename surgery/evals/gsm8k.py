"""GSM8K: whether the solution that a model writes ends in the right number.

Solutions are written greedily, one at a time. The number is the first after `####`; without that mark, the last that
was written. What a model goes on to write after its answer, another `Question:`, does not count.
Source: arXiv 2110.14168.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from surgery.errors import RequestError, counted
from surgery.evals.scorer import DECODER, ENCODER_DECODER, Scorer
from surgery.evals.scores import Array, Metric, Scores, mean, parts_by
from surgery.evals.task import EvalSpec, EvalTask, Rows
from surgery.examples import PromptCompletion
from surgery.questions import FINAL, read_gsm8k

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
NEXT_QUESTION = "Question:"


@dataclass(frozen=True)
class _Prompt:
    text: str
    lost: int
    fits: bool


def final_number(text: str) -> Decimal | None:
    """The number that a solution comes to, without its thousands' commas; None where it has none."""
    own = text.split(NEXT_QUESTION, 1)[0]
    before, mark, after = own.partition(FINAL)
    found = NUMBER.findall(after if mark else before)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", ""))


def score(scorer: Scorer, rows: Rows, solved: Rows, spec: EvalSpec) -> Scores:
    """The share of questions answered with the right number. Raises: RequestError."""
    from tqdm import tqdm

    shots = _shots(solved.items, spec.shots_used)
    prompts = [_fitted(scorer, item, shots, spec.new_tokens) for item in rows.items]
    wanted = [final_number(item.completion) for item in rows.items]
    shown = tqdm(prompts, desc="gsm8k", unit="question", disable=None, leave=False)
    texts = [scorer.write(prompt.text, spec.new_tokens) if prompt.fits else ("", "") for prompt in shown]
    found = [final_number(text) for text, _ in texts]
    right = np.asarray([a is not None and a == b for a, b in zip(found, wanted, strict=True)])

    def measure(numbers: Array) -> dict[str, Metric]:
        return {"exact_match": mean(right[numbers])}

    return Scores(
        metrics=measure(np.arange(len(right))),
        asked=[(prompt.text, str(number)) for prompt, number in zip(prompts, wanted, strict=True)],
        parts=parts_by("file", rows.files, measure),
        settings={"shots": spec.shots_used, "max_new_tokens": spec.new_tokens},
        notes=_notes(prompts, found, [stopped for _, stopped in texts]),
    )


def _shots(solved: Sequence[PromptCompletion], count: int) -> Sequence[PromptCompletion]:
    if len(solved) < count:
        raise RequestError("--shots", f"{counted(len(solved), 'row')} in --shots-data", expected=f"{count} or more")
    return solved[:count]


def _fitted(scorer: Scorer, item: PromptCompletion, shots: Sequence[PromptCompletion], new_tokens: int) -> _Prompt:
    """With as many shots as leave room for the answer, the first left out first."""
    solved = [f"{shot.prompt}{shot.completion}" for shot in shots]
    for lost in range(len(shots) + 1):
        text = "\n\n".join([*solved[lost:], item.prompt])
        tokens = scorer.encode(text, None)
        size = len(tokens.ids) + (new_tokens if scorer.kind == DECODER else 0)
        if not tokens.is_cut and (scorer.positions is None or size <= scorer.positions):
            return _Prompt(text, lost, fits=True)
    return _Prompt(text, lost, fits=not tokens.is_cut and len(tokens.ids) < (scorer.positions or np.inf))


def _notes(prompts: Sequence[_Prompt], found: Sequence[Decimal | None], stopped: Sequence[str]) -> tuple[str, ...]:
    lost = [prompt.lost for prompt in prompts if prompt.lost]
    unasked = sum(not prompt.fits for prompt in prompts)
    of = f"of {counted(len(prompts), 'prompt')} did not fit the model's positions"
    told = {
        f"{len(lost)} {of} with all their shots, and lost {sum(lost)} in all": bool(lost),
        f"{unasked} {of} and count as wrong": bool(unasked),
        f"{counted(found.count(None) - unasked, 'answer')} without a number": found.count(None) > unasked,
        f"{counted(stopped.count('max-new-tokens'), 'answer')} not ended by the model": "max-new-tokens" in stopped,
    }
    return tuple(text for text, is_so in told.items() if is_so)


TASK = EvalTask(
    name="gsm8k",
    source="arXiv 2110.14168",
    metrics=("exact_match",),
    kinds=(DECODER, ENCODER_DECODER),
    format="gsm8k",
    reads_as="causal-lm",
    read=read_gsm8k,
    score=score,
    options=("shots", "max-new-tokens"),
)
