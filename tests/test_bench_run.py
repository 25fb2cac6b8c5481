"""A whole bench: its folder, resuming, what does not fit into memory, what is learnt, and the command line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from click.testing import CliRunner, Result

from surgery.bench import measure, peak, scores
from surgery.bench import run as running
from surgery.bench.results import RESULTS_FILE, Results, Row, read_results
from surgery.bench.run import run
from surgery.bench.show import lines
from surgery.bench.spec import BenchSpec
from surgery.bench.subject import Contender, build, open_feed
from surgery.cli import cli
from surgery.errors import (
    DamagedError,
    NotAModelError,
    OutputExistsError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.recipe import DataSection
from tests.benches import CLASSES, labelled_data, little, subject_of, text_data
from tests.conftest import TinyModel

ALL = ("floor", "paca", "read", "lora", "full")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory without a process of its own."""

    def measure_peaks(_subject: Any, entries: Any, _batches: Any, _base: Any, rows: Any) -> None:
        for entry in entries:
            rows[entry.name].peak_bytes, rows[entry.name].inference_bytes = 2, 1

    monkeypatch.setattr(peak, "measure_peaks", measure_peaks)


def quiet(_text: str) -> None:
    """No progress."""


def go(spec: BenchSpec, out: Path, **more: Any) -> Results:
    """A bench without a word."""
    return run(spec, out, say=quiet, **more)


# --- what is in the folder


@pytest.mark.usefixtures("quick")
def test_a_bench_of_costs(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every method has seconds for every round, saved bytes, values and inference; the machine is described."""
    found = go(little(tiny_model("llama"), *ALL, fit_bytes=1 << 20), tmp_path / "out", command="surgery bench ..")
    assert [row.method for row in found.rows] == list(ALL)
    for row in found.rows:
        assert len(row.seconds) == len(row.inference_seconds) == 2
        assert row.saved_bytes
        assert (row.trained_values == 0) == (row.method == "floor")
        assert row.longest_by == "predicted"
        assert row.done == ["step", "peak", "longest", "inference"]
        assert row.merged == {"read": False, "floor": None}.get(row.method, True)
        assert "energy is not measured" in " ".join(row.notes) or found.energy_by
    assert found.tokens_per_step == 2 * 16
    assert (found.where.device, found.where.command, found.task) == ("cpu", "surgery bench ..", "causal-lm")
    assert {"python", "torch", "transformers", "checkpoint-surgery"} <= set(found.where.versions)
    assert read_results(tmp_path / "out") == found
    assert found.row("paca").size.model_dump() == {"name": "r", "value": 4}  # type: ignore[union-attr]


@pytest.mark.usefixtures("quick")
def test_results_have_a_schema(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What is written is valid by the schema that pydantic gives for it; what is not a result is not."""
    data = text_data(tmp_path)
    spec = little(tiny_model("llama"), "paca", "floor", data=data, learning_rates={"*": 1e-2}, steps=2, seeds=1)
    go(spec, tmp_path / "out")
    document = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    validator = jsonschema.Draft202012Validator(Results.model_json_schema())
    assert list(validator.iter_errors(document)) == []
    for change in ({"tokens_per_step": "many"}, {"rows": [{"seconds": []}]}, {"speed": 1}):
        assert list(validator.iter_errors({**document, **change}))


@pytest.mark.usefixtures("quick")
def test_the_table_fits_a_terminal(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every method is in each table, no line is longer than 110 characters, and a remark stands once."""
    data = text_data(tmp_path)
    methods = (*ALL, "lora:values=paca:r=4", "read:cell=lstm,hidden=8")
    spec = little(tiny_model("llama"), *methods, data=data, learning_rates={"*": 1e-2}, steps=2, seeds=2)
    found = go(spec, tmp_path / "out")
    shown = [line for line in lines(found) if not line.startswith((found.spec["model"], "note"))]
    assert max(map(len, shown)) <= 110
    for method in methods:
        assert sum(line.startswith(f"{method} ") for line in shown) == 3
    assert sum("energy is not measured" in line for line in lines(found)) <= 1
    (floor,) = [line for line in shown if line.startswith("floor ")][:1]
    assert floor.split()[5] == "1.000"


# --- resuming


def test_a_bench_is_resumed(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is not done again; the result is what an uninterrupted bench gives, but for the clock."""
    data = text_data(tmp_path)
    spec = little(tiny_model("llama"), "paca", "lora", data=data, learning_rates={"*": 1e-2}, steps=3, seeds=2)
    monkeypatch.setattr(peak, "measure_peaks", lambda *_: None)
    whole = go(spec, tmp_path / "whole")
    real: Callable[..., None] = scores.measure_seed
    calls: list[tuple[str, int]] = []

    def stop_at(number: int) -> Callable[..., None]:
        def measure_seed(subject: Any, entry: Any, feed: Any, base: Any, row: Any, seed: int) -> None:
            calls.append((entry.name, seed))
            if len(calls) == number:
                raise KeyboardInterrupt
            real(subject, entry, feed, base, row, seed)

        return measure_seed

    monkeypatch.setattr(scores, "measure_seed", stop_at(2))
    with pytest.raises(KeyboardInterrupt):
        go(spec, tmp_path / "out")
    timed = read_results(tmp_path / "out").rows[0].seconds
    calls.clear()
    monkeypatch.setattr(scores, "measure_seed", stop_at(0))
    found = go(spec, tmp_path / "out", resume=True)
    assert calls == [("lora", 0), ("paca", 1), ("lora", 1)]
    assert found.rows[0].seconds == timed
    for ours, theirs in zip(found.rows, whole.rows, strict=True):
        assert [(c.seed, c.losses, c.scores) for c in ours.curves] == [
            (c.seed, c.losses, c.scores) for c in theirs.curves
        ]
        assert ours.done == theirs.done
    calls.clear()
    assert go(spec, tmp_path / "out", resume=True) == found
    assert calls == []


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_resumed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Another bench, named by what differs; an empty folder; a broken file; one that is no bench's."""
    spec, out = little(tiny_model("llama"), "paca"), tmp_path / "out"
    go(spec, out)
    with pytest.raises(RequestError, match=r"a bench with other batch, rank, expected the same settings"):
        go(spec.model_copy(update={"rank": 8, "batch": 4}), out, resume=True)
    with pytest.raises(OutputExistsError, match=r"it exists, .*--resume auto"):
        go(spec, out)
    with pytest.raises(RequestError, match="--resume: given with --overwrite"):
        go(spec, out, resume=True, overwrite=True)
    whole = (out / RESULTS_FILE).read_text()
    (out / RESULTS_FILE).write_text(whole[: len(whole) // 2])
    with pytest.raises(SurgeryError) as raised:
        go(spec, out, resume=True)
    assert raised.value.exit_code in (2, 4)
    document = json.loads(whole)
    document["rows"][0]["saved_bytes"] = "few"
    (out / RESULTS_FILE).write_text(json.dumps(document))
    with pytest.raises(DamagedError, match=r"rows\.0\.saved_bytes: few"):
        go(spec, out, resume=True)
    assert go(spec, out, overwrite=True).rows[0].done
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAModelError, match=r"no bench\.json"):
        go(spec, tmp_path / "empty", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(OutputExistsError):
        go(spec, tmp_path / "other", overwrite=True)


@pytest.mark.usefixtures("quick")
def test_a_bench_that_goes_on_elsewhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What is measured on another machine or by other versions is said to be so; on another device it is refused."""
    spec, out = little(tiny_model("llama"), "floor", "paca"), tmp_path / "out"
    go(spec, out)
    document = json.loads((out / RESULTS_FILE).read_text())
    document["where"] |= {"threads": 99, "versions": {**document["where"]["versions"], "torch": "1.0"}}
    (out / RESULTS_FILE).write_text(json.dumps(document))
    said = r"resumed with threads \d+ \(before: 99\), torch \S+ \(before: 1\.0\)"
    assert not any("resumed" in note for note in go(spec, out, resume=True).remarks())  # nothing was left to do
    document["rows"][1]["done"].remove("inference")
    (out / RESULTS_FILE).write_text(json.dumps(document))
    notes = [note for note in go(spec, out, resume=True).remarks() if "resumed" in note]
    assert len(notes) == 1
    assert re.fullmatch(said, notes[0])
    document["where"]["device"] = "cuda"
    (out / RESULTS_FILE).write_text(json.dumps(document))
    with pytest.raises(RequestError, match="a bench on cuda, and this would go on on cpu, expected the same device"):
        go(spec, out, resume=True)


# --- memory that does not suffice


@pytest.mark.usefixtures("quick")
def test_a_method_that_does_not_fit_is_a_row(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That says so; the others are timed alone, and go on."""
    real = Contender.step

    def step(self: Contender, batch: Any) -> Any:
        if self.entry.name == "full":
            raise torch.cuda.OutOfMemoryError
        return real(self, batch)

    monkeypatch.setattr(Contender, "step", step)
    found = go(little(tiny_model("llama"), "floor", "paca", "full"), tmp_path / "out")
    notes = {row.method: (len(row.seconds), measure.NO_MEMORY in row.notes) for row in found.rows}
    assert notes == {"floor": (2, False), "paca": (2, False), "full": (0, True)}
    assert all("timed alone: the models do not fit into memory together" in row.notes for row in found.rows)


def test_models_that_do_not_fit_together_are_timed_alone(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that is reckoned before it is tried."""
    subject, entries = subject_of(tiny_model("llama"), "paca", "full")
    base = build(subject)
    size = sum(parameter.nbytes for parameter in base.parameters())
    for free, fits in ((100 * size, True), (5 * size, False)):
        monkeypatch.setattr(measure.psutil, "virtual_memory", lambda free=free: type("Free", (), {"available": free})())
        assert measure._fit_together(subject, entries, base) is fits


def test_a_killed_process_is_an_answer(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method that it was killed over has a note for what it did not say; another process asks for the rest."""
    subject, entries = subject_of(tiny_model("llama"), "paca", "full", "lora")
    answers = ["paca\tinference\t5\npaca\tstep\t7\nfull\tinference\t6\n", "lora\tinference\t1\nlora\tstep\t-4\n"]
    asked: list[list[str]] = []

    def child(_command: Any, *, input: str, **_more: Any) -> Any:
        asked.append([name for name, _ in json.loads(input)["methods"]])
        code = -9 if len(asked) == 1 else 0
        return subprocess.CompletedProcess([], code, stdout=answers[len(asked) - 1], stderr="")

    monkeypatch.setattr(peak.subprocess, "run", child)
    rows = {entry.name: Row(method=entry.name) for entry in entries}
    peak.measure_peaks(subject, entries, [], None, rows)
    assert asked == [["paca", "full", "lora"], ["lora"]]
    found = {name: (row.inference_bytes, row.peak_bytes, row.notes) for name, row in rows.items()}
    assert found == {"paca": (5, 7, []), "full": (6, None, ["step: out of memory"]), "lora": (1, 0, [])}


def test_a_process_that_fails_says_why(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last line is the error's."""
    subject, entries = subject_of(tiny_model("llama"), "paca")
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: no such thing\n")
    monkeypatch.setattr(peak.subprocess, "run", lambda *_args, **_more: done)
    with pytest.raises(SurgeryError, match="ValueError: no such thing"):
        peak.measure_peaks(subject, entries, [], None, {"paca": Row(method="paca")})


@pytest.mark.slow
def test_peak_memory_is_measured_elsewhere(tiny_model: TinyModel) -> None:
    """In training full tuning takes the most, with gradients and two moments; the plain forward the least."""
    wide = tiny_model("llama", overrides={"hidden_size": 512, "intermediate_size": 1024})
    subject, entries = subject_of(wide, "paca", "full")
    size = sum(parameter.nbytes for parameter in build(subject).parameters())
    rows = {entry.name: Row(method=entry.name) for entry in entries}
    peak.measure_peaks(subject, entries, list(open_feed(subject).batches(0, 3)), None, rows)
    peaks = {name: row.peak_bytes or 0 for name, row in rows.items()}
    assert peaks["full"] > peaks["paca"] + size
    assert 2.5 * size < peaks["full"] < 6 * size
    assert all(0 <= (row.inference_bytes or 0) < size for row in rows.values())


# --- what is learnt


def test_all_see_the_same_batches(tiny_model: TinyModel, tmp_path: Path) -> None:
    """In the same order for the same seed, in another for another; every epoch has all rows once."""
    subject, _ = subject_of(tiny_model("bert"), "paca", data=labelled_data(tmp_path), task=CLASSES["task"], batch=8)
    feed = open_feed(subject)
    one, again, other = ([b["input_ids"].tolist() for b in feed.batches(seed, 10)] for seed in (0, 0, 1))
    assert one == again != other
    assert [len(batch) for batch in one] == [8, 8, 8, 8, 4] * 2  # 36 rows
    epochs = [sorted(str(row) for batch in half for row in _unpadded(feed, 0, half)) for half in ((0, 5), (5, 10))]
    assert epochs[0] == epochs[1]
    assert one[:5] != one[5:]


def _unpadded(feed: Any, seed: int, part: tuple[int, int]) -> list[list[int]]:
    batches = list(feed.batches(seed, part[1]))[part[0] :]
    return [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


@pytest.mark.usefixtures("quick")
def test_scores(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each method is trained with its own rate and every seed; accuracy is shown, with the loss and the curves."""
    spec = little(
        tiny_model("bert"), "paca", "full", "floor", data=labelled_data(tmp_path), task=CLASSES["task"],
        learning_rates={"paca": 5e-2, "*": 1e-2}, steps=12, seeds=2, batch=8,
    )  # fmt: skip
    found = go(spec, tmp_path / "out")
    assert found.metric == "accuracy"
    assert {row.method: row.learning_rate for row in found.rows} == {"paca": 5e-2, "full": 1e-2, "floor": None}
    for row in found.rows[:2]:
        assert [curve.seed for curve in row.curves] == [0, 1]
        for curve in row.curves:
            assert curve.steps == list(range(1, 13))
            assert curve.losses[-1] < curve.losses[0]
            assert set(curve.scores) == {"loss", "accuracy", "f1", "matthews_correlation"}
            assert curve.scores["accuracy"] > 0.8
            assert curve.seconds > 0
        assert row.curves[0].losses != row.curves[1].losses
    assert found.rows[2].curves == []


@pytest.mark.usefixtures("quick")
def test_between_equal_scores_the_loss_decides() -> None:
    """A short run's accuracy is often the same at several rates: the first of them is no better than the others."""
    trials = [{"accuracy": 0.5, "loss": 0.7}, {"accuracy": 0.5, "loss": 0.6}, {"accuracy": 0.4, "loss": 0.1}]
    assert max(trials, key=lambda trial: scores.worth("accuracy", trial)) == trials[1]
    assert max(trials, key=lambda trial: scores.worth("loss", trial)) == trials[2]


def test_learning_rates_are_tried_on_rows_of_the_training_set(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same grid for each, with the first seed, never on the evaluation set; all that was tried is kept."""
    opened: list[Any] = []
    real = running.open_feed

    def watched(subject: Any, **more: Any) -> Any:
        opened.append(more.get("data"))
        return real(subject, **more)

    monkeypatch.setattr(running, "open_feed", watched)
    spec = little(
        tiny_model("bert"), "paca", "full", data=labelled_data(tmp_path), task=CLASSES["task"],
        tune=[1e-6, 5e-2], tune_fraction=0.25, steps=12, tune_steps=8, seeds=1, batch=8,
    )  # fmt: skip
    found = go(spec, tmp_path / "out")
    held = opened[-1]
    assert (held.eval, held.eval_fraction) == ([], 0.25)
    for row in found.rows:
        assert [trial.learning_rate for trial in row.tried] == [1e-6, 5e-2]
        best = max(row.tried, key=lambda trial: (trial.scores["accuracy"], -trial.scores["loss"]))
        assert row.learning_rate == best.learning_rate
        assert any("at the end of those tried" in note for note in row.notes)
    assert found.rows[0].learning_rate == 5e-2


@pytest.mark.usefixtures("quick")
def test_a_run_that_diverges_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    """It has no score, its finite losses are kept, and the file is still one that can be read."""
    spec = little(
        tiny_model("llama"), "full", data=text_data(tmp_path), learning_rates={"*": 1e18}, steps=6, seeds=1
    )  # fmt: skip
    found = go(spec, tmp_path / "out")
    assert found.rows[0].curves[0].scores == {}
    assert "seed 0 diverged" in found.rows[0].notes
    assert read_results(tmp_path / "out") == found


@pytest.mark.parametrize("count", (1, 200, 201, 999, 10_000))
def test_curves_are_thinned(count: int) -> None:
    """To at most 200 points, that end with the last step and keep the mean."""
    steps, losses = scores.thin([float(n) for n in range(1, count + 1)])
    assert len(steps) == len(losses) <= 200
    assert steps[-1] == count
    assert steps == sorted(set(steps))
    widths = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert sum(w * loss for w, loss in zip(widths, losses, strict=True)) == pytest.approx(count * (count + 1) / 2)


# --- the command line


def bench(*arguments: object) -> Result:
    """`surgery bench` with these arguments."""
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=True)


LITTLE = ("--methods", "paca,floor", "--rounds", 2, "--warmup", 1, "--batch", 2, "--sequence", 16, "--device", "cpu")


@pytest.mark.usefixtures("quick")
def test_command(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Tables for people, or one document; progress is on standard error."""
    result = bench(tiny_model("llama"), *LITTLE, "-r", 4, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "timing 2 steps of paca, floor" in result.stderr
    assert "to floor" in result.stdout
    assert f"Wrote {tmp_path / 'out'}." in result.stdout
    again = bench(tiny_model("llama"), *LITTLE, "-r", 4, "--out", tmp_path / "out", "--resume", "auto", "--json")
    document = json.loads(again.stdout)
    assert document["rows"][0]["size"] == {"name": "r", "value": 4}
    assert Results.model_validate(document) == read_results(tmp_path / "out")


def test_every_option_reaches_the_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or, of those that say where and how, the run."""
    seen: dict[str, Any] = {}

    def seeing(spec: BenchSpec, folder: Path, **more: Any) -> None:
        seen.update(more, spec=spec, folder=folder)
        raise RequestError("x", "seen")

    monkeypatch.setattr(running, "run", seeing)
    line = (
        "--methods paca,floor --data a --eval-data b --task causal-lm --labels c,d --targets q --exclude e"
        " --equal values --rank 3 --hidden 5 --batch 2 --sequence 16 --rounds 4 --warmup 2 --fit 1GB"
        " --checkpointing --lean --quantize nf4 --dropout 0.1 --dtype bf16 --precision fp32 --device cpu --threads 1"
        " --seeds 2 --steps 7 --epochs 0.5 --metric loss --resume auto --overwrite --out"
    )
    rates = {"--lr paca=1e-3 --lr 1e-4": {"learning_rates": {"paca": 1e-3, "*": 1e-4}}}
    rates["--tune 1e-4,1e-3 --tune-steps 6"] = {"tune": [1e-4, 1e-3], "tune_steps": 6}
    data = DataSection(train=["a"], eval=["b"], max_length=16)
    for words, chosen in rates.items():
        bench(tmp_path, *line.split(), tmp_path / "out", *words.split())
        wanted = BenchSpec(
            model=str(tmp_path), methods=["paca", "floor"], task="causal-lm", labels=["c", "d"], targets=["q"],
            exclude=["e"], equal="values", rank=3, hidden=5, data=data, batch=2, sequence=16, rounds=4, warmup=2,
            fit_bytes=10**9, checkpointing=True, lean=True, quantize="nf4", dropout=0.1, dtype="bf16", precision="fp32",
            device="cpu", threads=1, seeds=2, steps=7, epochs=0.5, metric="loss", **chosen,
        )  # fmt: skip
        assert seen.pop("spec") == wanted
    assert (seen["folder"], seen["resume"], seen["overwrite"]) == (tmp_path / "out", True, True)
    known = {option for parameter in cli.commands["bench"].params for option in parameter.opts if option[:2] == "--"}
    assert known - {"--json"} == {word for word in f"{line} {' '.join(rates)}".split() if word.startswith("--")}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    (
        (("--methods", "pacca"), RequestError, "The closest is 'paca'"),
        (("--methods", "bitfit"), UnsupportedError, "has no bias"),
        (("--targets", "qproj"), RequestError, "q_proj"),
        (("--tune", "1e-3,1e-4"), RequestError, "--tune: given without --data"),
        (("--equal", "both"), RequestError, "equal: 'both'"),
        (("--fit", "much"), RequestError, "--fit"),
        (("train.max_steps=3",), RequestError, "keys of the section data"),
        (("--data", "nowhere.jsonl"), RequestError, "nowhere.jsonl"),
        (("--device", "hpu"), RequestError, "device: 'hpu'"),
        (("--task", "sequence-classification", "--metric", "accuracy"), RequestError, "--metric: given without --data"),
    ),
)
def test_bad_requests(
    arguments: tuple[str, ...], kind: type[SurgeryError], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One documented error, and nothing is written."""
    result = bench(tiny_model("llama"), *LITTLE, *arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, kind), result.exception
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_data_without_rates_or_evaluation(tiny_model: TinyModel, tmp_path: Path) -> None:
    """To score, learning rates are asked for; without evaluation data they would be idle."""
    data = text_data(tmp_path)["train"][0]
    base = (tiny_model("llama"), *LITTLE, "--data", data, "--out", tmp_path / "out")
    assert "expected --lr or --tune" in str(bench(*base, "--eval-data", data).exception)
    assert "expected --eval-data with it" in str(bench(*base, "--lr", "1e-3").exception)
    assert "--lr: none for paca" in str(bench(*base, "--eval-data", data, "--lr", "floor=1e-3").exception)
    assert not (tmp_path / "out").exists()


def test_no_model() -> None:
    """A folder that is not there is said before torch is loaded."""
    result = bench("nope/")
    assert isinstance(result.exception, NotAModelError)
