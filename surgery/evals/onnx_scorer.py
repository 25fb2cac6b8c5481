"""Scores from an ONNX folder: onnxruntime and numpy, without torch and without transformers.

Shape letters: b rows, t tokens, n answers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint import DECODER_FILE, MODEL_FILE
from surgery.errors import DamagedError
from surgery.evals.scorer import (
    CLASSIFIER,
    DECODER,
    ENCODER_DECODER,
    Array,
    Scorer,
    Tokens,
    log_likelihood,
    next_token_likelihoods,
    padded,
)
from surgery.generate import GenerateSpec, max_positions
from surgery.onnx_runtime import PAST, OnnxModel, as_value, empty_cache, open_folder, run_graph


def open_scorer(folder: Path) -> Scorer:
    """An ONNX folder, ready to be scored. Raises: see onnx_runtime.open_folder."""
    return scorer_of(open_folder(folder))


def scorer_of(model: OnnxModel) -> Scorer:
    """A graph's functions."""
    score = {
        CLASSIFIER: lambda rows, _answers: _class_logits(model, rows),
        DECODER: lambda rows, answers: next_token_likelihoods(partial(_next_logits, model), rows, answers),
        ENCODER_DECODER: lambda rows, answers: _answer_likelihoods(model, rows, answers),
    }
    known = (max_positions(model.config), None if model.kind == DECODER else model.text.max_tokens)
    limit = min((n for n in known if n is not None), default=None)
    is_decoder = model.kind == DECODER
    pads = not any(isinstance(entry.shape[0], int) for graph in model.sessions.values() for entry in graph.get_inputs())
    return Scorer(
        kind=model.kind,
        runtime=model.runtime,
        classes=_classes(model) if model.kind == CLASSIFIER else (),
        positions=limit,
        encode=lambda text, pair: _tokens(model, text, pair, None if is_decoder else limit),
        pieces=lambda text: model.text.tokens(text, special=False)[0],
        answer=lambda text: model.text.tokens(text, special=not is_decoder)[0],
        score=score[model.kind],
        write=lambda prompt, tokens: _written(model, prompt, tokens),
        pads=pads and (model.kind != CLASSIFIER or model.config.get("pad_token_id") is not None),
        notes=model.notes,
    )


def _classes(model: OnnxModel) -> tuple[str, ...]:
    (logits,) = [entry for entry in model.sessions[MODEL_FILE].get_outputs() if entry.name == "logits"]
    named = model.config.get("id2label") or {}
    count = len(named) or (logits.shape[1] if isinstance(logits.shape[1], int) else 2)  # 2 is transformers' default
    return tuple(str(named.get(str(number), f"LABEL_{number}")) for number in range(count))


def _tokens(model: OnnxModel, text: str, pair: str | None, limit: int | None) -> Tokens:
    ids, types = model.text.tokens(text, pair)
    is_cut = limit is not None and len(ids) > limit
    if limit is not None and is_cut:
        ids, types = model.text.cut(text, pair, limit)
    return Tokens(tuple(ids), tuple(types), is_cut)


def _feeds(rows: Sequence[Tokens], pad: int) -> dict[str, Any]:
    ids_bt, mask_bt = padded([row.ids for row in rows], pad)
    types_bt, _ = padded([row.types or (0,) * len(row.ids) for row in rows], 0)
    positions_bt = np.broadcast_to(np.arange(ids_bt.shape[1]), ids_bt.shape).copy()
    found = {"input_ids": ids_bt, "attention_mask": mask_bt, "token_type_ids": types_bt, "position_ids": positions_bt}
    return {name: as_value(values) for name, values in found.items()}


def _class_logits(model: OnnxModel, rows: Sequence[Tokens]) -> Array:
    feeds = _feeds(rows, model.config.get("pad_token_id") or 0)
    feeds.pop("position_ids")
    (logits,) = run_graph(model.sessions[MODEL_FILE], ["logits"], feeds, str(model.folder / MODEL_FILE))
    return np.asarray(logits.numpy(), np.float32)


def _decoded(model: OnnxModel, name: str, feeds: Mapping[str, Any], rows: int) -> Array:
    """A decoder's logits (b, t, v) from its first token on."""
    session, where = model.sessions[name], str(model.folder / name)
    own = [entry for entry in session.get_inputs() if entry.name.startswith(PAST) and entry.name not in feeds]
    caches = {entry.name: empty_cache(entry, where, rows=rows) for entry in own}
    (logits,) = run_graph(session, ["logits"], {**feeds, **caches}, where)
    return np.asarray(logits.numpy(), np.float32)


def _next_logits(model: OnnxModel, rows: Sequence[Tokens]) -> Array:
    logits_btv = _decoded(model, MODEL_FILE, _feeds(rows, 0), len(rows))
    return logits_btv[np.arange(len(rows)), [len(row.ids) - 1 for row in rows]]


def _answer_likelihoods(model: OnnxModel, rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
    start = model.rules.decoder_start_token_id
    if start is None:
        raise DamagedError(str(model.folder), "no decoder_start_token_id", expected="one in generation_config.json")
    fixed = model.encode(*padded([row.ids for row in rows], model.config.get("pad_token_id") or 0))
    found = []
    for answer in answers:
        given = [Tokens((start, *answer[:-1]))] * len(rows)
        logits_btv = _decoded(model, DECODER_FILE, {**_feeds(given, 0), **fixed}, len(rows))
        found.append(log_likelihood(logits_btv, answer))
    return np.stack(found, axis=1)


def _written(model: OnnxModel, prompt: str, tokens: int) -> tuple[str, str]:
    answer = model.answer(prompt, GenerateSpec(max_new_tokens=tokens), lambda _: None)
    return answer.text, answer.stopped
