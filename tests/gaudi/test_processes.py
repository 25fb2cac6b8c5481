"""The command line on a Gaudi: processes of its own, one a card, the mode set in time, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch

from surgery.backends import gaudi
from surgery.delta import ADAPTER_FILE
from tests.conftest import TinyModel
from tests.examples import LABELLED, TEXTS, write_rows
from tests.gaudi.conftest import PROJECT, STANDIN

SURGERY = "import sys; from surgery.cli import main; sys.exit(main(sys.argv[1:]))"
SETTINGS = ("max_length=64", "precision=fp32", "learning_rate=0.02", "max_steps=4", "lr_scheduler=linear")


def surgery(*arguments: object, variables: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; a variable that is None is not set."""
    given = {**os.environ, **(variables or {})}
    environment = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, "-c", SURGERY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def adapter(base: Path, folder: Path) -> Path:
    """A fresh adapter, in a folder whose name a shell would take apart."""
    done = surgery("apply", base, "-r", "4", "-o", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A plain text that fills some blocks."""
    path = tmp_path / "the text.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def test_two_ranks_equal_one_process_with_twice_the_batch(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Through DistributedRunner, with names that have to be quoted; standard output is the result alone."""
    base = tiny_model("llama")
    one, two = (adapter(base, tmp_path / name) for name in ("it's one", "$two; &more"))
    common = ("--data", texts, "--device", "hpu", "--json", *SETTINGS)
    alone = surgery("train", one, *common, "batch_size=6")
    assert alone.returncode == 0, alone.stderr
    both = surgery("train", two, *common, "--nproc", "2", "batch_size=3")
    assert both.returncode == 0, both.stderr
    results = [json.loads(done.stdout) for done in (alone, both)]
    assert [result["steps"] for result in results] == [4, 4]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    a, b = (safetensors.torch.load_file(folder / ADAPTER_FILE) for folder in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[name].double() - b[name].double()).abs().max()) for name in a) < 1e-6
    assert "torch.distributed.run" in both.stderr


def test_a_failing_rank_ends_the_run_with_its_error(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its exit code and its line, once and last, nothing of torchrun's: the data are fewer than one batch of both."""
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    done = surgery("train", folder, "--data", texts, "--device", "hpu", "--nproc", "2", *SETTINGS, "batch_size=50")
    assert done.returncode == 2
    assert "fewer than one batch" in done.stderr.splitlines()[-1]
    assert done.stderr.count("fewer than one batch") == done.stderr.count("Error") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_sigterm_lets_all_ranks_save(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Sent to `surgery train` alone: the step ends, a checkpoint is whole, exit code 130."""
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    own = ("train", folder, "--data", texts, "--device", "hpu", "--nproc", "2", *SETTINGS)
    more = ("batch_size=3", "max_steps=4000", "save_steps=4000", "logging_steps=1")
    command = [sys.executable, "-c", SURGERY, *map(str, (*own, *more))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log, deadline = folder / "training_log.jsonl", time.monotonic() + 200
    while not log.is_file() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 130, error
    stopped = re.match(r"Error: train: stopped at step (\d+), checkpoint-\1 is whole", error.splitlines()[-1])
    assert stopped, error
    assert (folder / "checkpoints" / f"checkpoint-{stopped[1]}").is_dir()


def test_a_launcher_that_fails_itself_is_quoted(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No process of ours was there to say anything: what torchrun says is shown."""
    monkeypatch.setenv("PET_NNODES", "nonsense")  # torchrun's own variable
    assert gaudi.launch([str(tmp_path)], 2) == 1
    said = capfd.readouterr().err
    assert "nonsense" in said
    assert said.splitlines()[-1].startswith("Error: train: the launcher ended with exit code 1. Go on with")


def test_a_recipe_runs_to_its_end(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """`surgery run` in one process: what is exported and verified after training is upstream's, not the vendor's."""
    recipe = {
        "model": str(tiny_model("llama")), "adapter": "adapter", "paca": {"rank": 4},
        "data": {"train": [str(texts)], "max_length": 64}, "export": {"out": "merged"},
        "train": {"device": "hpu", "max_steps": 2, "batch_size": 3, "precision": "fp32"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    done = surgery("run", path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["training"]["device"] == "hpu"
    assert found["verification"]["max_logit_difference"] == 0
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    again = json.loads(surgery("run", path, "--json").stdout)
    assert again["skipped"] == ["apply", "train", "export"]


def test_the_mode_is_set_before_torch_is_imported(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """`surgery train` starts over with the variable; the bridge has read it when torch was imported."""
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    code = (
        "import atexit, sys\n"
        "def say():\n"
        "    from habana_frameworks.torch.device import MODE_AT_IMPORT\n"
        "    print('mode at import:', MODE_AT_IMPORT, file=sys.stderr)\n"
        f"atexit.register(say)\n{SURGERY}"
    )
    arguments = [
        "train",
        folder,
        "--data",
        texts,
        "--device",
        "hpu",
        *SETTINGS,
        "max_steps=1",
        "batch_size=6",
        "hpu_mode=eager",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mode at import: 0" in done.stderr


def test_a_task_that_is_chosen_on_the_gaudi_is_planned_as_elsewhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The plan has upstream's architecture and the groups that upstream's classes show."""
    data = write_rows(tmp_path / "labelled.jsonl", LABELLED)
    plans = []
    for device in ("cpu", "hpu"):
        folder = adapter(tiny_model("llama"), tmp_path / device)
        options = ("--data", data, "--task", "sequence-classification", "--device", device)
        done = surgery("train", folder, *options, "max_length=16", "max_steps=1", "batch_size=6", "precision=fp32")
        assert done.returncode == 0, done.stderr
        document = json.loads((folder / "surgery.json").read_text())
        assert "Gaudi" not in json.dumps(document["plan"])
        assert document["plan"]["config"]["architectures"] == ["LlamaForSequenceClassification"]
        plans.append(document["plan"])
    assert plans[0] == plans[1]


def test_a_base_that_optimum_habana_saved_is_exported_with_upstream_s_name(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Its config.json says GaudiLlamaForCausalLM, which nothing but optimum-habana can load."""
    import shutil

    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**document, "architectures": ["GaudiLlamaForCausalLM"]}))
    folder = adapter(base, tmp_path / "adapter")
    done = surgery("export", folder, "--merge", "-o", tmp_path / "merged", "--no-verify")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written == {**document, "architectures": ["LlamaForCausalLM"]}


# --- what is refused


def without_standin() -> dict[str, str]:
    """The environment of a machine without the vendor's software."""
    return {"PYTHONPATH": str(PROJECT)}


def test_without_the_plugin_it_says_what_is_missing(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Exit code 5 and one line; optimum-habana alone would end in an IndexError. So does --nproc."""
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    for more in ((), ("--nproc", "2")):
        done = surgery("train", folder, "--data", texts, "--device", "hpu", *more, variables=without_standin())
        assert done.returncode == 5
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
        assert line.startswith("Error: --device hpu: habana-torch-plugin is not installed, expected the Gaudi software")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ("train", "run"))
def test_contradictory_modes_are_refused(command: str, texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Exit code 5, before anything is written."""
    base = tiny_model("llama")
    if command == "train":
        arguments = [adapter(base, tmp_path / "adapter"), "--data", texts, "--device", "hpu", "hpu_mode=lazy"]
    else:
        recipe = {"model": str(base), "adapter": str(tmp_path / "made"), "data": {"train": [str(texts)]}}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**recipe, "train": {"device": "hpu", "hpu_mode": "lazy"}}))
        arguments = [path]
    done = surgery(command, *arguments, variables={"PT_HPU_LAZY_MODE": "0"})
    assert done.returncode == 5, done.stderr
    assert "train.hpu_mode: lazy with PT_HPU_LAZY_MODE=0 in the environment, expected PT_HPU_LAZY_MODE=1" in done.stderr
    assert "hpu_mode=eager or compile" in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_library_call_without_the_mode_is_refused(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Nobody restarts somebody else's program: it says what to set."""
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    code = (
        "import sys, surgery\nfrom surgery import DataSection, TrainSection\n"
        "from surgery.errors import SurgeryError\n"
        "try: surgery.train(sys.argv[1], DataSection(train=[sys.argv[2]], max_length=64), TrainSection(device='hpu'))\n"
        "except SurgeryError as error: print(error.exit_code, error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    command = [sys.executable, "-c", code, str(folder), str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.stdout.startswith("5 PT_HPU_LAZY_MODE: not set, expected 1 for hpu_mode=lazy."), done.stderr


def test_a_torch_that_pip_put_over_the_vendor_s_is_refused(texts: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """With the plugin, and torch as an index has it: exit code 5, before anything of the vendor's is called."""
    import shutil

    plugin = tmp_path / "bridge"
    shutil.copytree(STANDIN, plugin, ignore=shutil.ignore_patterns("torch-*.dist-info"))
    folder = adapter(tiny_model("llama"), tmp_path / "adapter")
    paths = {"PYTHONPATH": os.pathsep.join([str(plugin), str(PROJECT)])}
    done = surgery("train", folder, "--data", texts, "--device", "hpu", variables=paths)
    assert done.returncode == 5
    assert "pip has replaced it" in done.stderr


def test_doctor_says_that_the_device_is_usable_but_for_its_tool() -> None:
    """With the stand-in, which has no hl-smi, that alone is missing."""
    report = json.loads(surgery("doctor", "--json").stdout)
    (device,) = [device for device in report["devices"] if device["name"] == "hpu"]
    assert device["detail"] == "no hl-smi on the path"
