"""nn.MultiheadAttention: both projections train, and it computes what torch's own class does, masks and all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from exporters import dense, undo
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.exported import load_merged, run_model
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import attach, detach, load
from surgery.paca_layers import layers, read_columns
from surgery.planning import plan_checkpoint
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.test_paca import OPTIMIZERS, bits, trainable
from tests.tiny import sample_inputs
from tests.trained import make_adapter

WIDTH, HEADS, BATCH, LENGTH, KEYS = 8, 2, 3, 5, 7
RANK_3 = PacaSpec(rank=3)


class Holder(nn.Module):
    """Attention in a model, fed in one of the ways there are."""

    def __init__(self, kind: str, *, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, bias=bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
        given = {"self": (query, query, query), "cross": (query, key, key), "three": (query, key, value)}[self.kind]
        return self.attention(*given, **settings)


def fed(*, batch_first: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(BATCH, length, WIDTH) for length in (LENGTH, KEYS, KEYS)]
    drawn = [torch.randn(size, dtype=dtype, generator=generator) for size in sizes]
    return [x if batch_first else x.transpose(0, 1).contiguous() for x in drawn]


def run(model: nn.Module, inputs: list[Tensor], settings: dict[str, Any]) -> tuple[Tensor, Tensor | None, list[Any]]:
    """Output, weights and the inputs' gradients."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    output, weights = model(*given, **settings)
    (output * torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).cos()).sum().backward()
    return output.detach(), weights, [x.grad for x in given]


def masks(name: str, keys: int) -> dict[str, Any]:
    """What may be masked, as booleans and as addends."""
    hidden = torch.zeros(LENGTH, keys, dtype=torch.bool)
    hidden[1, 2] = hidden[3, 0] = True
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[1, -2:] = True
    added = torch.randn(BATCH * HEADS, LENGTH, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": hidden},
        "by head": {"attn_mask": added},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(LENGTH, keys, dtype=torch.bool).triu(1), "is_causal": True},
    }[name]


@pytest.mark.parametrize("weights", ("fused", "averaged", "by head"))
@pytest.mark.parametrize("mask", ("none", "padding", "boolean", "by head", "both", "causal"))
@pytest.mark.parametrize("kind", ("self", "cross", "three"))
def test_it_computes_what_torch_s_does(kind: str, mask: str, weights: str) -> None:
    """Bit for bit, with the dense gradients of input and columns, of both projections."""
    for batch_first in (True, False):
        theirs = Holder(kind, batch_first=batch_first, bias=batch_first).double()
        ours = copy.deepcopy(theirs)
        attach(ours, RANK_3)
        settings = masks(mask, LENGTH if kind == "self" else KEYS)
        settings |= {"need_weights": weights != "fused", "average_attn_weights": weights != "by head"}
        inputs = fed(batch_first=batch_first)
        mine, plain = run(ours, inputs, settings), run(theirs, inputs, settings)
        # Whether weights ask for gradients decides which kernel torch's matmul takes: frozen ones beside frozen ones.
        frozen = run(copy.deepcopy(theirs).requires_grad_(requires_grad=False), inputs, settings)
        assert torch.equal(mine[0], frozen[0])
        assert (mine[1] is None) == (frozen[1] is None)
        if mine[1] is not None and frozen[1] is not None:
            assert torch.equal(mine[1], frozen[1])
        for ours_x, theirs_x in zip(mine[2], plain[2], strict=True):
            assert (ours_x is None) == (theirs_x is None)
            if ours_x is not None:
                torch.testing.assert_close(ours_x, theirs_x, rtol=1e-12, atol=1e-13)
        assert set(layers(ours)) == {"attention", "attention.out_proj"}
        for name, layer in layers(ours).items():
            dense_gradient = theirs.get_parameter(
                f"{name}.{'in_proj_weight' if name == 'attention' else 'weight'}"
            ).grad
            assert dense_gradient is not None
            expected = read_columns(dense_gradient, layer.paca_columns, 1)
            torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-12, atol=1e-13)


def test_one_sequence_without_a_batch() -> None:
    """As torch's class takes it."""
    theirs = Holder("cross").double()
    ours = copy.deepcopy(theirs)
    attach(ours, RANK_3)
    inputs = [x[0] for x in fed()]
    for settings in ({}, {"key_padding_mask": torch.arange(KEYS) > 4, "need_weights": False}):
        mine, plain = run(ours, inputs, settings), run(theirs, inputs, settings)
        torch.testing.assert_close(mine[0], plain[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine[2][1], plain[2][1], rtol=1e-12, atol=1e-13)
        for name, weight in (("attention", "in_proj_weight"), ("attention.out_proj", "weight")):
            layer, dense_one = layers(ours)[name], theirs.get_parameter(f"{name}.{weight}")
            expected = read_columns(dense_one.grad, layer.paca_columns, 1)
            torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-12, atol=1e-13)


def test_what_backward_keeps_of_the_packed_projection_are_channels() -> None:
    """Of an input that feeds three projections: its trained channels, once."""
    model = Holder("self").double()
    attach(model, PacaSpec(rank=3, targets=("attention",)))
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = fed()[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x, x, x, need_weights=False)
    assert sum(tensor.shape[-1] == 3 for tensor in kept) == 1
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)


@pytest.mark.parametrize("targets", ("all-linear", "attention", "out_proj", "linear1"))
def test_an_encoder_layer_in_eval_mode_right_after_a_step(targets: str) -> None:
    """torch's fast path reads weights without calling layers: it must not read stale ones."""
    torch.manual_seed(0)
    model = nn.Module()
    names = {"attention": "self_attn"}
    model.block = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    attach(model, PacaSpec(rank=3, targets=(names.get(targets, targets),)))
    x = fed(dtype=torch.float32)[0]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05, fused=True)
    model.train()
    model.block(x).square().mean().backward()
    optimizer.step()
    plain = copy.deepcopy(model)
    model.eval()
    with torch.no_grad():
        seen = model.block(x)
    surgery.operate.detach(plain, merge=True)
    plain.eval()
    assert not any(len(module._forward_pre_hooks) for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(seen, plain.block(x), rtol=1e-5, atol=1e-6)
        before = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True).eval()
        before.load_state_dict(plain.block.state_dict())
        assert torch.equal(plain.block(x), before(x))


def test_detaching_gives_the_base_back() -> None:
    """Its class, its values, its attributes."""
    model = Holder("self")
    before, fields = bits(model), [sorted(vars(module)) for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    for spec in (RANK_3, PacaSpec(rank=3, targets=("out_proj",))):
        attach(model, spec)
        model.train()
        model(*fed(dtype=torch.float32))[0].square().mean().backward()
        torch.optim.SGD(trainable(model), lr=1.0).step()
        model(*fed(dtype=torch.float32))
        assert bits(model) != before
        detach(model, merge=False)
        assert bits(model) == before
        assert [sorted(vars(module)) for module in model.modules()] == fields
        assert [type(module) for module in model.modules()] == kinds


def test_attention_of_other_widths_is_refused_with_the_reason() -> None:
    """And with keys that are added."""
    model = nn.Module()
    model.mixed = nn.MultiheadAttention(WIDTH, HEADS, kdim=6)
    model.more = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
    with pytest.raises(UnsupportedError, match="attention with added keys"):
        attach(model, PacaSpec(rank=2, targets=("more",)))
    with pytest.raises(UnsupportedError, match="of different widths"):
        attach(model, PacaSpec(rank=2, targets=("mixed.out_proj",)))


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
def test_after_a_step_the_model_is_the_merged_one(train: bool, tiny_model: TinyModel, tmp_path: Path) -> None:
    """SigLIP's pooled output right after steps is that of the merged checkpoint, bit for bit, and has moved."""
    base = tiny_model("siglip")
    model, inputs = load_merged(base), sample_inputs("siglip")
    attach(model, RANK_3)
    before = model(**inputs).pooler_output.detach()
    optimizer = OPTIMIZERS["AdamW fused"](trainable(model))
    for seed in range(2):
        optimizer.zero_grad()
        model.train()(**sample_inputs("siglip", seed=seed)).pooler_output.square().mean().backward()
        optimizer.step()
    seen = model.train(train)(**inputs).pooler_output.detach()
    surgery.save(model, tmp_path / "adapter", base=base)
    dense.export(surgery.adapter.open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    merged = load_merged(tmp_path / "merged").requires_grad_(requires_grad=False)  # which decides the kernel
    assert torch.equal(merged.train(train)(**inputs).pooler_output, seen)
    assert not torch.allclose(seen, before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_way_through_files(dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """SigLIP's pooling head: planned, merged exactly, verified, undone, loaded."""
    base = tiny_model("siglip", dtype=dtype)
    spec = PacaSpec(rank=4)
    plan = plan_checkpoint(Checkpoint.open(base), spec)
    packed = [target for target in plan.targets if target.parameter == "in_proj_weight"]
    assert [(target.out_features, target.in_features) for target in packed] == [(96, 32)]
    dense.export(surgery.apply(base, tmp_path / "fresh", spec), tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    make_adapter(base, tmp_path / "moved", spec)
    dense.export(surgery.adapter.open_adapter(tmp_path / "moved"), tmp_path / "merged")
    assert verify(tmp_path / "merged").max_logit_difference == 0
    undo.undo(tmp_path / "merged", tmp_path / "undone")
    assert (tmp_path / "undone" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    inputs = {k: v.to(dtype) for k, v in sample_inputs("siglip").items()}
    ours, theirs = load(tmp_path / "moved", trainable=True), load_merged(tmp_path / "merged")
    ours.eval()
    theirs.requires_grad_(requires_grad=False)  # which decides the kernel
    assert torch.equal(ours(**inputs).pooler_output, theirs(**inputs).pooler_output)  # with gradients: our own forward
    assert torch.equal(run_model(ours, [inputs])[0], run_model(theirs, [inputs])[0])
