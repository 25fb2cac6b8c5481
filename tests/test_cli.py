"""The command line: help, one JSON document, one line for an error, and the documented exit codes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from surgery import operate
from surgery.adapter import open_adapter
from surgery.cli import cli
from surgery.delta import ADAPTER_FILE
from surgery.errors import RequestError, shorten
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.recipe import DataSection, Recipe, TrainSection
from surgery.survey import TaskSpec
from tests.conftest import TinyModel, digest_folder
from tests.console import Console
from tests.examples import TEXTS
from tests.trained import make_adapter

COMMANDS = tuple(sorted(cli.commands))


@pytest.fixture
def run(console: Console, monkeypatch: pytest.MonkeyPatch) -> Console:
    """The console script, with progress bars as a user sees them."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    return console


@pytest.fixture
def work(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `model`, `text.txt`, and a trained adapter `model-paca`."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    make_adapter(tmp_path / "model", tmp_path / "model-paca", PacaSpec(rank=4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ("max_steps=2", "batch_size=2", "max_length=32")


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name: str) -> None:
    """The example is a whole command line; every option says what it does."""
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert f"\n  surgery {name}" in shown.output
    command = cli.commands[name]
    assert command.get_short_help_str(200)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith(".") or parameter.help.endswith(":"), parameter.help
    assert "--json" in shown.output


def test_the_commands_are_those_promised() -> None:
    """The list of the design: more may come, none may go."""
    assert {"apply", "train", "export", "verify", "undo", "inspect", "diff", "run", "doctor"} <= set(COMMANDS)


def test_help_of_the_whole(run: Console) -> None:
    """Every command is listed, -h is --help, and the version is the package's."""
    ended = run("-h")
    assert ended.code == 0
    assert all(f"\n  {name} " in ended.out for name in COMMANDS)
    assert run("--version").out.startswith("surgery, version 0.1")


# --- JSON


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document_and_nothing_else(name: str, work: Path, run: Console) -> None:
    """On standard output, for every command; a second `json.loads` would find nothing left."""
    recipe = {
        "model": "model", "adapter": "run-adapter", "data": {"train": ["text.txt"], "max_length": 32},
        "train": {"max_steps": 2}, "paca": {"rank": 2},
    }  # fmt: skip
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (work / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    arguments: dict[str, list[object]] = {
        "apply": ["apply", "model", "-o", "new", "-r", "2"],
        "train": ["train", "model-paca", "--data", "text.txt", *QUICK],
        "export": ["export", "--merge"],
        "verify": ["verify", "model-paca-merged"],
        "undo": ["undo", "model-paca-merged", "-o", "again"],
        "inspect": ["inspect", "model-paca"],
        "diff": ["diff", "model", "model"],
        "run": ["run", "recipe.yaml"],
        "doctor": ["doctor"],
        "settings": ["settings"],
        "generate": ["generate", "model", "--prompt", "a"],
        "eval": ["eval", "model", "--task", "gsm8k", "--data", "sums.jsonl", "--max-new-tokens", "2"],
        "plan": ["plan", "model", "--batch", "2"],
        "bench": [
            "bench",
            "model",
            "--methods",
            "floor,paca",
            "--rounds",
            2,
            "--warmup",
            1,
            "--sequence",
            8,
            "--batch",
            1,
        ],
        "report": ["report", "model-paca"],
        "patch": ["patch", "theirs/model.onnx", "model-paca", "-o", "patched"],
        "recipes": ["recipes", "list"],
        "import": ["import", "theirs"],
    }
    if name in ("verify", "undo"):
        assert run("export", "--merge").code == 0
    if name == "patch":
        assert run("export", "model", "--format", "onnx", "-o", "theirs", "--no-verify").code == 0
    if name == "import":
        assert run("export", "model-paca", "--format", "peft-paca", "-o", "theirs").code == 0
    ended = run(*arguments[name], "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document
    assert ended.out == json.dumps(document, indent=2) + "\n"


def test_json_of_a_failure_is_empty(work: Path, run: Console) -> None:
    """Whoever parses standard output looks at the exit code first."""
    ended = run("verify", "model-paca", "--json")
    assert (ended.code, ended.out) == (2, "")


def test_json_holds_what_the_text_says(work: Path, run: Console) -> None:
    """Numbers as numbers."""
    document = json.loads(run("train", "model-paca", "--data", "text.txt", *QUICK, "--json").out)
    assert (document["steps"], document["device"]) == (2, "cpu")
    assert document["trained_values"] == open_adapter(work / "model-paca").plan.trained_values
    document = json.loads(run("export", "--merge", "--json").out)
    assert document["verification"]["max_logit_difference"] == 0
    assert {check["result"] for check in document["verification"]["checks"]} == {"passed"}


# --- errors and exit codes


def damage(work: Path) -> None:
    """Cut the adapter file short."""
    path = work / "model-paca" / ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:-4])


ERRORS: tuple[tuple[int, str, str], ...] = (
    (2, "apply nothing/", "Error: nothing/: no such folder, expected a model folder or a hub id"),
    (2, "apply model -r 99", "Error: --rank"),
    (2, "apply model --targets q_prj", "Error: --targets: 'q_prj' matches no linear layer"),
    (2, "apply model --method pacca", "Error: --method: unknown name 'pacca'"),
    (2, "apply model --task nonsense", "Error: --task: unknown task 'nonsense'"),
    (2, "apply model --rank-pattern q_proj", "Error: --rank-pattern: 'q_proj', expected PATTERN=RANK"),
    (2, "apply model --labels a,b -o new", "Error: --labels: given for causal-lm, expected a task with classes"),
    (2, "apply model --task sequence-classification --labels a,b,a -o new", "Error: --labels: 'a' named twice"),
    (2, "apply model --targets all-conv -o new", "Error: --targets: no layer is left to train: all-conv is named, and"),
    (2, "apply model --targets ,", "Error: --targets: an empty text, expected a value"),
    (2, "apply model --rows= -o new", "Error: --rows: an empty text, expected a value"),
    (2, "apply model --budget= -o new", "Error: --budget: an empty text, expected a value"),
    (2, "apply model", "Error: model-paca: it exists"),
    (2, "apply model --alpha -1", "Error: --alpha: -1.0, expected a positive number."),
    (2, "plan model --fit much", "Error: --fit: 'much' is no size"),
    (2, "plan model --sharding fsd --devices 2", "Error: --sharding: unknown name 'fsd'"),
    (5, "plan model --device hpu", "Error: --device hpu: no prediction for it"),
    (2, "train model-paca", "Error: data.train: found no file"),
    (2, "train model-paca --data nothing.jsonl", "Error: nothing.jsonl: "),
    (2, "train model-paca --data text.txt learning_rat=1", "Error: override: unknown key 'learning_rat'"),
    (2, "train model-paca --data text.txt max_steps=0", "Error: settings: train.max_steps: 0, expected"),
    (2, "train model-paca --resume maybe", "Error: surgery train: Invalid value for '--resume'"),
    (2, "export", "Error: export: --format safetensors without --merge"),
    (2, "export --merge --format lora", "Error: export: --merge with --format lora"),
    (2, "export --merge --nonsense", "Error: surgery export: No such option '--nonsense'"),
    (2, "verify", "Error: surgery verify: Missing argument 'MERGED'. See `surgery verify --help`."),
    (2, "verify model", "Error: model: no surgery.json"),
    (2, "recipes", "Error: surgery recipes: Missing argument '{list|show}'. Choose from: list, show. See `surgery"),
    (2, "nonsense", "Error: surgery: No such command 'nonsense'"),
    (2, "run nothing.yaml", "Error: nothing.yaml: it cannot be read"),
    (2, "undo model-paca -o x", "Error: model-paca: a folder of kind 'adapter'"),
    (2, "inspect nothing", "Error: nothing: "),
    (4, "export --merge --base other", "Error: other: "),
    (5, "train model-paca --data text.txt --device cuda", "Error: --device cuda: "),
    (5, "apply model --task seq2seq -o new", "Error: --task seq2seq: transformers has no seq2seq model for llama"),
)


@pytest.mark.parametrize(("code", "line", "begins"), ERRORS, ids=lambda value: str(value).replace(" ", "_")[:40])
def test_an_error_is_one_line_and_its_exit_code(
    code: int, line: str, begins: str, work: Path, run: Console, tiny_model: TinyModel
) -> None:
    """On standard error, without a traceback; standard output stays empty, and so does the folder."""
    if "cuda" in line:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    (work / "other").symlink_to(tiny_model("llama", seed=1), target_is_directory=True)
    before = digest_folder(work)
    ended = run(*line.split())
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(begins), ended.err
    assert ended.err.count("\n") == 1
    assert ended.err.endswith(".\n")
    assert digest_folder(work) == before


def test_what_the_hub_says_is_cut_at_a_word(run: Console) -> None:
    """Its message is longer than a line should be: the part that is shown ends in a whole word and two dots."""
    with pytest.raises(LocalEntryNotFoundError) as caught:
        snapshot_download("nobody/nothing")
    ended = run("apply", "nobody/nothing", "--plan")
    assert ended.code == 2
    begin = "Error: nobody/nothing: no such folder, and the hub did not give it ("
    shown, _, rest = ended.err.removeprefix(begin).partition(" ..)")
    assert rest == ", expected a model folder or a hub id such as org/name.\n"
    assert 100 < len(shown) < 160
    assert str(caught.value).startswith(f"{shown} ")


@given(st.text(max_size=60), st.integers(4, 40))
def test_a_shortened_text_is_whole_words_of_it(text: str, limit: int) -> None:
    """On one line, never longer than asked for; a word that is too long alone is cut, so that something is seen."""
    whole, short = " ".join(text.split()), shorten(text, limit)
    assert len(short) <= limit
    assert (short == whole) == (len(whole) <= limit)
    if short != whole:
        kept = short.removesuffix(" ..")
        assert kept
        assert whole.startswith(f"{kept} ") or " " not in kept


def test_a_check_that_does_not_hold_is_exit_code_3(work: Path, run: Console) -> None:
    """A merged folder with one bit turned over."""
    assert run("export", "--merge").code == 0
    path = work / "model-paca-merged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ended = run("verify", "model-paca-merged")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.startswith("Error: ")
    assert ended.err.count("\n") == 1


def test_a_damaged_adapter_is_exit_code_4(work: Path, run: Console) -> None:
    """It is refused before anything is written."""
    damage(work)
    ended = run("export", "--merge")
    assert (ended.code, ended.out, ended.err.count("\n")) == (4, "", 1)
    assert not (work / "model-paca-merged").exists()


def test_the_unexpected_is_exit_code_1_and_one_line(work: Path, run: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newlines in foreign messages do not break the line; -v shows where."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nsecond.")

    monkeypatch.setattr(operate, "apply", fail)
    ended = run("apply", "model", "-o", "new")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "Error: surgery: ZeroDivisionError: first second. surgery -v shows where.\n"
    ended = run("-v", "apply", "model", "-o", "new")
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.rstrip().splitlines()[-1].startswith("Error: surgery: ZeroDivisionError")


def test_an_error_of_the_system_names_the_file(work: Path, run: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operating system says, as it says it."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(operate, "apply", fail)
    ended = run("apply", "model", "-o", "new")
    assert ended.code == 1
    assert ended.err.startswith("Error: surgery: [Errno 28] No space left on device: 'somewhere'.")


@pytest.mark.parametrize("error", (KeyboardInterrupt, click.Abort))
def test_ctrl_c_is_exit_code_130(
    error: type[BaseException], work: Path, run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(operate, "apply", fail)
    ended = run("apply", "model", "-o", "new")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.lstrip("\n") == "Error: surgery: interrupted.\n", "below what the terminal shows of the key"


def test_verbose_shows_a_traceback_and_the_same_last_line(work: Path, run: Console) -> None:
    """And the same exit code."""
    plain, verbose = run("verify", "model-paca"), run("-v", "verify", "model-paca")
    assert plain.code == verbose.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in verbose.err
    assert verbose.err.endswith(plain.err)


# --- quiet


def test_quiet_is_silent_on_standard_error(work: Path, run: Console) -> None:
    """No bar, no remark, no line of transformers'; the result is still printed, and an error still is said."""
    for arguments in (
        ("apply", "model", "-o", "new"), ("train", "model-paca", "--data", "text.txt", *QUICK),
        ("export", "model-paca", "--merge"), ("verify", "model-paca-merged"),
        ("undo", "model-paca-merged", "-o", "again"), ("inspect", "model-paca"),
    ):  # fmt: skip
        ended = run("-q", *arguments)
        assert (ended.code, ended.err) == (0, ""), arguments
        assert ended.out.strip()
    assert run("-q", "verify", "model").err.startswith("Error: ")


def test_quiet_is_silent_on_a_terminal(work: Path, project_root: Path) -> None:
    """Where bars would be drawn: standard error is a terminal, and nothing is written there."""
    shown, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    environment.pop("TQDM_DISABLE", None)
    command = [sys.executable, "-m", "surgery.cli", "-q", "train", "model-paca", "--data", "text.txt", *QUICK]
    ended = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=terminal, check=False, env=environment, cwd=work, timeout=300
    )
    os.write(terminal, b"end")
    os.close(terminal)
    assert (ended.returncode, os.read(shown, 10_000)) == (0, b"end")
    os.close(shown)


def test_a_result_is_all_that_standard_output_gets(work: Path, run: Console) -> None:
    """With a bar on a terminal or without: nothing of it is on standard output."""
    ended = run("train", "model-paca", "--data", "text.txt", *QUICK)
    assert ended.code == 0
    assert "step" not in ended.out.splitlines()[0]
    assert "\r" not in ended.out
    assert "Next: surgery export model-paca --merge" in ended.out


def test_without_a_terminal_the_end_of_training_is_a_line(work: Path, run: Console) -> None:
    """Whoever redirects standard error still sees that something happens."""
    lines = run("train", "model-paca", "--data", "text.txt", *QUICK).err.splitlines()
    assert len([line for line in lines if re.fullmatch(r"step 2/2, loss \d+\.\d{4}", line)]) == 1


def test_a_run_that_was_finished_before_says_so(work: Path, run: Console) -> None:
    """In one line above the same figures, and in the document; the run that did it says neither."""
    line = ("train", "model-paca", "--data", "text.txt", *QUICK, "--resume", "auto")
    first, again, document = run(*line), run(*line), json.loads(run(*line, "--json").out)
    said = "This run had been finished before: nothing was done now.\n"
    assert again.out == said + first.out
    assert document["was_finished"] is True
    assert document["steps"] == 2


# --- apply --plan and the rest


def test_a_plan_touches_nothing(work: Path, run: Console) -> None:
    """It prints layers, values and needs; the folder is as it was, with an output that exists already, too."""
    before = digest_folder(work)
    text, document = run("apply", "model", "--plan"), run("apply", "model", "--plan", "--json")
    assert (text.code, document.code) == (0, 0)
    assert digest_folder(work) == before
    assert "model.layers.*.mlp.down_proj" in text.out
    assert "trained values" in text.out
    assert set(json.loads(document.out)) == {"plan", "need", "step_memory"}


def test_apply_takes_lists_patterns_and_ranks(work: Path, run: Console) -> None:
    """Commas, repetition and `re:` patterns, whose commas are their own."""
    targets = ("--targets", "*.q_proj, *.k_proj", "--targets", "re:.*(v|o)_proj{1,1}", "--exclude", "model.layers.1.*")
    ended = run("apply", "model", "-o", "new", "-r", "4", *targets, "--rank-pattern", "*.v_proj=2", "--json")
    assert ended.code == 0, ended.err
    planned = {t["module"]: t["rank"] for t in json.loads(ended.out)["plan"]["targets"]}
    assert planned == {f"model.layers.0.self_attn.{n}_proj": 2 if n == "v" else 4 for n in "qkvo"}


def test_train_takes_a_recipe_and_overrides_it(work: Path, run: Console) -> None:
    """Flags over the recipe, `key=value` over flags."""
    document = {"model": "model", "data": {"train": ["text.txt"], "max_length": 32}, "train": {"max_steps": 9}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(document))
    ended = run("train", "model-paca", "-c", "recipe.yaml", "max_steps=2", "--json")
    assert json.loads(ended.out)["steps"] == 2
    ended = run("train", "model-paca", "-c", "recipe.yaml", "--device", "cpu", "max_steps=3", "--json")
    assert json.loads(ended.out)["steps"] == 3


RECIPE = {"model": "model", "task": "seq2seq", "labels": ["x"], "data": {"train": ["a"]}, "train": {"max_steps": 9}}
LIBRARY = {
    "apply": "surgery.operate:apply", "train": "surgery.train:train", "train --nproc": "surgery.train:launch",
    "verify": "surgery.verify:verify", "report": "surgery.report.page:report",
    "import": "surgery.peft_paca:import_peft",
}  # fmt: skip
REACHES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        ("apply model -o new -r 4 --targets a --targets b,c --exclude d --rank-pattern e=1 --alpha 2 --select random "
         "--resample every:9 --seed 7 --task regression --labels p,q --overwrite"),
        {
            "out": Path("new"), "task": TaskSpec("regression", ("p", "q")), "overwrite": True,
            "spec": PacaSpec(4, ("a", "b", "c"), ("d",), {"e": 1}, alpha=2.0, seed=7, resample="every:9"),
        },
    ),
    (
        ("apply model --rows a,id:7 --rows b --quantize nf4 --experts own --select gradient --budget 5% "
         "--calibration-data c.jsonl --calibration-data d.jsonl --calibration-columns "
         "text=0,label=1 --calibration-rows 3 --calibration-length 8"),
        {
            "spec": PacaSpec(
                rows=("a", "id:7", "b"), quantize="nf4", experts="own", select="gradient", budget="5%",
                calibration_data=("c.jsonl", "d.jsonl"),
                calibration_columns={"text": "0", "label": "1"}, calibration_rows=3, calibration_length=8,
            ),
        },
    ),
    (
        ("apply model --method read --cell lstm --hidden 8 --recurrent-layers 2 --bidirectional --initial embedding "
         "--reduce mean --output-norm --scale 0.5 --layers last:1 --stacks encoder --joiner mean --pooling first "
         "--seed 3"),
        {
            "out": Path("model-read"), "overwrite": False,
            "spec": ReadSpec(
                cell="lstm", hidden=8, recurrent_layers=2, bidirectional=True, initial="embedding", reduce="mean",
                output_norm=True, scale=0.5, layers="last:1", stacks="encoder", joiner="mean", pooling="first", seed=3,
            ),
        },
    ),
    (
        ("train model-paca -c recipe.yaml --data b --eval-data c --base d --resume auto --overwrite --task regression "
         "--labels p,q --device cpu --cache-features f --cache-bytes 1GB --lean"),
        {
            "data": DataSection(train=["b"], eval=["c"]), "base": "d", "resume": "auto", "overwrite": True,
            "task": TaskSpec("regression", ("p", "q")),
            "settings": TrainSection(max_steps=9, device="cpu", cache_features="f", cache_bytes="1GB", lean="on"),
        },
    ),
    (
        "train model-paca -c recipe.yaml",
        {"task": TaskSpec("seq2seq", ("x",)), "data": DataSection(train=["a"]), "settings": TrainSection(max_steps=9)},
    ),
    (
        "train model-paca -c recipe.yaml --resume auto --data b --data c --nproc 2 --no-lean max_steps=7 -- --nnodes 2",
        {
            "arguments": ["model-paca", "--data=b", "--data=c", "--resume=auto", "--no-lean", "--config=recipe.yaml",
                          "max_steps=7", "--", "--nnodes", "2"],
            "settings": TrainSection(max_steps=7, lean="off"), "nproc": 2,
        },
    ),
    (
        ("export model-paca --merge -o out --dtype bf16 --max-shard-size 1MB --no-verify --prompt p --base b "
         "--overwrite"),
        {
            "out": Path("out"), "format": "safetensors", "dtype": "bf16", "max_shard_size": "1MB", "check": False,
            "prompts": ("p",), "base": "b", "overwrite": True,
        },
    ),
    (
        "export model-paca model-paca --merge --merge-base dequantized",
        {"adapter": (Path("model-paca"), Path("model-paca")), "merge_base": "dequantized"},
    ),
    (
        "import model --base b -o out --task regression --labels p,q --overwrite",
        {"folder": Path("model"), "out": Path("out"), "base": "b", "task": TaskSpec("regression", ("p", "q")),
         "overwrite": True},
    ),
    ("export model-paca --format lora", {"format": "lora", "check": True, "overwrite": False}),
    (
        "export model-paca --merge --format onnx --opset 21 --onnx-data copy --dtype fp16",
        {"format": "onnx", "opset": 21, "onnx_data": "copy", "dtype": "fp16"},
    ),
    (
        "patch theirs.onnx model-paca -o out --base b --overwrite",
        {"onnx": Path("theirs.onnx"), "adapter": Path("model-paca"), "out": Path("out"), "base": "b",
         "overwrite": True},
    ),
    (
        "verify model-paca --adapter a --adapter c --base b --prompt p --no-numeric",
        {"adapter": (Path("a"), Path("c")), "base": "b", "prompts": ("p",), "numeric": False},
    ),
    ("undo model-paca -o again", {"out": Path("again")}),
    (
        "report model-paca model -o r.html --overwrite",
        {"folders": (Path("model-paca"), Path("model")), "out": Path("r.html"), "overwrite": True},
    ),
    (
        "run recipe.yaml max_steps=7 --overwrite --nproc 2",
        {"recipe": Recipe.model_validate({**RECIPE, "train": {"max_steps": 7}}), "overwrite": True, "nproc": 2},
    ),
)  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), REACHES, ids=[line[:20] for line, _ in REACHES])
def test_every_option_reaches_the_library(
    line: str, expected: dict[str, Any], work: Path, run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given on the command line is what the function is called with."""
    (work / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command, *given = line.split()
    called = "train --nproc" if command == "train" and "--nproc" in given else command
    path, _, name = LIBRARY.get(called, f"surgery.workflow:{command}").partition(":")
    module = importlib.import_module(path)
    signature, seen = inspect.signature(getattr(module, name)), {}

    def call(*given: Any, **options: Any) -> None:
        seen.update(signature.bind(*given, **options).arguments)
        raise RequestError("x", "seen")

    monkeypatch.setattr(module, name, call)
    run(*shlex.split(line))
    assert {key: seen.get(key) for key in expected} == expected


# test_bench_run.py, test_cli_plan.py, test_evals_command.py and test_generate.py hold their own
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("bench", "eval", "generate", "plan")])
def test_no_option_is_forgotten_above(name: str) -> None:
    """A new option needs a line that shows where it goes; what is printed is seen elsewhere."""
    said = {word for line, _ in REACHES if line.startswith(f"{name} ") for word in line.split()}
    options = {p.name: p.opts for p in cli.commands[name].params if isinstance(p, click.Option)}
    assert {option for option, words in options.items() if said.isdisjoint(words)} <= {"as_json", "plan_only"}


def test_settings_lists_every_key(run: Console) -> None:
    """Keys with defaults; what a recipe may say."""
    lines = run("settings").out.splitlines()
    assert any(line.split()[:2] == ["paca.rank", "16"] for line in lines)
    assert any(line.split()[:2] == ["train.learning_rate", "0.001"] for line in lines)


def test_from_apply_to_undo(work: Path, run: Console) -> None:
    """Every step by the names that the one before it suggested."""
    shutil.rmtree(work / "model-paca")
    assert "Next: surgery train model-paca --data FILE" in run("apply", "model", "-r", "4").out
    assert "Next: surgery export model-paca --merge" in run("train", "model-paca", "--data", "text.txt", *QUICK).out
    assert "Wrote model-paca-merged" in run("export", "model-paca", "--merge").out
    assert "passed   logits" in run("verify", "model-paca-merged").out
    assert "byte for byte" in run("undo", "model-paca-merged", "-o", "again").out
    assert digest_folder(work / "again") == digest_folder(work / "model")
    assert run("diff", "model", "again").code == 0


# --- real processes


def test_a_real_process_gives_one_document_and_nothing_else(work: Path, project_root: Path) -> None:
    """Warnings, bars and logs of every library that is loaded go elsewhere, or nowhere."""
    command = [sys.executable, "-m", "surgery.cli", "train", "model-paca", "--data", "text.txt", *QUICK, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=work)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 2
    assert "Warning" not in ended.stderr
    assert "Writing model shards" not in ended.stderr


def test_a_stopped_export_leaves_nothing(work: Path, project_root: Path) -> None:
    """SIGTERM while it writes or checks: exit code 130, one line, no output and no part of one."""
    before = digest_folder(work)
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    command = [sys.executable, "-m", "surgery.cli", "export", "--merge"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=work)
    end = time.monotonic() + 180  # importing alone takes a minute where the machine is busy
    while not list(work.glob(".model-paca-merged.*/*")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Error: surgery: stopped by SIGTERM.\n")
    assert digest_folder(work) == before


def test_a_closed_pipe_is_no_error_message(project_root: Path) -> None:
    """As in `surgery settings | head -1`, but surely: the reader is gone before the first byte."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    command = [sys.executable, "-m", "surgery.cli", "settings"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, env=environment)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")
