"""Images: folders, parquet and the hub's tables; what a run makes of them; mirrored alike where a run is resumed."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import surgery
from surgery import images, rows, trainer
from surgery.adapter import open_adapter
from surgery.data import inspect_labels, prepare_images
from surgery.data_spec import DataSpec
from surgery.delta import ADAPTER_FILE
from surgery.errors import DataError, RecipeError, RequestError, UnsupportedError
from surgery.forecast import Question, forecast
from surgery.images import PROCESSOR_FILE, TASK, mirrored, read_processor
from surgery.memory.predict import predict
from surgery.memory.run import Run
from surgery.memory.subject import open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.tiny import image_settings, write_tiny
from surgery.train import TrainResult, train
from tests.measured import measure_ours
from tests.tiny import OTHERS

COLOURS = {"red": (200, 20, 30), "green": (20, 180, 40), "blue": (30, 40, 190)}
SIZE = 32


def draw(colour: str, number: int, *, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """An image that is darker on its left."""
    image = Image.new("RGB", size, COLOURS[colour])
    image.paste((number * 9 % 256, 0, 0), (0, 0, size[0] // 3, size[1]))
    return image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_folder(folder: Path, each: int = 6) -> Path:
    """A folder of images for each class."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(each):
            draw(colour, number).save(folder / colour / f"{number}.png")
    return folder


def with_processor(root: Path, folder: Path, family: str) -> Path:
    """A copy of a checkpoint, and beside its weights the settings of an image processor."""
    shutil.copytree(root, folder)
    (folder / PROCESSOR_FILE).write_text(json.dumps(image_settings(OTHERS[family])))
    return folder


def write_parquet(path: Path, *, image: str = "img", label: str = "label", is_named: bool = True) -> Path:
    """The hub's form: a struct of bytes and path, and numbers that stand for names."""
    names = sorted(COLOURS)
    table = [
        {image: {"bytes": encoded(draw(c, n)), "path": None}, label: names.index(c)} for n in range(4) for c in COLOURS
    ]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    if is_named:
        datasets.Dataset.from_list(table, features=features).to_parquet(path)
    else:
        pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with an image processor's settings."""
    return write_tiny("tiny:vit", tmp_path_factory.mktemp("vit") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of three classes."""
    return write_folder(tmp_path_factory.mktemp("photos") / "train")


Fit = Callable[..., TrainResult]


@pytest.fixture
def fit(vit: Path, photos: Path, tmp_path: Path) -> Fit:
    """Apply (once) and train in `tmp_path/adapter`, or another name."""

    def call(name: str = "adapter", *, resume: str = "no", **settings: Any) -> TrainResult:
        folder = tmp_path / name
        if not folder.exists():
            apply(vit, folder, PacaSpec(rank=8), task=TaskSpec(TASK))
        given = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, **settings}
        data = {key: given.pop(key) for key in list(given) if key in DataSection.model_fields}
        return train(
            folder, DataSection(train=[str(photos)], **data), TrainSection(device="cpu", **given), resume=resume
        )

    return call


def state(folder: Path) -> bytes:
    """What was trained."""
    return (folder / ADAPTER_FILE).read_bytes()


# --- rows


def test_a_folder_of_folders_is_read_in_order(photos: Path) -> None:
    """An image a row, its label the folder's name; hidden folders and other files are none."""
    (photos / "red" / "notes.txt").write_text("x")
    found = list(rows.read_rows(str(photos), columns={}, default_split=None))
    (photos / "red" / "notes.txt").unlink()
    assert [row.values["label"] for row in found] == [c for c in sorted(COLOURS) for _ in range(6)]
    assert found[0].place == found[0].values["image"] == str(photos / "blue" / "0.png")


def test_a_folder_without_such_folders_is_refused(tmp_path: Path) -> None:
    """Images that lie in no class's folder have no label."""
    draw("red", 0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"found a folder, expected a file, or a folder with a folder of images"):
        next(rows.read_rows(str(tmp_path), columns={}, default_split=None))


@pytest.mark.parametrize(("image", "label"), (("img", "label"), ("image", "label"), ("img", "fine_label")))
def test_parquet_of_the_hub_gives_bytes_and_names(image: str, label: str, tmp_path: Path) -> None:
    """The columns of CIFAR-10, of image folders, and of CIFAR-100, whose coarse labels are passed over."""
    path = write_parquet(tmp_path / "a.parquet", image=image, label=label)
    assert inspect_labels(DataSpec((str(path),)), TASK) == ("blue", "green", "red")
    row = next(rows.read_rows(str(path), columns={}, default_split=None))
    assert row.values[image]["bytes"][:4] == b"\x89PNG"


def test_parquet_that_names_nothing_has_numbers_for_classes(tmp_path: Path) -> None:
    """As any other file without names."""
    path = write_parquet(tmp_path / "a.parquet", is_named=False)
    assert inspect_labels(DataSpec((str(path),)), TASK) == ("0", "1", "2")


def test_a_data_set_of_the_hub_stays_encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `load_dataset` decodes on reading is asked for as bytes, under the names of its classes."""
    path = write_parquet(tmp_path / "a.parquet")
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded[0]["img"], Image.Image)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    row = next(rows.read_rows("org/name", columns={}, default_split="train"))
    assert row.values["label"] in COLOURS
    assert row.values["img"]["bytes"][:4] == b"\x89PNG"


@pytest.mark.parametrize("form", ("path", "bytes", "struct of a path"))
def test_an_image_may_be_a_path_or_bytes(form: str, photos: Path, vit: Path, tmp_path: Path) -> None:
    """However it is given, the pixels are those of the file."""
    file = photos / "red" / "1.png"
    value = {"path": str(file), "bytes": file.read_bytes(), "struct of a path": {"bytes": None, "path": str(file)}}
    table = [{"image": value[form], "label": label} for label in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    prepared = prepare_images(DataSpec((str(tmp_path / "a.parquet"),)), processor=read_processor(vit))
    pixels = prepared.collator([prepared.train[0]])["pixel_values"]
    wanted = prepare_images(DataSpec((str(photos),)), processor=read_processor(vit))
    number = 2 * 6 + 1  # blue, green, red
    assert torch.equal(pixels, wanted.collator([wanted.train[number]])["pixel_values"])


def test_pixels_are_what_the_checkpoint_s_own_processor_gives(photos: Path, vit: Path) -> None:
    """Scaled and normalised: (value / 255 - 0.5) / 0.5; the labels in the order of the names."""
    prepared = prepare_images(DataSpec((str(photos),)), processor=read_processor(vit))
    batch = prepared.collator([prepared.train[n] for n in (0, 6, 12)])
    assert batch["labels"].tolist() == [0, 1, 2]
    assert prepared.labels == ("blue", "green", "red")
    assert batch["pixel_values"].shape == (3, 3, SIZE, SIZE)
    right = batch["pixel_values"][:, :, SIZE // 2, -1]
    wanted = torch.tensor([COLOURS[c] for c in prepared.labels]) / 255 * 2 - 1
    assert torch.allclose(right, wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ("grey", "transparent", "palette", "JPEG", "other size"))
def test_any_kind_of_image_becomes_colours_of_one_size(kind: str, vit: Path, tmp_path: Path) -> None:
    """Grey, with an alpha channel, with a palette, lossy, and of other sides."""
    image = draw("red", 1, size=(48, 20) if kind == "other size" else (SIZE, SIZE))
    modes = {"grey": "L", "transparent": "RGBA", "palette": "P"}
    data = encoded(image.convert(modes.get(kind, "RGB")), "JPEG" if kind == "JPEG" else "PNG")
    pq.write_table(pa.Table.from_pylist([{"image": data, "label": n} for n in "ab"]), tmp_path / "a.parquet")
    prepared = prepare_images(DataSpec((str(tmp_path / "a.parquet"),)), processor=read_processor(vit))
    batch = prepared.collator(list(prepared.train))
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert batch["pixel_values"].isfinite().all()


# --- errors


def test_a_file_that_is_no_image_is_named(vit: Path, tmp_path: Path) -> None:
    """Before training begins."""
    folder = write_folder(tmp_path / "photos", each=2)
    (folder / "red" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red/1\.png: found an image that cannot be read.*expected an image file"):
        prepare_images(DataSpec((str(folder),)), processor=read_processor(vit))


def test_an_image_that_is_cut_off_is_named(vit: Path, tmp_path: Path) -> None:
    """Its header is whole, so it is found when it is needed."""
    folder = write_folder(tmp_path / "photos", each=2)
    whole = encoded(draw("red", 3, size=(200, 200)))
    (folder / "red" / "1.png").write_bytes(whole[:-60])
    prepared = prepare_images(DataSpec((str(folder),)), processor=read_processor(vit))
    with pytest.raises(DataError, match=r"red/1\.png: found an image that cannot be read"):
        prepared.collator(list(prepared.train))


@pytest.mark.parametrize(
    ("table", "message"),
    (
        ([{"image": 3, "label": "a"}], r"found 3 in the column 'image', expected an image: a path, bytes, or"),
        ([{"picture": "x", "label": "a"}], r"expected columns for image-classification: image \(image, label\)"),
        ([{"image": "gone.png", "label": "a"}, {"image": "gone.png", "label": "b"}], r"gone\.png: found an image"),
    ),
)
def test_a_row_that_holds_no_image_is_named(
    table: list[Mapping[str, object]], message: str, vit: Path, tmp_path: Path
) -> None:
    """The file, the line, the column."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    with pytest.raises(DataError, match=message):
        prepare_images(DataSpec((str(path),)), processor=read_processor(vit))


def test_settings_of_texts_are_refused_for_images_and_the_other_way_round(fit: Fit, vit: Path, photos: Path) -> None:
    """They would be ignored."""
    for setting in ({"max_length": 64}, {"packing": False}, {"pack_examples": True}):
        with pytest.raises(DataError, match=r"expected (texts with it|the task causal-lm)"):
            prepare_images(DataSpec((str(photos),), **setting), processor=read_processor(vit))
    with pytest.raises(DataError, match=r"data\.horizontal_flip: found it for causal-lm, expected the task image-"):
        inspect_labels(DataSpec((str(photos),), horizontal_flip=True), "causal-lm")
    with pytest.raises(UnsupportedError, match=r"--cache-features: with images, expected texts"):
        fit(cache_features="states")
    with pytest.raises(RecipeError, match=r"train\.warmup_ratio: warmup_steps as well, expected one of the two"):
        fit(warmup_ratio=0.1, warmup_steps=3)


def test_a_model_without_an_image_processor_is_refused(vit: Path, tmp_path: Path) -> None:
    """What it should do to an image is not known; a damaged file is named, too."""
    shutil.copytree(vit, tmp_path / "model")
    (tmp_path / "model" / PROCESSOR_FILE).write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(RequestError, match="its image processor does not load"):
        read_processor(tmp_path / "model")
    (tmp_path / "model" / PROCESSOR_FILE).unlink()
    with pytest.raises(RequestError, match=r"no preprocessor_config\.json, expected the base's"):
        read_processor(tmp_path / "model")


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, vit: Path) -> None:
    """Exit code 5."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedError, match=r"Pillow is not installed.*pip install 'checkpoint-surgery\[images\]'"):
        read_processor(vit)


# --- training


@pytest.mark.slow
def test_a_run_learns_its_classes_and_its_export_is_a_pipeline_s(fit: Fit, photos: Path, tmp_path: Path) -> None:
    """Accuracy rises to all; names and image processor travel into adapter and merge, which a pipeline loads."""
    import transformers

    result = fit(max_steps=24, eval=[str(photos)])
    assert result.before["accuracy"] < 1
    assert result.after["accuracy"] == 1
    assert result.data[0] == "format image, decoded batch by batch"
    assert result.data[1] == "train: 18 rows, 18 examples, 18 carry loss"
    merged = surgery.export(tmp_path / "adapter", tmp_path / "merged")
    assert merged.verification is not None
    assert merged.verification.max_logit_difference == 0
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "merged"), device="cpu")
    for colour in COLOURS:
        assert classify(str(photos / colour / "2.png"))[0]["label"] == colour


def test_read_learns_from_images_too(vit: Path, photos: Path, tmp_path: Path) -> None:
    """A side network beside ViT."""
    apply(vit, tmp_path / "side", ReadSpec(hidden=16), task=TaskSpec(TASK))
    data, settings = DataSection(train=[str(photos)]), TrainSection(max_steps=4, batch_size=6, device="cpu")
    result = train(tmp_path / "side", data, settings)
    assert result.steps == 4
    assert open_adapter(tmp_path / "side").delta.moved


@pytest.mark.slow
def test_parquet_and_folder_give_the_same_adapter(fit: Fit, photos: Path, vit: Path, tmp_path: Path) -> None:
    """The same images by another way: the same bytes."""
    names = sorted(COLOURS)
    files = [path for c in names for path in sorted((photos / c).iterdir())]
    table = [{"image": path.read_bytes(), "label": path.parent.name} for path in files]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    fit()
    apply(vit, tmp_path / "other", PacaSpec(rank=8), task=TaskSpec(TASK))
    settings = TrainSection(device="cpu", max_steps=6, batch_size=4, learning_rate=1e-2, logging_steps=1)
    train(tmp_path / "other", DataSection(train=[str(tmp_path / "a.parquet")]), settings)
    assert state(tmp_path / "other") == state(tmp_path / "adapter")


# --- mirrored


def test_about_half_of_the_images_are_mirrored_by_seed_step_and_row() -> None:
    """The same draw for the same three, another for another; an image is its mirror image or as it was."""
    pixels = torch.randn(64, 3, 4, 6)
    numbers = list(range(64))
    once = mirrored(pixels, numbers, seed=1, step=2)
    assert torch.equal(once, mirrored(pixels, numbers, seed=1, step=2))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(once, pixels, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, once, pixels, strict=True))
    assert 16 < sum(flipped) < 48
    for seed, step in ((2, 2), (1, 3)):
        assert not torch.equal(once, mirrored(pixels, numbers, seed=seed, step=step))
    back = mirrored(pixels.flip(0), numbers[::-1], seed=1, step=2)
    assert torch.equal(back.flip(0), once), "a row's draw does not depend on where it stands"


def test_only_training_batches_are_mirrored(fit: Fit, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are rows in steps; evaluation sees images as they are."""
    seen: list[int] = []

    def count(pixels: torch.Tensor, numbers: list[int], **by: int) -> torch.Tensor:
        seen.extend(numbers)
        return mirrored(pixels, numbers, **by)

    monkeypatch.setattr(trainer, "mirrored", count)
    fit("flipped", horizontal_flip=True, max_steps=5, eval=[str(photos)], eval_steps=2)
    assert len(seen) == 5 * 4 - 2  # 18 rows: the fifth batch has two
    assert sorted(seen) == list(range(18))
    seen.clear()
    fit("plain", max_steps=1)
    assert seen == []


class Stop(Exception):  # noqa: N818  no error: a plug that is pulled
    """The machine stops."""


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", (1, 2))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    accumulation: int, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mirrored images, over the end of an epoch, killed between two checkpoints."""
    settings = {"horizontal_flip": True, "max_steps": 8, "save_steps": 3, "gradient_accumulation": accumulation}
    fit("whole", **settings)
    plain = fit("plain", **{**settings, "horizontal_flip": False})
    assert plain.steps == 8
    assert state(tmp_path / "whole") != state(tmp_path / "plain"), "mirroring changes what is learned"
    calls = []

    def pull(*args: Any, **by: Any) -> Any:
        calls.append(by["step"])
        if by["step"] == 5:
            raise Stop
        return mirrored(*args, **by)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mirrored", pull)
        with pytest.raises(Stop):
            fit("cut", **settings)
    assert max(calls) == 5
    assert fit("cut", resume="auto", **settings).steps == 8
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


@pytest.mark.parametrize("method", ("paca", "read"))
def test_what_a_step_keeps_is_predicted(
    method: str, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`surgery plan` runs the step on pixels without values: within 1 % of what a real one keeps."""
    task, spec = TaskSpec(TASK, tuple(sorted(COLOURS))), PacaSpec(rank=8) if method == "paca" else ReadSpec(hidden=16)
    apply(vit, tmp_path / "adapter", spec, task=task)
    settings = TrainSection(max_steps=1, batch_size=4, device="cpu")
    found = measure_ours(monkeypatch, tmp_path / "adapter", DataSection(train=[str(photos)]), settings, task)
    run = Run(batch=4, sequence=1)
    predicted = predict(open_subject(vit, method, spec, task, run), run, fit_bytes=1_000_000_000)
    assert abs(sum(predicted.activations.values()) / found.saved - 1) < 0.01
    assert (predicted.fits, predicted.longest, predicted.is_of_images) == (True, None, True)
    assert "4 images, weights fp32, cpu" in predicted.lines()
    assert any(line.startswith("fits 1.00 GB") for line in predicted.lines())
    with pytest.raises(RequestError, match="--sequence: given for images"):
        forecast(str(vit), Question(), ["data.max_length=9"])
    assert forecast(str(vit), Question(), ["batch_size=3"]).lines()[1].startswith("3 images")


def test_a_folder_that_changed_is_other_data(fit: Fit, photos: Path, tmp_path: Path) -> None:
    """A finished run on it is not taken for this one. Files are told apart by name and size."""
    assert not fit(resume="auto").was_finished
    assert fit(resume="auto").was_finished
    before = images.folder_digest(photos)
    added = photos / "red" / "9.png"
    draw("red", 9).save(added)
    try:
        with_one_more = images.folder_digest(photos)
        assert with_one_more != before
        added.write_bytes(added.read_bytes() + b" ")
        assert images.folder_digest(photos) != with_one_more
        assert not fit(resume="auto").was_finished
    finally:
        added.unlink()


# --- heads that a classifier has and does not use


def write_siglip(folder: Path, processor: Path) -> Path:
    """A tiny SigLIP with the processor's settings of another model; its vision part pools with packed attention."""
    from transformers import SiglipConfig, SiglipForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    pictures = {**sizes, "image_size": SIZE, "patch_size": 8}
    config = SiglipConfig(text_config={**sizes, **words}, vision_config=pictures, num_labels=3)
    torch.manual_seed(0)
    SiglipForImageClassification(config).save_pretrained(folder)
    shutil.copy(processor / PROCESSOR_FILE, folder / PROCESSOR_FILE)
    return folder


def test_what_no_logit_depends_on_stays_untouched_with_the_reason(vit: Path, photos: Path, tmp_path: Path) -> None:
    """SigLIP's classifier averages the patches: its pooling head would never move, and its own layer trains whole.

    The head is in the merged checkpoint as in the base, and naming it is an error.
    """
    base = write_siglip(tmp_path / "base", vit)
    adapter = apply(base, tmp_path / "adapter", PacaSpec(rank=4), task=TaskSpec(TASK, tuple(sorted(COLOURS))))
    left = {entry.pattern: entry.reason for entry in adapter.plan.untouched}
    reason = "layer on which no logit of SiglipForImageClassification depends"
    parts = ("attention.in_proj_weight", "attention.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert {left[f"vision_model.head.{part}"] for part in parts} == {reason}
    assert [target.parameter for target in adapter.plan.whole] == ["classifier.bias", "classifier.weight"]
    queries = "vision_model.encoder.layers.0.self_attn.q_proj"
    groups = {target.module: target.group for target in adapter.plan.targets}
    assert groups[queries] == groups[queries.replace("q_proj", "v_proj")], "its forward was traced"
    settings = TrainSection(device="cpu", max_steps=3, batch_size=4, learning_rate=1e-2)
    train(tmp_path / "adapter", DataSection(train=[str(photos)]), settings)
    surgery.export(tmp_path / "adapter", tmp_path / "merged")
    assert surgery.verify(tmp_path / "merged").max_logit_difference == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {target.name for target in adapter.plan.targets} | {"classifier.bias", "classifier.weight"}
    with pytest.raises(UnsupportedError, match=rf"'vision_model\.head\.\*' means .*, a {reason}, expected a layer"):
        apply(base, tmp_path / "other", PacaSpec(rank=4, targets=("vision_model.head.*",)), task=TaskSpec(TASK))


def test_a_pooling_head_that_is_used_trains_and_merges() -> None:
    """SigLIP's vision model alone gives what its head pools: packed attention has columns that move, and stay."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    model, pixels = SiglipVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    plan = surgery.attach(model, PacaSpec(rank=4))
    heads = {target.module for target in plan.targets if ".head." in f".{target.module}"}
    assert len(heads) == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pixels).pooler_output.square().sum().backward()
    optimizer.step()
    pooled = model(pixels).pooler_output.detach()
    delta = surgery.operate.collect(model)
    surgery.detach(model, merge=True)
    torch.testing.assert_close(model(pixels).pooler_output, pooled)  # two rows: products round by how memory lies
    for module in heads:
        patch = delta.patches[module]
        assert not torch.equal(patch.values, patch.original.float())
