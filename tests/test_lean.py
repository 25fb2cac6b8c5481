"""Lean blocks: the same values, fewer bytes for backward, and nothing left of them."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

from surgery import lean_blocks, lean_functions, lean_pass
from surgery.acceleration import choose_lean, prepare
from surgery.adapter import open_adapter
from surgery.bench.measure import saved_bytes
from surgery.bench.methods import as_floor
from surgery.cli import cli
from surgery.compat import keep_no_cache, set_checkpointing
from surgery.errors import CheckError, RequestError, UnsupportedError
from surgery.lean_blocks import Lean
from surgery.lean_functions import ACTIVATIONS, IGNORED, Logits, Norm, activate, linear_cross_entropy, rms_norm
from surgery.lean_kernels import OURS, choose_kernels
from surgery.lean_pass import LEAN, is_lean, restore, rewrite
from surgery.memory.live import LiveBytes
from surgery.memory.predict import predict
from surgery.memory.run import Run
from surgery.memory.subject import open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply, attach, detach
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from tests.conftest import TinyModel
from tests.console import Command
from tests.examples import TEXTS
from tests.measured import measure_ours
from tests.tiny import build_model, sample_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
GATED_T5: Mapping[str, object] = {"feed_forward_proj": "gated-gelu"}
# (family, its overrides, what is lean in it: norms, gates, activations, the loss)
FOUND: Mapping[str, tuple[Mapping[str, object], tuple[int, int, int, bool]]] = {
    "llama": ({}, (5, 2, 0, True)),
    "qwen3": ({}, (9, 2, 0, True)),
    "gemma2": ({}, (9, 2, 0, True)),
    "gemma3": ({}, (13, 2, 0, True)),
    "phi3": ({}, (5, 2, 0, True)),
    "gpt2": ({}, (0, 0, 2, True)),
    "opt": ({}, (0, 0, 0, True)),
    "t5": (GATED_T5, (12, 4, 0, False)),
    "mixtral": ({}, (5, 0, 0, True)),
}


def batch_of(family: str, *, tokens: int = 9) -> dict[str, Tensor]:
    """Inputs with labels, some of which do not count."""
    batch = sample_inputs(family, tokens=tokens)
    batch["labels"] = batch.pop("decoder_input_ids", batch["input_ids"]).clone()
    batch["labels"][0, :3] = IGNORED
    return batch


def built(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Any:
    """A tiny model without dropout, ready to train."""
    model: Any = build_model(family, overrides=overrides)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name.endswith("dropout") or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    keep_no_cache(model)
    return model.to(dtype).train()


def pair(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> tuple[Any, Any]:
    """A model with PaCA in it, whose embeddings ask for a gradient, and the same made lean."""
    plain = built(family, dtype, tie_word_embeddings=False, **overrides)
    attach(plain, PacaSpec(rank=4))
    plain.get_input_embeddings().weight.requires_grad_()
    lean = copy.deepcopy(plain)
    rewrite(lean)
    return plain, lean


def gradients(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of all that trains."""
    loss = model(**batch).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of a tensor, to its size."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


# --- the same values


@pytest.mark.parametrize("family", FOUND)
def test_gradients_are_those_of_the_plain_model(family: str) -> None:
    """In float64 to 1e-8, bit for bit in bf16 but where a class writes its activation out; losses to fp32's rounding.

    torch's product for experts has no float64.
    """
    overrides, wanted = FOUND[family]
    batch = batch_of(family)
    limits = {torch.float64: 1e-8, torch.float32: 3e-6, torch.bfloat16: 0.0}
    for dtype, limit in list(limits.items())[family == "mixtral" :]:
        plain, lean = pair(family, dtype, **overrides)
        (loss, ours), (plain_loss, theirs) = gradients(lean, batch), gradients(plain, batch)
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
        is_rounded = dtype is torch.bfloat16 and family in ("gpt2", "t5")
        assert furthest(ours, theirs) <= (0.05 if is_rounded else limit), dtype
    assert rewrite(restored(lean)) == lean_pass.Rewritten(*wanted, left=rewrite(restored(lean)).left)


def restored(model: Any) -> Any:
    """The plain model again."""
    restore(model)
    return model


@pytest.mark.parametrize(
    ("family", "overrides"),
    (
        ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.7}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ),
)
def test_what_a_class_does_to_its_logits_is_done(family: str, overrides: Mapping[str, object]) -> None:
    """Granite divides them, Cohere multiplies them, Gemma 2 caps them; each is found by the numbers in its config."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "pad_token_id": 0, **overrides}  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    plain: Any = transformers.AutoModelForCausalLM.from_config(config).double().train()
    plain.lm_head.weight.data.mul_(30.0)
    plain.requires_grad_(requires_grad=False).get_input_embeddings().weight.requires_grad_()
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach(), requires_grad=False)  # where it is tied
    lean = copy.deepcopy(plain)
    assert rewrite(lean).loss
    ids = torch.randint(64, (2, 7))
    batch = {"input_ids": ids, "labels": ids}
    (loss, ours), (plain_loss, theirs) = gradients(lean, batch), gradients(plain, batch)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    assert furthest(ours, theirs) < 1e-8


def test_accumulated_batches_divide_by_their_labels() -> None:
    """`num_items_in_batch`, a tensor or a number, as the trainer gives it."""
    plain, lean = pair("llama", torch.float64)
    batch = batch_of("llama")
    for items in (torch.tensor(31), 31):
        (loss, ours), (plain_loss, theirs) = (
            gradients(m, {**batch, "num_items_in_batch": items}) for m in (lean, plain)
        )
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
        assert furthest(ours, theirs) < 1e-8


@pytest.mark.parametrize("method", ("full", "read", "checkpointing", "autocast"))
def test_any_method_and_setting_can_have_it(method: str) -> None:
    """What trains has the same gradients: all weights, a side network, with checkpointing, under autocast."""
    plain = built("llama")
    if method == "read":
        attach(plain, ReadSpec(hidden=8))
    elif method != "full":
        attach(plain, PacaSpec(rank=4))
    lean = copy.deepcopy(plain)
    assert rewrite(lean).loss == (method != "full")
    if method == "checkpointing":
        for model in (plain, lean):
            set_checkpointing(model, on=True)
    batch = batch_of("llama")
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "autocast"):
        (loss, ours), (plain_loss, theirs) = gradients(lean, batch), gradients(plain, batch)
        kept = [saved_bytes(model, lambda one=model: one(**batch).loss) for model in (lean, plain)]  # type: ignore[misc]
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    assert furthest([a for a, b in zip(ours, theirs, strict=True) if b.any()], [b for b in theirs if b.any()]) < 2e-6
    assert kept[0] < 0.95 * kept[1]


def test_peft_wraps_a_lean_model() -> None:
    """PEFT calls the inner model's forward itself: the loss is lean there, too."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(built("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    lean = copy.deepcopy(wrapped)
    assert rewrite(lean).loss
    batch = batch_of("llama")
    assert lean(**batch).logits is None
    (_, ours), (_, theirs) = gradients(lean, batch), gradients(wrapped, batch)
    moved = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.any()]
    assert furthest(*map(list, zip(*moved, strict=True))) < 1e-6  # type: ignore[arg-type]
    restore(lean)
    assert not is_lean(lean)
    assert lean(**batch).logits is not None


# --- the functions alone


@pytest.mark.parametrize("rows", (1, 5, 13))
@pytest.mark.parametrize("cap", (None, 3.0))
def test_chunks_change_nothing(rows: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that do not divide the rows, one of which has no label; gradients of weight and bias where they train."""
    monkeypatch.setattr(lean_functions, "CHUNK_BYTES", 1)
    monkeypatch.setattr(lean_functions, "CHUNK_ROWS", rows)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((13, 8), (11, 8), (11,))]
    labels = torch.randint(11, (13,))
    labels[:6] = IGNORED
    z = functional.linear(*inputs)
    z = z if cap is None else cap * torch.tanh(z / cap)
    wanted = functional.cross_entropy(z.float(), labels)
    found = linear_cross_entropy(*inputs, labels, logits=Logits(cap=cap))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert furthest(list(torch.autograd.grad(found, inputs)), list(torch.autograd.grad(wanted, inputs))) < 1e-8


def test_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as the logits lives at any time."""
    monkeypatch.setattr(lean_functions, "CHUNK_BYTES", 4 * 512 * 16)
    monkeypatch.setattr(lean_functions, "CHUNK_ROWS", 1)
    hidden, weight = torch.randn(256, 4, requires_grad=True), torch.randn(512, 4)
    live = LiveBytes(nn.Module())
    with live.watching():
        linear_cross_entropy(hidden, weight, None, torch.randint(512, (256,))).backward()  # type: ignore[no-untyped-call]
    assert 3 * 4 * 512 * 16 <= live.peak < 4 * 512 * 256 / 2


def test_fp16_keeps_small_gradients() -> None:
    """Of many labels each has little part in the mean: it is divided after the product, where fp16 would lose it."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 8), torch.randn(300, 8) / 3, torch.randint(300, (64,))
    items, scale = 50_000, 2.0**12
    exact, half = hidden.clone().requires_grad_(), hidden.half().requires_grad_()
    (linear_cross_entropy(exact, weight, None, labels, items=items) * scale).backward()  # type: ignore[no-untyped-call]
    (linear_cross_entropy(half, weight.half(), None, labels, items=items) * scale).backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    assert half.grad is not None
    assert furthest([half.grad.float()], [exact.grad]) < 0.01


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives(name: str) -> None:
    """Each activation's backward is the derivative of its forward."""
    x = torch.linspace(-4, 4, 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: activate(t, ACTIVATIONS[name]), x, atol=1e-3)  # GELU's formulas differ


def test_norms_weights_train_too() -> None:
    """A norm's weight that trains gets the gradient that autograd gives it."""
    x = torch.randn(3, 5, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    wanted = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    found = rms_norm(x, weight, Norm("first", 0.0, 1e-5))
    direction = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, [x, weight], direction) for y in (found, wanted))
    assert torch.equal(found, wanted)
    assert furthest(list(ours), list(theirs)) < 1e-6


# --- what is kept


def test_a_llama_keeps_eleven_and_a_half_widths() -> None:
    """A token of a layer keeps two residuals, attention's three inputs and its output, gate and up, and few numbers."""
    sizes = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1}
    kept, batch = [], batch_of("llama", tokens=32)
    for layers in (2, 3):
        model = built("llama", torch.bfloat16, **sizes, num_hidden_layers=layers)
        as_floor(model)
        rewrite(model)
        kept.append(saved_bytes(model, lambda one=model: one(**batch).loss))  # type: ignore[misc]
    a_layer = (kept[1] - kept[0]) / (2 * 32)  # bytes a token: of 16 bits
    # residuals, attention in and out, gate and up; a number for each norm, and attention's own of each head
    assert a_layer == 2 * (2 * 64 + (64 + 2 * 16 + 64) + 2 * 224) + 4 * (2 + 4)


@pytest.mark.parametrize(
    ("family", "method"), (("llama", "paca"), ("llama", "full"), ("gpt2", "paca"), ("gemma3", "paca"))
)
def test_predicted_to_the_byte(family: str, method: str, tiny_model: TinyModel) -> None:
    """`surgery plan --lean` says what a lean model's forward keeps."""
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if family == "gpt2" else {}
    base = tiny_model(family, overrides=dropout)
    run = Run(2, 24, lean="on")
    spec = PacaSpec(rank=4)
    predicted = predict(open_subject(base, method, spec if method == "paca" else None, TaskSpec(), run), run)
    model = built(family)
    if method == "paca":
        attach(model, spec)
    rewrite(model)
    batch = {**batch_of(family, tokens=24), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    kept = saved_bytes(model, lambda: model(**batch).loss)
    assert sum(predicted.activations.values()) == kept


def test_the_command_says_what_it_made_lean(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What is the default on the CPU, also of a run that was finished before; `--no-lean` is a plain run.

    So is one whose forwards are too small for the blocks' own cost not to show.
    """
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS) * 4, encoding="utf-8")
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    asked = [
        "train",
        str(tmp_path / "adapter"),
        "--data",
        str(text),
        "--device",
        "cpu",
        "max_steps=1",
        "max_length=40",
        "batch_size=64",
    ]
    for resume in ("no", "auto"):
        result = CliRunner().invoke(cli, [*asked, "--resume", resume])
        assert result.exit_code == 0, result.output
        assert "lean: 5 norms, 2 gated MLPs, the loss" in result.stdout.splitlines()
    kernels = open_adapter(tmp_path / "adapter").record.manifest.training["kernels"]
    assert kernels["lean"] == "5 norms, 2 gated MLPs, the loss"
    for other in ("--no-lean", "batch_size=2"):
        result = CliRunner().invoke(cli, [*asked, other])
        assert result.exit_code == 0, result.output
        assert "lean:" not in result.stdout
        assert open_adapter(tmp_path / "adapter").record.manifest.training["kernels"]["lean"] == ""


def test_a_plan_is_of_the_run_that_would_be(tiny_model: TinyModel) -> None:
    """On the CPU lean, of CUDA not; LoRA and full tuning, which others run, only where it is asked for."""
    asked: Mapping[str, bool] = {
        "--device cpu": True, "--device cpu --no-lean": False, "--device cuda": False, "--device cuda --lean": True,
        "--device cpu train.compile=true": False, "--device cpu --method lora": False,
        "--device cpu --method full": False,
        "--device cpu --method full --lean": True, "--device cpu --method read": True,
    }  # fmt: skip
    for line, wanted in asked.items():
        result = CliRunner().invoke(cli, ["plan", str(tiny_model("llama")), "--batch", "16", *line.split()])
        assert (", lean blocks" in result.stdout.splitlines()[1]) == wanted, line
    result = CliRunner().invoke(cli, ["plan", str(tiny_model("llama")), "--batch", "15", "--device", "cpu"])
    assert ", lean blocks" not in result.stdout
    for lean, found in (("auto", ""), ("off", "")):
        result = CliRunner().invoke(
            cli, ["plan", str(tiny_model("vit")), "--device", "cpu", f"train.lean={lean}", "--json"]
        )
        assert json.loads(result.stdout)["lean"] == found


class _Strange(nn.Module):
    """Has the look of an activation, and takes nothing but what its model gives it."""

    def forward(self, x: Tensor) -> Tensor:
        return {3: x}[x.dim()]


def test_a_stranger_is_left_alone() -> None:
    """Whatever a module's forward says of a stand-in's inputs: it is left, and its hooks see nothing of that."""
    model, seen = built("llama"), list[object]()
    model.model.layers[0].strange = _Strange()
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert rewrite(model).gates == 2
    assert not seen


def test_a_training_run_is_lean(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step keeps what was predicted, its adapter in bf16 is the plain run's, and nothing of it is in the files."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS) * 4, encoding="utf-8")
    data, base = DataSection(train=[str(text)], max_length=40), tiny_model("llama", dtype=torch.bfloat16)
    written = {}
    for lean in ("on", "off"):
        apply(base, tmp_path / lean, PacaSpec(rank=4))
        settings = TrainSection(lean=lean, max_steps=2, batch_size=2, gradient_accumulation=2)
        found = measure_ours(monkeypatch, tmp_path / lean, data, settings, TaskSpec())
        monkeypatch.undo()
        run = Run(found.batch, found.sequence, lean=lean)
        predicted = predict(open_subject(base, "paca", PacaSpec(rank=4), TaskSpec(), run), run)
        assert 0 <= found.saved - sum(predicted.activations.values()) <= 8  # the trainer's own factor of the loss
        written[lean] = (tmp_path / lean / "adapter.safetensors").read_bytes()
        assert "lean" not in (tmp_path / lean / "config.json").read_text()
    assert written["on"] == written["off"]


# --- when it does what it did


def test_logits_are_there_when_they_are_asked_for() -> None:
    """In eval mode, without labels, without gradients, and where a call says so; with the plain model's bits."""
    plain, lean = pair("llama")
    batch = batch_of("llama")
    ids = {"input_ids": batch["input_ids"]}
    calls: Mapping[str, Callable[[Any], Any]] = {
        "no labels": lambda model: model(**ids).logits,
        "logits_to_keep": lambda model: model(**ids, logits_to_keep=2).logits,
        "return_dict": lambda model: model(**batch, return_dict=False)[1],
        "shifted labels": lambda model: model(**batch, shift_labels=batch["labels"]).logits,
    }
    for name, call in calls.items():
        assert torch.equal(call(lean), call(plain)), name
    assert lean(**batch).logits is None
    with torch.no_grad():
        assert torch.equal(lean(**batch).logits, plain(**batch).logits)
    for model in (lean, plain):
        model.eval()
    assert torch.equal(lean(**batch).logits, plain(**batch).logits)
    assert lean(**batch).loss == plain(**batch).loss
    assert torch.equal(*(m.generate(ids["input_ids"][:, :4], max_new_tokens=3, do_sample=False) for m in (lean, plain)))


def test_a_forward_that_fails_leaves_nothing_asked() -> None:
    """After an error inside a training forward the next call without labels has its logits."""
    _, lean = pair("llama")
    with pytest.raises(IndexError):
        lean(input_ids=torch.full((1, 3), 10**6), labels=torch.zeros(1, 3, dtype=torch.long))
    assert lean(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.shape[-1] == lean.config.vocab_size


def test_detach_leaves_a_plain_model() -> None:
    """Every class is what it was, no attribute is left, and the state's names and values never changed."""
    plain, lean = pair("qwen3")
    assert {k: v.shape for k, v in lean.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert type(lean).__name__ == type(plain).__name__
    detach(plain, merge=False)
    detach(lean, merge=False)
    for one, other in zip(lean.modules(), plain.modules(), strict=True):
        assert type(one) is type(other)
        assert vars(one).keys() == vars(other).keys()
    restore(lean)  # which changes nothing


def test_a_copy_is_lean_by_itself() -> None:
    """A deep copy has a head of its own, and restoring one leaves the other."""
    _, lean = pair("llama")
    other = copy.deepcopy(lean)
    restore(lean)
    assert other.lean is other.lm_head
    assert is_lean(other)
    assert other(**batch_of("llama")).logits is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of its functions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_in_one_graph() -> None:
    """torch.compile takes a lean model whole, with the same gradients."""
    plain, lean = pair("llama")
    batch = batch_of("llama")
    lean.compile(backend="aot_eager", fullgraph=True)
    (loss, ours), (plain_loss, theirs) = gradients(lean, batch), gradients(plain, batch)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    assert furthest(ours, theirs) < 1e-5


# --- what it refuses


def test_nothing_to_rewrite_is_an_error_with_the_reason() -> None:
    """ViT has torch's LayerNorm and GELU, which keep the least already, and no language model's loss."""
    with pytest.raises(UnsupportedError, match=r"nothing in ViTForImageClassification can be made lean .*no language"):
        rewrite(build_model("vit"))
    model = built("llama")
    rewrite(model)
    with pytest.raises(RequestError, match="the model is lean already"):
        rewrite(model)


class _OtherNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 1e-4


class _OtherMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class _OtherLoss(transformers.LlamaForCausalLM):
    @property
    def loss_function(self) -> Any:
        return lambda logits, labels, **_: logits.float().pow(2).mean() + 0 * labels.sum()


def test_what_computes_something_else_is_left() -> None:
    """Classes with the look of a norm, a gated MLP and a language model, which are none of those known."""
    model = built("llama").requires_grad_(requires_grad=False)
    model.__class__ = _OtherLoss
    model.model.layers[0].mlp.__class__ = _OtherMLP
    model.model.norm.__class__ = _OtherNorm
    found = rewrite(model)
    assert (found.norms, found.gates, found.loss) == (4, 1, False)
    assert [text.split()[0] for text in found.left] == ["_OtherMLP", "_OtherNorm", "_OtherLoss"]
    assert not isinstance(model.model.norm, Lean)


def test_a_head_that_trains_keeps_its_logits() -> None:
    """PaCA in the output head gets its gradient from all logits: blocks are lean, the loss is not."""
    model = built("llama")
    attach(model, PacaSpec(rank=2, targets=("lm_head",)))
    found = rewrite(model)
    assert not found.loss
    assert found.left == ("lm_head is a PacaLinear, which trains or is wrapped",)
    assert model(**batch_of("llama")).logits is not None


def test_a_pass_that_breaks_its_word_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it ensures is checked: here a parameter that trained does not any more."""
    assert "same parameters" in LEAN.ensures
    real = lean_blocks.become

    def become(module: Any, *args: Any) -> None:
        real(module, *args)
        for parameter in module.parameters():
            parameter.requires_grad_(requires_grad=False)

    monkeypatch.setattr(lean_pass, "become", become)
    with pytest.raises(CheckError, match=r"it changed 11 tensors, first model\.layers\.0\.input_layernorm\.weight"):
        rewrite(built("llama"))


def test_auto_is_where_it_was_measured() -> None:
    """On the CPU, and there it leaves a model alone that has nothing to rewrite; `on` says so. It is the default."""
    assert choose_lean(TrainSection(), "cpu")
    assert not choose_lean(TrainSection(), "hpu")
    assert not choose_lean(TrainSection(lean="auto"), "cuda")
    assert not choose_lean(TrainSection(lean="auto", compile=True), "cpu")
    assert not choose_lean(TrainSection(lean="off"), "cpu")
    assert choose_lean(TrainSection(lean="on"), "cuda")
    model = build_model("vit")
    assert prepare(model, TrainSection(lean="auto"), device="cpu", autocast="fp32").lean == ""
    with pytest.raises(UnsupportedError, match="nothing in ViT"):
        prepare(model, TrainSection(lean="on"), device="cpu", autocast="fp32")


def test_the_command_says_what_cannot_be(command: Command, tiny_model: TinyModel) -> None:
    """`surgery plan --lean` of a model without anything to rewrite: exit code 5 and one line."""
    code, error = command("plan", tiny_model("vit"), "--lean")
    assert code == 5
    assert error.startswith("Error: lean: nothing in ViTForImageClassification can be made lean (")


# --- Liger's kernels, whose place ours take here


def pretend_liger(monkeypatch: pytest.MonkeyPatch, **changes: Callable[..., Tensor]) -> list[str]:
    """A liger-kernel that computes by our functions, or as `changes` has it. Returns what has been called."""
    called: list[str] = []

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
        assert not in_place
        called.append(f"norm {mode} {offset}")
        return rms_norm(x, weight, Norm("first" if mode == "llama" else "last", offset, eps))

    def gated(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: (called.append(name), lean_functions.gate(a, b, ACTIVATIONS[name]))[1]

    def loss(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        called.append(f"loss {kwargs['reduction']} {kwargs['softcap']}")
        items = 1 if kwargs["reduction"] == "sum" else None
        return linear_cross_entropy(x, weight, bias, target, items=items, logits=Logits(cap=kwargs["softcap"]))

    functions = {"liger_rms_norm": norm, "liger_swiglu": gated("silu"), "liger_geglu": gated("gelu_tanh"),
                 "liger_fused_linear_cross_entropy": loss, **changes}  # fmt: skip
    package, module = types.ModuleType("liger_kernel.transformers"), types.ModuleType("functional")
    vars(module).update(functions)
    package.functional = module  # type: ignore[attr-defined]
    for name, entry in (("liger_kernel", types.ModuleType("liger_kernel")), ("liger_kernel.transformers", package)):
        monkeypatch.setitem(sys.modules, name, entry)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    return called


def test_ligers_kernels_are_taken_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; what it does not have, ours compute; on the CPU ours do."""
    called = pretend_liger(monkeypatch)
    assert choose_kernels("cpu") is OURS
    from surgery.lean_kernels import liger_kernels, require_alike

    kernels = liger_kernels()
    require_alike(kernels, "cpu")
    called.clear()
    plain = built("gemma2")
    attach(plain, PacaSpec(rank=4))
    lean = copy.deepcopy(plain)
    rewrite(lean, kernels=kernels)
    (_, ours), (_, theirs) = gradients(lean, batch_of("gemma2")), gradients(plain, batch_of("gemma2"))
    assert furthest(ours, theirs) < 1e-6
    assert set(called) == {"norm gemma 1.0", "gelu_tanh", "loss mean 30.0"}


def test_a_liger_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried beside ours before a model is given to it; so is one that fails."""
    from surgery.lean_kernels import liger_kernels, require_alike

    pretend_liger(monkeypatch, liger_swiglu=lambda a, b: a * b)
    with pytest.raises(UnsupportedError, match=r"liger-kernel: its SwiGLU computes something else, expected"):
        require_alike(liger_kernels(), "cpu")
    pretend_liger(monkeypatch, liger_geglu=lambda a: a)
    with pytest.raises(UnsupportedError, match=r"liger-kernel: its GeGLU fails here \(TypeError"):
        require_alike(liger_kernels(), "cpu")
