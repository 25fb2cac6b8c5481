"""Which columns of convolutions and of packed attention train: by score, by budget, drawn anew; rows stand beside."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.adapter import Adapter, open_adapter
from surgery.calibration import calibrate
from surgery.checkpoint import Checkpoint
from surgery.choosing import _sites, changed_data
from surgery.columns import STRATEGIES
from surgery.delta import require_columns
from surgery.errors import RequestError, UnsupportedError
from surgery.images import TASK
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, collect, detach, load, plan_in_full, replanned, resample
from surgery.paca_layers import layers
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.survey import TaskSpec
from surgery.trainer import read_state, write_state
from tests.conftest import TinyModel
from tests.console import Command
from tests.masked import patches_of, require_draws_are_exact, require_merge_equals, run_masked, train_in_turns
from tests.test_images import COLOURS, with_processor, write_folder
from tests.test_other_layers import weigh
from tests.test_paca import trainable

ROWS = (3, 9)
EVERY_KIND = PacaSpec(rank=3, targets=("all-conv", "all-linear"), rows=ROWS)
DATA_STRATEGIES = ("activation", "gradient", "activation-gradient")


class Mixed(nn.Module):
    """Every kind of layer in a row: an embedding, two convolutions and a linear layer about attention."""

    def __init__(self, *, is_cross: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_cross = is_cross
        self.words, self.near = nn.Embedding(11, 6), nn.Conv2d(6, 8, (3, 1), padding=(1, 0))
        self.norm, self.far = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, stride=(1, 2), padding_mode="reflect")
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """tokens (b, l), or (l,) as an image without a batch."""
        image_cl1 = self.words(tokens).transpose(-1, -2).unsqueeze(-1)
        image_cl1 = self.far(self.norm(self.near(image_cl1).reshape(-1, 8, *image_cl1.shape[-2:])).sigmoid())
        x_ble = image_cl1.squeeze(-1).transpose(-1, -2)
        others = (x_ble.flip(1), x_ble.cos()) if self.is_cross else (x_ble, x_ble)
        mixed, _ = self.attention(x_ble, *others, need_weights=self.is_cross)
        result = self.out(x_ble + mixed)
        return SimpleNamespace(logits=result, loss=None if labels is None else weigh(result))


def fed(number: int) -> dict[str, Tensor]:
    """A batch of its own, with every row in it."""
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(number))
    tokens[0, :2] = torch.tensor(ROWS)
    return {"tokens": tokens, "labels": tokens}


def loss_of(model: Any, number: int) -> Tensor:
    """The loss of a batch."""
    loss: Tensor = model(**fed(number)).loss
    return loss


def built(dtype: torch.dtype = torch.float64, *, is_cross: bool = False) -> Mixed:
    """The model, in eval mode."""
    return Mixed(is_cross=is_cross).to(dtype).eval()


def planned(model: nn.Module, spec: PacaSpec = EVERY_KIND) -> SurgeryPlan:
    """What is looked at."""
    plan = attach(model, spec)
    detach(model, merge=False)
    return plan


# --- scores


def attended(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What attention gives its output projection, by its definition: (b, l, e)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.t() + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    parts = []
    for head in range(attention.num_heads):
        at = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        chances = (q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(attention.head_dim)).softmax(-1)
        parts.append(chances @ v[..., at])
    return torch.cat(parts, -1)


def by_hand(model: Mixed, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Each strategy's scores channel by channel, of autograd's dense gradients and of inputs noted on their way."""
    weights = {name: model.get_parameter(name) for name in ("near.weight", "far.weight", "attention.in_proj_weight",
                                                            "attention.out_proj.weight", "out.weight")}  # fmt: skip
    modules = {name: name.rpartition(".")[0] for name in weights}
    found: dict[str, dict[str, list[float]]] = {
        kind: {modules[name]: [0.0] * weight.shape[1] for name, weight in weights.items()} for kind in DATA_STRATEGIES
    }
    seen: dict[str, tuple[Tensor, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, n=name: seen.update({n: args}))
        for name, module in model.named_modules()
    ]
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        seen["attention.out_proj"] = (attended(model.attention, *seen["attention"]),)
        for name, weight in weights.items():
            gradient, module = weight.grad, modules[name]
            for c in range(weight.shape[1]):
                found["gradient"][module][c] += float(gradient[:, c].square().sum())
                found["activation-gradient"][module][c] += float((gradient[:, c] * weight.detach()[:, c]).sum()) ** 2
                inputs = [x[..., c, :, :] if weight.dim() == 4 else x[..., c] for x in seen[module]]
                sizes = weight[:, c].numel() / len(inputs)
                found["activation"][module][c] += sum(float(x.detach().square().sum()) for x in inputs) * sizes
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("way", ("self", "cross", "one image"))
def test_scores_are_those_of_dense_gradients_and_inputs(way: str) -> None:
    """A column of a kernel is o x h x w values; packed attention sees queries, keys and values, then what it mixed."""
    model, batches = built(is_cross=way == "cross"), [fed(number) for number in range(3)]
    if way == "one image":
        batches = [{name: values[0] for name, values in batch.items()} for batch in batches]
    sites = _sites(planned(model))
    expected = by_hand(model, batches)
    before = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    for kind in DATA_STRATEGIES:
        model.zero_grad()
        found = calibrate(model, sites, kind, batches)
        assert found.keys() == expected[kind].keys(), "rows have none"
        for module, scores in found.items():
            wanted = torch.tensor(expected[kind][module], dtype=torch.float64)
            torch.testing.assert_close(
                scores,
                wanted,
                rtol=1e-4,
                atol=1e-6 * float(wanted.max()),
                msg=lambda said, of=(kind, module): f"{of}: {said}",
            )
    assert {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", DATA_STRATEGIES)
def test_the_order_of_batches_does_not_matter(kind: str) -> None:
    """Scores agree to 1e-9, the same batches give the same bits; where scores differ the seed decides nothing."""
    model, batches = built(torch.float32), [fed(number) for number in range(3)]
    sites = _sites(planned(model))
    first, again, other = (calibrate(model, sites, kind, order) for order in (batches, batches, batches[::-1]))
    for name, scores in first.items():
        assert torch.equal(again[name], scores)
        torch.testing.assert_close(other[name], scores, rtol=1e-9, atol=0)
    chosen = []
    for seed in (0, 0, 1):
        model = built(torch.float32)
        attach(model, replace(EVERY_KIND, select=kind, seed=seed), calibration=batches)
        chosen.append({name: layer.paca_columns.tolist() for name, layer in layers(model).items()})
    assert chosen[0] == chosen[1] == chosen[2]
    assert chosen[0]["words"] == list(ROWS)


def test_layers_around_which_torch_has_a_path_of_its_own_are_seen() -> None:
    """An encoder with padding, in eval mode: what is padded is seen, as it is by linear layers elsewhere."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(5) > torch.tensor([[4], [2]])
    batch = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": padding}
    scores = calibrate(model, _sites(planned(model, PacaSpec(rank=2))), "activation", [batch])
    assert len(scores) == 8
    assert all(bool(score.all()) for name, score in scores.items() if not name.endswith("linear2"))
    expected = batch["src"].double().square().sum((0, 1)) * 24
    torch.testing.assert_close(scores["layers.0.self_attn"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("select", ("magnitude", "lowrank"))
def test_convolutions_of_one_input_choose_together(select: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """By the files' own kernels as (o x h x w, i): those of the largest sum, in both."""
    root = tiny_model("resnet")
    plan = surgery.apply(root, tmp_path / "ad", PacaSpec(rank=3, targets=("all-conv",), select=select)).plan
    patches, checkpoint = require_columns(open_adapter(tmp_path / "ad").delta, "test").patches, Checkpoint.open(root)
    groups = {target.group: [t for t in plan.targets if t.group == target.group] for target in plan.targets}
    assert {len(members) for members in groups.values()} == {1, 2}
    for members in groups.values():
        total: Any = 0.0
        for target in members:
            kernel_oihw = checkpoint.read_tensor(target.weight)
            rows = torch.cat([kernel_oihw[:, :, h, w] for h in range(target.sizes[2]) for w in range(target.sizes[3])])
            total = total + STRATEGIES[select].score(rows, seed=0, name=target.weight)
        best = sorted(total.topk(3).indices.tolist())
        assert all(patches[target.module].columns.tolist() == best for target in members)


# --- budgets


@pytest.mark.parametrize("select", ("random", "magnitude"))
@pytest.mark.parametrize(("family", "settings"), (
    ("convnext", {"targets": ("all-conv", "all-linear")}), ("siglip", {}), ("llama", {"rows": (7, 9)}),
))  # fmt: skip
def test_a_budget_is_met_within_one_column(
    family: str, settings: dict[str, Any], select: str, tiny_model: TinyModel
) -> None:
    """Over kernels, packed attention and linear layers by one score; rows are not counted, and are there."""
    root = tiny_model(family)
    every = plan_checkpoint(Checkpoint.open(root), PacaSpec(budget="100%", **settings))
    columns = {target.module: target.in_features for target in every.targets if not target.rows}
    assert all(target.rank == columns.get(target.module, 2) for target in every.targets)
    wide = plan_checkpoint(Checkpoint.open(root), PacaSpec(rank=1, **settings))
    assert [target.module for target in wide.targets] == [target.module for target in every.targets], "none is narrow"
    total = sum(target.out_features * width for target in every.targets for width in [columns.get(target.module, 0)])
    plan = plan_in_full(Checkpoint.open(root), PacaSpec(budget="20%", select=select, **settings), TaskSpec())
    spent = sum(target.trained_values for target in plan.targets if not target.rows)
    costs: dict[str, int] = {}
    for target in every.targets:
        costs[target.group] = costs.get(target.group, 0) + target.out_features
    assert total // 5 - max(costs.values()) < spent <= total // 5
    assert [t.rows for t in plan.targets if t.rows] == ([(7, 9)] if "rows" in settings else [])


# --- drawn anew


@pytest.mark.parametrize("select", ("random", "gradient"))
def test_a_merge_equals_a_dense_run_that_applied_the_same_updates(select: str) -> None:
    """Kernels, packed attention, a linear layer; rows train all along, and their Adam forgets nothing."""
    model = built()
    batches = [fed(99)] if select == "gradient" else []
    attach(model, replace(EVERY_KIND, select=select, resample="every:2"), calibration=batches)
    first = patches_of(model)
    assert {module for module, patch in first.items() if patch.scores is not None} == (
        set(first) - {"words"} if select == "gradient" else set()
    )
    train_in_turns(loss_of, model, 5)
    dense = built()
    run_masked(dense, first, loss_of, steps=5, every=2)
    require_merge_equals(detach(model, merge=True).state_dict(), dense)


def test_draws_change_no_output_and_are_undone() -> None:
    """In bf16: outputs before and after; a state put back into a model that has moved on; the base on closing."""
    model = built(torch.bfloat16)
    attach(model, replace(EVERY_KIND, resample="every:2"))
    known = require_draws_are_exact(loss_of, model, lambda model: model(**fed(0)).logits)
    assert known == {"words"}, "rows, which nobody drew"


# --- the whole way


@pytest.fixture(scope="module")
def convnext(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an image processor, and photos beside it."""
    base = with_processor(tiny_model("convnext"), tmp_path_factory.mktemp("convnext") / "base", "convnext")
    write_folder(base.with_name("photos"))
    return base


def test_chosen_channels_train_in_turns_merge_and_verify(convnext: Path, tmp_path: Path, command: Command) -> None:
    """apply, train, export, verify, undo as commands: by gradients of images, under a budget, drawn anew."""
    photos, adapter, merged = convnext.with_name("photos"), tmp_path / "adapter", tmp_path / "merged"
    chosen = ("--targets", "all-conv,all-linear", "--select", "gradient", "--budget", "20%", "--resample", "every:2")
    looked = ("--calibration-data", photos, "--task", TASK, "--labels", ",".join(sorted(COLOURS)))
    assert command("apply", convnext, "-o", adapter, *chosen, *looked) == (0, "")
    before = open_adapter(adapter)
    assert command("train", adapter, "--data", photos, "max_steps=5", "batch_size=6", "learning_rate=1e-2",
                   "device=cpu")[0] == 0  # fmt: skip
    after = open_adapter(adapter)
    kernels = [target for target in after.plan.targets if target.sizes]
    assert kernels
    widths = require_columns(after.delta, "test").widths()
    assert any(widths[target.module] > target.rank for target in kernels), "more than one set has trained"
    assert after.plan == before.plan
    assert command("export", adapter, "--merge", "-o", merged)[0] == 0
    assert command("verify", merged)[0] == 0
    assert command("undo", merged, "-o", tmp_path / "undone")[0] == 0
    weights = "model.safetensors"
    assert (tmp_path / "undone" / weights).read_bytes() == (convnext / weights).read_bytes()
    again = require_columns(collect(load(adapter, trainable=True)), "test")
    assert again.to_bytes() == require_columns(after.delta, "test").to_bytes()


def test_rows_stand_beside_columns_that_are_chosen_and_drawn(tiny_model: TinyModel, tmp_path: Path) -> None:
    """They are those named, in a new adapter, under another task, after draws and resumed; a file may name them too."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    spec = PacaSpec(
        select="activation", rows=(7, 9), rank=2, calibration_data=(str(text),), calibration_rows=4,
        calibration_length=8, resample="every:1", targets=("embed_tokens", "q_proj"),
    )  # fmt: skip
    adapter = surgery.apply(tiny_model("llama"), tmp_path / "ad", spec)
    assert rows_in(adapter) == (7, 9)
    later = replanned(adapter, Checkpoint.open(tiny_model("llama")), TaskSpec("sequence-classification", ("a", "b")))
    assert require_columns(later, "test").patches["model.embed_tokens"].target.rows == (7, 9)
    model: Any = load(tmp_path / "ad", trainable=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    tokens = torch.tensor([[7, 9, 5, 11]])
    for step in (1, 2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        resample(model, optimizer, step=step)
    saved = surgery.save(model, tmp_path / "moved", base=tiny_model("llama"))
    assert rows_in(saved) == (7, 9)
    assert rows_in(open_adapter(tmp_path / "moved")) == (7, 9)
    assert max(require_columns(saved.delta, "test").widths().values()) > 2
    write_state(model, adapter.plan, tmp_path / "state")
    again: Any = load(tmp_path / "ad", trainable=True)
    read_state(again, adapter.plan, tmp_path / "state")
    resumed = surgery.save(again, tmp_path / "resumed", base=tiny_model("llama"))
    assert resumed.delta.to_bytes() == saved.delta.to_bytes()
    named = PacaSpec(select=f"file:{tmp_path / 'ad'}", rows=(7, 9), targets=spec.targets)
    assert rows_in(surgery.apply(tiny_model("llama"), tmp_path / "again", named)) == (7, 9)
    with pytest.raises(RequestError, match=r"other rows for model\.embed_tokens than --rows names"):
        surgery.apply(tiny_model("llama"), tmp_path / "x", replace(named, rows=(7, 8)))


def rows_in(adapter: Adapter) -> tuple[int, ...]:
    """The rows of an adapter's embedding, which are all that is there of it."""
    patch = require_columns(adapter.delta, "test").patches["model.embed_tokens"]
    assert patch.active is None
    assert patch.scores is None
    assert tuple(patch.columns.tolist()) == patch.target.rows
    return patch.target.rows


@pytest.mark.parametrize("setting", (("--select", "magnitude"), ("--budget", "1%"), ("--resample", "every:5")))
def test_with_rows_alone_there_is_nothing_to_choose(
    setting: tuple[str, str], tiny_model: TinyModel, tmp_path: Path, command: Command
) -> None:
    """Exit code 2, with what to do, and nothing written."""
    rows = ("--targets", "embed_tokens", "--rows", "id:7", "-o", tmp_path / "x")
    code, said = command("apply", tiny_model("llama"), *rows, *setting)
    assert code == 2
    assert said.startswith(
        f"Error: {setting[0]}: rows alone train, which --rows names, expected columns to choose. Leave"
    )
    assert not (tmp_path / "x").exists()


def test_a_file_names_channels_whatever_the_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A kernel narrower than the default's rank is no exception; one that a file leaves out can be left out."""
    path = tmp_path / "columns.json"
    root, stem = tiny_model("convnext"), "convnext.embeddings.patch_embeddings"
    path.write_text(json.dumps({stem: [2, 0]}))
    spec = PacaSpec(select=f"file:{path}", targets=("all-conv",))
    with pytest.raises(RequestError, match=r"no columns for convnext\.encoder.*Leave it out with --exclude convnext\."):
        surgery.apply(root, tmp_path / "x", spec)
    adapter = surgery.apply(root, tmp_path / "ad", replace(spec, exclude=("downsampling_layer.1",)))
    patches = require_columns(adapter.delta, "test").patches
    assert {module: patch.columns.tolist() for module, patch in patches.items()} == {stem: [0, 2]}


def test_a_model_without_a_loss_is_looked_at_by_its_inputs_alone() -> None:
    """Gradients need one; what a plain module returns has none."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    spec = PacaSpec(rank=1, targets=("all-conv",), select="gradient")
    batch = {"input": torch.randn(2, 3, 5, 5)}
    with pytest.raises(UnsupportedError, match="Sequential gives no loss"):
        attach(model, spec, calibration=[batch])
    attach(model, replace(spec, select="activation"), calibration=[batch])
    best = int(batch["input"].square().sum((0, 2, 3)).argmax())
    assert layers(model)["0"].paca_columns.tolist() == [best]


def test_photos_decide_the_classes_and_are_recorded(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of a checkpoint with classes of its own the head is for the folder's; a photo that changes is noticed."""
    base = with_processor(tiny_model("convnext"), tmp_path / "base", "convnext")
    photos = write_folder(tmp_path / "photos", each=2)
    shutil.copytree(photos / "red", photos / "scarlet")
    spec = PacaSpec(rank=4, targets=("all-conv",), select="gradient", calibration_data=(str(photos),))
    plan = surgery.apply(base, tmp_path / "ad", spec, task=TaskSpec(TASK)).plan
    assert plan.labels == ("blue", "green", "red", "scarlet")
    assert changed_data(plan) == ()
    with (photos / "red" / "0.png").open("ab") as file:
        file.write(b" ")
    assert changed_data(plan) == (str(photos),)
