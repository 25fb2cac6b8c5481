"""Everything that can go wrong, and the exit code each gives.

    SurgeryError                 1   it failed while running
    |-- RequestError             2   the request is wrong
    |   |-- SelectorError            a pattern matches nothing, or too much
    |   |-- NotAModelError           the folder is no checkpoint we read
    |   |-- OutputExistsError        we never overwrite silently
    |   |-- RecipeError              a recipe or override with an unknown or impossible key
    |   `-- DataError                a data set that cannot be trained on as asked
    |-- CheckError               3   a check did not hold
    |-- RefusedError             4   refused before starting
    |   |-- DamagedError             a file that lies about itself
    |   |-- BaseMismatchError        not the base this adapter was made for
    |   |-- PathEscapeError          a path that leaves its folder
    |   `-- ResourceError            no room on disk, not enough memory
    |-- UnsupportedError         5   a combination we do not do
    `-- InterruptedRunError    130   a person or a scheduler stopped the run

Every message reads `<where>: <found>, expected <expected>. <fix>`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(Exception):
    """The root: a failure while running. `where` is a file, module or flag; the rest, phrases without a full stop."""

    exit_code = 1

    def __init__(self, where: str, found: str, *, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        body = f"{where}: {found}"
        if expected:
            body += f", expected {expected}"
        super().__init__(f"{body}. {fix}." if fix else f"{body}.")


class RequestError(SurgeryError):
    exit_code = 2


class SelectorError(RequestError):
    pass


class NotAModelError(RequestError):
    pass


class OutputExistsError(RequestError):
    pass


class RecipeError(RequestError):
    pass


class DataError(RequestError):
    pass


class CheckError(SurgeryError):
    exit_code = 3


class RefusedError(SurgeryError):
    exit_code = 4


class DamagedError(RefusedError):
    pass


class BaseMismatchError(RefusedError):
    pass


class PathEscapeError(RefusedError):
    pass


class ResourceError(RefusedError):
    pass


class UnsupportedError(SurgeryError):
    exit_code = 5


class InterruptedRunError(SurgeryError):
    exit_code = 130


def closest(name: str, choices: Iterable[str]) -> str:
    """`the closest is 'x'` for an error's fix, or the empty string where nothing is near. Case counts for little."""
    names = list(choices)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    folded = {choice.casefold(): choice for choice in names}
    near = near or [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)]
    return f"The closest is {near[0]!r}" if near else ""


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises: RequestError, with the nearest name, where it is none of those known. kind: what it names."""
    names = list(known)
    if name not in names:
        raise RequestError(
            kind, f"unknown name {name!r}", expected=f"one of {', '.join(names)}", fix=closest(name, names)
        )


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def option_of(name: str) -> str:
    """A setting's name as an option of the command line: `--in-words`."""
    return f"--{name.replace('_', '-')}"


def shorten(text: str, limit: int) -> str:
    """A text as one line of at most `limit` characters, cut at a word; `..` stands for the rest."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    cut = text[: limit - 2]
    return (cut.rpartition(" ")[0] or cut[:-1]) + " .."
