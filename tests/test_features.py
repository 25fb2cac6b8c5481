"""The feature cache: training from kept states is the training it was, and a cache is never of something else."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn

import surgery
from surgery import PacaSpec, ReadSpec, features
from surgery.adapter import open_adapter
from surgery.data import inspect_labels, prepare
from surgery.errors import (
    BaseMismatchError,
    DamagedError,
    InterruptedRunError,
    RecipeError,
    RequestError,
    ResourceError,
    SurgeryError,
)
from surgery.features import FeatureCache, open_cache
from surgery.operate import state_of
from surgery.recipe import DataSection
from surgery.runs import CHECKPOINTS
from surgery.survey import TASKS, TaskSpec
from surgery.train import TrainResult, train
from surgery.writing import replace_file
from tests.conftest import TinyModel, digest_folder
from tests.examples import CASES, LABELLED, Case, fast
from tests.interrupting import Killed, same_adapter, stop_at
from tests.reading import SPEC, attached, losses_of
from tests.tiny import PAD, sample_inputs

DROPOUT: Mapping[str, object] = {"hidden_dropout_prob": 0.2}
_BY_NAME = {case.name: case for case in CASES}
TEXT = _BY_NAME["llama-causal-lm-text.txt"]
LABELS = _BY_NAME["bert-sequence-classification-labelled.tsv"]
T5 = _BY_NAME["t5-seq2seq-pairs.jsonl"]
BART = _BY_NAME["bart-seq2seq-prompts.tsv"]


@dataclass(frozen=True)
class Variant:
    """A model, what it learns, and how it is read. `padded`: a row's states round otherwise beside longer rows."""

    name: str
    case: Case
    spec: ReadSpec = SPEC
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, object] = field(default_factory=dict)


VARIANTS = (
    Variant("packed", TEXT),
    Variant("packed-bf16", TEXT, dtype=torch.bfloat16),
    Variant("recomputed", TEXT, settings={"gradient_checkpointing": True}),
    Variant("accumulated", TEXT, settings={"gradient_accumulation": 2, "batch_size": 3}),
    Variant("padded", _BY_NAME["gpt2-causal-lm-prompts.csv"], replace(SPEC, layers="last:1")),
    Variant("padded-local", replace(_BY_NAME["qwen3-causal-lm-text.parquet"], family="gemma2")),
    Variant("pooled", LABELS, replace(SPEC, pooling="mean", initial="embedding"), overrides=DROPOUT),
    Variant("first-layer", LABELS, replace(SPEC, layers="0")),
    Variant("last-token", _BY_NAME["llama-sequence-classification-labelled.jsonl"]),
    Variant("tagged", _BY_NAME["bert-token-classification-tagged.jsonl"]),
    Variant("scored", _BY_NAME["bert-regression-scored.csv"]),
    Variant("t5", T5, replace(SPEC, initial="embedding")),
    Variant("t5-encoder", T5, replace(SPEC, stacks="encoder", joiner="mean")),
    Variant("t5-decoder", T5, replace(SPEC, stacks="decoder")),
    Variant("bart", BART),
    Variant("bart-classifier", Case("bart", "sequence-classification", "labelled.jsonl", LABELLED)),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A variant with its base and data, to be trained any number of times below `root`."""

    variant: Variant
    base: Path
    data: DataSection
    root: Path

    @classmethod
    def make(cls, variant: Variant, tiny_model: TinyModel, root: Path) -> Bench:
        base = tiny_model(variant.case.family, dtype=variant.dtype, overrides=variant.overrides)
        data = variant.case.write(root).model_copy(update={"eval": []})
        return cls(variant, base, data, root)

    def fresh(self, name: str, spec: ReadSpec | PacaSpec | None = None) -> Path:
        """An adapter folder that has not been trained."""
        task = self.variant.case.spec()
        if TASKS[task.name].has_head and not task.labels:
            task = TaskSpec(task.name, inspect_labels(self.data.spec(), task.name))
        return surgery.apply(self.base, self.root / name, spec or self.variant.spec, task=task).folder

    def train(self, folder: Path, *, resume: str = "no", **settings: Any) -> TrainResult:
        """Two epochs and more, a line of the log each step."""
        usual = {"learning_rate": 2e-2, "max_steps": 7, "logging_steps": 1, "batch_size": 12, "save_steps": 50}
        section = fast(**{**usual, **self.variant.settings, **settings})
        return train(folder, self.data, section, task=self.variant.case.spec(), resume=resume)

    def losses(self, name: str, **settings: Any) -> list[float]:
        """Of a run from a fresh adapter."""
        folder = self.fresh(name)
        self.train(folder, **settings)
        return losses_of(folder)

    @property
    def cache(self) -> str:
        return str(self.root / "cache")


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Each run collects garbage: what is there before these tests need not be looked through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def text(tiny_model: TinyModel, tmp_path: Path) -> Bench:
    """A decoder on packed text, for what does not depend on the model."""
    return Bench.make(VARIANTS[0], tiny_model, tmp_path)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often modules of each class are called, in whatever model."""
    calls: Counter[str] = Counter()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _args: calls.update([type(module).__name__])
    )
    try:
        yield calls
    finally:
        handle.remove()


def inner_calls(calls: Mapping[str, int]) -> int:
    """Calls of what stands inside a layer."""
    return sum(number for name, number in calls.items() if "Attention" in name or "MLP" in name)


def inner_calls_of_a_plan(bench: Bench) -> int:
    """Those of `apply`, which looks for the stacks by running a model without weights."""
    with counting() as counted:
        bench.fresh("planned")
    return inner_calls(counted)


# --- the same training


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_cache_changes_no_loss(variant: Variant, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of any step: with a cache that fills up in the first epoch, and from a complete one.

    Nothing inside a layer is called for a batch whose rows are all kept.
    """
    bench = Bench.make(variant, tiny_model, tmp_path)
    losses, calls = {}, {}
    for name, given in (("plain", None), ("filling", bench.cache), ("complete", bench.cache)):
        with counting() as counted:
            losses[name] = bench.losses(name, cache_features=given)
        calls[name] = inner_calls(counted)
    assert len({round(loss, 4) for loss in losses["plain"]}) == 7
    tolerance = 1e-6 if variant.dtype == torch.float32 else 1e-3
    assert losses["filling"] == pytest.approx(losses["plain"], abs=tolerance)
    assert losses["complete"] == pytest.approx(losses["plain"], abs=tolerance)
    flags = Path(bench.cache, "done.bin").read_bytes()
    assert set(flags) == {1}
    once = inner_calls_of_a_plan(bench)
    calls = {name: number - once for name, number in calls.items()}
    batches = -(-len(flags) // variant.settings.get("batch_size", 12))
    if variant.spec.stacks != "decoder":  # its encoder is not read, and runs each time
        forward = calls["complete"]  # how layers return is found out by one run without weights, and by no other
        assert 0 < forward * 7 <= calls["plain"]
        assert calls["filling"] == forward * (batches + 1) < calls["plain"]


def test_the_states_are_the_backbone_s(text: Bench) -> None:
    """What is kept of each row: the output of each layer that is read, then the final norm's, bit by bit in order."""
    text.train(text.fresh("adapter"), cache_features=text.cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(text.base).eval()
    record = json.loads(Path(text.cache, "features.json").read_text())
    rows, tokens, width = len(Path(text.cache, "done.bin").read_bytes()), 64, 32
    assert record["bytes"] == Path(text.cache, "states.bin").stat().st_size == rows * tokens * 3 * width * 4
    kept = np.fromfile(Path(text.cache, "states.bin"), np.float32).reshape(rows, 3, tokens, width)
    seen: list[Tensor] = []
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_hook(lambda _m, _a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(text.base)
    prepared = prepare(text.data.spec(), task="causal-lm", tokenizer=tokenizer)
    with torch.no_grad():
        model(input_ids=torch.tensor(prepared.train["input_ids"]))
    assert np.abs(torch.stack(seen, 1).numpy() - kept).max() < 1e-5


def test_another_side_network_takes_the_same_states(text: Bench) -> None:
    """Width, seed, cell and what follows the recurrence are no part of what a cache is of."""
    text.train(text.fresh("adapter"), cache_features=text.cache)
    before = digest_folder(Path(text.cache))
    for number, spec in enumerate((ReadSpec(hidden=5, seed=3), ReadSpec(cell="lstm", hidden=4, reduce="mean"))):
        folder = text.fresh(f"other-{number}", spec)
        with counting() as calls:
            text.train(folder, cache_features=text.cache, seed=number + 1, batch_size=5)
        assert inner_calls(calls) <= 4
    assert digest_folder(Path(text.cache)) == before


def left(bench: Bench) -> Bench:
    """The same with a tokenizer that pads on the left."""
    base = shutil.copytree(bench.base, bench.root / "left")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    return replace(bench, base=base)


CHAT = Variant("chat", _BY_NAME["llama-causal-lm-chat.jsonl"], settings={"batch_size": 8})


def test_padding_on_the_left_changes_no_loss_either(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Where states are a row's own: in each epoch a row stands beside others, and is padded by other counts."""
    bench = left(Bench.make(CHAT, tiny_model, tmp_path))
    plain = bench.losses("plain", max_steps=11)
    assert bench.losses("filling", max_steps=11, cache_features=bench.cache) == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize(
    "variant", (VARIANTS[4], Variant("bert", LABELS), Variant("t5", T5)), ids=lambda variant: variant.name
)
def test_padding_on_the_left_is_refused_before_training(
    variant: Variant, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Where it moves a row: what the tokenizer does decides, and without a cache it trains."""
    bench = left(Bench.make(variant, tiny_model, tmp_path))
    folder = bench.fresh("adapter")
    refused(bench, folder, RecipeError, r"--cache-features: rows are padded on the left, which changes their states")
    assert not Path(bench.cache).exists()
    bench.train(folder, max_steps=1)


# --- interrupted


@pytest.mark.parametrize(("step", "how"), ((3, "SIGTERM"), (3, "kill"), (7, "SIGTERM")))
def test_a_resumed_run_equals_an_uninterrupted_one(
    step: int, how: str, text: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the states that the interrupted run had kept."""
    whole, folder = text.fresh("whole"), text.fresh("parts")
    text.train(whole, cache_features=str(text.root / "other"), batch_size=4, max_steps=9, save_steps=2)
    with monkeypatch.context() as patch:
        stop_at(patch, step, how=how)
        with pytest.raises((InterruptedRunError, Killed)):
            text.train(folder, cache_features=text.cache, batch_size=4, max_steps=9, save_steps=2)
    kept = sum(Path(text.cache, "done.bin").read_bytes())
    assert kept == min(step * 4, len(Path(text.cache, "done.bin").read_bytes()))
    text.train(folder, resume="auto", cache_features=text.cache, batch_size=4, max_steps=9, save_steps=2)
    assert same_adapter(folder, whole)


def test_a_run_may_take_up_a_cache_on_its_way(text: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where states come from changes no result: a run that began without a cache goes on with one."""
    folder = text.fresh("adapter")
    with monkeypatch.context() as patch:
        stop_at(patch, 4, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            text.train(folder, save_steps=2)
    text.train(folder, resume="auto", cache_features=text.cache, save_steps=2)
    assert losses_of(folder) == pytest.approx(text.losses("plain"), abs=1e-6)


def test_rows_that_are_not_flagged_are_computed_again(text: Bench) -> None:
    """A kill between states and flags: what lies there is not believed. What is flagged, is."""
    plain = text.losses("plain")
    text.losses("filling", cache_features=text.cache)
    states, done = Path(text.cache, "states.bin"), Path(text.cache, "done.bin")
    right, flags = states.read_bytes(), done.read_bytes()
    half, size = len(flags) // 2, len(right) // len(flags)
    states.write_bytes(right[: half * size] + bytes((len(flags) - half) * size))
    done.write_bytes(flags[:half] + bytes(len(flags) - half))
    assert text.losses("again", cache_features=text.cache) == pytest.approx(plain, abs=1e-6)
    assert np.abs(np.fromfile(states, np.float32) - np.frombuffer(right, np.float32)).max() < 1e-5
    assert done.read_bytes() == flags
    states.write_bytes(bytes(len(right)))
    assert text.losses("believed", cache_features=text.cache) != pytest.approx(plain, abs=1e-3)


# --- one forward


def rows_of(lengths: tuple[int, ...], **columns: list[list[int]]) -> Dataset:
    """Rows of those many tokens, with what other columns they have."""
    ids = sample_inputs("llama", batch=len(lengths), tokens=max(lengths))["input_ids"]
    rows = [ids[number, :length].tolist() for number, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, **columns})


def batch_of(rows: Dataset, chosen: list[int], *, side: str, extra: int = 0) -> dict[str, Tensor]:
    """Rows padded to one length, on a side."""
    width = max(len(rows["input_ids"][n]) for n in chosen) + extra
    ids = torch.full((len(chosen), width), PAD)
    for line, number in enumerate(chosen):
        row = torch.tensor(rows["input_ids"][number])
        ids[line, slice(0, len(row)) if side == "right" else slice(width - len(row), None)] = row
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def opened(model: nn.Module, rows: Dataset, folder: Path, **options: Any) -> FeatureCache:
    """A cache of a model in memory."""
    given = {"limit": None, "precision": "fp32", **options}
    return open_cache(state_of(model).plan, rows, model, str(folder), **given)


def run_batch(
    cache: FeatureCache, model: Any, rows: Dataset, chosen: list[int], **batching: Any
) -> tuple[Tensor, Tensor]:
    """Logits at the places that hold tokens, and the gradient of the projection back."""
    inputs = batch_of(rows, chosen, **batching)
    model.zero_grad()
    with cache.batch(model, chosen, inputs["attention_mask"]):
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits.detach(), model.get_parameter("side_network.stacks.backbone.output.weight").grad.clone()


POSITIONS: Mapping[str, Mapping[str, object]] = {"bert": {"max_position_embeddings": 128}}
PLACED = ("llama", "gemma2", "opt", "roberta")  # by differences, or by places that the mask or the ids give


@pytest.mark.parametrize(
    ("family", "side"), (*((family, "left") for family in PLACED), ("llama", "right"), ("bert", "right"))
)
def test_states_go_to_the_places_of_their_tokens(family: str, side: str, tmp_path: Path) -> None:
    """However long the other rows of a batch are, and also beside others than those they were kept beside."""
    model, rows = attached(family, overrides=POSITIONS.get(family)), rows_of((9, 4, 6, 1))
    pad = PAD if side == "left" else None
    with (
        opened(model, rows, tmp_path / "cache", left_pad=pad) as cache,
        opened(model, rows, tmp_path / "unused", left_pad=pad) as unused,
    ):
        run_batch(cache, model, rows, [0, 1], side=side)
        run_batch(cache, model, rows, [3, 2], side=side)
        assert cache.is_complete
        for chosen in ([1, 0], [1, 2], [3, 0], [3, 2]):
            expected = run_batch(unused, model, rows, chosen, side=side)
            with counting() as calls:
                found = run_batch(cache, model, rows, chosen, side=side)
            assert inner_calls(calls) <= 4
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", ("bert", "gpt2", "distilbert", "t5", "bart"))
def test_padding_that_moves_a_row_is_refused(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In a model that counts places from the first token, padding or not; and in a decoder that has no mask."""
    model, rows = attached(family, dtype=dtype, overrides=POSITIONS.get(family)), rows_of((9, 4))
    before = patched(model)
    with pytest.raises(RecipeError, match=r"padded on the left, which changes .*Set padding_side to right") as caught:
        opened(model, rows, tmp_path / "cache", left_pad=PAD)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "cache").exists()
    assert patched(model) == before
    opened(model, rows, tmp_path / "cache").__exit__()
    opened(model, rows_of((9, 9)), tmp_path / "equal", left_pad=PAD).__exit__()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", PLACED)
def test_rounding_is_no_reason_to_refuse(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where a row is padded, rotations round otherwise."""
    model = attached(family, dtype=dtype, overrides=POSITIONS.get(family))
    opened(model, rows_of((9, 4)), tmp_path / "cache", left_pad=PAD).__exit__()


def test_padding_beyond_the_longest_row_is_allowed(tmp_path: Path) -> None:
    """As with shapes that are multiples of something: the mask says how long rows are."""
    model, rows = attached("llama"), rows_of((5, 3))
    with opened(model, rows, tmp_path / "cache") as cache:
        expected = run_batch(cache, model, rows, [0, 1], side="right", extra=3)
        found = run_batch(cache, model, rows, [1, 0], side="right", extra=2)
        again = run_batch(cache, model, rows, [0, 1], side="right", extra=3)
    assert torch.allclose(expected[0], again[0], atol=1e-5)
    assert found[0].shape == expected[0].shape


def test_a_batch_with_one_new_row_runs_whole(tmp_path: Path) -> None:
    """Some rows kept and some not: the backbone runs, and then all are kept."""
    model, rows = attached("llama"), rows_of((5, 3, 4))
    with opened(model, rows, tmp_path / "cache") as cache, opened(model, rows, tmp_path / "unused") as unused:
        expected = run_batch(unused, model, rows, [1, 2], side="right")
        run_batch(cache, model, rows, [0, 1], side="right")
        for is_kept in (False, True):
            assert cache.is_complete == is_kept
            found = run_batch(cache, model, rows, [1, 2], side="right")
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)


def patched(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """What a cache changes for the time of a batch: forwards, and the number of hooks."""
    return {name: (m.__dict__.get("forward"), len(m._forward_hooks)) for name, m in model.named_modules()}


def fail_inside(cache: FeatureCache, model: nn.Module) -> None:
    """A batch that ends in an error."""
    before = patched(model)
    with cache.batch(model, [0, 1], None):
        assert patched(model) != before
        raise Killed


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """After a batch, kept or read, and after one that failed; a failed one keeps no row."""
    model, rows = attached("llama"), rows_of((5, 3))
    before = patched(model)
    with opened(model, rows, tmp_path / "cache") as cache:
        for is_kept in (False, True):
            with pytest.raises(Killed):
                fail_inside(cache, model)
            assert patched(model) == before
            assert cache.is_complete == is_kept
            run_batch(cache, model, rows, [0, 1], side="right")
            assert patched(model) == before


def test_flags_follow_the_states_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the states are forced to disk, then rows are said to be there, a few thousand together."""
    model, rows = attached("llama"), rows_of((5, 3, 4, 6))
    events: list[str] = []
    done = tmp_path / "cache" / "done.bin"

    def watched(path: Path, data: bytes) -> None:
        events.append("flags")
        replace_file(path, data)

    monkeypatch.setattr(features, "replace_file", watched)
    monkeypatch.setattr(np.memmap, "flush", lambda _self: events.append("states"))
    with opened(model, rows, tmp_path / "cache") as cache:
        run_batch(cache, model, rows, [0], side="right")
        assert (events, done.read_bytes()) == ([], bytes(4))
        monkeypatch.setattr(features, "_FLUSH_ROWS", 2)
        run_batch(cache, model, rows, [2], side="right")
        assert (events, done.read_bytes()) == (["states", "flags"], bytes([1, 0, 1, 0]))
        monkeypatch.setattr(features, "_FLUSH_ROWS", 99)
        run_batch(cache, model, rows, [1], side="right")
        assert done.read_bytes() == bytes([1, 0, 1, 0])
        run_batch(cache, model, rows, [3], side="right")
        assert done.read_bytes() == bytes([1, 1, 1, 1]), "a complete cache says so at once"
        run_batch(cache, model, rows, [3, 1], side="right")
    assert events == ["states", "flags"] * 2


def test_an_error_keeps_the_rows_before_it(tmp_path: Path) -> None:
    """Whatever ends the run, what was computed is flagged on the way out."""
    model, rows = attached("llama"), rows_of((5, 3))
    with contextlib.suppress(Killed), opened(model, rows, tmp_path / "cache") as cache:
        run_batch(cache, model, rows, [1], side="right")
        raise Killed
    assert (tmp_path / "cache" / "done.bin").read_bytes() == bytes([0, 1])


# --- caches of something else, and requests that are wrong


@pytest.fixture
def filled(text: Bench) -> Bench:
    """A cache that is complete."""
    text.train(text.fresh("first"), cache_features=text.cache)
    return text


def refused(bench: Bench, folder: Path, kind: type[SurgeryError], match: str, **settings: Any) -> SurgeryError:
    """A training run that is refused: adapter and cache keep every byte."""
    before, cached = digest_folder(folder), Path(bench.cache).exists() and digest_folder(Path(bench.cache))
    with pytest.raises(kind, match=match) as caught:
        bench.train(folder, **{"cache_features": bench.cache, **settings})
    assert digest_folder(folder) == before
    assert (Path(bench.cache).exists() and digest_folder(Path(bench.cache))) == cached
    return caught.value


def test_a_cache_of_another_model_is_refused(filled: Bench, tiny_model: TinyModel) -> None:
    """One of other weights, by their digest."""
    other = replace(filled, base=tiny_model("llama", seed=1))
    error = refused(
        other,
        other.fresh("other"),
        BaseMismatchError,
        r"cache: the states there were kept of another model, expected",
    )
    assert error.exit_code == 4
    assert "Name another folder with --cache-features" in str(error)


def test_a_cache_of_other_data_is_refused(filled: Bench) -> None:
    """Of the same number of rows as well: one other token is enough."""
    path = Path(filled.data.train[0])
    path.write_text(path.read_text().replace("the hen jumps", "the pen jumps", 1))
    folder = filled.fresh("other")
    refused(filled, folder, BaseMismatchError, r"kept of other data, expected a cache of this model")


def test_a_cache_of_other_targets_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A decoder's states depend on what it is to write."""
    bench = Bench.make(Variant("t5", T5), tiny_model, tmp_path)
    bench.train(bench.fresh("first"), cache_features=bench.cache)
    path = Path(bench.data.train[0])
    path.write_text(path.read_text().replace("the answer is 3", "the answer is 4", 1))
    refused(bench, bench.fresh("second"), BaseMismatchError, r"kept of other data")


@pytest.mark.parametrize(("entry", "value"), (("hidden_act", "relu"), ("rms_norm_eps", 1e-3)))
def test_a_cache_of_a_model_configured_otherwise_is_refused(entry: str, value: object, filled: Bench) -> None:
    """The same weights compute other states under another config.json; where it lies, and who wrote it, is no part."""
    for name, changes in (("same", {"transformers_version": "4.0.0"}), ("other", {entry: value})):
        other = replace(filled, base=shutil.copytree(filled.base, filled.root / name))
        path = other.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        folder = other.fresh(f"{name}-adapter")
        if name == "same":
            other.train(folder, cache_features=filled.cache)
        else:
            refused(other, folder, BaseMismatchError, r"kept of a model configured otherwise, expected")


def test_a_cache_of_other_segments_is_refused(tmp_path: Path) -> None:
    """Whatever the model is given beside the tokens decides their states."""
    model = attached("bert")
    for segments, is_same in (([[0, 0, 0], [0, 0]], True), ([[0, 0, 0], [0, 0]], True), ([[0, 0, 1], [0, 0]], False)):
        with contextlib.nullcontext() if is_same else pytest.raises(BaseMismatchError, match="kept of other data"):
            opened(model, rows_of((3, 2), token_type_ids=segments), tmp_path / "cache").__exit__()


def test_a_cache_of_other_layers_is_refused(filled: Bench) -> None:
    """Or read in another way, or computed in another precision."""
    folder = filled.fresh("other", replace(SPEC, layers="last:1"))
    refused(filled, folder, BaseMismatchError, r"kept with other settings, expected")
    folder = filled.fresh("autocast")
    refused(filled, folder, BaseMismatchError, r"kept with other settings, expected", precision="bf16")


@pytest.mark.parametrize("limit", ("1KB", "1kib", "900"))
def test_a_cache_that_is_too_large_is_refused(limit: str, text: Bench) -> None:
    """Before anything is written or trained, with what it would take and what to do."""
    error = refused(text, text.fresh("adapter"), ResourceError, r"--cache-bytes: the states of [\d,]+ tokens take ",
                    cache_bytes=limit)  # fmt: skip
    assert error.exit_code == 4
    fix = "Raise --cache-bytes, read fewer layers (surgery apply --layers), or train without --cache-features"
    assert fix in str(error)
    assert not Path(text.cache).exists()


def test_a_limit_is_met_exactly(tmp_path: Path) -> None:
    """As many bytes as the states take are enough; one less is not. A cache that is there counts as well."""
    model, rows = attached("llama"), rows_of((5, 3))
    size = 8 * 3 * 32 * 4
    with pytest.raises(ResourceError, match="8 tokens"):
        opened(model, rows, tmp_path / "cache", limit=str(size - 1))
    assert not (tmp_path / "cache").exists()
    opened(model, rows, tmp_path / "cache", limit=str(size)).__exit__()
    assert (tmp_path / "cache" / "states.bin").stat().st_size == size
    with pytest.raises(ResourceError):
        opened(model, rows, tmp_path / "cache", limit=str(size - 1))


def test_a_disk_that_is_too_small_is_refused(text: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with the disk's own limit; states that are there need no room."""
    folder = text.fresh("adapter")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
        refused(text, folder, ResourceError, r"1,000 bytes free on its disk.*another folder with --cache-features\.")
    assert not Path(text.cache).exists()
    model, rows = attached("llama"), rows_of((5, 3))
    opened(model, rows, text.root / "small").__exit__()
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=0))
    opened(model, rows, text.root / "small").__exit__()


@pytest.mark.parametrize(
    ("name", "found"),
    (("", "an empty name"), ("text.txt", "text.txt: File exists"), ("text.txt/x", "x: Not a directory"),
     ("x" * 300, "x: File name too long")),
)  # fmt: skip
def test_a_name_that_can_be_no_folder_is_refused(name: str, found: str, text: Bench) -> None:
    """None given, a file, something in a file, what the file system does not take."""
    given = str(text.root / name) if name else ""
    error = refused(text, text.fresh("adapter"), RequestError, rf"--cache-features: .*{found}", cache_features=given)
    assert error.exit_code == 2


def test_a_limit_alone_is_refused(text: Bench) -> None:
    """It would be ignored."""
    error = refused(text, text.fresh("adapter"), RecipeError, r"--cache-bytes: given without --cache-features",
                    cache_features=None, cache_bytes="1GB")  # fmt: skip
    assert error.exit_code == 2


def test_a_backbone_that_changes_has_no_cache(text: Bench) -> None:
    """PaCA trains the layers themselves."""
    folder = text.fresh("paca", PacaSpec(rank=2))
    refused(text, folder, RecipeError, r"--cache-features: with method paca, whose backbone changes, expected method r")
    assert not Path(text.cache).exists()


@pytest.mark.parametrize("limit", ("much", "-1", "0", "1.5.2GB"))
def test_a_size_that_is_none_is_refused(limit: str, text: Bench) -> None:
    """With an example of one."""
    refused(
        text,
        text.fresh("adapter"),
        RecipeError,
        r"--cache-bytes: '[^']+', expected a size such as 20GB\.$",
        cache_bytes=limit,
    )
    assert not Path(text.cache).exists()


# --- damage


def _cut_states(cache: Path) -> None:
    data = (cache / "states.bin").read_bytes()
    (cache / "states.bin").write_bytes(data[:-4])


def _longer_flags(cache: Path) -> None:
    (cache / "done.bin").write_bytes((cache / "done.bin").read_bytes() + b"\1")


def _shorter_flags(cache: Path) -> None:
    (cache / "done.bin").write_bytes((cache / "done.bin").read_bytes()[:-1])


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "cut states": _cut_states,
    "longer flags": _longer_flags,
    "shorter flags": _shorter_flags,
    "no states": lambda cache: (cache / "states.bin").unlink(),
    "no flags": lambda cache: (cache / "done.bin").unlink(),
    "no JSON": lambda cache: (cache / "features.json").write_text("{"),
    "a list": lambda cache: (cache / "features.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused(damage: str, filled: Bench) -> None:
    """Nothing is trained on it, and the error names the file."""
    DAMAGE[damage](Path(filled.cache))
    error = refused(filled, filled.fresh("other"), DamagedError, r"cache/(states\.bin|done\.bin|features\.json): ")
    assert error.exit_code == 4


def test_a_cache_that_was_never_begun_is_begun(text: Bench) -> None:
    """A kill before the record was written leaves an empty one: the states beside it are nobody's."""
    Path(text.cache).mkdir()
    Path(text.cache, "features.json").touch()
    Path(text.cache, "states.bin").write_bytes(b"\1" * 999)
    Path(text.cache, "done.bin").write_bytes(b"\1" * 5)
    assert text.losses("adapter", cache_features=text.cache) == pytest.approx(text.losses("plain"), abs=1e-6)


# --- one writer

HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)
TRY = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_cache_has_one_writer(filled: Bench) -> None:
    """While another process holds it, a run is refused; then it goes on."""
    folder, record = filled.fresh("adapter"), str(Path(filled.cache, "features.json"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, record], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        error = refused(filled, folder, RequestError, r"another run is writing it, expected a cache of its own")
        assert error.exit_code == 2
        holder.communicate(b"\n")
    filled.train(folder, cache_features=filled.cache)


def test_an_open_cache_is_locked_until_it_is_left(tmp_path: Path) -> None:
    """For other processes and for this one; leaving it, and failing to open it, gives it back."""
    model, rows = attached("llama"), rows_of((5, 3))
    record = str(tmp_path / "cache" / "features.json")
    with opened(model, rows, tmp_path / "cache"):
        assert subprocess.run([sys.executable, "-c", TRY, record], check=False, capture_output=True).returncode
        with pytest.raises(RequestError, match="another run"):
            opened(model, rows, tmp_path / "cache")
    with pytest.raises(BaseMismatchError) as caught:
        opened(model, rows, tmp_path / "cache", precision="other")
    assert caught.value.__traceback__
    subprocess.run([sys.executable, "-c", TRY, record], check=True)
    opened(model, rows, tmp_path / "cache").__exit__()


def test_a_complete_cache_is_shared(tmp_path: Path) -> None:
    """From the moment when its last row is kept: any number of runs read it together, and none writes alone."""
    model, rows = attached("llama"), rows_of((5, 3))
    record = str(tmp_path / "cache" / "features.json")
    with opened(model, rows, tmp_path / "cache") as first:
        expected = run_batch(first, model, rows, [0, 1], side="right")
        with opened(model, rows, tmp_path / "cache") as second, opened(model, rows, tmp_path / "cache") as third:
            for cache in (second, third, first):
                assert torch.equal(run_batch(cache, model, rows, [0, 1], side="right")[0], expected[0])
            assert subprocess.run([sys.executable, "-c", TRY, record], check=False, capture_output=True).returncode
    subprocess.run([sys.executable, "-c", TRY, record], check=True)


# --- the run around it


def test_an_evaluation_runs_the_backbone(text: Bench) -> None:
    """A cache is of the training set alone: rows that are held out are computed each time, to the same figures."""
    held = replace(text, data=text.data.model_copy(update={"eval": text.data.train}))
    results = [held.train(held.fresh(name), cache_features=given) for name, given in
               (("plain", None), ("filling", text.cache), ("complete", text.cache))]  # fmt: skip
    for result in results[1:]:
        assert result.after["loss"] == pytest.approx(results[0].after["loss"], abs=1e-6)
        assert result.before == results[0].before


def test_a_cache_is_no_part_of_the_adapter(filled: Bench) -> None:
    """The trained folder is what it is without one."""
    folder = filled.root / "first"
    assert {path.name for path in (folder / CHECKPOINTS / "checkpoint-7").iterdir()} == {
        "state.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"
    }  # fmt: skip
    adapter = open_adapter(folder)
    assert adapter.record.manifest.training["settings"]["cache_features"] == filled.cache
    assert surgery.load(folder)(**sample_inputs("llama")).logits.isfinite().all()
    assert TaskSpec(adapter.plan.task) == filled.variant.case.spec()
