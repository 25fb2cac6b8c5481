"""MMLU and GSM8K: rows to questions, and the prompts in which training and evaluation put them.

Sources: MMLU, arXiv 2009.03300; GSM8K, arXiv 2110.14168.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.errors import DataError, counted, shorten
from surgery.examples import Cells, PromptCompletion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FINAL = "####"  # what GSM8K writes before the number that is the answer


@dataclass(frozen=True)
class Question:
    """Choices, and the number of the right one from 0. `subject` is empty where the data name none."""

    place: str
    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def lines(self) -> str:
        """The question with its choices, up to where the letter is to be written."""
        lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text.strip(), *lettered, "Answer:"])

    def solved(self) -> str:
        return f"{self.lines()} {LETTERS[self.answer]}"


def header(subject: str) -> str:
    """What an MMLU prompt begins with."""
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}."


def mmlu_prompt(question: Question, shots: Sequence[Question]) -> str:
    """The header, questions with their answers, and the one to answer; the letter is to follow after a space."""
    return "\n\n".join([header(question.subject), *(shot.solved() for shot in shots), question.lines()])


def read_question(cells: Cells) -> Question:
    """One row of MMLU. Raises: DataError."""
    choices = tuple(cells.items("choices"))
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        expected = f"2 to {len(LETTERS)} texts"
        raise cells.wrong("choices", f"{counted(len(choices), 'choice')}, {choices!r:.60}", expected=expected)
    subject = cells.cell("subject")
    if not isinstance(subject, str | None):
        raise cells.wrong("subject", f"{subject!r:.60}", expected="text")
    answer = _chosen(cells, LETTERS[: len(choices)])
    return Question(cells.row.place, subject or "", cells.text("question"), choices, answer)


def _chosen(cells: Cells, letters: str) -> int:
    answer = cells.value("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return answer
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return letters.index(answer.strip())
    expected = f"a letter from A to {letters[-1]} or a number from 0 to {len(letters) - 1}"
    raise cells.wrong("answer", f"{answer!r:.60}", expected=expected)


def read_mmlu(cells: Cells) -> PromptCompletion:
    """A row to train on: the question without others before it, answered by its letter."""
    question = read_question(cells)
    return PromptCompletion(question.place, mmlu_prompt(question, ()), f" {LETTERS[question.answer]}")


def gsm8k_prompt(question: str) -> str:
    """The question, up to where the solution is to be written."""
    return f"Question: {question.strip()}\nAnswer:"


def read_gsm8k(cells: Cells) -> PromptCompletion:
    """A row to train on: the worked solution as it stands, which ends in `#### number`. Raises: DataError."""
    answer = cells.text("answer").strip()
    if not answer.rpartition(FINAL)[2].strip() or FINAL not in answer:
        found = f"found an answer that ends in {shorten(answer[-60:], 60)!r}"
        raise DataError(cells.row.place, found, expected=f"{FINAL} and a number at its end")
    return PromptCompletion(cells.row.place, gsm8k_prompt(cells.text("question")), f" {answer}")
