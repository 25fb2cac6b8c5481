"""`surgery report`: what it reads, what it refuses, and what stands on the page, without a browser."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.adapter import open_adapter, update_adapter
from surgery.bench.results import RESULTS_FILE, Results
from surgery.bench.show import lines
from surgery.cli import main
from surgery.delta import require_columns
from surgery.errors import DamagedError, InterruptedRunError, NotAModelError, OutputExistsError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.report import charts, drawing
from surgery.report.bench_sections import bench_facts, bench_sections
from surgery.report.commands import command_lines
from surgery.report.curve import CURVE_FILE, draw_curve
from surgery.report.curves import POINTS, curve, read_entries, step_points, thin
from surgery.report.movement import ROWS, Move, _folded, column_moves, relative_norm
from surgery.report.page import build_page, render, report
from surgery.report.parts import Figure, Page, Section, Table, Text, number, seconds, size, text
from surgery.report.predicted import predicted_memory
from surgery.report.reading import INTERRUPTED, RUNNING, UNTRAINED, read_run
from surgery.runs import CHECKPOINTS, LOG_FILE, RUN_FILE
from surgery.survey import TaskSpec
from surgery.train import train
from surgery.trainer import StopWhenAsked
from surgery.workflow import export
from tests.conftest import TinyModel
from tests.examples import CASES, fast
from tests.reporting import log_entries, make_read_run, make_results, make_run, write_log

BUNDLE = "window.vegaEmbed = null;"


@pytest.fixture(scope="module")
def finished(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PaCA run and its verified export beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model("llama"), folder / "model")
    make_run(folder / "model", folder / "model-paca")
    export(folder / "model-paca")
    return folder / "model-paca"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model-paca"


def section(page: Page, title: str) -> Section:
    """The one section of that title."""
    (found,) = [s for s in page.sections if s.title == title]
    return found


def figures(page: Page) -> dict[str, Figure]:
    """Every chart by its title."""
    return {part.title: part for s in page.sections for part in s.parts if isinstance(part, Figure)}


def cells(part: object) -> dict[str, str]:
    """A table of two columns."""
    assert isinstance(part, Table)
    return {row[0]: row[1] for row in part.rows}


def rows_of(figure: Figure) -> list[dict[str, Any]]:
    """The data that a chart draws."""
    values: list[dict[str, Any]] = figure.spec["data"]["values"]
    return values


# --- reading a log


def test_a_log_that_was_cut_in_its_last_line_is_read_up_to_there(tmp_path: Path) -> None:
    """A killed run leaves half a line; a line before the end that is no entry is a damaged log."""
    path = tmp_path / LOG_FILE
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_entries(path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DamagedError, match="line 2 is no JSON"):
        read_entries(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(DamagedError, match="line 1 has no step"):
        read_entries(path)
    assert read_entries(tmp_path / "none") == []


def test_step_times_leave_evaluations_and_restarts_out() -> None:
    """10 steps of 0.5 s, an evaluation of 7 s, 10 more steps; then a resumed run, whose clock begins anew."""
    entries: list[dict[str, Any]] = [
        {"step": 10, "seconds": 30.0, "loss": 1.0},
        {"step": 20, "seconds": 35.0, "loss": 1.0},
        {"step": 20, "seconds": 42.0, "eval_loss": 1.0},
        {"step": 30, "seconds": 47.0, "loss": 1.0},
        {"step": 40, "seconds": 9.0, "loss": 1.0},
        {"step": 50, "seconds": 15.0, "loss": 1.0},
    ]
    steps, times = zip(*step_points(entries), strict=True)
    assert steps == (20, 30, 50)
    assert times == pytest.approx((0.5, 0.5, 0.6))


def test_a_long_curve_keeps_its_mean_and_its_extremes() -> None:
    """10,001 points become at most POINTS; nothing is outside of the band, and the mean of all is the mean of all."""
    points = [(step, float((step * 7919) % 1000)) for step in range(10_001)]
    points[5003] = (5003, 1e6)
    thinned = thin(points)
    assert len(thinned.steps) <= POINTS
    assert thinned.is_thinned
    assert thinned.logged == 10_001
    assert max(thinned.high) == 1e6
    assert min(thinned.low) == 0.0
    assert thinned.steps[-1] == 10_000
    width = 10_001 // len(thinned.steps) + 1
    assert thinned.values[0] == pytest.approx(sum(value for _, value in points[:width]) / width)
    short = thin(points[:POINTS])
    assert not short.is_thinned
    assert short.values == tuple(value for _, value in points[:POINTS])
    assert short.low == short.high == short.values


def test_what_is_no_finite_number_is_not_drawn() -> None:
    """A NaN in the log would be no JSON on the page."""
    found = curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": "x"}], "loss")
    assert found.steps == (1,)


# --- how far columns moved


def test_relative_movement_is_that_of_the_adapter_s_values(finished: Path) -> None:
    """||values - original|| / ||original||, computed by hand for each layer, at its place on the map."""
    delta = require_columns(open_adapter(finished).delta, "test")
    moves = column_moves(delta)
    assert [move.module for move in moves] == sorted(delta.patches)
    for move in moves:
        patch = delta.patches[move.module]
        wanted = float((patch.values - patch.original).norm() / patch.original.norm())
        assert move.value == pytest.approx(wanted, rel=1e-5)
        assert move.module == f"model.layers.{move.layer}.{move.projection}"
    assert {move.layer for move in moves} == {0, 1}


def test_columns_that_were_zero_move_by_their_own_norm() -> None:
    """There is nothing to divide by."""
    assert relative_norm(torch.full((4,), 2.0), torch.zeros(4)) == 4.0


def test_experts_are_taken_together_where_there_would_be_too_many_rows() -> None:
    """128 experts of a layer are one row, their mean; other rows stay."""
    moves = [Move(f"l.0.experts.{n}.up", 0, f"experts.{n}.up", float(n)) for n in range(ROWS + 1)]
    moves.append(Move("l.0.gate", 0, "gate", 5.0))
    folded = _folded(moves)
    assert [(m.projection, m.layer, m.value, m.modules) for m in folded] == [
        ("experts.*.up", 0, ROWS / 2, ROWS + 1),
        ("gate", 0, 5.0, 1),
    ]


# --- a page on a run


def test_the_page_of_a_run_has_its_figures(finished: Path) -> None:
    """Every part that the page is there for, with the log's and the record's numbers."""
    page = build_page([finished])
    assert [s.title for s in page.sections] == [
        "Results", "Curves", "Plan", "Movement", "Memory", "Verification", "Reproduction",
    ]  # fmt: skip
    drawn = figures(page)
    assert list(drawn) == [
        "Loss", "Accuracy", "Learning rate", "Step time", "How far trained columns moved", "Memory by part (predicted)",
    ]  # fmt: skip
    entries = read_entries(finished / LOG_FILE)
    losses = {e["step"]: e["loss"] for e in entries if "loss" in e}
    assert {r["step"]: r["value"] for r in rows_of(drawn["Loss"]) if r["kind"] == "training"} == losses
    evals = {e["step"]: e["eval_loss"] for e in entries if "eval_loss" in e}
    assert {r["step"]: r["value"] for r in rows_of(drawn["Loss"]) if r["kind"] == "evaluation"} == {0: 4.2, **evals}
    assert len(rows_of(drawn["How far trained columns moved"])) == 14
    outcome = cells(section(page, "Results").parts[-1])
    assert outcome["state"] == "finished after 100 steps"
    assert outcome["loss before"] == "4.2"
    assert outcome["peak memory"] == "709.00 MB"
    facts = dict(page.facts)
    assert facts["started"] == "2026-11-21 20:15 UTC"
    assert facts["method"] == "PaCA, rank 4, 14 layers"


def test_memory_by_part_is_what_surgery_plan_says(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chart's parts are those of `surgery plan` for the run's own batch and length."""
    found = {r["name"]: r["value"] for r in rows_of(figures(build_page([finished]))["Memory by part (predicted)"])}
    main(["plan", str(finished), "--batch=4", "--sequence=64", "--packed", "--device=cpu", "--json"])
    planned = json.loads(capsys.readouterr().out)
    wanted = {**planned["parts"], **planned["activations"]}
    assert found == {name: value for name, value in wanted.items() if value}


def test_memory_is_predicted_for_the_length_that_the_tokenizer_allows(run: Path) -> None:
    """A recipe's default of 1,024 tokens is no reason to predict nothing for a model of fewer positions."""
    path = run / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 32}))
    found = predicted_memory(replace(read_run(run), inputs={"max_length": 1024}))
    assert isinstance(found, Figure)
    assert " x 32 tokens" in found.summary


def test_the_verification_is_that_of_the_export_beside_the_run(finished: Path, run: Path) -> None:
    """Its checks, until the adapter is another than the one that was exported; of an export its own."""
    beside = section(build_page([finished]), "Verification").parts[0]
    assert isinstance(beside, Table)
    assert {row[1] for row in beside.rows} == {"passed"}
    assert beside.caption == "Checks of model-paca-merged"
    own = section(build_page([finished.with_name("model-paca-merged")]), "Verification").parts[0]
    assert own == beside
    adapter = open_adapter(run)
    delta = require_columns(adapter.delta, "test")
    changed = {name: replace(patch, values=patch.values + 1) for name, patch in delta.patches.items()}
    update_adapter(adapter, replace(delta, patches=changed), adapter.record.manifest)
    assert read_run(run).exported is None
    merged = read_run(run.with_name("model-paca-merged"))
    assert merged.delta is None
    assert "trained since" in merged.notes[0]


def test_an_export_without_its_adapter_is_reported_from_its_record(run: Path) -> None:
    """No curve is drawn empty: what is not known is said."""
    shutil.rmtree(run)
    page = build_page([run.with_name("model-paca-merged")])
    assert "Curves" not in [s.title for s in page.sections]
    assert "Movement" not in [s.title for s in page.sections]
    (note,) = [part for part in section(page, "Results").parts if isinstance(part, Text)]
    assert "model-paca is not there" in note.paragraphs[0]
    assert cells(section(page, "Results").parts[-1])["loss after"] != "-"


def test_the_page_of_a_read_run_has_no_map_of_columns(tiny_model: TinyModel, tmp_path: Path) -> None:
    """It says which layers are read, and what the side network's tensors hold."""
    shutil.copytree(tiny_model("t5"), tmp_path / "model")
    page = build_page([make_read_run(tmp_path / "model", tmp_path / "read")])
    titles = [s.title for s in page.sections]
    assert "Movement" not in titles
    assert "Side network" in titles
    stacks = next(part for part in section(page, "Plan").parts if isinstance(part, Table))
    assert [row[0] for row in stacks.rows] == ["encoder", "decoder"]
    (figure,) = section(page, "Side network").parts
    assert isinstance(figure, Figure)
    delta = open_adapter(tmp_path / "read").delta
    values = sorted(float(t.double().square().mean().sqrt()) for t in delta.state.values())  # type: ignore[union-attr]
    assert sorted(r["value"] for r in rows_of(figure)) == pytest.approx(values)


def test_a_fresh_adapter_is_reported_as_a_plan(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Not trained, no curve, no map, no memory of a run that was not."""
    apply(tiny_model("llama"), tmp_path / "fresh", PacaSpec(rank=2))
    page = build_page([tmp_path / "fresh"])
    assert [s.title for s in page.sections] == ["Results", "Plan", "Verification", "Reproduction"]
    assert dict(page.facts)["state"] == "not trained: the plan alone"
    assert read_run(tmp_path / "fresh").state == UNTRAINED
    assert figures(page) == {}


def test_an_interrupted_run_is_shown_as_such(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its note's settings and its last checkpoint's columns; while its process lives it is running."""
    case = CASES[0]
    apply(tiny_model(case.family), tmp_path / "run", PacaSpec(rank=4))

    def stop(self: StopWhenAsked, args: object, state: Any, control: Any, **_: object) -> None:
        self.interruption.requested = control.should_save = control.should_training_stop = state.global_step == 6

    monkeypatch.setattr(StopWhenAsked, "on_step_end", stop)
    with pytest.raises(InterruptedRunError):
        train(tmp_path / "run", case.write(tmp_path), fast(save_steps=3, learning_rate=1e-2))
    assert read_run(tmp_path / "run").state == RUNNING  # this very process
    note = tmp_path / "run" / CHECKPOINTS / RUN_FILE
    document = json.loads(note.read_text())
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    document["process"] = f"{socket.gethostname()}:{int(done.stdout)}"
    note.write_text(json.dumps(document))
    run = read_run(tmp_path / "run")
    assert (run.state, run.step) == (INTERRUPTED, 6)
    assert run.settings["learning_rate"] == 1e-2
    page = build_page([tmp_path / "run"])
    assert dict(page.facts)["state"] == "interrupted at step 6"
    moved = {r["module"]: r["value"] for r in rows_of(figures(page)["How far trained columns moved"])}
    assert all(value > 0 for value in moved.values())
    state = load_file(tmp_path / "run" / CHECKPOINTS / "checkpoint-6" / "state.safetensors")
    delta = require_columns(open_adapter(tmp_path / "run").delta, "test")
    for module, value in moved.items():
        change = state[f"{module}.paca_delta"]
        assert value == pytest.approx(float(change.norm() / delta.patches[module].original.norm()), rel=1e-4)


# --- several runs, and benches


def test_several_runs_are_compared(finished: Path, tmp_path: Path) -> None:
    """Results side by side, curves overlaid, and a table of what differs and of nothing else."""
    other = make_run(finished.with_name("model"), tmp_path / "other", seed=1, rank=8, learning_rate=5e-3)
    page = build_page([finished, other])
    assert page.title == "Comparison of model-paca and other"
    table = section(page, "Results").parts[-1]
    assert isinstance(table, Table)
    assert table.head == ("what", "model-paca", "other")
    assert {row[0]: row[1:] for row in table.rows}["trained values"] == ("1,792", "3,584")
    assert {r["run"] for r in rows_of(figures(page)["Loss"])} == {"model-paca", "other"}
    (differing,) = section(page, "What differs").parts
    assert isinstance(differing, Table)
    assert {row[0]: row[1:] for row in differing.rows} == {
        "model": ("../model", os.path.relpath(finished.with_name("model"), other)),
        "paca.rank": ("4", "8"),
        "train.learning_rate": ("0.001", "0.005"),
    }
    assert "model" not in dict(page.facts)
    assert [s.link for s in page.sections if s.link] == ["model-paca", "other"]


def test_runs_of_one_name_are_told_apart(finished: Path, run: Path) -> None:
    """By their folders' parents; the same folder twice by its place."""
    names = build_page([finished, run]).title
    assert names == f"Comparison of {finished.parent.name}/model-paca and copy/model-paca"
    assert "(1)" in build_page([finished, finished]).title


def test_the_page_of_a_bench_has_its_figures() -> None:
    """Medians, quartiles and ratios are those of the rounds; what was not measured is said to be so."""
    results = make_results()
    found = {s.title: s for s in bench_sections(results)}
    drawn = {part.title: part for s in found.values() for part in s.parts if isinstance(part, Figure)}
    assert list(drawn) == [
        "Step time", "Ratio to the floor", "Saved for backward", "Peak memory", "Accuracy against memory",
        "Accuracy against time", "Training loss",
    ]  # fmt: skip
    lora, floor = results.row("lora"), results.row("floor")
    assert lora
    assert floor
    times = {r["name"]: r for r in rows_of(drawn["Step time"])}
    assert times["lora"]["value"] == sorted(lora.seconds)[4]
    assert times["lora"]["low"] == sorted(lora.seconds)[2]
    assert times["lora"]["high"] == sorted(lora.seconds)[6]
    ratio = {r["name"]: r["value"] for r in rows_of(drawn["Ratio to the floor"])}
    assert ratio["lora"] == sorted(a / b for a, b in zip(lora.seconds, floor.seconds, strict=True))[4]
    assert set(ratio) == {row.method for row in results.rows} - {"floor", "prompt"}
    points = {r["name"]: r for r in rows_of(drawn["Accuracy against memory"])}
    assert points["lora"]["x"] == lora.peak_bytes
    assert points["lora"]["y"] == pytest.approx(0.869)
    *tables, remarks = found["Results"].parts
    rows: dict[str, dict[str, str]] = {}
    for table in tables:
        assert isinstance(table, Table)
        for row in table.rows:
            rows.setdefault(row[0], {}).update(zip(table.head, row, strict=True))
    assert rows["lora"]["energy a step"] == "not measured"
    assert rows["prompt"]["step (median)"] == "-"
    assert rows["lora"]["accuracy"] == "0.869 ± 0.004"
    assert (rows["lora"]["learning rate"], rows["lora"]["seeds"], rows["paca"]["merged"]) == ("0.001", "3", "yes")
    assert remarks == Text(("prompt: out of memory at batch 32 x 2048",))


def test_a_bench_says_what_its_command_says() -> None:
    """Ratios to the first of several LoRAs, and a remark of all methods once."""
    results = make_results()
    lora = results.row("lora")
    assert lora
    lora.method = "lora:r=4"
    for row in results.rows:
        row.notes = ["energy is not measured: no counter"]
    tables = {part.caption: part for part in bench_sections(results)[0].parts if isinstance(part, Table)}
    steps = tables["What a training step costs"]
    column = {row[0]: row[steps.head.index("to LoRA")] for row in steps.rows}
    assert column["lora:r=4"] == "1.000"
    printed = {words[0]: words for words in (line.split() for line in lines(results)[2:14])}
    assert column["paca"] in printed["paca"]
    assert bench_sections(results)[0].parts[-1] == Text(("energy is not measured: no counter",))


def test_the_head_of_several_benches_is_what_they_share() -> None:
    """One bench's model and methods are not said to be those of another."""
    one = make_results()
    other = one.model_copy(update={"spec": {"model": "another/"}, "tokens_per_step": 7})
    assert dict(bench_facts([one]))["model"] == "model/"
    assert "tokens a step" in dict(bench_facts([one, one]))
    assert {"methods", "commit"} <= set(dict(bench_facts([one, other])))
    assert not {"model", "tokens a step"} & set(dict(bench_facts([one, other])))


def test_a_bench_of_costs_alone_draws_no_scores() -> None:
    """Nor does one that has run for a single round draw spreads."""
    results = make_results(seeds=0, rounds=1)
    titles = [s.title for s in bench_sections(results)]
    assert "Scores" not in titles
    empty = Results(spec={}, where=results.where, tokens_per_step=1, rows=[])
    assert [s.title for s in bench_sections(empty)] == ["Results", "Reproduction"]


def test_memory_is_the_peak_only_where_all_methods_have_one() -> None:
    """A peak of one method beside the saved bytes of another would be no comparison."""
    results = make_results()
    lora = results.row("lora")
    assert lora
    lora.peak_bytes = None
    drawn = [p for s in bench_sections(results) for p in s.parts if isinstance(p, Figure)]
    (figure,) = [p for p in drawn if p.title == "Accuracy against memory"]
    points = {r["name"]: r["x"] for r in rows_of(figure)}
    assert points == {row.method: row.saved_bytes for row in results.rows if row.curves}


# --- what it takes to reproduce


def test_the_command_lines_make_the_same_plan(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed again, they give an adapter with the same plan, trained with the same settings to the same values."""
    case = CASES[6]  # a classifier: it has a head and labels
    monkeypatch.chdir(tmp_path)
    layers = {"targets": ("query", "re:.*dense"), "rank_pattern": {"*.query": 2}, "rows": (7, 9)}
    spec = PacaSpec(rank=3, alpha=6.0, seed=5, **layers)
    apply(tiny_model(case.family), "run", spec, task=TaskSpec(case.task, ("animal", "person")))
    train("run", case.write(tmp_path), fast(max_steps=3, weight_decay=0.1), task=case.spec())
    first, second = command_lines(read_run(Path("run")))
    assert f"--data={tmp_path / case.file}" in second
    for line in (first, second):
        main([*shlex.split(line)[1:], "--json"])
    capsys.readouterr()
    again, was = read_run(Path("adapter")), read_run(Path("run"))
    assert again.plan == was.plan
    assert again.settings == was.settings
    assert again.inputs == was.inputs
    assert again.manifest.files == was.manifest.files  # the adapter file, byte for byte


# --- what it refuses, and how it writes


def test_a_folder_that_is_neither_is_an_error(tmp_path: Path, tiny_model: TinyModel, finished: Path) -> None:
    """A model, an empty folder, none: which folder it is and what was expected, exit code 2, and no page."""
    for folder in (tiny_model("llama"), tmp_path):
        with pytest.raises(
            NotAModelError, match=r"neither surgery\.json nor bench\.json, expected a run .* or a bench"
        ):
            report([finished, folder], tmp_path / "r.html")
    with pytest.raises(NotAModelError, match="no such folder"):
        report([tmp_path / "none"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    assert NotAModelError.exit_code == 2


@pytest.mark.parametrize("file", ("surgery.json", LOG_FILE, "adapter.safetensors"))
def test_a_damaged_run_is_an_error(run: Path, file: str, tmp_path: Path) -> None:
    """Exit code 4, and no page."""
    (run / file).write_bytes(b"{}\n" + (run / file).read_bytes()[: (run / file).stat().st_size // 2])
    with pytest.raises(DamagedError) as caught:
        report([run], tmp_path / "r.html")
    assert file in caught.value.where
    assert not (tmp_path / "r.html").exists()


def test_a_damaged_bench_is_an_error(tmp_path: Path) -> None:
    """As a damaged run."""
    (tmp_path / RESULTS_FILE).write_text('{"schema_version": 1, "rows": 3}')
    with pytest.raises(DamagedError):
        report([tmp_path], tmp_path / "r.html")


def test_an_existing_file_is_replaced_only_when_asked(finished: Path, tmp_path: Path) -> None:
    """Whole or absent: a page that cannot be made leaves the old one, and no trace."""
    out = tmp_path / "r.html"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        report([finished], out)
    with pytest.raises(NotAModelError):
        report([tmp_path], out, overwrite=True)
    assert out.read_text() == "mine"
    report([finished], out, overwrite=True)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputExistsError, match="a folder"):
        report([finished], tmp_path / "folder", overwrite=True)


def test_without_the_extra_it_says_how_to_get_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 5 and the pip line for a page; for the picture of a run that is finished, a line."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.delitem(sys.modules, "surgery.report.drawing")
    with pytest.raises(UnsupportedError, match=r"pip install 'checkpoint-surgery\[report\]'"):
        report([finished], tmp_path / "r.html")
    assert draw_curve(finished).startswith("curve not drawn: surgery.report.drawing: vl_convert is not installed")
    assert not (finished / CURVE_FILE).exists()


def test_the_command_says_what_it_wrote(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """report.html here unless -o names another; --json gives one document."""
    monkeypatch.chdir(tmp_path)
    main(["report", str(finished)])
    assert capsys.readouterr().out.startswith("Wrote report.html: Report on model-paca, ")
    main(["report", str(finished), "-o", "other.html", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["size_bytes"] == Path("other.html").stat().st_size
    assert document["sections"][0] == "Results"


# --- HTML


class Outline(HTMLParser):
    """The page's headings, ids, links and elements, as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.append((tag, given))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if given.get("id"):
            self.ids.append(str(given["id"]))

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (given for name, given in self.elements if name == tag)


HOSTILE = "<script>alert(1)</script>\"'&"


def hostile_page() -> Page:
    """A page on which every text is an attack."""
    table = Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),))
    rows = [{"name": HOSTILE, "value": 1.0, "label": HOSTILE}]
    figure = Figure(HOSTILE, HOSTILE, charts.bars(rows, x=HOSTILE, description=HOSTILE), table, HOSTILE)
    text_part = Text((HOSTILE,), (HOSTILE,))
    return Page(HOSTILE, ((HOSTILE, HOSTILE),), (Section(HOSTILE, (table, figure, text_part), HOSTILE),))


def test_names_are_text_wherever_they_stand() -> None:
    """No name becomes an element, and none ends the element that it stands in."""
    html = render(hostile_page(), BUNDLE)
    outline = Outline(html)
    scripts = list(outline.all("script"))
    assert len(scripts) == 3  # data, the bundle, the page's own
    assert "<script>alert" not in html
    assert sum("alert" in str(value) for _, given in outline.elements for value in given.values()) > 0
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert data
    assert json.loads(data[1])["data"]["values"][0]["name"] == HOSTILE


def test_headings_ids_and_links_are_in_order(finished: Path) -> None:
    """One h1, no level left out, ids once, links that lead somewhere, a language, a name for every scroll box."""
    outline = Outline(render(build_page([finished, finished]), BUNDLE))
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    for link in outline.all("a"):
        assert str(link["href"]).removeprefix("#") in outline.ids
    assert next(outline.all("html"))["lang"] == "en"
    boxes = [given for given in outline.all("div") if "scroll" in str(given.get("class"))]
    assert boxes
    assert all(given["tabindex"] == "0" and given["aria-label"] for given in boxes)
    names = [given["aria-label"] for _, given in outline.elements if given.get("role") == "region"]
    assert len(names) == len(set(names)) > len(boxes)
    for given in outline.all("figure"):
        assert given["aria-labelledby"] in outline.ids


def test_the_policy_names_the_page_s_scripts_and_no_other(finished: Path) -> None:
    """By their digests; a page without charts runs none."""
    html = render(build_page([finished]), BUNDLE)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]
    assert policy[1].count("sha256-") == 3
    plain = render(Page("p", (), (Section("s", (Text(("t",)),)),)), BUNDLE)
    assert "script-src &#39;none&#39;" in plain
    assert "<script" not in plain


def test_a_script_that_ends_its_element_is_written_so_that_it_does_not(finished: Path) -> None:
    """Vega holds such a text."""
    html = render(build_page([finished]), "const a = '</script><p id=broken>';")
    assert "broken" not in Outline(html).ids


@pytest.mark.parametrize(
    ("given", "written"),
    ((None, "-"), (float("nan"), "-"), (3, "3"), (65536, "65,536"), (0.000123, "0.000123"), (2.0, "2")),
)
def test_numbers_are_written_as_people_do(given: float | None, written: str) -> None:
    """Four digits, thousands set off, a dash for none."""
    assert number(given) == written


def test_times_sizes_and_settings_are_written_as_people_do() -> None:
    """With their units."""
    assert [seconds(s) for s in (None, 0.0123, 45.6, 600, 7500)] == ["-", "12.3 ms", "45.6 s", "10 min", "2 h 5 min"]
    assert [size(s) for s in (None, 12, 1_070_000)] == ["-", "12 bytes", "1.07 MB"]
    assert [text(v) for v in (True, [], ["a", 2], {"a": 0.5}, "")] == ["yes", "-", "a, 2", "a: 0.5", "-"]


# --- the picture of a run


def test_training_draws_its_curve(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`surgery train` leaves a PNG in the adapter folder and says so; the library call leaves none."""
    case = CASES[0]
    data = case.write(tmp_path)
    apply(tiny_model(case.family), tmp_path / "run", PacaSpec(rank=4))
    train(tmp_path / "run", data, fast(max_steps=2))
    assert not (tmp_path / "run" / CURVE_FILE).exists()
    drawn: list[dict[str, Any]] = []
    real = drawing.png
    monkeypatch.setattr(drawing, "png", lambda spec: drawn.append(spec) or real(spec))
    main(["train", str(tmp_path / "run"), f"--data={data.train[0]}", "max_steps=3", "logging_steps=1"])
    out = capsys.readouterr().out
    path = tmp_path / "run" / CURVE_FILE
    assert f"curve {path}" in out
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1000
    assert height > 400
    entries = read_entries(tmp_path / "run" / LOG_FILE)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert [row["value"] for row in drawn[0]["data"]["values"]] == losses
    assert len(losses) == 3


def test_a_curve_that_cannot_be_drawn_does_not_fail_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No log, a drawing that fails, a disk that is full: a line each."""

    def full(_spec: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing, "png", full)
    assert draw_curve(run) == "curve not drawn: [Errno 28] No space left on device"
    write_log(run, [])
    assert draw_curve(run) == "curve not drawn: the log has fewer than two losses"
    write_log(run, log_entries(5))
    monkeypatch.undo()
    assert draw_curve(run) == f"curve {run / CURVE_FILE}"
    assert [path.name for path in run.iterdir() if "partial" in path.name] == []
