"""`surgery plan` on the command line: models, recipes, adapters, what fits, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from surgery import forecast
from surgery.checkpoint import CONFIG_FILE
from surgery.cli import cli
from surgery.errors import NotAModelError, RecipeError, RequestError, SurgeryError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.table import size_text
from tests.conftest import TinyModel
from tests.examples import QUESTIONS, TEXTS, write_rows


def run(*arguments: str | Path) -> Result:
    """`surgery plan` with these arguments."""
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], catch_exceptions=True)


def answer(*arguments: str | Path) -> Any:
    """The JSON document. Raises what the command raises."""
    result = run(*arguments, "--json")
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture
def bare(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A folder that holds a Llama's config.json and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_model("llama") / CONFIG_FILE, folder)
    return folder


def test_lines(bare: Path) -> None:
    """What people read: the run, a table whose sum is the last line, whether it fits, and what is assumed."""
    result = run(bare, "--device", "cuda", "--batch", "2", "--sequence", "64", "--fit", "500kB")
    assert not result.exception
    head, shape, *lines = result.stdout.splitlines()
    assert head == "LlamaForCausalLM, paca, 7,168 trained values"
    assert shape == "2 x 64 tokens, weights fp32, autocast bf16, cuda"
    names = (
        "weights,columns,gradients,optimizer,temporary,kept for backward,  attention,  norms,  MLP,  gathered columns"
    )
    for name in (*names.split(","), "  logits and loss", "sum"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert any(line.startswith("does not fit 500.00 kB: ") for line in lines)
    assert any(line.startswith("longest sequence that fits: ") for line in lines)
    assert any(line.startswith("note: CUDA: flash attention") for line in lines)
    assert lines[-1].endswith("the device's context")


def test_document(bare: Path) -> None:
    """The same as JSON: parts and activations make the total, settings are recorded."""
    document = answer(bare, "train.batch_size=2", "max_length=64", "--method", "lora", "-r", "2", "--fit", "10MB")
    assert document["total"] == sum(document["parts"].values()) + sum(document["activations"].values())
    assert document["run"]["batch"] == 2
    assert document["run"]["sequence"] == 64
    assert document["method"] == "lora"
    assert document["fits"] is True
    assert document["longest"] == document["positions"] == 128


def test_methods_and_settings(bare: Path) -> None:
    """Each method takes its own settings from a recipe's keys."""
    full, paca, read = (answer(bare, "--method", method)["trained_values"] for method in ("full", "paca", "read"))
    assert read > full > paca > 0
    assert answer(bare, "paca.rank=8")["trained_values"] * 2 == paca
    assert answer(bare, "--method", "read", "read.hidden=8")["trained_values"] < read
    with pytest.raises(RecipeError, match="settings of read"):
        answer(bare, "read.hidden=8")


def test_every_option_reaches_its_place(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given on the command line is what is asked, as a question or as a recipe's key."""
    line = (
        "--method lora --rank 3 --batch 2 --sequence 9 --target-sequence 4 --padded --dtype bf16 --precision fp16 "
        "--checkpointing --lean --device cuda --devices 2 --sharding zero3 --fit 3kB --task seq2seq"
    )
    seen: list[Any] = []

    def ask(*given: Any) -> None:
        seen.extend(given)
        raise RequestError("x", "seen")

    monkeypatch.setattr(forecast, "forecast", ask)
    assert isinstance(run(bare, "labels=[a]", *line.split()).exception, RequestError)
    path, question, settings = seen
    assert path == str(bare)
    assert question == forecast.Question("lora", 4, True, "bf16", "cuda", 2, "zero3", 3000)
    assert set(settings) == {
        "labels=[a]", "paca.rank=3", "train.batch_size=2", "data.max_length=9", 'train.precision="fp16"',
        'task="seq2seq"', "train.gradient_checkpointing=true", "train.lean=true",
    }  # fmt: skip
    options = [p for p in cli.commands["plan"].params if isinstance(p, click.Option) and p.name != "as_json"]
    assert all(set(option.opts) & set(line.split()) for option in options)


def test_default_length(bare: Path) -> None:
    """1024 tokens, or the model's positions where those are fewer; a length that was asked for is not cut."""
    assert answer(bare)["run"]["sequence"] == 128
    with pytest.raises(RequestError, match="--sequence: 200 tokens, expected at most 128"):
        answer(bare, "--sequence", "200")


def test_sharded(bare: Path) -> None:
    """Devices take their parts of the weights."""
    one, four = answer(bare), answer(bare, "--devices", "4", "--sharding", "fsdp2")
    assert four["parts"]["weights"] * 4 == one["parts"]["weights"]
    assert four["activations"] == one["activations"]
    assert answer(bare, "--devices", "4")["run"]["sharding"] == "ddp"


def test_recipe(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A recipe's own numbers; whether rows are packed is read from its data; overrides hold."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": q, "completion": a} for q, a in QUESTIONS])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: model\npaca: {rank: 3}\ndata: {train: [text.txt], max_length: 48}\n"
        "train: {batch_size: 5, gradient_checkpointing: true, device: cpu, precision: fp32}\n",
        encoding="utf-8",
    )
    found = answer(recipe)
    shown = {name: found["run"][name] for name in ("batch", "sequence", "checkpointing", "padded", "device")}
    assert shown == {"batch": 5, "sequence": 48, "checkpointing": True, "padded": False, "device": "cpu"}
    assert answer(recipe, "batch_size=1")["run"]["batch"] == 1
    assert answer(recipe, f"data.train=[{tmp_path / 'pairs.jsonl'}]")["run"]["padded"] is True
    assert answer(recipe, f"data.train=[{tmp_path / 'pairs.jsonl'}]", "pack_examples=true")["run"]["padded"] is False
    assert answer(recipe, "--method", "full")["trained_values"] > found["trained_values"]
    assert answer(recipe, "--padded")["run"]["padded"] is True


def test_how_a_recipe_trains(tiny_model: TinyModel) -> None:
    """Its strategy is the sharding, its offloading empties the device, its attention is run; the rest is said."""
    folder = Path(__file__).resolve().parent.parent / "recipes" / "distributed"
    ours = (f"model={tiny_model('llama')}", "paca.rank=4", "data.max_length=64", "--device", "cuda")
    for name in ("fsdp2", "zero3"):
        found = answer(folder / f"{name}.yaml", *ours, "--devices", "4")
        assert found["run"]["sharding"] == name
        with pytest.raises(RequestError, match=f"--sharding: {name} with 1 device, .* Say with --devices"):
            answer(folder / f"{name}.yaml", *ours)
        assert (
            answer(folder / f"{name}.yaml", *ours, "cpu_offload=false", "--sharding", "none")["run"]["sharding"]
            == "none"
        )
    kept = {name: answer(tiny_model("llama"), *ours[1:], f"train.attention={name}") for name in ("auto", "eager")}
    assert kept["eager"]["activations"]["attention"] > kept["auto"]["activations"]["attention"]
    assert kept["eager"]["activations"]["MLP"] == kept["auto"]["activations"]["MLP"]
    asked = ("train.compile=true", "liger=true", "attention=flash_attention_2", "--padded")
    notes = "; ".join(answer(tiny_model("llama"), *ours[1:], *asked)["notes"])
    for said in ("train.compile is not predicted", "train.liger is not", "flash_attention_2 takes the padding out"):
        assert said in notes


@pytest.mark.parametrize("strategy", ("fsdp2", "zero2", "zero3"))
def test_what_is_offloaded_is_not_on_the_device(strategy: str, bare: Path) -> None:
    """ZeRO-2 keeps the weights there, the others only what they gather; the rest is as it was."""
    line = (bare, "--device", "cuda", "--devices", "2", f"train.strategy={strategy}")
    there, away = answer(*line), answer(*line, "train.cpu_offload=true")
    gone = {"gradients", "optimizer"} | ({"weights", "columns"} if strategy != "zero2" else set())
    assert {name for name, size in away["parts"].items() if size != there["parts"][name]} == gone
    assert all(away["parts"][name] == 0 for name in gone)
    assert away["activations"] == there["activations"]


def test_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter's own plan, also where its base has gone; what its plan has decided cannot be asked again."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    adapter = apply(base, tmp_path / "adapter", PacaSpec(rank=2, targets=("q_proj",)))
    found = answer(tmp_path / "adapter")
    assert found["trained_values"] == adapter.plan.trained_values
    shutil.rmtree(base)
    assert answer(tmp_path / "adapter") == found
    record = tmp_path / "adapter" / "surgery.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace('"kind": "adapter"', '"kind": "merged"'), encoding="utf-8")
    with pytest.raises(NotAModelError, match="a folder of kind 'merged', expected a model, an adapter or a recipe"):
        answer(tmp_path / "adapter")
    record.write_text(text, encoding="utf-8")
    for wrong in (("--method", "lora"), ("--rank", "3"), ("read.hidden=3",)):
        with pytest.raises(RequestError, match="with an adapter, whose plan is made"):
            answer(tmp_path / "adapter", *wrong)


def test_apply_shows_it_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`apply --plan` has the short form, and says why where there is none."""
    arguments = ["apply", str(tiny_model("llama")), "--plan", "-r", "4", "-o", str(tmp_path / "out")]
    lines = CliRunner().invoke(cli, arguments).stdout.splitlines()
    assert "a step of 8 x 128 tokens on c" in lines[-1]
    document = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert document["step_memory"]["total"] > 0
    passing = size_text(document["step_memory"]["parts"]["temporary"])
    assert f", {passing} for a moment" in lines[-1], "it is no part of what the weights take"
    masked = CliRunner().invoke(
        cli, ["apply", str(tiny_model("bert")), "--plan", "-r", "4", "-o", str(tmp_path / "out")]
    )
    assert "a step's memory is not predicted: plan: the task features" in masked.stdout.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    (
        (("--fit", "much"), RequestError, "--fit: 'much' is no size"),
        (("--fit", "-3GB"), RequestError, "--fit: '-3GB' is no size"),
        (("--method", "loar"), RequestError, "--method: unknown name 'loar'.*closest is 'lora'"),
        (("--devices", "2", "--sharding", "zero4"), RequestError, "--sharding: unknown name 'zero4'.*closest is 'zero"),
        (("--device", "hpu"), UnsupportedError, "--device hpu: no prediction"),
        (("attention=flash_attention_2", "--device", "cpu"), UnsupportedError, "train.attention: .* the device is cpu"),
        (("cpu_offload=true", "--device", "cuda"), RequestError, "train.cpu_offload: true with strategy none"),
        (("--device", "tpu"), RequestError, "--device: unknown name 'tpu', expected one of cpu, cuda"),
        (("--task", "causal"), RequestError, "--task: unknown task 'causal'"),
        (("paca.ranks=3",), RecipeError, "unknown key 'paca.ranks'.*closest is 'rank'"),
        (("--method", "full", "--rank", "3"), RequestError, "settings: those of paca, and method full"),
        (("--method", "lora", "read.hidden=3"), RequestError, "settings: those of read, and method lora"),
        (("--target-sequence", "3"), RequestError, "--target-sequence: given for causal-lm"),
        (("--rank", "1000"), RequestError, "--rank: 1000 for .*, expected 1 to"),
    ),
)
def test_refused(arguments: tuple[str, ...], kind: type[SurgeryError], message: str, bare: Path) -> None:
    """Each is the documented error, and names what is near."""
    with pytest.raises(kind, match=message):
        answer(bare, *arguments)


def test_no_model(tmp_path: Path) -> None:
    """A folder without config.json, a path that is not there, and a recipe that is not."""
    with pytest.raises(NotAModelError, match=r"no config\.json"):
        answer(tmp_path)
    with pytest.raises(NotAModelError, match="no such folder"):
        answer(tmp_path / "nowhere")
    with pytest.raises(NotAModelError, match=r"the hub did not give its config\.json"):
        answer("nobody/nothing")
    with pytest.raises(RecipeError, match="it cannot be read"):
        answer(tmp_path / "nothing.yaml")


def test_experts_in_fp32(tiny_model: TinyModel) -> None:
    """The operators of a mixture's experts run without values in one dtype and are stood in for in the other."""
    for dtype in ("fp32", "bf16"):
        assert answer(tiny_model("mixtral"), "--dtype", dtype)["activations"]["MLP"] > 0
