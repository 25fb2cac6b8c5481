"""Plans: what each family's layers are, what is refused, and plans and records as values that stay readable."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import dense
from surgery.adapter import open_adapter
from surgery.checkpoint import Checkpoint
from surgery.errors import (
    DamagedError,
    NotAModelError,
    RequestError,
    SelectorError,
    SurgeryError,
    UnsupportedError,
)
from surgery.manifest import read_record
from surgery.methods.paca_plan import planned_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.plan import SurgeryPlan, Target, Untouched, WholeTarget
from surgery.planning import plan_checkpoint
from surgery.survey import TaskSpec
from surgery.tensorfile import build_header
from tests.conftest import TinyModel, digest_folder
from tests.tiny import FAMILIES

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
GOLDEN = Path(__file__).parent / "golden"
RANK_2 = PacaSpec(rank=2)

LLAMA = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
)
MOE = LLAMA[:2]
BERT = (
    "attention.self.query attention.self.key attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BART_ENCODER = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
T5_BLOCK = ("layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v", "layer.0.SelfAttention.o")

# One line per stack: the path of its blocks, and the layers of a block by what feeds them (all models have two blocks).
STACKS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"), (("model.layers", LLAMA),)),
    "phi3": (("model.layers", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),),
    "gpt2": (("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),),
    "opt": (("model.decoder.layers", BART_ENCODER),),
    "bert": (("bert.encoder.layer", BERT),),
    "roberta": (("roberta.encoder.layer", BERT),),
    "distilbert": (
        (
            "distilbert.transformer.layer",
            ("attention.q_lin attention.k_lin attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
        ),
    ),
    "t5": (
        ("encoder.block", (*T5_BLOCK, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")),
        (
            "decoder.block",
            (
                *T5_BLOCK,
                "layer.1.EncDecAttention.q",
                "layer.1.EncDecAttention.o",
                "layer.2.DenseReluDense.wi",
                "layer.2.DenseReluDense.wo",
            ),
        ),
    ),
    "bart": (
        ("model.encoder.layers", BART_ENCODER),
        ("model.decoder.layers", (*BART_ENCODER, "encoder_attn.q_proj", "encoder_attn.out_proj")),
    ),
    "vit": (
        (
            "vit.layers",
            (
                "attention.q_proj attention.k_proj attention.v_proj",
                "attention.o_proj",
                "mlp.fc1",
                "mlp.fc2",
            ),
        ),
    ),
    "mixtral": (("model.layers", MOE),),
    "qwen3_moe": (("model.layers", MOE),),
}
# Groups that no block holds alone: the heads of masked models, and cross-attention, whose layers all read the encoder.
BEYOND: dict[str, tuple[str, ...]] = {
    "bert": ("cls.predictions.transform.dense",),
    "roberta": ("lm_head.dense",),
    "distilbert": ("vocab_transform",),
    "t5": (" ".join(f"decoder.block.{n}.layer.1.EncDecAttention.{p}" for n in (0, 1) for p in "kv"),),
    "bart": (" ".join(f"model.decoder.layers.{n}.encoder_attn.{p}_proj" for n in (0, 1) for p in "kv"),),
}


def expected_groups(family: str) -> set[frozenset[str]]:
    """The sets of layers that share an input, by full name."""
    groups = [frozenset(names.split()) for names in BEYOND.get(family, ())]
    for path, block in STACKS[family]:
        groups += [frozenset(f"{path}.{n}.{name}" for name in names.split()) for n in (0, 1) for names in block]
    return set(groups)


def groups_of(plan: SurgeryPlan) -> set[frozenset[str]]:
    """The sets of layers that share a group."""
    groups: dict[str, set[str]] = {}
    for target in plan.targets:
        groups.setdefault(target.group, set()).add(target.module)
    assert all(name == min(members) for name, members in groups.items())
    return {frozenset(members) for members in groups.values()}


@pytest.fixture(scope="module")
def plan_of(tiny_model: TinyModel) -> Callable[[str], SurgeryPlan]:
    """The plan of a family's tiny model at rank 2, made once."""
    plans: dict[str, SurgeryPlan] = {}

    def make(family: str) -> SurgeryPlan:
        if family not in plans:
            plans[family] = plan_checkpoint(Checkpoint.open(tiny_model(family)), RANK_2)
        return plans[family]

    return make


def copied(folder: Path, tmp_path: Path, **config: object) -> Path:
    """A copy that may be written to, with entries of config.json changed."""
    out = Path(shutil.copytree(folder, tmp_path / "copy"))
    document = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(document | config))
    return out


# --- families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family_is_found_with_its_group(family: str, plan_of: Callable[[str], SurgeryPlan]) -> None:
    """All linear layers but heads and experts are targets; those fed by one tensor share a group, others do not."""
    assert groups_of(plan_of(family)) == expected_groups(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_say_what_the_file_says(
    family: str, plan_of: Callable[[str], SurgeryPlan], tiny_model: TinyModel
) -> None:
    """Each target's weight stands in the file with that shape and dtype, along the right axis."""
    opened = Checkpoint.open(tiny_model(family))
    for target in plan_of(family).targets:
        assert (opened[target.weight].shape, opened[target.weight].dtype) == (target.shape, target.dtype)
        assert target.input_axis == (0 if family == "gpt2" else 1)
        assert (target.rank, target.sha256) == (2, "")


UNTOUCHED = {
    "llama": {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output head"},
    "gpt2": {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"},
    "mixtral": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.gate.weight": "in MixtralTopKRouter",
        "model.layers.*.mlp.experts.gate_up_proj": "experts: name them in --targets",
        "model.layers.*.mlp.experts.down_proj": "experts: name them in --targets",
        "lm_head.weight": "output head",
    },
    "qwen3_moe": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.gate.weight": "in Qwen3MoeTopKRouter",
        "model.layers.*.mlp.experts.gate_up_proj": "experts: name them in --targets",
        "model.layers.*.mlp.experts.down_proj": "experts: name them in --targets",
        "lm_head.weight": "output head",
    },
    "vit": {
        "vit.embeddings.cls_token": "in ViTEmbeddings",
        "vit.embeddings.position_embeddings": "in ViTEmbeddings",
        "vit.embeddings.patch_embeddings.projection.weight": "convolution",
    },
}


@pytest.mark.parametrize("family", UNTOUCHED)
def test_what_is_not_touched_is_named_with_the_reason(family: str, plan_of: Callable[[str], SurgeryPlan]) -> None:
    """Embeddings, heads, routers and experts stand in the table, folded over layers, with how many they are."""
    untouched = plan_of(family).untouched
    assert {entry.pattern: entry.reason for entry in untouched} == UNTOUCHED[family]
    assert all(entry.count == (2 if "*" in entry.pattern else 1) for entry in untouched)


def test_tied_heads_are_left_out_and_named(tiny_model: TinyModel) -> None:
    """With tied embeddings the head is no target and no surplus; asking for it by name is an error that says why."""
    folder = tiny_model("llama", overrides={"tie_word_embeddings": True})
    plan = plan_checkpoint(Checkpoint.open(folder), RANK_2)
    assert [entry.pattern for entry in plan.untouched] == ["model.embed_tokens.weight"]
    with pytest.raises(SelectorError, match="lm_head"):
        plan_checkpoint(Checkpoint.open(folder), PacaSpec(rank=2, targets=("lm_head",)))


def test_an_untied_head_is_trained_when_named(tiny_model: TinyModel) -> None:
    """`all-linear` leaves the head out; its own name brings it in."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=2, targets=("lm_head", "q_proj")))
    assert [target.module for target in plan.targets] == [
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_columns_do_not_depend_on_what_else_is_trained(
    tiny_model: TinyModel, plan_of: Callable[[str], SurgeryPlan]
) -> None:
    """A layer's group, and so its columns, are the same when its neighbours are not selected."""
    alone = plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=2, targets=("v_proj", "up_proj")))
    together = {target.module: target for target in plan_of("llama").targets}
    for target in alone.targets:
        assert target == together[target.module]
        assert torch.equal(planned_columns(alone, target), planned_columns(plan_of("llama"), together[target.module]))


def test_one_plan_one_id(tiny_model: TinyModel, plan_of: Callable[[str], SurgeryPlan]) -> None:
    """Planning twice gives the same plan and id; another seed gives another."""
    again = plan_checkpoint(Checkpoint.open(tiny_model("llama")), RANK_2)
    assert (again, again.id) == (plan_of("llama"), plan_of("llama").id)
    other = plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=2, seed=1))
    assert other.id != again.id


def test_mixed_dtypes_are_seen_per_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A target's dtype is its own tensor's, not the folder's."""
    folder = copied(tiny_model("llama"), tmp_path)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].half()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    plan = plan_checkpoint(Checkpoint.open(folder), PacaSpec(rank=2, targets=("up_proj", "gate_proj")))
    assert [target.dtype for target in plan.targets] == ["F32", "BF16", "F32", "F16"]


# --- tasks


def test_a_new_head_is_trained_whole(tiny_model: TinyModel) -> None:
    """A classifier on a masked model: pooler and classifier are new and whole, the config gets the labels."""
    plan = plan_checkpoint(
        Checkpoint.open(tiny_model("bert")), RANK_2, TaskSpec("sequence-classification", ("bad", "fine", "good"))
    )
    assert plan.architecture == "BertForSequenceClassification"
    assert {target.parameter: target.shape for target in plan.whole} == {
        "bert.pooler.dense.bias": (32,),
        "bert.pooler.dense.weight": (32, 32),
        "classifier.bias": (3,),
        "classifier.weight": (3, 32),
    }
    assert plan.config["id2label"] == {"0": "bad", "1": "fine", "2": "good"}
    assert plan.config["architectures"] == ["BertForSequenceClassification"]
    assert not any("classifier" in target.module or "pooler" in target.module for target in plan.targets)


def test_a_new_head_has_the_dtype_of_the_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An integer buffer that stands first in the file (as BERT's position ids do) does not make an integer head."""
    folder = copied(tiny_model("bert", dtype=torch.bfloat16), tmp_path)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    opened = Checkpoint.open(folder)
    assert next(iter(opened.values())).dtype == "I64"
    plan = plan_checkpoint(opened, RANK_2, TaskSpec("sequence-classification", ("no", "yes")))
    assert {target.dtype for target in plan.whole} == {"BF16"}


def test_a_checkpoint_s_own_head_keeps_its_place(tiny_model: TinyModel) -> None:
    """An image classifier's head is trained whole, under the name and with the shape it has in the file."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("vit")), RANK_2)
    assert [(t.parameter, t.weight, t.shape) for t in plan.whole] == [
        ("classifier.bias", "classifier.bias", (3,)),
        ("classifier.weight", "classifier.weight", (3, 32)),
    ]
    assert (plan.task, plan.config) == ("image-classification", {})


@pytest.mark.parametrize(
    ("family", "task", "error"),
    (
        ("llama", "sequence-clasification", RequestError),
        ("gpt2", "image-classification", UnsupportedError),
        ("vit", "causal-lm", UnsupportedError),
    ),
)
def test_tasks_that_do_not_exist(family: str, task: str, error: type[SurgeryError], tiny_model: TinyModel) -> None:
    """An unknown task names the closest; a task transformers has no class for is unsupported."""
    with pytest.raises(error, match="--task"):
        plan_checkpoint(Checkpoint.open(tiny_model(family)), RANK_2, TaskSpec(task))


# --- refusals


@pytest.mark.parametrize(
    ("spec", "text"),
    (
        ({"rank": 33}, "--rank: 33 for .*, expected 1 to 32"),
        ({"rank": 2, "rank_pattern": {"down_proj": 49}}, "49 for model.layers.0.mlp.down_proj, expected 1 to 48"),
        ({"rank": 2, "rank_pattern": {"donw_proj": 4}}, "--rank-pattern: 'donw_proj'.*closest is 'down_proj'"),
        ({"rank": 2, "targets": ("qproj",)}, "--targets: 'qproj' matches no linear layer.*'q_proj'"),
        ({"rank": 2, "targets": ()}, "no layer is left"),
        ({"rank": 2, "exclude": ("*",)}, "no layer is left"),
        ({"rank": 2, "exclude": ("lm_head",)}, "--exclude: 'lm_head' matches no linear layer"),
        ({"rank": 2, "targets": ("re:*",)}, "--targets: .* no regular expression"),
        ({"rank": 2, "exclude": ("re:*",)}, "--exclude: .* no regular expression"),
        ({"rank": 2, "rank_pattern": {"re:*": 4}}, "--rank-pattern: .* no regular expression"),
        ({"rank": 2, "targets": ("embed_tokens",)}, "matches no linear layer"),
    ),
)
def test_requests_that_cannot_be_met(spec: dict[str, Any], text: str, tiny_model: TinyModel) -> None:
    """Rank beyond a width, patterns that mean nothing, no target at all: exit code 2 and the reason."""
    with pytest.raises(SelectorError, match=text) as caught:
        plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(**spec))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("wrong", ({"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")},
                                   {"alpha": float("inf")}, {"select": "best"}))  # fmt: skip
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    """A spec is checked where it is made."""
    with pytest.raises(RequestError):
        PacaSpec(**wrong)


def test_one_target_may_be_given_as_text() -> None:
    """`targets="all-linear"` is one selector, not ten letters."""
    assert PacaSpec(targets="all-linear", exclude="q_proj") == PacaSpec(exclude=("q_proj",))


@pytest.mark.parametrize(
    ("config", "error", "text"),
    (
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedError, "quantized by gptq"),
        ({"quantization_config": "odd"}, UnsupportedError, "quantized by some"),
        ({"model_type": "lama"}, NotAModelError, "config.json: transformers cannot read it"),
        ({"model_type": ["llama"]}, NotAModelError, "config.json"),
        ({"model_type": None}, NotAModelError, "config.json"),
        ({"hidden_size": "32"}, NotAModelError, "config.json"),
        ({"hidden_size": -32}, NotAModelError, "config.json"),
        ({"num_attention_heads": 0}, NotAModelError, "config.json"),
        ({"architectures": "LlamaForCausalLM"}, NotAModelError, "config.json"),
        ({"architectures": [7]}, NotAModelError, "config.json"),
        ({"intermediate_size": 40}, DamagedError, r"shape \(48, 32\), expected \(40, 32\)|shape \(32, 48\)"),
        ({"num_hidden_layers": 3}, DamagedError, "it lacks 9 tensors of LlamaForCausalLM"),
    ),
    ids=str,
)
def test_configs_that_do_not_describe_the_weights(
    config: dict[str, object], error: type[SurgeryError], text: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Quantized, unknown, nonsensical or unlike the file: each with a documented error."""
    folder = copied(tiny_model("llama"), tmp_path, **config)
    with pytest.raises(error, match=text):
        plan_checkpoint(Checkpoint.open(folder), RANK_2)


@pytest.mark.parametrize("text", (None, "", "{", "[]", "{}", '{"architectures": ["LlamaForCausalLM"]}'))
def test_a_folder_without_a_usable_config_is_no_model(text: str | None, tiny_model: TinyModel, tmp_path: Path) -> None:
    """No config.json, one that does not parse, one that says nothing."""
    folder = copied(tiny_model("llama"), tmp_path)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises((NotAModelError, DamagedError), match=r"config\.json"):
        plan_checkpoint(Checkpoint.open(folder), RANK_2)


def test_remote_code_is_never_asked_for(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that brings its own code is refused without a question and without running it."""
    code = "raise SystemExit('the code ran')\n"
    folder = copied(
        tiny_model("llama"), tmp_path, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"}
    )
    (folder / "configuration_mine.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"it asked {prompt!r}"))
    with pytest.raises(NotAModelError, match=r"trust_remote_code|custom code"):
        plan_checkpoint(Checkpoint.open(folder), RANK_2)


def test_integer_weights_are_unsupported(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A target in a dtype without gradients names the layer to leave out."""
    folder = copied(tiny_model("llama"), tmp_path)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"dtype I8.*--exclude model\.layers\.0\.mlp\.up_proj"):
        plan_checkpoint(Checkpoint.open(folder), RANK_2)


# --- 70B


PLAN_LARGE = """
import json, resource, sys, time
start = time.perf_counter()
from surgery.checkpoint import Checkpoint
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import plan_checkpoint
plan = plan_checkpoint(Checkpoint.open(sys.argv[1]), PacaSpec())
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "targets": len(plan.targets), "groups": len({t.group for t in plan.targets}), "values": plan.trained_values,
}))
"""


def write_sparse_70b(folder: Path) -> int:
    """A Llama of 70 billion values as 80 shards of headers with nothing behind them; returns the size it claims."""
    hidden, inner, heads = 8192, 28672, 1024
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (heads, hidden), "self_attn.v_proj": (heads, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    weight_map, total = {}, 0
    for layer in range(80):
        file = f"model-{layer + 1:05d}-of-00080.safetensors"
        tensors = [(f"model.layers.{layer}.{name}.weight", "BF16", shape) for name, shape in shapes.items()]
        if layer == 79:
            tensors += [(f"{name}.weight", "BF16", (128256, hidden)) for name in ("lm_head", "model.embed_tokens")]
            tensors += [("model.norm.weight", "BF16", (hidden,))]
        header = build_header(tensors, {"format": "pt"})
        size = len(header) + 2 * sum(torch.Size(shape).numel() for _, _, shape in tensors)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
        weight_map |= {name: file for name, _, _ in tensors}
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 128256,
              "intermediate_size": inner, "num_hidden_layers": 80, "num_attention_heads": 64, "dtype": "bfloat16",
              "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def test_a_70b_checkpoint_is_planned_in_a_minute_and_two_gigabytes(tmp_path: Path, project_root: Path) -> None:
    """140 GB of sparse shards: only headers are read and no weight is made; 60 s and 2 GB, imports included."""
    try:
        assert write_sparse_70b(tmp_path) > 140e9
    except OSError as error:
        pytest.skip(f"needs a file system with sparse files: {error}")
    run = subprocess.run(
        [sys.executable, "-c", PLAN_LARGE, str(tmp_path)], capture_output=True, text=True, check=True, cwd=project_root
    )
    measured = json.loads(run.stdout)
    assert measured["seconds"] < 60
    assert measured["peak_bytes"] < 2e9
    assert (measured["targets"], measured["groups"]) == (560, 320)
    assert measured["values"] == 80 * 16 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)


# --- plans and records as values


words = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
documents = st.dictionaries(
    words, scalars | st.lists(scalars, max_size=2) | st.dictionaries(words, scalars, max_size=2), max_size=3
)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """Any valid target."""
    width = draw(st.integers(1, 1 << 20))
    return Target(
        draw(words), draw(words), draw(st.integers(1, 1 << 20)), width, draw(st.integers(0, 1)),
        draw(st.sampled_from(["F32", "BF16"])), draw(st.integers(1, width)), draw(words), draw(words),
    )  # fmt: skip


wholes = st.builds(
    WholeTarget,
    words,
    words.map("head.".__add__),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.just("F32"),
    words,
)
plans = st.builds(
    SurgeryPlan,
    method=st.just("paca"),
    spec=documents,
    architecture=st.sampled_from(("LlamaForCausalLM", "BertModel", "")),
    task=words,
    targets=st.lists(targets(), min_size=1, max_size=3, unique_by=(lambda t: t.module, lambda t: t.weight)).map(
        lambda found: tuple(sorted(found, key=lambda t: t.module))
    ),
    whole=st.lists(wholes, max_size=2, unique_by=lambda w: w.weight).map(tuple),
    untouched=st.lists(st.builds(Untouched, words, st.integers(), words), max_size=2).map(tuple),
    prefix=words,
    config=documents,
)


@pytest.mark.parametrize("name", ("Llama ForCausalLM", "a.b", "x:\n    import os", "1st"))
def test_an_architecture_is_the_name_of_a_class(name: str) -> None:
    """It goes into a modeling file that is run: a record cannot bring code along."""
    with pytest.raises(DamagedError, match="architecture"):
        SurgeryPlan("none", {}, name, "features")


@PROPERTY
@given(plan=plans)
def test_a_plan_survives_json(plan: SurgeryPlan) -> None:
    """to_json and from_dict are inverses; equal plans have equal text and id."""
    again = SurgeryPlan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert (again.to_json(), again.id) == (plan.to_json(), plan.id)


@PROPERTY
@given(plan=plans, data=st.data())
def test_a_plan_s_targets_are_sorted_and_unique(plan: SurgeryPlan, data: st.DataObject) -> None:
    """Repetition, disorder and emptiness are refused."""
    document = plan.to_dict()
    chosen = data.draw(st.permutations([*document["targets"], document["targets"][0]]))
    for wrong in ([], chosen):
        with pytest.raises(DamagedError, match="a sorted list without repetition"):
            SurgeryPlan.from_dict({**document, "targets": list(wrong)})


@pytest.mark.parametrize("schema", (0, 2, "1", None, 1.5, [1]))
def test_an_unknown_schema_is_refused_by_name(schema: object, tmp_path: Path) -> None:
    """Of the record or of its plan; the message says which was found and which is known."""
    document = json.loads((GOLDEN / "adapter-v1" / "surgery.json").read_text())
    for changed in ({**document, "schema": schema}, {**document, "plan": {**document["plan"], "schema": schema}}):
        (tmp_path / "surgery.json").write_text(json.dumps(changed))
        with pytest.raises(RequestError, match="expected 1") as caught:
            read_record(tmp_path, "adapter")
        assert f"schema {schema!r}" in str(caught.value)


def test_the_first_version_s_files_load(tmp_path: Path) -> None:
    """An adapter written by the first version opens, and merges to the very bytes it merged to then."""
    adapter = open_adapter(GOLDEN / "adapter-v1")
    assert adapter.plan.trained_values == 3 * 2 + 3 * 1 + 6
    assert adapter.plan.id == "41cb5f5e0e6bfadc"
    assert adapter.delta.moved == 2
    assert adapter.record.manifest.training == {"steps": 7}
    assert [patch.columns.tolist() for patch in adapter.delta.patches.values()] == [[0, 1], [1]]
    merged = dense.export(adapter, tmp_path / "merged")
    for name in ("surgery.json", "surgery.undo"):
        (merged / name).unlink()
    assert digest_folder(merged) == "17d399caac392911680657690a8d1bdae9a140f36fd4157d2c7425fc31864ab5"


def places(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value of a JSON document."""
    yield path
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*path, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from places(value, (*path, number))


def changed_at(document: Any, path: tuple[str | int, ...], value: object) -> Any:
    """A copy of a JSON document with one value replaced, or removed where `value` is `...`."""
    if not path:
        return value
    result = copy.deepcopy(document)
    holder = result
    for step in path[:-1]:
        holder = holder[step]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return result


def test_a_record_with_anything_wrong_in_it_is_refused_or_read(tmp_path: Path) -> None:
    """Each value of a record, replaced by nonsense or left out, gives a working adapter or one of our errors."""
    for name in ("adapter.safetensors", "surgery.json"):
        shutil.copy(GOLDEN / "adapter-v1" / name, tmp_path)
    shutil.copytree(GOLDEN / "base-v1", tmp_path.parent / "base-v1", dirs_exist_ok=True)
    document = json.loads((tmp_path / "surgery.json").read_text())
    outcomes: Counter[str] = Counter()
    for path in places(document):
        for value in (..., None, 0, -1, 2.5, True, "x", "../..", [], [1], {}, {"x": [None]}):
            if not path and value is ...:
                continue
            (tmp_path / "surgery.json").write_text(json.dumps(changed_at(document, path, value)))
            outcomes[try_adapter(tmp_path)] += 1
    assert outcomes["refused"] > 600
    assert outcomes["read"] > 50


def try_adapter(folder: Path) -> str:
    """Open an adapter, read its patches and plan the merge's files."""
    try:
        adapter = open_adapter(folder)
        list(adapter.delta.patches.values())
        dense.plan_files(Checkpoint.open(GOLDEN / "base-v1"), adapter.plan, "keep", None)
    except SurgeryError:
        return "refused"
    return "read"


@pytest.mark.parametrize("task", ("sequence-classification", "token-classification"))
def test_a_head_is_drawn_as_its_class_draws_it(task: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """T5 draws a classification head when it is given the head, not its layers: the spread is that of a new model."""
    base = tiny_model("t5")
    adapter = apply(base, tmp_path / "adapter", PacaSpec(rank=2), task=TaskSpec(task, ("a", "b")))
    model_class = getattr(transformers, adapter.plan.architecture)
    fresh = model_class(transformers.AutoConfig.from_pretrained(base, num_labels=2))
    for name, patch in adapter.delta.whole.items():
        spread = float(fresh.get_parameter(name).detach().std())
        assert float(patch.values.std()) == pytest.approx(spread, rel=0.4)
