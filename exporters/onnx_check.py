"""Does an ONNX folder compute what its model does? onnxruntime against torch, at shapes that were not traced.

A decoder's cached steps are held against a forward of the whole sequence, so that the cache is checked and not
compared with itself. Numbers at padded places mean nothing and are not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from surgery.checkpoint import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from surgery.errors import CheckError, shorten

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}  # of the range of the model's outputs
STEPS = 4  # tokens one by one after a prefill
SHAPES = ((1, 1, "none"), (1, 2, "none"), (3, 33, "left"), (3, 33, "right"))  # batch, tokens, side of the padding
WINDOW_LIMIT = 1024  # sliding windows above it are not passed: the sequence would be too long for a check


@dataclass(frozen=True)
class Case:
    """A case, and the largest difference that it showed, as a part of the range of the model's outputs."""

    name: str
    difference: float


class _Session:
    """An ONNX file in onnxruntime, on the CPU, called with tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        with self._running():
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        feed = {name: tensor.numpy() for name, tensor in given.items() if name in self.inputs}
        with self._running():
            found = self.session.run(None, feed)
        return {n: torch.from_numpy(v) for n, v in zip(self.outputs, found, strict=True)}

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """onnxruntime's errors, which have no class in common, as ours."""
        try:
            yield
        except Exception as error:
            why = shorten(str(error), 200)
            raise CheckError(
                self.path.name, f"onnxruntime cannot run it ({why})", expected="a graph that runs"
            ) from error

    def empty_cache(self, batch: int, middle: str = "") -> dict[str, Tensor]:
        """A cache without tokens."""
        kinds = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        return {
            name: torch.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=kinds[value.type])
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.") and middle in name
        }


def run_cases(folder: Path, model: Any, dtype: torch.dtype, files: Mapping[str, str]) -> list[Case]:
    """Run the folder's graphs and the model, which computes in `dtype`. Raises: CheckError.

    files: what to run in place of each graph's own file.
    """
    sessions = {name: _Session(folder / file) for name, file in files.items()}
    with torch.no_grad():
        if ENCODER_FILE in sessions:
            cases = _pair(sessions[ENCODER_FILE], sessions[DECODER_FILE], model)
        elif "position_ids" in sessions[MODEL_FILE].inputs:
            cases = _decoder(sessions[MODEL_FILE], model)
        else:
            cases = _plain(sessions[MODEL_FILE], model)
        found = [Case(name, _difference(*both)) for name, both in cases]
    for entry in found:
        if not entry.difference <= TOLERANCES[dtype]:  # a NaN is not
            raise CheckError(
                " and ".join(files),
                f"onnxruntime differs from torch by {entry.difference:.3g} of the outputs' range ({entry.name})",
                expected=f"at most {TOLERANCES[dtype]:g}",
                fix="Please report this with `surgery doctor --json`",
            )
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the range of `theirs`. One number has no range: its size counts, 1 at least."""
    if theirs.numel() == 1:
        span = max(abs(float(theirs)), 1.0)
    else:
        span = float((theirs.double().max() - theirs.double().min()).clamp_(min=1e-6))
    return float((ours.double() - theirs.double()).abs().max()) / span


_Cases = Iterator[tuple[str, tuple[Tensor, Tensor]]]


def _tokens(model: Any, batch: int, count: int, padding: str) -> tuple[Tensor, Tensor]:
    """Token numbers, without special ones, and their mask (batch, count). Padding grows with the row."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(batch * 1000 + count)
    ids = torch.randint(min(10, config.vocab_size - 1), config.vocab_size, (batch, count), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padding != "none" else 0):
        padded = row * count // 5
        mask[row, :padded] = 0
        if padding == "right":
            mask[row] = mask[row].flip(0)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids[mask == 0] = pad
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Each token's position: of those that are no padding, from 0."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def _plain(session: _Session, model: Any) -> _Cases:
    if "pixel_values" in session.inputs:
        for batch in (1, 3):
            shape = (batch, *session.inputs["pixel_values"].shape[1:])
            pixels = torch.randn(shape, generator=torch.Generator().manual_seed(batch)).to(model.dtype)
            (found,) = session(pixel_values=pixels).values()
            yield f"batch {batch}", (found, model(pixel_values=pixels)[0])
        return
    for batch, count, padding in SHAPES:
        ids, mask = _tokens(model, batch, count, padding)
        if model.config.is_encoder_decoder and model.config.eos_token_id is not None:  # where its classifier looks
            ids[torch.arange(batch), positions(mask).argmax(-1)] = model.config.eos_token_id
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 2) * mask}
        given = {name: tensor for name, tensor in given.items() if name in session.inputs}
        (found,) = session(**given).values()
        expected = model(**given)[0]
        kept = mask == 1 if expected.shape[:2] == mask.shape else slice(None)
        yield _say(batch, count, padding), (found[kept], expected[kept])


def _say(batch: int, count: int, padding: str) -> str:
    said = "" if padding == "none" else f", padding on the {padding}"
    return f"batch {batch}, {count} {'token' if count == 1 else 'tokens'}{said}"


def _window(config: Any) -> int:
    """How many tokens a decoder's sliding window spans; 0 without one (Qwen's configurations unset one not in use)."""
    return getattr(config, "sliding_window", None) or 0


def unpassed_window(config: Any) -> int:
    """The size of a sliding window that is too wide for the cases to go past it; 0 without one."""
    window = _window(config.get_text_config())
    return window if window > WINDOW_LIMIT else 0


def _decoder(session: _Session, model: Any) -> _Cases:
    config = model.config.get_text_config()
    window = _window(config)
    shapes = [*SHAPES, *([(2, window + 3, "left")] if 0 < window <= WINDOW_LIMIT else [])]
    for batch, count, padding in shapes:
        ids, mask = _tokens(model, batch, count + STEPS, padding)
        mask[:, count:] = 1
        whole = _whole(model, ids, mask)
        cache = session.empty_cache(batch)
        steps = range(count, count + STEPS + 1) if padding != "right" else [count]
        begin = 0
        for end in steps:
            seen = mask[:, :end]
            out = session(
                input_ids=ids[:, begin:end], attention_mask=seen, position_ids=positions(seen)[:, begin:], **cache
            )
            kept = mask[:, begin:end] == 1
            expected = whole if padding != "right" else _whole(model, ids[:, :end], seen)
            said = f"{_say(batch, count, padding)}" + (f", step {end - count}" if end > count else ", prefill")
            yield said, (out["logits"][kept], expected[:, begin:end][kept])
            cache = _as_past(out)
            begin = end


def _as_past(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A step's cache under the names that the next step takes it by."""
    return {name.replace("present", "past_key_values"): x for name, x in out.items() if name.startswith("present")}


def _whole(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of whole sequences, without a cache."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    return logits


def _pair(encoder: _Session, decoder: _Session, model: Any) -> _Cases:
    for batch, count, padding in SHAPES:
        ids, mask = _tokens(model, batch, count, padding)
        written, _ = _tokens(model, batch, 2 + STEPS, "none")
        written[:, 0] = model.config.decoder_start_token_id
        whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written, use_cache=False).logits
        encoded = encoder(input_ids=ids, attention_mask=mask)
        fixed = _as_past(encoded)
        fixed |= {f"encoder_{name}": tensor for name, tensor in encoded.items() if name == "side_states"}
        cache, begin = decoder.empty_cache(batch, ".decoder."), 0
        for end in range(1, 3 + STEPS):
            out = decoder(input_ids=written[:, begin:end], encoder_attention_mask=mask, **fixed, **cache)
            yield f"{_say(batch, count, padding)}, {end} written", (out["logits"], whole[:, begin:end])
            cache = _as_past(out)
            begin = end
