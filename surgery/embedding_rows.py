"""Which rows of an embedding train: tokens by number or by text, and the layer that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.compat import input_embeddings, load_tokenizer, quiet_loading
from surgery.errors import RequestError, SelectorError, UnsupportedError
from surgery.select import ALL, EMBEDDING, LinearSite, check_pattern, matches, means

OPTION, NUMBER = "--rows", "id:"


def number_rows(root: Path, spec: Any) -> Any:
    """A spec whose rows are numbers, by the tokenizer of a model folder. Raises: RequestError."""
    texts = [row for row in rows_of(spec) if isinstance(row, str)]
    if not texts:
        return spec
    tokenizer = None if all(_is_number(text) for text in texts) else _tokenizer(root)
    return replace(spec, rows=tuple(_numbered(row, tokenizer) for row in spec.rows))


def rows_of(spec: Any) -> tuple[int | str, ...]:
    """A spec's rows; no other method than PaCA has any."""
    return spec.rows if spec.method == "paca" else ()


def _is_number(text: str) -> bool:
    return text.startswith(NUMBER) and text.removeprefix(NUMBER).isdigit()


def _tokenizer(root: Path) -> Any:
    try:
        with quiet_loading():
            return load_tokenizer(root)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        found = f"{root} has no tokenizer that says which row a text is"
        raise RequestError(OPTION, found, expected=f"numbers, as {NUMBER}7") from error


def _numbered(row: int | str, tokenizer: Any) -> int:
    """A token's number. Raises: RequestError for a text that is no token or several."""
    if isinstance(row, int):
        return row
    if _is_number(row):
        return int(row.removeprefix(NUMBER))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if row in vocabulary:
        return vocabulary[row]
    parts = tokenizer(row, add_special_tokens=False)["input_ids"]
    if len(parts) == 1 and parts[0] != tokenizer.unk_token_id:
        return int(parts[0])
    pieces = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(parts))
    raise RequestError(
        OPTION,
        f"{row!r} is {len(parts)} tokens of this tokenizer ({pieces})",
        expected="one token each",
        fix=f"Name one of them, or a number as {NUMBER}7; a new token is added to tokenizer and model before apply",
    )


def find_embedding(model: Any, sites: Sequence[LinearSite], rows: Sequence[int | str]) -> LinearSite | None:
    """The embedding of the model's input, where rows are asked for. Raises: RequestError, UnsupportedError."""
    if not rows:
        return None
    known = [site for site in sites if site.kind == EMBEDDING]
    if isinstance(model, PreTrainedModel):
        words = input_embeddings(model)
        known = [site for site in known if model.get_submodule(site.module) is words]
    if len(known) != 1:
        raise RequestError(OPTION, f"a model with {len(known)} input embeddings", expected="one")
    site = known[0]
    if site.unfit:
        raise UnsupportedError(OPTION, f"{site.module}: {site.unfit}", expected="an embedding whose rows can train")
    if site.tied_with:
        raise UnsupportedError(
            OPTION,
            f"the weight of {site.module} is {site.tied_with}'s too, whose outputs would change with the rows",
            expected="an embedding of its own",
            fix="Untie them in the base first (config.json: tie_word_embeddings), or train other layers",
        )
    return site


def without_embedding(
    selectors: Sequence[str], sites: Sequence[LinearSite], every: Sequence[LinearSite], embedding: LinearSite | None
) -> tuple[str, ...]:
    """The selectors but for those that mean an embedding alone. Raises: SelectorError for one without rows."""
    left = []
    for selector in selectors:
        check_pattern(selector, "--targets")
        is_layer = selector in ALL or any(means(selector, site) for site in sites)
        named = [site for site in every if site.kind == EMBEDDING and matches(selector, site.module)]
        if is_layer or not named:
            left.append(selector)
        elif embedding is None or embedding not in named:
            found = f"{selector!r} matches no linear layer but the embedding {named[0].module}"
            raise SelectorError(
                "--targets", found, expected="at least one", fix=f"Name the rows to train with {OPTION}"
            )
    return tuple(left)


def require_rows(site: LinearSite, rows: Sequence[int | str], model: nn.Module) -> tuple[int, ...]:
    """The rows as sorted numbers. Raises: RequestError for what is none of the embedding's, or would never train."""
    texts = [row for row in rows if not isinstance(row, int)]
    if texts:
        raise RequestError(OPTION, f"{texts[0]!r} for a model in memory", expected="token numbers")
    numbers = sorted(int(row) for row in rows)
    wrong = next((n for n in numbers if not 0 <= n < site.in_features), None)
    if wrong is not None:
        raise RequestError(OPTION, f"row {wrong} of {site.module}", expected=f"0 to {site.in_features - 1}")
    twice = next((n for n in numbers if numbers.count(n) > 1), None)
    if twice is not None:
        raise RequestError(OPTION, f"row {twice} named twice", expected="each row once")
    padding: Any = model.get_submodule(site.module)
    if padding.padding_idx in numbers:
        found = f"row {padding.padding_idx}, the padding token's, which gets no gradient"
        raise RequestError(OPTION, found, expected="rows that train")
    return tuple(numbers)
