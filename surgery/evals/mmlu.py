"""MMLU: which of the letters A to D a model says after `Answer:`.

As in the paper's own evaluation: a header that names the subject, solved questions of that subject from the dev split,
the question, and the likeliest of the answer letters. Subjects and their four categories are the authors'.
Source: arXiv 2009.03300, and its code at github.com/hendrycks/test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from surgery.errors import RequestError, counted
from surgery.evals.scorer import DECODER, ENCODER_DECODER, Scorer, Tokens, answers_after, frame_of, score_rows
from surgery.evals.scores import Array, Metric, Scores, mean, mean_of_means, parts_by
from surgery.evals.task import EvalSpec, EvalTask, Rows
from surgery.questions import LETTERS, Question, mmlu_prompt, read_question

WHERE = "mmlu"
LAST = "Answer:"

CATEGORIES: Mapping[str, str] = {
    subject: category
    for category, subjects in {
        "STEM": (
            "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics"
            " college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics"
            " high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics"
            " high_school_physics high_school_statistics machine_learning"
        ),
        "humanities": (
            "formal_logic high_school_european_history high_school_us_history high_school_world_history"
            " international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory"
            " professional_law world_religions"
        ),
        "social sciences": (
            "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics"
            " high_school_microeconomics high_school_psychology human_sexuality professional_psychology"
            " public_relations security_studies sociology us_foreign_policy"
        ),
        "other": (
            "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing"
            " medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
        ),
    }.items()
    for subject in subjects.split()
}


def score(scorer: Scorer, rows: Rows, solved: Rows, spec: EvalSpec) -> Scores:
    """Accuracy over all questions, over subjects, and by subject and category. Raises: RequestError."""
    questions: Sequence[Question] = rows.items
    shots = _shots_by_subject(questions, solved.items, spec.shots_used)
    letters = [f" {letter}" for letter in LETTERS[: max(len(question.choices) for question in questions)]]
    if scorer.kind == DECODER:
        lead, answers = answers_after(scorer, LAST, letters, where=WHERE)
    else:
        lead, answers = (), [scorer.answer(letter) for letter in letters]
    encode = partial(_encoded, scorer=scorer, frame=frame_of(scorer), lead=lead, answer=max(map(len, answers)))
    prompts = [_fitted(encode, question, shots[question.subject]) for question in questions]
    numbers = score_rows(scorer, [prompt.tokens for prompt in prompts], answers, batch=spec.rows_at_once, where=WHERE)
    chosen = [int(numbers[n, : len(question.choices)].argmax()) for n, question in enumerate(questions)]
    right = np.asarray([found == question.answer for found, question in zip(chosen, questions, strict=True)])
    return _summed_up(
        rows, right, prompts, settings={"shots": spec.shots_used, "answers": _described(scorer, letters, answers)}
    )


def _shots_by_subject(
    questions: Sequence[Question], solved: Sequence[Question], count: int
) -> dict[str, Sequence[Question]]:
    """The first solved questions of each subject that is asked about. Raises: RequestError: fewer than `count`."""
    found = {question.subject: [s for s in solved if s.subject == question.subject] for question in questions}
    for subject, known in found.items():
        if len(known) < count:
            which = f"the subject {subject!r}" if subject else "no subject"
            expected = f"{count} or more in --shots-data"
            raise RequestError("--shots", f"{counted(len(known), 'row')} of {which}", expected=expected)
    return {subject: known[:count] for subject, known in found.items()}


@dataclass(frozen=True)
class _Prompt:
    """A question as the model reads it, and how many of its shots did not fit."""

    text: str
    tokens: Tokens
    lost: int


def _fitted(encode: Callable[[str], Tokens], question: Question, shots: Sequence[Question]) -> _Prompt:
    """With as many shots as fit; the first is left out first."""
    for lost in range(len(shots) + 1):
        text = mmlu_prompt(question, shots[lost:])
        tokens = encode(text)
        if not tokens.is_cut:
            break
    return _Prompt(text, tokens, lost)


def _encoded(
    text: str, *, scorer: Scorer, frame: tuple[tuple[int, ...], tuple[int, ...]], lead: tuple[int, ...], answer: int
) -> Tokens:
    """The tokens as in training; where they are too many, the end of them, since the question stands there.

    frame: the special tokens around a text, of which a decoder gets those in front. answer: the tokens of the longest
    answer, of which a decoder reads all but the last as well.
    """
    is_decoder = scorer.kind == DECODER
    prefix, suffix = (frame[0], ()) if is_decoder else frame
    body = tuple(scorer.pieces(text)) + lead
    if scorer.positions is None:
        return Tokens(prefix + body + suffix)
    room = scorer.positions - len(prefix) - len(suffix) - (answer - 1 if is_decoder else 0)
    return Tokens(prefix + body[-room:] + suffix, is_cut=len(body) > room)


def _described(scorer: Scorer, letters: Sequence[str], answers: Sequence[Sequence[int]]) -> str:
    """Which tokens were compared, in words."""
    what = ", ".join(map(repr, letters))
    if scorer.kind == ENCODER_DECODER:
        return f"the likelihoods of {what} as whole answers"
    if max(map(len, answers)) == 1:
        return f"the logits of {what}"
    return f"the likelihoods of {what}, some of which have several tokens"


def _summed_up(rows: Rows, right: Array, prompts: Sequence[_Prompt], *, settings: dict[str, object]) -> Scores:
    questions: Sequence[Question] = rows.items

    def measure(numbers: Array) -> dict[str, Metric]:
        return {"accuracy": mean(right[numbers])}

    subjects = parts_by("subject", [question.subject or "none" for question in questions], measure)
    categories = [CATEGORIES.get(question.subject, "none") for question in questions]
    macro = mean_of_means([part.metrics["accuracy"] for part in subjects]) if subjects else mean(right)
    return Scores(
        metrics={"accuracy": mean(right), "macro_accuracy": macro},
        asked=[(p.text, LETTERS[question.answer]) for p, question in zip(prompts, questions, strict=True)],
        parts=(*parts_by("category", categories, measure), *subjects, *parts_by("file", rows.files, measure)),
        settings=settings,
        notes=_notes(prompts),
    )


def _notes(prompts: Sequence[_Prompt]) -> tuple[str, ...]:
    lost = [prompt.lost for prompt in prompts if prompt.lost]
    cut = sum(prompt.tokens.is_cut for prompt in prompts)
    notes = []
    if lost:
        of = f"{len(lost)} of {counted(len(prompts), 'prompt')}"
        notes.append(f"{of} did not fit the model's positions and lost shots, {sum(lost)} in all")
    if cut:
        notes.append(f"{counted(cut, 'prompt')} did not fit even without shots: their beginning was cut off")
    return tuple(notes)


TASK = EvalTask(
    name="mmlu",
    source="arXiv 2009.03300",
    metrics=("accuracy", "macro_accuracy"),
    kinds=(DECODER, ENCODER_DECODER),
    format="mmlu",
    reads_as="causal-lm",
    read=read_question,
    score=score,
    options=("shots", "batch"),
)
