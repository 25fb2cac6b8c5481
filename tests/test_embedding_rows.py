"""Embeddings by row: the named tokens' rows train and no others, and a request that cannot be met says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from exporters import dense, undo
from surgery.checkpoint import Checkpoint
from surgery.delta import ColumnDelta, require_columns
from surgery.errors import RequestError, SelectorError, SurgeryError, UnsupportedError
from surgery.exported import load_merged
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, detach, load
from surgery.paca_layers import layers
from surgery.planning import plan_checkpoint
from surgery.runs import notes_of
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.test_paca import OPTIMIZERS, bits, built, logits_of, loss_of, merged_model, trainable
from tests.tiny import sample_inputs
from tests.trained import make_adapter

ROWS = (7, 40, 99)
ONLY = PacaSpec(targets=("embed_tokens",), rows=ROWS)


class Reader(nn.Module):
    """An embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.words(tokens).tanh())


@pytest.mark.parametrize("shape", ((5,), (2, 3), (2, 3, 4), (0, 3)), ids=str)
def test_gradients_are_the_dense_ones(shape: tuple[int, ...]) -> None:
    """A row's gradient is the sum over where its token stands; a row that does not occur has none."""
    ours, theirs = Reader().double(), Reader().double()
    attach(ours, PacaSpec(rank=2, targets=("words", "out"), rows=(3, 9, 10)))
    tokens = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(2))
    for model in (ours, theirs):
        result = model(tokens)
        (result * torch.arange(result.numel(), dtype=torch.float64).reshape(result.shape).cos()).sum().backward()
    expected = theirs.words.weight.grad[[3, 9, 10]].t()
    torch.testing.assert_close(layers(ours)["words"].paca_delta.grad, expected, rtol=1e-12, atol=1e-14)
    assert not bool(layers(ours)["words"].paca_delta.grad[:, 2].any())


def test_numerical_differentiation_agrees() -> None:
    """torch.autograd.gradcheck over the rows."""
    model: Any = Reader().double()
    attach(model, PacaSpec(targets=("words",), rows=(3, 9), alpha=3.0))
    tokens = torch.tensor([[3, 9, 9], [1, 3, 0]])

    def compute(delta: Tensor) -> Tensor:
        from surgery.paca_embedding import _RowsFunction

        model.words.paca_delta.data.copy_(delta.detach())
        model.words.refresh()
        return _RowsFunction.apply(delta, tokens, model.words)

    assert torch.autograd.gradcheck(compute, (torch.randn(6, 2, dtype=torch.float64, requires_grad=True),))


def test_backward_keeps_token_numbers_alone() -> None:
    """However wide the embedding is, and however many of its rows train."""
    tokens, kept = torch.tensor([[3, 9, 1]]), []
    for width, rows in ((6, (3,)), (48, (3,)), (6, (2, 3, 9))):
        model = nn.Sequential(nn.Embedding(11, width))
        attach(model, PacaSpec(targets=("0",), rows=rows))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            model(tokens)
    assert len(kept) == 3
    assert all(tensor.data_ptr() == tokens.data_ptr() for tensor in kept)


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", ("AdamW fused", "writes .data"))
def test_after_a_step_the_model_is_the_merged_one(
    name: str, train: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Rows alone, and beside layers: bit for bit what is exported."""
    for number, targets in enumerate(("embed_tokens", "all-linear")):
        model = built(tiny_model("llama"))
        inputs = {"input_ids": torch.tensor([[5, *ROWS, 11]])}
        before = logits_of(model, inputs)
        attach(model, PacaSpec(rank=4, targets=(targets,), rows=ROWS))
        optimizer = OPTIMIZERS[name](trainable(model))
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()
        seen = logits_of(model, inputs, train=train)
        assert torch.equal(
            seen, logits_of(merged_model(model, tiny_model("llama"), tmp_path / str(number)), inputs, train=train)
        )
        assert not torch.allclose(seen, before)


def test_no_other_row_moves_and_the_base_comes_back() -> None:
    """Weight decay and momentum included; detached, the embedding is the base's and of torch's class."""
    model: Any = Reader()
    before = bits(model)
    attach(model, PacaSpec(targets=("words",), rows=(3, 9)))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(torch.tensor([1, 3, 5])).square().sum().backward()
        optimizer.step()
    model(torch.tensor([1]))
    moved = (model.words.weight != Reader().words.weight).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3]
    detach(model, merge=False)
    assert bits(model) == before
    assert type(model.words) is nn.Embedding


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_way_through_files(dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An untouched merge is the base; a moved one differs in these rows, is verified, undone and loaded."""
    base = tiny_model("llama", dtype=dtype)
    dense.export(surgery.apply(base, tmp_path / "fresh", ONLY), tmp_path / "same")
    weights = "model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (base / weights).read_bytes()
    adapter = make_adapter(base, tmp_path / "moved", ONLY)
    assert [(t.module, t.rows, t.rank) for t in adapter.plan.targets] == [("model.embed_tokens", ROWS, 3)]
    dense.export(adapter, tmp_path / "merged")
    assert verify(tmp_path / "merged").max_logit_difference == 0
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "merged")
    name = "model.embed_tokens.weight"
    moved = (before.read_tensor(name) != after.read_tensor(name)).any(dim=1).nonzero().flatten()
    assert tuple(moved.tolist()) == ROWS
    undo.undo(tmp_path / "merged", tmp_path / "undone")
    assert (tmp_path / "undone" / weights).read_bytes() == (base / weights).read_bytes()
    inputs = sample_inputs("llama")
    assert torch.equal(logits_of(load(tmp_path / "moved"), inputs), logits_of(load_merged(tmp_path / "merged"), inputs))


def test_rows_that_did_not_move_are_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Tokens that no batch had: an export of the others would pass for one of all."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "moved", ONLY)
    assert notes_of(adapter) == ()
    delta = require_columns(adapter.delta, "test")
    (module, patch), saying = next(iter(delta.patches.items())), "not in what was trained on"
    for still, said in (([1], "row 40 of"), ([0, 2], "2 of 3 rows, first 7, of")):
        values = patch.values.clone()
        values[:, still] = patch.original[:, still].float()
        moved = ColumnDelta(delta.plan, {module: replace(patch, values=values)}, {})
        (note,) = notes_of(replace(adapter, delta=moved))
        assert note.startswith(f"{said} model.embed_tokens did not move: {saying}")


def test_tokens_are_named_by_text_or_number(tiny_model: TinyModel, console: Any, tmp_path: Path) -> None:
    """By the folder's tokenizer; the plan has numbers."""
    base = tiny_model("llama")
    plan = plan_checkpoint(Checkpoint.open(base), PacaSpec(targets=("embed_tokens",), rows=("A", "id:7", 9)))
    assert plan.spec["rows"] == [7, 9, 37] or len(plan.spec["rows"]) == 3
    assert plan.targets[0].rows == tuple(sorted(plan.spec["rows"]))
    code, out, _ = console("apply", base, "-o", tmp_path / "a", "--targets", "embed_tokens", "--rows", "A,<mask>")
    assert code == 0
    assert "embed_tokens" in out
    assert "rows" not in plan_checkpoint(Checkpoint.open(base), PacaSpec()).spec


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    (
        (("Zq!",), RequestError, r"--rows: 'Zq!' is 3 tokens of this tokenizer \('Z', 'q', '!'\), expected one token"),
        ((128,), RequestError, r"--rows: row 128 of model\.embed_tokens, expected 0 to 127"),
        ((7, 7), RequestError, "row 7 named twice"),
        ((0,), RequestError, "row 0, the padding token's, which gets no gradient"),
    ),
)
def test_rows_that_cannot_be_met(rows: Any, error: type[SurgeryError], message: str, tiny_model: TinyModel) -> None:
    """The message says what the tokenizer makes of a text."""
    with pytest.raises(error, match=message):
        plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rows=rows))


def test_tied_and_scaled_embeddings_are_refused_with_the_reason(tiny_model: TinyModel) -> None:
    """So are texts for a model in memory, and an embedding that is named without rows."""
    rows = PacaSpec(rows=(7,))
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens is lm_head's too, whose outputs would change"):
        plan_checkpoint(Checkpoint.open(tiny_model("llama", overrides={"tie_word_embeddings": True})), rows)
    with pytest.raises(UnsupportedError, match="ScaledWordEmbedding, a class of its own"):
        plan_checkpoint(Checkpoint.open(tiny_model("gemma3", overrides={"tie_word_embeddings": False})), rows)
    with pytest.raises(RequestError, match="'A' for a model in memory, expected token numbers"):
        attach(built(tiny_model("llama")), PacaSpec(rows=("A",)))
    with pytest.raises(
        SelectorError, match=r"but the embedding model\.embed_tokens.*Name the rows to train with --rows"
    ):
        plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(targets=("embed_tokens",)))
