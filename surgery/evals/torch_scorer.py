"""Scores from a model in torch: a checkpoint, a merged folder, or an adapter on its base.

Shape letters: b rows, t tokens, k kept positions, n answers, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.errors import DamagedError, RequestError, UnsupportedError
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
from surgery.generate import GenerateSpec, TorchModel, max_positions, open_model

DEVICES = ("auto", "cpu", "cuda")
KEPT = "logits_to_keep"  # transformers' name for the positions of which a decoder gives logits


def open_torch(folder: Path, *, base: str | None, device: str) -> TorchModel:
    """A folder's model on a device. Raises: RequestError, UnsupportedError; see generate.open_model."""
    if device not in DEVICES:
        raise RequestError("--device", repr(device), expected=f"one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device", "cuda, which torch does not find here", expected="cpu, or a CUDA device")
    model = open_model(folder, base=base)
    wanted = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model.model.to(wanted)
    return model


def scorer_of(model: TorchModel) -> Scorer:
    """A model's functions."""
    score = {
        CLASSIFIER: lambda rows, _answers: _class_logits(model, rows),
        DECODER: lambda rows, answers: next_token_likelihoods(partial(_next_logits, model), rows, answers),
        ENCODER_DECODER: lambda rows, answers: _answer_likelihoods(model, rows, answers),
    }
    is_decoder = model.kind == DECODER
    known = (max_positions(model.config), None if is_decoder else model.tokenizer.model_max_length)
    limit = min((n for n in known if n is not None and n < 1 << 31), default=None)
    labels = model.model.config.id2label or {}
    return Scorer(
        kind=model.kind,
        runtime=model.runtime,
        classes=tuple(str(labels[number]) for number in sorted(labels)) if model.kind == CLASSIFIER else (),
        positions=limit,
        encode=lambda text, pair: _tokens(model, text, pair, None if is_decoder else limit),
        pieces=lambda text: list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        answer=lambda text: _answer(model, text),
        score=score[model.kind],
        write=lambda prompt, tokens: _written(model, prompt, tokens),
        pads=model.kind != CLASSIFIER or model.model.config.pad_token_id is not None,
        notes=model.notes,
    )


def _tokens(model: TorchModel, text: str, pair: str | None, limit: int | None) -> Tokens:
    found = model.tokenizer(text, pair, verbose=False)
    is_cut = limit is not None and len(found["input_ids"]) > limit
    if is_cut:
        found = model.tokenizer(text, pair, truncation=True, max_length=limit)
    return Tokens(tuple(found["input_ids"]), tuple(found.get("token_type_ids") or ()), is_cut)


def _answer(model: TorchModel, text: str) -> list[int]:
    if model.kind == ENCODER_DECODER:
        return list(model.tokenizer(text_target=text, verbose=False)["input_ids"])
    return list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _inputs(model: TorchModel, rows: Sequence[Tokens]) -> dict[str, Tensor]:
    ids_bt, mask_bt = padded([row.ids for row in rows], model.model.config.pad_token_id or 0)
    arrays = {"input_ids": ids_bt, "attention_mask": mask_bt}
    if any(row.types for row in rows):
        arrays["token_type_ids"] = padded([row.types for row in rows], 0)[0]
    return {name: torch.from_numpy(values).to(model.model.device) for name, values in arrays.items()}


def _numbers(values: Tensor) -> Array:
    return values.float().cpu().numpy()


@torch.inference_mode()
def _class_logits(model: TorchModel, rows: Sequence[Tokens]) -> Array:
    return _numbers(model.model(**_inputs(model, rows)).logits)


@torch.inference_mode()
def _next_logits(model: TorchModel, rows: Sequence[Tokens]) -> Array:
    """(b, v): only the last tokens' positions go through the head, where the model can be told so."""
    last_b = np.asarray([len(row.ids) - 1 for row in rows])
    kept_k, place_b = np.unique(last_b, return_inverse=True)
    inputs: dict[str, Any] = {**_inputs(model, rows), "use_cache": False}
    if KEPT in inspect.signature(model.model.forward).parameters:
        inputs[KEPT] = torch.from_numpy(kept_k).to(model.model.device)
    else:
        place_b = last_b
    logits = model.model(**inputs).logits
    return _numbers(logits[torch.arange(len(rows)), torch.from_numpy(place_b)])


@torch.inference_mode()
def _answer_likelihoods(model: TorchModel, rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
    """(b, n): the encoder runs once for all answers."""
    start = model.rules.decoder_start_token_id
    if start is None:
        raise DamagedError(str(model.folder), "no decoder_start_token_id", expected="one in generation_config.json")
    inputs = _inputs(model, rows)
    mask = inputs["attention_mask"]
    states = model.model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask, return_dict=True)
    found = []
    for answer in answers:
        given = torch.tensor([[start, *answer[:-1]]], device=mask.device).expand(len(rows), -1)
        output = model.model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=given, use_cache=False)
        found.append(log_likelihood(_numbers(output.logits), answer))
    return np.stack(found, axis=1)


def _written(model: TorchModel, prompt: str, tokens: int) -> tuple[str, str]:
    answer = model.answer(prompt, GenerateSpec(max_new_tokens=tokens), lambda _: None)
    return answer.text, answer.stopped
